"""Whether Codex's sandbox works where workers run: tried at start, and for each new Codex.

Part of the master, whose own unit has no namespaces to try it in; so a worker is
ordered that runs no turn.  What was found before is forgotten then, for the admin may
have changed the unit.  Where the sandbox does not work, the gate closes at once; every
worker looks at it again, so that nothing is run without one in silence, and the gate
opens when it works.

Only for workers that are units: a child process is what the first task finds.
"""

from __future__ import annotations

from codexd import canary, exits, place, spool
from codexd.config import Config
from codexd.gate import Keeper
from codexd.launcher import Launcher
from codexd.model import Sandbox
from codexd.outcome import Outcome


class Probe:
    """One try at a time."""

    def __init__(self, config: Config, launcher: Launcher, keeper: Keeper) -> None:
        self.config = config
        self.dirs = config.dirs
        self.launcher = launcher
        self.keeper = keeper
        self.problem: str | None = None  # why the sandbox does not work
        self._tried: tuple[object, ...] = ()
        self._id: str | None = None

    @property
    def running(self) -> set[str]:
        """The id of the worker that tries, while what it left is still to be looked at."""
        return {self._id} if self._id else set()

    def tend(self, now: float) -> None:
        """Begin a try where one is due; look at one that was begun.  Raises OSError."""
        if Outcome.HOST.value not in self.keeper.closed:
            self.problem = None  # a task found out that it works again
        if self._id:
            self._look(self._id)
        elif self.launcher.survives and self.keeper.binary and self._wanted() != self._tried:
            self._begin()

    def _wanted(self) -> tuple[object, ...]:
        """What a try is good for."""
        return (*self.keeper.seen, self.config.codex.sandbox)

    def _begin(self) -> None:
        tried, sandbox = self._wanted(), self.config.codex.sandbox
        if sandbox is Sandbox.DANGER:
            self.problem, self._tried = None, tried
            return
        orders: dict[str, object] = {
            "probe": True,
            "bin": self.keeper.binary,
            "home": self.keeper.home,
            "env": self.keeper.env_keys,
            "sandbox": self.keeper.sandbox(None, sandbox),
            "sandbox_verb": self.keeper.sandbox_verb,
        }
        canary.forget(self.keeper.home)
        id = spool.new_id()
        place.begin_probe(self.dirs, id, {"attempt": 1, **orders})
        self._id, self._tried = id, tried
        self.launcher.start([id], {})

    def _look(self, id: str) -> None:
        if id in self.launcher.active():
            return
        try:
            found = place.result(self.dirs, id, 1) or {}
        except ValueError as damage:
            found = {"outcome": "host", "message": f"its result is damaged: {damage}"}
        refused, ended = self.launcher.refusal(id), self.launcher.ended(id)
        self._id = None
        self.problem = None if found.get("outcome") == "done" else str(
            found.get("message")
            or refused
            or (ended and exits.outcome(ended, exits.boot())[1])
            or "the worker that tries the sandbox was not started"
        )  # fmt: skip
        try:
            if self.problem:
                self.keeper.met(Outcome.HOST, self.problem)
            else:
                self.keeper.open(Outcome.HOST.value)
        finally:
            place.end_probe(self.dirs, id)
