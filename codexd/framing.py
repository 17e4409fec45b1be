"""HTTP/1.1 as bytes: the head of a request, strictly read, and a reply written.

Pure: bytes in, values out.  A request is what the standard says and nothing
else: what two programs could read in two ways (a bare newline, a folded line,
blanks before a colon, two lengths, any Transfer-Encoding) is refused before
its body is read, so nothing can hide behind a request.  The standard
library's http.server takes most of these, and it reads with one thread a
client; that is why it is not used.

Whatever the bytes, `take` returns a Head, or None while the end is missing,
or raises Problem, which is a reply already.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

HEAD_LIMIT = 32 << 10  # bytes of request line and fields
FIELDS_LIMIT = 100
BODY_LIMIT = 1 << 20
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
RETRY = ("Retry-After", "5")  # seconds

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST = re.compile(rb"(" + _TOKEN + rb") (/[!-~]*) HTTP/([0-9])\.([0-9])")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([\t -~\x80-\xff]*)")

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client is told; `headers` beside those that every reply has."""

    status: int
    body: bytes
    headers: Pairs = ()
    type: str = "application/json"


def reply(status: int, value: object, *headers: tuple[str, str]) -> Reply:
    """A reply in JSON."""
    return Reply(status, json.dumps(value).encode("ascii") + b"\n", headers)


class Problem(Exception):
    """An error as the client is told it: `{"error": {"code", "message"}}`."""

    def __init__(self, status: int, code: str, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(status, code, message)
        self.reply = reply(status, {"error": {"code": code, "message": message}}, *headers)


@dataclass(frozen=True, slots=True)
class Head:
    """A request without its body, which has `length` bytes.

    `path` and `query` are percent-encoded still; names of `fields` are lower
    case.  `keep` says whether another request may follow.
    """

    method: str
    path: str
    query: str
    fields: Mapping[str, list[str]] = field(default_factory=dict)
    length: int = 0
    keep: bool = True

    def one(self, name: str) -> str | None:
        """The value of a field that may be there once.  Raises Problem."""
        values = self.fields.get(name, [])
        if len(values) > 1:
            raise _bad(f"the header {name} is there {len(values)} times")
        return values[0] if values else None


def _bad(message: str) -> Problem:
    return Problem(400, "bad-request", message)


# --- reading ------------------------------------------------------------------


def take(buffer: bytearray) -> Head | None:
    """Remove a whole head from the front of `buffer`; None while its end is missing.

    Raises Problem for what cannot become a request any more.
    """
    while buffer.startswith(b"\r\n"):  # some clients end a body so
        del buffer[:2]
    end = buffer.find(b"\r\n\r\n", 0, HEAD_LIMIT)
    if end < 0:
        _look_at_start(buffer)
        return None
    lines = bytes(buffer[:end]).split(b"\r\n")
    del buffer[: end + 4]
    return _head(lines)


def _look_at_start(buffer: bytearray) -> None:
    """Refuse at once what would otherwise be waited for in vain."""
    if len(buffer) >= HEAD_LIMIT:
        raise Problem(431, "head-too-large", f"request line and headers exceed {HEAD_LIMIT} bytes")
    line, newline, _ = bytes(buffer).partition(b"\n")
    if newline:
        _request_line(line.removesuffix(b"\r") if line.endswith(b"\r") else b"")
    if re.search(rb"(?<!\r)\n", buffer):
        raise _bad("a line of the request does not end with CR LF")


def _request_line(line: bytes) -> re.Match[bytes]:
    found = _REQUEST.fullmatch(line)
    if not found:
        raise _bad("the request line is not METHOD /PATH HTTP/1.1")
    if found[3] != b"1":
        raise Problem(505, "version", "only HTTP/1.1 and HTTP/1.0 are spoken here")
    return found


def _head(lines: list[bytes]) -> Head:
    found = _request_line(lines[0])
    if len(lines) > FIELDS_LIMIT:
        raise Problem(431, "head-too-large", f"more than {FIELDS_LIMIT} headers")
    fields: dict[str, list[str]] = {}
    for line in lines[1:]:
        parts = _FIELD.fullmatch(line)
        if not parts:
            raise _bad("a header is not NAME: VALUE")
        name = parts[1].decode("ascii").lower()
        fields.setdefault(name, []).append(parts[2].strip(b" \t").decode("latin-1"))
    path, _, query = found[2].decode("ascii").partition("?")
    method, modern = found[1].decode("ascii"), found[4] != b"0"
    options = ",".join(fields.get("connection", [])).lower().replace(" ", "").split(",")
    return Head(method, path, query, fields, _length(fields), modern and "close" not in options)


def _length(fields: Mapping[str, list[str]]) -> int:
    if "transfer-encoding" in fields:
        raise Problem(501, "transfer-encoding", "send the body with Content-Length, not in chunks")
    lengths = fields.get("content-length", ["0"])
    if len(lengths) > 1 or not re.fullmatch("[0-9]+", lengths[0], re.ASCII):
        raise _bad("Content-Length is not one number")
    if len(lengths[0]) > 7 or int(lengths[0]) > BODY_LIMIT:
        raise Problem(413, "too-large", f"the body is larger than {BODY_LIMIT} bytes")
    return int(lengths[0])


# --- writing ------------------------------------------------------------------


def render(answer: Reply, *, keep: bool, body: bool = True) -> bytes:
    """The reply as bytes; `body` is False for the answer to HEAD."""
    headers = [
        ("Server", "codexd"),
        ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
        ("Content-Type", answer.type),
        ("Content-Length", str(len(answer.body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        *answer.headers,
        *([] if keep else [("Connection", "close")]),
    ]
    status = f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"
    text = "\r\n".join([status, *(f"{name}: {value}" for name, value in headers)])
    return text.encode("latin-1") + b"\r\n\r\n" + (answer.body if body else b"")
