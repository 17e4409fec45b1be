"""Transcripts: what was said in a session, one JSON object a line.

Owns transcripts/NAME.jsonl, written by the master alone.  A line has `ts`,
`task`, `attempt`, `role` (user or assistant), `text`, and for an attempt that
failed `outcome` and `error`.

An append first cuts the file to the length its session remembers: lines of an
append whose session file was never written are thus replaced, not doubled, and
a torn tail goes with them.  Where no session remembers (its first attempt, or a
damaged file), the lines of this very attempt are looked for.

Raises OSError; durable.NotAFile where something else than a transcript lies in its place,
which the writer sets aside.
"""

from __future__ import annotations

import errno
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
# How a line begins that we wrote: no text comes before it.
_WHOSE = re.compile(rb'\{(?:"ts": (?:"[^"]*"|null), )?"task": ("[^"]*"), "attempt": ([0-9]{1,9})')
_MOST = 1 << 30  # bytes looked through for the lines of an attempt
TAIL = 256 << 10  # bytes read back for a summary


def append(path: Path, length: int | None, records: Sequence[Mapping[str, object]]) -> int:
    """Add the records of one attempt after the first `length` bytes; the new length.

    None for a length that nobody knows.  Durable when it returns.
    """
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    data = text.encode("utf-8", "surrogatepass")
    new = not durable.is_there(path)
    fd = durable.opened(path, os.O_RDWR | os.O_CREAT)
    try:
        size = os.fstat(fd).st_size
        if length is None and size > _MOST:
            raise durable.NotAFile(errno.EFBIG, f"{size} bytes, more than {_MOST}", str(path))
        # A shorter one was laid aside since: what is in it may be these very records.
        keep = length if length is not None and length <= size else _end(fd, records)
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
    mine = {(json.dumps(r.get("task")), str(r.get("attempt"))) for r in records}
    end = here = 0
    with open(fd, "rb", closefd=False) as file:
        while piece := file.readline(1 << 20):  # however long the line
            found = _WHOSE.match(piece) if here == end else None
            if found and (found[1].decode("ascii", "replace"), found[2].decode()) in mine:
                break
            here += len(piece)
            if piece.endswith(b"\n"):
                end = here
    return end


def last(path: Path, count: int) -> list[dict[str, object]]:
    """The last `count` lines that can be read, oldest first."""
    try:
        with _opened(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read(TAIL).split(b"\n")
    except (FileNotFoundError, durable.NotAFile):
        return []
    return list(_readable(lines))[-count:]


def conversation(
    records: list[dict[str, object]], id: str, continued: str | None = None
) -> list[dict[str, object]]:
    """Of the last lines, those of the conversation that this task is the latest in.

    Its own, those of the thread that it would have `continued`, and those of tasks with a
    thread of these: a task that went on in a new thread has lines in both, but what was to be
    forgotten (a reset, `resume: never`) has none in common.
    """
    found: list[dict[str, object]] = []
    tasks: list[object] = [id]  # no sets: a damaged line may have anything here
    threads: list[object] = [continued] if continued else []
    for record in reversed(records):
        task, thread = record.get("task"), record.get("thread")
        if task in tasks or thread in threads:
            found.append(record)
            tasks.append(task)
            threads += [thread] if thread else []
    return found[::-1]


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
    return open(durable.opened(path), "rb")


def _readable(lines: Sequence[bytes]) -> Iterator[dict[str, object]]:
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the cut first line, or damage: a summary goes without it
        if isinstance(value, dict):
            yield value
