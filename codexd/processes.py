"""Workers as child processes of the daemon.

Owns run/workers/ID.lock.  The daemon takes the flock on it before it starts the
worker, and the worker and Codex inherit the descriptor: while one of them
lives, the lock is held, and the kernel frees it with the last of them.
So a new daemon sees what the one before left behind, without pids and ages.
Codex's tools do not inherit it: the worker ends them, and where it was killed,
the daemon, whose children they then are.

Workers end with the daemon: they have the read end of a pipe that only the
daemon holds open, and stop Codex when it closes.  What does not stop within
`grace` is killed, found by the very lock it holds.
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

from codexd import exits, lock, orphans
from codexd.exits import Ended
from codexd.model import is_id

PATIENCE = 10.0  # seconds for what cannot be killed; then it no longer takes a slot
# -I -S: no site-packages, no user site; half of a worker's start-up time.
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from codexd.worker import main; main()"


class Processes:
    """Workers as child processes."""

    kind = "process"
    survives = False
    grace = 15.0  # seconds an orphan has to end by itself

    def __init__(
        self, tasks: Path, run: Path, bell: int = subprocess.DEVNULL, why: str | None = None
    ) -> None:
        """`bell` is a descriptor that gets a byte when a worker has written its result.

        `why` they are not units, where they could have been.
        """
        self._bell = bell
        self.why = why
        self._refused: dict[str, str] = {}
        self._tasks = tasks
        self._locks = run / "workers"
        self._locks.mkdir(mode=0o750, exist_ok=True)
        self._alive, self._ours = os.pipe2(os.O_CLOEXEC)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        found = (path.stem for path in self._locks.glob("*.lock"))
        # id -> since when: workers of the daemon before, and what outlived its worker
        self._orphans = {id: time.monotonic() for id in found if is_id(id)}
        self._strays: dict[str, float] = {}
        self._untold: set[str] = set()  # their worker could not write what it came to
        self._bereft = False  # a worker was killed: what it ran is our child now
        orphans.adopt()

    def command(self, id: str) -> list[str]:
        package = str(Path(__file__).resolve().parent.parent)
        return [sys.executable, "-I", "-S", "-c", _BOOT, package, "--tasks", str(self._tasks), id]

    def start(self, ids: Iterable[str], limits: Mapping[str, Mapping[str, int]]) -> None:
        """Start the workers of tasks; child processes have no limits of their own."""
        for id in ids:
            try:
                self._start(id)
            except OSError as error:
                self._refused[id] = str(error)

    def refusal(self, id: str) -> str | None:
        return self._refused.pop(id, None)

    def _start(self, id: str) -> None:
        fd = os.open(self._path(id), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Nothing of an attempt before is left; the next holder is not to be killed.
            self._orphans.pop(id, None)
            self._strays.pop(id, None)
            self._untold.discard(id)
            self._children[id] = subprocess.Popen(
                self.command(id),
                stdin=self._alive,
                stdout=self._bell,
                pass_fds=(fd,),
                start_new_session=True,
                cwd="/",
                env=_environment(),
            )
        finally:
            os.close(fd)

    def working(self) -> set[str]:
        """Ids whose worker may still write.  Reaps what ended."""
        for id, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[id]
                self._strays[id] = time.monotonic()
                self._bereft |= child.returncode != 0
                if child.returncode == exits.UNTOLD:
                    self._untold.add(id)
        for id, since in list(self._orphans.items()):
            if time.monotonic() - since >= self.grace:
                self._strays[id] = self._orphans.pop(id)
            elif not lock.is_held(self._path(id)):
                self._forget(self._orphans, id)
        return self._children.keys() | self._orphans.keys()

    def active(self) -> set[str]:
        """Ids of which anything still lives: also what a worker left behind, which is killed."""
        working = self.working()
        self._bereft = self._bereft and self._end_adopted()
        for id in list(self._strays):
            if lock.is_held(self._path(id)):
                self._signal_holders(id, signal.SIGKILL)
            elif not self._bereft or time.monotonic() - self._strays[id] > PATIENCE:
                self._forget(self._strays, id)
        return working | self._strays.keys()

    def _end_adopted(self) -> bool:
        """Kill what lost its worker; whether there still is any.

        Codex's tools do not inherit the lock.  They are our children that we
        did not start: in sessions of their own, as only workers are besides.
        """
        workers = {child.pid for child in self._children.values()}
        adopted = [
            pid
            for pid in orphans.children()
            if pid not in workers and os.getsid(pid) != os.getsid(0)
        ]
        for pid in adopted:
            try:
                os.kill(pid, signal.SIGKILL)  # only we can reap it: it is still that one
            except PermissionError:
                continue  # of another user, by sudo
            os.waitpid(pid, os.WNOHANG)
        return bool(adopted)

    def _forget(self, among: dict[str, float], id: str) -> None:
        del among[id]
        self._path(id).unlink(missing_ok=True)

    def pause(self, now: float) -> float:
        """Seconds until a look at what tells nobody when it ends; inf if there is none.

        What was just killed is gone in a moment; what cannot be killed (a process
        in the kernel) must not cost the processor.
        """
        waits = [max(0.005, min(1.0, (now - since) / 2)) for since in self._strays.values()]
        return min([*waits, *(0.1 for _ in self._orphans), math.inf])

    def stop(self, ids: Iterable[str]) -> None:
        """Ask workers to stop Codex and write their result."""
        for id in ids:
            child = self._children.get(id)
            if child:
                child.terminate()
            elif id in self._orphans:
                self._signal_holders(id, signal.SIGTERM)

    def kill(self, ids: Iterable[str]) -> None:
        """End what did not stop, with everything it started."""
        for id in ids:
            self._signal_holders(id, signal.SIGKILL)
            child = self._children.get(id)
            if child:
                child.kill()  # should it have closed the lock
                child.wait()

    def ended(self, id: str) -> Ended | None:
        """No exit records: what ended a child is known by what it left, if it could."""
        if id not in self._untold:
            return None
        return Ended("exit-code", "exited", str(exits.UNTOLD), boot=exits.boot())

    def tidy(self, running: Set[str]) -> None:
        self._untold &= running

    def _path(self, id: str) -> Path:
        return self._locks / f"{id}.lock"

    def _signal_holders(self, id: str, number: int) -> None:
        for pid in _holders(self._path(id)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it ended by itself


def _environment() -> dict[str, str]:
    """Ours, without what systemd told the daemon alone."""
    daemons = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "INVOCATION_ID")
    return {name: value for name, value in os.environ.items() if name not in daemons}


def _holders(path: Path) -> list[int]:
    """Processes, other than this one, that have the file open."""
    found = []
    wanted = os.fspath(path.resolve())
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            fds = os.listdir(f"/proc/{name}/fd")
            if any(_points_to(f"/proc/{name}/fd/{fd}", wanted) for fd in fds):
                found.append(int(name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # gone, or somebody else's
    return found


def _points_to(link: str, wanted: str) -> bool:
    try:
        return os.readlink(link) == wanted
    except FileNotFoundError:
        return False
