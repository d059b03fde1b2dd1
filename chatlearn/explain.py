# SPDX-License-Identifier: Apache-2.0
"""What `chatlearn explain` prints: the arithmetic of a configuration, from the functions that the engine uses."""
