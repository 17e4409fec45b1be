"""What no test runs, and nobody has decided to leave so.

    python -m tests.undecided REPORT.json      of `coverage json`

A function with lines or branches that no test runs is named in tests/decided.toml, with the
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
ALLOWED = 40  # lines and branches


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


def functions(report: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (Path(p).stem, name) for p, file in report["files"].items() for name in file["functions"]
    }


def main() -> int:
    report = json.loads(Path(sys.argv[1]).read_text())
    text = tomllib.loads(DECIDED.read_text())
    decided = {(module, name) for module, names in text.items() for name in names}
    count = 0
    for module, name, told in missing(report):
        if (module, name) not in decided:
            count += len(told)
            print(f"undecided: codexd/{module}.py: {name or 'itself'}: {', '.join(told)}")
    gone = sorted(decided - functions(report))
    for module, name in gone:
        print(f"decided, and gone: codexd/{module}.py: {name}")
    print(f"undecided: {count} lines and branches, of which {ALLOWED} may be by chance")
    return int(count > ALLOWED or bool(gone))


if __name__ == "__main__":
    sys.exit(main())
