"""The master's door: dropped files become tasks, or are rejected with a reason.

Part of the master: it alone calls this, and passes in what it owns.  Nothing
here blocks, and one bad file harms only itself.  An OSError that is the host's
fault (full disk, I/O error) is raised, and everything taken so far is
continued in a later round from inbox/.take-ID.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

from codexd import clock, controlfile, lost, place, retention, spool, taskfile
from codexd.asked import Refusal, again, allowed, workdir
from codexd.config import Config
from codexd.document import UNPRINTABLE, Form, Scalar
from codexd.ledger import Ledger
from codexd.model import Event, Kind, Note, Request
from codexd.parents import Orphans, Parents
from codexd.when import MOST, when

# Of a round, which dispatch must not wait for:
BATCH = 64  # files
LOOK = 1.0  # seconds after its begin in which they are looked at; YAML may take long to read

Log = Callable[..., None]


class Conflict(Refusal):
    """The file's key was seen with other content: `id` is the first task."""

    def __init__(self, id: str, key: str) -> None:
        super().__init__(f"key {key!r} was used by task {id} with other content")
        self.id = id


class Later(Exception):
    """Tasks that the file's is to follow are not there yet, but may come: their ids or keys."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(*names)
        self.names = names


class Repeat(Exception):
    """The file's key was seen with the same content: `id` is the first task."""

    def __init__(self, id: str, key: str) -> None:
        super().__init__(id)
        self.id = id
        self.key = key


class Intake:
    """Takes settled files, a batch a round."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        settled: spool.Settled,
        refused: Callable[..., None],
        limits: bool,
    ) -> None:
        """`refused` is told what the host would not do.

        `limits`: whether workers can have limits of their own.
        """
        self.limits = limits
        self.refused = refused
        self.config = config
        self.dirs = config.dirs
        self.ledger = ledger
        self.settled = settled
        self.full = False  # the queue is at its limit; files stay in the inbox
        self.more = False  # there is work for the next round
        self.parents = Parents(self.dirs, ledger)
        self.orphans = Orphans()
        self._accepted: set[str] = set()  # in this batch: the ledger does not have them yet
        self._stuck: set[str] = set()  # names that cannot be moved: they come last
        self._unsettled: dict[str, Event | None] = {}  # in the ledger, but not yet moved away

    def take(self, names: list[str], leftover: list[str], now: float) -> list[Event]:
        """Accept or reject what is settled; the events, already in the ledger.

        `now` is when the round began, in monotonic seconds.
        """
        self._accepted.clear()
        leftover = [id for id in leftover if id not in self.orphans]
        leftover.sort(key=self._unsettled.__contains__)  # those put off come last
        begun = len(set(leftover) - self._unsettled.keys())
        free = self.config.limits.queue - len(self.ledger.book.tasks) - begun
        self.full = free <= 0 and bool(names)
        room = max(0, min(BATCH - begun, free))
        late = self.orphans.again([*names, *leftover], room)
        names = sorted(names, key=self._stuck.__contains__)
        complete = (n for n in names if self.settled(self.dirs.inbox, n, now))
        batch = list(islice(complete, room - len(late)))
        self.more = 0 < room == len(batch) + len(late)
        pairs = [(self._id_for(name), name) for name in batch]
        claimed = spool.claim(self.dirs, pairs, self.refused) if pairs else []
        unmoved = {name for id, name in pairs if id not in claimed}
        self._stuck = self._stuck.intersection(names).difference(batch) | unmoved
        for _, name in pairs:
            self.settled.forget(name)
        wanted = dict(reversed(pairs))  # of two files with one id the first was taken
        ids = [*leftover[:BATCH], *late, *claimed]
        looked = self._looked(ids, wanted, now + LOOK)
        unseen = {id for id in ids if id not in looked or isinstance(looked[id], OSError)}
        for id, found in looked.items():
            if isinstance(found, Later):
                there = {*names, *leftover[BATCH:], *unseen}.difference(batch)
                self.orphans.add(id, found.names, there)
        events = {id: f for id, f in looked.items() if not isinstance(f, OSError | Later)}
        fresh = [e for id, e in events.items() if e and id not in self._unsettled]
        self.ledger.append(fresh)
        self._unsettled.update(events)
        for id, event in events.items():
            self.orphans.forget(id)
            self.orphans.came(id, _key_of(event))
            self._settle(id, event)
        self.more = self.more or len(looked) < len(ids) or (room > 0 and self.orphans.due)
        return fresh

    def _looked(
        self, ids: list[str], names: dict[str, str], until: float
    ) -> dict[str, Event | OSError | Later | None]:
        """What each file comes to: of one at least, and of others up to a monotonic time."""
        looked: dict[str, Event | OSError | Later | None] = {}
        for id in ids:
            if looked and time.monotonic() >= until:
                break
            looked[id] = self._look(id, names.get(id))
        return looked

    def _look(self, id: str, name: str | None) -> Event | OSError | Later | None:
        """`_examine`, but an error of this one file's stays with it, for a later round."""
        try:
            event = self._examine(id, name)
        except Later as later:
            return later
        except OSError as error:
            self._put_off(error, id)
            return error
        said = self.ledger.book.verdicts.get(id)
        if event and said and not name and (event.kind, event.facts) == (said.kind, said.facts):
            self._unsettled[id] = event  # before a crash, and it was not moved away
        return event

    def _put_off(self, error: OSError, id: str) -> None:
        """Tell what the host refuses to one file; raise what it refuses to all."""
        if error.errno in spool.FULL:
            raise error
        self.refused(error, task=id)

    def _id_for(self, name: str) -> str:
        wanted = spool.wanted_id(name)
        return wanted if wanted and not self._used(wanted, name) else spool.new_id()

    def _used(self, id: str, name: str) -> bool:
        """Whether no task may have the id that this file asks for any more."""
        # Not by now: it may have waited for long, and was acknowledged when it came.
        came, kept = spool.delivered(self.dirs.inbox / name), self.config.retention.archive
        taken = self._is_task(id) or id in self.orphans
        return taken or (came is not None and retention.forgotten(id, kept, came))

    def _known(self, id: str) -> bool:
        return id in self.ledger.book.tasks or place.has_ended(self.dirs, id)

    def _examine(self, id: str, name: str | None) -> Event | None:
        """The ledger event for a claimed file; None if it is a task already."""
        if id in self._unsettled:
            return self._unsettled[id]
        if self._known(id):
            return None
        name = name or spool.dropped_name(self.dirs, id)
        now = clock.now()
        try:
            return self._accept(id, name, now)
        except (Refusal, taskfile.Refused, spool.Unreadable) as reason:
            facts: dict[str, object] = {"file": name, "reason": _one_line(reason), "id": id}
            if isinstance(reason, Conflict):
                facts["conflict"] = reason.id
            return Event(now, Note.REJECTED, facts=facts)
        except Repeat as first:
            facts = {"file": name, "key": first.key, "first": first.id, "id": id}
            return Event(now, Note.REPEATED, facts=facts)

    def _settle(self, id: str, event: Event | None) -> None:
        """The ledger has it: the taken file goes where it belongs, if need be in a later round."""
        try:
            self._move(id, event)
        except OSError as error:
            self._put_off(error, id)
        else:
            del self._unsettled[id]

    def _move(self, id: str, event: Event | None) -> None:
        if event and event.kind is Note.REJECTED:
            reason = str(event.facts["reason"])
            spool.refuse(self.dirs, id, str(event.facts["file"]), reason)
            return
        task = self.ledger.book.tasks.get(id)
        if task and task.retry_of:
            lost.inherit(self.dirs, task.retry_of, id)
        spool.drop(self.dirs, id)
        if event and event.kind is Note.REPEATED:
            spool.discard(self.dirs, id)

    # --- one file -------------------------------------------------------------

    def _accept(self, id: str, name: str, now: str) -> Event:
        data = spool.contents(self.dirs, id, self.config.limits.file)
        control, of = controlfile.control(name), None
        if control and data:
            raise Refusal(controlfile.EMPTY.format(control.verb))
        if control and control.verb == "retry":
            of = control.target
            if of in self.ledger.book.tasks:
                raise Refusal(f"task {of} has not ended; cancel it first, or wait")
            request = again(self.dirs, of)
        elif control:
            what = "session" if control.verb == "reset" else "task"
            raise Refusal(f"there is no {what} {control.target} to {control.verb}")
        else:
            if (wanted := spool.wanted_id(name)) and wanted != id:
                raise Refusal(
                    f"the id {wanted} is used already, or so old that it may have been "
                    "(retention.archive); drop it under another name"
                )
            request = taskfile.parse(name, data, max_bytes=self.config.limits.file)
        allowed(self.config, request, self.limits)
        # As it was read: by the name of its file or its door alone it is no other task.
        bare = replace(request, title=None, key=None, prompt=request.prompt.strip())
        content = taskfile.dump(bare)
        sha256 = hashlib.sha256(content).hexdigest()
        known = not request.key or self._keyed(id, request.key, sha256)
        after, start = self._after(id, request), self._start(request, now)
        if request.key and not known:
            place.remember_key(self.dirs, request.key, place.Keyed(id, sha256))
        facts = {**self._facts(name, request, of), "after": after, **start}
        return self._record(id, name, request, of, now, facts)

    def _keyed(self, id: str, key: str, sha256: str) -> bool:
        """Whether the key is this very file's already.  Raises Conflict, Repeat."""
        try:
            found = place.keyed(self.dirs, key)
        except ValueError as damage:
            text = f"the record of key {key!r} is damaged: {damage}; move it away"
            raise Refusal(text) from damage
        if found and found.id != id and not self._is_task(found.id):
            found = None  # its file vanished before it became a task
        if found and found.id != id:
            if found.sha256 != sha256:
                raise Conflict(found.id, key)
            if found.id not in self.ledger.book.tasks and lost.is_lost(self.dirs, found.id):
                raise Refusal(f"key {key!r}: {lost.why(self.dirs, found.id)}")
            raise Repeat(found.id, key)
        return found is not None

    def _is_task(self, id: str) -> bool:
        """Whether it is one, or becomes one in this very batch."""
        return id in self.ledger.book.tasks or place.is_task(self.dirs, id)

    def _after(self, id: str, request: Request) -> list[str] | None:
        """The ids of tasks that it follows and that are not done.  Raises Later, Refusal."""
        found: list[str] = []
        missing: list[str] = []
        for name in request.after:
            try:
                parent = self.parents.find(name, self._accepted)
            except ValueError as damage:
                text = f"after: the record of key {name!r} is damaged: {damage}; move it away"
                raise Refusal(text) from damage
            if parent is None:
                missing.append(name)
            elif parent not in found and (
                parent in self._accepted or not self.parents.is_done(parent)
            ):
                found.append(parent)
        if missing and id in self.orphans.given_up:
            raise Refusal(
                f"after: there is no task with the id or key {missing[0]!r}, and none in the inbox "
                "that could be taken before this one"
            )
        if missing:
            raise Later(tuple(dict.fromkeys(missing)))
        return found or None

    def _start(self, request: Request, now: str) -> dict[str, object]:
        """The time before which it does not start; nothing if that has passed."""
        if request.not_before is None:
            return {}
        at = clock.epoch(now)
        found = when(Scalar(request.not_before, Form.PLAIN), at)
        if found is None or found.at > at + MOST:
            raise Refusal(f"not_before: {request.not_before!r} is more than 366 days ahead")
        if found.at <= at:
            return {}
        return {"not_before": clock.stamp(found.at), "delay": found.delay}

    def _facts(self, name: str, request: Request, of: str | None) -> dict[str, object]:
        """What the ledger says of an accepted task."""
        return {
            "session": request.session,
            "priority": request.priority,
            "file": name,
            "title": request.title,
            "key": request.key,
            "retry_of": of,
            "workdir": os.path.normpath(workdir(self.config, request)),
            "profile": request.profile,
            "limit": request.attempts or self.config.attempts,
        }

    def _record(
        self,
        id: str,
        name: str,
        request: Request,
        of: str | None,
        now: str,
        facts: dict[str, object],
    ) -> Event:
        record: dict[str, object] = {
            "id": id,
            "file": name,
            "created": now,
            "retry_of": of,
            "request": request.to_json(),
        }
        place.store(self.dirs, id, record)
        self._accepted.add(id)
        return Event(now, Kind.QUEUED, id, facts)


def _key_of(event: Event | None) -> str | None:
    """The key of a task that was accepted by this event."""
    key = event.facts.get("key") if event and event.kind is Kind.QUEUED else None
    return str(key) if key else None


def _one_line(reason: Exception) -> str:
    """What is written to the ledger, the log and NAME.reason: harmless in a terminal."""
    text = UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], str(reason))
    return text[:500]
