# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run: metrics, progress, transcripts, the run folder and its report."""
