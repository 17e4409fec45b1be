"""tasks.md: the append-only ledger that everything is recovered from.

One Markdown list item an event; a person reads it rendered or with grep:

    - 2026-11-23T07:20:11.123Z `20261123t072011-k3f9qa7x2m` **queued** `session="web"`  <!-- … -->

Lines that begin with `-` tell of a task, those with `*` of the daemon.  Facts
are name=JSON inside one code span, so that nothing a user wrote is Markdown.

Promises: events are acknowledged only after one write and one fsync of their
whole batch; a torn tail is cut by the one writer and skipped by readers; a
line whose seal is broken is reported and never acted on; no answer depends on
how long the history is (the checkpoint holds live tasks and an offset).

The seal: nine letters that make the CRC-32 of the whole line, newline
included, zero.  Then it is zero for any run of lines as well: one crc32() over
a block checks thousands of lines at once, and a person checks a line with any
CRC-32 tool.

May fail: `LedgerFull` when the disk refuses the bytes (nothing was written,
try again later); `LedgerBroken` when it can no longer be trusted, above all
after a failed fsync: the process must end and replay.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from zlib import crc32

from codexd import durable
from codexd.model import Event, IllegalEvent, Kind, Note, State, Task, apply
from codexd.outcome import Outcome

FORMAT = 1
RECENT = 50  # ended tasks remembered for a short list
VERDICTS = 1000  # rejected and repeated files remembered for those who wait
SEALED = 0  # CRC-32 of every good line, and so of any run of them
_HEAD = f"# codexd ledger, format {FORMAT}"
_TAIL = b" -->\n"
_BLANK = b"@@@@@@@@@"  # 0x40: four free bits each; eight letters reach only 30 of 32
_ID = slice(26, 52)  # after the "- " of a task's line
_KIND = 56
_ENDS = frozenset(b"dfc")  # done, failed, cancelled: no other kind begins so
_CHUNK = 64 << 10
_LINE = re.compile(
    rb"[-*] (?P<at>\S{24}) (?:`(?P<id>[0-9a-z-]{26})` )?\*\*(?P<kind>[a-z]+)\*\*"
    rb"(?: `(?P<facts>[^`]*)`)?  <!-- [@-O]{9} -->\n"
)
_FACT = re.compile(r"([a-z_]+)=")


class LedgerFull(OSError):
    """The disk has no room; nothing of the batch was written."""


class LedgerBroken(Exception):
    """The file cannot be written or trusted any more; end and replay."""


# --- one line ---------------------------------------------------------------


def _solve() -> list[tuple[int, int]]:
    """How to reach any CRC by the free bits of the seal.

    CRC-32 is linear: flipping a bit of the seal flips a fixed pattern of the
    sum, wherever the line began.  Gauss-Jordan over those patterns gives,
    for each bit of the sum, the bits of the seal that flip it alone.
    """
    rows = []
    zero = crc32(_BLANK + _TAIL)
    for bit in range(4 * len(_BLANK)):
        letters = bytearray(_BLANK)
        letters[bit // 4] ^= 1 << (bit % 4)
        rows.append((crc32(bytes(letters) + _TAIL) ^ zero, 1 << bit))
    for bit in range(32):
        mask = 1 << bit
        pivot = next(i for i in range(bit, len(rows)) if rows[i][0] & mask)
        rows[bit], rows[pivot] = rows[pivot], rows[bit]
        effect, flips = rows[bit]
        for i in range(len(rows)):
            if i != bit and rows[i][0] & mask:
                rows[i] = (rows[i][0] ^ effect, rows[i][1] ^ flips)
    return rows[:32]


_FLIPS = [flips for _, flips in _solve()]


def seal(text: str) -> bytes:
    """`text` as a sealed ledger line.  ASCII without a newline."""
    head = text.encode("ascii") + b"  <!-- "
    wrong = crc32(head + _BLANK + _TAIL) ^ SEALED
    flips = 0
    for bit in range(32):
        if wrong >> bit & 1:
            flips ^= _FLIPS[bit]
    letters = bytes(0x40 | flips >> 4 * i & 15 for i in range(len(_BLANK)))
    return head + letters + _TAIL


def _fact(value: object) -> str:
    # ensure_ascii leaves no control character but DEL; the backtick would end
    # the code span.  Both can only stand inside a JSON string.
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("`", "\\u0060").replace("\x7f", "\\u007f")


def render(event: Event) -> bytes:
    """The ledger line of an event."""
    facts = " ".join(f"{k}={_fact(v)}" for k, v in event.facts.items() if v is not None)
    where = f"`{event.id}` " if isinstance(event.kind, Kind) else ""
    mark = "-" if isinstance(event.kind, Kind) else "*"
    return seal(f"{mark} {event.at} {where}**{event.kind}**" + (f" `{facts}`" if facts else ""))


def parse(line: bytes) -> Event:
    """The event of a line.  Raises ValueError when the line is damaged."""
    if crc32(line) != SEALED:
        raise ValueError("the seal is broken")
    found = _LINE.fullmatch(line)
    if not found:
        raise ValueError("not a ledger line of this format")
    kind = found["kind"].decode()
    return Event(
        at=found["at"].decode(),
        kind=Kind(kind) if found["id"] else Note(kind),
        id=(found["id"] or b"").decode(),
        facts=dict(_facts((found["facts"] or b"").decode())),
    )


def _facts(text: str) -> Iterator[tuple[str, object]]:
    decoder, at = json.JSONDecoder(), 0
    while found := _FACT.match(text, at):
        value, at = decoder.raw_decode(text, found.end())
        yield found[1], value
        at += 1  # the blank between two facts
    if at < len(text):
        raise ValueError(f"no fact at column {at}: {text[at : at + 20]!r}")


# --- what the lines add up to -------------------------------------------------


@dataclass
class Book:
    """The ledger added up to `offset`: live tasks, the gate, the last that ended.

    `tasks` is in ledger order.  `gate` maps each reason that is closed to its
    facts.  `verdicts` has the last files that did not become tasks, by the id
    they were taken under.  `damaged` tells of lines that were not acted on.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    gate: dict[str, Mapping[str, object]] = field(default_factory=dict)
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=RECENT))
    verdicts: dict[str, Event] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    offset: int = 0

    def act(self, event: Event) -> Task | None:
        """Add one event; the task as it is now, None for a note.

        Raises IllegalEvent, and then nothing has changed.
        """
        if isinstance(event.kind, Note):
            self._note(event)
            return None
        task = apply(self.tasks.get(event.id), event)
        if task.state.ended:
            self.tasks.pop(event.id)
            self.recent.append(event.id)
        else:
            self.tasks[event.id] = task
        return task

    def _note(self, event: Event) -> None:
        if event.kind is Note.CLOSED:
            self.gate[str(event.facts.get("reason"))] = {**event.facts, "since": event.at}
        elif event.kind is Note.OPENED:
            self.gate.pop(str(event.facts.get("reason")), None)
        elif event.kind in (Note.REJECTED, Note.REPEATED):
            self.verdicts[str(event.facts.get("id"))] = event
            if len(self.verdicts) > VERDICTS:
                del self.verdicts[next(iter(self.verdicts))]

    def feed(self, line: bytes, here: int) -> None:
        """Add one complete line; one that cannot be acted on is reported with its place."""
        try:
            if line.startswith(b"#"):
                _check_head(line)
            else:
                self.act(parse(line))
        except (ValueError, IllegalEvent) as error:
            self.damaged.append(f"byte {here}: {error}")


def _check_head(line: bytes) -> None:
    if crc32(line) == SEALED and not line.startswith(_HEAD.encode() + b"  "):
        raise LedgerBroken(
            f"the ledger says {line[:60].decode('ascii', 'replace')!r}: "
            f"this codexd reads format {FORMAT} only"
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

    def look(self, chunk: bytes, here: int) -> None:
        """At whole lines, good or damaged, from offset `here` on."""
        if crc32(chunk) == SEALED:
            self._good(chunk, here)
            return
        for line in chunk.splitlines(keepends=True):
            if crc32(line) == SEALED:
                self._good(line, here)
            else:
                self.book.damaged.append(f"byte {here}: the seal is broken")
            here += len(line)

    def _good(self, chunk: bytes, here: int) -> None:
        begin, end, ends = self.born.setdefault, self.born.pop, _ENDS
        lines = _of_tasks(chunk)
        for line in lines:
            kind = line[_KIND]
            if kind == 113:  # queued
                begin(line[_ID], here)
            elif kind in ends:
                end(line[_ID], None)
        if chunk.count(b"\n") != len(lines):  # much faster than to look for "\n* "
            for line in chunk.split(b"\n"):
                if line[:1] in (b"*", b"#"):
                    self.book.feed(line + b"\n", here)


def _of_tasks(chunk: bytes) -> list[bytes]:
    """The lines of tasks, each without its "- " and with whatever notes follow it."""
    lines = chunk.split(b"\n- ")
    if chunk[:2] == b"- ":
        lines[0] = lines[0][2:]
    else:
        del lines[0]
    return lines


def _chunks(fd: int, at: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of runs of whole lines; a torn last line is left out.

    The part of a line that a read ends with is read again: that is cheaper than
    to copy every block once more.
    """
    size = _CHUNK
    while data := os.pread(fd, size, at):
        if cut := data.rfind(b"\n") + 1:
            yield at, data[:cut]
            at, size = at + cut, _CHUNK
        elif len(data) < size:
            return
        else:
            size *= 2


def _catch_up(book: Book, fd: int) -> None:
    """Add every whole line of the ledger after `book.offset`."""
    survey, at, chunk = _Survey(book), book.offset, b""
    for here, chunk in _chunks(fd, at):
        survey.look(chunk, here)
        at = here + len(chunk)
    for line in _of_tasks(chunk):  # only the last of many: RECENT are enough
        if line[_KIND] in _ENDS:
            book.recent.append(line[_ID].decode("ascii", "replace"))
    for id in [id for id in book.tasks if id.encode() not in survey.born]:
        del book.tasks[id]
    if survey.born:
        _revive(book, fd, survey.born, at)
    book.offset = at


def _revive(book: Book, fd: int, born: Mapping[bytes, int], end: int) -> None:
    """Add up the lines of the tasks that are alive at `end`."""
    for here, chunk in _chunks(fd, min(born.values())):
        for line in chunk.splitlines(keepends=True):
            if here >= end:
                return  # written meanwhile: it is looked at in the next refresh
            if line[:2] == b"- " and line[2:][_ID] in born and crc32(line) == SEALED:
                book.feed(line, here)
            here += len(line)


# --- checkpoint ---------------------------------------------------------------


def _from_checkpoint(path: Path, ledger: int) -> Book | None:
    """The book at the checkpoint, if it belongs to this very file; else None.

    It is only a short cut: whatever is wrong with it, the ledger is the truth.
    """
    try:
        data = durable.read_json(path)
        book = Book(offset=int(str(data["offset"])))
        last = str(data["last"]).encode("ascii")
        stat = os.fstat(ledger)
        if stat.st_ino != data["inode"] or stat.st_size < book.offset:
            return None
        if os.pread(ledger, len(last), book.offset - len(last)) != last:
            return None
        for record in _records(data["tasks"]):
            task = _task(record)
            book.tasks[task.id] = task
        book.gate = {str(r["reason"]): r for r in _records(data["gate"])}
        book.recent.extend(str(i) for i in _list(data["recent"]))
        return book
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
    outcome = record.get("outcome")
    record["state"] = State(str(record["state"]))
    record["outcome"] = Outcome(str(outcome)) if outcome else None
    return Task(**record)  # type: ignore[arg-type]


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
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.book = Book()
                return
            found = _from_checkpoint(self.checkpoint, self._fd) if self.checkpoint else None
            self.book = found or Book()
        if os.fstat(self._fd).st_size > self.book.offset:
            _catch_up(self.book, self._fd)

    def _same_file(self) -> bool:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        here = os.fstat(self._fd)
        same = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
        return same and here.st_size >= self.book.offset


# --- writing --------------------------------------------------------------------


class Ledger:
    """The one writer.  Open it only under the master's lock."""

    def __init__(self, path: Path, checkpoint: Path) -> None:
        """Open or begin the ledger, cut a torn tail, add up what it says.

        Raises OSError, LedgerFull, LedgerBroken.
        """
        self.checkpoint_path = checkpoint
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        reader = Follower(path, checkpoint)
        reader.refresh()
        reader.close()
        self.book = reader.book
        self.torn = os.fstat(self._fd).st_size - self.book.offset
        if self.torn:
            os.ftruncate(self._fd, self.book.offset)
        self._last = self._read_last()
        self._marked = self.book.offset
        if not self.book.offset:
            self._write(seal(_HEAD))
            durable.sync_directory(path.parent)

    def _read_last(self) -> bytes:
        tail = os.pread(self._fd, 8192, max(0, self.book.offset - 8192))
        return tail[:-1].rpartition(b"\n")[2] + b"\n" if tail else b""

    def append(self, events: list[Event]) -> list[Task | None]:
        """Write a batch and make it durable; the tasks as they are after it.

        Every event is checked against the table before a byte is written.
        Raises IllegalEvent (nothing written), LedgerFull, LedgerBroken.
        """
        if not events:
            return []
        _rehearse(self.book, events)
        self._write(b"".join(map(render, events)))
        return [self.book.act(event) for event in events]

    def _write(self, data: bytes) -> None:
        size = self.book.offset
        try:
            durable.write_all(self._fd, data)
        except OSError as error:
            try:
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
        self._last = data[:-1].rpartition(b"\n")[2] + b"\n"

    @property
    def unmarked(self) -> int:
        """Bytes since the last checkpoint."""
        return self.book.offset - self._marked

    def checkpoint(self) -> None:
        """Write the short cut for the next start.  Raises OSError; no harm done."""
        book = self.book
        data = {
            "format": FORMAT,
            "inode": os.fstat(self._fd).st_ino,
            "offset": book.offset,
            "last": self._last.decode("ascii", "replace"),
            "gate": list(book.gate.values()),
            "recent": list(book.recent),
            "tasks": [asdict(task) for task in book.tasks.values()],
        }
        durable.write(self.checkpoint_path, json.dumps(data).encode())
        self._marked = book.offset

    def close(self) -> None:
        os.close(self._fd)


def _rehearse(book: Book, events: list[Event]) -> None:
    """Raise IllegalEvent if the table forbids any of a batch."""
    tried: dict[str, Task] = {}
    for event in events:
        if isinstance(event.kind, Kind):
            tried[event.id] = apply(tried.get(event.id) or book.tasks.get(event.id), event)
