"""Whether Codex's sandbox works where workers run: tried at start, and for each new Codex.

Part of the master, whose own unit has no namespaces to try it in; so a worker is
ordered that runs no turn.  Where the sandbox does not work, the gate closes at
once; every worker looks at it again, so that nothing is run without one in
silence, and the gate opens when it works.

Only for workers that are units: a child process is what the first task finds.
"""

from __future__ import annotations

from codexd import exits, place, spool
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

    def tend(self, now: float) -> None:
        """Begin a try where one is due; look at one that was begun.  Raises OSError."""
        if self._id:
            self._look(self._id)
        elif self.launcher.survives and self.keeper.binary and self._wanted() != self._tried:
            self._begin()

    def _wanted(self) -> tuple[object, ...]:
        """What a try is good for."""
        return (*self.keeper.seen, self.config.codex.sandbox)

    def _begin(self) -> None:
        self._tried = self._wanted()
        sandbox = self.config.codex.sandbox
        if sandbox is Sandbox.DANGER:
            self.problem = None
            return
        id = spool.new_id()
        (self.dirs.tasks / id).mkdir(mode=0o750)
        orders: dict[str, object] = {
            "probe": True,
            "bin": self.keeper.binary,
            "home": self.keeper.home,
            "env": self.keeper.env_keys,
            "sandbox": self.keeper.sandbox(None, sandbox),
        }
        place.begin_attempt(self.dirs, id, 1, {"attempt": 1, **orders})
        self._id = id
        self.launcher.start([id], {})

    def _look(self, id: str) -> None:
        if id in self.launcher.active():
            return
        self._id = None
        refused, ended = self.launcher.refusal(id), self.launcher.ended(id)
        try:
            found = place.result(self.dirs, id, 1) or {}
        except ValueError as damage:
            found = {"outcome": "host", "message": f"its result is damaged: {damage}"}
        self.problem = None if found.get("outcome") == "done" else str(
            found.get("message")
            or refused
            or (ended and exits.outcome(ended, exits.boot())[1])
            or "the worker that tries the sandbox was not started"
        )  # fmt: skip
        spool.discard(self.dirs, id)
        if self.problem:
            self.keeper.met(Outcome.HOST, self.problem)
        else:
            self.keeper.open(Outcome.HOST.value)
