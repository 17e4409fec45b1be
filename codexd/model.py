"""The values every room shares: requests, tasks, events, and how they change.

Pure: no I/O, no clock, no process.  A task is a fold over its ledger events:
`apply` takes the task as it was and one event and returns the task as it is.
TRANSITIONS is the whole state machine; a pair without a row cannot happen and
raises `IllegalEvent`, which replay reports and does not act on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum

from codexd.outcome import Outcome
from codexd.sane import misfit, word

# One pattern for file names, routes, unit instances and the polkit rule.
ID_PATTERN = r"[0-9]{8}t[0-9]{6}-[0-9a-z]{10}"
ID_LENGTH = 26
_ID = re.compile(ID_PATTERN, re.ASCII)


def is_id(text: str) -> bool:
    """Whether `text` is a well-formed task id."""
    return _ID.fullmatch(text) is not None


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in ENDED


ENDED = frozenset({State.DONE, State.FAILED, State.CANCELLED})


class Kind(StrEnum):
    """What one ledger line about a task says."""

    QUEUED = "queued"
    RUNNING = "running"
    STOPPING = "stopping"  # cancelled while running; the worker is being stopped
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Note(StrEnum):
    """What one ledger line about the daemon itself says."""

    STARTED = "started"
    STOPPED = "stopped"
    ROTATED = "rotated"  # this file goes on from an older one
    REJECTED = "rejected"  # a file that never became a task
    REPEATED = "repeated"  # same key and content: the first task's id stands
    CLOSED = "closed"  # the gate, with reason and until
    OPENED = "opened"
    RESET = "reset"  # a session's thread was forgotten
    OWED = "owed"  # an event that a hook has to be told
    TOLD = "told"  # it was
    DEFERRED = "deferred"  # the hook failed, and is tried again
    UNTOLD = "untold"  # given up


TRANSITIONS: Mapping[tuple[State | None, Kind], State] = {
    (None, Kind.QUEUED): State.QUEUED,
    (State.QUEUED, Kind.RUNNING): State.RUNNING,
    (State.QUEUED, Kind.WAITING): State.WAITING,
    (State.QUEUED, Kind.CANCELLED): State.CANCELLED,
    (State.QUEUED, Kind.FAILED): State.FAILED,
    (State.RUNNING, Kind.STOPPING): State.RUNNING,
    (State.RUNNING, Kind.QUEUED): State.QUEUED,
    (State.RUNNING, Kind.WAITING): State.WAITING,
    (State.RUNNING, Kind.DONE): State.DONE,
    (State.RUNNING, Kind.FAILED): State.FAILED,
    (State.RUNNING, Kind.CANCELLED): State.CANCELLED,
    (State.WAITING, Kind.QUEUED): State.QUEUED,
    (State.WAITING, Kind.WAITING): State.WAITING,
    (State.WAITING, Kind.CANCELLED): State.CANCELLED,
    (State.WAITING, Kind.FAILED): State.FAILED,
}


class Resume(StrEnum):
    """Whether a task continues its session's Codex thread."""

    AUTO = "auto"  # continue if there is one
    ALWAYS = "always"  # fail if there is none
    NEVER = "never"  # start a new one; the session continues in it


class Sandbox(StrEnum):
    """Codex's sandbox modes, from the narrowest; `order` compares them."""

    READ_ONLY = "read-only"
    WORKSPACE_WRITE = "workspace-write"
    DANGER = "danger-full-access"

    @property
    def order(self) -> int:
        return list(Sandbox).index(self)


@dataclass(frozen=True, slots=True)
class Request:
    """What a task file asks for.  Times in seconds; None: the configured value."""

    prompt: str
    session: str | None = None
    workdir: str | None = None
    model: str | None = None
    profile: str | None = None
    sandbox: Sandbox | None = None
    resume: Resume = Resume.AUTO
    timeout: float | None = None
    idle_timeout: float | None = None
    priority: int = 5
    after: tuple[str, ...] = ()  # ids or keys of tasks that must be done first
    not_before: str | None = None  # as it was written; see `when`
    attempts: int | None = None
    key: str | None = None
    title: str | None = None
    images: tuple[str, ...] = ()
    add_dirs: tuple[str, ...] = ()
    output_schema: str | None = None
    memory: bool = True
    verify: Mapping[str, object] | None = None  # command, and rounds: its most runs
    limits: Mapping[str, int] | None = None  # memory in bytes, cpu in percent of one, tasks

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Request:
        """Read back what `to_json` wrote; unknown keys of a newer version are dropped.

        Raises ValueError, TypeError.
        """
        known = {f.name for f in fields(cls)}
        values: dict[str, object] = {k: v for k, v in data.items() if k in known}
        if wrong := misfit(values, _ASKED, texts=True):
            raise ValueError(wrong)
        if values.get("prompt") is None:
            raise ValueError("prompt: it is missing")
        for name in ("images", "add_dirs", "after"):
            found = values.get(name)
            values[name] = tuple(found) if isinstance(found, (list, tuple)) else ()
        for name in ("limits", "verify"):
            given = values.get(name)
            values[name] = dict(given) if isinstance(given, Mapping) else None
        if values.get("sandbox") is not None:
            values["sandbox"] = word(Sandbox, "sandbox", values["sandbox"])
        values["resume"] = word(Resume, "resume", values.get("resume", "auto"))
        return cls(**values)  # type: ignore[arg-type]


_ASKED: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "session", "workdir", "model", "profile", "sandbox"), str),
    **dict.fromkeys(("resume", "not_before", "key", "title", "output_schema"), str),
    **dict.fromkeys(("timeout", "idle_timeout"), (int, float)),
    **dict.fromkeys(("priority", "attempts"), int),
    **dict.fromkeys(("images", "add_dirs", "after"), (list, tuple)),
    **dict.fromkeys(("verify", "limits"), Mapping),
    "memory": bool,
}

USAGE_KEYS = (
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "reasoning_output_tokens",
)
COST_KEYS = ("cpu_seconds", "memory_peak_bytes", "io_read_bytes", "io_write_bytes")


@dataclass(frozen=True, slots=True)
class Task:
    """One accepted request as the ledger's events tell it.

    Times are RFC 3339 UTC text with milliseconds.  `launches` numbers the
    attempt directories (N); `attempts` counts those that count against the
    limit, `interruptions` those that do not; `refusals` those of the latter that met an
    open gate, after another task had shown that it may be open.  `after` are the ids of tasks that
    must be done before it starts, `not_before` is the time before which it does not;
    `delay` is how many seconds that was when it was accepted, if it was no time.
    """

    id: str
    state: State = State.QUEUED
    session: str | None = None
    priority: int = 5
    file: str | None = None
    title: str | None = None
    key: str | None = None
    retry_of: str | None = None
    workdir: str | None = None
    profile: str | None = None
    created: str | None = None
    started: str | None = None
    ended: str | None = None
    outcome: Outcome | None = None
    message: str | None = None
    until: str | None = None
    reason: str | None = None
    launches: int = 0
    attempts: int = 0
    interruptions: int = 0
    refusals: int = 0
    limit: int = 3
    cancel: bool = False
    after: tuple[str, ...] = ()
    not_before: str | None = None
    delay: float | None = None
    thread: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)

    @property
    def session_name(self) -> str:
        """A task without a session has one of its own, named by its id."""
        return self.session or self.id

    @property
    def bound(self) -> bool:
        """Whether it may not start yet, for its own file says so."""
        return bool(self.after or self.not_before)


@dataclass(frozen=True, slots=True)
class Event:
    """One ledger line.  `id` is empty for a Note."""

    at: str
    kind: Kind | Note
    id: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)


class IllegalEvent(ValueError):
    """An event that the table has no row for, or that says what cannot be."""


_TEXTS = ("session", "file", "title", "key", "retry_of", "workdir", "profile", "created", "started",
          "ended", "outcome", "message", "until", "reason", "not_before", "thread")  # fmt: skip
_NUMBERS = ("priority", "launches", "attempts", "interruptions", "refusals", "limit")
FACTS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(_TEXTS, str),
    **dict.fromkeys(_NUMBERS, int),
    "cancel": bool,
    "after": (list, tuple),
    "delay": (int, float),
    "usage": Mapping,
    "cost": Mapping,
}


def check(facts: Mapping[str, object]) -> None:
    """Raise IllegalEvent for a fact of a task that is of the wrong type.

    Whatever wrote it, the table of tasks must hold nothing that its readers stumble over.
    """
    if wrong := misfit(facts, FACTS):
        raise IllegalEvent(wrong)


def apply(task: Task | None, event: Event) -> Task:
    """The task after `event`.

    Facts are fields of the task: the last value stands.  A fact of None says
    nothing, as in the ledger, where it is not written; only `fresh` unsets the
    thread, and `freed` what bound the task.  What only means something while a
    task waits (until, reason) is cleared by every move.

    Raises IllegalEvent where TRANSITIONS has no row, or a fact is of the wrong type.
    """
    if not isinstance(event.kind, Kind):
        raise IllegalEvent(f"{event.kind} is not about a task")
    state = TRANSITIONS.get((task.state if task else None, event.kind))
    if state is None:
        was = task.state if task else "no task"
        raise IllegalEvent(f"{event.id}: {event.kind} does not follow {was}")
    if task is None and "file" not in event.facts:
        # Queued again, but its first line is lost: nobody knows what it asks for.
        raise IllegalEvent(f"{event.id}: queued before it was accepted")
    check(event.facts)
    facts = {k: v for k, v in event.facts.items() if k in FACTS and v is not None}
    if "outcome" in facts:
        facts["outcome"] = Outcome(str(facts["outcome"]))
    if isinstance(after := facts.get("after"), list):  # as JSON has it
        facts["after"] = tuple(after)
    if event.kind is not Kind.STOPPING:
        facts = {"until": None, "reason": None, **facts}
    if event.facts.get("fresh"):
        facts["thread"] = None
    if event.facts.get("freed"):
        facts |= {"after": (), "not_before": None, "delay": None}
    if event.kind is Kind.RUNNING:
        facts = {"message": None, "started": (task and task.started) or event.at, **facts}
    if state.ended:
        facts = {"ended": event.at, **facts}
    base = task or Task(id=event.id, created=event.at)
    return replace(base, state=state, **facts)  # type: ignore[arg-type]


def to_json(task: Task, answer: str | None, answer_file: str | None) -> dict[str, object]:
    """The contract's view of a task: every key always, None where unknown."""
    return {
        "id": task.id,
        "state": task.state.value,
        "outcome": task.outcome.value if task.outcome else None,
        "message": task.message or _awaited(task),
        "until": task.until,
        "reason": task.reason,
        "session": task.session_name,
        "title": task.title,
        "file": task.file,
        "key": task.key,
        "retry_of": task.retry_of,
        "priority": task.priority,
        "attempts": task.attempts,
        "created": task.created,
        "started": task.started,
        "ended": task.ended,
        "workdir": task.workdir,
        "thread": task.thread,
        "answer": answer,
        "answer_file": answer_file,
        "usage": {k: task.usage.get(k) for k in USAGE_KEYS},
        "cost": {k: task.cost.get(k) for k in COST_KEYS},
    }


def _awaited(task: Task) -> str | None:
    """What a task says that waits for others and has not run."""
    if task.state is not State.WAITING or not task.after:
        return None
    more = f" and {len(task.after) - 3} more" if len(task.after) > 3 else ""
    return f"it follows {', '.join(task.after[:3])}{more}"
