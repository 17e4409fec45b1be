"""Which queued tasks may start now.  Pure: the caller has the clock and the disk.

Tasks of one session run one after another, in ledger order: only the oldest
task of a session that has not ended can start, whatever its state.  So a task
that is held or waits for its retry holds back those behind it, and a priority
orders sessions, never the tasks within one.

What a closed gate holds is told by `Gate`; what one workdir for two does, by `ready`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from codexd.model import State, Task

AFTER, NOT_BEFORE = "after", "not_before"  # reasons to wait that a task's file gives
# Reasons that hold only those who use the credential that met them.
KEYED = frozenset({"quota", "auth", "transient", "rate"})


def of_one(reason: str) -> bool:
    """Whether it holds only the tasks with the profile that it names."""
    return ":" in reason


@dataclass(frozen=True, slots=True)
class Gate:
    """What holds dispatch: reason -> the facts it was closed with.

    One of KEYED holds the tasks with the configured `profile`, or, as in `quota:work`,
    those with the one it names; any other holds all.  Those in `probes` let one task
    through, to find out, unless one in `trying` is just doing so.
    """

    closed: Mapping[str, Mapping[str, object]]
    probes: frozenset[str] = frozenset()
    trying: frozenset[str] = frozenset()
    profile: str | None = None

    def held(self, task: Task) -> frozenset[str]:
        """The reasons that hold this task."""
        return self.holding(task.profile)

    def holding(self, profile: str | None) -> frozenset[str]:
        """The reasons that hold tasks with this profile of their own."""
        used = profile or self.profile
        return frozenset(reason for reason in self.closed if self._holds(reason, used))

    def _holds(self, reason: str, profile: str | None) -> bool:
        name, _, keyed = reason.partition(":")
        return name not in KEYED or profile == (keyed or self.profile)


def heads(tasks: Iterable[Task]) -> dict[str, Task]:
    """The oldest live task of each session.  `tasks` in ledger order."""
    first: dict[str, Task] = {}
    for task in tasks:
        first.setdefault(task.session_name, task)
    return first


def ready(
    tasks: Iterable[Task],
    gate: Gate,
    slots: int,
    active: Set[str],
    apart: bool = False,
    skip: Set[str] = frozenset(),
) -> list[Task]:
    """The tasks to start now, at most as many as there are free slots.

    `active` are the ids whose worker is still there: a task of them is not
    started again before it is gone, and its slot is taken.  `apart`: no two may
    work in one directory, or one below the other.  Those in `skip` cannot start just now,
    and hold back nothing but their session.
    """
    first = heads(tasks)
    working = [t for t in first.values() if t.state is State.RUNNING or t.id in active]
    taken = len({t.id for t in working} | active)
    if taken >= slots:
        return []
    away = active | skip
    queued = [t for t in first.values() if _may_start(t) and t.id not in away]
    if gate.closed:
        queued = _let(queued, gate)
    else:
        queued.sort(key=_before)
    if apart:
        return _apart(queued, working, slots - taken)
    return queued[: slots - taken]


def _before(task: Task) -> int:
    return -task.priority  # sorting is stable: then ledger order


def _let(queued: list[Task], gate: Gate) -> list[Task]:
    """Those that nothing holds, after one for each reason that may be tried."""
    # Ten thousand may be held: each profile is looked at once.
    by_profile = {profile: gate.holding(profile) for profile in {t.profile for t in queued}}
    # Whoever else runs began before the gate closed, and finds out nothing.
    tried = set(gate.trying)
    probes = []
    # The task that met the reason may be the reason: let another find out.
    for task in sorted(queued, key=lambda task: (task.launches, -task.priority)):
        reasons = by_profile[task.profile]
        if reasons and reasons <= gate.probes and not reasons & tried:
            probes.append(task)
            tried |= reasons
    return probes + sorted((t for t in queued if not by_profile[t.profile]), key=_before)


def overlap(one: str, other: str) -> bool:
    """Whether two workdirs are one, or one lies in the other.  By their names: the master
    follows no link."""
    first, second = one.rstrip("/") + "/", other.rstrip("/") + "/"
    return first.startswith(second) or second.startswith(first)


def _apart(queued: list[Task], working: list[Task], width: int) -> list[Task]:
    """Those that come first and have their workdir for themselves.

    Whoever has to wait keeps its place as well: else one above many busy directories
    might wait for ever.
    """
    chosen: list[Task] = []
    taken: set[str] = set()
    over: set[str] = set()  # the directories that these lie in, and they themselves
    for number, task in enumerate([*working, *queued]):
        lineage = _lineage(task.workdir or "/")  # nobody knows which: then it may be any
        free = lineage[0] not in over and taken.isdisjoint(lineage)
        taken.add(lineage[0])
        over.update(lineage)
        if free and number >= len(working):
            chosen.append(task)
            if len(chosen) == width:
                break
    return chosen


def _lineage(path: str) -> list[str]:
    """An absolute path, and all that it lies in."""
    parts = [part for part in path.split("/") if part]
    return ["/" + "/".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _may_start(task: Task) -> bool:
    # One that was just accepted, or released, may be bound and not wait yet.
    return task.state is State.QUEUED and not task.bound


def wait(task: Task) -> dict[str, object]:
    """The facts of the event by which a bound task waits: first for others, then for a time."""
    if task.after:
        return {"reason": AFTER}
    return {"reason": NOT_BEFORE, "until": task.not_before}
