"""Codex running: its process, its two pipes, its clocks, and how it is ended.

Owns the process group of Codex from its start to its end, and the files
events.jsonl and stderr.txt of the attempt.  Promises: whatever Codex does, the
turn ends, and at its end nothing is left that Codex or its tools started, in
whatever session.  The clocks are monotonic: `timeout` for the whole turn;
`idle_timeout` without an event, off while a tool is at work; GRACE for a Codex
that has ended its turn and stays.  Where the task has a budget, what the turn
has used is looked at every COUNT seconds.

Raises OSError when Codex cannot be started.  Lean: the worker uses it.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import time

from codexd import durable
from codexd.codex import Meter, Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from codexd.service import Service

STEPS = ((signal.SIGINT, 5.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0))
GRACE = 10.0  # seconds for Codex to exit after the turn has ended
BEAT = 30.0  # seconds between signs of life to systemd; its WatchdogSec= is longer
COUNT = 1.0  # seconds between looks at the tokens
CLEANUP = 5.0  # seconds for what Codex left behind to be gone
STDERR_KEPT = 1 << 20
EVENTS_KEPT = 256 << 20
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_HEAD = 8192  # bytes of the beginning and of the end of stderr that are looked at


class Turn:
    """One run of Codex."""

    def __init__(
        self,
        place: str,
        orders: dict[str, Any],
        pid: int,
        out: int,
        err: int,
        manager: Service | None,
    ) -> None:
        """Of the process `pid`, whose output and errors come from two pipes.

        `place` is the attempt's directory, where they are kept; `manager` the
        systemd that wants to know how things are.
        """
        self._manager = manager
        self._beat_at = 0.0
        self.reader = Reader()
        self.idle = float(orders["idle_timeout"])
        self.stop_reason: str | None = None
        self.status = 0
        self.cost: dict[str, float] = {}
        self.head = self.tail = b""
        self._step = 0
        self._next_step = 0.0
        self.pid = pid
        self._gone = os.pidfd_open(pid)
        self._ended = False
        self._pipes = {out: self._output, err: self._errors}
        for fd in self._pipes:
            os.set_blocking(fd, False)
        self._events = _Kept(os.path.join(place, "events.jsonl"), EVENTS_KEPT)
        self._stderr = _Kept(os.path.join(place, "stderr.txt"), STDERR_KEPT)
        _adopt_orphans()
        self.heard = time.monotonic()
        self.deadline = self.heard + float(orders["timeout"])
        self.ended_at: float | None = None
        self.tokens: int | None = orders.get("tokens")  # that it may use
        self._meter = None if self.tokens is None else Meter(orders["home"], orders["thread"])
        self._count_at = self.heard

    # --- what comes in --------------------------------------------------------

    def _output(self, data: bytes) -> None:
        self._events.add(data)
        if self.reader.feed(data):
            self.heard = time.monotonic()
        if not self.reader.ended:
            self.ended_at = None  # a turn that failed may be followed by another
        elif self.ended_at is None:
            self.ended_at = time.monotonic()

    def _errors(self, data: bytes) -> None:
        self._stderr.add(data)
        if len(self.head) < _HEAD:
            self.head += data[: _HEAD - len(self.head)]
        self.tail = (self.tail + data)[-_HEAD:]

    @property
    def told(self) -> bytes:
        """What is looked at of standard error."""
        return self.head if self.head.startswith(self.tail) else self.head + b"\n" + self.tail

    def _drain(self, fd: int) -> None:
        """Read what is there now; a grandchild may keep the pipe open for ever."""
        while True:
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                self._pipes.pop(fd)
                os.close(fd)
                return
            sink = self._pipes[fd]
            sink(data)

    # --- the clocks -----------------------------------------------------------

    def _due(self, now: float) -> str | None:
        """Why Codex has to be stopped now, if it has to."""
        if self.ended_at is not None:
            return "grace" if now >= self.ended_at + GRACE else None
        if now >= self.deadline:
            return "timeout"
        if not self.reader.busy and now >= self.heard + self.idle:
            return "stall"
        return "budget" if self._overspent(now) else None

    def _overspent(self, now: float) -> bool:
        if self._meter is None or self.tokens is None or now < self._count_at:
            return False
        self._count_at = now + COUNT
        return self._meter.look(self.reader.thread) >= self.tokens

    def _pause(self, now: float) -> float:
        if self._step:
            return self._next_step - now
        if self.ended_at is not None:
            return self.ended_at + GRACE - now
        ends = [self.deadline] if self.reader.busy else [self.deadline, self.heard + self.idle]
        if self._meter is not None:
            ends.append(self._count_at)
        if self._manager:
            ends.append(self._beat_at)
        return min(ends) - now

    def stop(self, reason: str) -> None:
        """Begin to end Codex; more of it is worse, so the first reason stands."""
        if self.stop_reason is None:
            self.stop_reason = reason
            self._escalate()

    def _escalate(self) -> None:
        number, pause = STEPS[min(self._step, len(STEPS) - 1)]
        self._step += 1
        self._next_step = time.monotonic() + pause
        self.signal(number)

    def signal(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass  # it has just ended; wait4 will tell how

    def run(self, wakeup: int) -> None:
        """Until Codex is gone and everything it printed is read.

        Stops it when a byte comes in `wakeup`, or the daemon's pipe closes.
        """
        parent = _parent_pipe()
        poll = select.poll()
        for fd in (*self._pipes, self._gone, wakeup):
            poll.register(fd, select.POLLIN)
        if parent is not None:
            poll.register(parent, 0)  # POLLHUP alone
        while not self._ended:
            pause = max(0.0, self._pause(time.monotonic()))
            for fd, _ in poll.poll(pause * 1000 + 1):
                if fd in self._pipes:
                    self._drain(fd)
                    if fd not in self._pipes:
                        poll.unregister(fd)
                elif fd == self._gone:
                    self._reap()
                else:
                    poll.unregister(fd)
                    self.stop("interrupted")
            self._tick()
        poll.unregister(self._gone)
        if any(fd not in self._pipes for fd, _ in poll.poll(0)):
            # Whoever ended us ended Codex in the same moment: that is no crash of it.
            self.stop_reason = self.stop_reason or "interrupted"
        self.signal(signal.SIGKILL)  # what its tools left running
        for fd in list(self._pipes):
            self._drain(fd)
        self._events.close()
        self._stderr.close()
        self.reader.finish()

    def sweep(self) -> None:
        """End what Codex's tools put into sessions of their own."""
        _end_children()

    def _tick(self) -> None:
        if not self._ended:
            _reap_orphans(self.pid)
        now = time.monotonic()
        if self._manager:
            self._beat(self._manager, now)
        if self._step and now >= self._next_step:
            self._escalate()
        elif not self._step and (reason := self._due(now)):
            self.stop(reason)

    def _beat(self, manager: Service, now: float) -> None:
        """Tell systemd that we live, and what Codex is doing."""
        if now >= self._beat_at:
            self._beat_at = now + BEAT
            manager.notify("WATCHDOG=1")
        manager.status("stopping Codex" if self._step else self.reader.activity)

    def _reap(self) -> None:
        _, status, spent = os.wait4(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        self._ended = True
        self.cost = {
            "cpu_seconds": round(spent.ru_utime + spent.ru_stime, 3),
            "memory_peak_bytes": spent.ru_maxrss * 1024,
        }


def catch_signals() -> int:
    """From now on a signal is a byte in the pipe that is returned."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: None)
    return read


def _parent_pipe() -> int | None:
    """Standard input, if it is the pipe that tells of the daemon's end."""
    return 0 if stat.S_ISFIFO(os.fstat(0).st_mode) else None


def _adopt_orphans() -> None:
    """Whatever loses its parent below us becomes our child, and cannot get away."""
    try:
        import ctypes  # costs 6 ms, and Codex is starting meanwhile
    except ImportError:
        return  # a Python without it; then only a unit holds everything together
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap_orphans(codex: int) -> None:
    """Those that have ended, but not Codex: its use of the processor is wanted."""
    ended = os.WEXITED | os.WNOHANG
    while (one := os.waitid(os.P_ALL, 0, ended | os.WNOWAIT)) and one.si_pid != codex:
        os.waitpid(one.si_pid, 0)


def _end_children() -> None:
    """SIGKILL for every child, and for those that so become our children.

    Gives up after a while: a process may hang in the kernel.
    """
    end = time.monotonic() + CLEANUP
    while time.monotonic() < end:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return  # there are none, as nearly always
        for pid in _children():
            try:
                os.kill(pid, signal.SIGKILL)  # only we can reap it: it is still that one
            except PermissionError:
                continue  # of another user, by sudo
        time.sleep(0.005)


def _children() -> list[int]:
    here, found = os.getpid(), []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            if int(fields[1]) == here:
                found.append(int(name))
    return found


class _Kept:
    """A file that takes at most so many bytes; the rest is counted, not kept."""

    def __init__(self, path: str, limit: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._left = limit

    def add(self, data: bytes) -> None:
        if self._left > 0:
            try:
                durable.write_all(self._fd, data[: self._left])
                self._left -= len(data)
            except OSError:
                self._left = 0  # a full disk: the turn goes on, for its answer is read apart

    def close(self) -> None:
        os.close(self._fd)
