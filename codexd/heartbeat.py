"""The heartbeat: what the master says of itself, every few seconds.

Owns run/heartbeat, written by the master alone: one JSON object, padded to one
size, rewritten in place, because that works on a full disk, too.  Where it does not
fit, texts in it are shortened.  It tells people and readers how things are; nothing is
ever recovered from it.

`beat` in it is seconds of the clock that runs on in sleep and never jumps.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from codexd import clock, durable

SIZE = 16384  # bytes
_LONGEST = (2000, 500, 120, 24)  # characters of a text, the first that fits


def write(path: Path, told: Mapping[str, object]) -> None:
    """Raises OSError."""
    beat = {"beat": clock.steady()}
    texts = (json.dumps({**_shortened(told, most), **beat}).encode() for most in _LONGEST)
    data = next(text for text in texts if len(text) <= SIZE).ljust(SIZE)
    flags = os.O_WRONLY | os.O_CREAT
    try:
        fd = durable.opened(path, flags)
    except durable.NotAFile:
        durable.set_aside(path)
        fd = durable.opened(path, flags)
    try:
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, SIZE)  # should somebody have made it longer
    finally:
        os.close(fd)


def _shortened(told: Mapping[str, object], most: int) -> dict[str, object]:
    """The same with no text longer than `most`."""
    found: dict[str, object] = {}
    for key, value in told.items():
        if isinstance(value, Mapping):
            found[key] = _shortened(value, most)
        elif isinstance(value, str) and len(value) > most:
            found[key] = value[: most - 1] + "…"
        else:
            found[key] = value
    return found


def line(told: Mapping[str, object]) -> str:
    """The shortest of it, for `systemctl status`."""
    gate = told["gate"]
    reasons = [_until(*one) for one in gate.items()] if isinstance(gate, Mapping) else []
    closed = f"; closed: {', '.join(reasons)}" if reasons else ""
    closed += f" and {told['gate_more']} more" if told["gate_more"] else ""
    return f"{told['running']} running, {told['queued']} queued, {told['waiting']} waiting{closed}"


def _until(reason: str, facts: Mapping[str, object]) -> str:
    """A reason of the gate, with the local time until which it is closed, if that is known."""
    try:
        until = time.localtime(clock.epoch(str(facts["until"])))
    except (KeyError, ValueError):
        return reason
    today = time.localtime()[:3] == until[:3]
    return f"{reason} until {time.strftime('%H:%M' if today else '%Y-%m-%d %H:%M', until)}"


def read(path: Path) -> tuple[float, dict[str, object]] | None:
    """Its age in seconds, and what was told; None if there is none, or none that makes sense.

    The age is negative after a reboot.  Raises OSError when it may not be read.
    """
    try:
        told = durable.read_json(path, 4 * SIZE)
        beat = float(str(told.pop("beat")))
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return clock.steady() - beat, told
