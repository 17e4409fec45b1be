"""What the lines add up to: whatever is damaged, whichever way they are read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codexd import book as book_room
from codexd.ledger import Book, Follower, Ledger, LedgerBroken, render, seal
from codexd.model import TRANSITIONS, Event, Kind, Note
from tests.history import (
    AT,
    EVERY,
    HEAD,
    TEN,
    closed,
    facts_of,
    ident,
    lines,
    move,
    queued,
    read,
    slow,
)

# --- damage -----------------------------------------------------------------------


@pytest.mark.parametrize(("events", "step"), [(TEN, 7), (EVERY, 29)], ids=["ten", "every"])
def test_every_prefix_replays_to_an_exact_event_prefix_and_is_cut(
    tmp_path: Path, events: list[Event], step: int
) -> None:
    """Whatever a crash leaves of a file, the writer goes on after its last whole line."""
    whole = lines(events)
    data = b"".join(whole)
    path = tmp_path / "tasks.md"
    ends = [sum(map(len, whole[: n + 1])) for n in range(len(whole))]
    expected = [facts_of(slow(whole[:count])) for count in range(len(whole) + 1)]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        count = sum(end <= size for end in ends)
        reader = read(path)
        assert facts_of(reader) == expected[count], size
        assert not reader.damaged
        if size not in ends and size % step and size > 60:
            continue  # the writer syncs: not for each of them
        writer = Ledger(path, tmp_path / "none.json")
        writer.append([queued(6)])
        writer.close()
        kept = whole[:count] or [HEAD]
        assert writer.torn == size - sum(map(len, whole[:count])), size
        assert path.read_bytes() == b"".join(kept) + render(queued(6)), size


@pytest.mark.parametrize(("events", "bits"), [(TEN, 8), (EVERY, 1)], ids=["ten", "every"])
def test_no_flipped_bit_changes_what_is_acted_on(
    tmp_path: Path, events: list[Event], bits: int
) -> None:
    """A flip costs the line it is in, and is told; it never alters one.  Of each byte all
    its bits, or one, each time the next."""
    whole = lines(events)
    data = b"".join(whole)
    last = len(whole) - 1
    without = [facts_of(slow([*whole[:n], *whole[n + 1 :]])) for n in range(len(whole))]
    path = tmp_path / "tasks.md"
    path.write_bytes(data)
    with open(path, "r+b", buffering=0) as file:
        at = 0
        for number, line in enumerate(whole):
            for offset, byte in enumerate(line):
                for bit in {(offset + n) % 8 for n in range(bits)}:
                    file.seek(at + offset)
                    file.write(bytes([byte ^ 1 << bit]))
                    book = read(path)
                    if offset < len(line) - 1:
                        assert facts_of(book) == without[number], (number, offset, bit)
                        assert book.damaged, (number, offset, bit)
                    else:  # its newline: the next line goes with it
                        both = [*whole[:number], *whole[number + 2 :]]
                        assert facts_of(book) == facts_of(slow(both))
                        assert book.damaged or number == last  # torn, not damaged
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
    assert writer.book.lost == noise.count(b"\n")
    assert len(writer.book.damaged) == min(writer.book.lost, book_room.TOLD)
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


def test_a_damaged_first_line_is_told_to_whoever_adds_it() -> None:
    book = Book()
    book.feed(HEAD.replace(b"1", b"2", 1), 7)
    assert book.damaged == ["byte 7: the first line, which names the format, is damaged"]


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
    assert facts_of(read(path, checkpoint)) == plain


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


def prepared(tmp_path: Path, events: list[Event] = TEN) -> tuple[Path, Path]:
    """A ledger with a checkpoint in its middle."""
    path, checkpoint = tmp_path / "tasks.md", tmp_path / "checkpoint.json"
    writer = Ledger(path, checkpoint)
    writer.append(events[:8])
    writer.checkpoint()
    assert writer.unmarked == 0
    writer.append(events[8:])
    assert writer.unmarked == sum(len(render(e)) for e in events[8:])
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


@pytest.mark.parametrize("events", [TEN, EVERY], ids=["ten", "every"])
def test_checkpoint_and_tail_are_a_full_replay(tmp_path: Path, events: list[Event]) -> None:
    path, checkpoint = prepared(tmp_path, events)
    assert facts_of(read(path, checkpoint)) == facts_of(slow(lines(events)))
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
    "with a list that is none": lambda _, c: change(c, recent=7),
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
