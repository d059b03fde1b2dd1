# SPDX-License-Identifier: Apache-2.0
"""Prompts in, samples of an episode, global batches out: everything resumable and seeded."""
