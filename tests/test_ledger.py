"""The ledger is never wrong, and at worst short by what was not acknowledged."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from codexd import book as book_room
from codexd.ledger import Book, Follower, Ledger, LedgerBroken, LedgerFull, parse, render, seal
from codexd.model import (
    TRANSITIONS,
    Event,
    IllegalEvent,
    Kind,
    Note,
    apply,
)

ROOT = Path(__file__).resolve().parent.parent
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


def lines(events: list[Event]) -> list[bytes]:
    return [HEAD, *map(render, events)]


def facts_of(book: Book) -> dict[str, Any]:
    """A book as it must be, however it came to be."""
    return {
        "tasks": list(book.tasks.items()),
        "gate": {reason: dict(facts) for reason, facts in book.gate.items()},
        "recent": list(book.recent),
        "verdicts": list(book.verdicts.items()),
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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tasks.md"


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Callable[[], Ledger]]:
    opened: list[Ledger] = []

    def open_it() -> Ledger:
        while opened:
            opened.pop().close()
        opened.append(Ledger(tmp_path / "tasks.md", tmp_path / "checkpoint.json"))
        return opened[0]

    yield open_it
    for one in opened:
        one.close()


# --- one line ---------------------------------------------------------------------

ANY = st.text(st.characters(exclude_categories=()))  # lone surrogates, controls, all of it
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3),
    max_leaves=5,
)
FACTS = st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), VALUES, max_size=4)
HOSTILE = {
    "backticks": "`` ` ```",
    "an end of the comment": "--> <!-- -->\n",
    "a forged line": "x`\n" + render(move(1, Kind.DONE)).decode(),
    "a carriage return": "a\r- b\r\n",
    "escapes": "\x1b]0;pwned\x07\x1b[2J\x9b31m",
    "separators of lines": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "lone surrogates": "\ud800 \udfff",
    "the edges": "\x00\x7f\ufeff\uffff\U0010ffff",
    "quotes and slashes": "\"\\'\\u0060 \\\\`",
    "other directions": "\u202egnp.exe",
    "a megabyte": "`\n" * 500_000,
    "Markdown": "**bold** [a](javascript:x) <script>|a|b| &lt; # - * 1.",
    "facts": 'outcome="done" priority=9',
}


def code_spans(line: str) -> tuple[str, list[str]]:
    """The text around the code spans of a line, as CommonMark finds them, and the spans.

    Every run of backticks here must be a single one, so each pair is a span.
    """
    assert "``" not in line
    parts = line.split("`")
    assert len(parts) % 2 == 1, "a code span that does not end"
    return "".join(parts[::2]), parts[1::2]


def check_line(line: bytes, event: Event) -> None:
    """One printable ASCII line, whose Markdown nothing of a user's text can reach."""
    assert parse(line) == event
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    text = line[:-1].decode("ascii")
    assert text.isprintable()
    around, spans = code_spans(text)
    about = isinstance(event.kind, Kind)
    assert spans[:about] == ([event.id] if about else [])
    assert len(spans) == about + bool(event.facts)
    pattern = r"[-*] \S{24} {1,2}\*\*[a-z]+\*\* {2,3}<!-- [@A-O]{9} -->"
    assert re.fullmatch(pattern, around), around
    assert zlib.crc32(line) == 0, "any CRC-32 tool checks it"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_facts_neither_forge_lines_nor_break_markdown(name: str) -> None:
    text = HOSTILE[name]
    check_line(render(queued(1, title=text)), queued(1, title=text))
    note = Event(AT, Note.REJECTED, facts={"file": text, "reason": text})
    check_line(render(note), note)
    check_line(render(queued(1, usage={text: 1})), queued(1, usage={text: 1}))


@given(FACTS)
def test_every_event_comes_back_from_its_line(facts: dict[str, Any]) -> None:
    event = Event(AT, Kind.RUNNING, ident(1), facts)
    check_line(render(event), event)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=300))
def test_every_text_can_be_sealed(text: str) -> None:
    line = seal(text)
    assert zlib.crc32(line) == 0
    assert line.startswith(text.encode() + b"  <!-- ")
    assert zlib.crc32(HEAD + line + line) == 0, "a run of lines is sealed as well"


def test_a_fact_of_none_is_not_written() -> None:
    assert b"thread" not in render(move(1, Kind.RUNNING, thread=None))


@pytest.mark.parametrize(
    "event",
    [
        Event("yesterday", Kind.QUEUED, ident(1)),
        Event(AT, Kind.QUEUED, "short"),
        Event(AT, Kind.QUEUED, ident(1), {"Key": 1}),
        Event(AT, Kind.QUEUED, ident(1), {"a b": 1}),
        Event(AT, Kind.QUEUED, ident(1), {"": 1}),
    ],
)
def test_what_could_not_be_read_back_is_not_written(event: Event) -> None:
    with pytest.raises(ValueError, match="no ledger line"):
        render(event)


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"- \n",
        b"# codexd ledger, format 1\n",
        render(queued(1)).replace(b"queued", b"failed"),
        render(queued(1))[:-1],
        render(queued(1)) + b"\n",
        seal("a person's note"),
        seal(f"- {AT} `{ident(1)}` **vanished**"),
        seal(f"* {AT} **vanished**"),
        seal(f"- {AT} `{ident(1)}` **queued** `priority=`"),
        seal(f"- {AT} `{ident(1)}` **queued** `priority=1 x`"),
        seal(f"- {AT} `{ident(1)}` **queued** `nothing`"),
    ],
)
def test_what_is_no_line_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(line)


# --- what is on disk --------------------------------------------------------------


def test_a_person_reads_it(open_ledger: Callable[[], Ledger], path: Path) -> None:
    open_ledger().append([queued(1, session="web", title="Fix `it`"), closed("hold")])
    first, second, third = path.read_text().splitlines()
    assert first.startswith("# codexd ledger, format 1  <!-- ")
    start = (
        f'- {AT} `{ident(1)}` **queued** `file="1.md" session="web" title="Fix \\u0060it\\u0060"`'
    )
    assert second.startswith(start + "  <!-- ")
    assert third.startswith(f'* {AT} **closed** `reason="hold" message="m"`  <!-- ')


def test_the_file_format_of_version_1_is_read_for_ever(tmp_path: Path) -> None:
    data = Path(__file__).parent / "data" / "ledger-1.md"
    book = read(data)
    assert not book.damaged
    assert [(t.id, t.state.value, t.session, t.priority) for t in book.tasks.values()] == [
        (ident(2), "waiting", None, 5),
        (ident(3), "running", "web", 5),
    ]
    assert book.tasks[ident(3)].thread == "T"
    assert list(book.recent) == [ident(1)]
    assert list(book.gate) == ["quota"]
    assert list(book.verdicts) == [ident(9)]


def test_what_was_appended_is_there_after_a_restart(open_ledger: Callable[[], Ledger]) -> None:
    first = open_ledger()
    tasks = [first.append([event])[0] for event in TEN]
    before = facts_of(first.book)
    again = open_ledger()
    assert facts_of(again.book) == before == facts_of(slow(lines(TEN)))
    assert tasks[0] == apply(None, TEN[0])
    assert tasks[3] is None
    assert again.torn == 0


def test_a_batch_with_one_illegal_event_is_not_written(
    open_ledger: Callable[[], Ledger], path: Path
) -> None:
    one = open_ledger()
    one.append([queued(1)])
    data, before = path.read_bytes(), facts_of(one.book)
    for batch in (
        [queued(2), move(3, Kind.RUNNING)],
        [move(1, Kind.FAILED), move(1, Kind.QUEUED)],
        [queued(2), queued(2)],
        [queued(2), queued(3, colour={1, 2})],
    ):
        with pytest.raises((IllegalEvent, TypeError)):
            one.append(batch)
        assert path.read_bytes() == data
        assert facts_of(one.book) == before
    assert one.append([]) == []


def test_none_means_the_same_before_and_after_a_restart(open_ledger: Callable[[], Ledger]) -> None:
    one = open_ledger()
    one.append([queued(1, session=None), move(1, Kind.RUNNING, thread="T")])
    one.append([move(1, Kind.QUEUED, thread=None, message=None)])
    before = facts_of(one.book)
    assert facts_of(open_ledger().book) == before


# --- damage -----------------------------------------------------------------------


def test_every_prefix_replays_to_an_exact_event_prefix_and_is_cut(tmp_path: Path) -> None:
    """Whatever a crash leaves of a file, the writer goes on after its last whole line."""
    whole = lines(TEN)
    data = b"".join(whole)
    path = tmp_path / "tasks.md"
    ends = [sum(map(len, whole[: n + 1])) for n in range(len(whole))]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        count = sum(end <= size for end in ends)
        reader = read(path)
        assert facts_of(reader) == facts_of(slow(whole[:count])), size
        assert not reader.damaged
        if size not in ends and size % 7 and size > 60:
            continue  # the writer syncs: not for each of them
        writer = Ledger(path, tmp_path / "none.json")
        writer.append([queued(4)])
        writer.close()
        kept = whole[:count] or [HEAD]
        assert writer.torn == size - sum(map(len, whole[:count])), size
        assert path.read_bytes() == b"".join(kept) + render(queued(4)), size


def test_no_flipped_bit_changes_what_is_acted_on(tmp_path: Path) -> None:
    """A flip costs the line it is in, and is told; it never alters one."""
    whole = lines(TEN)
    data = b"".join(whole)
    without = {n: facts_of(slow([x for m, x in enumerate(whole) if m != n])) for n in range(11)}
    path = tmp_path / "tasks.md"
    path.write_bytes(data)
    with open(path, "r+b", buffering=0) as file:
        at = 0
        for number, line in enumerate(whole):
            for offset, byte in enumerate(line):
                for bit in range(8):
                    file.seek(at + offset)
                    file.write(bytes([byte ^ 1 << bit]))
                    book = read(path)
                    if offset < len(line) - 1:
                        assert facts_of(book) == without[number], (number, offset, bit)
                        assert book.damaged, (number, offset, bit)
                    else:  # its newline: the next line goes with it
                        both = [x for m, x in enumerate(whole) if m not in (number, number + 1)]
                        assert facts_of(book) == facts_of(slow(both))
                        assert book.damaged or number == 10  # torn, not damaged
                file.seek(at + offset)
                file.write(bytes([byte]))
            at += len(line)


@pytest.mark.parametrize(
    "noise",
    [
        b"\n",
        b"- \n",
        b"* \n",
        b"#\n",
        b"# codexd ledger, format 2\n",
        b"- [ ] a task that a person wrote\n",
        b"\x00" * 4096 + b"\n",
        b"\xff\xfe\xfd\n",
        b"a\rb\rc\n",
        b"x" * 300_000 + b"\n",
        render(move(1, Kind.DONE, outcome="done")).replace(b"done", b"Done"),
        b"\n" * 1000,
        render(queued(7))[:-20] + b"\n",
    ],
    ids=lambda noise: repr(noise[:20]),
)
@pytest.mark.parametrize("place", [0, 1, 5, 11])
def test_noise_between_lines_is_told_and_costs_nothing(
    tmp_path: Path, noise: bytes, place: int
) -> None:
    path = tmp_path / "tasks.md"
    whole = lines(TEN)
    path.write_bytes(b"".join([*whole[:place], noise, *whole[place:]]))
    writer = Ledger(path, tmp_path / "none.json")
    assert facts_of(writer.book) == facts_of(slow(whole))
    assert len(writer.book.damaged) == noise.count(b"\n")
    assert writer.book.damaged[0].startswith(f"byte {sum(map(len, whole[:place]))}: ")
    writer.append([move(3, Kind.DONE, outcome="done")])
    assert facts_of(read(path)) == facts_of(writer.book)
    writer.close()


@pytest.mark.parametrize("lost", range(1, 11))
def test_a_lost_line_never_brings_a_task_back_or_makes_one_up(tmp_path: Path, lost: int) -> None:
    whole = lines([*TEN, move(3, Kind.QUEUED, reason="interrupted"), move(2, Kind.QUEUED)])
    whole[lost] = whole[lost].replace(b"2026", b"2027", 1)
    (tmp_path / "tasks.md").write_bytes(b"".join(whole))
    book = read(tmp_path / "tasks.md")
    assert ident(1) not in book.tasks or lost == 7, "it ended"
    for task in book.tasks.values():
        assert task.file == f"{int(task.id[-10:])}.md", "its first line is known"
    assert sum("seal" in told for told in book.damaged) == 1, "told once"


def test_a_newer_format_is_refused_every_time(tmp_path: Path) -> None:
    path = tmp_path / "tasks.md"
    path.write_bytes(seal("# codexd ledger, format 2") + render(queued(1)))
    follower = Follower(path)
    for _ in range(2):
        with pytest.raises(LedgerBroken, match="format 2"):
            follower.refresh()
    with pytest.raises(LedgerBroken, match="reads format 1 only"):
        Ledger(path, tmp_path / "none.json")
    assert path.read_bytes().endswith(render(queued(1)))


# --- the quick way and the plain way ----------------------------------------------


@st.composite
def histories(draw: st.DrawFn) -> list[bytes]:
    """Legal events of a few tasks with notes between them, and perhaps damaged lines."""
    book, made, n = Book(), [HEAD], 0
    for _ in range(draw(st.integers(0, 25))):
        roll = draw(st.integers(0, 9))
        if roll == 0:
            name = draw(st.sampled_from(["quota", "hold"]))
            note = draw(st.sampled_from([Note.CLOSED, Note.OPENED]))
            event = Event(AT, note, facts={"reason": name})
        elif roll == 1:
            note = draw(st.sampled_from([Note.REJECTED, Note.REPEATED, Note.STARTED, Note.RESET]))
            event = Event(AT, note, facts={"id": ident(draw(st.integers(900, 905)))})
        elif roll < 5 or not book.tasks:
            n += 1
            event = queued(n, session=draw(st.sampled_from([None, "s"])))
        else:
            task = draw(st.sampled_from(sorted(book.tasks.values(), key=lambda t: t.id)))
            kinds = [k for s, k in TRANSITIONS if s == task.state]
            kind = draw(st.sampled_from(kinds))
            event = Event(AT, kind, task.id, {"attempts": draw(st.integers(0, 3))})
        book.act(event)
        made.append(render(event))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(made) - 1))
        made[at] = draw(st.sampled_from([b"- \n", b"* x\n", made[at].replace(b"-", b"=", 1)]))
    return made


@settings(deadline=None, max_examples=150)
@given(histories(), st.lists(st.integers(0, 30), max_size=3))
def test_the_quick_way_and_the_plain_way_agree(
    tmp_path_factory: pytest.TempPathFactory, history: list[bytes], stops: list[int]
) -> None:
    """In one piece, in pieces, and from a checkpoint between them."""
    directory = tmp_path_factory.getbasetemp() / "agree"
    directory.mkdir(exist_ok=True)
    path, checkpoint = directory / "tasks.md", directory / "checkpoint.json"
    path.write_bytes(b"".join(history))
    plain = facts_of(slow(history))
    assert facts_of(read(path)) == plain

    for old in directory.iterdir():
        old.unlink()
    path.touch()
    follower, done = Follower(path), 0
    for stop in [*sorted(stops), len(history)]:
        with open(path, "ab") as file:
            file.write(b"".join(history[done:stop]))
        done = max(done, stop)
        follower.refresh()
        assert facts_of(follower.book) == facts_of(slow(history[:done]))
        writer = Ledger(path, checkpoint)
        if done:
            writer.checkpoint()
        writer.close()
    follower.close()
    # Who was rejected is no part of the checkpoint: it is for those who wait now.
    from_checkpoint = facts_of(read(path, checkpoint))
    assert {**from_checkpoint, "verdicts": 0} == {**plain, "verdicts": 0}


def test_a_history_of_many_chunks(tmp_path: Path) -> None:
    """Ends before a chunk's border, lives across it, and a short last chunk."""
    events: list[Event] = []
    for n in range(4000):
        events.append(queued(n, session="s", title="x" * (n % 200)))
        if n % 100:
            events += [move(n, Kind.RUNNING, attempts=1), move(n, Kind.DONE, outcome="done")]
        if n % 500 == 0:
            events.append(closed(f"reason-{n % 3}"))
    whole = lines(events)
    whole[-3] = b"- damaged\n"
    data = b"".join(whole)
    path = tmp_path / "tasks.md"
    for extra in (b"", render(move(100, Kind.RUNNING))):
        path.write_bytes(data + extra)
        plain = slow([*whole, extra] if extra else whole)
        assert facts_of(read(path)) == facts_of(plain)
    assert len(data) > 3 * book_room._CHUNK


# --- checkpoints ------------------------------------------------------------------


def prepared(tmp_path: Path) -> tuple[Path, Path]:
    """A ledger with a checkpoint in its middle."""
    path, checkpoint = tmp_path / "tasks.md", tmp_path / "checkpoint.json"
    writer = Ledger(path, checkpoint)
    writer.append(TEN[:6])
    writer.checkpoint()
    assert writer.unmarked == 0
    writer.append(TEN[6:])
    assert writer.unmarked == sum(len(render(e)) for e in TEN[6:])
    writer.close()
    return path, checkpoint


def used(path: Path, checkpoint: Path) -> bool:
    """Whether a start makes use of the checkpoint: then what stands before it is not read."""
    data = path.read_bytes()
    inode = path.stat().st_ino
    with open(path, "r+b") as file:
        file.seek(len(HEAD) + 5)
        file.write(b"?")
    assert path.stat().st_ino == inode
    told = read(path, checkpoint).damaged
    with open(path, "r+b") as file:
        file.write(data)
    return not told


def test_checkpoint_and_tail_are_a_full_replay(tmp_path: Path) -> None:
    path, checkpoint = prepared(tmp_path)
    assert facts_of(read(path, checkpoint)) == facts_of(slow(lines(TEN)))
    assert used(path, checkpoint)


def test_a_checkpoint_tells_of_live_tasks_only(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "tasks.md", tmp_path / "checkpoint.json"
    writer = Ledger(path, checkpoint)
    writer.append([queued(0)])
    sizes = []
    for n in range(1, 200):
        writer.append([queued(n), move(n, Kind.RUNNING), move(n, Kind.DONE, outcome="done")])
        if n > 100:
            writer.checkpoint()
            sizes.append(checkpoint.stat().st_size)
    writer.close()
    assert max(sizes) - min(sizes) < 20


def change(path: Path, **values: object) -> None:
    """Other values in the checkpoint, with a sum that is right, and no task in it."""
    data = json.loads(path.read_text())["book"] | {"tasks": []} | values
    crc = zlib.crc32(json.dumps(data).encode())
    path.write_text(json.dumps({"crc32": crc, "book": data}))


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


BAD_CHECKPOINTS: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda _, c: c.unlink(),
    "empty": lambda _, c: c.write_bytes(b""),
    "torn": lambda _, c: c.write_bytes(c.read_bytes()[:-9]),
    "binary": lambda _, c: c.write_bytes(b"\xff\x00" * 99),
    "deep": lambda _, c: c.write_bytes(b"[" * 100_000),
    "of another shape": lambda _, c: c.write_bytes(b'{"book": 7, "crc32": 1}'),
    "a directory": lambda _, c: directory(c),
    "a FIFO": lambda _, c: fifo(c),
    "of another file": lambda _, c: change(c, inode=1),
    "beyond the end": lambda _, c: change(c, offset=1 << 40),
    "in the middle of a line": lambda p, c: change(c, offset=len(HEAD) + 9),
    "with an unknown state": lambda _, c: change(c, tasks=[{"id": ident(2), "state": "lost"}]),
    "of a copy": lambda p, c: (
        p.rename(p.with_name("old")),
        p.write_bytes(p.with_name("old").read_bytes()),
    ),
    "of what was written over": lambda p, c: p.write_bytes(
        b"".join(lines([queued(1, title="another"), *TEN[1:]]))
    ),
}


@pytest.mark.parametrize("what", BAD_CHECKPOINTS)
def test_a_checkpoint_is_only_a_short_cut(tmp_path: Path, what: str) -> None:
    path, checkpoint = prepared(tmp_path)
    BAD_CHECKPOINTS[what](path, checkpoint)
    expected = slow(path.read_bytes().splitlines(keepends=True))
    assert facts_of(read(path, checkpoint)) == facts_of(expected)


def test_no_flipped_bit_of_a_checkpoint_is_acted_on(tmp_path: Path) -> None:
    path, checkpoint = prepared(tmp_path)
    good, expected = checkpoint.read_bytes(), facts_of(slow(lines(TEN)))
    for at in range(0, len(good), 3):
        for bit in (at % 8, 5):
            checkpoint.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            assert facts_of(read(path, checkpoint)) == expected, (at, bit)


# --- a disk that refuses ----------------------------------------------------------

FULL = """
import json, os, resource, sys
from pathlib import Path
from codexd.ledger import Ledger, LedgerFull
from codexd.model import Event, Kind
place = Path(sys.argv[1])
one = Ledger(place / "tasks.md", place / "checkpoint.json")
def event(n, title):
    id = f"20261123t072011-{n:010}"
    return Event(sys.argv[2], Kind.QUEUED, id, {"file": "f", "title": title})
one.append([event(1, "small")])
before = (place / "tasks.md").read_bytes()
size = len(before) + 10_000
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
for n in range(2, 5):
    try:
        one.append([event(n, "x" * 6000), event(n + 10, "x" * 6000)])
    except LedgerFull as full:
        assert full.errno, full
        assert "ledger" in str(full)
    else:
        sys.exit("it was written")
    assert (place / "tasks.md").read_bytes() == before
    assert list(one.book.tasks) == ["20261123t072011-0000000001"]
one.append([event(9, "small again")])
one.close()
"""


def test_no_room_leaves_the_file_as_it_was(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, path.parent, AT], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [t.title for t in read(path).tasks.values()] == ["small", "small again"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs a file system of its own: root, and mount(8)")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk(tiny_disk: Path) -> None:
    path = tiny_disk / "tasks.md"
    one = Ledger(path, tiny_disk / "checkpoint.json")
    (tiny_disk / "ballast").write_bytes(b"x" * 30_000)

    def fill() -> None:
        for n in range(1000):
            one.append([queued(n, title="x" * 1500), queued(n + 5000, title="x" * 1500)])

    with pytest.raises(LedgerFull) as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    before, tasks = path.read_bytes(), list(one.book.tasks)
    with pytest.raises(OSError, match="No space"):
        one.checkpoint()
    (tiny_disk / "ballast").unlink()
    one.append([queued(2000)])
    assert path.read_bytes() == before + render(queued(2000))
    one.close()
    assert list(read(path).tasks) == [*tasks, ident(2000)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_write_that_fails_and_cannot_be_cut_ends_it(path: Path) -> None:
    one = Ledger(path, path.parent / "checkpoint.json")
    full = os.open("/dev/full", os.O_WRONLY)  # takes no byte, and cannot be truncated
    os.dup2(full, one._fd)
    os.close(full)
    with pytest.raises(LedgerBroken, match="half-written"):
        one.append([queued(1)])
    assert not one.book.tasks
    one.close()


def test_a_failed_sync_ends_it(path: Path) -> None:
    one = Ledger(path, path.parent / "checkpoint.json")
    read_end, write_end = os.pipe()  # takes every byte, and cannot be synced
    os.dup2(write_end, one._fd)
    os.close(write_end)
    with pytest.raises(LedgerBroken, match="fsync"):
        one.append([queued(1)])
    assert not one.book.tasks, "nothing is acknowledged"
    one.close()
    os.close(read_end)


# --- following --------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from codexd.ledger import Ledger
from codexd.model import Event, Kind, Note
path, at = Path(sys.argv[1]), sys.argv[2]
one = Ledger(path, path.with_name("checkpoint.json"))
for n in range(400):
    id = f"20261123t072011-{n:010}"
    one.append([
        Event(at, Kind.QUEUED, id, {"file": f"{n}.md", "title": "x" * (n * 37 % 3000)}),
        Event(at, Note.CLOSED, facts={"reason": f"r{n}"}),
    ])
    if n % 3:
        one.append([Event(at, Kind.CANCELLED, id, {"outcome": "cancelled"})])
one.close()
"""


def test_a_reader_beside_the_writer_sees_every_event_once(path: Path) -> None:
    follower = Follower(path)
    follower.refresh()
    assert facts_of(follower.book) == facts_of(Book()), "no ledger yet is an empty one"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path, AT], cwd=ROOT)
    seen: list[str] = []
    looks = 0
    running = True
    while running:
        running = writer.poll() is None
        follower.refresh()
        looks += 1
        for n in range(len(seen), len(follower.book.gate)):
            seen.append(f"r{n}")
        assert list(follower.book.gate) == seen, "in order, none left out"
        assert not follower.book.damaged
    assert writer.returncode == 0
    assert looks > 20
    whole = path.read_bytes().splitlines(keepends=True)
    assert facts_of(follower.book) == facts_of(slow(whole))
    assert [int(id[-10:]) for id in follower.book.tasks] == list(range(0, 400, 3))
    follower.close()


def test_a_torn_tail_is_skipped_until_it_is_whole(path: Path) -> None:
    follower = Follower(path)
    line = render(queued(2))
    path.write_bytes(b"".join(lines([queued(1)])) + line[:40])
    follower.refresh()
    assert list(follower.book.tasks) == [ident(1)]
    follower.refresh()
    with open(path, "ab") as file:
        file.write(line[40:])
    follower.refresh()
    assert list(follower.book.tasks) == [ident(1), ident(2)]
    assert not follower.book.damaged
    follower.close()


def test_a_batch_that_was_cut_off_again_is_forgotten(path: Path) -> None:
    """No room: whole lines may have stood there for a moment, and others stand there now."""
    follower = Follower(path)
    path.write_bytes(b"".join(lines([queued(1)])))
    kept = path.stat().st_size
    for then in ([], [queued(3)], [queued(4), queued(5), queued(6, title="long" * 99)]):
        with open(path, "ab") as file:
            file.write(render(queued(2)))
        follower.refresh()
        assert ident(2) in follower.book.tasks
        os.truncate(path, kept)
        with open(path, "ab") as file:
            file.write(b"".join(map(render, then)))
        follower.refresh()
        assert facts_of(follower.book) == facts_of(slow(lines([queued(1), *then])))
        assert not follower.book.damaged
        os.truncate(path, kept)
    follower.close()


def test_a_ledger_that_was_replaced_or_removed(path: Path) -> None:
    follower = Follower(path)
    path.write_bytes(b"".join(lines([queued(1)])))
    follower.refresh()
    aside = path.with_name("new")
    aside.write_bytes(b"".join(lines([queued(7), queued(8)])))
    aside.rename(path)
    follower.refresh()
    assert list(follower.book.tasks) == [ident(7), ident(8)]
    path.unlink()
    follower.refresh()
    assert not follower.book.tasks
    follower.close()


def test_a_reader_keeps_one_descriptor(path: Path) -> None:
    path.write_bytes(b"".join(lines(TEN)))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        follower = Follower(path)
        follower.refresh()
        follower.refresh()
        follower.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_remembered_is_bounded(path: Path) -> None:
    events = []
    for n in range(book_room.RECENT + 30):
        events += [queued(n), move(n, Kind.CANCELLED)]
    for n in range(book_room.VERDICTS + 30):
        events.append(Event(AT, Note.REJECTED, facts={"id": ident(n), "file": "f", "reason": "r"}))
    path.write_bytes(b"".join(lines(events)))
    book = read(path)
    assert list(book.recent) == [ident(n) for n in range(30, 30 + book_room.RECENT)]
    assert list(book.verdicts) == [ident(n) for n in range(30, 30 + book_room.VERDICTS)]


# --- a writer that dies -----------------------------------------------------------


class Crashes(RuleBasedStateMachine):
    """Appends, crashes that tear the last line, restarts with and without a checkpoint.

    What was acknowledged is never lost and never altered.
    """

    @initialize(directory=st.uuids())
    def begin(self, directory: object) -> None:
        self.place = Path(_BASE[0]) / str(directory)
        self.place.mkdir(exist_ok=True)
        for old in self.place.iterdir():
            old.unlink()
        self.path = self.place / "tasks.md"
        self.ledger = Ledger(self.path, self.place / "checkpoint.json")
        self.acknowledged: list[Event] = []
        self.count = 0

    @rule(size=st.integers(1, 4), ends=st.booleans())
    def append(self, size: int, ends: bool) -> None:
        batch = [queued(self.count + n, title="x" * n) for n in range(size)]
        self.count += size
        if ends:
            batch.append(move(self.count - 1, Kind.CANCELLED))
        self.ledger.append(batch)
        self.acknowledged += batch

    @rule(data=st.data(), checkpoint=st.booleans())
    def crash(self, data: st.DataObject, checkpoint: bool) -> None:
        if checkpoint:
            self.ledger.checkpoint()
        os.close(self.ledger._fd)
        torn = render(queued(self.count, title="never acknowledged"))
        with open(self.path, "ab") as file:
            file.write(torn[: data.draw(st.integers(0, len(torn) - 1))])
        self.ledger = Ledger(self.path, self.place / "checkpoint.json")

    @rule()
    def lose_the_checkpoint(self) -> None:
        (self.place / "checkpoint.json").unlink(missing_ok=True)

    @invariant()
    def nothing_lost_nothing_new(self) -> None:
        if hasattr(self, "ledger"):
            assert facts_of(self.ledger.book) == facts_of(slow(lines(self.acknowledged)))
            assert not self.ledger.book.damaged

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()


_BASE = [""]


@pytest.fixture(autouse=True, scope="module")
def _base(tmp_path_factory: pytest.TempPathFactory) -> None:
    _BASE[0] = str(tmp_path_factory.mktemp("crashes"))


TestCrashes = Crashes.TestCase
TestCrashes.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
