"""Steady load on a root: task files, control files, HTTP; and what of it was acknowledged.

A file is acknowledged once it was delivered as the manual asks (write aside, fsync, rename,
fsync of the directory); a request, once the answer is 202.  The load neither knows nor
minds whether a daemon is there.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time

from codexd import spool
from tests.daemon import until
from tests.proof import oracle
from tests.proof.place import Place
from tests.web import Client

SESSIONS = 6
BACKLOG = 30  # tasks that may wait; a slow machine is not to be flooded
_PATIENCE = 45.0  # seconds without an answer that say that codexd hangs


class Load:
    """One producer, in a thread of its own between `begin` and `end`."""

    def __init__(self, place: Place, chance: random.Random, rate: float, http: bool) -> None:
        """`rate` is deliveries a second."""
        self.place, self.chance, self.rate, self.http = place, chance, rate, http
        self.acknowledged: list[str] = []
        self.ids: list[str] = []  # of tasks that we may control
        self.held: dict[str, float] = {}  # id -> when to release it
        self.sent: dict[str, int] = {}  # HTTP: status -> times
        self.number = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.error: BaseException | None = None

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """No more; raises what went wrong in the thread."""
        self._stop.set()
        self._thread.join()
        if self.error:
            raise self.error

    def drain(self) -> None:
        """Release what is held, and wait until nothing is left to do.

        Raises TimeoutError when for a while nothing was done.
        """
        for id in self.held:
            spool.deliver_control(self.place.dirs.inbox, f"{id}.release")
        self.held.clear()
        spool.deliver_control(self.place.dirs.inbox, "all.release")
        while not oracle.idle(self.place):
            before = self.answers()
            until(lambda n=before: self._went_on(n), f"more than {before} answers", _PATIENCE)  # type: ignore[misc]

    def _went_on(self, before: int) -> bool:
        return oracle.idle(self.place) or self.answers() > before

    def answers(self) -> int:
        return len(os.listdir(self.place.dirs.answers))

    # --- the thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.wait(self.chance.expovariate(self.rate)):
                self._one()
        except OSError as error:  # a disk without power; what was acknowledged stands
            self.error = error
        except BaseException as error:
            self.error = error
            raise

    def _one(self) -> None:
        now = time.monotonic()
        for id in [id for id, at in self.held.items() if at <= now]:
            spool.deliver_control(self.place.dirs.inbox, f"{id}.release")
            del self.held[id]
        what = self.chance.random()
        if what < 0.7 or not self.ids:
            if len(self.acknowledged) - self.answers() < BACKLOG:
                self.drop()
        elif what < 0.78 and self.http:
            self._post()
        elif what < 0.85:
            self._control("cancel")
        elif what < 0.91:
            self._hold(now + self.chance.uniform(0.2, 1.0))
        elif what < 0.97:
            self._retry()
        elif what < 0.98:
            spool.deliver_control(self.place.dirs.inbox, "all.compact")
        else:
            self.number += 1
            self._deliver(f"bad-{self.number}.md", "---\nno: such key\n---\nx\n")

    def _text(self) -> tuple[str, str | None]:
        """A new task's prompt, and its session."""
        self.number += 1
        chosen = self.chance.randrange(2 * SESSIONS)
        session = f"s{chosen}" if chosen < SESSIONS else None
        return f"[[proof m{self.number} {session or '-'}]]", session

    def _deliver(self, name: str, text: str) -> None:
        spool.deliver(self.place.dirs.inbox, name, text.encode())
        self.acknowledged.append(name)

    def drop(self) -> None:
        """One task file, under an id of ours or under any name."""
        text, session = self._text()
        front = f"---\nsession: {session}\n---\n" if session else ""
        id = spool.new_id()
        ours = self.chance.random() < 0.6
        self._deliver(f"{id}.md" if ours else f"t{self.number}.md", front + text + "\n")
        if ours:
            self.ids.append(id)

    def _control(self, verb: str) -> None:
        id = self.chance.choice(self.ids[-8:])
        spool.deliver_control(self.place.dirs.inbox, f"{id}.{verb}")

    def _hold(self, until: float) -> None:
        """It has to be released, too, if its delivery fails: it may be there for all that."""
        id = self.chance.choice(self.ids[-8:])
        self.held[id] = until
        spool.deliver_control(self.place.dirs.inbox, f"{id}.hold")

    def _retry(self) -> None:
        """One more run of a task that has ended, as far as anybody can see."""
        found = sorted(self.place.dirs.archive.glob("*/*/status.json"))
        if found:
            name = f"{self.chance.choice(found).parent.name}.retry"
            if name not in self.acknowledged:
                spool.deliver_control(self.place.dirs.inbox, name)
                self.acknowledged.append(name)

    def _post(self) -> None:
        prompt, session = self._text()
        body = {"prompt": prompt, **({"session": session} if session else {})}
        try:
            with Client(f"unix:{self.place.dirs.http_socket}") as client:
                said = client.ask("POST", "/tasks", json.dumps(body).encode())
        except (OSError, ValueError, AssertionError):  # killed before, or meanwhile
            self.sent["none"] = self.sent.get("none", 0) + 1
            return
        self.sent[str(said.status)] = self.sent.get(str(said.status), 0) + 1
        if said.status == 202:
            self.acknowledged.append(said.json["id"])
