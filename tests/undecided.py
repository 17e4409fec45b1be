"""What no test runs, and nobody has decided to leave so.

    python -m tests.undecided REPORT.json      of `coverage json`

A function with lines or branches that no test runs is named in tests/decided.toml, below the
reason; what is not, is listed here.  A few of those are by chance: which of two is the first
in a race, or whether a process that was killed had told its lines.  More than ALLOWED
are an accident, and so is a decision about a function that is no longer there.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DECIDED = Path(__file__).with_name("decided.toml")
ALLOWED = 10  # lines and branches


def missing(report: dict[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Module, function, and its lines and branches that were not run."""
    for path, file in sorted(report["files"].items()):
        for name, found in file["functions"].items():
            lines = list(map(str, found["missing_lines"]))
            branches = (
                f"{a}->{b if b > 0 else 'end'}"
                for a, b in found["missing_branches"]
                if not {a, b} & set(found["missing_lines"])
            )
            if told := [*lines, *branches]:
                yield Path(path).stem, name, told


def functions(report: dict[str, Any]) -> set[str]:
    """All there are, and module.* for each module."""
    found = {
        (Path(p).stem, name) for p, file in report["files"].items() for name in file["functions"]
    }
    return {f"{module}.{name}" for module, name in found} | {f"{module}.*" for module, _ in found}


def main() -> int:
    report = json.loads(Path(sys.argv[1]).read_text())
    decisions = tomllib.loads(DECIDED.read_text())["decision"]
    decided = {name for decision in decisions for name in decision["of"]}
    count = 0
    for module, name, told in missing(report):
        if not {f"{module}.{name}", f"{module}.*"} & decided:
            count += len(told)
            print(f"undecided: codexd/{module}.py: {name or 'itself'}: {', '.join(told)}")
    gone = sorted(decided - functions(report))
    for name in gone:
        print(f"decided, and gone: {name}")
    print(f"undecided: {count} lines and branches, of which {ALLOWED} may be by chance")
    return int(count > ALLOWED or bool(gone))


if __name__ == "__main__":
    sys.exit(main())
