"""tasks.md: the append-only ledger that everything is recovered from.

Owns tasks.md and its checkpoint.  One Markdown list item an event (`line`),
added up to the live tasks and the gate (`book`); here are the one writer and
the many readers.

Promises: events are acknowledged only after one write and one fsync of their
whole batch; a torn tail is cut by the one writer and skipped by readers; a
line whose seal is broken is reported and never acted on; no answer depends on
how long the history is (the checkpoint holds live tasks and an offset).

May fail: `LedgerFull` when the disk refuses the bytes (nothing was written,
try again later); `LedgerBroken` when it can no longer be trusted, above all
after a failed fsync: the process must end and replay.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from codexd import durable, rotate
from codexd.book import (
    ENDING,
    LONGEST,
    Book,
    LedgerBroken,
    catch_up,
    from_checkpoint,
    stands,
    to_checkpoint,
)
from codexd.line import FORMAT, HEAD, SEALED, parse, render, seal
from codexd.model import Event, Kind, Task, apply

__all__ = [
    "FORMAT",
    "LONGEST",
    "SEALED",
    "Book",
    "Follower",
    "Ledger",
    "LedgerBroken",
    "LedgerFull",
    "parse",
    "render",
    "seal",
]


class LedgerFull(OSError):
    """The disk has no room; nothing of the batch was written."""


# --- reading --------------------------------------------------------------------


class Follower:
    """A reader: `refresh` adds what was appended since.  Never blocks the writer."""

    def __init__(self, path: Path, checkpoint: Path | None = None) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self.book = Book()
        self._fd = -1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def refresh(self) -> None:
        """Bring `book` up to the ledger's last whole line.

        A ledger that does not exist yet is an empty one.  Raises OSError, and
        LedgerBroken for a format of a newer version.
        """
        if self._fd >= 0 and not self._same_file():
            self.close()
        if self._fd < 0:
            try:
                self._fd = durable.opened(self.path, follow=True)
            except FileNotFoundError:
                self.book = Book()
                return
            found = from_checkpoint(self.checkpoint, self._fd) if self.checkpoint else None
            self.book = found or Book()
        if os.fstat(self._fd).st_size > self.book.offset:
            catch_up(self.book, self._fd)

    def _same_file(self) -> bool:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        here = os.fstat(self._fd)
        same = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
        # A batch that found no room was cut off again, and maybe written over.
        return same and stands(self.book, self._fd)


# --- writing --------------------------------------------------------------------


Owing = Callable[[list[Event], Collection[str]], list[Event]]


class Ledger:
    """The one writer.  Open it only under the master's lock."""

    def __init__(self, path: Path, checkpoint: Path) -> None:
        """Open or begin the ledger, cut a torn tail, add up what it says.

        Raises OSError, LedgerFull, LedgerBroken.
        """
        self.path = path
        self.checkpoint_path = checkpoint
        self.laid_aside: list[Path] = []  # by rotations that nobody was told of yet
        self._least = 0  # bytes that the file began with
        self.owing: Owing = lambda _events, _gate: []
        self._fd = durable.opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, follow=True)
        reader = Follower(path, checkpoint)
        reader.refresh()
        reader.close()
        self.book = reader.book
        self.torn = os.fstat(self._fd).st_size - self.book.offset
        if self.torn:
            os.ftruncate(self._fd, self.book.offset)
        self._marked = self.book.offset
        rotate.forget_unfinished(path, self._fd)
        if not self.book.offset:
            self._write(seal(HEAD))
        durable.sync_directory(path.parent)  # a crash may have come before a rotation did

    def append(self, events: list[Event]) -> list[Task | None]:
        """Write a batch and make it durable; the tasks as they are after it.

        Every event is checked against the table before a byte is written.  What hooks are
        owed because of them (`owing`, given the events and the reasons for which the
        gate is closed) goes into the same batch.
        Raises IllegalEvent (nothing written), LedgerFull, LedgerBroken.
        """
        if not events:
            return []
        _rehearse(self.book, events)
        self._look()
        more = self.owing(events, self.book.gate.keys())
        self._write(b"".join(map(render, [*events, *more])))
        return [self.book.act(event) for event in [*events, *more]][: len(events)]

    def _look(self) -> None:
        """Whether the file is still the ledger: an editor may have put another in its place."""
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except FileNotFoundError:
            same = False
        if not same:
            raise LedgerBroken("another file lies in its place, or none")

    def _write(self, data: bytes) -> None:
        size = self.book.offset
        try:
            durable.write_all(self._fd, data)
        except OSError as error:
            try:
                if os.fstat(self._fd).st_size != size:  # else it may be read-only for a while
                    os.ftruncate(self._fd, size)
            except OSError as second:
                raise LedgerBroken(f"cannot cut a half-written batch: {second}") from error
            raise LedgerFull(error.errno, f"cannot write the ledger: {error.strerror}") from error
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            # The kernel may have dropped the pages and marked them clean: a
            # second fsync would succeed and mean nothing.
            raise LedgerBroken(f"fsync of the ledger failed: {error}") from error
        self.book.offset = size + len(data)
        self.book.last = data[-ENDING:]

    @property
    def unmarked(self) -> int:
        """Bytes since the last checkpoint."""
        return self.book.offset - self._marked

    def checkpoint(self) -> None:
        """Write the short cut for the next start.  Raises OSError; no harm done.

        None is written of a damaged file: the lines are told again at each start, and
        one that is repaired in its place counts again.
        """
        if self.book.lost:
            return
        inode = os.fstat(self._fd).st_ino
        durable.write(self.checkpoint_path, to_checkpoint(self.book, inode))
        self._marked = self.book.offset

    def shorten(self, at: str) -> None:
        """Keep the next start short: begin a long file anew, else write a checkpoint.

        Raises as `rotate` and `checkpoint` do.
        """
        if self.book.offset >= max(rotate.LONG, 2 * self._least):
            try:
                self.rotate(at)
            except OSError:
                self.checkpoint()  # then it is not tried again at once
                raise
        else:
            self.checkpoint()

    def rotate(self, at: str) -> None:
        """Begin the file anew with what still matters; the old one is kept.

        Readers, and the next start, find the same book.  Raises OSError, and then all is
        as it was, or LedgerBroken.
        """
        fd, old = rotate.replace(self.path, self._fd, self.book, at)
        os.close(self._fd)
        self._fd = fd
        try:
            durable.sync_directory(self.path.parent)
        except OSError as error:
            # After a power cut the old file may be back: nothing can be promised any more.
            raise LedgerBroken(f"fsync of {self.path.parent} failed: {error}") from error
        self._marked, self._least = 0, self.book.offset
        self.book.damaged.clear()  # the lines are in the old file
        self.book.lost = 0
        self.laid_aside.append(old)

    def close(self) -> None:
        os.close(self._fd)


def _rehearse(book: Book, events: list[Event]) -> None:
    """Raise IllegalEvent if the table forbids any of a batch."""
    tried: dict[str, Task] = {}
    for event in events:
        if isinstance(event.kind, Kind):
            tried[event.id] = apply(tried.get(event.id) or book.tasks.get(event.id), event)
