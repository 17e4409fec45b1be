"""Codex in one turn: what it prints, and when it has to be stopped.

Owns the files events.jsonl and stderr.txt of the attempt; a further turn of it
adds to them.  Its clocks besides the time that is left for the task:
`idle_timeout` without an event, BUSY times as long while a tool is at work; GRACE
for a Codex that has ended its turn and stays.  Where the task has a budget, what
the turn has used is looked at every COUNT seconds.

Keeps the lock that Codex was started under until it has named its thread, for then it
has opened its databases, but no longer than STARTING.

Raises OSError when its files cannot be made.  Lean: the worker uses it.
"""

from __future__ import annotations

import os
import time

from codexd.child import Child, Kept
from codexd.codex import Meter, Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from codexd.service import Service

GRACE = 10.0  # seconds for Codex to exit after the turn has ended
BUSY = 6.0  # idle timeouts without an event while a tool is at work
STARTING = 5.0  # seconds for Codex to name its thread while others wait to start
COUNT = 1.0  # seconds between looks at the tokens
STDERR_KEPT = 1 << 20
EVENTS_KEPT = 256 << 20
_HEAD = 8192  # bytes of the beginning and of the end of stderr that are looked at


class Turn(Child):
    """One run of Codex."""

    def __init__(
        self,
        place: str,
        orders: dict[str, Any],
        pid: int,
        out: int,
        err: int,
        manager: Service | None,
        starting: int | None = None,
    ) -> None:
        """Of the process `pid`, whose output and errors come from two pipes.

        `place` is the attempt's directory, where they are kept; of the `orders`,
        timeout and tokens are what this turn may use.  `starting` is the lock that
        the process was started under, which is closed here.
        """
        pipes = {out: self._output, err: self._errors}
        super().__init__(pid, pipes, float(orders["timeout"]), manager)
        self.reader = Reader()
        self.idle = float(orders["idle_timeout"])
        self._starting = starting
        self.head = self.tail = b""
        self._events = Kept(os.path.join(place, "events.jsonl"), EVENTS_KEPT)
        self._stderr = Kept(os.path.join(place, "stderr.txt"), STDERR_KEPT)
        self.heard = self.began
        self.ended_at: float | None = None
        self.tokens: int | None = orders.get("tokens")
        self._meter = None if self.tokens is None else Meter(orders["home"], orders["thread"])
        self._count_at = self.heard

    @property
    def told(self) -> bytes:
        """What is looked at of standard error."""
        return self.head if self.head.startswith(self.tail) else self.head + b"\n" + self.tail

    @property
    def used(self) -> int:
        """Tokens of this turn, if it has a budget."""
        return self._meter.look(self.reader.thread) if self._meter else 0

    # --- what comes in --------------------------------------------------------

    def _output(self, data: bytes) -> None:
        self._events.add(data)
        if self.reader.feed(data):
            self.heard = time.monotonic()
        if self.reader.thread:
            self._let_others_start()
        if not self.reader.ended:
            self.ended_at = None  # a turn that failed may be followed by another
        elif self.ended_at is None:
            self.ended_at = time.monotonic()

    def _errors(self, data: bytes) -> None:
        self._stderr.add(data)
        if len(self.head) < _HEAD:
            self.head += data[: _HEAD - len(self.head)]
        self.tail = (self.tail + data)[-_HEAD:]

    def _let_others_start(self) -> None:
        if self._starting is not None:
            os.close(self._starting)
            self._starting = None

    def close(self) -> None:
        self._let_others_start()
        self._events.close()
        self._stderr.close()
        self.reader.finish()

    # --- the clocks -----------------------------------------------------------

    def doing(self) -> str:
        return self.reader.activity

    @property
    def _silence(self) -> float:
        """Seconds without an event that are too many."""
        return self.idle * BUSY if self.reader.busy else self.idle

    def due(self, now: float) -> str | None:
        if now >= self.began + STARTING:
            self._let_others_start()
        if self.ended_at is not None:
            return "grace" if now >= self.ended_at + GRACE else None
        if now >= self.deadline:
            return "timeout"
        if now >= self.heard + self._silence:
            return "stall"
        return "budget" if self._overspent(now) else None

    def looks(self) -> list[float]:
        if self.ended_at is not None:
            return [self.ended_at + GRACE]
        ends = [self.deadline, self.heard + self._silence]
        if self._starting is not None:
            ends.append(self.began + STARTING)
        return ends if self._meter is None else [*ends, self._count_at]

    def _overspent(self, now: float) -> bool:
        if self.tokens is None or now < self._count_at:
            return False
        self._count_at = now + COUNT
        return self.used >= self.tokens
