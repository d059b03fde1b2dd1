# SPDX-License-Identifier: Apache-2.0
"""What became of one sample: its prompt, its tokens, its reward, its advantage and every update that it was in."""
