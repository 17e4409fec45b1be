"""What an attempt left behind: the evidence of what it came to, checked.

Part of the master.  Reads tasks/ID/N, the exit record of its unit, and nothing
else.  An attempt that had begun and has no result was killed with its worker, or there
was no room for one: its events tell the thread, and whether the turn had ended before.
That is enough for a task without a check; with one, only a result can say that it passed.

Raises OSError when the host refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from codexd import cgroup, codex, durable, exits, place, sane
from codexd.config import Config
from codexd.exits import Ended
from codexd.model import USAGE_KEYS, Task
from codexd.outcome import Outcome

_EVENTS_LIMIT = 512 << 20
_BEGINNING = 64 << 10  # bytes; the first item comes soon after the start of the turn


@dataclass(frozen=True, slots=True)
class Result:
    """What an attempt left behind, checked."""

    outcome: Outcome
    message: str
    thread: str | None = None
    answer: str | None = None
    began: bool = True  # passed the at-most-once point
    ran: bool = True  # Codex ran
    turned: bool = False  # a turn began: the model may have acted
    gate: bool = False  # no other task could be run either
    ended: bool = True  # by itself, or by the worker's own clocks
    usage: Mapping[str, int] | None = None  # of the whole thread
    model: str | None = None
    cost: Mapping[str, float] | None = None
    rounds: tuple[Mapping[str, object], ...] = ()  # those before the last, as `rounds` tells them
    verified: int | None = None  # status of the check after the last turn
    notes: str = ""  # what could not be searched for notes


class Evidence:
    """Looks at what attempts left."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dirs = config.dirs

    def result(self, task: Task, ended: Ended | None = None) -> Result:
        """What attempt N of a running task left, now that it is over.

        `ended` is the exit record of its unit, if there is one: of a turn that was cut
        short it alone tells by whom.
        """
        found = self._left(task)
        if ended is None:
            return found
        found = replace(found, cost={**(found.cost or {}), **ended.cost})
        if found.ended or (found.began and ended.result == "vanished"):
            return found
        outcome, text = exits.outcome(ended, exits.boot())
        return replace(found, outcome=outcome, message=text)

    def was_stopped(self, task: Task) -> bool:
        """Whether its worker was told to stop, and we did not tell it."""
        return not task.cancel and not self._left(task).ended

    def answered(self, task: Task) -> bool:
        """Whether the model has said or done anything in the attempt that runs now."""
        reader = codex.Reader()
        path = place.attempt(self.dirs, task.id, task.launches) / "events.jsonl"
        try:
            reader.feed(durable.head(path, _BEGINNING))
        except (FileNotFoundError, ValueError):
            return False  # Codex is starting, or it will be said to be damaged
        return reader.items_seen > 0

    def _left(self, task: Task) -> Result:
        """What the attempt's directory tells."""
        try:
            found = place.result(self.dirs, task.id, task.launches)
        except ValueError as damage:
            name = f"tasks/{task.id}/{task.launches}/result.json"
            text = f"{name} is damaged and was not acted on: {damage}"
            return Result(Outcome.UNKNOWN, text, task.thread)
        if found is not None:
            return _checked(found, task)
        if not self.began(task.id, task.launches):
            text = "the worker was not started"
            return Result(
                Outcome.INTERRUPTED, text, task.thread, began=False, ran=False, ended=False
            )
        return self._salvage(task)

    def began(self, id: str, number: int) -> bool:
        """Whether Codex may have run: also if the attempt's directory was lost."""
        lost = not durable.is_directory(place.attempt(self.dirs, id, number))
        return lost or place.was_started(self.dirs, id, number)

    def acted(self, task: Task) -> tuple[bool, str]:
        """Whether the model may have done something for the task in an attempt so far, and
        the last of it that is known."""
        begun, did = False, ""
        for number in range(task.launches, 0, -1):
            reader = self._printed(task.id, number)
            # Cut off, it may have done more than it could tell.
            cut = reader.turn_started and not reader.ended
            begun |= cut or reader.items_seen > 0 or self._is_untold(task.id, number)
            did = did or reader.did
            if did:
                break
        return begun, did

    def ran(self, id: str, number: int) -> bool:
        """Whether Codex ran in an attempt that is over, or may have and nothing tells."""
        told = self._told(id, number)
        return "exit_status" in told if told is not None else self.began(id, number)

    def _is_untold(self, id: str, number: int) -> bool:
        """Whether Codex may have run and nothing tells what it came to; of its events, a power
        cut or a full disk may have left none."""
        return self._told(id, number) is None and self.began(id, number)

    def _told(self, id: str, number: int) -> Mapping[str, object] | None:
        """The result of an earlier attempt; None if there is none that can be read."""
        try:
            return place.result(self.dirs, id, number)
        except (OSError, ValueError):  # no reason to hold up what ends now
            return None

    def _printed(self, id: str, number: int) -> codex.Reader:
        """What Codex said in an attempt, as far as that can be read."""
        reader = codex.Reader()
        path = place.attempt(self.dirs, id, number) / "events.jsonl"
        try:
            for piece in durable.pieces(path, _EVENTS_LIMIT):
                reader.feed(piece)
        except (FileNotFoundError, ValueError):
            pass  # killed before Codex said anything, or not to be read
        reader.finish()
        return reader

    def _salvage(self, task: Task) -> Result:
        """The worker left no result: what do the events say?"""
        reader = self._printed(task.id, task.launches)
        thread = reader.thread or task.thread
        told, model = codex.spent(str(self.config.codex.home), thread) if thread else ({}, None)
        # Both are totals of the thread; after the last completed turn the rollout has more.
        usage = _counts(max(reader.usage, told, key=codex.tokens))
        outcome, text = self._came_to(task, reader)
        return Result(
            outcome, text, thread, reader.message, turned=reader.turn_started,
            ended=outcome is not Outcome.INTERRUPTED, usage=usage, model=model,
        )  # fmt: skip

    def _came_to(self, task: Task, reader: codex.Reader) -> tuple[Outcome, str]:
        """A turn without a result; one that was complete is judged as its worker would have."""
        text = "its worker ended without a result"
        if not reader.turn_started:
            return Outcome.INTERRUPTED, f"{text} before a turn is known to have begun"
        if not (reader.completed and reader.message):
            return Outcome.INTERRUPTED, f"{text} in the middle of the turn"
        outcome, why = codex.judge(
            reader, exit_status=0, stderr_head="", requested_thread=task.thread,
            stop_reason=None, answer=reader.message,
        )  # fmt: skip
        if outcome is not Outcome.DONE:
            return outcome, why
        if self._has_check(task):
            return Outcome.INTERRUPTED, f"{text} before the task's check had passed"
        return outcome, f"the turn was complete when {text}"

    def _has_check(self, task: Task) -> bool:
        """Whether a complete turn is not enough; if that cannot be told, it is not."""
        orders = place.attempt(self.dirs, task.id, task.launches) / "attempt.json"
        try:
            return bool(durable.read_json(orders).get("verify"))
        except (FileNotFoundError, ValueError):
            return True


def _checked(found: Mapping[str, object], task: Task) -> Result:
    """A worker's result; whatever is wrong in it counts as unknown."""
    try:
        outcome = Outcome(str(found["outcome"]))
    except (ValueError, KeyError):
        return Result(Outcome.UNKNOWN, "the result names no known outcome", task.thread)
    usage, cost = found.get("usage"), found.get("cost")
    answer, thread, model = found.get("answer"), found.get("thread"), found.get("model")
    told, verified = found.get("rounds"), found.get("verified")
    rounds = told if isinstance(told, list) else []
    return Result(
        outcome=outcome,
        message=str(found.get("message") or ""),
        thread=thread if isinstance(thread, str) and codex.is_thread_id(thread) else task.thread,
        answer=answer if isinstance(answer, str) else None,
        ran="exit_status" in found,
        turned=bool(found.get("turn_started")),
        gate=found.get("gate") is True,
        ended=found.get("stop_reason") != "interrupted" or outcome is Outcome.DONE,
        usage=_counts(usage),
        model=model if isinstance(model, str) else None,
        cost=_cost(cost),
        rounds=tuple(_round(one) for one in rounds if isinstance(one, dict)),
        verified=verified if isinstance(verified, int) and sane.is_number(verified) else None,
        notes=str(found.get("memory_note") or ""),
    )


def _counts(value: object) -> dict[str, int]:
    found = value if isinstance(value, dict) else {}
    return {k: found[k] for k in USAGE_KEYS if sane.is_count(found.get(k))}


def _cost(value: object) -> dict[str, float]:
    found = value if isinstance(value, dict) else {}
    return {k: found[k] for k in cgroup.COST if sane.is_amount(found.get(k))}


def _round(found: Mapping[str, object]) -> dict[str, object]:
    """Texts and a status, for the transcript."""
    return {k: v for k, v in found.items() if isinstance(v, str) or sane.is_number(v)}
