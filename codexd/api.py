"""What the HTTP interface does: one method an operation.

Submitting and cancelling are files delivered into the inbox, everything else
is read through View; so HTTP can do no more than a member of the group can
with `cp` and `cat`, and works while the master is down.

Each kind of work has a thread of its own (a View is for one thread): short
questions, walks through the archive, and deliveries, which wait for the disk.
Whoever waits, for a task's end or for the master's word, holds no thread: the
question is asked again when the ledger has grown.

Raises Problem for what the client is told as an error.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from codexd import metrics, openapi, spool, taskfile
from codexd.config import Config
from codexd.document import Form, Scalar, shown
from codexd.framing import RETRY, Problem, Reply, reply
from codexd.ledger import LedgerBroken
from codexd.model import Note, Request, State
from codexd.routes import Call, invalid
from codexd.view import WORD, Json, View

WAITERS = 128  # who may wait at once
PAGE = 50  # tasks in a list
LOOK = 2.0  # seconds after which a walk through the archive is cut into pages
_PAUSES = (0.005, 0.05)  # seconds between looks at the size of the ledger

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DOCUMENT = reply(200, openapi.DOCUMENT)

T = TypeVar("T")


class Api:
    """Does calls.  `counts` are the replies sent so far, by status."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.counts: Counter[int] = Counter()
        self.stopping = False  # whoever waits is answered now
        self._view, self._asking = View(config.dirs), ThreadPoolExecutor(1)
        self._catalogue, self._listing = View(config.dirs), ThreadPoolExecutor(1)
        self._delivering = ThreadPoolExecutor(4)
        self._waiting = 0
        self._operations: dict[str, Callable[[Call, bytes], Awaitable[Reply]]] = {
            "submit": self._submit,
            "list": self._list,
            "show": self._show,
            "cancel": self._cancel,
            "sessions": self._sessions,
            "session": self._session,
            "health": self._health,
            "metrics": self._metrics,
            "openapi": self._openapi,
        }

    @property
    def operations(self) -> set[str]:
        return set(self._operations)

    async def answer(self, call: Call, body: bytes) -> Reply:
        """Do what is asked for.  Raises Problem."""
        return await self._operations[call.operation](call, body)

    def close(self) -> None:
        self.stopping = True
        for lane in (self._asking, self._listing, self._delivering):
            lane.shutdown(cancel_futures=True)
        self._view.close()
        self._catalogue.close()

    # --- tasks ----------------------------------------------------------------------

    async def _submit(self, call: Call, body: bytes) -> Reply:
        id = spool.new_id()
        keyed, alive = await _in(self._delivering, self._deliver, id, call, body)
        # Without a key nothing is gained by waiting for a master that is down:
        # the file is durable, and a client that sends it again has two tasks.
        word = await self._until(partial(self._word, id), WORD if keyed or alive else 0.0)
        if word is not None:
            return word
        if keyed:
            raise Problem(
                503,
                "unconfirmed",
                f"task {id} is in the inbox, but the master has not said yet whether this key "
                "is new; send it again with the same key: that is safe",
                RETRY,
                _location(id),
            )
        return _accepted(id, State.QUEUED)

    def _deliver(self, id: str, call: Call, body: bytes) -> tuple[bool, bool]:
        """Put the task into the inbox: whether it has a key, whether the master is up."""
        request = _request(body, call.key)
        data = taskfile.dump(request)
        if len(data) > self.config.limits.file:
            most = self.config.limits.file
            raise Problem(413, "too-large", f"the task is larger than {most} bytes (limits.file)")
        _, health = self._view.health()  # reads files only: right in any thread
        alive = health["status"] != "down"
        try:
            waiting, _ = spool.scan(self.config.dirs.inbox)
            if len(waiting) >= self.config.limits.queue or (alive and health.get("full")):
                raise Problem(503, "full", "the queue is full (limits.queue)", RETRY)
            spool.deliver(self.config.dirs.inbox, f"{id}.json", data)
        except OSError as error:
            raise _undelivered(error) from error
        return request.key is not None, alive

    def _word(self, id: str) -> Reply | None:
        """What the master said of a delivered file, if it has."""
        self._view.refresh()
        if not self._view.accepted(id):
            return None
        verdict = self._view.verdict(id)
        if verdict and verdict.kind is Note.REJECTED:
            reason = str(verdict.facts.get("reason"))
            if "conflict" in verdict.facts:
                raise Problem(409, "key-conflict", reason)
            raise Problem(400, "rejected", reason)
        known = str(verdict.facts.get("first")) if verdict else id
        task = self._view.task(known)
        return _accepted(known, State(str(task["state"])) if task else State.QUEUED)

    async def _show(self, call: Call, _body: bytes) -> Reply:
        if seconds := float(call.query.get("wait", 0)):
            ended = await self._patiently(partial(self._ended, call.name), seconds)
            if ended:
                return reply(200, ended)
        return reply(200, await _in(self._asking, self._found, call.name))

    def _found(self, id: str) -> Json:
        task = self._view.task(id)
        if task is None:
            verdict = self._view.verdict(id)
            if verdict is None:
                raise Problem(404, "not-found", "there is no such task")
            first = verdict.facts.get("first")
            why = f"it repeats task {first}" if first else verdict.facts.get("reason")
            raise Problem(404, "rejected", f"this file did not become a task: {why}")
        return task

    def _ended(self, id: str) -> Json | None:
        task = self._found(id)
        return task if State(str(task["state"])).ended else None

    async def _cancel(self, call: Call, body: bytes) -> Reply:
        if body.strip() not in (b"", b"{}"):
            raise Problem(400, "invalid", "a cancel takes no body, or {}")
        task = await _in(self._asking, self._found, call.name)
        state = State(str(task["state"]))
        if not state.ended:
            await _in(self._delivering, self._deliver_cancel, call.name)
        return _accepted(call.name, state)

    def _deliver_cancel(self, id: str) -> None:
        try:
            spool.deliver_control(self.config.dirs.inbox, f"{id}.cancel")
        except OSError as error:
            raise _undelivered(error) from error

    async def _list(self, call: Call, _body: bytes) -> Reply:
        query = call.query
        state, session, cursor = query.get("state"), query.get("session"), query.get("cursor")
        limit = int(query.get("limit", PAGE))
        look = partial(self._catalogue.page, state, session, limit, cursor, LOOK)
        found, after = await _in(self._listing, look)
        return reply(200, {"tasks": found, "next": after})

    # --- the rest ---------------------------------------------------------------------

    async def _sessions(self, _call: Call, _body: bytes) -> Reply:
        return reply(200, {"sessions": await _in(self._listing, self._catalogue.sessions)})

    async def _session(self, call: Call, _body: bytes) -> Reply:
        found = await _in(self._asking, self._view.session, call.name)
        if found is None:
            raise Problem(404, "not-found", "there is no such session")
        return reply(200, found)

    async def _health(self, _call: Call, _body: bytes) -> Reply:
        well, told = await _in(self._asking, self._view.health)
        return reply(200 if well else 503, told, *([] if well else [RETRY]))

    async def _metrics(self, _call: Call, _body: bytes) -> Reply:
        text = await _in(self._asking, self._measured)
        return Reply(200, text.encode(), type=metrics.TYPE)

    def _measured(self) -> str:
        self._view.refresh()
        states = Counter(str(task.state) for task in self._view.live())
        return metrics.render(self._view.health()[1], states, self.counts)

    async def _openapi(self, _call: Call, _body: bytes) -> Reply:
        return _DOCUMENT

    # --- waiting ------------------------------------------------------------------------

    async def _patiently(self, look: Callable[[], T | None], seconds: float) -> T | None:
        """`_until`, for a bounded number of clients."""
        if self._waiting >= WAITERS:
            raise Problem(503, "busy", f"{WAITERS} others wait already; ask without wait", RETRY)
        self._waiting += 1
        try:
            return await self._until(look, seconds)
        finally:
            self._waiting -= 1

    async def _until(self, look: Callable[[], T | None], seconds: float) -> T | None:
        """What `look` finds, asked again when the ledger grew; None after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            mark = self._mark()
            found = await _in(self._asking, look)
            if found is not None:
                return found
            pause, most = _PAUSES
            while time.monotonic() < end and not self.stopping and self._mark() == mark:
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, most)
            if time.monotonic() >= end or self.stopping:
                return None

    def _mark(self) -> tuple[int, int] | None:
        """Something that differs when the ledger has grown."""
        try:
            found = os.stat(self.config.dirs.ledger)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size


async def _in(lane: Executor, work: Callable[..., T], *args: object) -> T:
    """Do `work` in a lane's thread; a ledger that cannot be read is a Problem."""
    try:
        return await asyncio.get_running_loop().run_in_executor(lane, work, *args)
    except LedgerBroken as error:
        raise Problem(503, "ledger", str(error), RETRY) from error


# --- what a request says ---------------------------------------------------------


def _request(body: bytes, header: str | None) -> Request:
    """The task that is asked for.  Raises Problem."""
    try:
        request = taskfile.parse("body.json", body, max_bytes=len(body))
        if header is None:
            return request
        key = header.encode("latin-1").decode("utf-8")
        if request.key not in (None, key):
            raise invalid("the header Idempotency-Key and `key` in the body differ")
    except UnicodeDecodeError as error:
        raise invalid("the header Idempotency-Key is not UTF-8") from error
    except taskfile.Refused as why:
        raise invalid(str(why)) from why
    if taskfile.LABEL.read(Scalar(key, Form.TEXT)) is None:
        wrong = f"found {shown(key)}; allowed: {taskfile.LABEL.allowed}"
        raise invalid(f"the header Idempotency-Key: {wrong}")
    return replace(request, key=key)


# --- what a client is told ----------------------------------------------------------------


def _location(id: str) -> tuple[str, str]:
    return "Location", f"/tasks/{id}"


def _accepted(id: str, state: State) -> Reply:
    return reply(202, {"id": id, "state": state.value}, _location(id))


def _undelivered(error: OSError) -> Problem:
    """Why the inbox did not take a file, without the paths of this host."""
    if error.errno in _FULL:
        return Problem(503, "disk", "the disk of the inbox is full; nothing was kept", RETRY)
    why = f"the inbox takes no file ({error.strerror}); is the master set up? see codexd status"
    return Problem(503, "inbox", f"{why}; nothing was kept", RETRY)
