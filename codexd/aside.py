"""Codex's databases, moved out of its way when they are damaged.

Part of the master.  Codex keeps an index of its threads in CODEX_HOME/*.sqlite*, and
continues none of them once that is damaged; it makes a new index from the threads'
own files when there is none.  So all of them go into CODEX_HOME/.codexd/aside-TIME/,
the last KEPT of which are kept.

Promises: only while no worker of ours is there, and while no other daemon starts Codex
on this CODEX_HOME; at most once in PAUSE, for what comes back at once has another
cause.  Until then, and where it does not help, the gate is closed (`host`).

May fail with OSError; then it is tried again.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable

from codexd import clock, codex, durable, lock
from codexd.gate import Keeper
from codexd.outcome import Outcome
from codexd.service import sentence

KEPT = 3
PAUSE = 3600.0  # seconds
_PREFIX = "aside-"


class Aside:
    """Moves them when that is due."""

    def __init__(self, keeper: Keeper, told: Callable[..., None]) -> None:
        """`told` is the master's log of errors."""
        self.keeper = keeper
        self.told = told
        self._why: str | None = None  # what Codex said of them
        self._now = ""  # when it did: the name of their place, also if it is tried again
        self._moved_at = -math.inf

    def met(self, outcome: Outcome, message: str) -> None:
        """What an attempt came to: it may be for the databases."""
        if codex.is_corrupt(outcome, message) and clock.steady() >= self._moved_at + PAUSE:
            self._now = self._now if self._why else clock.now()
            self._why = message

    def tend(self, idle: bool) -> None:
        """Move them if they are damaged; `idle` says that no worker is there."""
        if self._why is None or not idle:
            return
        home = self.keeper.home
        try:
            started = lock.hold_start(home, 0.0)
        except lock.Locked:
            return  # another daemon's; it has begun soon
        try:
            place, names = move(home, self._now)
        finally:
            os.close(started)
        why, self._why, self._moved_at = self._why, None, clock.steady()
        self.told("codex.databases", why=why, moved=" ".join(names), to=place)
        self.keeper.open(Outcome.HOST.value)
        try:
            drop_older(home)
        except OSError as error:
            self.told("not.tidied", path=error.filename, why=sentence(error))


def move(home: str, now: str) -> tuple[str, list[str]]:
    """Move the databases of the CODEX_HOME `home`: where to, and their names.

    Raises OSError; what was moved before that stays there, the rest is found again.
    """
    names = sorted(n for n in os.listdir(home) if ".sqlite" in n and not n.startswith("."))
    ours = os.path.join(home, ".codexd")
    place = os.path.join(ours, _PREFIX + now.replace(":", ""))
    os.makedirs(place, 0o700, exist_ok=True)
    for name in names:
        os.rename(os.path.join(home, name), os.path.join(place, name))
    durable.sync_directory(place)
    durable.sync_directory(home)
    return place, names


def drop_older(home: str) -> None:
    """Remove all but the last KEPT.  Raises OSError."""
    ours = os.path.join(home, ".codexd")
    older = sorted(n for n in os.listdir(ours) if n.startswith(_PREFIX))[:-KEPT]
    for name in older:
        shutil.rmtree(os.path.join(ours, name))
