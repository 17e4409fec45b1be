"""What is old goes, what is needed stays: every kind, every name, and Codex's own threads."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from codexd import clock, config, lock, place, session, spool, sweep, transcript, weight
from codexd.config import Config, Directories
from codexd.gate import Keeper
from codexd.ledger import Ledger
from codexd.master import Master
from codexd.model import Event, Kind, State, Task
from codexd.retention import Retention, forgotten
from codexd.service import Service
from codexd.spend import Spend
from codexd.sweep import Daily, Sweep
from codexd.weight import Weight
from tests.box import PYTHON, Box
from tests.box.host import require
from tests.daemon import Daemon, until
from tests.installed import SPOOL, STATE, Installed
from tests.proof.simulated import Shifted
from tests.scripted_cases import CaseModel

pytestmark = pytest.mark.xdist_group("retention")

DAY = 86400.0
NOW = time.time()
ID = "20260101t000000-aaaaaaaaa{}"
THREAD = "019e0000-0000-7000-8000-00000000000{}"  # of May 2026
THREAD_DAY = "2026/05/06"
IDLE = "http: {listen: off}\ncodex: {bin: /nonexistent/codex}\n"  # starts nothing


def aged(path: Path, days: float, text: str = "x") -> Path:
    """A file that was last written so long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(text)
    os.utime(path, (NOW - days * DAY, NOW - days * DAY), follow_symlinks=False)
    return path


class Place:
    """A state directory made by hand."""

    def __init__(self, root: Path, text: str = "") -> None:
        (root / "codexd.yaml").write_text(text)
        self.config: Config = config.load(Directories.below(root), explicit=False)
        self.dirs = self.config.dirs
        self.live: dict[str, Task] = {}
        spool.prepare(self.dirs)

    def task(self, id: str, days: float, thread: str | None = None) -> Path:
        """An ended task in the archive."""
        home = place.archived(self.dirs, id)
        (home / "1").mkdir(parents=True)
        (home / "1" / "result.json").write_text(json.dumps({"thread": thread}))
        aged(home / "status.json", days, "{}")
        return home

    def session(self, name: str, days: float, thread: str | None = None) -> Path:
        session.save(self.dirs.sessions, session.Session(name, thread, clock.now()))
        stem = session.stem(name)
        aged(self.dirs.transcripts / f"{stem}.jsonl", days, "{}\n")
        return aged(self.dirs.sessions / f"{stem}.json", days)

    def rollout(self, thread: str, days: float, day: str = THREAD_DAY) -> Path:
        name = f"rollout-2026-05-06T00-00-00-{thread}.jsonl"
        return aged(self.dirs.codex_home / "sessions" / day / name, days)

    def found(self) -> dict[str, set[str]]:
        """What may go, by kind."""
        looked = Retention(self.config, lambda: self.live, NOW)
        found: dict[str, set[str]] = {}
        for old in looked.found():
            for one in [old, *(r for _, r in looked.threads(old))] if old else []:
                found.setdefault(one.kind, set()).update(path.name for path in one.paths)
        assert not looked.problems
        return found

    def swept(self, binary: str = "") -> Sweep:
        done = Sweep(self.config, lambda: self.live, binary, {}, NOW)
        for _ in done.removed():
            pass
        return done


@pytest.fixture
def state(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- what may go ------------------------------------------------------------------


def test_what_is_old_may_go_and_what_is_young_stays(state: Place) -> None:
    dirs = state.dirs
    for days, n in ((89, 1), (91, 2)):
        id = ID.format(n)
        state.task(id, days)
        state.session(f"s{n}", days)
        aged(dirs.answers / f"a b.{id}.md".replace(" ", "_"), days)
        aged(dirs.answers / f"{id}.md", days)
        aged(dirs.rejected / f"bad{n}.md", days + 1000)
        aged(dirs.rejected / f"bad{n}.md.reason", days)
        aged(dirs.usage / f"2026-01-0{n}.json", days)
        place.remember_key(dirs, f"k{n}", place.Keyed(id, "0"))
        aged(next(p for p in dirs.keys.iterdir() if f'"k{n}"' in p.read_text()), days)
    found = state.found()
    assert found.pop("keys")
    assert found == {
        "archive": {ID.format(2)},
        "sessions": {"s2.json", "s2.jsonl"},
        "answers": {f"a_b.{ID.format(2)}.md", f"{ID.format(2)}.md"},
        "rejected": {"bad2.md", "bad2.md.reason"},
        "usage": {"2026-01-02.json"},
    }


def test_each_has_its_own_time(tmp_path: Path) -> None:
    state = Place(tmp_path, "retention: {answers: 1d, archive: never, rejected: 40d, size: any}\n")
    state.task(ID.format(1), 9999)
    state.session("s", 9999)
    aged(state.dirs.usage / "2026-01-01.json", 9999)
    aged(state.dirs.answers / f"{ID.format(1)}.md", 2)
    aged(state.dirs.rejected / "a.reason", 39)
    aged(state.dirs.rejected / "b.reason", 41)
    assert state.found() == {"answers": {f"{ID.format(1)}.md"}, "rejected": {"b.reason"}}


MIB = 1 << 20


def test_of_too_much_the_oldest_goes(tmp_path: Path) -> None:
    """Each room by itself; of a task its attempts alone, so that nothing is run again."""
    state = Place(tmp_path, "retention: {size: 2M}\n")
    dirs = state.dirs
    for n in range(4):
        id, days = ID.format(n), 8 - 2 * n
        home = state.task(id, days, THREAD.format(n))
        (home / "1" / "events.jsonl").write_text("x" * (MIB - 1000))
        aged(dirs.answers / f"{id}.md", days, "x" * MIB)
        aged(dirs.rejected / f"bad{n}.md", 99, "x" * (MIB - 1))
        aged(dirs.rejected / f"bad{n}.md.reason", days)
        said = state.session(f"s{n}", days, THREAD.format(n))
        assert said.exists()
        state.rollout(THREAD.format(n), days).write_text("x" * (MIB - 3))
        aged(state.rollout(THREAD.format(n), days), days)
    state.rollout(THREAD.format(9), 99).write_text("x" * 3 * MIB)  # somebody else's
    shutil.rmtree(state.task(ID.format(8), 9) / "1")  # it has lost them already
    place.remember_key(dirs, "k", place.Keyed(ID.format(0), "0"))
    assert state.found() == {
        "attempts": {"1"},
        "answers": {f"{ID.format(n)}.md" for n in (0, 1)},
        "rejected": {f"bad{n}.md{end}" for n in (0, 1) for end in ("", ".reason")},
        "sessions": {f"s{n}.json{end}" for n in (0, 1) for end in ("", "l")},
        "threads": {state.rollout(THREAD.format(n), 8 - 2 * n).name for n in (0, 1)},
    }
    assert state.swept().counts["attempts"] == 2
    for n in range(4):
        home = place.archived(dirs, ID.format(n))
        assert place.known(dirs, ID.format(n))
        assert (home / "1").exists() == (n > 1)
    assert place.keyed(dirs, "k")
    assert state.found() == {}


def test_holes_take_no_room(tmp_path: Path) -> None:
    """Nobody's file is to go because another dropped one of a terabyte of nothing."""
    state = Place(tmp_path, "retention: {size: 1M}\n")
    for name, days in (("old", 5), ("sparse", 2)):
        os.truncate(aged(state.dirs.rejected / f"{name}.md", days), 1 << 40 if days == 2 else 1)
        aged(state.dirs.rejected / f"{name}.md.reason", days)
    home = state.task(ID.format(1), 5) / "1" / "events.jsonl"
    os.truncate(aged(home, 5), 1 << 40)
    assert state.found() == {}


def test_a_size_takes_neither_what_is_in_use_nor_what_is_new(tmp_path: Path) -> None:
    state = Place(tmp_path, "retention: {size: 1M}\n")
    live = Task(ID.format(1), State.RUNNING, session="web", thread=THREAD.format(1))
    state.live = {live.id: live}
    state.session("web", 5, THREAD.format(1))
    state.rollout(THREAD.format(1), 5).write_text("x" * 5 * MIB)
    aged(state.rollout(THREAD.format(1), 5), 5)
    for n in (2, 3):
        aged(state.dirs.answers / f"{ID.format(n)}.md", 0.01, "x" * MIB)  # of this hour
    (state.task(live.id, 5) / "1" / "events.jsonl").write_text("x" * 5 * MIB)
    assert state.found() == {}
    state.live = {}
    assert set(state.found()) == {"sessions", "threads", "attempts"}


def test_what_goes_while_it_is_weighed_weighs_nothing(state: Place) -> None:
    for number in (1, 2):
        aged(state.dirs.answers / f"{ID.format(number)}.md", 9)
    looked = weight.of_answers(state.dirs)
    assert next(looked) == (NOW - 9 * DAY, 1)
    for path in state.dirs.answers.iterdir():
        path.unlink()
    assert list(looked) == [None]
    (state.task(ID.format(1), 9) / "status.json").unlink()  # being removed, or damaged
    assert list(weight.of_attempts(state.dirs)) == [None]


def test_weight_finds_where_to_begin() -> None:
    found = Weight()
    for n in range(10):
        found.add(NOW - 10 * DAY + n * DAY, 100)
    assert found.before(1000, NOW) == -math.inf
    assert 0 <= found.before(999, NOW) - (NOW - 10 * DAY) <= 60
    assert 0 <= found.before(450, NOW) - (NOW - 5 * DAY) <= 60
    assert found.before(0, NOW) <= NOW - 3600


@pytest.mark.parametrize("text", ["", "retention: {archive: never, size: 1M}\n"])
def test_what_a_live_task_follows_stays(tmp_path: Path, text: str) -> None:
    """It asks what that came to once all of them have ended."""
    state, child = Place(tmp_path, text), ID.format(9)
    for number in (1, 2):
        home = state.task(ID.format(number), 99)
        (home / "1" / "events.jsonl").write_bytes(b"x" * (1 << 20))
        aged(home / "1" / "events.jsonl", 99)
    state.live[child] = Task(child, State.WAITING, after=(ID.format(1),))
    kind, name = ("attempts", "1") if text else ("archive", ID.format(2))
    assert state.found()[kind] == {name}
    state.swept()
    assert (place.archived(state.dirs, ID.format(1)) / "1").exists()
    assert not (place.archived(state.dirs, ID.format(2)) / "1").exists()


def test_nothing_of_a_live_task_goes(state: Place) -> None:
    """Its clock may have been wrong when it was written."""
    live = Task(ID.format(1), State.RUNNING, session="web", thread=THREAD.format(1))
    state.live = {live.id: live}
    state.task(live.id, 999, THREAD.format(1))
    state.session("web", 999, THREAD.format(1))
    aged(state.dirs.answers / f"x.{live.id}.md", 999)
    state.task(ID.format(2), 999, THREAD.format(1))
    state.rollout(THREAD.format(1), 999)
    place.remember_key(state.dirs, "k", place.Keyed(live.id, "0"))
    aged(next(state.dirs.keys.iterdir()), 999)
    assert state.found() == {"archive": {ID.format(2)}}
    state.live = {}
    assert set(state.found()) == {"archive", "sessions", "answers", "threads", "keys"}


FOREIGN = [
    "answers/notes.md", "answers/.x.1.tmp", f"answers/{ID.format(1)}.txt",
    f"answers/a b.{ID.format(1)}.md", f"answers/{ID.format(1)}.md.bak",
    "archive/2026-01/readme/status.json", f"archive/old/{ID.format(1)}/status.json",
    f"archive/2026-01/{ID.format(1)}x/status.json", f"archive/2026-01/{ID.format(2)}.md",
    "sessions/readme.txt", "sessions/a b.json", "transcripts/a.txt",
    "keys/readme", f"keys/{'g' * 64}", "usage/2026.json", "usage/readme", "rejected/mine.md",
    "tasks/readme", "work/a.md", "codex/config.toml", "codex/history.jsonl",
    f"codex/sessions/2026/01/01/rollout-1-{THREAD.format(9)}.jsonl", "tasks.md.old",
]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_codexd_did_not_make_stays(state: Place, name: str) -> None:
    aged(state.dirs.state / name, 9999)
    assert not state.found()
    state.swept()
    assert (state.dirs.state / name).exists()


def test_nothing_goes_through_a_link(state: Place, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    inner = aged(mine / ID.format(1) / "status.json", 999, "{}")
    aged(mine / f"{ID.format(1)}.md", 999)
    dirs = state.dirs
    (dirs.archive / "2026-01").symlink_to(mine)
    (dirs.archive / "2026-02").mkdir()
    (dirs.archive / "2026-02" / ID.format(1)).symlink_to(mine / ID.format(1))
    link = dirs.answers / f"{ID.format(1)}.md"
    link.symlink_to(mine / f"{ID.format(1)}.md")
    aged(link, 999)
    (dirs.sessions / "x.json").symlink_to(inner)
    aged(dirs.rejected / "l.reason", 999)
    (dirs.rejected / "l").symlink_to(inner)
    # A thread that goes, whose rollout lies behind a link.
    state.session("s", 999, THREAD.format(1))
    other = aged(tmp_path / "other" / f"rollout-1-{THREAD.format(1)}.jsonl", 999)
    (dirs.codex_home / "sessions" / "2026" / "05").mkdir(parents=True)
    (dirs.codex_home / "sessions" / "2026" / "05" / "06").symlink_to(tmp_path / "other")
    done = state.swept()
    assert not done.problems
    assert done.counts == {"sessions": 1, "rejected": 1}
    assert not (dirs.rejected / "l").is_symlink()  # the link itself was what was dropped
    assert inner.exists()
    assert other.exists()
    assert link.is_symlink()


def test_a_dropped_directory_stays_with_its_reason(state: Place) -> None:
    aged(state.dirs.rejected / "d" / "x", 999)
    aged(state.dirs.rejected / "d.reason", 999)
    assert not state.found()


def test_a_task_within_a_removed_one_is_no_link_out(state: Place, tmp_path: Path) -> None:
    home = state.task(ID.format(1), 999)
    kept = aged(tmp_path / "kept" / "x", 0)
    (home / "1" / "tmp").symlink_to(kept.parent)
    assert state.swept().counts == {"archive": 1}
    assert not home.exists()
    assert kept.exists()


def test_a_removal_that_was_broken_off_is_finished(state: Place) -> None:
    home = state.task(ID.format(1), 1)
    home.rename(home.with_name(f".gone-{home.name}"))
    assert state.swept().counts == {"archive": 1}
    assert not list(home.parent.iterdir())


def test_what_cannot_be_removed_is_told_and_the_rest_goes(state: Place) -> None:
    for number in (1, 2):
        state.task(ID.format(number), 999)
    (place.archived(state.dirs, ID.format(1)).parent / f".gone-{ID.format(1)}").write_text("")
    done = state.swept()
    assert [os.path.basename(str(p.filename)) for p in done.problems] == [ID.format(1)]
    assert done.counts == {"archive": 1}


def test_the_transcript_of_a_session_in_use_is_laid_aside(state: Place) -> None:
    transcripts = state.dirs.transcripts
    for name, days in (("long", 91), ("short", 89), ("a/b", 91)):
        state.session(name, 1)
        line = {"ts": clock.stamp(NOW - days * DAY), "text": "x" * 200, "thread": THREAD.format(1)}
        text = json.dumps(line) + "\n"
        aged(transcripts / f"{session.stem(name)}.jsonl", 1).write_text(text)
    assert state.swept().counts == {}
    assert {p.name for p in transcripts.iterdir()} == {
        "long+old.jsonl", "short.jsonl", "a%2Fb+old.jsonl",
    }  # fmt: skip
    # What is said next begins a new one, whatever length the session remembers.
    new = transcripts / "long.jsonl"
    transcript.append(new, 12345, [{"ts": clock.now(), "text": "y"}])
    assert len(transcript.last(new, 9)) == 1
    new.write_text(text)  # as old again, while the one before is still there
    assert state.found() == {}
    aged(transcripts / "long+old.jsonl", 91)
    state.rollout(THREAD.format(1), 91)
    assert set(state.found()) == {"sessions", "threads"}
    state.swept()
    assert sorted(p.name for p in transcripts.iterdir())[1:] == ["long.jsonl", "short.jsonl"]


def test_a_transcript_that_cannot_be_laid_aside_is_told(state: Place) -> None:
    state.session("long", 1)
    said = state.dirs.transcripts / "long.jsonl"
    said.write_text(json.dumps({"ts": clock.stamp(NOW - 91 * DAY), "text": "x" * 200}) + "\n")
    aged(state.dirs.answers / f"{ID.format(1)}.md", 999)
    done = Sweep(state.config, lambda: state.live, "", {}, NOW)
    for old in done.removed():
        if old:  # the answer: by then it is known which transcript is too long
            said.with_name("long+old.jsonl").mkdir()
    assert [(p.filename, p.strerror) for p in done.problems] == [(str(said), "Is a directory")]
    assert said.exists()
    assert done.counts == {"answers": 1}


# --- Codex's threads ------------------------------------------------------------------


def test_threads_go_that_a_removed_record_names_and_nobody_needs(state: Place) -> None:
    names = [THREAD.format(n) for n in range(1, 8)]
    of_old, replaced, of_young, of_task, used_since, someones, said = names
    path = state.session("old", 99, of_old)
    known = session.load(state.dirs.sessions, "old")
    session.save(state.dirs.sessions, session.forget(known, clock.now()))
    aged(path, 99)
    said_in = state.dirs.transcripts / "old.jsonl"
    line = {"text": f'"thread": "{someones}"', "thread": said}
    said_in.write_text(json.dumps({"thread": replaced}) + "\n" + json.dumps(line) + "\n")
    aged(said_in, 99)
    state.session("young", 1, of_young)
    for number, thread in enumerate((of_young, of_task, used_since)):
        state.task(ID.format(number), 99, thread)
    for thread in names:
        state.rollout(thread, 1 if thread == used_since else 99)
    gone = {name[-42:-6] for name in state.found()["threads"]}
    assert gone == {of_old, replaced, of_task, said}
    state.swept()
    left = {p.name[-42:-6] for p in state.dirs.codex_home.glob("sessions/*/*/*/*")}
    assert left == {of_young, used_since, someones}


def test_a_damaged_session_goes_and_takes_no_thread_along(state: Place) -> None:
    path = state.session("s", 99, THREAD.format(1))
    path.write_text("{")
    aged(path, 99)
    rollout = state.rollout(THREAD.format(1), 99)
    assert state.swept().counts == {"sessions": 1}
    assert rollout.exists()


def test_where_sessions_cannot_be_read_all_threads_stay(state: Place) -> None:
    state.task(ID.format(1), 99, THREAD.format(1))
    rollout = state.rollout(THREAD.format(1), 99)
    state.dirs.sessions.rmdir()
    state.dirs.sessions.write_text("no directory")
    done = state.swept()
    assert done.counts == {"archive": 1}
    assert {p.strerror for p in done.problems} == {"Not a directory"}
    assert rollout.exists()


def test_a_session_that_is_used_while_a_sweep_goes_on_stays(state: Place) -> None:
    for number in range(60):  # more than one look
        state.session(f"s{number}", 99, THREAD.format(1))
    said = state.dirs.transcripts / "s7.jsonl"
    looked = Retention(state.config, lambda: state.live, NOW)
    found = looked._sessions()  # not the weighing before it, which may pause as well
    assert next(found) is None
    # Of those that were looked at already, wherever a directory begins, and of those to come.
    for path in (state.dirs.sessions / "s7.json", state.dirs.sessions / "s57.json", said):
        os.utime(path)
    live = [Task(ID.format(n), session=f"s{n}8") for n in ("", 5)]
    state.live = {task.id: task for task in live}
    gone = {old.paths[0].name for old in found if old}
    used = {f"s{n}.json" for n in (7, 57, 8, 58)}
    assert gone == {f"s{n}.json" for n in range(60)} - used


def test_a_transcript_that_is_used_while_it_is_looked_through_stays(state: Place) -> None:
    state.session("s", 99).unlink()
    said = state.dirs.transcripts / "s.jsonl"
    looks = []
    for old in Retention(state.config, lambda: state.live, NOW)._transcripts():
        looks.append(old)
        os.utime(said)
    assert looks == [None]


def test_a_daemon_can_pause_among_many_of_any_kind(state: Place) -> None:
    dirs = state.dirs
    for n in range(60):
        id = f"20260101t000000-{n:010}"
        aged(dirs.answers / f"{id}.md", 99)
        aged(dirs.rejected / f"{n}.md.reason", 99)
        aged(dirs.keys / f"{n:064}", 99, json.dumps({"id": id}))
        aged(dirs.transcripts / f"{n}.txt", 99)  # nothing of ours
    looked = Retention(state.config, lambda: state.live, NOW)
    for part, found in (
        (looked._answers, 60), (looked._rejected, 60), (looked._keys, 60), (looked._transcripts, 0),
    ):  # fmt: skip
        told = list(part())
        assert (told.count(None), len(told)) == (1, found + 1)


def test_what_says_too_little_goes_by_its_own_age(state: Place) -> None:
    """A task without its last word, an attempt without a result, a session without a word."""
    for n, days in ((1, 89), (2, 91)):
        home = state.task(ID.format(n), days)
        (home / "status.json").unlink()
        (home / "1" / "result.json").write_text("{")
        aged(home, days)
        session = state.session(f"s{n}", days)
        (state.dirs.transcripts / session.name.replace(".json", ".jsonl")).unlink()
    assert state.found() == {"archive": {ID.format(2)}, "sessions": {"s2.json"}}


def test_a_damaged_key_stays_for_a_person(state: Place) -> None:
    aged(state.dirs.keys / f"{1:064}", 99, "{")
    assert state.found() == {}


def test_the_thread_of_a_live_task_stays_whoever_else_names_it(state: Place) -> None:
    state.task(ID.format(1), 99, THREAD.format(1))
    state.rollout(THREAD.format(1), 99)
    live = Task(ID.format(2), State.WAITING, thread=THREAD.format(1).upper())
    state.live = {live.id: live}
    assert state.found() == {"archive": {ID.format(1)}}


def test_where_rollouts_cannot_be_looked_at_the_rest_goes(state: Place) -> None:
    home = state.task(ID.format(1), 99, THREAD.format(1))
    (state.dirs.codex_home / "sessions").symlink_to("sessions")
    done = state.swept()
    assert (done.counts, home.exists()) == ({"archive": 1}, False)
    assert {p.strerror for p in done.problems} == {"Too many levels of symbolic links"}


@pytest.fixture(scope="module")
def model() -> Iterator[CaseModel]:
    with CaseModel() as served:
        yield served


def threads(home: Path) -> tuple[set[str], set[str]]:
    """Threads by their rollouts, and by what Codex's databases know of them."""
    stored: set[str] = set()
    for name, query in (
        ("state_*.sqlite", "select id from threads"),
        ("thread_history_*.sqlite", "select thread_id from thread_items"),
    ):
        for file in home.glob(name):
            with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as data:
                stored |= {row[0] for row in data.execute(query)}
            data.close()
    return {p.name[-42:-6] for p in home.glob("sessions/*/*/*/*.jsonl")}, stored


def test_codex_itself_removes_its_threads(tmp_path: Path, model: CaseModel) -> None:
    """Two sessions and a person's own thread in one CODEX_HOME; one session is old."""
    with Daemon(tmp_path / "d", model.environment()) as served:
        model.write_config(served.dirs.codex_home)
        for name in ("old", "new"):
            served.drop(f"{name}.md", f"---\nsession: {name}\n---\n[[shell true]] [[say hello]]\n")
            served.answer(name)
        home = served.dirs.codex_home
        env = {**served.env, "CODEX_HOME": str(home)}
        command = [_codex(), "exec", "--skip-git-repo-check", "-C", str(tmp_path), "mine"]
        subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        ids = {t["file"]: t["id"] for t in served.tasks()}
        named = {n: session.load(served.dirs.sessions, n).thread for n in ("old", "new")}
        for path in home.rglob("rollout-*"):
            aged(path, 99)
        for place_ in (served.dirs.sessions / "old.json", served.dirs.transcripts / "old.jsonl"):
            aged(place_, 99)
        aged(place.archived(served.dirs, ids["old.md"]) / "status.json", 99)
        mine = threads(home)[0] - set(named.values())
        assert len(mine) == 1
        done = served.run("gc")
        assert done.returncode == 69
        assert "a daemon serves here" in done.stderr
        listed = served.json("gc", "--dry-run")
        assert {one["kind"] for one in listed} == {"archive", "sessions", "threads"}
        assert served.run("task", "show", ids["old.md"]).returncode == 0
        assert served.stop() == 0
        assert served.json("gc") == listed
        assert served.run("gc").stderr == "nothing is old enough\n"
        rollouts, stored = threads(home)
        assert rollouts == {named["new"], *mine}
        assert named["old"] not in stored
        assert served.run("task", "show", ids["old.md"]).returncode == 66
        # Work goes on, in a new thread, and in the one that was kept.
        served.start()
        for name in ("old", "new"):
            served.drop(f"{name}2.md", f"---\nsession: {name}\n---\n[[say again]]\n")
            front, _ = served.answer(f"{name}2")
            assert (front["state"], front["thread"] == named[name]) == ("done", name == "new")


def _codex() -> str:
    from codex_cli_bin import bundled_codex_path

    return str(bundled_codex_path())


def test_without_the_help_of_codex_the_rollout_alone_goes(state: Place, tmp_path: Path) -> None:
    state.session("s", 99, THREAD.format(1))
    rollout = state.rollout(THREAD.format(1), 99)
    fake = tmp_path / "old-codex"
    fake.write_text(f"#!/bin/sh\necho $* > {tmp_path}/told\nexit 2\n")
    fake.chmod(0o755)
    assert state.swept(str(fake)).counts == {"sessions": 1, "threads": 1}
    assert (tmp_path / "told").read_text() == f"delete --force {THREAD.format(1)}\n"
    assert not rollout.exists()
    state.session("s", 99, THREAD.format(1))
    state.rollout(THREAD.format(1), 99)
    done = state.swept("/nonexistent/codex")
    assert done.counts == {"sessions": 1, "threads": 1}
    assert len(done.problems) == 1


def test_a_codex_that_hangs_over_a_thread_is_ended(
    state: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "DEADLINE", 0.2)  # a number, not what it is about
    state.session("s", 99, THREAD.format(1))
    rollout = state.rollout(THREAD.format(1), 99)
    fake = tmp_path / "hangs"
    fake.write_text("#!/bin/sh\nexec sleep 600\n")
    fake.chmod(0o755)
    assert state.swept(str(fake)).counts == {"sessions": 1, "threads": 1}
    assert not rollout.exists()


def test_what_lies_in_the_place_of_a_rollout_is_told(state: Place, tmp_path: Path) -> None:
    state.session("s", 99, THREAD.format(1))
    rollout = state.rollout(THREAD.format(1), 99)
    fake = tmp_path / "odd"
    fake.write_text(f"#!/bin/sh\nrm {rollout} && mkdir {rollout}\n")
    fake.chmod(0o755)
    done = state.swept(str(fake))
    assert done.counts == {"sessions": 1}
    assert [p.filename for p in done.problems] == [str(rollout)]


# --- ids and keys of what is gone -----------------------------------------------------


def test_an_id_that_may_have_been_used_is_not_taken_again(tmp_path: Path) -> None:
    old, young = "20260101t000000-k3f9qa7x2m", spool.new_id()
    with Daemon(tmp_path / "d", config=IDLE) as served:
        for id in (old, young):
            served.drop(f"{id}.md", "x\n")
        assert "retention.archive" in served.reason(f"{old}.md")
        until(lambda: [t["id"] for t in served.tasks()] == [young], "the young one")
    never = IDLE + "retention: {archive: never}\n"
    with Daemon(tmp_path / "e", config=never) as served:
        served.drop(f"{old}.md", "x\n")
        until(lambda: [t["id"] for t in served.tasks()] == [old], "the old one")


def test_an_id_is_forgotten_by_the_time_in_it() -> None:
    now = clock.epoch("2026-11-23T12:00:00.000Z")
    assert forgotten("20261122t115959-aaaaaaaaaa", DAY, now)
    assert not forgotten("20261122t120000-aaaaaaaaaa", DAY, now)
    assert not forgotten("20991122t120000-aaaaaaaaaa", DAY, now)
    assert not forgotten("00000000t000000-aaaaaaaaaa", float("inf"), now)


def test_a_key_goes_with_its_task(tmp_path: Path) -> None:
    with Daemon(tmp_path / "d", config=IDLE) as served:
        served.drop("a.md", "---\nkey: k\n---\nx\n")
        first = until(served.tasks, "the task")[0]["id"]
        assert served.run("task", "cancel", first).returncode == 0
        until(lambda: served.tasks()[0]["state"] == "cancelled", "the cancel")
        until(lambda: place.known(served.dirs, first), "the archive")
        assert served.stop() == 0
        for path in served.root.rglob("*"):
            if path.is_file():
                aged(path, 99)
        kinds = {one["kind"] for one in served.json("gc")}
        assert kinds == {"keys", "archive", "answers"}
        served.start()
        served.drop("b.md", "---\nkey: k\n---\nother content\n")
        again = until(served.tasks, "the task")[0]
        assert (again["key"], again["id"] == first) == ("k", False)


# --- the daemon's own sweeps ----------------------------------------------------------


class Log:
    def __init__(self) -> None:
        self.said: list[tuple[str, Mapping[str, object]]] = []

    def __call__(self, event: str, **fields: object) -> None:
        self.said.append((event, fields))


def daily(state: Place, log: Log, steady: float) -> tuple[Daily, Ledger]:
    ledger = Ledger(state.dirs.ledger, state.dirs.checkpoint)
    keeper = Keeper(state.config, ledger, Spend(state.dirs.usage, log), log, log)
    return Daily(state.config, ledger, keeper, log, log, steady), ledger


def test_the_daemon_sweeps_in_slices(state: Place) -> None:
    live = f"{ID.format(0)[:-1]}z"
    for number in range(1500):
        state.task(f"20260101t000000-{number:010}", 99)
    state.task(live, 99)
    log = Log()
    swept, ledger = daily(state, log, steady=0.0)
    ledger.append([Event(clock.now(), Kind.QUEUED, live, {"file": "x"})])
    rounds, longest = 0, 0.0
    while not log.said:
        began, used = time.monotonic(), time.thread_time()
        swept.tend(began)
        longest, rounds = max(longest, time.thread_time() - used), rounds + 1
        assert swept.pause(began) <= 0.1 or log.said
    assert log.said[0][0] == "retention.removed"
    assert log.said[0][1]["archive"] == 1500
    assert rounds > 10
    assert longest < 0.2  # seconds of a processor; 5 ms, on a host that has nothing else to do
    assert os.listdir(state.dirs.archive / "2026-01") == [live]
    now = time.monotonic()
    assert swept.pause(now) > 86000
    swept.tend(now)
    assert len(log.said) == 1
    ledger.close()


def test_the_daemon_tells_what_it_could_not_remove(state: Place) -> None:
    home = state.task(ID.format(1), 99)
    (home.parent / f".gone-{home.name}").write_text("in the way")
    log = Log()
    swept, ledger = daily(state, log, steady=0.0)
    until(lambda: swept.tend(time.monotonic()) or log.said, "its report")
    why = f"{home}: Not a directory"
    assert log.said == [("retention.refused", {"count": 1, "why": why})]
    ledger.close()


def test_the_master_tends_it(state: Place) -> None:
    home = state.task(ID.format(1), 99)
    master = Master(state.config, Service("test"), lambda: state.config, embedded=True)
    note, warn = master.note, master.warn
    master.daily = Daily(state.config, master.ledger, master.keeper, note, warn, steady=0.0)
    master.tend(time.monotonic())
    assert not home.exists()
    master.ledger.close()


def test_a_clock_that_was_set_puts_it_off(state: Place) -> None:
    state.task(ID.format(1), 99)
    log = Log()
    swept, ledger = daily(state, log, steady=100.0)
    now = time.monotonic()
    swept.tend(now + 99)
    assert not log.said
    swept._offset -= 3600  # as if the clock had been set by an hour since
    swept.tend(now + 101)
    swept.tend(now + 200)
    assert not log.said
    for _ in range(3):
        swept.tend(now + 202)
    assert [event for event, _ in log.said] == ["retention.removed"]
    ledger.close()


# --- codexd gc ------------------------------------------------------------------------


def gc(root: Path, *args: str, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "codexd.cli", "--root", str(root), "gc", *args]
    return subprocess.run(command, capture_output=True, text=True, **more)  # type: ignore[call-overload,no-any-return]


def test_a_dry_run_removes_nothing_and_tells_the_same(state: Place) -> None:
    state.task(ID.format(1), 99, THREAD.format(1))
    state.rollout(THREAD.format(1), 99)
    aged(state.dirs.rejected / "a\033[2J.md", 99)
    aged(state.dirs.rejected / "a\033[2J.md.reason", 99)
    before = sorted(state.dirs.state.rglob("*"))
    dry = gc(state.dirs.state, "--dry-run")
    assert (dry.returncode, sorted(state.dirs.state.rglob("*"))) == (0, before)
    assert "\033" not in dry.stdout
    assert "archive: 1, " in dry.stderr
    assert "threads: 1, 1 bytes" in dry.stderr
    done = gc(state.dirs.state)
    assert (done.stdout, done.stderr) == (dry.stdout, dry.stderr)
    assert gc(state.dirs.state).stderr == "nothing is old enough\n"


def test_gc_tells_what_it_could_not_remove(state: Place) -> None:
    home = state.task(ID.format(1), 999)
    (home.parent / f".gone-{home.name}").write_text("")
    done = gc(state.dirs.state)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"codexd: {home}: ")


def test_gc_where_nothing_is(tmp_path: Path) -> None:
    """A mistyped --root has nothing that could be old."""
    for options in (["--dry-run"], []):
        done = gc(tmp_path / "none", *options)
        assert done.returncode == 69
        assert done.stderr.startswith(f"codexd: there is no inbox {tmp_path}/none/inbox: ")


def test_gc_needs_the_lock(state: Place) -> None:
    held = lock.hold(state.dirs.lock, 0.0)
    with pytest.raises(lock.Locked):
        sweep.at_once(state.config)
    os.close(held)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_gc_is_for_whom_the_state_belongs_to(state: Place) -> None:
    os.chown(state.dirs.state, 65534, 65534)
    done = gc(state.dirs.state)
    assert done.returncode == 77
    assert "do this as the user whom it belongs to" in done.stderr


# --- as systemd runs it ---------------------------------------------------------------


@pytest.mark.xdist_group("box")
def test_codex_removes_threads_within_the_unit_of_the_master() -> None:
    """What the unit forbids keeps Codex neither from its files nor from its databases."""
    require("hybrid")
    with Box("hybrid") as box:
        one = Installed(box)
        box.run("systemctl", "start", "codexd")
        one.drop("[[shell true]] [[say hello]]", "one.md")
        assert one.ended("one")["usage"]["input_tokens"] == 200
        assert "gpt-5.5" in box.run(one.program, "usage", "--by", "model").stdout
        box.run("systemctl", "stop", "codexd", "codexd-http.socket")
        old = f"find {STATE} {SPOOL} -type f ! -name '*sqlite*' -exec touch -d '99 days ago' {{}} +"
        box.run("sh", "-c", old)
        unit = f"[Service]\nType=oneshot\nRestart=no\nExecStart=\nExecStart={one.program} gc\n"
        one.drop_in("codexd.service", unit)
        box.run("systemctl", "start", "codexd")
        assert not box.run("find", f"{STATE}/codex/sessions", "-type", "f").stdout
        count = (
            f"import glob, sqlite3\nfor f in glob.glob('{STATE}/codex/thread_history_*.sqlite'):\n"
            "    print(sqlite3.connect(f).execute('select count(*) from thread_items').fetchone())"
        )
        assert box.run(PYTHON, "-c", count).stdout == "(0,)\n"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_submission_that_waited_for_long_is_done(tmp_path: Path) -> None:
    """It was acknowledged under its id; that no daemon took it in time is not its fault."""
    id = spool.new_id()
    later = Shifted(tmp_path)
    later.set(wall=3 * 3600)
    hour = IDLE + "retention: {archive: 1h}\n"
    with Daemon(tmp_path / "d", env=later.environment, config=hour) as served:
        served.drop(f"{id}.md", "x\n")
        until(lambda: [t["id"] for t in served.tasks() if t["created"]] == [id], "its task")
        assert not list(served.dirs.rejected.iterdir())
