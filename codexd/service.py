"""The daemon skeleton: one loop, signals, the manager's notices, one-line logs.

A role gives `Service.run` its round, a function that does everything there is
to do and returns the seconds until it wants to be called again.  `wake` ends
that pause from any thread or signal.  Roles contain no signal code.

SIGTERM and SIGINT set `stopping`, SIGHUP sets `reloading`: the round looks at
them.  So closing a terminal does not end what runs in it.  sdnotify swallows
every error, so it is only asked where the manager really listens.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from enum import IntEnum

import sdnotify

from codexd import clock, journal, messages

_VALUE = 4000  # characters of a value in the log
# Of a line, at most 40 kB: journald splits what is longer than 48, and would take a <N>
# at the split for a priority.
_LINE = 10_000


class Level(IntEnum):
    """syslog's priorities."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


def shown(value: object) -> str:
    """Text that cannot forge a line or steer a terminal, of a bounded length."""
    text = str(value)
    safe = text[:_VALUE].replace("\\", r"\\")
    if not safe.isprintable():
        safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in safe)
    return safe if len(text) <= _VALUE and len(safe) <= _VALUE else safe[:_VALUE] + "…"


def plain(value: object) -> str:
    """`shown`, quoted where it has blanks or quotes: nothing in it can pass for a name=value."""
    safe = shown(value)
    if safe and " " not in safe and '"' not in safe:
        return safe
    return '"' + safe.replace('"', r"\"") + '"'


_MEND = {
    errno.EISDIR: "; move it away",
    errno.ENOTDIR: "; move it away",
    errno.EEXIST: "; move it away",
    errno.ENOSPC: "; make room",
    errno.EROFS: "; mount it writable",
    errno.EACCES: "; give it to the user that codexd runs as",
}


def sentence(error: OSError) -> str:
    """Where, what, and what to do."""
    what = (error.strerror or str(error)) + _MEND.get(error.errno or 0, "")
    return f"{error.filename}: {what}" if error.filename else what


def _print(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        pass  # a log on a full disk: work goes on without it, and there is nobody to tell


def _drain(fd: int) -> None:
    try:
        os.read(fd, 4096)
    except BlockingIOError:
        pass  # somebody else has read it, as anybody may who can open the bell


class Service:
    """One per program.  `socket` is journald's."""

    def __init__(self, name: str, socket: str = journal.SOCKET) -> None:
        self.name = name
        self.stopping = False
        self.reloading = False
        self._bells: list[int] = []
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._notifier = sdnotify.SystemdNotifier() if "NOTIFY_SOCKET" in os.environ else None
        os.environ.pop("NOTIFY_SOCKET", None)  # systemd listens to us, not to what we start
        self._status = ""
        ours = journal.is_stderr(os.environ.get("JOURNAL_STREAM"))
        self._journal = journal.Journal(socket) if ours else None
        self._lost = False  # the journal's socket did not take the last record
        self._say = threading.Lock()

    def log(self, level: Level, event: str, **fields: object) -> None:
        """What happened, then name=value: a record of the journal, or a line on stderr.

        Fields called `task` and `session` can be searched for in the journal.
        """
        line = " ".join([event, *(f"{k}={plain(v)}" for k, v in fields.items() if v is not None)])
        if len(line) > _LINE:
            line = line[:_LINE] + "…"
        with self._say:
            if self._journal is None:
                _print(f"{clock.now()} {level.name.lower()} {line}")
            elif not self._sent(self._journal, self._record(level, event, line, fields)):
                _print(f"<{level.value}>{line}")

    def _record(
        self, level: Level, event: str, line: str, fields: dict[str, object]
    ) -> dict[str, str]:
        """The journal's fields."""
        record = {
            "MESSAGE": line,
            "PRIORITY": str(level.value),
            "SYSLOG_IDENTIFIER": self.name,
            "CODEXD_EVENT": event,
        }
        if event in messages.IDS:
            record["MESSAGE_ID"] = messages.IDS[event]
        for name in ("task", "session"):
            if fields.get(name) is not None:
                record[f"CODEXD_{name.upper()}"] = shown(fields[name])
        return record

    def _sent(self, to: journal.Journal, record: dict[str, str]) -> bool:
        """Whether the journal has it; if not, why is told once."""
        try:
            to.send(record)
        except OSError as error:
            if not self._lost:
                _print(f"<{Level.WARNING.value}>journal.lost why={plain(error)}")
            self._lost = True
        else:
            self._lost = False
        return not self._lost

    @property
    def bell(self) -> int:
        """A descriptor: a byte written to it ends the pause, also from another process."""
        return self._write

    def listen(self, fd: int) -> None:
        """Let the pause end when `fd`, which does not block, has something to read."""
        self._bells.append(fd)

    def wake(self) -> None:
        """End the pause between two rounds."""
        try:
            os.write(self._write, b".")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups already

    def _signal(self, number: int, _frame: object) -> None:
        self.stopping |= number in (signal.SIGTERM, signal.SIGINT)
        self.reloading |= number == signal.SIGHUP
        self.wake()

    def catch_signals(self) -> None:
        """From now on a signal only wakes us.  To be done before anybody hears of `ready`."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, self._signal)

    def run(self, step: Callable[[], float]) -> None:
        """Call `step` until it raises StopIteration."""
        self.catch_signals()
        poll = select.poll()
        for fd in (self._read, *self._bells):
            poll.register(fd, select.POLLIN)
        while True:
            try:
                pause = step()
            except StopIteration:
                return
            self.notify("WATCHDOG=1")
            for fd, _ in poll.poll(max(0.0, pause) * 1000):
                _drain(fd)

    def notify(self, message: str) -> None:
        if self._notifier:
            # It sends text as Latin-1, or in silence not at all; systemd takes UTF-8.
            self._notifier.notify(message.encode().decode("latin-1"))

    def ready(self) -> None:
        self.notify("READY=1")

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows; said only when it changes."""
        if text != self._status:
            self._status = text
            self.notify(f"STATUS={shown(text)}")
