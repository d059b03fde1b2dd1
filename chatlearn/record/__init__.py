# SPDX-License-Identifier: Apache-2.0
"""The record of a run: what went into and came out of every node, in Parquet, and how it is read again."""
