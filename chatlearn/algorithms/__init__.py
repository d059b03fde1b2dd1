# SPDX-License-Identifier: Apache-2.0
"""By which maths: pure functions of tensors, one file per algorithm. Nothing here knows models,
batches or config.
"""
