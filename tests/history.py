"""Ledgers as the tests make and judge them: events, their lines, and what they add up to."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from codexd.ledger import Book, Follower, parse, render, seal
from codexd.model import Event, IllegalEvent, Kind, Note

AT = "2026-11-23T07:20:11.123Z"
HEAD = seal("# codexd ledger, format 1")


def ident(n: int) -> str:
    return f"20261123t072011-{n:010}"


def queued(n: int, **facts: Any) -> Event:
    return Event(AT, Kind.QUEUED, ident(n), {"file": f"{n}.md", **facts})


def move(n: int, kind: Kind, **facts: Any) -> Event:
    return Event(AT, kind, ident(n), facts)


def closed(reason: str) -> Event:
    return Event(AT, Note.CLOSED, facts={"reason": reason, "message": "m"})


TEN = [
    queued(1, session="web", priority=7),
    queued(2, title="two"),
    move(1, Kind.RUNNING, launches=1, attempts=1),
    closed("quota"),
    move(1, Kind.STOPPING, cancel=True),
    move(2, Kind.WAITING, until=AT, reason="hold"),
    move(1, Kind.CANCELLED, outcome="cancelled"),
    Event(AT, Note.REJECTED, facts={"file": "x.bin", "reason": "not UTF-8", "id": ident(9)}),
    queued(3, session="web"),
    move(3, Kind.RUNNING, launches=1, attempts=1, thread="T"),
]


def note(kind: Note, **facts: Any) -> Event:
    return Event(AT, kind, facts=facts)


# Every kind of event.
EVERY = [
    note(Note.ROTATED, **{"from": "tasks-20261122T072011Z.md", "carried": 0, "ended": [ident(8)]}),
    note(Note.STARTED, version="0.1.0"),
    queued(1, session="web"),
    move(1, Kind.RUNNING, launches=1, attempts=1),
    move(1, Kind.DONE, outcome="done"),
    note(Note.OWED, event=f"{ident(1)}.done"),
    note(Note.DEFERRED, event=f"{ident(1)}.done", tries=1, until=AT),
    queued(2),
    move(2, Kind.WAITING, until=AT, reason="rate"),
    move(2, Kind.FAILED, outcome="rate"),
    note(Note.OWED, event=f"{ident(2)}.failed"),
    note(Note.UNTOLD, event=f"{ident(2)}.failed"),
    queued(3),
    move(3, Kind.RUNNING, launches=1, attempts=1),
    move(3, Kind.STOPPING, cancel=True),
    move(3, Kind.CANCELLED, outcome="cancelled"),
    note(Note.OWED, event=f"{ident(3)}.cancelled"),
    note(Note.TOLD, event=f"{ident(3)}.cancelled"),
    closed("quota"),
    note(Note.OPENED, reason="quota"),
    closed("hold"),
    note(Note.REJECTED, file="x.bin", reason="not UTF-8", id=ident(9)),
    note(Note.REPEATED, file="y.md", key="k", first=ident(1), id=ident(7)),
    note(Note.RESET, session="web"),
    queued(4, session="web"),
    move(4, Kind.RUNNING, launches=1, attempts=1, thread="T"),
    note(Note.STOPPED),
]
assert {event.kind for event in EVERY} == {*Kind, *Note}


def lines(events: list[Event]) -> list[bytes]:
    return [HEAD, *map(render, events)]


def facts_of(book: Book) -> dict[str, Any]:
    """A book as it must be, however it came to be."""
    return {
        "tasks": list(book.tasks.items()),
        "gate": {reason: dict(facts) for reason, facts in book.gate.items()},
        "recent": list(book.recent),
        "verdicts": list(book.verdicts.items()),
        "owed": list(book.owed.items()),
    }


ENDS = (Kind.DONE, Kind.FAILED, Kind.CANCELLED)


def slow(data: list[bytes]) -> Book:
    """The plain meaning of a ledger: good lines one after another.

    An end is an end, whatever damage hides of what came before it: such a task
    must never run again.
    """
    book = Book()
    for line in data:
        if zlib.crc32(line) != 0 or line.startswith(b"#"):
            continue
        event = parse(line)
        if event.kind in ENDS:
            book.tasks.pop(event.id, None)
            book.recent.append(event.id)
            continue
        try:
            book.act(event)
        except IllegalEvent:
            continue
    return book


def read(path: Path, checkpoint: Path | None = None) -> Book:
    follower = Follower(path, checkpoint)
    follower.refresh()
    follower.close()
    return follower.book
