"""The loop of a daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from codexd.service import Service

ROOT = Path(__file__).resolve().parent.parent
LOOP = """
import os, sys
from codexd.service import Service

os.mkfifo(sys.argv[1])
bell = os.open(sys.argv[1], os.O_RDWR | os.O_NONBLOCK)
service, pauses = Service("codexd-test"), [60.0]
service.listen(bell)
service.listen(os.dup(bell))  # what one reads is gone when the other is read
os.write(bell, b".")

def step():
    print("round", flush=True)
    if not pauses:
        raise StopIteration
    return pauses.pop()

service.run(step)
"""


def test_a_bell_that_somebody_else_reads_first(tmp_path: Path) -> None:
    """Whoever may open it can; it has woken us all the same."""
    done = subprocess.run(
        [sys.executable, "-c", LOOP, str(tmp_path / "bell")],
        capture_output=True, text=True, cwd=ROOT, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "round\nround\n", "")


def test_a_bell_that_has_rung_often_enough() -> None:
    """Nobody who wakes us waits, or fails, because the pipe is full."""
    service, rounds = Service("codexd-test"), 0
    assert os.write(service.bell, bytes(1 << 20)) < 1 << 20
    service.wake()

    def step() -> float:
        nonlocal rounds
        rounds += 1
        if rounds == 2:
            raise StopIteration
        return 60.0

    service.run(step)
    assert rounds == 2
