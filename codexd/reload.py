"""codexd.yaml, read again while everything runs: what SIGHUP and `systemctl reload` do.

Part of the master.  A file that is wrong changes nothing: what was in force stays
in force, and the reason is told until it is mended.  Keys that only a start can
take (launcher, http) are named in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from codexd.config import Config, ConfigError
from codexd.service import Level, Service

AT_START = ("launcher", "http")


class Room(Protocol):
    """Whoever goes by the configuration."""

    config: Config


class Reload:
    """`read` gives the configuration as it is now."""

    def __init__(
        self, service: Service, read: Callable[[], Config], now: Config, rooms: Iterable[Room]
    ) -> None:
        self._service = service
        self._read = read
        self._now = now
        self._rooms = list(rooms)
        self.problem: str | None = None  # why the file was not taken

    def __call__(self) -> bool:
        """Whether there is another configuration now."""
        self._service.reloading = False
        self._service.notify("RELOADING=1")
        try:
            fresh = self._read()
        except ConfigError as error:
            self.problem = str(error)
            then = "what was in force stays in force"
            self._service.log(Level.ERROR, "config.refused", why=error, then=then)
        else:
            self.problem = None
            kept = [k for k in AT_START if getattr(fresh, k) != getattr(self._now, k)]
            told = {"file": fresh.dirs.config_file, "after_restart": ",".join(kept) or None}
            self._service.log(Level.NOTICE, "config.loaded", **told)
            for room in self._rooms:
                room.config = fresh
        self._service.ready()
        return self.problem is None
