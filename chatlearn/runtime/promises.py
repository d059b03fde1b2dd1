# SPDX-License-Identifier: Apache-2.0
"""What `@declares` says of a step, held against what the step returns: a declaration is a promise.

Only the decorator speaks of one method alone. `writes` of a class covers all its steps, each of which may write a part.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import TYPE_CHECKING

from chatlearn.columns import FAILED, OUTCOME, TIMED_OUT
from chatlearn.errors import FlowError
from chatlearn.flow.batch import Batch, size
from chatlearn.flow.declaration import decorated
from chatlearn.flow.graph import Node

if TYPE_CHECKING:
    from chatlearn.runtime.protocol import NodeSpec


def promised_columns(node: Node) -> frozenset[str]:
    """Return the columns that a step says it always writes, as the module calls them.

    An `outcome` may be declared by a step that writes it only where there is something to say.
    """
    said = decorated(node.module, node.method)
    return frozenset(said.writes or ()) - {OUTCOME} if said is not None else frozenset()


def refuse_broken(node: NodeSpec, output: Batch) -> None:
    """Refuse what a step returned, under the outside names of columns, if one is missing that it says it writes.

    Batches of no sample, and of none but failed ones, need not have it.

    Raises:
        FlowError: a column is missing, and no part of it is there.
    """
    start = "" if node.namespace is None else f"{node.namespace}/"
    for column in node.promised:
        wanted = {column, start + column}
        if wanted & output.keys() or _has_part(output, wanted) or _says_nothing(output):
            continue
        inside = sorted(known.removeprefix(start) for known in output)
        close = difflib.get_close_matches(column, set(inside) - node.promised, 1, 0.6)
        raise FlowError(
            f"{node.name} declares that it writes {column!r}, but it returned {inside}",
            place=node.place,
            fix=(f"did you mean {close[0]!r}? " if close else "")
            + f"return {column!r} from every call, or correct what @declares says of the step",
        )


def _has_part(output: Batch, wanted: Collection[str]) -> bool:
    return any(name.startswith(tuple(f"{whole}/" for whole in wanted)) for name in output)


def _says_nothing(output: Batch) -> bool:
    marks = (output[name] for name in output if name.rpartition("/")[2] == OUTCOME)
    return not size(output) or any(
        all(m in (FAILED, TIMED_OUT) for m in column) for column in marks
    )
