"""A daemon whose clock is ours: real processes, and days that pass in a moment.

libfaketime stands between the processes and the kernel: it adds a number of seconds,
which it reads from a file each time, to every clock (that of the wall, the monotonic one
and that which runs on in sleep).  `Clock.advance` is thus an hour in which nothing
happened, and not a clock that was set.  The daemon needs no seam for it.

The kernel's own times of files are not shifted, so simulated time ends where real time
is: what was just written seems to come from the future, and is not old, until
`Clock.stamp` gives it the simulated time of its making.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from codexd import heartbeat
from codexd.model import State
from tests.daemon import Daemon, until
from tests.proof.ledgers import Reader

_PLACES = ("/usr/lib", "/usr/lib64", "/usr/local/lib")


def library() -> Path | None:
    """libfaketime's, None where it is not installed (Debian: faketime)."""
    found = (p for place in _PLACES for p in Path(place).glob("**/faketime/libfaketime.so.1"))
    return next(found, None) if shutil.which("faketime") else None


class Clock:
    """Seconds that are added to all clocks; begins `behind` seconds ago."""

    def __init__(self, file: Path, behind: float) -> None:
        self.file = file
        self.began = time.time()
        self.offset = -behind
        self._write()

    def _write(self) -> None:
        aside = self.file.with_suffix(".new")
        aside.write_text(f"{self.offset:+.3f}\n")
        aside.rename(self.file)

    @property
    def now(self) -> float:
        return time.time() + self.offset

    def advance(self, seconds: float) -> None:
        """Let time pass, but never beyond the real one."""
        self.offset = min(0.0, self.offset + max(0.0, seconds))
        self._write()

    def stamp(self, directories: Iterable[Path]) -> None:
        """Give files that were written since the last time the simulated time."""
        now = self.now
        for top in directories:
            for place, _, names in os.walk(top):
                for path in (f"{place}/{name}" for name in names):
                    with suppress(FileNotFoundError):  # it was just moved on
                        if os.lstat(path).st_mtime >= self.began:
                            os.utime(path, (now, now), follow_symlinks=False)

    def environment(self) -> dict[str, str]:
        found = library()
        assert found, "libfaketime is not installed"
        return {
            "LD_PRELOAD": str(found),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "NO_FAKE_STAT": "1",
        }


class Shifted:
    """A daemon's clocks as wallclock.c shifts them; the kernel's and ours stay as they are."""

    def __init__(self, place: Path) -> None:
        library, source = place / "wallclock.so", Path(__file__).with_name("wallclock.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        self._wall, self._slept = place / "wallclock", place / "slept"
        self.environment = {
            "LD_PRELOAD": str(library), "WALLCLOCK": str(self._wall), "SLEPT": str(self._slept),
        }  # fmt: skip

    def set(self, wall: int = 0, slept: int = 0) -> None:
        """Seconds by which the wall clock was set, and that the host has slept."""
        for path, seconds in ((self._wall, wall), (self._slept, slept)):
            path.with_suffix(".new").write_text(str(seconds))
            path.with_suffix(".new").rename(path)


class Simulated(Daemon):
    """A daemon that lives by such a clock."""

    def __init__(self, root: Path, clock: Clock, config: str, env: dict[str, str]) -> None:
        super().__init__(root, {**clock.environment(), **env}, config)
        self.clock = clock
        self.reader = Reader(self.dirs.ledger)

    def kill(self) -> None:
        super().kill()
        clear_away()

    def stop(self) -> int:
        status = super().stop()
        clear_away()
        return status

    @property
    def pid(self) -> int:
        assert self.child is not None
        return self.child.pid

    def wake(self) -> None:
        """Let a round begin: its pause is the kernel's, which knows no other clock."""
        os.kill(self.pid, signal.SIGCHLD)

    def advance(self, seconds: float) -> None:
        self.clock.stamp((self.dirs.answers, self.dirs.archive, self.dirs.rejected,
                          self.dirs.keys, self.dirs.sessions, self.dirs.transcripts,
                          self.dirs.usage, self.dirs.codex_home / "sessions"))  # fmt: skip
        self.clock.advance(seconds)
        self.wake()

    def quiet(self, seconds: float = 60.0) -> None:
        """Wait until nothing can happen at this time of the clock."""
        until(self._is_quiet, "a daemon with nothing to do", seconds)

    def _is_quiet(self) -> bool:
        assert self.child is not None
        assert self.child.poll() is None, "the daemon has died"
        book = self.reader.book()
        if DISK in book.gate or self.told_full():
            return True
        if any(name[0] != "." or name.startswith(".take-") for name in os.listdir(self.dirs.inbox)):
            return False
        states = {task.state for task in book.tasks.values()}
        return State.RUNNING not in states and (State.QUEUED not in states or bool(book.gate))

    def told_full(self) -> bool:
        """Whether the heartbeat says that the disk is full: the ledger may lack the room for it."""
        found = heartbeat.read(self.dirs.heartbeat)
        gate = found[1]["gate"] if found else {}
        return isinstance(gate, dict) and DISK in gate


DISK = "disk"
_SHARED, _SEMAPHORE = "faketime_shm_", "sem.faketime_sem_"


def clear_away() -> None:
    """What libfaketime leaves of processes that were killed: a segment that its maker and all
    who inherited it are gone from, and its semaphore."""
    used = "".join(map(_maps, Path("/proc").glob("[0-9]*")))
    for path in Path("/dev/shm").glob(f"{_SHARED}*"):
        maker = path.name.removeprefix(_SHARED)
        if not Path("/proc", maker).exists() and f"{path}\n" not in used:
            path.unlink(missing_ok=True)
            path.with_name(_SEMAPHORE + maker).unlink(missing_ok=True)


def _maps(process: Path) -> str:
    with suppress(OSError):
        return (process / "maps").read_text()
    return ""
