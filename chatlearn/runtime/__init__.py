# SPDX-License-Identifier: Apache-2.0
"""Where and when nodes run: a scheduler without I/O, and a driver per backend that carries its commands out."""
