"""The daemon skeleton: one loop, signals, the manager's notices, one-line logs.

A role gives `Service.run` its round, a function that does everything there is
to do and returns the seconds until it wants to be called again.  `wake` ends
that pause from any thread or signal.  Roles contain no signal code.

SIGTERM and SIGINT set `stopping`, which the round looks at; SIGHUP is ignored,
so that closing a terminal does not end what runs in it.  sdnotify swallows
every error, so it is only asked where the manager really listens.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from enum import IntEnum

import sdnotify

from codexd import clock


class Level(IntEnum):
    """syslog's priorities."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


def plain(value: object) -> str:
    """Text that cannot forge a line or steer a terminal; quoted where it has blanks."""
    text = str(value)
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f'"{safe}"' if " " in safe or not safe else safe


class Service:
    """One per program."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopping = False
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._notifier = sdnotify.SystemdNotifier() if "NOTIFY_SOCKET" in os.environ else None
        self._status = ""
        self._journal = "JOURNAL_STREAM" in os.environ
        self._say = threading.Lock()

    def log(self, level: Level, event: str, **fields: object) -> None:
        """One line on stderr: what happened, then name=value."""
        parts = [f"{k}={plain(v)}" for k, v in fields.items() if v is not None]
        when = [] if self._journal else [clock.now(), level.name.lower()]
        prefix = f"<{level.value}>" if self._journal else ""
        with self._say:
            print(prefix + " ".join([*when, event, *parts]), file=sys.stderr, flush=True)

    @property
    def bell(self) -> int:
        """A descriptor: a byte written to it ends the pause, also from another process."""
        return self._write

    def wake(self) -> None:
        """End the pause between two rounds."""
        try:
            os.write(self._write, b".")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups already

    def _signal(self, number: int, _frame: object) -> None:
        if number != signal.SIGCHLD:
            self.stopping = True
        self.wake()

    def catch_signals(self) -> None:
        """From now on a signal only wakes us.  To be done before anybody hears of `ready`."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, self._signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def run(self, step: Callable[[], float]) -> None:
        """Call `step` until it raises StopIteration."""
        self.catch_signals()
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        while True:
            try:
                pause = step()
            except StopIteration:
                return
            self.notify("WATCHDOG=1")
            if poll.poll(max(0.0, pause) * 1000):
                os.read(self._read, 4096)

    def notify(self, message: str) -> None:
        if self._notifier:
            self._notifier.notify(message)

    def ready(self) -> None:
        self.notify("READY=1")

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows; said only when it changes."""
        if text != self._status:
            self._status = text
            self.notify(f"STATUS={plain(text)}")
