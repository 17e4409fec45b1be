"""An attempt from the start of Codex to its result: turns, and the task's check between them.

Part of the worker.  Where the task has a check (`verify`), it is run after each
turn that ended well.  If it passes, the task is done; if not, the next turn of
the same thread is given its output, until it was run `rounds` times.

All rounds are one attempt of one worker, and this is why: they share the task's
time and budget, Codex's usage is a total of the thread anyway, and nothing is
asked of the master between them.  result.json is written once, at the end of the last.
Whoever kills the worker before leaves an attempt that has not ended: the next
one resumes the thread and begins with round 1 (`evidence` never takes a turn
that was not verified for done).

Raises Untold when the result, or what Codex says, cannot be written.  Lean: the worker uses it.
"""

from __future__ import annotations

import os
import time

from codexd import cgroup, codex, durable, prompt, verify
from codexd.outcome import Outcome
from codexd.start import Halted, Untold, why_not
from codexd.turn import Turn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from codexd.child import Halt
    from codexd.service import Service
    from codexd.start import Attempt
    from codexd.verify import Check

_ANSWER = 100_000  # characters of the answer of a round that was not the last
# Seconds before each try to run the check.  A database of Codex's is denied with files
# beside it that are there only while it is open: where one goes just as the sandbox is
# set up, that fails, and no command has begun.
_TRIES = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)


class Rounds:
    """The turns of one attempt."""

    def __init__(self, attempt: Attempt, halt: Halt, manager: Service | None) -> None:
        """`halt` and `manager`: see `child`."""
        self.attempt = attempt
        self.halt = halt
        self.manager = manager
        attempt.pause = self._pause
        self.wanted: Any = attempt.orders.get("verify") or {}
        self.thread: str | None = attempt.orders["thread"]
        self.deadline = time.monotonic() + float(attempt.orders["timeout"])
        self.tokens: int | None = attempt.orders.get("tokens")  # left for the turns to come
        self.earlier: list[dict[str, object]] = []  # rounds before this one
        self.items = 0
        self.cost: dict[str, float] = {}
        self.turn: Turn  # the last
        self.check: Check | None = None  # of this round, once it was begun
        self.answer: str | None = None  # the last one; a turn that failed may have none

    def run(self, process: tuple[int, int, int]) -> Outcome:
        """From `process`, which is Codex in its first turn, to the result; its outcome."""
        try:
            turn = self._watched(process)
        except OSError as problem:
            raise Untold(f"what Codex says could not be kept: {problem}") from problem
        outcome, message = self._turn(turn)
        while self.wanted and outcome is Outcome.DONE:
            outcome, message = self._verify()
            if outcome is not Outcome.VERIFY or self.check is None or self._left() <= 0:
                break
            outcome, message = self._again(self.check)
        self._write(outcome, message)
        return outcome

    @property
    def status(self) -> int:
        """Codex's exit status in its last turn."""
        return self.turn.status

    def sweep(self) -> None:
        """End what is left of Codex, and what its tools put into sessions of their own."""
        Turn.sweep()

    def _pause(self, seconds: float) -> None:
        """Wait, and hear whether all has to stop meanwhile.  Raises Halted."""
        if self.halt.told(seconds):
            raise Halted(f"codexd was stopped after turn {len(self.earlier) + 1}")

    # --- a turn -------------------------------------------------------------------

    def _watched(self, process: tuple[int, int, int]) -> Turn:
        """Codex, just started, as a turn with what is left for it."""
        attempt = self.attempt
        limits = {"timeout": self._time(), "thread": self.thread, "tokens": self.tokens}
        orders, starting = {**attempt.orders, **limits}, attempt.starting
        return Turn(attempt.place, orders, *process, self.manager, starting)

    def _turn(self, turn: Turn) -> tuple[Outcome, str]:
        """Codex until it has ended; what the turn came to."""
        self.turn = turn
        turn.run(self.halt)
        self._spend(turn.cost)
        self.items += turn.reader.items_seen
        answer = self._answer(turn)
        self.answer = answer or self.answer
        outcome, message = codex.judge(
            turn.reader,
            exit_status=turn.status,
            stderr_head=turn.told.decode("utf-8", "replace"),
            requested_thread=self.thread,
            stop_reason=turn.stop_reason,
            answer=answer,
        )
        used = cgroup.of_unit(f"codexd-worker@{self.attempt.id}.service")
        if outcome is Outcome.SIGNAL and cgroup.oom_kills(used):
            return Outcome.OOM, "Codex was killed for want of memory (MemoryMax=)"
        return outcome, message

    def _answer(self, turn: Turn) -> str | None:
        """The last message: from the events, else from Codex's own file, else its rollout."""
        reader = turn.reader
        if reader.message:
            return reader.message
        try:
            text = durable.read(self.attempt.path("last.md"), 64 << 20).decode("utf-8", "replace")
        except (OSError, ValueError):
            text = ""
        if text.strip() or not reader.completed:
            return text or None
        home = self.attempt.orders["home"]
        return codex.rollout_message(home, reader.thread) if reader.thread else None

    def _time(self) -> float:
        return self.deadline - time.monotonic()

    def _spend(self, cost: dict[str, float]) -> None:
        for key, value in cost.items():
            before = self.cost.get(key, 0.0)
            self.cost[key] = max(before, value) if "peak" in key else round(before + value, 3)

    # --- the check ------------------------------------------------------------------

    def _left(self) -> int:
        """How often the check may be run again."""
        return int(self.wanted["rounds"]) - len(self.earlier) - 1

    def _verify(self) -> tuple[Outcome, str]:
        """Run the check; done if it passes."""
        self.sweep()  # what the turn left running must not disturb
        number = len(self.earlier) + 1
        for pause in _TRIES:
            try:
                self._pause(pause)
                check = self.check = self._checking(number)
            except Exception as problem:
                self.sweep()
                outcome, why = why_not(problem)
                return outcome, f"The check of the turn was not run: {why}"
            check.run(self.halt)
            check.sweep()
            self._spend(check.cost)
            if not check.missed:
                break
        return check.verdict(number, int(self.wanted["rounds"]))

    def _checking(self, number: int) -> Check:
        """Run `number` of the check, just started."""
        attempt, line = self.attempt, self.wanted["command"]
        attempt.enter()
        dirs, env = attempt.add_dirs(), attempt.environment()
        process = verify.begin(line, attempt.orders, attempt.chosen, dirs, env)
        path = attempt.path(f"verify-{number}.txt")
        return verify.Check(line, path, process, self._time(), self.manager)

    def _again(self, check: Check) -> tuple[Outcome, str]:
        """Another turn, which is told what the check said."""
        self.thread = self.turn.reader.thread
        if self.thread is None:
            return Outcome.UNKNOWN, "Codex completed a turn without naming its thread"
        if self.tokens is not None:
            self.tokens -= self.turn.used
            if self.tokens <= 0:
                return Outcome.BUDGET, "The task's tokens (limits.task_tokens) were used up"
        output, cut = check.quoted()
        nonce, left = os.urandom(8).hex(), self._left()
        asked = prompt.unverified(self.wanted["command"], check.status, output, cut, nonce, left)
        try:
            turn = self._watched(self.attempt.again(self.thread, asked, len(self.earlier) + 2))
        except Exception as problem:
            self.sweep()
            return why_not(problem)
        answer = (self.answer or "")[:_ANSWER]
        self.earlier.append({"answer": answer, "status": check.status, "asked": asked})
        self.check = None
        return self._turn(turn)

    # --- the result -----------------------------------------------------------------

    def _write(self, outcome: Outcome, message: str) -> None:
        turn, attempt = self.turn, self.attempt
        reader = turn.reader
        thread = reader.thread or self.thread
        usage, model = self._spent(turn)
        stopped = self.check.stop_reason if self.check else turn.stop_reason
        used = cgroup.of_unit(f"codexd-worker@{attempt.id}.service")
        attempt.finish(
            outcome.value,
            message,
            thread=thread,
            turn_started=reader.turn_started or bool(self.earlier),
            items=self.items,
            usage=usage,
            model=model,
            answer=self.answer,
            exit_status=turn.status,
            stop_reason="interrupted" if outcome is Outcome.INTERRUPTED else stopped,
            stderr=turn.told[:2000].decode("utf-8", "replace"),
            cost={**self.cost, **cgroup.cost(used)},
            rounds=self.earlier,
            verified=self.check.told if self.check else None,
        )

    def _spent(self, turn: Turn) -> tuple[dict[str, int], str | None]:
        """Tokens of the whole thread, and the model; a turn that did not complete
        tells them only in its rollout."""
        usage, model = turn.reader.usage, self.attempt.orders["model"]
        thread = turn.reader.thread or (self.thread if self.earlier else None)
        if thread and not (usage and model):
            told, named = codex.spent(self.attempt.orders["home"], thread)
            usage, model = usage or told, model or named
        return usage, model
