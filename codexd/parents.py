"""Tasks that others follow (`after`): whether they are there, and what they came to.

Part of the master.  A file whose parent is not a task yet is no task either: it
stays in the inbox, as .take-ID, until the parent was taken, and is rejected once
nothing is left in the inbox that could be the parent.  So in the ledger a parent
stands before its children, and nothing can wait for itself: neither around a
circle nor, in a session, for something behind it.

Raises OSError for what the host refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import islice

from codexd import lost, place
from codexd.config import Directories
from codexd.ledger import Ledger
from codexd.model import State, is_id

_KNOWN = 1000  # ended tasks of which it is remembered what they came to


class Parents:
    """What became of tasks; each that has ended is read once."""

    def __init__(self, dirs: Directories, ledger: Ledger) -> None:
        self.dirs = dirs
        self.tasks = ledger.book.tasks
        self._ended: dict[str, Mapping[str, object]] = {}

    def came_to(self, id: str) -> Mapping[str, object] | None:
        """A task as it ended, as JSON has it; None while it has not.

        None of one that the ledger has lost, too, until another has taken its place.  That one
        is not waited for: it stands behind in the ledger, perhaps in the same session.
        """
        if id in self.tasks:
            return None
        if id not in self._ended:
            told = self._told(id)
            if told is None:
                return None
            while len(self._ended) >= _KNOWN:
                del self._ended[next(iter(self._ended))]
            kept = ("state", "outcome", "message", "title", "file")
            self._ended[id] = {key: told.get(key) for key in kept}
        return self._ended[id]

    def _told(self, id: str) -> Mapping[str, object] | None:
        try:
            if found := place.status(self.dirs, id):
                return found
            why = "its record is gone"
            if lost.is_lost(self.dirs, id):
                if not lost.heir(self.dirs, id):
                    return None
                why = f"{lost.why(self.dirs, id)}: retry this one when that is done"
        except ValueError as damage:
            why = f"its record is damaged: {damage}"
        return {"state": "unknown", "message": why}

    def is_done(self, id: str) -> bool:
        told = self.came_to(id)
        return told is not None and told["state"] == State.DONE

    def find(self, name: str, accepted: Collection[str]) -> str | None:
        """The id of the task that an id or a key stands for; None if there is none.

        `accepted` are those of this batch, which the ledger does not have yet.
        Raises ValueError if the record of the key is damaged.
        """
        if is_id(name) and self._is_task(name, accepted):
            return lost.heir(self.dirs, name) or name
        found = place.keyed(self.dirs, name)
        return found.id if found and self._is_task(found.id, accepted) else None

    def _is_task(self, id: str, accepted: Collection[str]) -> bool:
        known = id in accepted or id in self.tasks or place.has_ended(self.dirs, id)
        return known or lost.is_lost(self.dirs, id)


class Orphans:
    """Taken files whose parents are not tasks yet, by the ids that they will have."""

    def __init__(self) -> None:
        self.given_up: set[str] = set()  # those whose parents will not come
        self._missing: dict[str, tuple[str, ...]] = {}
        self._children: dict[str, set[str]] = {}  # by their parent's id or key
        self._due: dict[str, None] = {}  # whose parent has come
        self._hope: set[str] = set()  # files that may be their parents

    def __contains__(self, id: str) -> bool:
        return id in self._missing

    @property
    def due(self) -> bool:
        """Whether there is something to do without waiting for new files."""
        return bool(self._due) or (bool(self._missing) and not self._hope)

    def add(self, id: str, missing: tuple[str, ...], inbox: Iterable[str]) -> None:
        """`inbox` are the files that are there, and not taken yet."""
        self.forget(id)
        self._missing[id] = missing
        for name in missing:
            self._children.setdefault(name, set()).add(id)
        self._hope.update(inbox)

    def forget(self, id: str) -> None:
        """It is a task now, or was rejected."""
        self._due.pop(id, None)
        self.given_up.discard(id)
        for name in self._missing.pop(id, ()):
            self._children[name].discard(id)
            if not self._children[name]:
                del self._children[name]

    def came(self, *names: str | None) -> None:
        """A task was accepted that has these names: an id, and a key."""
        for name in names:
            self._due.update(dict.fromkeys(sorted(self._children.get(name or "", ()))))

    def again(self, inbox: Collection[str], most: int) -> list[str]:
        """Those to look at again, at most so many; `inbox` are the files not taken yet."""
        self._hope.intersection_update(inbox)
        if self._missing and not self._due and not self._hope:
            self.given_up = set(self._missing)
            self._due = dict.fromkeys(self._missing)
        return list(islice(self._due, most))
