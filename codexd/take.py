"""Taking a dropped file: out of the inbox, into tasks/ID or rejected.

Taking a file, in this order, each step repeatable after a crash:

1. its name, durable, in tasks/ID/name     (`claim`)
2. inbox/NAME -> inbox/.take-ID            (`claim`; a rename inside the watched
   directory, because one out of it stalls watchdog for half a second)
3. the bytes, read once, never through a link, checked by `taskfile`
4. tasks/ID/task.json, durable             (`store`)
5. the ledger's line: this is the acceptance
6. inbox/.take-ID removed                  (`drop`)

Part of the room `spool`, which is the door to it.  Raises OSError for what the
host refuses, `Unreadable` for what is wrong with one file.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from codexd import durable
from codexd.config import Directories

TAKE = ".take-"
# What the host refuses to all files, not to one.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE})
_STATE_MODE = 0o750
_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
_FINE = 4  # characters of an id that go on with the time


class Unreadable(ValueError):
    """One file in the inbox that cannot become a task; the text says why."""


def new_id() -> str:
    """A fresh task id: the time for people, chance against collisions.

    Of the ten characters the first four go on with the time, below a microsecond: who
    submits one task after another gets ids in that order, in which the inbox is taken.
    """
    second, rest = divmod(time.time_ns(), 10**9)
    fine = rest * len(_LETTERS) ** _FINE // 10**9
    digits = [_LETTERS[fine // len(_LETTERS) ** n % len(_LETTERS)] for n in range(_FINE)]
    chance = [secrets.choice(_LETTERS) for _ in range(10 - _FINE)]
    when = time.strftime("%Y%m%dt%H%M%S", time.gmtime(second))
    return "".join([when, "-", *reversed(digits), *chance])


def claim(
    dirs: Directories,
    names: Sequence[tuple[str, str]],
    refused: Callable[[OSError], None] | None = None,
) -> list[str]:
    """Take (id, name) pairs out of sight of other programs; the ids taken.

    Left out are a file that vanished meanwhile (its dropper thought better of it),
    one whose id another file was taken under, and one that cannot be moved, which
    `refused` is told: they stay where they are.
    """
    chosen: dict[str, str] = {}
    for id, name in names:
        if id not in chosen and not durable.is_there(dirs.inbox / (TAKE + id), follow=False):
            chosen[id] = name
    try:
        for id, name in chosen.items():
            (dirs.tasks / id).mkdir(mode=_STATE_MODE, exist_ok=True)
            durable.write(dirs.tasks / id / "name", os.fsencode(name))
        durable.sync_directory(dirs.tasks)
    except OSError:
        for id in chosen:  # on a full disk every round would leave more of them
            discard(dirs, id)
        raise
    claimed = []
    for id, name in chosen.items():
        try:
            os.rename(dirs.inbox / name, dirs.inbox / (TAKE + id))
            claimed.append(id)
        except FileNotFoundError:
            discard(dirs, id)
        except OSError as error:  # a mount point, or immutable
            discard(dirs, id)
            if refused is None or error.errno in FULL:
                raise
            refused(error)
    durable.sync_directory(dirs.inbox)
    return claimed


def dropped_name(dirs: Directories, id: str) -> str:
    """The name under which a claimed file was dropped.

    Anybody who may drop files can make a `.take-ID`, too: without a record it is
    a file that was dropped as ID.md.
    """
    found = taken_name(dirs, id)
    if found is None:
        (dirs.tasks / id).mkdir(mode=_STATE_MODE, exist_ok=True)
        durable.write(dirs.tasks / id / "name", f"{id}.md".encode())
    return found or f"{id}.md"


def taken_name(dirs: Directories, id: str) -> str | None:
    """The same for who only reads; None where there is no record."""
    try:
        return os.fsdecode(durable.read(dirs.tasks / id / "name", 4096))
    except (FileNotFoundError, ValueError):
        return None


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
    names = (kept, f"{kept}.reason")
    if any(durable.is_there(dirs.rejected / name, follow=False) for name in names):
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
