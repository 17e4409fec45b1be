"""Runs of hooks: as child processes, or as instances of codexd-hook@.service.

Owns run/hooks: a directory ID for each event that is being told, with the order, and
later the result that `hook` leaves.  `start` may be repeated: what still runs goes on,
and what has its result is not run again.

A run is over when its result is there, or when `lost` says why there will be none.  The
end of a child and of systemctl is a SIGCHLD, a unit rings the bell: nothing is waited
for.

Raises OSError where a directory cannot be written or a process not be made.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from codexd import durable
from codexd.hook import KEPT, ORDER, RESULT, STDIN
from codexd.model import is_id

DEADLINE = 5.0  # seconds for systemctl
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from codexd.hook import main; main()"


class Runs(Protocol):
    """How a hook is run."""

    def start(self, id: str, directory: Path) -> None: ...

    def lost(self, id: str) -> str | None:
        """Why there will be no result; None: it may still come."""

    def stop(self) -> None:
        """End what would not outlive us."""

    def pause(self, now: float) -> float:
        """Seconds until a look at what may never tell anything."""


class Children:
    """Hooks as child processes: they end with the daemon, and are told again by the next."""

    def __init__(self) -> None:
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, id: str, directory: Path) -> None:
        package = str(Path(__file__).resolve().parent.parent)
        parent = ["--parent", str(os.getpid())]
        # A group of its own, for Ctrl-C; no session of its own, by which the launcher
        # knows what a worker that was killed has left behind.
        self._children[id] = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOT, package, *parent, str(directory)],
            stdin=subprocess.DEVNULL, process_group=0, cwd="/", env={},
        )  # fmt: skip

    def lost(self, id: str) -> str | None:
        child = self._children.get(id)
        if child is not None and child.poll() is None:
            return None
        self._children.pop(id, None)
        return "its process ended without a result" + (f" ({child.returncode})" if child else "")

    def stop(self) -> None:
        for child in self._children.values():
            child.terminate()

    def pause(self, now: float) -> float:
        return math.inf


class Instances:
    """Hooks as systemd units, which outlive the daemon."""

    def __init__(self, systemwide: bool) -> None:
        self._systemctl = ["systemctl", "--no-ask-password", "--no-pager", "--no-block"]
        self._systemctl += ["--system" if systemwide else "--user"]
        self._calls: dict[str, tuple[subprocess.Popen[bytes], float]] = {}

    def start(self, id: str, directory: Path) -> None:
        process = subprocess.Popen(
            [*self._systemctl, "start", "--", unit(id)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._calls[id] = process, time.monotonic() + DEADLINE

    def lost(self, id: str) -> str | None:
        if id not in self._calls:
            return None  # systemd has it
        process, end = self._calls[id]
        if process.poll() is None:
            if time.monotonic() < end:
                return None
            process.kill()
        _, complaint = process.communicate()
        del self._calls[id]
        if process.returncode == 0:
            return None
        why = complaint.decode("utf-8", "replace").strip().split("\n")[0][:300]
        return why or f"systemctl did not answer within {DEADLINE:g} s"

    def stop(self) -> None:
        """Units go on; the next daemon reads their results."""

    def pause(self, now: float) -> float:
        return min([math.inf, *(max(0.05, end - now) for _, end in self._calls.values())])


def unit(id: str) -> str:
    return f"codexd-hook@{id}.service"


# --- their directories --------------------------------------------------------------


def begin(
    directory: Path, event: str, command: Iterable[str], env: Mapping[str, str], limit: float,
    told: Mapping[str, object],
) -> None:  # fmt: skip
    """Everything that a run reads, for one that has no result yet."""
    directory.mkdir(mode=0o750, exist_ok=True)
    (directory / RESULT).unlink(missing_ok=True)
    text = json.dumps(told, ensure_ascii=False) + "\n"
    durable.write(directory / STDIN, text.encode("utf-8", "replace"))
    order = {"event": event, "command": list(command), "env": dict(env), "limit": limit}
    durable.write_json(directory / ORDER, order)


def result(directory: Path, event: str) -> tuple[str | None, str] | None:
    """What went wrong, if anything, and the end of the output; None: there is no result."""
    try:
        # JSON may write a byte as six.
        found = durable.read_json(directory / RESULT, 8 * KEPT)
    except FileNotFoundError:
        return None
    except ValueError as damage:
        return f"its result is damaged: {damage}", ""
    if found.get("event") != event:
        return None
    problem = found.get("problem")
    return (None if problem is None else str(problem)), str(found.get("output") or "")


def end(directory: Path) -> None:
    """Remove what a run had.  Repeatable."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return


def found(hooks: Path) -> list[str]:
    """Ids of events that were being told."""
    return [name for name in os.listdir(hooks) if is_id(name)]
