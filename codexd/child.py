"""A process group that the worker started: its pipes, its clock, and how it is ended.

Owns the process from its start to its end, and whatever it starts.  Promises:
`run` returns, whatever the process does, and all that it printed has been read;
after `sweep` nothing is left that it or what it ran had started, in whatever
session.  The clock is monotonic.

`Turn` is Codex in one turn, `verify.Check` the task's own command.

Raises OSError when what is needed to watch a process cannot be had.  Lean: the
worker uses it.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import stat
import time

from codexd import durable, orphans

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from codexd.service import Service

STEPS = ((signal.SIGINT, 5.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0))
BEAT = 30.0  # seconds between signs of life to systemd; its WatchdogSec= is longer
CLEANUP = 5.0  # seconds for what was left behind to be gone
_PIECE = 1 << 16  # bytes read at once; then all else has its turn, however much comes


class Halt:
    """Word that all has to stop: a signal, or the end of the daemon.  It stands."""

    def __init__(self) -> None:
        """From now on a signal is a byte in a pipe."""
        self._signals, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: None)

    def poll(self) -> select.poll:
        """What tells of it, for a wait that waits for more."""
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        if stat.S_ISFIFO(os.fstat(0).st_mode):
            poll.register(0, 0)  # the daemon holds the other end: POLLHUP alone
        return poll

    def told(self, seconds: float = 0.0) -> bool:
        """Whether it has come; waits so long for it."""
        return bool(self.poll().poll(seconds * 1000))


class Child:
    """A process that `command.spawn` started."""

    def __init__(
        self,
        pid: int,
        pipes: Mapping[int, Callable[[bytes], None]],
        timeout: float,
        manager: Service | None,
    ) -> None:
        """`pipes`: what to read, and who takes what comes; `timeout` in seconds.

        `manager` is the systemd that wants to know how things are.
        """
        self.pid = pid
        self.stop_reason: str | None = None
        self.status = 0
        self.cost: dict[str, float] = {}
        self._manager = manager
        self._beat_at = 0.0
        self._step = 0
        self._next_step = 0.0
        self._gone = os.pidfd_open(pid)
        self._ended = False
        self._pipes = dict(pipes)
        for fd in self._pipes:
            os.set_blocking(fd, False)
        _adopt_orphans()
        self.began = time.monotonic()
        self.deadline = self.began + timeout

    # --- what a process of its kind adds ----------------------------------------

    def doing(self) -> str:
        """What it is doing, on one line."""
        raise NotImplementedError

    def due(self, now: float) -> str | None:
        """Why it has to be stopped now, if it has to."""
        return "timeout" if now >= self.deadline else None

    def looks(self) -> list[float]:
        """When `due` has to be asked next; the soonest counts."""
        return [self.deadline]

    def close(self) -> None:
        """It is gone, and everything that it printed was read."""

    # --- its pipes ----------------------------------------------------------------

    def _read(self, fd: int) -> int:
        """Take a piece of what is there; how much it was."""
        try:
            data = os.read(fd, _PIECE)
        except BlockingIOError:
            return 0
        if data:
            self._pipes[fd](data)
        else:
            del self._pipes[fd]
            os.close(fd)
        return len(data)

    def _drain(self, fd: int) -> None:
        """Take what the process had printed when it ended, which the pipe holds; what it
        left behind may print for ever."""
        left = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
        while left > 0 and (size := self._read(fd)):
            left -= size

    # --- its end --------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Begin to end it; more of it is worse, so the first reason stands."""
        if self.stop_reason is None:
            self.stop_reason = reason
            self._escalate()

    def _escalate(self) -> None:
        number, pause = STEPS[min(self._step, len(STEPS) - 1)]
        self._step += 1
        self._next_step = time.monotonic() + pause
        self._signal(number)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            pass  # it has just ended, wait4 will tell how; or another user's is left, by sudo

    def run(self, halt: Halt) -> None:
        """Until it is gone and everything it printed is read; stops it at a `halt`."""
        poll = halt.poll()
        for fd in (*self._pipes, self._gone):
            poll.register(fd, select.POLLIN)
        while not self._ended:
            pause = max(0.0, self._pause(time.monotonic()))
            for fd, _ in poll.poll(pause * 1000 + 1):
                if fd in self._pipes:
                    self._read(fd)
                    if fd not in self._pipes:
                        poll.unregister(fd)
                elif fd == self._gone:
                    self._reap()
                else:
                    poll.unregister(fd)
                    self.stop("interrupted")
            self._tick()
        os.close(self._gone)
        if halt.told():
            # Whoever ended us ended it in the same moment: that is no crash of it.
            self.stop_reason = self.stop_reason or "interrupted"
        self._signal(signal.SIGKILL)  # what its tools left running
        for fd in list(self._pipes):
            self._drain(fd)
        for fd in self._pipes:
            os.close(fd)  # held open by what is in a session of its own
        self.close()

    @staticmethod
    def sweep() -> None:
        """End what its tools put into sessions of their own."""
        _end_children()

    def _pause(self, now: float) -> float:
        if self._step:
            return self._next_step - now
        beat = [self._beat_at] if self._manager else []
        return min([*self.looks(), *beat]) - now

    def _tick(self) -> None:
        if not self._ended:
            _reap_orphans(self.pid)
        now = time.monotonic()
        if self._manager:
            self._beat(self._manager, now)
        if self._step and now >= self._next_step:
            self._escalate()
        elif not self._step and (reason := self.due(now)):
            self.stop(reason)

    def _beat(self, manager: Service, now: float) -> None:
        """Tell systemd that we live, and what is going on."""
        if now >= self._beat_at:
            self._beat_at = now + BEAT
            manager.notify("WATCHDOG=1")
        manager.status(f"stopping: {self.doing()}" if self._step else self.doing())

    def _reap(self) -> None:
        _, status, spent = os.wait4(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        self._ended = True
        self.cost = {
            "cpu_seconds": round(spent.ru_utime + spent.ru_stime, 3),
            "memory_peak_bytes": spent.ru_maxrss * 1024,
        }


def _adopt_orphans() -> None:
    """Whatever loses its parent below us becomes our child, and cannot get away."""
    try:
        orphans.adopt()
    except ImportError:
        return  # a Python without it; then only a unit holds everything together


def _reap_orphans(child: int) -> None:
    """Those that have ended, but not the process itself: its use of the processor is wanted."""
    ended = os.WEXITED | os.WNOHANG
    while (one := os.waitid(os.P_ALL, 0, ended | os.WNOWAIT)) and one.si_pid != child:
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
        for pid in orphans.children():
            try:
                os.kill(pid, signal.SIGKILL)  # only we can reap it: it is still that one
            except PermissionError:
                continue  # of another user, by sudo
        time.sleep(0.005)


class Kept:
    """A file that takes at most so many bytes; the rest is counted, not kept."""

    def __init__(self, path: str, limit: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._left = limit - os.fstat(self._fd).st_size

    def add(self, data: bytes) -> None:
        if self._left > 0:
            try:
                durable.write_all(self._fd, data[: self._left])
                self._left -= len(data)
            except OSError:
                self._left = 0  # a full disk: the turn goes on, for its answer is read apart

    def close(self) -> None:
        os.close(self._fd)
