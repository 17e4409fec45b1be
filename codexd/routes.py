"""The routes of the HTTP interface: what each request means and is answered.

Submitting and cancelling are files delivered into the inbox, everything else
is read through View; so HTTP can do no more than a member of the group can
with `cp` and `cat`, and works while the master is down.

`admit` judges a request by its head alone, before its body is read; `answer`
does what it asks.  Both raise Problem for what the client is told as an error.

Each kind of work has a thread of its own (a View is for one thread): short
questions, walks through the archive, and deliveries, which wait for the disk.
Whoever waits, for a task's end or for the master's word, holds no thread: the
question is asked again when the ledger has grown.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import os
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar
from urllib.parse import parse_qsl, unquote

from codexd import metrics, openapi, spool, taskfile
from codexd.config import Config
from codexd.framing import RETRY, Head, Problem, Reply, reply
from codexd.ledger import LedgerBroken
from codexd.model import Note, Request, State, is_id
from codexd.view import Json, View

WORD = 5.0  # seconds to wait for what the master says of a delivered file
WAIT = 60.0  # the longest ?wait=
WAITERS = 128  # who may wait at once
PAGE, CHUNK = 50, 500  # tasks in a list: by default, at most
LOOK = 2.0  # seconds after which a walk through the archive is cut into pages
_PAUSES = (0.005, 0.05)  # seconds between looks at the size of the ledger

_HOST = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{0,5})?", re.IGNORECASE)
_JSON = re.compile(r'application/json(?:\s*;\s*charset="?utf-8"?)?', re.IGNORECASE)
_LIMIT = re.compile(r"[0-9]{1,3}", re.ASCII)
_SECONDS = re.compile(r"[0-9]{1,2}(?:\.[0-9]{1,3})?", re.ASCII)
_CONFLICT = re.compile(r"key .* was used by task", re.DOTALL)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

T = TypeVar("T")
Handler = Callable[["Call"], Awaitable[Reply]]


@dataclass(slots=True)
class Call:
    """A request that may be done: its handler, the name in its path, its query."""

    handler: Handler
    head: Head
    name: str = ""
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Api:
    """Answers calls.  `counts` are the replies sent so far, by status."""

    def __init__(self, config: Config, token: bytes | None) -> None:
        self.config = config
        self.token = token
        self.counts: Counter[int] = Counter()
        self.stopping = False  # whoever waits is answered now
        self._view, self._asking = View(config.dirs), ThreadPoolExecutor(1)
        self._catalogue, self._listing = View(config.dirs), ThreadPoolExecutor(1)
        self._delivering = ThreadPoolExecutor(4)
        self._waiting = 0

    def close(self) -> None:
        self.stopping = True
        for lane in (self._asking, self._listing, self._delivering):
            lane.shutdown(cancel_futures=True)
        self._view.close()
        self._catalogue.close()

    # --- by the head alone --------------------------------------------------------

    def admit(self, head: Head, local: bool) -> Call:
        """Whether the request may be done; `local`: it came over a Unix socket."""
        if not _HOST.fullmatch(head.one("host") or ""):
            raise Problem(421, "host", "the header Host must be localhost, 127.0.0.1 or [::1]")
        if "origin" in head.fields:
            raise Problem(403, "origin", "requests of web pages are refused")
        if not local:
            self._authorize(head)
        handlers, name = self._route(head.path)
        allowed = [*handlers, *(["HEAD"] if "GET" in handlers else [])]
        if head.method not in allowed:
            allow = ("Allow", ", ".join(allowed))
            raise Problem(405, "method", f"{head.path} does not know {head.method[:20]}", allow)
        if (head.one("expect") or "100-continue").lower() != "100-continue":
            raise Problem(417, "expect", "only Expect: 100-continue is understood")
        handler = handlers["GET" if head.method == "HEAD" else head.method]
        if head.method == "POST":
            _check_type(head, needed=handler == self._submit)
        return Call(handler, head, name, _query(head, handler == self._tasks, handler == self._task))

    def _authorize(self, head: Head) -> None:
        scheme, _, given = (head.one("authorization") or "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), self.token or b"")
        if scheme.lower() != "bearer" or not self.token or not same:
            how = ("WWW-Authenticate", 'Bearer realm="codexd"')
            raise Problem(401, "token", "over TCP, send Authorization: Bearer TOKEN", how)

    def _route(self, path: str) -> tuple[dict[str, Handler], str]:
        match path.split("/")[1:]:
            case ["tasks"]:
                return {"GET": self._tasks, "POST": self._submit}, ""
            case ["tasks", id]:
                return {"GET": self._task}, _decoded(id)
            case ["tasks", id, "cancel"]:
                return {"POST": self._cancel}, _decoded(id)
            case ["sessions"]:
                return {"GET": self._sessions}, ""
            case ["sessions", name] if name:
                return {"GET": self._session}, _decoded(name)
            case ["health"]:
                return {"GET": self._health}, ""
            case ["metrics"]:
                return {"GET": self._metrics}, ""
            case ["openapi.json"]:
                return {"GET": self._openapi}, ""
        raise Problem(404, "not-found", "there is no such route; see /openapi.json")
