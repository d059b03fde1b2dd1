# SPDX-License-Identifier: Apache-2.0
"""How weights travel from a trainer to the modules that sample with them."""
