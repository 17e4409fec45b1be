"""Who is told of what: events that a hook is owed, and which of them is told next.

An event (a task that ended, a file that was rejected, the gate that closed or opened)
is owed from the very batch of the ledger that says it, until a hook has taken it
(`told`) or it is given up (`untold`).  Of one task, and of one reason of the gate, the
next event waits until the one before is settled.

Nothing here looks at the wall clock but to print it: how often an event is tried, and
how many may be owed, are numbers, so a clock that jumps gives nothing up.

Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from zlib import crc32

from codexd.model import Event, Kind, Note

MOST = 10_000  # events owed; beyond them the oldest are given up
TRIES = 150  # of one event: about a day with the default retry.cap
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_NOT_TOLD = ("usage", "cost")


class Occasion(StrEnum):
    """What a hook can be told: the ledger's own words."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    CLOSED = "closed"
    OPENED = "opened"

    @property
    def of_task(self) -> bool:
        return self in (Occasion.DONE, Occasion.FAILED, Occasion.CANCELLED)


@dataclass(frozen=True, slots=True)
class Owed:
    """One event that nobody took yet.

    `id` is the task's; of an event that is of no task, one that is made for it.
    `about` is what its order counts for.
    """

    id: str
    occasion: Occasion
    at: str
    about: str
    facts: Mapping[str, object]
    tries: int = 0
    until: str | None = None

    @property
    def key(self) -> str:
        """The event's id, the same however often it is told."""
        return f"{self.id}.{self.occasion}"


def owing(
    events: Iterable[Event], wanted: Collection[Occasion], gate: Collection[str]
) -> list[Event]:
    """The lines that go into the ledger with `events`: what is owed because of them.

    `gate` are the reasons for which it was closed before: said again, with another
    `until`, a reason is no news.
    """
    found, closed = [], set(gate)
    for event in events:
        occasion = _OCCASIONS.get(event.kind)
        reason = str(event.facts.get("reason"))
        news = event.kind is not Note.CLOSED or reason not in closed
        if event.kind is Note.CLOSED:
            closed.add(reason)
        elif event.kind is Note.OPENED:
            closed.discard(reason)
        if occasion in wanted and news:
            facts = {} if event.id else {k: v for k, v in event.facts.items() if k != "event"}
            key = f"{event.id or _minted(event)}.{occasion}"
            found.append(Event(event.at, Note.OWED, facts={"event": key, **facts}))
    return found


_OCCASIONS: Mapping[Kind | Note, Occasion] = {
    kind: Occasion(kind)
    for kind in (Kind.DONE, Kind.FAILED, Kind.CANCELLED, Note.REJECTED, Note.CLOSED, Note.OPENED)
}


def _minted(event: Event) -> str:
    """An id in the form of a task's, for an event of no task; the same each time."""
    date, _, time = event.at.partition("T")
    rest, digits = crc32(repr(event).encode("utf-8", "replace")), ""
    for _ in range(7):
        rest, digit = divmod(rest, 36)
        digits += _DIGITS[digit]
    return f"{date.replace('-', '')}t{time[:8].replace(':', '')}-{time[9:12]}{digits}"


def owed(event: Event) -> Owed:
    """What an `owed` line says.  Raises ValueError."""
    facts = dict(event.facts)
    id, _, occasion = str(facts.pop("event", "")).partition(".")
    about = f"gate {facts.get('reason')}" if occasion in ("closed", "opened") else id
    return Owed(id, Occasion(occasion), event.at, about, facts)


def settle(book: dict[str, Owed], event: Event) -> None:
    """Add a line of a delivery to what is owed.  Raises ValueError."""
    key = str(event.facts.get("event"))
    if event.kind is Note.OWED:
        book[key] = owed(event)
    elif event.kind is Note.DEFERRED and key in book:
        tries, until = event.facts.get("tries"), event.facts.get("until")
        book[key] = replace(
            book[key],
            tries=tries if isinstance(tries, int) else 0,
            until=until if isinstance(until, str) else None,
        )
    elif event.kind in (Note.TOLD, Note.UNTOLD):
        book.pop(key, None)


def choose(
    owed: Iterable[Owed],
    busy: Collection[str],
    ready: Mapping[Occasion, int],
    not_yet: Collection[str],
) -> list[Owed]:
    """What to tell now, at most `ready` of each occasion.

    `busy` are the keys being told, `not_yet` those whose pause is not over.  Those
    that were tried least come first: one that is never taken holds up no others.
    """
    seen: set[str] = set()
    able: list[Owed] = []
    for one in owed:
        if one.about in seen:
            continue  # an earlier one of it is owed
        seen.add(one.about)
        if one.key not in busy and one.key not in not_yet and ready.get(one.occasion, 0) > 0:
            able.append(one)
    room, found = dict(ready), []
    for one in sorted(able, key=lambda one: one.tries):
        if room[one.occasion] > 0:
            room[one.occasion] -= 1
            found.append(one)
    return found


def story(one: Owed, task: Mapping[str, object] | None) -> dict[str, object]:
    """What the hook reads: a task as the contract has it, else the event's facts."""
    if task is not None:
        return dict(task)
    facts = {k: v for k, v in one.facts.items() if k not in _NOT_TOLD}
    return {"id": one.id, "state": one.occasion.value, "at": one.at, **facts}


def summary(one: Owed, told: Mapping[str, object]) -> str:
    """One line for a person."""
    message = str(told.get("message") or told.get("reason") or "").partition("\n")[0]
    if one.occasion is Occasion.OPENED:
        text = f"no longer held for {told.get('reason')}"
    elif one.occasion is Occasion.CLOSED:
        reason, _, profile = str(told.get("reason")).partition(":")
        who = f"tasks with profile {profile} are" if profile else "all work is"
        text = f"{who} held: {reason}: {message}"
    else:
        name = told.get("title") or told.get("file") or one.id
        why = f": {message}" if message and one.occasion is not Occasion.DONE else ""
        text = f"{name} {one.occasion}{why}"
    return "codexd: " + "".join(c if c.isprintable() else " " for c in text)[:200]
