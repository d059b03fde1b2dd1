# SPDX-License-Identifier: Apache-2.0
"""Parts of a recorded run, run again with the code as it is now, and compared with what was."""
