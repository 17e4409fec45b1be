"""A ledger begun anew says what the old one said, wherever a crash comes between."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codexd import audit, clock, config, rotate, spool
from codexd.delivery import Occasion
from codexd.directories import Directories
from codexd.ledger import Book, Follower, Ledger, render
from codexd.master import Master
from codexd.model import TRANSITIONS, Event, Kind, Note, State, Task
from codexd.outcome import Outcome
from codexd.service import Service
from tests.history import AT, HEAD, closed, facts_of, ident, lines, move, queued, read, slow

ROOT = Path(__file__).resolve().parent.parent
LATER = "2026-11-23T08:00:00.000Z"


def all_of(book: Book) -> dict[str, Any]:
    """`facts_of`, as a line can say it: without None."""
    told = facts_of(book)
    told["verdicts"] = [render(event) for event in book.verdicts.values()]
    told["gate"] = {
        reason: {k: v for k, v in facts.items() if v is not None}
        for reason, facts in book.gate.items()
    }
    told["owed"] = [
        (one.key, one.at, one.tries, one.until, {k: v for k, v in one.facts.items() if v})
        for one in book.owed.values()
    ]
    return told


# --- any history, rotated anywhere ----------------------------------------------------

TEXT = st.text(max_size=12)
FACTS: dict[str, st.SearchStrategy[Any]] = {
    "session": TEXT,
    "priority": st.integers(0, 9),
    "title": TEXT,
    "key": TEXT,
    "retry_of": st.just(ident(1)),
    "workdir": TEXT,
    "profile": TEXT,
    "outcome": st.sampled_from(list(Outcome)).map(str),
    "message": TEXT,
    "until": st.just(LATER),
    "reason": TEXT,
    "launches": st.integers(0, 9),
    "attempts": st.integers(0, 9),
    "interruptions": st.integers(0, 9),
    "refusals": st.integers(0, 9),
    "limit": st.integers(1, 20),
    "cancel": st.booleans(),
    "after": st.lists(st.integers(1, 9).map(ident), max_size=3),
    "not_before": st.just(LATER),
    "delay": st.floats(0, 1e9),
    "thread": TEXT,
    "usage": st.dictionaries(st.sampled_from(["input_tokens", "x"]), st.integers(0, 10**12)),
    "cost": st.dictionaries(st.just("cpu_seconds"), st.floats(0, 1e6)),
    "fresh": st.booleans(),
    "freed": st.booleans(),
}


def some(draw: st.DrawFn, *names: str) -> dict[str, Any]:
    chosen = draw(st.sets(st.sampled_from(names), max_size=5))
    return {name: draw(st.none() | FACTS[name]) for name in sorted(chosen)}


def about_a_task(draw: st.DrawFn, book: Book, n: int) -> Event:
    if not book.tasks or draw(st.integers(0, 3)) == 0:
        return queued(n, **some(draw, *FACTS))
    task = draw(st.sampled_from(sorted(book.tasks.values(), key=lambda t: t.id)))
    kind = draw(st.sampled_from([k for s, k in TRANSITIONS if s == task.state]))
    return Event(AT, kind, task.id, some(draw, *FACTS))


def about_the_daemon(draw: st.DrawFn, book: Book, n: int) -> Event:
    if book.owed and draw(st.sampled_from([True, False])):
        key = draw(st.sampled_from(sorted(book.owed)))
        kind = draw(st.sampled_from([Note.TOLD, Note.DEFERRED, Note.UNTOLD]))
        facts = {
            "event": key,
            "tries": draw(st.integers(1, 9)),
            "until": draw(st.none() | FACTS["until"]),
        }
        return Event(AT, kind, facts=facts)
    kind = draw(
        st.sampled_from(
            [Note.CLOSED, Note.OPENED, Note.REJECTED, Note.REPEATED, Note.STARTED, Note.OWED]
        )
    )
    if kind in (Note.CLOSED, Note.OPENED):
        facts = {"reason": draw(st.sampled_from(["hold", "quota"])), "until": None}
        return Event(AT, kind, facts={**facts, "message": draw(TEXT)})
    if kind is Note.OWED:
        occasion = draw(st.sampled_from(Occasion))
        return Event(AT, kind, facts={"event": f"{ident(n)}.{occasion}", "reason": draw(TEXT)})
    return Event(AT, kind, facts={"id": ident(n), "file": draw(TEXT), "reason": draw(TEXT)})


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_rotated_anywhere_it_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The writer, a reader from before, a new reader, and a restart agree with no rotation."""
    place = tmp_path_factory.mktemp("any")
    path, checkpoint = place / "tasks.md", place / "checkpoint.json"
    ledger, follower = Ledger(path, checkpoint), Follower(path, checkpoint)
    plain, history = Book(), []
    for n in range(1, data.draw(st.integers(1, 20))):
        step = data.draw(st.sampled_from(["task", "task", "daemon", "rotate", "restart", "mark"]))
        if step in ("task", "daemon"):
            make = about_a_task if step == "task" else about_the_daemon
            event = make(data.draw, ledger.book, n)  # type: ignore[arg-type]
            ledger.append([event])
            plain.act(event)
            history.append(event)
        elif step == "rotate":
            ledger.rotate(AT)
        elif step == "mark":
            ledger.checkpoint()
        else:
            ledger.close()
            ledger = Ledger(path, checkpoint)
        wanted = all_of(plain)
        assert all_of(ledger.book) == wanted
        assert all_of(read(path))["tasks"] == wanted["tasks"]
        follower.refresh()
        for book in (follower.book, read(path, checkpoint)):
            assert all_of(book) == wanted
            assert not book.damaged
    ledger.close()
    follower.close()
    told: list[Event] = list(audit.events(audit.files(Directories.below(place)), pytest.fail))
    assert [render(e) for e in told if e.kind is not Note.ROTATED] == list(map(render, history))
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_every_fact_of_a_task_is_tried() -> None:
    own = {"id", "state", "created", "file", "started", "ended"}
    assert set(FACTS) >= set(Task.__slots__) - own


@pytest.mark.parametrize("state", [s for s in State if not s.ended])
def test_a_task_needs_a_line_and_one_for_its_state(tmp_path: Path, state: State) -> None:
    one = Ledger(tmp_path / "tasks.md", tmp_path / "c.json")
    one.append([queued(1, session="s"), move(1, Kind.RUNNING, launches=1, thread="T")])
    if state is State.WAITING:
        one.append([move(1, Kind.WAITING, reason="rate", until=LATER, message="m")])
    elif state is State.QUEUED:
        one.append([move(1, Kind.QUEUED, reason="quota", message="m")])
    else:
        one.append([move(1, Kind.STOPPING, cancel=True)])
    before = one.book.tasks[ident(1)]
    one.rotate(LATER)
    one.close()
    assert read(one.path).tasks[ident(1)] == before
    of_it = [line for line in one.path.read_text().splitlines() if ident(1) in line]
    assert len(of_it) == (1 if state is State.QUEUED else 2)
    assert before.state is state


def test_a_hook_that_is_tried_again_needs_a_line_more(tmp_path: Path) -> None:
    """Else its tries would begin anew, and it would be told before its time."""
    one, key = Ledger(tmp_path / "tasks.md", tmp_path / "c.json"), f"{ident(1)}.{Occasion.DONE}"
    one.append([Event(AT, Note.OWED, facts={"event": key})])
    one.append([Event(AT, Note.DEFERRED, facts={"event": key, "tries": 3, "until": LATER})])
    before = all_of(one.book)["owed"]
    one.rotate(LATER)
    one.close()
    assert all_of(read(one.path))["owed"] == before == [(key, AT, 3, LATER, {})]


# --- names and places -----------------------------------------------------------------


def test_what_the_new_file_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "tasks.md"
    one = Ledger(path, tmp_path / "c.json")
    one.append([queued(1, title="One"), queued(2), move(2, Kind.CANCELLED), closed("hold")])
    path.chmod(0o644)
    before = path.read_bytes()
    one.rotate(LATER)
    one.append([queued(3)])
    one.close()
    head, rotated, first, gate, after = path.read_text().splitlines()
    assert head == HEAD.decode().strip()
    facts = f'from="tasks-20261123T080000Z.md" carried=2 ended=["{ident(2)}"]'
    assert rotated.startswith(f"* {LATER} **rotated** `{facts}`  <!-- ")
    assert first.startswith(f'- {AT} `{ident(1)}` **queued** `file="1.md" title="One"`  <!-- ')
    assert gate.startswith(f'* {AT} **closed** `reason="hold" message="m"`  <!-- ')
    assert ident(3) in after
    assert (tmp_path / "archive" / "tasks-20261123T080000Z.md").read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o644, "whoever was let read it still may"
    assert {p.name for p in tmp_path.iterdir()} == {"tasks.md", "archive"}


def test_names_follow_each_other_whatever_the_clock_says(tmp_path: Path) -> None:
    one = Ledger(tmp_path / "tasks.md", tmp_path / "c.json")
    for _ in range(2):
        one.rotate("1970-01-01T00:00:00.000Z")
    times = [LATER, LATER, AT, "1970-01-01T00:00:00.000Z", "2030-12-31T23:59:59.999Z", LATER]
    for at in times:
        one.rotate(at)
    one.close()
    for name in ("tasks-20301399T000000Z.md", "tasks-x.md", "tasks-20261123T080000Z.md~"):
        (tmp_path / "archive" / name).touch()
    assert [path.name for path in rotate.kept(one.path)] == [
        "tasks-19700101T000000Z.md",
        "tasks-19700101T000001Z.md",
        "tasks-20261123T080000Z.md",
        "tasks-20261123T080001Z.md",
        "tasks-20261123T080002Z.md",
        "tasks-20261123T080003Z.md",
        "tasks-20301231T235959Z.md",
        "tasks-20310101T000000Z.md",
    ]


def test_old_files_lie_where_the_archive_is() -> None:
    for dirs in (Directories.system(), Directories.user({"HOME": "/h"})):
        assert dirs.ledger.parent / rotate.ARCHIVE == dirs.archive


def test_a_checkpoint_of_the_old_file_is_not_used(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "tasks.md", tmp_path / "c.json"
    one = Ledger(path, checkpoint)
    one.append([queued(n) for n in range(20)])
    one.checkpoint()
    one.rotate(LATER)
    one.append([queued(30)])
    assert one.unmarked == path.stat().st_size
    one.close()
    assert facts_of(read(path, checkpoint)) == facts_of(read(path)) == facts_of(one.book)
    again = Ledger(path, checkpoint)
    again.checkpoint()
    again.close()
    assert facts_of(read(path, checkpoint)) == facts_of(one.book)


def test_a_long_ledger_is_begun_anew_and_a_short_one_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "tasks.md"
    one = Ledger(path, tmp_path / "c.json")
    line = render(queued(1, title="x" * 4000))
    one.shorten(AT)
    assert not rotate.kept(path)
    assert (tmp_path / "c.json").exists()
    one.close()
    with open(path, "ab") as file:
        for n in range(rotate.LONG // len(line) + 1):
            if n % 1000 == 0:
                file.write(render(queued(n, title="x" * 4000)))
            else:
                both = [queued(n, title="x" * 4000), move(n, Kind.CANCELLED)]
                file.writelines(map(render, both))
    one = Ledger(path, tmp_path / "c.json")
    before = facts_of(one.book)
    (tmp_path / "archive").touch()  # in the way
    with pytest.raises(FileExistsError):
        one.shorten(LATER)
    assert one.unmarked == 0, "the next start is short all the same"
    assert facts_of(one.book) == before
    (tmp_path / "archive").unlink()
    one.shorten(LATER)
    assert path.stat().st_size < 100_000
    assert one.laid_aside == rotate.kept(path)
    assert facts_of(one.book) == before == facts_of(read(path))
    one.shorten(LATER)
    assert len(rotate.kept(path)) == 1
    one.close()


def test_a_new_file_that_does_not_say_the_same_is_not_used(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "tasks.md", tmp_path / "c.json"
    one = Ledger(path, checkpoint)
    one.append([queued(1)])
    # No line can say this of a task: what the book has, and the ledger would lose.
    one.book.tasks[ident(1)] = dataclasses.replace(one.book.tasks[ident(1)], file=None)
    before = path.read_bytes()
    with pytest.raises(OSError, match="would not say what the old one says"):
        one.rotate(LATER)
    assert path.read_bytes() == before
    assert not rotate.kept(path)
    assert {p.name for p in tmp_path.iterdir()} == {"tasks.md", "archive"}
    one.append([queued(2)])
    one.close()
    assert path.read_bytes() == before + render(queued(2))


def test_damage_stays_in_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "tasks.md"
    made = lines([queued(1), queued(2), move(2, Kind.RUNNING)])
    path.write_bytes(b"".join([*made[:2], b"- what is this\n", *made[2:]]))
    one = Ledger(path, tmp_path / "c.json")
    assert one.book.damaged
    one.rotate(LATER)
    assert not one.book.damaged
    one.close()
    assert not read(path).damaged
    assert facts_of(read(path)) == facts_of(slow(made))
    assert read(rotate.kept(path)[0]).damaged


# --- crashes and errors at every step ---------------------------------------------------

ROTATION = """
import os, sys
from pathlib import Path
from codexd import clock
from codexd.ledger import Ledger, LedgerBroken
from tests.history import AT, TEN
clock.epoch(AT)  # it imports; that is no step of a rotation
place = Path(sys.argv[1])
one = Ledger(place / "tasks.md", place / "c.json")
one.append(TEN)
os.mkdir(place / "begin")
try:
    one.rotate("2026-11-23T08:00:00.000Z")
except LedgerBroken:
    sys.exit(5)
except OSError:
    one.append([])
    os.mkdir(place / "refused")
os.mkdir(place / "end")
"""
CALLS = "openat,write,fsync,mkdir,linkat,link,rename,unlink,fchmod,pread64,close,getdents64"
strace = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace(1)")


def rotating(place: Path, *inject: str) -> tuple[int, list[str]]:
    """Run a rotation under strace; its status, and the names of its calls from the begin on."""
    place.mkdir()
    log = place.parent / f"{place.name}.log"
    options = ["-qq", "-o", str(log), "-e", f"trace={CALLS}", "-e", "signal=none", *inject]
    # Without `site`, what is installed beside does not change which call is which.
    command = ["strace", *options, sys.executable, "-B", "-S", "-c", ROTATION, str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    calls = [line for line in log.read_text().splitlines() if "(" in line]
    return done.returncode, calls


def begun(calls: list[str]) -> int:
    return next(n for n, call in enumerate(calls) if call.startswith("mkdir(") and "/begin" in call)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """The system calls of a rotation, each with its number among those of its name."""
    place = tmp_path_factory.mktemp("steps")
    rotating(place / "warm")
    status, calls = rotating(place / "whole")
    assert status == 0
    names = [call.partition("(")[0] for call in calls]
    end = next(n for n, call in enumerate(calls) if "/end" in call)
    return [(names[n], names[: n + 1].count(names[n])) for n in range(begun(calls) + 1, end)]


def as_it_must_be(place: Path) -> None:
    """After whatever happened, the next start finds everything, and nothing twice."""
    (place / "begin").rmdir()
    for name in ("refused", "end"):
        if (place / name).exists():
            (place / name).rmdir()
    from tests.history import TEN

    one = Ledger(place / "tasks.md", place / "c.json")
    assert facts_of(one.book) == facts_of(slow(lines(TEN)))
    one.append([queued(50)])
    one.close()
    assert not read(place / "tasks.md").damaged
    found = audit.events(audit.files(Directories.below(place)), pytest.fail)
    told = [render(event) for event in found if event.kind is not Note.ROTATED]
    assert told == list(map(render, [*TEN, queued(50)]))


@strace
def test_killed_at_every_step(tmp_path: Path, steps: list[tuple[str, int]]) -> None:
    assert {"write", "fsync", "rename", "openat"} <= {name for name, _ in steps}
    assert {"link", "linkat"} & {name for name, _ in steps}
    for number, (name, when) in enumerate(steps):
        place = tmp_path / f"{number}-{name}"
        inject = f"inject={name}:signal=KILL:when={when}"
        status, _ = rotating(place, "-e", inject)
        assert status in (-signal.SIGKILL, 128 + signal.SIGKILL), inject
        assert (place / "begin").exists(), inject
        assert not (place / "end").exists(), inject
        as_it_must_be(place)


@strace
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_refused_at_every_step(tmp_path: Path, steps: list[tuple[str, int]], error: str) -> None:
    outcomes = set()
    for number, (name, when) in enumerate(steps):
        if name in ("close", "unlink"):
            continue
        place = tmp_path / f"{number}-{name}"
        inject = f"inject={name}:error={error}:when={when}"
        status, _ = rotating(place, "-e", inject)
        outcomes.add(status)
        assert status == 5 or (place / "refused").exists(), (inject, status)
        if status == 0:
            left = [p for p in place.rglob("*") if p.name.endswith(".tmp")]
            assert not left
            assert not rotate.kept(place / "tasks.md")
        as_it_must_be(place)
    assert outcomes == {0, 5}, "also after the exchange, when nothing can be promised"


# --- beside readers -------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from codexd.ledger import Ledger
from codexd.model import Event, Kind, Note
path, at = Path(sys.argv[1]), sys.argv[2]
one = Ledger(path, path.with_name("checkpoint.json"))
for n in range(300):
    id = f"20261123t072011-{n:010}"
    one.append([
        Event(at, Kind.QUEUED, id, {"file": f"{n}.md", "title": "x" * (n * 37 % 3000)}),
        Event(at, Note.CLOSED, facts={"reason": f"r{n}"}),
    ])
    if n % 3:
        one.append([Event(at, Kind.CANCELLED, id, {"outcome": "cancelled"})])
    if n % 11 == 0:
        one.rotate(at)
    if n % 20 == 0:
        one.checkpoint()
one.close()
"""


def test_a_reader_beside_a_writer_that_rotates_sees_every_event_once(tmp_path: Path) -> None:
    path = tmp_path / "tasks.md"
    followers = [Follower(path), Follower(path, tmp_path / "checkpoint.json")]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path, AT], cwd=ROOT)
    seen = [0, 0]
    files: set[int] = set()
    running = True
    while running:
        running = writer.poll() is None
        for which, follower in enumerate(followers):
            follower.refresh()
            gate = list(follower.book.gate)
            assert gate == [f"r{n}" for n in range(len(gate))], "in order, none left out"
            assert len(gate) >= seen[which], "nothing is forgotten"
            seen[which] = len(gate)
            assert not follower.book.damaged
            if follower._fd >= 0:
                files.add(os.fstat(follower._fd).st_ino)
    assert writer.returncode == 0
    assert len(files) > 5, "rotations were seen"
    for follower in followers:
        assert list(follower.book.gate) == [f"r{n}" for n in range(300)]
        assert [int(id[-10:]) for id in follower.book.tasks] == list(range(0, 300, 3))
        assert list(follower.book.recent)[-1] == ident(299)
        follower.close()
    told = list(audit.events(audit.files(Directories.below(tmp_path)), pytest.fail))
    assert [e.facts["reason"] for e in told if e.kind is Note.CLOSED] == [
        f"r{n}" for n in range(300)
    ]


def test_a_checkpoint_that_cannot_be_written_holds_up_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = config.load(Directories.below(tmp_path), explicit=False)
    spool.prepare(settings.dirs)
    master = Master(settings, Service("test"), lambda: settings, embedded=True)
    titled = {**queued(1).facts, "title": "x" * 9000}
    master.ledger.append([Event(AT, Kind.QUEUED, ident(n), titled) for n in range(500)])
    settings.dirs.checkpoint.mkdir()
    now = clock.steady()
    master.tend(now)
    settings.dirs.checkpoint.rmdir()
    master.tend(now + 9)
    assert not settings.dirs.checkpoint.exists(), "it is not tried in each round"
    master.tend(now + 11)
    assert settings.dirs.checkpoint.is_file()
    assert capfd.readouterr().err.count("host.refuses") == 1
    master.ledger.close()
