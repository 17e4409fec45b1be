"""The heartbeat: what the master says of itself, every few seconds.

Owns run/heartbeat, written by the master alone: one JSON object, padded to one
size, rewritten in place, because that works on a full disk, too.  It tells
people and readers how things are; nothing is ever recovered from it.

`beat` in it is seconds of the clock that runs on in sleep and never jumps.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from codexd import durable

SIZE = 16384  # bytes


def write(path: Path, told: Mapping[str, object]) -> None:
    """Raises OSError."""
    beat = time.clock_gettime(time.CLOCK_BOOTTIME)
    data = json.dumps({**told, "beat": beat}).encode()[:SIZE].ljust(SIZE)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, SIZE)  # should somebody have made it longer
    finally:
        os.close(fd)


def read(path: Path) -> tuple[float, dict[str, object]] | None:
    """Its age in seconds, and what was told; None if there is none, or none that makes sense.

    The age is negative after a reboot.  Raises OSError when it may not be read.
    """
    try:
        told = durable.read_json(path, 4 * SIZE)
        beat = float(str(told.pop("beat")))
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - beat, told
