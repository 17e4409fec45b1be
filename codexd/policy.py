"""What to do after an attempt: one pure table from its outcome, and from what Codex had done.

No clock and no chance in here: the caller passes a number between 0 and 1 for
the jitter, so that judging the same attempt again gives the same step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from codexd.model import Kind
from codexd.outcome import Outcome

INTERRUPTIONS = 5  # uncounted restarts of one task; a poison task must end too
REFUSALS = 10  # of one task, by what others of its credential do not meet; the same


class Then(StrEnum):
    """What an outcome leads to."""

    END = "end"  # nothing to gain from trying again
    RETRY = "retry"  # again after a pause, while attempts are left
    RESTART = "restart"  # again at once, not counted: the host stopped it
    WAIT = "wait"  # again after a pause, not counted: somebody else has to end
    GATE = "gate"  # again when the gate opens, not counted
    FRESH = "fresh"  # again at once, while attempts are left; in any case in a new thread


TABLE: dict[Outcome, Then] = {
    Outcome.DONE: Then.END,
    Outcome.CANCELLED: Then.END,
    Outcome.TIMEOUT: Then.END,
    Outcome.STALL: Then.RETRY,
    Outcome.INTERRUPTED: Then.RESTART,
    Outcome.SIGNAL: Then.RETRY,
    Outcome.OOM: Then.END,
    Outcome.AUTH: Then.GATE,
    Outcome.QUOTA: Then.GATE,
    Outcome.HOST: Then.RETRY,
    Outcome.RATE: Then.RETRY,
    Outcome.TRANSIENT: Then.RETRY,
    Outcome.THREAD_BUSY: Then.WAIT,
    Outcome.THREAD_LOST: Then.FRESH,
    Outcome.CONTEXT_FULL: Then.FRESH,
    Outcome.CONFIG: Then.END,
    Outcome.NO_ANSWER: Then.END,
    Outcome.VERIFY: Then.END,
    Outcome.BUDGET: Then.END,
    Outcome.DEPENDENCY: Then.END,
    Outcome.UNKNOWN: Then.END,
}


# Ended by one of these, an attempt may have met an outage of the service or the network.
OUTAGE = frozenset({Outcome.TRANSIENT, Outcome.RATE})
IN_A_ROW, OF_TASKS = 4, 3  # so many such attempts, of so many tasks, are one
# What an attempt comes to only after the model has answered.
ANSWERED = frozenset(
    {Outcome.DONE, Outcome.NO_ANSWER, Outcome.VERIFY, Outcome.BUDGET, Outcome.CONTEXT_FULL}
)

# Said before a turn began, these tell nothing of the task: Codex raced another start
# for its databases.
PREMATURE = frozenset({Outcome.TRANSIENT})


@dataclass(frozen=True, slots=True)
class Step:
    """The next event of the task.

    `delay` seconds until it may start again; `counted` whether the attempt
    counts against the limit; `fresh` whether the next one, of this task or of its
    session, begins a new thread;
    `close` whether the gate closes for the outcome; `patient` whether that it waits says
    nothing against the task, however often.
    """

    kind: Kind
    delay: float = 0.0
    counted: bool = True
    fresh: bool = False
    close: bool = False
    patient: bool = False


def after(
    outcome: Outcome,
    *,
    turned: bool,
    attempts: int,
    limit: int,
    interruptions: int,
    base: float,
    cap: float,
    chance: float,
    launches: int = 1,
    outage: bool = False,
    unfit: bool = False,
    refusals: int = 0,
) -> Step:
    """The step after an attempt that came to `outcome`.

    `turned`: a turn had begun; `attempts` counts this one, as does `launches`, which
    leaves none out; `limit` is the most there may be; `outage`: others of its credential
    fail like it; `unfit`: no other could be run either; `refusals` is how often it met,
    with this time, what others do not.
    """
    then = TABLE[outcome]
    if outcome is Outcome.DONE:
        return Step(Kind.DONE)
    if outcome is Outcome.CANCELLED:
        return Step(Kind.CANCELLED)
    if then is Then.GATE or unfit or (outage and may_be_outage(outcome, turned)):
        if refusals >= REFUSALS:
            return Step(Kind.FAILED, close=True)
        return Step(Kind.QUEUED, counted=False, close=True, patient=True)
    if then is Then.WAIT:
        pause = backoff(launches, base, cap, chance)
        return Step(Kind.WAITING, delay=pause, counted=False, patient=True)
    if then is Then.RESTART and interruptions < INTERRUPTIONS:
        return Step(Kind.QUEUED, counted=False)
    if outcome is Outcome.THREAD_LOST and interruptions < INTERRUPTIONS:
        # No turn was run: Codex said so before it asked the model for anything.
        return Step(Kind.QUEUED, counted=False, fresh=True)
    if outcome in PREMATURE and not turned and interruptions < INTERRUPTIONS:
        pause = backoff(attempts + interruptions, base, cap, chance)
        return Step(Kind.WAITING, delay=pause, counted=False)
    if then is Then.FRESH and attempts < limit:
        return Step(Kind.QUEUED, fresh=True)
    if then is Then.RETRY and attempts < limit:
        return Step(Kind.WAITING, delay=backoff(attempts, base, cap, chance))
    # The last attempt gives such a thread up as well: the session's next task would meet it.
    return Step(Kind.FAILED, fresh=then is Then.FRESH)


def may_be_outage(outcome: Outcome, turned: bool) -> bool:
    """Whether an attempt says that the service may be out."""
    return turned and outcome in OUTAGE


def is_outage(failed: Iterable[tuple[str, int]]) -> bool:
    """Whether it is: these attempts (ID, N) of one credential failed in a row.

    Of one task alone, or of two, it may as well be what they ask for.
    """
    attempts = set(failed)
    return len(attempts) >= IN_A_ROW and len({id for id, _ in attempts}) >= OF_TASKS


def backoff(attempts: int, base: float, cap: float, chance: float) -> float:
    """Seconds to wait after that many attempts: doubling, capped, then spread by a half."""
    pause = min(cap, base * 2.0 ** min(attempts - 1, 30))
    return float(pause * (0.5 + chance / 2))


def probe_after(tries: int) -> float:
    """Seconds until a closed gate without a known end is tried again."""
    return float(min(60.0 * 2.0 ** min(tries, 10), 1800.0))
