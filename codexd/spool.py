"""The directories for hand-over: inbox, tasks/ID, answers, rejected, archive.

Owns every file below them (but tasks/ID/N, which is the worker's until it
ends).  Files come in by `deliver` or by anybody's `cp` and `mv`; `scan` is the
truth about what is there, and the watch is only a hint that may be false or
missing.

Behind this door: `settled` (is a dropped file complete?) and `take` (from the
inbox to tasks/ID).

Raises OSError for what the host refuses, `Unreadable` for what is wrong with
one file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from codexd import durable
from codexd.config import Directories
from codexd.model import ID_LENGTH, is_id
from codexd.settled import SETTLE, Settled
from codexd.take import (
    FULL,
    TAKE,
    Unreadable,
    claim,
    contents,
    discard,
    drop,
    dropped_name,
    new_id,
    refuse,
    taken_name,
)
from codexd.taskfile import ignored

__all__ = [
    "FULL",
    "SETTLE",
    "TAKE",
    "Settled",
    "Unreadable",
    "Watch",
    "claim",
    "contents",
    "deliver",
    "deliver_control",
    "delivered",
    "discard",
    "drop",
    "dropped_name",
    "free_bytes",
    "in_inbox",
    "is_empty_file",
    "new_id",
    "prepare",
    "refuse",
    "scan",
    "taken_name",
    "wanted_id",
]

_DEBRIS = 3600.0  # seconds: no producer writes one file for so long
_INBOX_MODE = 0o3770
_STATE_MODE = 0o750


# --- the directories ------------------------------------------------------------


def prepare(dirs: Directories) -> None:
    """Make every directory that is missing; sweep what dead writers left.

    Raises OSError naming the directory that cannot be made or written.
    """
    for path in (dirs.state, dirs.rejected, dirs.answers, dirs.schedules, dirs.tasks, dirs.archive):
        _make(path, _STATE_MODE)
    for path in (dirs.sessions, dirs.transcripts, dirs.keys, dirs.usage, dirs.work, dirs.run):
        _make(path, _STATE_MODE)
    _make(dirs.hooks, _STATE_MODE)
    _make(dirs.inbox, _INBOX_MODE)
    _make(dirs.codex_home, 0o700)
    _same_file_systems(dirs)
    for path in (dirs.rejected, dirs.answers, dirs.sessions, dirs.keys, dirs.usage):
        durable.sweep(path)
    durable.sweep(dirs.ledger.parent)
    durable.sweep_old(dirs.inbox, _DEBRIS)


def _make(path: Path, mode: int) -> None:
    there = durable.is_directory(path)
    if not there and durable.is_there(path, follow=False):
        raise NotADirectoryError(errno.ENOTDIR, "it must be a directory", str(path))
    if not there:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "codexd may not write here", str(path))


def _same_file_systems(dirs: Directories) -> None:
    """What is renamed or linked from one directory to another needs one below both."""
    for one, other in (
        (dirs.rejected, dirs.inbox),
        (dirs.archive, dirs.tasks),
        (dirs.archive, dirs.ledger.parent),
    ):
        _same_file_system(one, other)
    if dirs.inbox.parent == dirs.tasks.parent:
        # Of one root nobody expects that its inbox fills up while there is room for tasks.
        _same_file_system(dirs.inbox, dirs.tasks)


def _same_file_system(one: Path, other: Path) -> None:
    if one.stat().st_dev != other.stat().st_dev:
        why = f"it must be on the file system of {other}, and is on another"
        raise OSError(errno.EXDEV, f"{why}; unmount one, or mount one below both", str(one))


def free_bytes(path: Path) -> int:
    """Bytes that we may still write on the file system of `path`."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


# --- delivering -----------------------------------------------------------------


def deliver(inbox: Path, name: str, data: bytes) -> None:
    """Put a file into the inbox: whole, durable, and then visible."""
    durable.write(inbox / name, data, 0o660)


def deliver_control(inbox: Path, name: str) -> None:
    """Put an empty control file into the inbox, durably, as the last to be obeyed.

    Works on a full disk.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(inbox / name, flags, 0o660)
    except PermissionError:
        # Where others write, one may not even open their file with O_CREAT
        # (fs.protected_regular): it is there, and says the same.
        if not is_empty_file(inbox / name):
            raise
        return
    try:
        os.utime(fd)  # one that was there already is asked for anew
        os.fsync(fd)
    finally:
        os.close(fd)
    durable.sync_directory(inbox)


def delivered(path: Path) -> float | None:
    """When a file came under its name, in epoch seconds; None if it is gone."""
    try:
        return path.lstat().st_ctime
    except FileNotFoundError:
        return None


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


def wanted_id(name: str) -> str | None:
    """The id that a producer gave in the file's name, if it is one."""
    stem, ending = os.path.splitext(name)
    fits = len(stem) == ID_LENGTH and is_id(stem) and ending in (".md", ".json")
    return stem if fits else None


def in_inbox(dirs: Directories, id: str) -> bool:
    """Whether a delivered task of this id was not yet accepted."""
    names = (f"{id}.md", f"{id}.json", TAKE + id)
    return any(durable.is_there(dirs.inbox / name, follow=False) for name in names)
