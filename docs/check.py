# SPDX-License-Identifier: Apache-2.0
"""Check that every relative link and every path in backticks of the documents leads somewhere.

Run it as `python docs/check.py`; it lists what leads nowhere and exits with 1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_PATH = re.compile(
    r"`((?:chatlearn|docs|examples|tests|benchmarks)/[\w./-]*\.(?:py|md|yaml|json)|(?:docs|examples)/[\w./-]+/)`"
)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    """List the Markdown files of the repository."""
    folders = ("docs", "examples", "benchmarks")
    nested = (path for folder in folders for path in (ROOT / folder).rglob("*.md"))
    return sorted([*ROOT.glob("*.md"), *nested])


def dead_ends(document: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the target of each link or path that leads nowhere."""
    text = document.read_text(encoding="utf-8")
    prose = FENCE.sub(lambda found: "\n" * found.group().count("\n"), text)
    for number, line in enumerate(prose.splitlines(), start=1):
        for target in LINK.findall(line):
            file = target.partition("#")[0]
            outside = target.startswith(("http://", "https://", "mailto:"))
            if file and not outside and not (document.parent / file).exists():
                yield number, target
        for target in CODE_PATH.findall(line):
            if not (ROOT / target).exists():
                yield number, target


def main() -> int:
    """Report the dead ends of all documents."""
    found = [
        f"{document.relative_to(ROOT)}:{line}: {target} does not exist"
        for document in documents()
        for line, target in dead_ends(document)
    ]
    print("\n".join(found) or f"{len(documents())} documents: every link and path leads somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
