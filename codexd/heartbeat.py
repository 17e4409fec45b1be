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
