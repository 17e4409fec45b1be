"""The directories for hand-over: inbox, tasks/ID, answers, rejected, archive.

Owns every file below them (but tasks/ID/N, which is the worker's until it
ends).  Files come in by `deliver` or by anybody's `cp` and `mv`; `scan` is the
truth about what is there, and the watch is only a hint that may be false or
missing.

Taking a file, in this order, each step repeatable after a crash:

1. its name, durable, in tasks/ID/name     (`claim`)
2. inbox/NAME -> inbox/.take-ID            (`claim`; a rename inside the watched
   directory, because one out of it stalls watchdog for half a second)
3. the bytes, read once, never through a link, checked by `taskfile`
4. tasks/ID/task.json, durable             (`store`)
5. the ledger's line: this is the acceptance
6. inbox/.take-ID removed                  (`drop`)

Raises OSError for what the host refuses, `Unreadable` for what is wrong with
one file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import signal
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from codexd import durable
from codexd.config import Directories
from codexd.model import ID_LENGTH, is_id
from codexd.taskfile import ignored

TAKE = ".take-"
_DEBRIS = 3600.0  # seconds: no producer writes one file for so long
SETTLE = 1.0  # seconds without a change after which a file counts as written
_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
_INBOX_MODE = 0o3770
_STATE_MODE = 0o750


class Unreadable(ValueError):
    """One file in the inbox that cannot become a task; the text says why."""


# --- the directories ------------------------------------------------------------


def prepare(dirs: Directories) -> None:
    """Make every directory that is missing; sweep what dead writers left.

    Raises OSError naming the directory that cannot be made or written.
    """
    for path in (dirs.state, dirs.rejected, dirs.answers, dirs.tasks, dirs.archive):
        _make(path, _STATE_MODE)
    for path in (dirs.sessions, dirs.transcripts, dirs.keys, dirs.work, dirs.run):
        _make(path, _STATE_MODE)
    _make(dirs.inbox, _INBOX_MODE)
    _make(dirs.codex_home, 0o700)
    _same_file_system(dirs.inbox, dirs.tasks)
    for path in (dirs.rejected, dirs.answers, dirs.sessions, dirs.keys, dirs.ledger.parent):
        durable.sweep(path)
    durable.sweep_old(dirs.inbox, _DEBRIS)


def _make(path: Path, mode: int) -> None:
    if os.path.lexists(path) and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it must be a directory", str(path))
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "codexd may not write here", str(path))


def _same_file_system(one: Path, other: Path) -> None:
    # Files of the inbox are moved to rejected/ and copied to tasks/; a rename
    # over a mount point fails, and two disks fill up one without the other.
    if one.stat().st_dev != other.stat().st_dev and one.parent == other.parent:
        raise OSError(errno.EXDEV, f"must be on the file system of {other}", str(one))


def free_bytes(path: Path) -> int:
    """Bytes that we may still write on the file system of `path`."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def new_id() -> str:
    """A fresh task id: the time for people, chance against collisions."""
    when = time.strftime("%Y%m%dt%H%M%S", time.gmtime())
    return when + "-" + "".join(secrets.choice(_LETTERS) for _ in range(10))


# --- delivering -----------------------------------------------------------------


def deliver(inbox: Path, name: str, data: bytes) -> None:
    """Put a file into the inbox: whole, durable, and then visible."""
    durable.write(inbox / name, data, 0o660)


def deliver_control(inbox: Path, name: str) -> None:
    """Put an empty control file into the inbox.  Works on a full disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        os.close(os.open(inbox / name, flags, 0o660))
    except PermissionError:
        # Where others write, one may not even open their file with O_CREAT
        # (fs.protected_regular): it is there, and says the same.
        if not is_empty_file(inbox / name):
            raise


def is_empty_file(path: Path) -> bool:
    """Whether a regular file without content is there."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and not found.st_size


# --- what is there ----------------------------------------------------------------


def scan(inbox: Path) -> tuple[list[str], list[str]]:
    """Names of dropped files, and ids already taken but not finished.

    In byte order of the names, without one stat.
    """
    names, taken = [], []
    for name in os.listdir(inbox):
        if name.startswith(TAKE) and is_id(name[len(TAKE) :]):
            taken.append(name[len(TAKE) :])
        elif not ignored(name):
            names.append(name)
    names.sort(key=os.fsencode)
    return names, sorted(taken)


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
        """Whether `name` is complete; `now` is monotonic seconds."""
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


class _Hints(FileSystemEventHandler):
    def __init__(self, settled: Settled, wake: Callable[[], None]) -> None:
        self.settled = settled
        self.wake = wake

    def dispatch(self, event: FileSystemEvent) -> None:
        """Called in watchdog's thread for every event in the inbox."""
        if event.event_type in ("closed", "moved"):
            path = os.fsdecode(event.src_path if event.event_type == "closed" else event.dest_path)
            name = os.path.basename(path)
            if ignored(name):
                return  # among them our own .take-ID
            self.settled.told.add(name)
        elif event.event_type != "created" or ignored(
            os.path.basename(os.fsdecode(event.src_path))
        ):
            return
        self.wake()


class Watch:
    """Hints from inotify about the inbox, kept alive; without it, polling."""

    def __init__(self, inbox: Path, settled: Settled, wake: Callable[[], None]) -> None:
        self._inbox = inbox
        self._hints = _Hints(settled, wake)
        self._observer: BaseObserver | None = None
        self._inode = 0
        self.problem: str | None = None  # why there are no hints

    @property
    def kind(self) -> str:
        return "polling" if self.problem else "inotify"

    def tend(self) -> None:
        """Start the observer, or start it again when it died or the inbox was replaced."""
        inode = os.stat(self._inbox).st_ino
        if inode == self._inode and self._lives():
            return
        self.stop()
        fresh: BaseObserver | None = None
        try:
            fresh = Observer()
            fresh.schedule(self._hints, str(self._inbox), recursive=False)
            fresh.start()
        except OSError as error:
            self.problem = f"no inotify ({error.strerror}); looking every few seconds"
            if fresh is not None:
                fresh.stop()  # newer ones hold a thread from the beginning
            return
        self._observer, self._inode, self.problem = fresh, inode, None

    def _lives(self) -> bool:
        # A new directory can have the inode number of the one before; the emitter
        # of the old one has ended then.
        watcher = self._observer
        return (
            watcher is not None
            and watcher.is_alive()
            and all(emitter.is_alive() for emitter in watcher.emitters)
        )

    def stop(self) -> None:
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(2)
            self._observer = None


# --- taking -----------------------------------------------------------------------


def claim(dirs: Directories, names: Sequence[tuple[str, str]]) -> list[str]:
    """Take (id, name) pairs out of sight of other programs; the ids taken.

    Left out are a file that vanished meanwhile (its dropper thought better of it)
    and one whose id another file was taken under: it stays where it is.
    """
    chosen: dict[str, str] = {}
    for id, name in names:
        if id not in chosen and not os.path.lexists(dirs.inbox / (TAKE + id)):
            chosen[id] = name
    for id, name in chosen.items():
        place = dirs.tasks / id
        place.mkdir(mode=_STATE_MODE, exist_ok=True)
        try:
            durable.write(place / "name", os.fsencode(name))
        except OSError:
            discard(dirs, id)  # on a full disk every round would leave one more
            raise
    durable.sync_directory(dirs.tasks)
    claimed = []
    for id, name in chosen.items():
        try:
            os.rename(dirs.inbox / name, dirs.inbox / (TAKE + id))
            claimed.append(id)
        except FileNotFoundError:
            discard(dirs, id)
    durable.sync_directory(dirs.inbox)
    return claimed


def dropped_name(dirs: Directories, id: str) -> str:
    """The name under which a claimed file was dropped.

    Anybody who may drop files can make a `.take-ID`, too: without a record it is
    a file that was dropped as ID.md.
    """
    try:
        return os.fsdecode(durable.read(dirs.tasks / id / "name", 4096))
    except (FileNotFoundError, ValueError):
        (dirs.tasks / id).mkdir(mode=_STATE_MODE, exist_ok=True)
        durable.write(dirs.tasks / id / "name", f"{id}.md".encode())
        return f"{id}.md"


def contents(dirs: Directories, id: str, limit: int) -> bytes:
    """The bytes of a claimed file, read once.

    Raises Unreadable; OSError for what is no fault of the file.
    """
    path = dirs.inbox / (TAKE + id)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = _why_not_opened(path, error)
        if reason is None:
            raise
        raise Unreadable(reason) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}")
        if found.st_nlink > 1:
            # Its other name may lie where its dropper may not read, such as our state.
            raise Unreadable("it has another name (a hard link): drop a copy of it")
        if found.st_size > limit:
            raise Unreadable(f"{found.st_size} bytes; the limit is {limit} (limits.file)")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(fd)
    if len(data) > limit:
        raise Unreadable(f"it grew over the limit of {limit} bytes (limits.file)")
    return data


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link: drop the file itself",
}


def _why_not_opened(path: Path, error: OSError) -> str | None:
    """What is wrong with the file; None when it is the host that refuses."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return "it vanished while it was being taken"
    if not stat.S_ISREG(mode):
        return f"it is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}"
    if error.errno in (errno.ELOOP, errno.ENXIO):
        return "it was no regular file when it was opened"
    if error.errno == errno.EACCES:
        return "codexd may not read it: chmod g+r (or 644) it and drop it again"
    return None


def drop(dirs: Directories, id: str) -> None:
    """The taken file has done its duty."""
    try:
        (dirs.inbox / (TAKE + id)).unlink(missing_ok=True)
    except IsADirectoryError:
        _hide(dirs, id)  # no file of ours: somebody made a directory of this name


def _hide(dirs: Directories, id: str) -> Path:
    """Give what cannot leave the inbox a name that nobody looks at."""
    hidden = dirs.inbox / f".rejected-{new_id()}"
    os.rename(dirs.inbox / (TAKE + id), hidden)
    return hidden


def discard(dirs: Directories, id: str) -> None:
    """Remove the directory of an id that never became a task.

    Repeatable.  What codexd did not put there stays, and its directory with it.
    """
    place = dirs.tasks / id
    try:
        durable.sweep(place)
        for name in ("name", "task.json"):
            (place / name).unlink(missing_ok=True)
        place.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EISDIR):
            raise


def refuse(dirs: Directories, id: str, name: str, reason: str) -> str:
    """Move a claimed file to rejected/ with its reason; the name it has there."""
    kept = name if len(os.fsencode(name)) <= 200 else f"{name[:40]}.{id}"
    if os.path.lexists(dirs.rejected / kept) or os.path.lexists(dirs.rejected / f"{kept}.reason"):
        kept = f"{kept}.{id}"
    why = dirs.rejected / f"{kept}.reason"
    durable.write(why, f"{reason}\n".encode("utf-8", "replace"))
    source = dirs.inbox / (TAKE + id)
    try:
        _move(source, dirs.rejected / kept)
    except FileNotFoundError:
        pass  # its owner removed it: the reason is all there is to keep
    except PermissionError:
        # Somebody else's directory can get a new name, but no new place.
        hidden = _hide(dirs, id)
        durable.write(why, f"{reason}\nIt lies in {hidden}\n".encode("utf-8", "replace"))
    durable.sync_directory(dirs.rejected)
    discard(dirs, id)
    return kept


def _move(source: Path, target: Path) -> None:
    try:
        # Not rename: see the module's note on watchdog.
        os.link(source, target, follow_symlinks=False)
    except OSError:
        os.rename(source, target)
    else:
        os.unlink(source)


def wanted_id(name: str) -> str | None:
    """The id that a producer gave in the file's name, if it is one."""
    stem, ending = os.path.splitext(name)
    fits = len(stem) == ID_LENGTH and is_id(stem) and ending in (".md", ".json")
    return stem if fits else None


def in_inbox(dirs: Directories, id: str) -> bool:
    """Whether a delivered task of this id was not yet accepted."""
    return any(os.path.lexists(dirs.inbox / name) for name in (f"{id}.md", f"{id}.json", TAKE + id))
