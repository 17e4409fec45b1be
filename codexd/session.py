"""Sessions: which Codex thread a session's name stands for, and its totals.

Owns sessions/NAME.json, one file a session, written by the master alone.  The
name is percent-encoded, so no two sessions share a file.  A damaged file is
kept aside and the session begins anew; it harms no other.

`applied` names the last attempt that was added (ID/N): adding it again after a
crash changes nothing.  `transcript` is the length of the transcript that goes
with it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from codexd import durable, sane
from codexd.model import USAGE_KEYS

_LIMIT = 1 << 20
_LONGEST = 180  # bytes of a file's stem; the rest must hold an ending and an id


@dataclass(frozen=True, slots=True)
class Session:
    """One conversation.  `reported` is what Codex last said of the whole thread.

    `forgotten` is the thread of the last reset: a turn that still runs in it then
    does not bring it back when it ends.  Nor does the task `outrun`, which had been started
    then, whatever thread its attempts come to.  `lost` is a thread that could not be continued,
    until there is another.
    """

    name: str
    thread: str | None = None
    created: str | None = None
    updated: str | None = None
    tasks: int = 0
    applied: str | None = None
    transcript: int = 0
    usage: Mapping[str, int] = field(default_factory=dict)
    used: Mapping[str, int] = field(default_factory=dict)  # by the applied attempt
    reported: Mapping[str, int] = field(default_factory=dict)
    forgotten: str | None = None
    outrun: str | None = None
    lost: str | None = None


def stem(name: str) -> str:
    """The file name, without ending, that stands for a session and no other."""
    text = quote(name, safe=" ").replace(" ", "%20")
    if text.startswith("."):
        text = "%2E" + text[1:]
    if len(text) > _LONGEST:
        # "+" is in no quoted name, so a shortened one is never another's whole one.
        text = text[: _LONGEST - 33] + "+" + hashlib.sha256(name.encode()).hexdigest()[:32]
    return text


def load(directory: Path, name: str) -> Session:
    """The session of that name; a new one if there is none yet.

    Raises OSError; ValueError when its file is damaged (see `set_aside`).
    """
    try:
        data = durable.read_json(directory / f"{stem(name)}.json", _LIMIT)
    except FileNotFoundError:
        return Session(name)
    return _checked(name, data)


def _checked(name: str, data: Mapping[str, object]) -> Session:
    def text(key: str) -> str | None:
        value = data.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"session {name}: {key} is not text")
        return value

    def number(key: str) -> int:
        value = data.get(key, 0)
        if not (isinstance(value, int) and sane.is_total(value)):
            raise ValueError(f"session {name}: {key} is not a count")
        return value

    def totals(key: str) -> dict[str, int]:
        value = data.get(key) or {}
        if not isinstance(value, dict) or not all(map(sane.is_total, value.values())):
            raise ValueError(f"session {name}: {key} is not a table of counts")
        return value

    if data.get("name") != name:
        raise ValueError(f"session {name}: the file says it is {data.get('name')!r}")
    return Session(
        name, text("thread"), text("created"), text("updated"), number("tasks"),
        text("applied"), number("transcript"),
        totals("usage"), totals("used"), totals("reported"), text("forgotten"),
        text("outrun"), text("lost"),
    )  # fmt: skip


def save(directory: Path, session: Session) -> None:
    durable.write_json(directory / f"{stem(session.name)}.json", asdict(session))


def set_aside(directory: Path, name: str) -> Path:
    """Move a damaged file out of the way; where it is now."""
    return durable.set_aside(directory / f"{stem(name)}.json")


def forget(session: Session, now: str, begun: str | None = None) -> Session:
    """The session with its thread forgotten: the next task begins a new one.

    `begun` is the id of the task of the session that has been started and has not ended.
    """
    gone, created = session.thread or session.forgotten, session.created or now
    return replace(
        session, thread=None, forgotten=gone, outrun=begun, lost=None, created=created, updated=now
    )


def lose(session: Session, now: str) -> Session:
    """The same where its thread cannot be continued, and nobody asked for a new beginning."""
    return replace(forget(session, now, session.outrun), lost=session.thread or session.lost)


def add(
    session: Session, attempt: str, thread: str | None, reported: Mapping[str, int], now: str
) -> Session:
    """The session after an attempt (ID/N); its `used` is what that attempt used.

    Codex reports totals of the thread, so the use is the difference.  Some
    versions report each run by itself: totals that shrink are taken as such.
    A total that is not reported says nothing.  Without a thread, as when Codex ended
    before it named one, the session's stays, with what was reported of it.
    """
    if session.applied == attempt:
        return session
    same = thread is not None and thread == (session.thread or session.forgotten)
    before = session.reported if same else {}
    if any(reported[k] < before.get(k, 0) for k in reported):
        before = {}
    outrun = attempt.partition("/")[0] == session.outrun
    forgotten = thread if thread and outrun else session.forgotten
    goes_on = thread if thread and thread != forgotten else session.thread
    used = {k: reported[k] - before.get(k, 0) for k in USAGE_KEYS if k in reported}
    usage = {k: session.usage.get(k, 0) + used.get(k, 0) for k in USAGE_KEYS}
    return replace(
        session,
        thread=goes_on,
        forgotten=forgotten,
        created=session.created or now,
        updated=now,
        applied=attempt,
        usage=usage,
        used=used,
        reported={**before, **reported} if thread else session.reported,
        lost=None if goes_on else session.lost,
    )


def names(directory: Path) -> list[str]:
    """All sessions, by name.  A damaged file is left out."""
    found = []
    try:
        files = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []  # no task has run yet
    for file in files:
        if file.endswith(".json") and not file.startswith("."):
            try:
                found.append(str(durable.read_json(directory / file, _LIMIT)["name"]))
            except (OSError, ValueError, KeyError):
                continue
    return sorted(found)
