# SPDX-License-Identifier: Apache-2.0
"""Save a run so that it can go on, and find it again."""
