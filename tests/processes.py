"""The processes of a daemon under test, as /proc tells of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.daemon import until


def commands() -> dict[int, list[str]]:
    """The command line of every process that has one; a zombie has none."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                line = Path(f"/proc/{name}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            if line:
                found[int(name)] = line.decode(errors="replace").rstrip("\0").split("\0")
    return found


def codex_of(id: str) -> list[int]:
    """The Codex processes of a task."""
    wanted = [f"/tasks/{id}/", "/last.md"]
    return [
        pid
        for pid, argv in commands().items()
        if "exec" in argv and any(all(part in arg for part in wanted) for arg in argv)
    ]


def worker_of(id: str) -> list[int]:
    """The worker of a task."""
    return [p for p, argv in commands().items() if argv[-1] == id and "--tasks" in argv]


def naming(text: str) -> list[int]:
    """Everything but this process whose command line has `text` in it."""
    here = os.getpid()
    return [p for p, argv in commands().items() if p != here and text in " ".join(argv)]


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it ended by itself


def gone(text: str, seconds: float = 20.0) -> None:
    """Wait until nothing names `text` any more."""
    until(lambda: not naming(text), f"the end of {text}: {naming(text)}", seconds)
