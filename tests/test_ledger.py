"""The ledger is never wrong, and at worst short by what was not acknowledged."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from codexd import book as book_room
from codexd.ledger import Book, Follower, Ledger, LedgerBroken, LedgerFull, render
from codexd.model import Event, IllegalEvent, Kind, Note, apply
from tests.history import AT, TEN, closed, facts_of, ident, lines, move, queued, read, slow

ROOT = Path(__file__).resolve().parent.parent


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
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(LedgerBroken, match="half-written"):
        one.append([queued(1)])
    assert not one.book.tasks
    one.close()


def test_a_failed_sync_ends_it(path: Path) -> None:
    one = Ledger(path, path.parent / "checkpoint.json")
    path.unlink()
    os.mkfifo(path)  # takes every byte, and cannot be synced
    fifo = os.open(path, os.O_RDWR)
    os.dup2(fifo, one._fd)
    with pytest.raises(LedgerBroken, match="fsync"):
        one.append([queued(1)])
    assert not one.book.tasks, "nothing is acknowledged"
    one.close()
    os.close(fifo)


@pytest.mark.parametrize("how", ["another", "none"])
def test_a_ledger_that_is_no_longer_in_its_place_ends_it(path: Path, how: str) -> None:
    one = Ledger(path, path.parent / "checkpoint.json")
    one.append([queued(1)])
    path.rename(path.with_name("old"))
    before = path.with_name("old").read_bytes()
    if how == "another":  # as `sed -i` leaves it
        path.write_bytes(before)
    with pytest.raises(LedgerBroken, match="its place"):
        one.append([queued(2)])
    assert list(one.book.tasks) == [ident(1)], "nothing is acknowledged"
    assert path.with_name("old").read_bytes() == before
    one.close()


def test_of_a_damaged_ledger_there_is_no_checkpoint(
    open_ledger: Callable[[], Ledger], path: Path
) -> None:
    """So a line that is repaired where it stands counts again, and damage is told each time."""
    open_ledger().append([queued(1), queued(2)])
    inode, sound = path.stat().st_ino, path.read_bytes()
    path.write_bytes(sound.replace(b"1.md", b"7.md"))
    for _ in range(2):
        one = open_ledger()
        assert one.book.lost == 1
        assert list(one.book.tasks) == [ident(2)]
        one.checkpoint()
    path.write_bytes(sound)
    assert path.stat().st_ino == inode
    one = open_ledger()
    assert (one.book.lost, list(one.book.tasks)) == (0, [ident(1), ident(2)])
    one.checkpoint()
    assert one.checkpoint_path.exists()


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
