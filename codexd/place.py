"""A task's own directory, and where its end is kept: tasks/ID, answers, archive, keys.

Owns tasks/ID (but for tasks/ID/N between launch and end, which is the
worker's), answers/, archive/YYYY-MM/ID and keys/.  Written by the master alone;
every step may be repeated after a crash.

Raises OSError for what the host refuses, ValueError for a damaged file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from codexd import durable
from codexd.config import Directories
from codexd.model import State, check
from codexd.sane import word

_STEM = re.compile(r"[^A-Za-z0-9._-]")
_MODE = 0o750
_BESIDE = 4096  # bytes: two names, of up to four bytes a character, and the words


def store(dirs: Directories, id: str, task: dict[str, object]) -> None:
    """tasks/ID/task.json: what was asked for, as the worker reads it."""
    durable.write_json(dirs.tasks / id / "task.json", task)


def load(dirs: Directories, id: str) -> dict[str, object]:
    """tasks/ID/task.json.  Raises OSError, ValueError."""
    return durable.read_json(dirs.tasks / id / "task.json")


# --- a task's own directory ---------------------------------------------------------


def beside(dirs: Directories, id: str) -> Path:
    """Where it says who worked in the same directory at the same time."""
    return dirs.tasks / id / "beside"


def told_beside(dirs: Directories, id: str) -> str:
    """What it says there; "" for nothing."""
    try:
        return durable.read(beside(dirs, id), _BESIDE).decode("utf-8", "replace")
    except (FileNotFoundError, ValueError):
        return ""  # nothing was noted, or it is damaged: no reason to keep the answer back


def attempt(dirs: Directories, id: str, number: int) -> Path:
    return dirs.tasks / id / str(number)


def begin_attempt(dirs: Directories, id: str, number: int, orders: dict[str, object]) -> None:
    """tasks/ID/N/attempt.json: the worker's orders.

    The directory is durable, because what is in it later must be.  The orders
    are not: after a power cut there is no worker to read them, and the next
    attempt gets new ones.
    """
    place = attempt(dirs, id, number)
    place.mkdir(mode=_MODE, exist_ok=True)
    if place.is_symlink():  # put there by the attempt before: it may lead anywhere
        raise durable.NotAFile(errno.EEXIST, "a symbolic link", os.fspath(place))
    fd = durable.opened(place / "attempt.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with open(fd, "w", encoding="utf-8") as file:
        json.dump(orders, file, indent=1)
    durable.sync_directory(place.parent)


def begin_probe(dirs: Directories, id: str, orders: dict[str, object]) -> None:
    """The orders of a worker that runs no task; nothing of them where they cannot be written."""
    (dirs.tasks / id).mkdir(mode=_MODE)
    try:
        begin_attempt(dirs, id, 1, orders)
    except OSError:
        end_probe(dirs, id)
        raise


def end_probe(dirs: Directories, id: str) -> None:
    """Remove all that is left of it."""
    shutil.rmtree(dirs.tasks / id)


def is_probe(dirs: Directories, id: str) -> bool:
    """Whether this is the directory of no task but of such a worker."""
    try:
        return durable.read_json(attempt(dirs, id, 1) / "attempt.json").get("probe") is True
    except (FileNotFoundError, ValueError):
        return False


def load_ended(dirs: Directories, id: str) -> dict[str, object]:
    """The task.json of a task that has ended.  Raises OSError, ValueError."""
    home = dirs.tasks / id if is_concluded(dirs, id) else archived(dirs, id)
    return durable.read_json(home / "task.json")


def was_started(dirs: Directories, id: str, number: int) -> bool:
    """Whether a worker passed the at-most-once point of this attempt."""
    return durable.is_there(attempt(dirs, id, number) / "started")


def result(dirs: Directories, id: str, number: int) -> dict[str, object] | None:
    """What the worker wrote, or None if it did not come so far.

    Raises ValueError when the file is damaged.
    """
    try:
        return durable.read_json(attempt(dirs, id, number) / "result.json")
    except FileNotFoundError:
        return None


# --- the end of a task ----------------------------------------------------------------


def answer_name(id: str, file: str | None) -> str:
    """The answer's file name, from the id and the dropped name."""
    name = os.path.splitext(file or "")[0].encode("utf-8", "replace")
    stem = _STEM.sub("_", name.decode("latin-1"))
    return f"{id}.md" if not stem or stem == id else f"{stem[:100]}.{id}.md"


def write_answer(dirs: Directories, name: str, text: bytes) -> None:
    durable.write(dirs.answers / name, text, 0o640)


def archived(dirs: Directories, id: str) -> Path:
    """Where an ended task lies: found by its id alone, however long the history."""
    return dirs.archive / f"{id[:4]}-{id[4:6]}" / id


def conclude(dirs: Directories, id: str, status: dict[str, object]) -> None:
    """tasks/ID/status.json: the task's last word, written before the ledger says it."""
    durable.write_json(dirs.tasks / id / "status.json", status)


def archive(dirs: Directories, id: str) -> None:
    """Move a concluded task out of tasks/.  Repeatable."""
    source, target = dirs.tasks / id, archived(dirs, id)
    if durable.is_directory(source):
        _tidy(source)
        target.parent.mkdir(mode=_MODE, exist_ok=True)
        os.rename(source, target)
        durable.sync_directory(target.parent)


def _tidy(home: Path) -> None:
    """Remove what writers left that were killed; nobody writes here any more."""
    durable.sweep(home)
    for path in home.iterdir():
        if path.name.isdigit() and path.is_dir() and not path.is_symlink():
            durable.sweep(path)


def keep(dirs: Directories, id: str, name: str, text: str) -> None:
    """A note beside an ended task, in place of one of that name; none where it is gone."""
    for home in (archived(dirs, id), dirs.tasks / id):
        if durable.is_directory(home):
            durable.write(home / name, text.encode("utf-8", "replace"))
            return


def status(dirs: Directories, id: str) -> dict[str, object] | None:
    """What a task came to, wherever it lies by now; None if it has not ended.

    Raises OSError, ValueError.
    """
    for path in (archived(dirs, id) / "status.json", dirs.tasks / id / "status.json"):
        try:
            told = durable.read_json(path)
        except FileNotFoundError:
            continue
        try:
            check(told)
            if told.get("id") != id or not word(State, "state", told.get("state")).ended:
                raise ValueError("it is no task of this id that has ended")
        except ValueError as damage:
            raise ValueError(f"{path}: {damage}") from damage
        return told
    return None


def has_ended(dirs: Directories, id: str) -> bool:
    """`known`, or its last word is written and it only has to be moved."""
    return known(dirs, id) or is_concluded(dirs, id)


def is_concluded(dirs: Directories, id: str) -> bool:
    """Whether its last word is written, and it still lies in tasks/."""
    return durable.is_there(dirs.tasks / id / "status.json")


def is_task(dirs: Directories, id: str) -> bool:
    """`has_ended`, or what is needed or left of it lies in tasks/ID, whatever the ledger says."""
    left = (dirs.tasks / id / "task.json", attempt(dirs, id, 1))
    return has_ended(dirs, id) or any(map(durable.is_there, left))


def known(dirs: Directories, id: str) -> bool:
    """Whether an ended task has this id."""
    return durable.is_directory(archived(dirs, id))


# --- keys -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keyed:
    """What an idempotency key stands for."""

    id: str
    sha256: str


def _key_path(dirs: Directories, key: str) -> Path:
    import hashlib

    return dirs.keys / hashlib.sha256(key.encode()).hexdigest()


def keyed(dirs: Directories, key: str) -> Keyed | None:
    """The task first submitted with this key.  Raises OSError, ValueError."""
    try:
        found = durable.read_json(_key_path(dirs, key), 4096)
    except FileNotFoundError:
        return None
    return Keyed(str(found.get("id")), str(found.get("sha256")))


def remember_key(dirs: Directories, key: str, value: Keyed) -> None:
    record: dict[str, object] = {"key": key, "id": value.id, "sha256": value.sha256}
    durable.write_json(_key_path(dirs, key), record)
