"""The ledger as a proof reads it: what it adds up to, and what it ever said of whom.

`Reader` goes on over rotations, and keeps the old file open until it is read to its
end, as the manual tells readers to.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from codexd import ledger
from codexd.ledger import Book, Follower
from codexd.model import Event, Kind, Note

ENDS = frozenset({Kind.DONE, Kind.FAILED, Kind.CANCELLED})


class Reader:
    """Counts every line; the lines that a rotation carried over do not count again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kinds: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()  # by id
        self.starts: Counter[str] = Counter()
        self.done: set[str] = set()
        self.outcomes: Counter[str] = Counter()
        self.complaints: Counter[str] = Counter()  # outcome and message of what was not done
        self.files: dict[str, str] = {}  # by id
        self._follower = Follower(path)
        self._fd = -1
        self._offset = 0
        self._carried = 0

    def book(self) -> Book:
        """What the ledger adds up to now."""
        self._follower.refresh()
        return self._follower.book

    def read(self) -> None:
        """Count what is new.  Two rotations between two reads would hide what lies between."""
        for event in self._new():
            if self._carried:
                self._carried -= 1
                continue
            if event.kind is Note.ROTATED:
                self._carried = int(str(event.facts["carried"]))
            self._count(event)

    def _count(self, event: Event) -> None:
        self.kinds[event.kind] += 1
        if event.kind in ENDS:
            self.ends[event.id] += 1
            outcome = str(event.facts.get("outcome", event.kind))
            self.outcomes[outcome] += 1
            if event.kind is Kind.DONE:
                self.done.add(event.id)
            else:
                self.complaints[f"{outcome}: {event.facts.get('message')}"] += 1
        elif event.kind is Kind.RUNNING:
            self.starts[event.id] += 1
        elif event.kind is Kind.QUEUED and "file" in event.facts:
            self.files[event.id] = str(event.facts["file"])

    def _new(self) -> Iterator[Event]:
        if self._fd >= 0:
            # Asked before it is read: once it was replaced, nobody writes to it any more.
            goes_on = os.fstat(self._fd).st_ino == os.stat(self.path).st_ino
            yield from self._rest()
            if goes_on:
                return
            os.close(self._fd)
        self._fd, self._offset = os.open(self.path, os.O_RDONLY), 0
        yield from self._rest()

    def _rest(self) -> Iterator[Event]:
        size = os.fstat(self._fd).st_size
        data = os.pread(self._fd, size - self._offset, self._offset)
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines(keepends=True):
            if not line.startswith(b"#"):
                yield ledger.parse(line)

    def close(self) -> None:
        self._follower.close()
        if self._fd >= 0:
            os.close(self._fd)
