# SPDX-License-Identifier: Apache-2.0
"""Who learns: log-probs of responses, micro-batches by a token budget, the optimiser, one train
step.
"""
