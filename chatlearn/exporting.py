# SPDX-License-Identifier: Apache-2.0
"""Leave trained models behind in a format that others load."""

from __future__ import annotations

from chatlearn.module import BaseModule, call_hook
from chatlearn.observability.recorder import Recorder
from chatlearn.program import Program


def export_models(program: Program, recorder: Recorder) -> None:
    """Write what the trainer flow's modules have learned: to `model/`, or `model/<name>/` for several."""
    graph = program.graphs.get("trainer_flow")
    modules = graph.modules if graph else []
    trainers = [m for m in modules if type(m).export_model is not BaseModule.export_model]
    target = recorder.folder.model
    for module in trainers:
        folder = target if len(trainers) == 1 else target / module.name
        with recorder.phase("exporting"):
            call_hook(module, "export_model", folder)
        recorder.note(f"model of {module.name}: {folder}")
