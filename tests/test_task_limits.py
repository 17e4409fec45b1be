"""codexd-limits: what a task asked for, and never more than its unit has.

The real script, with a stand-in for systemctl that tells what the unit has.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "systemd" / "codexd-limits"
SYSTEMCTL = """#!/bin/sh
case "$*" in
*set-property*) shift 5; echo "$@" ;;
*CPUQuotaPerSecUSec*) echo "$CPU" ;;
*MemoryMax*) echo "$MEMORY" ;;
*TasksMax*) echo "$TASKS" ;;
esac
"""


def limited(place: Path, asked: str, **has: str) -> tuple[int, str, str]:
    tool = place / "systemctl"
    tool.write_text(SYSTEMCTL)
    tool.chmod(0o755)
    (place / "asked").write_text(asked)
    env = {"PATH": f"{place}:{os.environ['PATH']}", **has}
    argv = ["sh", str(SCRIPT), "unit", str(place / "asked")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("has", "gets"), [
    ("infinity", "75.00%"), ("500ms", "50.00%"), ("1s", "75.00%"), ("1.500000s", "75.00%"),
    ("1min 40s", "75.00%"), ("1h", "75.00%"), ("749.900ms", "74.99%"), ("40ms", "4.00%"),
    ("5ms", "0.50%"), ("100us", "0.01%"),
])  # fmt: skip
def test_no_more_of_a_processor_than_the_unit_has(tmp_path: Path, has: str, gets: str) -> None:
    assert limited(tmp_path, "cpu=75\n", CPU=has) == (0, f"CPUQuota={gets}\n", "")


@pytest.mark.parametrize("has", ["", "1y 2s", "5 00ms", "ms", "-1s", "1s\n2s", "Infinity"])
def test_what_is_not_understood_is_refused(tmp_path: Path, has: str) -> None:
    status, set_, why = limited(tmp_path, "cpu=75\n", CPU=has)
    assert (status, set_) == (1, "")
    assert why.startswith("unit: its CPUQuotaPerSecUSec is not understood")


def test_memory_and_tasks(tmp_path: Path) -> None:
    asked = "memory=1000000\ntasks=100\ntasks=7\nPATH=/x\ncpu=0\n"
    unlimited = {"MEMORY": "infinity", "TASKS": "18446744073709551615"}
    assert limited(tmp_path, asked, **unlimited)[1] == "MemoryMax=1000000 TasksMax=100\n"
    little = {"MEMORY": "999999", "TASKS": "64"}
    assert limited(tmp_path, asked, **little)[1] == "MemoryMax=999999 TasksMax=64\n"
    assert limited(tmp_path, asked, MEMORY="", TASKS="64")[:2] == (1, "")


def test_nothing_is_asked_for(tmp_path: Path) -> None:
    assert limited(tmp_path, "# nothing\n") == (0, "", "")
