"""Processes that lost their parent below us: they become our children, and cannot get away.

The kernel gives them to the nearest subreaper, which `adopt` makes of this process.

Lean: the worker uses it.
"""

from __future__ import annotations

import os

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def adopt() -> None:
    """Raises ImportError where Python has no ctypes."""
    import ctypes  # costs 6 ms; a worker does it while Codex starts

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> list[int]:
    """The pids of our children, those that were adopted among them."""
    here, found = os.getpid(), []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            if int(fields[1]) == here:
                found.append(int(name))
    return found
