"""What was used, day by day: for `codexd usage`, for status, and for the daily limit.

Owns usage/YYYY-MM-DD.json, one small file a day, written by the master alone: the
tokens of all attempts that were judged on that day, in all, by model and by
session.  So no answer depends on how long the history is.

A day is one of the daemon's time zone, as it was when the daemon was started;
an attempt that ran over midnight counts on the day on which it ended.  `applied`
names the last attempts that were added (ID/N), also those of the day before:
judged again after a crash, none of them counts twice.

Raises OSError, and ValueError for a damaged file, which the writer sets aside.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from codexd import codex, durable, sane
from codexd.model import USAGE_KEYS

Counts = dict[str, int]

COUNTED = ("attempts", *USAGE_KEYS)
UNKNOWN = "default"  # Codex's own model, of an attempt that did not tell which it is
OTHERS = "(others)"
_APPLIED = 256  # more than can be judged and not be in the ledger: workers are at most 64
_NAMES = 1000  # sessions and models of a day that are counted apart
_LIMIT = 4 << 20  # bytes of a day's file
_FILE = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})\.json", re.ASCII)


@dataclass(slots=True)
class Day:
    """What was used on one day.  `sessions` has "" for tasks that named none."""

    day: str
    total: Counts = field(default_factory=dict)
    models: dict[str, Counts] = field(default_factory=dict)
    sessions: dict[str, Counts] = field(default_factory=dict)
    applied: list[str] = field(default_factory=list)


def today(now: float) -> str:
    """The local day of `now` (epoch seconds): 2026-11-23."""
    return time.strftime("%Y-%m-%d", time.localtime(now))


def midnight(now: float) -> float:
    """When the next local day begins, also where a day has 23 or 25 hours."""
    then = time.localtime(now)
    return time.mktime((then.tm_year, then.tm_mon, then.tm_mday + 1, 0, 0, 0, 0, 0, -1))


def whole(counts: Mapping[str, int]) -> Counts:
    """Every count, and `tokens`: what counts against a limit."""
    return {**{k: counts.get(k, 0) for k in COUNTED}, "tokens": codex.tokens(counts)}


def add(counts: Counts, more: Mapping[str, int]) -> None:
    for key in COUNTED:
        counts[key] = counts.get(key, 0) + more.get(key, 0)


def folded(days: Iterable[Day], by: str) -> dict[str, Counts]:
    """Several days added up: by "day", "session" or "model"."""
    found: dict[str, Counts] = {}
    for day in days:
        tables = {"day": {day.day: day.total}, "session": day.sessions, "model": day.models}
        for name, counts in tables[by].items():
            add(found.setdefault(name, {}), counts)
    return found


# --- files ----------------------------------------------------------------------


def path_of(directory: Path, day: str) -> Path:
    return directory / f"{day}.json"


def days(directory: Path, most: int) -> list[str]:
    """The last days that have a file, the newest first; at most so many."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []  # no daemon has served yet
    return sorted((m[1] for n in names if (m := _FILE.fullmatch(n))), reverse=True)[:most]


def load(directory: Path, day: str) -> Day:
    """One day; empty if nothing was used.  Raises OSError, ValueError."""
    path = path_of(directory, day)
    try:
        data = durable.read_json(path, _LIMIT)
    except FileNotFoundError:
        return Day(day)
    applied = data.get("applied")
    if data.get("day") != day or not isinstance(applied, list):
        raise ValueError(f"{path}: it is not the use of that day")
    models, sessions = _table(path, data.get("models")), _table(path, data.get("sessions"))
    return Day(day, _counts(path, data.get("total")), models, sessions, [str(a) for a in applied])


def _table(path: Path, value: object) -> dict[str, Counts]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a table is missing")
    return {name: _counts(path, counts) for name, counts in value.items()}


def _counts(path: Path, value: object) -> Counts:
    if not isinstance(value, dict) or not all(map(sane.is_total, value.values())):
        raise ValueError(f"{path}: something else than counts in it")
    return {k: value[k] for k in COUNTED if k in value}


# --- writing ----------------------------------------------------------------------


class Spend:
    """Today's use; the one writer.  `add` is in memory, `save` makes it durable."""

    def __init__(self, directory: Path, told: Callable[..., None]) -> None:
        """`told` is the master's log."""
        self.directory = directory
        self.told = told
        self.day: Day | None = None  # as last looked at
        self._unsaved = False

    def at(self, now: float) -> Day:
        """The day of `now`; what was not saved of the day before is saved first."""
        name = today(now)
        if self.day is None:
            # The latest there is knows what was judged last, also before a long pause.
            self.day = self._load(next(iter(days(self.directory, 1)), name))
        if self.day.day != name:
            self.save()
            before, self.day = self.day, self._load(name)
            self.day.applied = [*before.applied, *self.day.applied][-_APPLIED:]
        return self.day

    def _load(self, day: str) -> Day:
        try:
            return load(self.directory, day)
        except ValueError as damage:
            kept = durable.set_aside(path_of(self.directory, day))
            self.told("usage.damaged", why=damage, kept=kept, then="the day begins at zero")
            return Day(day)

    def add(
        self, attempt: str, session: str | None, model: str | None, used: Mapping[str, int],
        now: float,
    ) -> None:  # fmt: skip
        """Count what an attempt (ID/N) used; once, however often it is said."""
        day = self.at(now)
        if attempt in day.applied:
            return
        more = {**used, "attempts": 1}
        for counts in (
            day.total,
            _row(day.models, model or UNKNOWN),
            _row(day.sessions, session or ""),
        ):
            add(counts, more)
        day.applied = [*day.applied, attempt][-_APPLIED:]
        self._unsaved = True

    def save(self) -> None:
        """Make durable what was added: before the ledger says that it was judged."""
        if self._unsaved and self.day:
            day = self.day
            told = {"day": day.day, "total": day.total, "models": day.models}
            told |= {"sessions": day.sessions, "applied": day.applied}
            durable.write_json(path_of(self.directory, day.day), told)
            self._unsaved = False


def _row(table: dict[str, Counts], name: str) -> Counts:
    if name not in table and len(table) >= _NAMES:
        name = OTHERS
    return table.setdefault(name, {})
