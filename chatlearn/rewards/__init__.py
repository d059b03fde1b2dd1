# SPDX-License-Identifier: Apache-2.0
"""Rewards: calling a user's functions, and ready-made ones."""
