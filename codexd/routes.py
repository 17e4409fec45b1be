"""What a request asks for, judged by its head alone, before its body is read.

`admit` returns the Call that may be done, or raises Problem: a wrong Host, any
Origin (a web page of somebody else), a missing token, an unknown route, method,
parameter or content type, or a parameter's wrong value.  Pure: nothing is
looked up.

ROUTES names the operations as /openapi.json does; `api` does them.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

from codexd.framing import Exchange, Problem
from codexd.model import State, is_id

ROUTES: Mapping[str, Mapping[str, str]] = {
    "/tasks": {"GET": "list", "POST": "submit"},
    "/tasks/{id}": {"GET": "show"},
    "/tasks/{id}/cancel": {"POST": "cancel"},
    "/sessions": {"GET": "sessions"},
    "/sessions/{name}": {"GET": "session"},
    "/health": {"GET": "health"},
    "/metrics": {"GET": "metrics"},
    "/openapi.json": {"GET": "openapi"},
}
QUERIES = {"list": ("state", "session", "limit", "cursor"), "show": ("wait",)}
LIMIT, WAIT = 500, 60  # the most tasks in a list, and seconds to wait for one

_LIMIT = re.compile(r"[0-9]{1,3}", re.ASCII)
_SECONDS = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", re.ASCII)
_VALUES: Mapping[str, tuple[str, Callable[[str], object]]] = {
    "state": (f"one of {', '.join(State)}", lambda text: text in list(State)),
    "session": ("a name", lambda _text: True),
    "limit": (
        f"a number from 1 to {LIMIT}",
        lambda text: _LIMIT.fullmatch(text) and 1 <= int(text) <= LIMIT,
    ),
    "cursor": ("the `next` of the page before", is_id),
    "wait": (
        f"a number up to {WAIT}",
        lambda text: _SECONDS.fullmatch(text) and float(text) <= WAIT,
    ),
}
_NAMED = {"tasks": "{id}", "sessions": "{name}"}  # what follows them in a path
_HOST = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{0,5})?", re.IGNORECASE)
_JSON = re.compile(r'application/json(?:\s*;\s*charset="?utf-8"?)?', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Call:
    """A request that may be done.

    The operation, the name in its path, its query, its Idempotency-Key.
    """

    operation: str
    name: str = ""
    query: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None


def invalid(message: str) -> Problem:
    return Problem(400, "invalid", message)


def admit(asked: Exchange, token: bytes | None) -> Call:
    """The call that a head asks for.  `token` is None where none is needed."""
    # HTTP/1.1 without Host is here as well: it names no host we are.
    if not _HOST.fullmatch(asked.one("host") or ""):
        raise Problem(421, "host", "the header Host must be localhost, 127.0.0.1 or [::1]")
    if "origin" in asked.headers:
        raise Problem(403, "origin", "requests of web pages are refused")
    if token is not None:
        _authorize(asked, token)
    route, name = _route(asked.path)
    operation = _operation(route, asked.command)
    if (asked.one("expect") or "100-continue").lower() != "100-continue":
        raise Problem(417, "expect", "only Expect: 100-continue is understood")
    if asked.command == "POST":
        _check_type(asked, needed=operation == "submit")
    query = _query(asked.query, QUERIES.get(operation, ()))
    return Call(operation, name, query, asked.one("idempotency-key"))


def _authorize(asked: Exchange, token: bytes) -> None:
    scheme, _, given = (asked.one("authorization") or "").partition(" ")
    same = hmac.compare_digest(given.strip().encode("latin-1"), token)
    if scheme.lower() != "bearer" or not same:
        how = ("WWW-Authenticate", 'Bearer realm="codexd"')
        raise Problem(401, "token", "over TCP, send Authorization: Bearer TOKEN", how)


def _operation(route: str, method: str) -> str:
    operations = ROUTES.get(route)
    if operations is None:
        raise Problem(404, "not-found", "there is no such route; see /openapi.json")
    found = operations.get("GET" if method == "HEAD" else method)
    if found is None:
        allowed = [*operations, *(["HEAD"] if "GET" in operations else [])]
        allow = ("Allow", ", ".join(allowed))
        raise Problem(405, "method", f"{route} does not know this method", allow)
    return found


def _route(path: str) -> tuple[str, str]:
    """The route that a path is of, and the decoded name in it."""
    parts = path.split("/")
    given = _NAMED.get(parts[1])
    if given is None or len(parts) < 3:
        return path, ""
    name = parts[2]
    parts[2] = given
    try:
        return "/".join(parts), unquote(name, errors="strict")
    except UnicodeDecodeError as error:
        raise Problem(404, "not-found", "the name is not percent-encoded UTF-8") from error


def _query(text: str, known: tuple[str, ...]) -> dict[str, str]:
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=20)
    except ValueError as error:
        raise invalid("the query is not NAME=VALUE&…, percent-encoded UTF-8") from error
    query = dict(pairs)
    if len(query) < len(pairs):
        raise invalid("a query parameter is there twice")
    for name, value in query.items():
        if name not in known:
            has = f"known here: {', '.join(known)}" if known else "there are none here"
            raise invalid(f"unknown query parameter {name[:50]!r}; {has}")
        what, fits = _VALUES[name]
        if not fits(value):
            raise invalid(f"{name} must be {what}")
    return query


def _check_type(asked: Exchange, needed: bool) -> None:
    found = asked.one("content-type")
    if found is None and not needed and not asked.length:
        return
    if not _JSON.fullmatch(found or ""):
        raise Problem(415, "content-type", "send Content-Type: application/json")
