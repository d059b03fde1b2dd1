# SPDX-License-Identifier: Apache-2.0
"""What can be known to be wrong, in vain or surprising in a program before anything is set up."""
