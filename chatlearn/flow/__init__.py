# SPDX-License-Identifier: Apache-2.0
"""What runs: flows are traced into graphs, drawn, and their batches split and merged."""
