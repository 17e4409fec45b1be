"""What follows an outcome: end, again, again in a new thread, or a closed gate."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codexd.model import Kind
from codexd.outcome import Outcome
from codexd.policy import (
    INTERRUPTIONS,
    OUTAGE,
    REFUSALS,
    TABLE,
    Step,
    Then,
    after,
    backoff,
    is_outage,
    probe_after,
)  # fmt: skip

DONE, FAILED = Step(Kind.DONE), Step(Kind.FAILED)
AGAIN = Step(Kind.WAITING, delay=10.0)
RESTART = Step(Kind.QUEUED, counted=False)
GATE = Step(Kind.QUEUED, counted=False, close=True, patient=True)
WAIT = Step(Kind.WAITING, delay=10.0, counted=False, patient=True)
LOST = Step(Kind.QUEUED, counted=False, fresh=True)
FRESH = Step(Kind.QUEUED, fresh=True)
GIVEN_UP = Step(Kind.FAILED, fresh=True)

# outcome: after the first of three attempts, after the last, after too many interruptions
EXPECTED = {
    Outcome.DONE: (DONE, DONE, DONE),
    Outcome.CANCELLED: (Step(Kind.CANCELLED),) * 3,
    Outcome.TIMEOUT: (FAILED, FAILED, FAILED),
    Outcome.STALL: (AGAIN, FAILED, AGAIN),
    Outcome.INTERRUPTED: (RESTART, RESTART, FAILED),
    Outcome.SIGNAL: (AGAIN, FAILED, AGAIN),
    Outcome.OOM: (FAILED, FAILED, FAILED),
    Outcome.AUTH: (GATE, GATE, GATE),
    Outcome.QUOTA: (GATE, GATE, GATE),
    Outcome.RATE: (AGAIN, FAILED, AGAIN),
    Outcome.TRANSIENT: (AGAIN, FAILED, AGAIN),
    Outcome.CONFIG: (FAILED, FAILED, FAILED),
    Outcome.HOST: (AGAIN, FAILED, AGAIN),
    Outcome.THREAD_LOST: (LOST, LOST, FRESH),
    Outcome.THREAD_BUSY: (WAIT, WAIT, WAIT),
    Outcome.CONTEXT_FULL: (FRESH, GIVEN_UP, FRESH),
    Outcome.NO_ANSWER: (FAILED, FAILED, FAILED),
    Outcome.VERIFY: (FAILED, FAILED, FAILED),
    Outcome.BUDGET: (FAILED, FAILED, FAILED),
    Outcome.DEPENDENCY: (FAILED, FAILED, FAILED),
    Outcome.UNKNOWN: (FAILED, FAILED, FAILED),
}


def step(
    outcome: Outcome,
    attempts: int = 1,
    interruptions: int = 0,
    limit: int = 3,
    turned: bool = True,
    outage: bool = False,
    launches: int = 1,
    unfit: bool = False,
    refusals: int = 0,
) -> Step:
    return after(
        outcome,
        turned=turned,
        attempts=attempts,
        limit=limit,
        interruptions=interruptions,
        base=10.0,
        cap=600.0,
        chance=1.0,
        outage=outage,
        launches=launches,
        unfit=unfit,
        refusals=refusals,
    )


def test_every_outcome_is_decided() -> None:
    assert set(TABLE) == set(EXPECTED) == set(Outcome)


@pytest.mark.parametrize("outcome", Outcome)
def test_after(outcome: Outcome) -> None:
    first, last, worn = EXPECTED[outcome]
    assert step(outcome) == first
    assert step(outcome, attempts=3) == last
    assert step(outcome, interruptions=INTERRUPTIONS) == worn


@pytest.mark.parametrize("outcome", Outcome)
def test_before_a_turn_nothing_is_held_against_the_task(outcome: Outcome) -> None:
    first, last, worn = EXPECTED[outcome]
    if outcome is Outcome.TRANSIENT:
        first = last = Step(Kind.WAITING, delay=10.0, counted=False)
    assert step(outcome, turned=False) == first
    assert replace(step(outcome, attempts=3, turned=False), delay=last.delay) == last
    assert step(outcome, interruptions=INTERRUPTIONS, turned=False) == worn


@pytest.mark.parametrize("outcome", Outcome)
def test_in_an_outage_its_own_outcomes_alone_close_the_gate(outcome: Outcome) -> None:
    for attempts in (1, 3):
        expected = GATE if outcome in OUTAGE else step(outcome, attempts)
        assert step(outcome, attempts, outage=True) == expected
    before = step(outcome, turned=False)
    assert step(outcome, turned=False, outage=True) == before, "no turn, no word of the service"


@pytest.mark.parametrize(
    ("failed", "outage"),
    [("", 0), ("a1 b1 c1", 0), ("a1 a2 a3 a4", 0), ("a1 b1 a2 b2 a3 b3", 0),
     ("a1 b1 c1 a2", 1), ("a1 b1 c1 d1", 1), ("a1 b1 c1 c1", 0)],
)  # fmt: skip
def test_an_outage_is_of_several_attempts_of_several_tasks(failed: str, outage: int) -> None:
    assert is_outage((one[0], int(one[1])) for one in failed.split()) == bool(outage)


@pytest.mark.parametrize("outcome", [o for o in Outcome if TABLE[o] is Then.FRESH])
def test_the_last_attempt_gives_its_thread_up_too(outcome: Outcome) -> None:
    """Whoever comes next in the session must not meet the same."""
    assert step(outcome, attempts=3, interruptions=INTERRUPTIONS) == GIVEN_UP
    assert step(outcome, attempts=1, interruptions=INTERRUPTIONS, limit=1) == GIVEN_UP


def test_what_is_not_counted_waits_ever_longer_too() -> None:
    delays = [step(Outcome.TRANSIENT, 1, n, turned=False).delay for n in range(INTERRUPTIONS)]
    assert delays == [10, 20, 40, 80, 160]


def test_a_busy_thread_is_waited_for_however_long_that_takes() -> None:
    steps = [step(Outcome.THREAD_BUSY, 1, 5, 1, turned=False, launches=n) for n in range(1, 1000)]
    assert [one.delay for one in steps[:8]] == [10, 20, 40, 80, 160, 320, 600, 600]
    assert all(replace(one, delay=10.0) == WAIT for one in steps)


@pytest.mark.parametrize("outcome", [Outcome.QUOTA, Outcome.AUTH, Outcome.HOST, Outcome.RATE])
def test_only_what_others_do_not_meet_ends_a_task(outcome: Outcome) -> None:
    """However often the gate was tried; it is that of the host or of an outage, too."""
    met = {"attempts": 3, "outage": True, "unfit": outcome is Outcome.HOST}
    assert step(outcome, **met, interruptions=9, launches=1000) == GATE
    assert step(outcome, **met, refusals=REFUSALS - 1) == GATE
    assert step(outcome, **met, refusals=REFUSALS) == Step(Kind.FAILED, close=True)


@given(
    st.lists(st.sampled_from([o for o in Outcome if not EXPECTED[o][0].patient]), min_size=60),
    st.integers(1, 20),
    st.booleans(),
)
def test_every_task_ends(outcomes: list[Outcome], limit: int, turned: bool) -> None:
    """Whatever an attempt comes to, Codex is started limit + INTERRUPTIONS times at most;
    but while the gate is closed, or somebody else is in the thread, as often as that takes."""
    attempts = interruptions = starts = 0
    for outcome in outcomes:
        attempts, starts = attempts + 1, starts + 1
        next_one = step(outcome, attempts, interruptions, limit, turned)
        if next_one.kind in (Kind.DONE, Kind.FAILED, Kind.CANCELLED):
            break
        if not next_one.counted:
            attempts, interruptions = attempts - 1, interruptions + 1
    else:
        pytest.fail("it goes on for ever")
    assert starts <= limit + INTERRUPTIONS


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0.001, 1e5), st.floats(0.001, 1e5))
def test_backoff_is_bounded_by_half_and_cap(
    attempts: int, chance: float, base: float, cap: float
) -> None:
    pause = backoff(attempts, base, cap, chance)
    assert min(base, cap) / 2 <= pause <= cap
    assert pause == backoff(attempts, base, cap, chance)


def test_backoff_doubles_up_to_the_cap() -> None:
    assert [backoff(n, 10, 600, 1) for n in range(1, 9)] == [10, 20, 40, 80, 160, 320, 600, 600]
    assert backoff(3, 10, 600, 0) == 20


def test_a_closed_gate_is_tried_ever_more_rarely_but_always() -> None:
    assert [probe_after(n) for n in (0, 1, 2, 4, 5, 6, 1000)] == [
        60,
        120,
        240,
        960,
        1800,
        1800,
        1800,
    ]
