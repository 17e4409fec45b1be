"""The judge of what no test runs."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.undecided import ALLOWED, DECIDED

ROOT = Path(__file__).resolve().parent.parent
NOTHING = {"missing_lines": [], "missing_branches": []}


def judged(tmp_path: Path, lines: int, gone: str = "") -> subprocess.CompletedProcess[str]:
    """Of a report with all that is decided but `gone`, and one function that lacks `lines`."""
    files: dict[str, dict[str, dict[str, object]]] = {}
    for decision in tomllib.loads(DECIDED.read_text())["decision"]:
        for name in decision["of"]:
            module, _, function = name.partition(".")
            found = files.setdefault(f"codexd/{module}.py", {"functions": {}})["functions"]
            if name != gone:
                found[function] = {**NOTHING, "missing_lines": [1]}
    lacking = {"missing_lines": list(range(lines)), "missing_branches": [[0, 7], [900, -1]]}
    files["codexd/new.py"] = {"functions": {"f": lacking}}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"files": files}))
    command = [sys.executable, "-m", "tests.undecided", str(report)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(("lines", "status"), [(ALLOWED - 1, 0), (ALLOWED, 1)])
def test_some_are_by_chance_and_more_are_not(tmp_path: Path, lines: int, status: int) -> None:
    """A branch from or to a line that was not run says nothing more."""
    done = judged(tmp_path, lines)
    assert done.returncode == status, done.stderr
    told, count = done.stdout.splitlines()
    assert told.startswith("undecided: codexd/new.py: f: 0, 1, ")
    assert told.endswith(", 900->end")
    assert count.startswith(f"undecided: {lines + 1} lines and branches")


def test_a_decision_about_what_is_gone(tmp_path: Path) -> None:
    done = judged(tmp_path, 1, gone="worker._ring")
    assert (done.returncode, done.stdout.splitlines()[1]) == (1, "decided, and gone: worker._ring")
