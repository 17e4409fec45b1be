"""What readers see: tasks, sessions and health, the same for command and HTTP.

Read-only, and in need of no lock and no running daemon.  Live tasks come from
the ledger, ended ones from their own directory in the archive, tasks not yet
taken from the inbox; so no answer depends on how long the history is.

Raises OSError where a file may not be read, LedgerBroken for a newer format.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

from codexd import durable, heartbeat, lock, lost, place, session, spend, spool, taskfile
from codexd.book import RECENT
from codexd.config import Directories
from codexd.dispatch import AFTER, of_one, overlap
from codexd.ledger import Follower
from codexd.model import Event, Note, State, Task, is_id, to_json
from codexd.outcome import Outcome

WORD = 5.0  # seconds in which the master says a word of a delivered file
LATE = 15.0  # seconds without a heartbeat after which the master counts as down
DAYS = 92  # days that a report of usage adds up
ARRIVING = 1000  # files of the inbox that a short list looks at
# What a session's file has for the master alone.
_PRIVATE = ("applied", "transcript", "reported", "used", "forgotten", "outrun", "lost")
_MONTH = re.compile(r"[0-9]{4}-[0-9]{2}", re.ASCII)

Json = dict[str, object]


class View:
    """A reader's picture of one root; `refresh` brings it up to date."""

    def __init__(self, dirs: Directories, *, short_cut: bool = True) -> None:
        """`short_cut`: with the checkpoint, which may know of what is damaged by now."""
        self.dirs = dirs
        self._follower = Follower(dirs.ledger, dirs.checkpoint if short_cut else None)
        self._crowd: list[Task] | None = None  # those whose workdir others wait for
        self.damaged: list[str] = []  # days of use that could not be read

    def refresh(self) -> None:
        self._follower.refresh()
        self._crowd = None

    def close(self) -> None:
        self._follower.close()

    # --- tasks ------------------------------------------------------------------

    def task(self, id: str) -> Json | None:
        """One task as the contract has it, or None if there is none."""
        if not is_id(id):
            return None
        # Between the looks the task may move on from one place to the next,
        # always in this order: inbox, ledger, archive.  So look twice.
        for _ in range(2):
            self.refresh()
            live = self._follower.book.tasks.get(id)
            found = self._told(live) if live else self._ended(id)
            found = found or self._waiting(id)
            if found:
                return found
        return None

    def is_lost(self, id: str) -> bool:
        """Whether it was accepted, and the ledger has lost it."""
        return id not in self._follower.book.tasks and lost.is_lost(self.dirs, id)

    def verdict(self, id: str) -> Event | None:
        """Why a delivered file did not become a task: rejected, or repeated."""
        return self._follower.book.verdicts.get(id)

    def rejections(self) -> dict[str, Event]:
        """The last files that were rejected, by the ids that they were taken under."""
        verdicts = self._follower.book.verdicts.items()
        return {id: event for id, event in verdicts if event.kind is Note.REJECTED}

    def accepted(self, id: str) -> bool:
        """Whether the master has said anything of this task yet."""
        book = self._follower.book
        return id in book.tasks or id in book.verdicts or place.known(self.dirs, id)

    def _ended(self, id: str) -> Json | None:
        """A task that has ended, None if none of this id has."""
        try:
            return place.status(self.dirs, id)
        except ValueError as damage:
            text = f"its record is damaged: {damage}; the ledger tells what it came to"
            known = Task(id, State.FAILED, outcome=Outcome.UNKNOWN, message=text)
            return to_json(known, None, None)

    def _waiting(self, id: str) -> Json | None:
        """A task that is still in the inbox: queued, as far as anybody can tell."""
        for ending in (".md", ".json"):
            try:
                data = durable.read(self.dirs.inbox / f"{id}{ending}", 1 << 20)
                asked = taskfile.parse(f"x{ending}", data, max_bytes=1 << 20)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                break  # the master will say what is wrong with it
            task = Task(
                id, State.QUEUED, asked.session, asked.priority, f"{id}{ending}",
                asked.title, asked.key,
            )  # fmt: skip
            return to_json(task, None, None)
        return to_json(Task(id), None, None) if spool.in_inbox(self.dirs, id) else None

    def _told(self, live: Task) -> Json:
        """A live task; of those that it follows, the ones that have not ended."""
        after = tuple(id for id in live.after if id in self._follower.book.tasks)
        found = to_json(replace(live, after=after) if after else live, None, None)
        if live.state is State.QUEUED and not live.reason and (other := self._in_the_way(live)):
            why = f"task {other.id} works in {other.workdir} (workdir_sharing: no)"
            found |= {"reason": "workdir", "message": why}
        if live.reason == AFTER and (gone := next(filter(self.is_lost, live.after), None)):
            found |= {"message": lost.why(self.dirs, gone)}
        return found

    def _in_the_way(self, queued: Task) -> Task | None:
        """Who works in its workdir, where two may not; nothing is written down for it."""
        if self._crowd is None:
            tasks = self._follower.book.tasks.values()
            self._crowd = [t for t in tasks if t.state is State.RUNNING]
            beat = heartbeat.read(self.dirs.heartbeat) if self._crowd else None
            if beat is None or beat[1].get("workdir_sharing") is not False:
                self._crowd = []
        mine = queued.workdir or "/"
        return next((t for t in self._crowd if overlap(mine, t.workdir or "/")), None)

    def live(self) -> list[Task]:
        """Tasks that have not ended, in ledger order."""
        return list(self._follower.book.tasks.values())

    def short_list(self, state: str | None = None, session: str | None = None) -> list[Json]:
        """The last fifty that ended, the live ones, and those with an id in the inbox.

        With a state or a session: of those that are so.
        """
        arriving = self._arriving()  # first: what is taken meanwhile is then among the live
        self.refresh()
        if state or session is not None:
            ended = self.last(state, session, RECENT)
        else:
            recent = (self._ended(id) for id in list(self._follower.book.recent))
            ended = [_without_answer(e) for e in recent if e]
        told = [*ended, *(self._told(t) for t in self.live())]
        known = {t["id"] for t in told}
        told += [t for t in arriving if t["id"] not in known]
        return [_without_answer(t) for t in told if _matches(t, state, session)]

    def last(
        self, state: str | None, session: str | None, most: int, seconds: float = math.inf
    ) -> list[Json]:
        """The last that ended so, in the order of their ends, however long that is ago.

        Those that are no longer recent are looked for by their ids, for so many seconds.
        """
        if state and not State(state).ended:
            return []
        self.refresh()
        book = self._follower.book
        ids = (id for id in self._ids(None, archived=True) if id not in book.tasks)
        found, _ = self._walk(ids, state, session, most, seconds)
        recent, _ = self._walk(iter(list(book.recent)), state, session, RECENT, math.inf)
        by_id = {task["id"]: task for task in [*found, *recent]}
        return sorted(by_id.values(), key=lambda task: str(task["ended"]))[-most:]

    def _arriving(self) -> list[Json]:
        """Tasks that producers put into the inbox under an id, not yet taken."""
        try:
            names, taken = spool.scan(self.dirs.inbox)
        except OSError:
            return []  # not for us to see
        ids = [*taken, *(id for name in names[:ARRIVING] if (id := spool.wanted_id(name)))]
        return [found for id in ids if (found := self._waiting(id))]

    def page(
        self,
        state: str | None,
        session: str | None,
        limit: int,
        cursor: str | None,
        seconds: float = math.inf,
    ) -> tuple[list[Json], str | None]:
        """Tasks from the newest id down, and the cursor of the next page.

        Ids begin with the time of their making, so their order is that of the
        tasks; `cursor` is the last id of the page before.  A rare task could be
        looked for through years of archive: after `seconds` the page ends as it
        is, and its cursor leads on from there.
        """
        self.refresh()
        archived = state not in [s for s in State if not s.ended]
        return self._walk(self._ids(cursor, archived), state, session, limit, seconds)

    def _walk(
        self,
        ids: Iterator[str],
        state: str | None,
        session: str | None,
        limit: int,
        seconds: float,
    ) -> tuple[list[Json], str | None]:
        """Those of the tasks that are so, and the id at which the walk was ended."""
        until = time.monotonic() + seconds
        found: list[Json] = []
        for id in ids:
            live = self._follower.book.tasks.get(id)
            task = self._told(live) if live else self._ended(id)
            if task and _matches(task, state, session):
                found.append(_without_answer(task))
            if len(found) == limit or time.monotonic() >= until:
                return found, id
        return found, None

    def _ids(self, below: str | None, archived: bool) -> Iterator[str]:
        """The ids of live tasks, and of `archived` ones, newest first.

        One month is in memory at a time.
        """
        book = self._follower.book
        by_month: dict[str, set[str]] = {}
        # Who has just ended may be on its way to the archive.
        for id in [*book.tasks, *(book.recent if archived else ())]:
            by_month.setdefault(f"{id[:4]}-{id[4:6]}", set()).add(id)
        try:
            names = os.listdir(self.dirs.archive) if archived else []
            months = {m for m in names if _MONTH.fullmatch(m)}
        except FileNotFoundError:
            months = set()
        for month in sorted(months | by_month.keys(), reverse=True):
            if below and month > f"{below[:4]}-{below[4:6]}":
                continue
            ids = by_month.get(month, set())
            if month in months:
                ids |= set(os.listdir(self.dirs.archive / month))
            yield from (
                i for i in sorted(ids, reverse=True) if is_id(i) and (not below or i < below)
            )

    # --- sessions ---------------------------------------------------------------

    def sessions(self) -> list[Json]:
        self.refresh()
        begun = {task.session for task in self.live() if task.session}  # by tasks that wait
        names = sorted(begun.union(session.names(self.dirs.sessions)))
        return [s for name in names if (s := self.session(name))]

    def session(self, name: str) -> Json | None:
        """A session: its thread, its totals, its live tasks; None if there is none."""
        self.refresh()
        try:
            found = session.load(self.dirs.sessions, name)
        except ValueError:
            return None
        live = [t.id for t in self.live() if t.session_name == name]
        if found.created is None and not live:
            return None
        told = asdict(found)
        for private in _PRIVATE:
            del told[private]
        transcript = self.dirs.transcripts / f"{session.stem(name)}.jsonl"
        return {**told, "live": live, "transcript": str(transcript) if found.created else None}

    # --- health -------------------------------------------------------------------

    def health(self) -> tuple[bool, Json]:
        """Whether all is well, and what the master last said of itself.

        `status` is `ok`, `down` (no heartbeat), `trouble`, or the reasons for
        which the gate is closed.
        """
        inbox = self._inbox_depth()
        found = heartbeat.read(self.dirs.heartbeat)
        if found is None or not self._served():
            return False, {"status": "down", "message": "the master is not running", **inbox}
        age, told = found
        gate = told.get("gate")
        status = "ok"
        if not 0 <= age < LATE:
            status, told["message"] = "down", f"no sign of life of the master for {age:.0f} s"
        elif told.get("trouble"):
            status = "trouble"
        elif isinstance(gate, dict) and gate:
            status = ",".join(sorted(gate))
        return status == "ok", {"status": status, **told, "heartbeat_age": round(age, 1), **inbox}

    def usage(self, by: str) -> list[Json]:
        """Tokens of the last DAYS days, by "day", "session" or "model"; the greatest last."""
        found = spend.folded(self.used(DAYS), by)
        rows: list[Json] = [{by: name or None, **spend.whole(c)} for name, c in found.items()]
        return sorted(rows, key=lambda row: row[by if by == "day" else "tokens"])  # type: ignore[arg-type,return-value]

    def used(self, most: int) -> Iterator[spend.Day]:
        """The last days on which something was used, newest first.

        Damaged ones are left out, and told in `damaged`.
        """
        for day in spend.days(self.dirs.usage, most):
            try:
                yield spend.load(self.dirs.usage, day)
            except ValueError as damage:
                self.damaged.append(str(damage))

    def _served(self) -> bool:
        """Whether a master holds the lock: of one that was killed the heartbeat stays."""
        try:
            return lock.is_held(self.dirs.lock)
        except PermissionError:
            return True  # not for us to see; then the heartbeat alone tells

    def _inbox_depth(self) -> Json:
        try:
            names, taken = spool.scan(self.dirs.inbox)
        except OSError:
            return {"inbox": None}
        return {"inbox": len(names) + len(taken)}


def is_held(health: Json) -> bool:
    """Whether no task is started, or none without a profile of its own."""
    gate = health.get("gate")
    reasons = gate if isinstance(gate, dict) else {}
    return health["status"] in ("down", "trouble") or not all(map(of_one, reasons))


def _matches(task: Json, state: str | None, session: str | None) -> bool:
    return (not state or task["state"] == state) and (
        session is None or task.get("session") == session
    )


def _without_answer(task: Json) -> Json:
    return {k: v for k, v in task.items() if k != "answer"}
