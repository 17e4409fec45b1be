"""Transcripts: what was said in a session, one JSON object a line.

Owns transcripts/NAME.jsonl, written by the master alone.  A line has `ts`,
`task`, `attempt`, `role` (user or assistant), `text`, and for an attempt that
failed `outcome` and `error`.

An append first cuts the file to the length its session remembers: lines of an
append whose session file was never written are thus replaced, not doubled, and
a torn tail goes with them.  Where no session remembers (its first attempt, or a
damaged file), the lines of this very attempt are looked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from codexd import clock, durable
from codexd.events import THREAD_PATTERN

_FIRST = re.compile(rb'\{"ts": "([0-9T:.Z-]+)"')
# A quote within a text is escaped in JSON, so no text can pretend to be one.
_THREAD = re.compile(rf'"thread": "({THREAD_PATTERN})"'.encode())
_TAIL = 256 << 10  # bytes read back for a summary


def append(path: Path, length: int | None, records: Sequence[Mapping[str, object]]) -> int:
    """Add the records of one attempt after the first `length` bytes; the new length.

    None for a length that nobody knows.  Durable when it returns.  Raises OSError.
    """
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    data = text.encode("utf-8", "surrogatepass")
    new = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    try:
        size = os.fstat(fd).st_size
        keep = min(length, size) if length is not None else _end(fd, records)
        os.ftruncate(fd, keep)
        os.lseek(fd, keep, os.SEEK_SET)
        durable.write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    if new:
        durable.sync_directory(path.parent)
    return keep + len(data)


def _end(fd: int, records: Sequence[Mapping[str, object]]) -> int:
    """Where the file ends without a torn tail and without these very records."""
    mine = [(r.get("task"), r.get("attempt")) for r in records]
    end = 0
    with open(fd, "rb", closefd=False) as file:
        for line in file:
            said = next(_readable([line]), {})
            if not line.endswith(b"\n") or (said.get("task"), said.get("attempt")) in mine:
                break
            end += len(line)
    return end


def last(path: Path, count: int) -> list[dict[str, object]]:
    """The last `count` lines that can be read, oldest first."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    return list(_readable(lines))[-count:]


def began(path: Path) -> float | None:
    """When the first line was said (epoch seconds); None where that is not known."""
    try:
        with _opened(path) as file:
            found = _FIRST.match(file.read(100))
            return clock.epoch(found[1].decode()) if found else None
    except (OSError, ValueError):
        return None


def threads(path: Path) -> Iterator[set[str]]:
    """The Codex threads that it names, a megabyte of it at a time; none for a link."""
    try:
        file = _opened(path)
    except OSError:
        return  # there is none, or it is none of ours
    with file:
        rest = b""
        while piece := file.read(1 << 20):
            piece = rest + piece
            yield {found.decode().lower() for found in _THREAD.findall(piece)}
            rest = piece[-100:]  # a name may lie across the cut


def _opened(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _readable(lines: Sequence[bytes]) -> Iterator[dict[str, object]]:
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue  # the cut first line, or damage: a summary goes without it
        if isinstance(value, dict):
            yield value
