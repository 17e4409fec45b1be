"""What the ledger's lines add up to: live tasks, the gate, the last that ended.

A reader and the writer both have a `Book` and bring it up to date with
`catch_up`, which looks at ended tasks of a long history without parsing them.
The checkpoint is a short cut to the book at some offset: whatever is wrong with
it, the ledger is the truth.

Part of the room `ledger`, which is the door to it.  Reads, never writes.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from zlib import crc32

from codexd import delivery, durable
from codexd.delivery import Occasion, Owed
from codexd.line import FORMAT, HEAD, SEALED, parse
from codexd.model import Event, IllegalEvent, Note, State, Task, apply, check
from codexd.outcome import Outcome
from codexd.sane import word

RECENT = 50  # ended tasks remembered for a short list
TOLD = 20  # damaged lines that are told one by one
VERDICTS = 1000  # rejected and repeated files remembered for those who wait
ENDING = 64  # bytes, a seal and more, by which a reader knows the place where it stopped
_ID = slice(26, 52)  # after the "- " of a task's line
_KIND = 56
_ENDS = frozenset(b"dfc")  # done, failed, cancelled: no other kind begins so
_CHUNK = 64 << 10
LONGEST = 4 << 20  # bytes of a line; ours have less than 200 kB
_TOO_LONG = b"a line that is too long\n"
# Most notes of a long history are of events that were told long ago.
_TOLD = re.compile(rb"\* \S{24} \*\*(owed|told|deferred|untold)\*\* `event=\"([a-z0-9.-]{1,40})\"")
DELIVERIES = frozenset({Note.OWED, Note.TOLD, Note.DEFERRED, Note.UNTOLD})


class LedgerBroken(Exception):
    """The file cannot be written or trusted any more; end and replay."""


@dataclass
class Book:
    """The ledger added up to `offset`: live tasks, the gate, the last that ended.

    `tasks` is in ledger order.  `gate` maps each reason that is closed to its
    facts.  `verdicts` has the last files that did not become tasks, by the id
    they were taken under.  `owed` has the events that hooks were not told yet, the
    oldest first.  `damaged` tells of the first lines that were not acted on, `lost` is
    how many there are.  `last` are the bytes just before `offset`.  `ended` counts the tasks
    that have ended since this book was opened, by outcome: those of before are not looked at.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    gate: dict[str, Mapping[str, object]] = field(default_factory=dict)
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=RECENT))
    verdicts: dict[str, Event] = field(default_factory=dict)
    owed: dict[str, Owed] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    lost: int = 0
    offset: int = 0
    last: bytes = b""
    ended: Counter[str] = field(default_factory=Counter, compare=False)

    def act(self, event: Event) -> Task | None:
        """Add one event; the task as it is now.  Raises IllegalEvent: nothing has changed."""
        if isinstance(event.kind, Note):
            self._note(event)
            return None
        task = apply(self.tasks.get(event.id), event)
        if task.state.ended:
            self.tasks.pop(event.id)
            self.recent.append(event.id)
            self.ended[task.outcome.value if task.outcome else Outcome.UNKNOWN.value] += 1
        else:
            self.tasks[event.id] = task
        return task

    def _note(self, event: Event) -> None:
        if event.kind is Note.CLOSED:
            check(event.facts)
            self.gate[str(event.facts.get("reason"))] = {**event.facts, "since": event.at}
        elif event.kind is Note.OPENED:
            self.gate.pop(str(event.facts.get("reason")), None)
        elif event.kind in (Note.REJECTED, Note.REPEATED):
            self.verdicts[str(event.facts.get("id"))] = event
            if len(self.verdicts) > VERDICTS:
                del self.verdicts[next(iter(self.verdicts))]
        elif event.kind in DELIVERIES:
            delivery.settle(self.owed, event)
        elif event.kind is Note.ROTATED:
            ended = event.facts.get("ended")
            self.recent.extend(map(str, ended if isinstance(ended, list) else ()))

    def feed(self, line: bytes, here: int) -> None:
        """Add one complete line; one that cannot be acted on is reported with its place."""
        try:
            if line.startswith(b"#"):
                _check_head(line)
            else:
                self.act(parse(line))
        except (ValueError, IllegalEvent) as error:
            self.spoilt(here, str(error))

    def spoilt(self, here: int, why: str) -> None:
        """A line at `here` is not acted on."""
        self.lost += 1
        if len(self.damaged) < TOLD:
            self.damaged.append(f"byte {here}: {why}")

    def told(self) -> list[str]:
        """What to say of damaged lines, however many there are."""
        more = self.lost - len(self.damaged)
        rest = [f"{more} more lines; `codexd ledger verify` names each"] if more else []
        return [*self.damaged, *rest]


def _check_head(line: bytes) -> None:
    if crc32(line) == SEALED and not line.startswith(HEAD.encode() + b"  "):
        says = line.partition(b"  ")[0][:60].decode("ascii", "replace")
        raise LedgerBroken(
            f"the ledger begins with {says!r}: this codexd reads format {FORMAT} only; "
            "use the newer one that wrote it"
        )
    if crc32(line) != SEALED:
        raise ValueError("the first line, which names the format, is damaged")


class _Survey:
    """A first look at a long history: who is alive at its end, and since where.

    Ended tasks are never parsed.  Of each line only the id and the first letter
    of its kind are looked at, whose places are fixed.
    """

    def __init__(self, book: Book) -> None:
        self.book = book
        # id -> an offset at or before the first line that is of interest
        self.born = dict.fromkeys((id.encode() for id in book.tasks), book.offset)
        self.ended: deque[bytes] = deque(maxlen=RECENT)
        # Of each event that is still owed, the lines and where they are.
        self.owed: dict[bytes, list[tuple[bytes, int]]] = {}

    def look(self, chunk: bytes, here: int) -> None:
        """At whole lines, good or damaged, from offset `here` on."""
        if crc32(chunk) != SEALED:
            chunk = b"".join(self._undamaged(chunk, here))
        begin, end, ended, ends = self.born.setdefault, self.born.pop, self.ended.append, _ENDS
        lines = _of_tasks(chunk)
        rest = iter(lines)
        while True:
            try:
                for line in rest:
                    kind = line[_KIND]
                    if kind == 113:  # queued
                        begin(line[_ID], here)
                    elif kind in ends:
                        id = line[_ID]
                        end(id, None)
                        ended(id)
                break
            except IndexError:  # sealed, and yet too short for a line of ours
                self.book.spoilt(here, "not a ledger line of this format")
        if chunk.count(b"\n") != len(lines):  # much faster than to look for "\n* "
            for line in chunk.split(b"\n"):
                if line[:1] in (b"*", b"#"):
                    self._note(line + b"\n", here)

    def _note(self, line: bytes, here: int) -> None:
        """Events that were told are not parsed, as ended tasks are not."""
        found = _TOLD.match(line)
        if not found:
            self.book.feed(line, here)
        elif found[1] in (b"told", b"untold"):
            self.owed.pop(found[2], None)
            self.book.owed.pop(found[2].decode(), None)
        else:
            # Of those that were put off only the last says anything.
            self.owed.setdefault(found[2], [])[1:] = [(line, here)]

    def _undamaged(self, chunk: bytes, here: int) -> Iterator[bytes]:
        for line in _lines(chunk):
            if crc32(line) == SEALED:
                yield line
            else:
                self.book.spoilt(here, "the seal is broken")
            here += len(line)


def _lines(chunk: bytes) -> Iterator[bytes]:
    # Not splitlines(): it takes a carriage return in a damaged line for an end.
    return (line + b"\n" for line in chunk[:-1].split(b"\n"))


def _of_tasks(chunk: bytes) -> list[bytes]:
    """The lines of tasks, each without its "- " and with whatever notes follow it."""
    lines = chunk.split(b"\n- ")
    if chunk[:2] == b"- ":
        lines[0] = lines[0][2:]
    else:
        del lines[0]
    return lines


def _chunks(fd: int, at: int) -> Iterator[tuple[int, bytes, int]]:
    """Offset, bytes and end of runs of whole lines; a torn last line is left out.

    The part of a line that a read ends with is read again: that is cheaper than
    to copy every block once more.  For a line that no memory should hold, a damaged
    one of a few words stands.
    """
    size = _CHUNK
    while data := os.pread(fd, size, at):
        if cut := data.rfind(b"\n") + 1:
            yield at, data[:cut], at + cut
            at, size = at + cut, _CHUNK
        elif len(data) < size:
            return
        elif size < LONGEST:
            size *= 2
        elif end := _end_of_line(fd, at + size):
            yield at, _TOO_LONG, end
            at, size = end, _CHUNK
        else:
            return


def _end_of_line(fd: int, at: int) -> int:
    """Where the next line begins; 0 if the file ends before.  Holes are passed over."""
    while data := os.pread(fd, _CHUNK, at):
        if cut := data.find(b"\n") + 1:
            return at + cut
        at = durable.past_hole(fd, at + len(data))
    return 0


def catch_up(book: Book, fd: int) -> None:
    """Add every whole line of the ledger after `book.offset`."""
    survey, at = _Survey(book), book.offset
    for here, chunk, end in _chunks(fd, at):
        survey.look(chunk, here)
        at = end
    book.recent.extend(id.decode() for id in survey.ended)
    for line, here in (one for lines in survey.owed.values() for one in lines):
        book.feed(line, here)
    for id in [id for id in book.tasks if id.encode() not in survey.born]:
        del book.tasks[id]
    if survey.born:
        _revive(book, fd, survey.born, at)
    book.offset = at
    start = max(0, at - ENDING)
    book.last = os.pread(fd, at - start, start)


def _revive(book: Book, fd: int, born: Mapping[bytes, int], end: int) -> None:
    """Add up the lines of the tasks that are alive at `end`."""
    for here, chunk, _ in _chunks(fd, min(born.values())):
        for line in _lines(chunk):
            if here >= end:
                return  # written meanwhile: it is looked at in the next refresh
            if line[:2] == b"- " and line[2:][_ID] in born and crc32(line) == SEALED:
                book.feed(line, here)
            here += len(line)


def from_checkpoint(path: Path, ledger: int) -> Book | None:
    """The book at the checkpoint, if it belongs to this very file; else None.

    It is only a short cut: whatever is wrong with it, the ledger is the truth.
    """
    try:
        file = durable.read_json(path)
        data = next(_records([file["book"]]))
        if crc32(json.dumps(data).encode()) != file["crc32"]:
            return None
        book = Book(offset=int(str(data["offset"])), last=str(data["last"]).encode("latin-1"))
        if os.fstat(ledger).st_ino != data["inode"] or not stands(book, ledger):
            return None
        for record in _records(data["tasks"]):
            task = _task(record)
            book.tasks[task.id] = task
        book.gate = {str(r["reason"]): r for r in _records(data["gate"])}
        book.recent.extend(str(i) for i in _list(data["recent"]))
        owed = map(_owed, _records(data.get("owed", [])))
        book.owed = {one.key: one for one in owed}
        for event in map(_verdict, _records(data.get("verdicts", []))):
            book.act(event)
        return book
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def stands(book: Book, ledger: int) -> bool:
    """Whether what the book was made of is still the beginning of the file."""
    return os.pread(ledger, len(book.last), book.offset - len(book.last)) == book.last


def to_checkpoint(book: Book, inode: int) -> bytes:
    """What `from_checkpoint` reads back."""
    data = {
        "inode": inode,
        "offset": book.offset,
        "last": book.last.decode("latin-1"),
        "gate": list(book.gate.values()),
        "recent": list(book.recent),
        "owed": [asdict(one) for one in book.owed.values()],
        "verdicts": [asdict(event) for event in book.verdicts.values()],
        "tasks": [asdict(task) for task in book.tasks.values()],
    }
    crc = crc32(json.dumps(data).encode())
    return json.dumps({"crc32": crc, "book": data}).encode()


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _records(value: object) -> Iterator[dict[str, object]]:
    for record in _list(value):
        if not isinstance(record, dict):
            raise TypeError("not an object")
        yield record


def _task(record: dict[str, object]) -> Task:
    check(record)
    outcome = record.get("outcome")
    record["state"] = word(State, "state", record["state"])
    record["outcome"] = word(Outcome, "outcome", outcome) if outcome else None
    record["after"] = tuple(map(str, _list(record.get("after", []))))
    return Task(**record)  # type: ignore[arg-type]


def _owed(record: dict[str, object]) -> Owed:
    record["occasion"] = Occasion(str(record["occasion"]))
    return Owed(**record)  # type: ignore[arg-type]


def _verdict(record: dict[str, object]) -> Event:
    record["kind"] = Note(str(record["kind"]))
    return Event(**record)  # type: ignore[arg-type]
