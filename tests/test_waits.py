"""Ten thousand that wait: what a round takes, what the ledger gets, what a restart knows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codexd import clock, config, place, spool
from codexd.finish import Finish
from codexd.ledger import Ledger, LedgerFull
from codexd.model import Event, Kind, State, Task
from codexd.spend import Spend
from codexd.waits import EVENTS, Waits
from tests.history import ident, move, queued

MANY = 10_000
DUE = "2026-11-23T08:00:00.000Z"


class Round:
    """A ledger and who waits in it, without a daemon around it."""

    def __init__(self, root: Path) -> None:
        self.dirs = config.Directories.below(root)
        settings = config.load(self.dirs, explicit=False)
        spool.prepare(self.dirs)
        self.ledger = Ledger(self.dirs.ledger, self.dirs.checkpoint)
        self.finish = Finish(settings, Spend(self.dirs.usage, print))
        self.written: list[Event] = []
        self.problems: list[Any] = []
        self.full = False
        self.now = 1000.0
        self.start()

    def start(self) -> None:
        """As after a restart: all that is known is the ledger."""
        self.ledger.close()
        self.ledger = Ledger(self.dirs.ledger, self.dirs.checkpoint)
        self.waits = Waits(self.ledger, self.finish, self.record, self.refused)

    def record(self, events: list[Event]) -> None:
        if self.full:
            raise LedgerFull(28, "full")
        self.ledger.append(events)
        self.written += events

    def refused(self, error: OSError, **about: object) -> None:
        self.problems.append((error, about))

    def tend(self, after: float = 0.0) -> list[str]:
        """A round; the kinds of the lines that it wrote."""
        self.now += after
        self.written.clear()
        self.waits.tend(self.now)
        return [str(e.kind) for e in self.written]

    def task(self, n: int) -> Task:
        return self.ledger.book.tasks[ident(n)]

    def end(self, n: int, kind: Kind, **facts: object) -> None:
        told = {"id": ident(n), "state": kind.value, "outcome": "quota", "message": None, **facts}
        (self.dirs.tasks / ident(n)).mkdir()
        place.conclude(self.dirs, ident(n), told)
        events = [] if self.task(n).state is State.RUNNING else [move(n, Kind.RUNNING)]
        self.ledger.append([*events, move(n, kind, outcome="done")])


@pytest.fixture
def one(tmp_path: Path) -> Round:
    return Round(tmp_path)


def took(work: Callable[[], object]) -> float:
    """Seconds of a processor."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def test_ten_thousand_children_of_one_parent(one: Round) -> None:
    one.ledger.append([queued(0)])
    one.ledger.append([queued(n, after=[ident(0)]) for n in range(1, MANY)])
    lines = [line for _ in range(MANY // EVENTS) for line in one.tend()]
    assert lines == ["waiting"] * (MANY - 1)
    idle = min(took(one.tend) for _ in range(5))
    assert idle < 0.02, "a round in which nothing has changed"
    one.start()
    while one.waits.pause(one.now) == 0 or not one.waits._seen:
        assert one.tend() == [], "a restart has nothing to say"
    one.end(0, Kind.DONE)
    lines = [line for _ in range(MANY // EVENTS) for line in one.tend()]
    assert lines == ["queued"] * (MANY - 1)
    assert not any(t.bound for t in one.ledger.book.tasks.values())
    assert one.tend() == []


def test_ten_thousand_delays(one: Round) -> None:
    at = clock.stamp(time.time() + 3600)
    one.ledger.append([queued(n, not_before=at, delay=3600.0) for n in range(MANY)])
    for _ in range(MANY // EVENTS):
        one.tend()
    assert one.waits.pause(one.now) == pytest.approx(3600, abs=60)
    idle = min(took(one.tend) for _ in range(5))
    assert idle < 0.1
    lines = [line for _ in range(MANY // EVENTS) for line in one.tend(after=3601 / MANY * EVENTS)]
    assert lines == ["queued"] * EVENTS, "the last of these rounds is the first after the delay"


def test_those_that_have_ended_are_forgotten(one: Round) -> None:
    one.ledger.append([queued(n) for n in range(EVENTS + 1)])
    one.tend()
    assert len(one.waits._seen) == EVENTS + 1
    for kind in (Kind.RUNNING, Kind.DONE):
        one.ledger.append([move(n, kind) for n in range(EVENTS + 1)])
    one.tend()
    assert not one.waits._seen


def test_a_round_ends_few_of_those_that_follow_a_failed_one(one: Round) -> None:
    one.ledger.append([queued(0), *(queued(n, after=[ident(0)]) for n in range(1, 101))])
    one.tend()
    one.end(0, Kind.FAILED)
    counts = []
    while lines := one.tend():
        assert set(lines) == {"failed"}
        counts.append(len(lines))
    assert sum(counts) == 100
    assert max(counts) < 40
    assert not one.ledger.book.tasks


def test_a_full_disk_loses_nothing(one: Round) -> None:
    one.ledger.append([queued(0), queued(1, after=[ident(0)])])
    one.full = True
    for _ in range(2):
        with pytest.raises(LedgerFull):
            one.tend()
    assert one.task(1).state is State.QUEUED
    assert one.task(1).bound, "and dispatch leaves it alone"
    one.full = False
    assert one.tend() == ["waiting"]
    one.end(0, Kind.DONE)
    one.full = True
    with pytest.raises(LedgerFull):
        one.tend()
    one.full = False
    assert one.tend() == ["queued"]


def test_a_child_whose_answer_cannot_be_written_holds_up_no_other(one: Round) -> None:
    one.ledger.append([queued(0), queued(1, after=[ident(0)]), queued(2, after=[ident(0)])])
    one.tend()
    one.end(0, Kind.FAILED)
    (one.dirs.tasks / ident(1)).write_text("in the way")
    assert one.tend() == ["failed"]
    assert one.problems[0][1] == {"task": ident(1)}
    (one.dirs.tasks / ident(1)).unlink()
    assert one.tend() == ["failed"]
    assert not one.ledger.book.tasks


def test_a_parent_of_which_nothing_is_left(one: Round) -> None:
    one.ledger.append([queued(0), queued(1, after=[ident(0)])])
    one.tend()
    one.ledger.append([move(0, Kind.RUNNING), move(0, Kind.DONE, outcome="done")])
    assert one.tend() == ["failed"]
    why = one.written[0].facts["message"]
    assert why == f"it follows task {ident(0)}, which is unknown: its record is gone"


def test_a_parent_whose_record_is_damaged(one: Round) -> None:
    one.ledger.append([queued(0), queued(1, after=[ident(0)])])
    one.tend()
    one.end(0, Kind.DONE)
    (one.dirs.tasks / ident(0) / "status.json").write_text("{")
    assert one.tend() == ["failed"]
    assert "its record is damaged" in str(one.written[0].facts["message"])


def test_a_clock_that_jumps_changes_no_delay(one: Round) -> None:
    """Set back or forward while no daemon ran: it is as long as it was, or shorter."""
    for n, left in enumerate((-1e6, 30.0, 1e6)):
        at = clock.stamp(time.time() + left)
        one.ledger.append([queued(n, not_before=at, delay=60.0)])
    assert one.tend() == ["waiting", "queued", "waiting", "waiting"]
    assert one.tend(after=25) == []
    assert one.tend(after=6) == ["queued"]
    assert one.tend(after=28) == []
    assert one.tend(after=2) == ["queued"]


def test_a_time_is_what_the_clock_shows(one: Round) -> None:
    one.ledger.append([queued(0, not_before="2026-01-01T00:00:00.000Z")])
    for n, after in ((1, 5000), (2, 9000)):
        one.ledger.append([queued(n, not_before=clock.stamp(time.time() + after))])
    assert one.tend() == ["waiting", "queued", "waiting", "waiting"]
    assert one.tend(after=6000) == [], "a monotonic clock says nothing of it"
    assert 4900 < one.waits.pause(one.now) <= 5000


def test_a_release_undoes_the_hold_alone(one: Round) -> None:
    one.ledger.append([queued(0), queued(1, after=[ident(0)])])
    one.tend()
    one.ledger.append([move(1, Kind.WAITING, reason="hold")])
    one.tend()
    one.end(0, Kind.DONE)
    assert one.tend() == [], "held, it stays where it is"
    assert replace(one.task(1), reason=None).state is State.WAITING
    one.ledger.append([move(1, Kind.WAITING, reason="after")])
    assert one.tend() == ["queued"]
