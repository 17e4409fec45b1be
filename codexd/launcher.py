"""Start, stop and list workers: as instances of a systemd unit, or as child processes.

The door to both; the master knows no more of a worker than what `Launcher` says.
`choose` picks: systemd where the daemon itself is a service of a manager that
has the unit codexd-worker@.service, else child processes; but never those in
codexd.service, whose protection would keep them from working.

Raises NoLauncher where codexd.yaml demands what the host does not have.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from typing import Protocol

from codexd import cgroup, config, units
from codexd.config import Config
from codexd.exits import Ended
from codexd.processes import Processes
from codexd.service import Service
from codexd.units import Units, UnitsMissing

__all__ = ["Launcher", "NoLauncher", "choose"]


_OWN = "codexd.service"


class NoLauncher(Exception):
    """The launcher that codexd.yaml demands does not work here; the text says why."""


class Launcher(Protocol):
    """What the master does with workers.

    A worker is `working` while it may still write, and `active` while anything
    of it lives.  Both raise OSError while nobody can say.
    """

    kind: str
    survives: bool  # whether workers outlive the daemon
    why: str | None  # why it is this one and not the other, where that is worth a word

    def start(self, ids: Iterable[str], limits: Mapping[str, Mapping[str, int]]) -> None:
        """Start the workers of tasks, some with limits of their own."""

    def refusal(self, id: str) -> str | None:
        """Why the host did not start this worker, told once; None: it did."""

    def working(self) -> Set[str]: ...

    def active(self) -> Set[str]: ...

    def ended(self, id: str) -> Ended | None:
        """The exit record of a worker, where the launcher keeps one."""

    def stop(self, ids: Iterable[str]) -> None:
        """Ask workers to stop Codex and write their result."""

    def kill(self, ids: Iterable[str]) -> None:
        """End what did not stop, with everything it started."""

    def tidy(self, running: Set[str]) -> None:
        """Remove what is kept of workers whose task is no longer running."""

    def pause(self, now: float) -> float:
        """Seconds until a look at what tells nobody when it ends; inf if there is none."""


def choose(config_: Config, service: Service, embedded: bool) -> Launcher:
    """The launcher for this daemon.  `embedded`: for `codexd serve`, never systemd by itself.

    Raises NoLauncher, OSError.
    """
    dirs, wanted = config_.dirs, config_.launcher
    alone = embedded or "INVOCATION_ID" not in os.environ
    why: str | None = None
    if wanted is config.Launcher.SYSTEMD or (wanted is config.Launcher.AUTO and not alone):
        try:
            return Units(dirs, service.listen)
        except UnitsMissing as problem:
            if wanted is config.Launcher.SYSTEMD:
                raise NoLauncher(f"launcher: systemd does not work here: {problem}") from problem
            if cgroup.is_of(_OWN):
                raise NoLauncher(f"{_OWN} cannot start workers: {problem}") from problem
            why = str(problem)
    if left := units.still_there(dirs):
        # Nobody would look after them, and their tasks would be run a second time.
        stop = "systemctl stop 'codexd-worker@*.service'"
        raise NoLauncher(
            f"{len(left)} workers still run as units; wait for them, or end them: {stop}"
        )
    return Processes(dirs.tasks, dirs.run, service.bell, why=why)
