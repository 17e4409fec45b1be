"""Locks that the kernel frees: nothing stale is left for a person to remove.

Three locks exist.  `hold` takes the flock on a file, with a deadline: one master
for a root.  `hold_thread` takes one byte of CODEX_HOME/.codexd/threads.lock:
one worker for a Codex thread, the second guard behind the queue's own order.
`hold_start` takes CODEX_HOME/.codexd/starts.lock: one Codex that begins, since two
that open its databases at once have raced; it holds for all daemons and units.

Fails with `Locked` when the deadline passes.  Assumes a local file system; NFS
is not supported.  Lean: the worker uses it, and before Codex runs: what it does
not need (`fcntl`) is imported by those who do.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_RETRY = 0.02  # seconds between tries; flock has no wait with a deadline


class Locked(Exception):
    """Somebody else holds it."""


def _wait(
    take: Callable[[], None], deadline: float, what: str, pause: Callable[[float], None]
) -> None:
    end = time.monotonic() + deadline
    while True:
        try:
            take()
            return
        except (BlockingIOError, PermissionError):  # fcntl(2): EAGAIN or EACCES
            if time.monotonic() >= end:
                raise Locked(what) from None
        pause(_RETRY)


def hold(path: str | os.PathLike[str], deadline: float) -> int:
    """Take the flock on `path` within `deadline` seconds; the descriptor holds it.

    A killed process can outlive itself here for a moment: a child that was
    forked and has not yet exec'd still has the descriptor.  So a start waits a
    few seconds before it believes that the lock is held.
    """
    import fcntl

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)  # who may open it, be it to read, may hold it as well
    take = fcntl.LOCK_EX | fcntl.LOCK_NB
    return _taken(fd, lambda: fcntl.flock(fd, take), deadline, os.fspath(path))


def is_held(path: str | os.PathLike[str]) -> bool:
    """Whether some process holds the flock on `path` now.

    Raises PermissionError: whether it is held is for its owner to see.
    """
    import fcntl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared: two who only ask never disturb one another.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def hold_thread(
    home: str, thread: str, deadline: float, pause: Callable[[float], None] = time.sleep
) -> int:
    """Take the lock of one Codex thread (a UUID); the descriptor holds it.

    What `pause` raises ends the wait.

    A byte range of one file, at an offset made of the id: no file a thread to
    clean up.  POSIX range locks go with the first close of the file in this
    process, so it must be opened only here, and once.
    """
    import fcntl

    fd = _open(home, "threads.lock")
    # 60 bits from the random end of the id: version 7 ids begin with the time.
    offset = int(thread.replace("-", "")[-15:], 16)
    take = fcntl.LOCK_EX | fcntl.LOCK_NB
    return _taken(fd, lambda: fcntl.lockf(fd, take, 1, offset), deadline, f"thread {thread}", pause)


def hold_start(home: str, deadline: float, pause: Callable[[float], None] = time.sleep) -> int:
    """Take the lock that Codex is started under; closing the descriptor frees it.

    As of a thread's, its file must be opened only here, and once at a time, and what
    `pause` raises ends the wait.
    """
    fd = _open(home, "starts.lock")
    return _taken(fd, lambda: os.lockf(fd, os.F_TLOCK, 1), deadline, f"a start in {home}", pause)


def _open(home: str, name: str) -> int:
    directory = os.path.join(home, ".codexd")
    os.makedirs(directory, 0o700, exist_ok=True)
    # No link: CODEX_HOME is for Codex to write, and the master may make files in more places.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(os.path.join(directory, name), flags, 0o600)


def _taken(
    fd: int,
    take: Callable[[], None],
    deadline: float,
    what: str,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    try:
        _wait(take, deadline, what, pause)
    except BaseException:
        os.close(fd)
        raise
    return fd
