"""Which queued tasks may start now.  Pure: the caller has the clock and the disk.

Tasks of one session run one after another, in ledger order: only the oldest
task of a session that has not ended can start, whatever its state.  So a task
that is held or waits for its retry holds back those behind it, and a priority
orders sessions, never the tasks within one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from codexd.model import State, Task

AFTER, NOT_BEFORE = "after", "not_before"  # reasons to wait that a task's file gives


@dataclass(frozen=True, slots=True)
class Gate:
    """What holds all dispatch: reason -> the facts it was closed with.

    A closed reason with `probe` set lets one task through, to find out.
    """

    closed: Mapping[str, Mapping[str, object]]
    probes: frozenset[str] = frozenset()

    @property
    def is_open(self) -> bool:
        return not self.closed

    def width(self, slots: int, running: int) -> int:
        """How many may start: `slots` when open, one probe, or none."""
        if self.is_open:
            return max(0, slots - running)
        if set(self.closed) <= self.probes and running == 0:
            return 1
        return 0


def heads(tasks: Iterable[Task]) -> dict[str, Task]:
    """The oldest live task of each session.  `tasks` in ledger order."""
    first: dict[str, Task] = {}
    for task in tasks:
        first.setdefault(task.session_name, task)
    return first


def ready(tasks: Iterable[Task], gate: Gate, slots: int, active: Set[str]) -> list[Task]:
    """The tasks to start now, at most as many as there are free slots.

    `active` are the ids whose worker is still there: a task of them is not
    started again before it is gone, and its slot is taken.
    """
    first = heads(tasks)
    running = {t.id for t in first.values() if t.state is State.RUNNING} | active
    width = gate.width(slots, len(running))
    if not width:
        return []
    queued = [t for t in first.values() if _may_start(t) and t.id not in active]
    if gate.is_open:
        queued.sort(key=lambda task: -task.priority)  # stable: then ledger order
    else:
        # The task that met the reason may be the reason: let another find out.
        queued.sort(key=lambda task: (task.launches, -task.priority))
    return queued[:width]


def _may_start(task: Task) -> bool:
    # One that was just accepted, or released, may be bound and not wait yet.
    return task.state is State.QUEUED and not task.bound


def wait(task: Task) -> dict[str, object]:
    """The facts of the event by which a bound task waits: first for others, then for a time."""
    if task.after:
        return {"reason": AFTER}
    return {"reason": NOT_BEFORE, "until": task.not_before}
