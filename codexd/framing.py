"""One HTTP exchange as bytes: a request in, strictly, and a reply out.

Requests are parsed and replies written by the standard library's http.server,
on streams in memory; who moves the bytes is no matter here.  Before it sees
them, every line of a head is checked as it comes: what two programs could read
in two ways (a bare newline, a folded line, blanks before a colon, two lengths,
any Transfer-Encoding) is refused, because http.server takes most of these and
leaves it to its user where a body ends.  So nothing can hide behind a request.

Whatever the bytes, `Exchange.take` says whether the head is whole, or raises
Problem, which is a reply already.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from typing import NoReturn

from codexd.wire import json_text

HEAD_LIMIT = 32 << 10  # bytes of request line and fields
LINES_LIMIT = 100  # without the blank one; http.server's own limit
BODY_LIMIT = 1 << 20
RETRY = ("Retry-After", "5")  # seconds

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST = re.compile(_TOKEN + rb" /[!-~]* HTTP/([0-9])\.[0-9]\r\n")
_FIELD = re.compile(_TOKEN + rb":[\t -~\x80-\xff]*\r\n")
_LENGTH = re.compile("[0-9]+", re.ASCII)
_END = b"\r\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client is told; `headers` beside those that every reply has."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    type: str = "application/json"


def reply(status: int, value: object, *headers: tuple[str, str]) -> Reply:
    """A reply in JSON."""
    return Reply(status, json_text(value).encode("ascii") + b"\n", headers)


class Problem(Exception):
    """An error as the client is told it: `{"error": {"code", "message"}}`."""

    def __init__(self, status: int, code: str, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(status, code, message)
        self.reply = reply(status, {"error": {"code": code, "message": message}}, *headers)


def _bad(message: str) -> Problem:
    return Problem(400, "bad-request", message)


def too_large_a_head() -> Problem:
    why = f"request line and headers exceed {HEAD_LIMIT} bytes or {LINES_LIMIT} lines"
    return Problem(431, "head-too-large", why)


class Exchange(BaseHTTPRequestHandler):
    """A request, taken line by line, and the reply to it.

    Once its head is whole: `command`, `path` and `query` (both still
    percent-encoded), `headers`, `length` (bytes of the body, which is not read
    here), and `close_connection`, which says that no other request may follow.
    """

    protocol_version = "HTTP/1.1"
    wfile: BytesIO

    def __init__(self) -> None:
        # Not the base's: it talks with a socket until that is closed.
        self.rfile, self.wfile = BytesIO(), BytesIO()
        self.command, self.path, self.query, self.length = "", "", "", 0
        self.request_version, self.requestline = self.protocol_version, ""
        self.close_connection = True
        self._lines = 0

    # --- the request ---------------------------------------------------------------

    def take(self, line: bytes) -> bool:
        """Take a line, its newline included; whether the head is whole.  Raises Problem."""
        self._lines += 1
        if self.rfile.tell() + len(line) > HEAD_LIMIT or self._lines > LINES_LIMIT + 1:
            raise too_large_a_head()
        if not line.endswith(_END):
            raise _bad("a line of the request does not end with CR LF")
        if not self.rfile.tell():
            if line == _END:
                return False  # some clients end the body before so
            _check_request_line(line)
        elif line != _END and not _FIELD.fullmatch(line):
            raise _bad("a header is not NAME: VALUE")
        self.rfile.write(line)
        if line == _END:
            self._parse()
        return line == _END

    def _parse(self) -> None:
        self.rfile.seek(0)
        self.raw_requestline = self.rfile.readline()
        self.parse_request()
        # `path` has lost all but one of the slashes that it may begin with.
        self.path, _, self.query = self.requestline.split(" ")[1].partition("?")
        self.length = self._length()
        # http.server keeps the connection for `Connection: te, close`, and for
        # HTTP/1.0 without saying so, as it would have to.
        options = re.split(r"[\s,]+", ",".join(self.headers.get_all("connection", [])).lower())
        self.close_connection = self.request_version == "HTTP/1.0" or "close" in options

    def _length(self) -> int:
        if "transfer-encoding" in self.headers:
            why = "send the body with Content-Length, not in chunks"
            raise Problem(501, "transfer-encoding", why)
        given = self.one("content-length")
        if given is None:
            return 0
        if not _LENGTH.fullmatch(given):
            raise _bad("Content-Length is not one number")
        if len(given) > 7 or int(given) > BODY_LIMIT:
            raise Problem(413, "too-large", f"the body is larger than {BODY_LIMIT} bytes")
        return int(given)

    def one(self, name: str) -> str | None:
        """The value of a header that may be there once.  Raises Problem."""
        values = self.headers.get_all(name, [])
        if len(values) > 1:
            raise _bad(f"the header {name} is there {len(values)} times")
        return str(values[0]).strip(" \t") if values else None

    # --- the reply -------------------------------------------------------------------

    def interim(self) -> bytes:
        """What http.server wrote while it parsed: `100 Continue`, if that is waited for."""
        return self.wfile.getvalue()

    def render(self, answer: Reply, *, keep: bool) -> bytes:
        """The reply as bytes; `keep`: the client may send another request."""
        self.wfile = BytesIO()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (*answer.headers, *([] if keep else [("Connection", "close")])):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
        return self.wfile.getvalue()

    # --- what http.server would say otherwise ---------------------------------------

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> NoReturn:
        """It found something wrong that we did not."""
        raise Problem(code, "bad-request", explain or message or "this is no request")

    def version_string(self) -> str:
        return "codexd"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the role logs."""


def _check_request_line(line: bytes) -> None:
    found = _REQUEST.fullmatch(line)
    if not found:
        raise _bad("the request line is not METHOD /PATH HTTP/1.1")
    if found[1] != b"1":
        raise Problem(505, "version", "only HTTP/1.1 and HTTP/1.0 are spoken here")
