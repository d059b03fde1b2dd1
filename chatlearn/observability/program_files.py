# SPDX-License-Identifier: Apache-2.0
"""What a run folder says of the program: its configuration, who set it, and drawings of its flows."""

from __future__ import annotations

import json
from collections.abc import Mapping

from chatlearn.config import Config, ModuleConfig
from chatlearn.flow.draw import sink_of, to_mermaid, to_svg
from chatlearn.flow.graph import FlowGraph
from chatlearn.observability.run_folder import RunFolder


def write_program(
    folder: RunFolder,
    config: Config,
    graphs: Mapping[str, FlowGraph],
    modules: Mapping[str, ModuleConfig],
) -> None:
    """Write every resolved value, who set it, and drawings of the flows.

    Raises:
        OutputError: a file cannot be written.
    """
    for name, graph in graphs.items():
        sink = sink_of(name, graphs)
        folder.write_text(f"flows/{name}.svg", to_svg(graph, sink=sink))
        folder.write_text(f"flows/{name}.mmd", to_mermaid(graph, sink=sink))
    folder.write_text("config.yaml", config.to_yaml(modules))
    sections = config.to_dict(modules)
    keys = [f"runtime.{key}" for key in sections["runtime"]]
    keys += [f"models.{name}.{key}" for name, m in sections["models"].items() for key in m]
    origins = {key: config.provenance(key) for key in keys}
    folder.write_text("config_origins.json", json.dumps(origins, indent=2))
