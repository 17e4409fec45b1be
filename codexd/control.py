"""Control files: cancel, hold, release, drain, reset, compact, obeyed before any task is taken.

Part of the master.  They are obeyed in the order in which they came, so that the last
of two that contradict each other stands.  The effect is in the ledger before the file
is removed, and obeying twice changes nothing (but for the release of a held task that waits
for another or for a time: the first undoes the hold, one more lets it start).

A control for something that does not exist is rejected with its reason, like any other file.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from codexd import clock, controlfile, place, session, spool, taskfile
from codexd.config import Config
from codexd.controlfile import ALL
from codexd.dispatch import wait
from codexd.finish import Finish
from codexd.gate import BY_HAND, DRAIN, HOLD, Keeper
from codexd.launcher import Launcher
from codexd.ledger import Ledger
from codexd.model import Event, Kind, Note, State, Task, is_id
from codexd.outcome import Outcome

Record = Callable[[list[Event]], None]
_CLOSING = {
    HOLD: "held by hand; `codexd release` lets work go on",
    DRAIN: "drained by hand: what runs goes on to its end; `codexd release` starts tasks again",
}
_ENDINGS = (".cancel", ".hold", ".release", ".reset", ".drain", ".compact")


class Controls:
    """Obeys control files."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        launcher: Launcher,
        keeper: Keeper,
        finish: Finish,
        refused: Callable[..., None],
    ) -> None:
        """`refused` is told what the host would not do."""
        self.refused = refused
        self.dirs = config.dirs
        self.ledger = ledger
        self.launcher = launcher
        self.keeper = keeper
        self.finish = finish
        self.waiting: list[str] = []  # those whose task is in the inbox, or runs and is to be held
        self._came: dict[str, tuple[int, int]] = {}  # see `_order`
        self._looks = 0

    def obey(self, names: list[str], record: Record) -> list[str]:
        """Obey what is a control file; the other names.

        A retry is left to the intake: it makes a task.
        """
        found = [name for name in names if name.endswith(_ENDINGS)]
        self._looks += 1
        self._came = {name: self._order(name) for name in found}
        done = self._all_tried(found, record)
        return [name for name in names if name not in done]

    def again(self, record: Record) -> None:
        """Look once more at those that wait, as their tasks may have become others."""
        self._all_tried(self.waiting, record)

    def _all_tried(self, names: list[str], record: Record) -> set[str]:
        self.waiting = []
        order = sorted(names, key=lambda name: (self._came[name], name))
        return {name for name in order if self._tried(name, record)}

    def _order(self, name: str) -> tuple[int, int]:
        """When a control file was put there: in which look it was new, then by its time.

        The clock may have been set back between two that are not of one look.
        """
        try:
            written = os.lstat(self.dirs.inbox / name).st_mtime_ns
        except FileNotFoundError:
            return 0, 0
        look, known = self._came.get(name, (0, 0))
        return (look if written == known else self._looks), written

    def _tried(self, name: str, record: Record) -> bool:
        """`_obeyed`; what the host refuses is tried again in the next round."""
        try:
            return self._obeyed(name, record)
        except OSError as error:
            target = name.rpartition(".")[0]
            self.refused(error, task=target if is_id(target) else None)
            return True

    def _obeyed(self, name: str, record: Record) -> bool:
        """Whether the intake need not look at this file."""
        try:
            control = controlfile.control(name)
        except taskfile.Refused:
            return False  # the intake rejects it with this very reason
        if control is None or not spool.is_empty_file(self.dirs.inbox / name):
            return False
        if self._is_early(control):
            self.waiting.append(name)
            return True
        if not self._obey(control, record):
            return False
        if control.verb not in BY_HAND or self.keeper.remembered(control.verb):
            (self.dirs.inbox / name).unlink(missing_ok=True)
        return True  # on a full disk the file itself has to remember the hold

    def _is_early(self, control: controlfile.Control) -> bool:
        """Whether it is for later: the file itself remembers it."""
        if not is_id(control.target):
            return False
        task = self.ledger.book.tasks.get(control.target)
        to_come = control.verb == HOLD and task is not None and task.state is State.RUNNING
        return to_come or spool.in_inbox(self.dirs, control.target)

    def _obey(self, control: controlfile.Control, record: Record) -> bool:
        """Whether it was obeyed; False for one that has no task to act on."""
        verb, target = control.verb, control.target
        if verb == "reset":
            return self._reset(target, record)
        if target == ALL:
            self._all(verb)
            return True
        task = self.ledger.book.tasks.get(target)
        if task is None:
            return place.has_ended(self.dirs, target)  # ended is as good as obeyed
        try:
            record(self._change(task, verb))
        except OSError:  # a full disk, which this very task may be filling
            if verb == "cancel" and task.state is State.RUNNING:
                self.launcher.stop([target])
            raise
        if verb == "release":
            self._forget(f"{target}.{HOLD}", control.name)
        return True  # what the ledger says is cancelled, `Attempts.collect` stops

    def _forget(self, name: str, by: str) -> None:
        """Remove a control file that is still there and is not later than that other one."""
        if self._order(name) <= self._order(by):
            (self.dirs.inbox / name).unlink(missing_ok=True)

    def _all(self, verb: str) -> None:
        if verb == "compact":
            self.ledger.rotate(clock.now())
        elif verb in _CLOSING:
            self.keeper.close(verb, _CLOSING[verb])
        else:
            kept = [reason for reason in BY_HAND if not self.keeper.remembered(reason)]
            self.keeper.release()
            for reason in kept:  # but what was asked for since
                self._forget(f"{ALL}.{reason}", f"{ALL}.{verb}")

    def _change(self, task: Task, verb: str) -> list[Event]:
        """The events that a verb means for a live task."""
        now = clock.now()
        if verb == "cancel" and task.state is State.RUNNING:
            return [] if task.cancel else [Event(now, Kind.STOPPING, task.id, {"cancel": True})]
        if verb == "cancel":
            before = f"; its last attempt said: {task.message}" if task.message else ""
            text = "cancelled on request" + before
            facts = {"outcome": Outcome.CANCELLED.value, "message": text}
            return [self.finish.end(task, Kind.CANCELLED, facts)]
        if verb == "hold" and task.state in (State.QUEUED, State.WAITING) and task.reason != "hold":
            return [Event(now, Kind.WAITING, task.id, {"reason": "hold"})]
        return _released(task, now) if verb == "release" else []

    def _reset(self, name: str, record: Record) -> bool:
        known = self.finish.session(name)
        live = [t for t in self.ledger.book.tasks.values() if t.session_name == name]
        if known.created is None and not live:
            return False
        now = clock.now()
        record([Event(now, Note.RESET, facts={"session": name, "thread": known.thread})])
        begun = next((task.id for task in live if task.launches), None)
        session.save(self.dirs.sessions, session.forget(known, now, begun))
        return True


def _released(task: Task, now: str) -> list[Event]:
    """The events that let a task start."""
    if not task.bound:
        return [Event(now, Kind.QUEUED, task.id)] if task.state is State.WAITING else []
    waits = Event(now, Kind.WAITING, task.id, wait(task))
    freed = Event(now, Kind.QUEUED, task.id, {"freed": True})
    if task.state is State.QUEUED:  # just taken, it was about to wait
        return [waits, freed]
    if task.reason == "hold":
        return [waits]  # back to what its own file says
    return [freed] if task.state is State.WAITING else []
