"""Tasks that were accepted and that the ledger has lost, as when their first line is damaged.

Their record is left: in tasks/ID, or in archive/YYYY-MM/ID without an end, where whoever
repairs the ledger has put it.  They are never run.  A retry makes a new task that takes
their place: their key then stands for that one.

Whoever asks has looked into the ledger first.  Raises OSError.
"""

from __future__ import annotations

from codexd import durable, place, spool
from codexd.directories import Directories
from codexd.model import is_id

_HEIR = "retried"  # beside the record: the id of the new task


def is_lost(dirs: Directories, id: str) -> bool:
    """Whether an id that the ledger does not have is that of such a task."""
    if not is_id(id) or durable.is_there(dirs.inbox / (spool.TAKE + id), follow=False):
        return False
    # In this order: who has just ended moves from the first to the second.
    homes = (dirs.tasks / id, place.archived(dirs, id))
    there = any(durable.is_there(home / "task.json") for home in homes)
    return there and not any(durable.is_there(home / "status.json") for home in homes)


def why(dirs: Directories, id: str) -> str:
    """What is to be said of a lost task."""
    if new := heir(dirs, id):
        return f"the ledger had lost task {id}; task {new} has taken its place"
    return (
        f"the ledger has lost task {id}, so it is not run; "
        "see Repairing the ledger in codexd(7) for what to do"
    )


def heir(dirs: Directories, id: str) -> str | None:
    """The task that has taken the place of a lost one."""
    try:
        found = durable.read(place.archived(dirs, id) / _HEIR, 64).decode("ascii", "replace")
    except (FileNotFoundError, ValueError):
        return None
    return found if is_id(found) and found != id else None


def inherit(dirs: Directories, id: str, new: str) -> None:
    """`new` is the retry of a task: of a lost one it takes the place.  Repeatable."""
    if not is_lost(dirs, id) or heir(dirs, id):
        return
    if key := _key(dirs, id):
        try:
            known = place.keyed(dirs, key)
        except ValueError:
            known = None  # damaged: whoever uses the key is told
        if known and known.id == id:
            place.remember_key(dirs, key, place.Keyed(new, known.sha256))
    place.keep(dirs, id, _HEIR, new)


def _key(dirs: Directories, id: str) -> str | None:
    try:
        request = durable.read_json(place.archived(dirs, id) / "task.json").get("request")
    except (FileNotFoundError, ValueError):
        return None
    key = request.get("key") if isinstance(request, dict) else None
    return key if isinstance(key, str) else None
