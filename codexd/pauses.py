"""When what a closed gate is closed for is tried again: a pause for each reason.

Part of the master.  In memory alone, by a clock that nobody sets.  Of a reason that an
earlier daemon closed the gate for, the ledger knows until when, if anybody did; without
that it is tried at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from codexd import clock


class Pauses:
    """`now` is by clock.steady()."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._tries: dict[str, int] = {}  # how often each was met while it was closed

    def is_due(self, reason: str, facts: Mapping[str, object], now: float) -> bool:
        """Whether it may be tried; `facts` are those it was closed with."""
        if reason not in self._at and (left := _left(facts)):
            self.put_off(reason, left)
        return now >= self._at.get(reason, 0.0)

    def is_put_off(self, reason: str) -> bool:
        """Whether there is a pause for it already."""
        return self._at.get(reason, 0.0) > clock.steady()

    def met(self, reason: str) -> int:
        """Count that it was met; how often before."""
        tries = self._tries.get(reason, 0)
        self._tries[reason] = tries + 1
        return tries

    def put_off(self, reason: str, seconds: float) -> None:
        self._at[reason] = clock.steady() + seconds

    def end(self, reasons: Iterable[str]) -> None:
        """Let these be tried at once."""
        self._at.update(dict.fromkeys(reasons, 0.0))

    def forget(self, reason: str) -> None:
        self._at.pop(reason, None)
        self._tries.pop(reason, None)


def since(facts: Mapping[str, object]) -> float:
    """When it was closed, in epoch seconds; 0 where nobody can tell."""
    try:
        return clock.epoch(str(facts["since"]))
    except (KeyError, ValueError):
        return 0.0


def _left(facts: Mapping[str, object]) -> float:
    """Seconds until what the ledger says; never more than there were when it was written."""
    try:
        until = str(facts["until"])
        return clock.left(until, clock.epoch(until) - since(facts))
    except (KeyError, ValueError):
        return 0.0
