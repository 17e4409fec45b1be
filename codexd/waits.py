"""What a task's own file makes it wait for: other tasks (`after`), a time (`not_before`).

Part of the master, which calls `tend` in every round before it starts anything.  A
bound task waits, first for the others, then for the time; when both have come, one
event frees it and puts it into the queue.  If one of those it follows has failed or
was cancelled, it fails without having run, and says whose fault that is.

Promises: all of it is recovered from the ledger; what a task that has ended came to
is read once; a round looks at the tasks that something has changed for, and at a
bounded number of them, so ten thousand that follow one cost as many lines as they are.
`codexd task release` frees a task; one that was held goes back to what it waited for.

A time is compared with the clock in each round.  A delay is counted by a clock that
nobody sets, from the acceptance or else from the start of the daemon.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from codexd import clock
from codexd.dispatch import NOT_BEFORE, wait
from codexd.finish import Finish
from codexd.ledger import Ledger
from codexd.model import Event, Kind, State, Task
from codexd.outcome import Outcome
from codexd.parents import Parents

EVENTS = 1000  # of one round
_ENDS = 32  # of them those that end a task: each writes an answer


class Waits:
    """Tasks that are bound, and what they wait for."""

    def __init__(
        self,
        ledger: Ledger,
        finish: Finish,
        record: Callable[[list[Event]], None],
        refused: Callable[..., None],
    ) -> None:
        """`refused` is told what the host would not do."""
        self.tasks = ledger.book.tasks
        self.finish = finish
        self.record = record
        self.refused = refused
        self.parents = Parents(finish.dirs, ledger)
        self._seen: set[str] = set()
        self._children: dict[str, list[str]] = {}  # of tasks that have not ended
        self._held: set[str] = set()
        self._timed: dict[str, float | None] = {}  # by clock.steady(); None: by the wall's
        self._due: dict[str, None] = {}  # to be looked at
        self._wake = math.inf

    def pause(self, now: float) -> float:
        """Seconds until there is something to do, should nothing else happen."""
        return 0.0 if self._due else self._wake - now

    def tend(self, now: float) -> None:
        """Let tasks wait, free them, or end them."""
        self._meet(now)
        self._look(now)
        events: list[Event] = []
        done: list[str] = []
        for id in self._due:
            task = self.tasks.get(id)
            try:
                events += self._next(task, now) if task and task.bound else ()
                done.append(id)
            except OSError as error:
                self.refused(error, task=id)
            ends = sum(e.kind is Kind.FAILED for e in events)
            if len(events) >= EVENTS or ends >= _ENDS:
                break
        self.record(events)
        for id in done:
            del self._due[id]

    # --- whom something has changed for -------------------------------------------

    def _meet(self, now: float) -> None:
        """Tasks that were accepted since; new ones are last in the book."""
        fresh = []
        for task in reversed(self.tasks.values()):
            if task.id in self._seen:
                break
            fresh.append(task)
        for task in reversed(fresh):
            self._seen.add(task.id)
            if task.bound:
                self._due[task.id] = None
                for parent in task.after:
                    self._children.setdefault(parent, []).append(task.id)
                if task.not_before:
                    self._timed[task.id] = _ends(task, now)
        if len(self._seen) > 2 * len(self.tasks) + EVENTS:
            self._seen.intersection_update(self.tasks)

    def _look(self, now: float) -> None:
        for parent in [p for p in self._children if p not in self.tasks and self._has_ended(p)]:
            self._due.update(dict.fromkeys(self._children.pop(parent)))
        for id in [i for i in self._held if not self._is_held(i)]:
            self._held.discard(id)
            self._due[id] = None
        self._wake = math.inf
        first, clock_now = "", clock.now()
        for id, at in list(self._timed.items()):
            task = self.tasks.get(id)
            if task is None or not task.not_before:
                del self._timed[id]
            elif task.reason != NOT_BEFORE:
                continue
            elif _has_come(task, at, now, clock_now):
                self._due[id] = None
            elif at is not None:
                self._wake = min(self._wake, at)
            elif not first or task.not_before < first:
                first = task.not_before
        if first:
            self._wake = min(self._wake, now + clock.epoch(first) - time.time())

    def _has_ended(self, parent: str) -> bool:
        """Else the ledger has lost it, and another may take its place."""
        try:
            return self.parents.came_to(parent) is not None
        except OSError:
            return True  # it is told of each that follows it

    def _is_held(self, id: str) -> bool:
        return id in self.tasks and self.tasks[id].reason == "hold"

    # --- what is to be done ---------------------------------------------------------

    def _next(self, task: Task, now: float) -> list[Event]:
        """The events that take a bound task on."""
        ended = {p: told for p in task.after if (told := self.parents.came_to(p))}
        for parent, told in ended.items():
            if told["state"] != State.DONE:
                return [self._fail(task, parent, told)]
        if task.state is State.WAITING and task.reason == "hold":
            self._held.add(task.id)
            return []
        at = clock.now()
        if len(ended) < len(task.after):
            return [] if task.state is State.WAITING else [_event(at, Kind.WAITING, task)]
        if task.not_before and not _has_come(task, self._timed.get(task.id), now, at):
            if task.reason == NOT_BEFORE:
                return []
            only = {"reason": NOT_BEFORE, "until": task.not_before}
            return [Event(at, Kind.WAITING, task.id, only)]
        free = Event(at, Kind.QUEUED, task.id, {"freed": True})
        return [free] if task.state is State.WAITING else [_event(at, Kind.WAITING, task), free]

    def _fail(self, task: Task, parent: str, told: Mapping[str, object]) -> Event:
        what = told.get("title") or told.get("file")
        name = f"{parent} ({str(what)[:60]})" if what and parent not in str(what) else parent
        came = str(told["state"])
        if told.get("outcome") not in (None, came):
            came += f" ({told['outcome']})"
        why = f": {str(told['message'])[:300]}" if told.get("message") else ""
        facts = {
            "outcome": Outcome.DEPENDENCY.value,
            "message": f"it follows task {name}, which is {came}{why}",
        }
        return self.finish.end(task, Kind.FAILED, facts)


def _event(at: str, kind: Kind, task: Task) -> Event:
    return Event(at, kind, task.id, wait(task))


def _ends(task: Task, now: float) -> float | None:
    """When a delay is over, by clock.steady(); None for a time."""
    if task.delay is None or task.not_before is None:
        return None
    return now + clock.left(task.not_before, task.delay)


def _has_come(task: Task, at: float | None, now: float, clock_now: str) -> bool:
    # Both are the same form of text, whose order is that of time.
    return now >= at if at is not None else str(task.not_before) <= clock_now
