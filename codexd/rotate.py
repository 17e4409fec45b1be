"""Rotation: a ledger begun anew with what still matters, the old one kept.

    # codexd ledger, format 1
    * TIME **rotated** `from="tasks-20261123T072011Z.md" carried=3 ended=["…"]`
    … as many lines as `carried` says: one for each task that has not ended, two where
      its state needs two; then the gate, the last rejections, what hooks are owed

Replayed alone, the new file gives the same book as the old one; that is tried
on the new file itself before it takes the old one's place.  So no reader has to know
of a rotation: one that sees another file reads it from its top.

Old files are named for the second in which they were laid aside, each later than
all before it, whatever the clock says.  They lie in archive/, beside the ledger:
a command of the model that runs meanwhile must not find under a new name what it may
not read under the old one.

Part of the room `ledger`, which is the door to it.  Raises OSError, and then the
ledger is as it was.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from calendar import timegm
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from codexd import clock, durable
from codexd.book import Book, catch_up
from codexd.delivery import Owed
from codexd.line import HEAD, render, seal
from codexd.model import Event, Kind, Note, State, Task

LONG = 64 << 20  # bytes of a ledger that is begun anew by itself
ARCHIVE = "archive"
_NAME = "tasks-%Y%m%dT%H%M%SZ.md"
_FORM = re.compile(r"tasks-[0-9]{8}T[0-9]{6}Z\.md", re.ASCII)
_PLAIN = Task(id="")
_FACTS = [f.name for f in fields(Task) if f.name not in ("id", "state", "created")]
# What the step into a state unsets, unless its line says it.
_STEP = {State.RUNNING: Kind.RUNNING, State.WAITING: Kind.WAITING}
_OF_STEP = ("reason", "until", "message")


# --- old files ----------------------------------------------------------------------


def kept(ledger: Path) -> list[Path]:
    """Old files of a ledger that are still there, the oldest first."""
    try:
        names = os.listdir(ledger.parent / ARCHIVE)
    except FileNotFoundError:
        return []
    return [ledger.parent / ARCHIVE / name for name in sorted(names) if _is_old(name)]


def _is_old(name: str) -> bool:
    try:
        return _FORM.fullmatch(name) is not None and _laid_aside(name) >= 0
    except ValueError:  # no date
        return False


def _laid_aside(name: str) -> int:
    """When an old ledger was, in epoch seconds, by its name."""
    return timegm(time.strptime(name, _NAME))


def _free_name(ledger: Path, at: str) -> Path:
    """A name for the ledger as it is at the time `at`: after those of all before it."""
    second = int(clock.epoch(at))
    if before := kept(ledger):  # twice in a second, or the clock was set back
        second = max(second, _laid_aside(before[-1].name) + 1)
    return ledger.parent / ARCHIVE / time.strftime(_NAME, time.gmtime(second))


def forget_unfinished(ledger: Path, fd: int) -> None:
    """Undo a rotation that a crash broke off: the ledger's second name."""
    here = os.fstat(fd)
    for path in reversed(kept(ledger)):
        found = path.lstat()
        if (found.st_dev, found.st_ino) == (here.st_dev, here.st_ino):
            path.unlink()


# --- the new file -------------------------------------------------------------------


def carried(book: Book, at: str) -> Iterator[Event]:
    """The events that a new ledger begins with: replayed, they are this book."""
    for task in book.tasks.values():
        yield from _of_task(task, at)
    for gate in book.gate.values():
        facts = {name: value for name, value in gate.items() if name != "since"}
        yield Event(str(gate["since"]), Note.CLOSED, facts=facts)
    yield from book.verdicts.values()
    for one in book.owed.values():
        yield from _of_delivery(one, at)


def _of_task(task: Task, at: str) -> Iterator[Event]:
    values: dict[str, object] = {name: getattr(task, name) for name in _FACTS}
    step = {}
    if task.state in _STEP:
        step = {name: values.pop(name) for name in _OF_STEP}
    facts = {n: v for n, v in values.items() if n == "file" or v != getattr(_PLAIN, n)}
    yield Event(task.created or at, Kind.QUEUED, task.id, facts)
    if task.state in _STEP:
        yield Event(at, _STEP[task.state], task.id, step)


def _of_delivery(one: Owed, at: str) -> Iterator[Event]:
    yield Event(one.at, Note.OWED, facts={"event": one.key, **one.facts})
    if one.tries or one.until:
        facts = {"event": one.key, "tries": one.tries, "until": one.until}
        yield Event(at, Note.DEFERRED, facts=facts)


def replace(ledger: Path, old: int, book: Book, at: str) -> tuple[int, Path]:
    """Put a new file in the ledger's place; its descriptor, and where the old one lies.

    `old` is the descriptor of the ledger that `book` is of, whose `offset` and `last`
    become the new file's.  The exchange is durable only when the caller has synced the directory.
    """
    aside = ledger.with_name(f".{ledger.name}.{os.getpid()}.tmp")
    (ledger.parent / ARCHIVE).mkdir(mode=0o750, exist_ok=True)
    name = _free_name(ledger, at)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(aside, flags, 0o640)
    linked = False
    try:
        os.fchmod(fd, stat.S_IMODE(os.fstat(old).st_mode))
        again = _written(fd, book, at, name.name)
        os.link(ledger, name)
        linked = True
        durable.sync_directory(name.parent)
        os.rename(aside, ledger)
    except BaseException:
        os.close(fd)
        aside.unlink(missing_ok=True)
        if linked:
            name.unlink()
        raise
    book.offset, book.last = again.offset, again.last
    return fd, name


def _written(fd: int, book: Book, at: str, name: str) -> Book:
    """Write all of the new file; the book that it gives.  Raises OSError."""
    lines = [render(event) for event in carried(book, at)]
    facts = {"from": name, "carried": len(lines), "ended": list(book.recent)}
    first = [seal(HEAD), render(Event(at, Note.ROTATED, facts=facts))]
    durable.write_all(fd, b"".join([*first, *lines]))
    os.fsync(fd)
    again = Book()
    catch_up(again, fd)
    if again.lost or not _same(again, book):
        why = "the new ledger would not say what the old one says; the old one stays"
        raise OSError(errno.EILSEQ, why, name)
    return again


def _same(one: Book, other: Book) -> bool:
    return (
        list(one.tasks.items()) == list(other.tasks.items())
        and one.recent == other.recent
        and [_said(facts) for facts in one.gate.values()]
        == [_said(facts) for facts in other.gate.values()]
        and [render(event) for event in one.verdicts.values()]
        == [render(event) for event in other.verdicts.values()]
        and [(o.key, o.at, o.tries, o.until, _said(o.facts)) for o in one.owed.values()]
        == [(o.key, o.at, o.tries, o.until, _said(o.facts)) for o in other.owed.values()]
    )


def _said(facts: Mapping[str, object]) -> dict[str, object]:
    """Facts as a line has them: a fact of None says nothing."""
    return {name: value for name, value in facts.items() if value is not None}
