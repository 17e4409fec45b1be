"""Whether a dropped file is complete, or still being written.

Part of the room `spool`, which is the door to it.  Looks, never writes; a file
that vanishes meanwhile is not complete.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Iterable
from pathlib import Path

SETTLE = 1.0  # seconds without a change after which a file counts as written


class Settled:
    """Which dropped files are complete.

    A file is settled once it was closed by its writer or renamed in: the watch
    tells, or nobody has it open for writing.  Where that cannot be asked (the
    file is somebody else's), it has to stay the same for a second.
    """

    def __init__(self) -> None:
        self.told: set[str] = set()
        self._seen: dict[str, tuple[float, tuple[int, int, int]]] = {}

    def __call__(self, inbox: Path, name: str, now: float) -> bool:
        """Whether `name` is complete; `now` is by a clock that nobody sets."""
        if name in self.told:
            return True
        path = inbox / name
        try:
            found = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(found.st_mode):
            return True  # nobody is writing it: it is rejected at once
        mark = (found.st_size, found.st_mtime_ns, found.st_ino)
        since, seen = self._seen.get(name, (now, None))
        if seen != mark:
            since = now
            self._seen[name] = (now, mark)
        if found.st_nlink > 1 and now - since < SETTLE:
            return False  # some deliver with link(2) and then remove the other name
        busy = _being_written(path)
        if busy is None:
            return now - since >= SETTLE
        # A file made a moment ago may be about to be opened for writing once more,
        # but not one with something in it: that was renamed in, or is closed.
        return not busy and (found.st_size > 0 or now - since >= SETTLE)

    def pending(self, now: float) -> bool:
        """Whether a file was still changing a moment ago, so that a look soon pays."""
        return any(now - since < 2 * SETTLE for since, _ in self._seen.values())

    def forget(self, name: str) -> None:
        self.told.discard(name)
        self._seen.pop(name, None)

    def prune(self, names: Iterable[str]) -> None:
        """Forget all but `names`: what came and went unseen must not pile up."""
        here = set(names)
        self.told &= here
        self._seen = {k: v for k, v in self._seen.items() if k in here}


def _being_written(path: Path) -> bool | None:
    """Whether some process has the file open for writing; None if nobody can tell.

    A read lease is refused while there is a writer.  It may be asked for by the
    owner of the file only; for the files of others, time has to be enough.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None  # who writes it may let us read it when it is complete
    try:
        # Who opens the file for writing just now makes the kernel send us a signal:
        # by default SIGIO, which kills; this one is ignored by default.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    finally:
        os.close(fd)
    return False
