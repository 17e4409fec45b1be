"""A round of attempts without a daemon around it: what the host refuses passes, or harms one."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codexd import clock, config, place, prompt, spool, transcript
from codexd.attempts import RETRY, Attempts
from codexd.control import Controls
from codexd.finish import Finish
from codexd.gate import Keeper
from codexd.ledger import Ledger, LedgerFull
from codexd.model import Event, Kind, Note, Request
from codexd.outcome import Outcome
from codexd.spend import Spend
from tests.history import AT, ident, move, queued

FAKE = Path(__file__).parent / "bin" / "codex"
RUNNING = {"launches": 1, "attempts": 1}


class Started:
    """A launcher that remembers; each of its workers is gone at once."""

    kind, survives, why = "process", False, None

    def __init__(self) -> None:
        self.ids: list[str] = []

    def start(self, ids: Iterable[str], limits: Mapping[str, Mapping[str, int]]) -> None:
        self.ids += ids

    def active(self) -> set[str]:
        return set()

    working = active

    def refusal(self, id: str) -> None: ...

    ended = refusal

    def stop(self, ids: Iterable[str]) -> None: ...


class Round:
    """All that a round of attempts needs, on a directory of its own."""

    def __init__(self, root: Path, *events: Event, **settings: Any) -> None:
        self.dirs = config.Directories.below(root)
        self.dirs.codex_home.mkdir(parents=True)
        read = config.load(self.dirs, explicit=False)
        self.config = replace(read, codex=replace(read.codex, bin=str(FAKE)), **settings)
        spool.prepare(self.dirs)
        self.ledger = Ledger(self.dirs.ledger, self.dirs.checkpoint)
        facts = {"file": "large.md", "reason": "x" * 200, "id": ident(9)}
        more = [Event(AT, Note.REJECTED, facts=facts)] * 200  # no other file is as large
        self.ledger.append([*more, *events])
        for id in self.ledger.book.tasks:
            (self.dirs.tasks / id).mkdir()
            place.store(self.dirs, id, {"id": id, "request": Request("x").to_json()})
        self.refused: list[str] = []
        self.fills = False  # whether the next lines are the last for which there is room
        spend = Spend(self.dirs.usage, self.log)
        self.keeper = Keeper(self.config, self.ledger, spend, self.log, self.log)
        self.keeper.look(clock.steady())
        self.launcher = Started()
        self.attempts = Attempts(
            self.config, self.ledger, self.launcher, self.keeper,
            Finish(self.config, spend), self.record, self.refuse, self.log, self.log,
        )  # fmt: skip

    def log(self, event: str, **fields: object) -> None:
        """Nobody reads it."""

    def refuse(self, error: OSError, **about: object) -> None:
        self.refused.append(str(about.get("task")))

    def record(self, events: list[Event]) -> None:
        self.ledger.append(events)
        if self.fills and events:
            self._limit()

    def _limit(self) -> None:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.ledger.book.offset, most))

    @contextmanager
    def no_room(self, later: bool = False) -> Iterator[None]:
        """The ledger cannot grow; `later`: once it has the next lines."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.fills = later
        try:
            if not later:
                self._limit()
            yield
        finally:
            self.fills = False
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def end(self, number: int) -> None:
        self.ledger.append([move(number, Kind.DONE, outcome="done")])

    def left(self, number: int, attempt: int = 1, ran: bool = True, **result: object) -> None:
        """The result of an attempt; `ran`: in which Codex was started."""
        home = self.dirs.tasks / ident(number) / str(attempt)
        home.mkdir(exist_ok=True)
        (home / "started").touch()
        evidence = {"exit_status": 0} if ran else {}
        (home / "result.json").write_text(json.dumps({**evidence, **result}))

    def accept(self, number: int, text: str, resume: str = "auto") -> None:
        """One more task, of the session web."""
        request = {**Request(text, session="web").to_json(), "resume": resume}
        self.ledger.append([queued(number, session="web", limit=3)])
        (self.dirs.tasks / ident(number)).mkdir()
        place.store(self.dirs, ident(number), {"id": ident(number), "request": request})

    def order(self, number: int, attempt: int = 1) -> dict[str, Any]:
        """What the next attempt is told."""
        self.attempts.dispatch(clock.steady())
        home = self.dirs.tasks / ident(number) / str(attempt)
        orders: dict[str, Any] = json.loads((home / "attempt.json").read_text())
        return orders

    def run(self, number: int, attempt: int = 1, **result: object) -> dict[str, Any]:
        """An attempt from its orders, which are given, to its judgement."""
        orders = self.order(number, attempt)
        told = {"outcome": "done", "answer": f"answer {number}.{attempt}", **result}
        self.left(number, attempt, **{"thread": orders["thread"], **told})
        self.attempts.collect(clock.steady())
        return orders


def test_one_that_was_to_try_the_gate_and_could_not_be_recorded_tries_it_later(
    tmp_path: Path,
) -> None:
    one = Round(tmp_path, queued(1))
    one.keeper.met(Outcome.QUOTA, "Quota exceeded.")
    one.keeper.release()
    with one.no_room(), pytest.raises(LedgerFull):
        one.attempts.dispatch(clock.steady())
    assert one.launcher.ids == []
    one.attempts.dispatch(clock.steady())
    assert one.launcher.ids == [ident(1)]


def test_what_follows_from_an_end_is_done_for_all_although_the_disk_is_full(
    tmp_path: Path,
) -> None:
    running = [move(n, Kind.RUNNING, **RUNNING) for n in (1, 2)]
    one = Round(tmp_path, queued(1), queued(2), *running)
    one.keeper.close("host", "no worker can be started")
    one.left(1, outcome="done", answer="fine")
    one.left(2, outcome="quota", message="Quota exceeded.")
    with one.no_room(later=True):
        one.attempts.collect(clock.steady())
    assert list(one.ledger.book.tasks) == [ident(2)]
    assert one.refused == [ident(1), ident(2)]
    assert one.keeper.closed.keys() == {"host", "quota"}


@pytest.mark.parametrize("gate", ["open", "closed"])
def test_who_cannot_be_ordered_gives_its_place_to_the_next(tmp_path: Path, gate: str) -> None:
    """A backup was restored by root: the tasks that come first are not codexd's."""
    first = [queued(n, priority=9, session=f"s{n}") for n in (1, 2)]
    one = Round(tmp_path, *first, queued(3, session="s1"), queued(4), workers=1)
    if gate == "closed":
        one.keeper.met(Outcome.QUOTA, "Quota exceeded.")
        one.keeper.release()
    for number in (1, 2):
        (one.dirs.tasks / ident(number) / "1").touch()  # in the way of its attempt
    now = clock.steady()
    for _ in range(3):
        one.attempts.dispatch(now)
    assert one.launcher.ids == [ident(4)], "and nothing of their sessions"
    assert set(one.refused[-2:]) == {ident(1), ident(2)}, "told as long as it is so"


def test_who_could_not_be_ordered_is_tried_again_in_its_turn(tmp_path: Path) -> None:
    many = [queued(n, priority=9 - n) for n in range(6)]
    one = Round(tmp_path, *many, workers=1)
    ways = [one.dirs.tasks / ident(n) / "1" for n in range(5)]
    for way in ways:
        way.touch()
    now = clock.steady()
    for _ in range(6):
        one.attempts.dispatch(now)
    assert one.launcher.ids == [ident(5)]
    one.end(5)
    ways[3].unlink()
    for later in range(1, 5):  # each costs the others one round
        assert one.launcher.ids == [ident(5)]
        one.attempts.dispatch(now + later * RETRY)
    assert one.launcher.ids == [ident(5), ident(3)]
    # What was in the way of one was in the way of others: they need not wait for their turns.
    one.end(3)
    ways[0].unlink()
    one.attempts.dispatch(now + 4 * RETRY)
    assert one.launcher.ids[2:] == [ident(0)]


def test_of_those_that_could_not_be_ordered_the_ended_are_forgotten(tmp_path: Path) -> None:
    one = Round(tmp_path, queued(1))
    way = one.dirs.tasks / ident(1) / "1"
    way.touch()
    one.attempts.dispatch(clock.steady())
    one.ledger.append([move(1, Kind.CANCELLED, outcome="cancelled")])
    one.refused.clear()
    one.attempts.dispatch(clock.steady())
    assert one.refused == []


@pytest.mark.parametrize(
    ("asked", "most", "given"),
    [
        ("danger-full-access", "read-only", "codexd-read-only"),
        ("workspace-write", "read-only", "codexd-read-only"),
        ("danger-full-access", "danger-full-access", "danger-full-access"),
        ("read-only", "danger-full-access", "codexd-read-only"),
        (None, "read-only", "codexd-read-only"),
    ],
)
def test_a_sandbox_that_was_lowered_binds_what_was_accepted_before(
    tmp_path: Path, asked: str | None, most: str, given: str
) -> None:
    (tmp_path / "codexd.yaml").write_text(f"codex:\n  sandbox: {most}\n")
    one = Round(tmp_path, queued(1))
    request = {**Request("x").to_json(), "sandbox": asked}
    place.store(one.dirs, ident(1), {"id": ident(1), "request": request})
    one.attempts.dispatch(clock.steady())
    orders = json.loads((one.dirs.tasks / ident(1) / "1" / "attempt.json").read_text())
    assert orders["sandbox"] == given


# --- control files --------------------------------------------------------------------------


def test_what_there_was_no_room_to_obey_comes_before_what_came_later(tmp_path: Path) -> None:
    """By the looks at the inbox: the clock may have been set back since."""
    one = Round(tmp_path)
    them, hold = controls(one), one.dirs.inbox / "all.hold"
    hold.touch()
    os.utime(hold, (4e9, 4e9))
    with one.no_room():
        them.obey([hold.name], one.record)
        them.again(one.record)
    assert hold.exists()
    (one.dirs.inbox / "all.release").touch()
    them.obey([hold.name, "all.release"], one.record)
    assert not list(one.dirs.inbox.iterdir())
    assert not one.keeper.closed


# --- what the model is told of what was before ----------------------------------------------

A, B = (f"01a20000-0000-7000-8000-00000000000{n}" for n in (1, 2))
FULL = {"outcome": "context-full", "turn_started": True}


def controls(one: Round) -> Controls:
    finish = one.attempts.finish
    return Controls(one.config, one.ledger, one.launcher, one.keeper, finish, one.refuse)


def reset(one: Round) -> None:
    (one.dirs.inbox / "web.reset").touch()
    assert controls(one).obey(["web.reset"], one.record) == []


@pytest.mark.parametrize("by", ["reset", "never"])
@pytest.mark.parametrize(
    "left", [{"outcome": "interrupted", "answer": None}, {**FULL, "thread": B}]
)
def test_what_a_task_was_to_forget_is_not_told_to_its_second_attempt(
    tmp_path: Path, by: str, left: dict[str, object]
) -> None:
    one = Round(tmp_path)
    one.accept(1, "the old topic")
    one.run(1, thread=A)
    if by == "reset":
        reset(one)
    one.accept(2, "the new topic", resume="never" if by == "never" else "auto")
    assert one.run(2, **left)["thread"] is None
    orders = one.order(2, 2)
    assert orders["thread"] is None
    assert "old topic" not in orders["preamble"]
    assert "answer 1.1" not in orders["preamble"]
    assert ("answer 2.1" in orders["preamble"]) == (left["outcome"] == "context-full")


@pytest.mark.parametrize("when", ["runs", "is to go on elsewhere", "waits"])
def test_a_reset_stands_whatever_a_task_that_was_started_before_comes_to(
    tmp_path: Path, when: str
) -> None:
    """It gives up the thread that was to be forgotten, and goes on in one of its own."""
    one = Round(tmp_path)
    one.accept(1, "the old topic")
    one.run(1, thread=A)
    one.accept(2, "more of it")
    attempt = 1
    if when == "waits":
        one.run(2, outcome="interrupted", turn_started=True, answer=None)
        reset(one)
        attempt = 2
    one.order(2, attempt)
    if when == "runs":
        reset(one)
    one.left(2, attempt, **FULL, thread=A, answer="as far as it came")
    one.attempts.collect(clock.steady())
    if when == "is to go on elsewhere":
        reset(one)
    told = one.run(2, attempt + 1, thread=B)
    assert (told["thread"], "as far as it came" in told["preamble"]) == (None, True)
    assert "old topic" not in told["preamble"]
    one.accept(3, "another topic")
    assert one.order(3)["thread"] is None


def test_who_would_go_on_in_a_lost_thread_hears_of_it_though_nothing_is_left(
    tmp_path: Path,
) -> None:
    one = Round(tmp_path)
    one.accept(1, "the topic")
    for attempt in range(1, 4):
        one.run(1, attempt, **FULL, thread=A, answer="a" * (transcript.TAIL + 1))
    one.accept(2, "more of it")
    assert one.order(2)["preamble"] == prompt.FRESH
    one.run(2, outcome="cancelled", answer=None)
    one.accept(3, "only there", resume="always")
    one.attempts.dispatch(clock.steady())
    lost = f"resume: always, but session web could not continue its thread {A}"
    assert place.status(one.dirs, ident(3))["message"] == lost


def test_of_a_lost_conversation_nothing_is_told_that_came_before_it(tmp_path: Path) -> None:
    one = Round(tmp_path)
    one.accept(1, "the old topic")
    one.run(1, thread=A)
    reset(one)
    one.accept(2, "the new topic")
    one.run(2, thread=B)
    one.accept(3, "more of it")
    assert one.run(3, outcome="thread-lost", answer=None)["thread"] == B
    told = one.order(3, 2)["preamble"]
    assert "could not be continued" in told
    assert "user:\n> the new topic\nassistant:\n> answer 2.1" in told
    assert "old topic" not in told
    assert "answer 1.1" not in told
    assert "more of it" not in told, "which is the message itself"


def test_a_conversation_that_was_lost_twice_is_told_from_its_beginning(tmp_path: Path) -> None:
    one = Round(tmp_path)
    one.accept(1, "the topic")
    one.run(1, thread=A)
    one.accept(2, "more of it")
    one.run(2, **FULL)
    one.run(2, 2, thread=B)
    one.accept(3, "and more")
    one.run(3, outcome="thread-lost", answer=None)
    told = one.order(3, 2)["preamble"]
    for words in ("> the topic", "> answer 1.1", "> more of it", "> answer 2.1", "> answer 2.2"):
        assert words in told


@pytest.mark.parametrize("crash", [None, "before the session", "before the ledger"])
@pytest.mark.parametrize("kept_by", ["a busy thread", "the host"])
def test_an_attempt_in_which_codex_was_not_started_is_none_to_tell_of(
    tmp_path: Path, kept_by: str, crash: str | None
) -> None:
    one = Round(tmp_path)
    one.accept(1, "what to do")
    one.order(1)
    if kept_by == "a busy thread":
        one.left(1, ran=False, outcome="thread-busy", message="written by another process")
    one.attempts.collect(clock.steady())
    one.attempts.awake(clock.steady() + 3600)
    assert not list(one.dirs.transcripts.iterdir())

    assert one.order(1, 2)["preamble"] == ""
    one.left(1, 2, outcome="interrupted", thread=A, turn_started=True)
    if crash:  # it was judged, and not all of that written
        one.attempts.finish.judge(one.ledger.book.tasks[ident(1)])
    if crash == "before the session":
        (one.dirs.sessions / "web.json").unlink()
    one.attempts.collect(clock.steady())

    assert one.run(1, 3)["preamble"] == prompt.RESUMED
    said = transcript.last(one.dirs.transcripts / "web.jsonl", 9)
    assert [(line["role"], line["attempt"]) for line in said] == [
        ("user", 2), ("assistant", 2), ("assistant", 3),
    ]  # fmt: skip
    assert said[0]["text"] == "what to do"


@pytest.mark.parametrize("left", ["nothing", "its mark", "a damaged result", "not even its place"])
def test_an_attempt_of_which_nothing_tells_may_have_worked(tmp_path: Path, left: str) -> None:
    """Its prompt was not said before, whatever is left of it, and is not said again."""
    one = Round(tmp_path)
    one.accept(1, "what to do")
    one.order(1)
    home = one.dirs.tasks / ident(1) / "1"
    if left == "not even its place":
        shutil.rmtree(home)
    elif left != "nothing":
        (home / "started").touch()
    one.attempts.collect(clock.steady())
    if left == "a damaged result":
        (home / "result.json").write_text("{")
    acted = left != "nothing"
    assert bool(one.run(1, 2)["preamble"]) == acted
    said = transcript.last(one.dirs.transcripts / "web.jsonl", 9)
    asked = [line["attempt"] for line in said if line["role"] == "user"]
    assert asked == [1 if acted else 2]


def test_what_a_task_came_to_is_not_written_over(tmp_path: Path) -> None:
    """It lies in the archive, which could not be read at the start."""
    one = Round(tmp_path, queued(1))
    there = place.archived(one.dirs, ident(1))
    there.parent.mkdir()
    (one.dirs.tasks / ident(1)).rename(there)
    one.attempts.dispatch(clock.steady())
    assert one.refused == [ident(1)]
    assert not list(one.dirs.answers.iterdir())
    assert not (one.dirs.tasks / ident(1)).exists()
