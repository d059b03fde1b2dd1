# SPDX-License-Identifier: Apache-2.0
"""Who learns: one optimisation step, its batches, its models and its schedule."""
