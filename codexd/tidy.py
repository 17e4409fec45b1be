"""Directories of tasks/ that belong to no live task: what a crash left behind.

Part of the master, once at its start.  What had ended is moved to the archive,
what was never accepted is removed, as is what tried the sandbox, what nobody can
explain is left as it is and told.  One that cannot be dealt with harms only itself.
"""

from __future__ import annotations

from collections.abc import Callable

from codexd import durable, place, spool
from codexd.directories import Directories
from codexd.ledger import Book
from codexd.model import is_id
from codexd.service import sentence


def tidy(dirs: Directories, book: Book, warn: Callable[..., None]) -> None:
    """Tidy up; `warn` is the master's log."""
    for id in sorted(path.name for path in dirs.tasks.iterdir()):
        try:
            if id not in book.tasks:
                _one(dirs, id, warn)
        except OSError as error:
            warn("not.tidied", task=id, path=dirs.tasks / id, why=sentence(error))


def _one(dirs: Directories, id: str, warn: Callable[..., None]) -> None:
    if durable.is_there(dirs.inbox / (spool.TAKE + id), follow=False):
        return
    if not is_id(id):
        warn("not.ours", path=dirs.tasks / id, why="no task; left as it is")
    elif place.is_concluded(dirs, id):
        place.archive(dirs, id)
    elif durable.is_there(dirs.tasks / id / "task.json"):
        why = "the ledger's line of it is lost; left as it is, what follows it waits: see codexd(7)"
        warn("task.unknown", task=id, why=why)
    elif place.is_probe(dirs, id):
        place.end_probe(dirs, id)
    else:
        spool.discard(dirs, id)
