"""Sessions that worked in one directory at the same time: what each of them must say.

Part of the master.  That two tasks may share a workdir is the default; that both
changed something there, while both were running, is told in the answer and the log.
Looked at when the first of them ends.  The other gets a file `beside` in its
directory, so that it is said after a restart as well.

A task may have changed something when Codex ran a command, an edit or a tool for it,
in a sandbox that lets it write.  Directories are compared by their names.

Raises OSError for what is the ended task's own.  What another left and nobody can read
keeps no answer back: it may have changed something.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from codexd import durable, place
from codexd.directories import Directories
from codexd.dispatch import overlap
from codexd.model import State, Task

_LONGEST = 300  # characters of a name in what is noted
_LOOK = 1 << 20  # bytes of its events; one that writes does not talk for so long before
# No text can hold this: within a string of JSON the quotes are escaped.
_WRITES = re.compile(rb'"type":\s*"(?:command_execution|file_change|mcp_tool_call)"')


class Beside:
    """Looks at tasks that end."""

    def __init__(
        self,
        dirs: Directories,
        tasks: Mapping[str, Task],
        told: Callable[..., None],
        refused: Callable[..., None],
    ) -> None:
        """`tasks` are the live ones; `told` is the master's log of warnings, `refused` is
        told what the host would not do."""
        self.dirs = dirs
        self.tasks = tasks
        self.told = told
        self.refused = refused

    def look(self, task: Task) -> None:
        """Note what a running task whose attempt has ended, and others, must say."""
        others = [t for t in self.tasks.values() if t.id != task.id and _meet(t, task)]
        if not others or not self._may_write(task):
            return
        for other in others:
            try:
                met = self._may_write(other)
                if met:
                    self._note(other, task)
            except OSError as error:
                self.refused(error, task=other.id, session=other.session)
                met = True
            if met:
                self._note(task, other)

    def _may_write(self, task: Task) -> bool:
        here = place.attempt(self.dirs, task.id, task.launches)
        try:
            orders = durable.read_json(here / "attempt.json")
            said = durable.head(here / "events.jsonl", _LOOK)
        except (FileNotFoundError, ValueError):
            return False  # it did not come so far, or it will be said to be damaged
        return not str(orders.get("sandbox")).endswith("read-only") and bool(_WRITES.search(said))

    def _note(self, task: Task, other: Task) -> None:
        """The first that it met is enough."""
        path = place.beside(self.dirs, task.id)
        if not durable.is_there(path):
            whose = f" of session {_cut(other.session)}" if other.session else ""
            text = f"task {other.id}{whose} worked in {_cut(str(other.workdir))} at the same time"
            durable.write(
                path, f"{text}; both may have changed files there".encode("utf-8", "replace")
            )
            self.told("workdir.shared", task=task.id, session=task.session, with_task=other.id)


def _cut(text: str) -> str:
    """A path may have 4096 bytes, and all of it is said in a message."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _meet(one: Task, other: Task) -> bool:
    places = one.workdir, other.workdir
    return one.state is State.RUNNING and all(places) and overlap(str(places[0]), str(places[1]))
