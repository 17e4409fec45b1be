"""Looking through the ledger: what is wrong with it, and every event of it.

`check` tells of each line that is not acted on, by its number, its first byte and
the reason; `compare` what tasks/ and archive/ say otherwise than the ledger; `events`
gives the whole history, over all old files.

Read-only, beside a daemon as well: what it is just writing, and a task on its way
from one directory to the next, is no damage.  However long the history, only
the tasks that live at one time are in memory.

Raises OSError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO
from zlib import crc32

from codexd import durable, lock, place, rotate
from codexd.directories import Directories
from codexd.ledger import FORMAT, LONGEST, SEALED, Book, LedgerBroken, parse
from codexd.model import Event, IllegalEvent, Kind, Note, State, is_id
from codexd.view import View

_ENDS = frozenset({Kind.DONE, Kind.FAILED, Kind.CANCELLED})
_HEAD = 64  # bytes
_KEPT = "its line is damaged, and checkpoint.json alone knows it: keep that; see codexd(7)"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; `line` from 1, `byte` from 0, None where it is no line.

    `kind` is seal, grammar, event, format, torn or task.
    """

    file: str
    line: int | None
    byte: int | None
    kind: str
    what: str


@dataclass(slots=True)
class Checked:
    """A ledger's file that is looked through; complete when `problems` is exhausted."""

    file: str
    format: int | None = None
    lines: int = 0
    bytes: int = 0
    book: Book = field(default_factory=Book)


def files(dirs: Directories) -> Iterator[BinaryIO]:
    """All files of the ledger, the oldest first, each open until the next is asked for.

    The newest is opened first: if it is laid aside meanwhile, it is still the last.
    """
    with open(dirs.ledger, "rb", opener=_opened) as newest:
        now = os.fstat(newest.fileno())
        for path in rotate.kept(dirs.ledger):
            try:
                with open(path, "rb", opener=_opened) as file:
                    if os.path.samestat(os.fstat(file.fileno()), now):
                        break
                    yield file
            except FileNotFoundError:
                continue  # it was old enough to be removed just now
        yield newest


def _opened(path: str, flags: int) -> int:
    return durable.opened(path, flags, follow=True)


# --- line by line -----------------------------------------------------------------------


def check(file: BinaryIO, checked: Checked, written: bool) -> Iterator[Problem]:
    """What is wrong with a file; `written`: a daemon may be about to end its last line."""
    for here, end, line in _lines(file):
        if not line.endswith(b"\n"):
            if not written:
                text = f"{end - here} bytes without an end; the next start cuts them off"
                yield Problem(checked.file, checked.lines + 1, here, "torn", text)
            return
        checked.lines += 1
        checked.bytes = end
        kind, text = _judged(line, checked)
        if kind:
            yield Problem(checked.file, checked.lines, here, kind, text)
        if kind == "format" and checked.format not in (None, FORMAT):
            return


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Where each begins and ends, and its bytes; of one that is too long the first and the last."""
    end = 0
    while line := file.readline(LONGEST):
        here, end = end, end + len(line)
        cut = len(line) == LONGEST
        while cut and not line.endswith(b"\n"):
            end = file.seek(durable.past_hole(file.fileno(), end))
            more = file.readline(LONGEST)
            line, end, cut = line[:_HEAD] + more[-1:], end + len(more), bool(more)
        yield here, end, line


def _judged(line: bytes, checked: Checked) -> tuple[str, str]:
    """The kind of what is wrong and a text; both empty for a good line, which is added up."""
    first = checked.lines == 1
    if crc32(line) != SEALED:
        told = ": the line that names the format" if first else ""
        return "seal", f"the seal is broken{told}"
    if line.startswith(b"#"):
        return _head(line, checked)
    kind, text = _acted(line, checked.book)
    return (kind, text) if kind or not first else ("format", "the first line names no format")


def _acted(line: bytes, book: Book) -> tuple[str, str]:
    try:
        event = parse(line)
    except ValueError as error:
        return "grammar", str(error)
    try:
        book.act(event)
    except (IllegalEvent, ValueError) as error:
        if event.kind in _ENDS:  # an end is an end, whatever is lost before it
            book.tasks.pop(event.id, None)
        return "event", str(error)
    return "", ""


def _head(line: bytes, checked: Checked) -> tuple[str, str]:
    found = line.partition(b"  ")[0].rpartition(b" ")[2]
    checked.format = int(found) if found.isdigit() else None
    try:
        Book().feed(line, 0)
    except LedgerBroken as newer:
        return "format", str(newer)
    return "", ""


def is_written(dirs: Directories, file: BinaryIO) -> bool:
    """Whether it is the ledger that a daemon may be writing just now."""
    try:
        newest = os.path.samestat(os.fstat(file.fileno()), os.stat(dirs.ledger))
        return newest and lock.is_held(dirs.lock)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True  # not for us to see


# --- against the directories --------------------------------------------------------


def compare(dirs: Directories) -> Iterator[Problem]:
    """Tasks that the ledger and the directories do not agree about."""
    view, marked = View(dirs, short_cut=False), View(dirs)
    view.refresh()
    for task in view.live():
        there = durable.is_directory(dirs.tasks / task.id)
        # It may have ended before its directory was looked for.
        if not there and (now := view.task(task.id)) and not State(str(now["state"])).ended:
            yield _task(dirs, task.id, _without_directory(marked, task.id))
    for id in sorted(os.listdir(dirs.tasks)):
        if not is_id(id):
            yield _task(dirs, id, "no task's directory; move it away")
        elif durable.is_there(dirs.tasks / id / "task.json") and view.task(id) is None:
            what = "the ledger does not know this task, so it is not run; see codexd(7)"
            yield _task(dirs, id, _KEPT if marked.task(id) else what)
    view.close()
    marked.close()


def _without_directory(marked: View, id: str) -> str:
    if place.known(marked.dirs, id):
        marked.refresh()
        if all(task.id != id for task in marked.live()):
            return "it has ended, but its last line is damaged; see codexd(7)"
        return "it has ended and is archived, but its last line is lost: restart the daemon"
    return f"a task of the ledger without its directory: codexd task cancel {id}"


def _task(dirs: Directories, id: str, what: str) -> Problem:
    return Problem(str(dirs.tasks / id), None, None, "task", what)


# --- the history ----------------------------------------------------------------------------


def events(files: Iterable[BinaryIO], damaged: Callable[[str], None]) -> Iterator[Event]:
    """Every event of these files, which follow each other; once each.

    What a file repeats of the one before it is left out, if that one is there.
    `damaged` is told of lines that cannot be read.
    """
    before = ""
    for file in files:
        skip = 0
        for here, _, line in _lines(file):
            if not line.endswith(b"\n") or line.startswith(b"#"):
                continue  # being written, or the format
            if skip:
                skip -= 1
                continue
            try:
                event = parse(line)
            except ValueError as error:
                damaged(f"{file.name}: byte {here}: {error}")
                continue
            if event.kind is Note.ROTATED and event.facts.get("from") == before:
                found = event.facts.get("carried")
                skip = found if isinstance(found, int) else 0
            yield event
        before = os.path.basename(file.name)
