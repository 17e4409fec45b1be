"""The HTTP server over real sockets: framing, guards, slow clients, where it listens."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NoReturn

import pytest

from codexd import sockets
from codexd.config import HttpConfig
from codexd.http import CONNECTIONS
from codexd.openapi import DOCUMENT
from codexd.program import Exit
from codexd.sockets import NoSocket
from tests.daemon import until
from tests.web import PATIENCE, Client, Web

TOKEN = "0123456789abcdef0123456789abcdef"
POWERLESS = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """A server without a master: it must answer all the same."""
    with Web(tmp_path_factory.mktemp("h")) as one:
        yield one


@pytest.fixture
def tcp(tmp_path: Path) -> Iterator[Web]:
    secret(tmp_path / "token", TOKEN)
    with Web(tmp_path, listen("127.0.0.1:0")) as one:
        yield one


def listen(where: str, token: str = "token") -> str:
    return f"http:\n  listen: '{where}'\n  token_file: {token}\n"


def secret(path: Path, text: str, mode: int = 0o600) -> None:
    path.write_text(text)
    path.chmod(mode)


# --- requests as bytes ----------------------------------------------------------

HOST = "Host: localhost\r\n"
JSON = "Content-Type: application/json\r\n"
POST = f"POST /tasks HTTP/1.1\r\n{HOST}{JSON}"
ID = "20261123t072011-k3f9qa7x2m"

RAW = {
    # the request line
    "no request": ("nonsense\r\n\r\n", 400, "bad-request"),
    "http 0.9": ("GET /health\r\n", 400, "bad-request"),
    "bare newlines": ("GET /health HTTP/1.1\nHost: localhost\n\n", 400, "bad-request"),
    "two blanks": (f"GET  /health HTTP/1.1\r\n{HOST}\r\n", 400, "bad-request"),
    "no path": (f"GET health HTTP/1.1\r\n{HOST}\r\n", 400, "bad-request"),
    "absolute": (f"GET http://localhost/health HTTP/1.1\r\n{HOST}\r\n", 400, "bad-request"),
    "escape in path": (f"GET /\x1b[2J HTTP/1.1\r\n{HOST}\r\n", 400, "bad-request"),
    "tls": ("\x16\x03\x01\x02\x00\x01\x00\n", 400, "bad-request"),
    "http 2": ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad-request"),
    "http 3": (f"GET /health HTTP/3.0\r\n{HOST}\r\n", 505, "version"),
    # headers
    "folded": (f"GET /health HTTP/1.1\r\n{HOST}X: a\r\n b\r\n\r\n", 400, "bad-request"),
    "no colon": (f"GET /health HTTP/1.1\r\n{HOST}rubbish\r\n\r\n", 400, "bad-request"),
    "blank": (f"GET /health HTTP/1.1\r\n{HOST}X : a\r\n\r\n", 400, "bad-request"),
    "bare cr": (f"GET /health HTTP/1.1\r\n{HOST}X: a\rY: b\r\n\r\n", 400, "bad-request"),
    "nul": (f"GET /health HTTP/1.1\r\n{HOST}X: \0\r\n\r\n", 400, "bad-request"),
    "large": (f"GET /health HTTP/1.1\r\n{HOST}X: {'a' * 40000}\r\n\r\n", 431, "head-too-large"),
    "many": (f"GET /health HTTP/1.1\r\n{HOST * 101}\r\n", 431, "head-too-large"),
    # who asks
    "no host": ("GET /health HTTP/1.1\r\n\r\n", 421, "host"),
    "other host": ("GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421, "host"),
    "host behind": ("GET /health HTTP/1.1\r\nHost: localhost.evil\r\n\r\n", 421, "host"),
    "host before": ("GET /health HTTP/1.1\r\nHost: x@localhost\r\n\r\n", 421, "host"),
    "1.0 no host": ("GET /health HTTP/1.0\r\n\r\n", 421, "host"),
    "two hosts": (f"GET /health HTTP/1.1\r\n{HOST}{HOST}\r\n", 400, "bad-request"),
    "origin": (f"GET /health HTTP/1.1\r\n{HOST}Origin: http://localhost\r\n\r\n", 403, "origin"),
    "null origin": (f"{POST}Origin: null\r\nContent-Length: 2\r\n\r\n{{}}", 403, "origin"),
    # what is asked for
    "route": (f"GET /nothing HTTP/1.1\r\n{HOST}\r\n", 404, "not-found"),
    "root": (f"GET / HTTP/1.1\r\n{HOST}\r\n", 404, "not-found"),
    "no id": (f"GET /tasks/ HTTP/1.1\r\n{HOST}\r\n", 404, "not-found"),
    "ill id": (f"GET /tasks/..%2f..%2fetc HTTP/1.1\r\n{HOST}\r\n", 404, "not-found"),
    "nul id": (f"GET /tasks/{ID}%00 HTTP/1.1\r\n{HOST}\r\n", 404, "not-found"),
    "newline id": (f"GET /tasks/{ID}%0a HTTP/1.1\r\n{HOST}\r\n", 404, "not-found"),
    "digits id": (f"GET /tasks/%D9%A1{ID[1:]} HTTP/1.1\r\n{HOST}\r\n", 404, "not-found"),
    "no utf-8": (f"GET /sessions/%ff HTTP/1.1\r\n{HOST}\r\n", 404, "not-found"),
    "unknown id": (f"GET /tasks/{ID} HTTP/1.1\r\n{HOST}\r\n", 404, "not-found"),
    "cancel unknown": (f"POST /tasks/{ID}/cancel HTTP/1.1\r\n{HOST}\r\n", 404, "not-found"),
    "below": (f"GET /tasks/{ID}/cancel/x HTTP/1.1\r\n{HOST}\r\n", 404, "not-found"),
    "method": (f"DELETE /tasks HTTP/1.1\r\n{HOST}\r\n", 405, "method"),
    "get cancel": (f"GET /tasks/{ID}/cancel HTTP/1.1\r\n{HOST}\r\n", 405, "method"),
    "parameter": (f"GET /tasks?stat=done HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "health parameter": (f"GET /health?x HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "twice": (f"GET /tasks?limit=1&limit=2 HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "limit": (f"GET /tasks?limit=501 HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "no limit": (f"GET /tasks?limit=0 HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "minus": (f"GET /tasks?limit=-1 HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "state": (f"GET /tasks?state=finished HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "cursor": (f"GET /tasks?cursor=x HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "query": (f"GET /tasks?session=%ff HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "wait": (f"GET /tasks/{ID}?wait=61 HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "wait 1e2": (f"GET /tasks/{ID}?wait=1e2 HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "wait nan": (f"GET /tasks/{ID}?wait=nan HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "wait digits": (f"GET /tasks/{ID}?wait={'9' * 5000} HTTP/1.1\r\n{HOST}\r\n", 400, "invalid"),
    "expect": (f"{POST}Expect: wonders\r\nContent-Length: 2\r\n\r\n", 417, "expect"),
    # the body
    "chunked": (f"{POST}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501, "transfer-encoding"),
    "both": (
        f"{POST}Content-Length: 2\r\nTransfer-Encoding: identity\r\n\r\n{{}}",
        501,
        "transfer-encoding",
    ),
    "two lengths": (
        f"{POST}Content-Length: 2\r\nContent-Length: 2\r\n\r\n{{}}",
        400,
        "bad-request",
    ),
    "list of lengths": (f"{POST}Content-Length: 2, 2\r\n\r\n{{}}", 400, "bad-request"),
    "negative": (f"{POST}Content-Length: -2\r\n\r\n{{}}", 400, "bad-request"),
    "signed": (f"{POST}Content-Length: +2\r\n\r\n{{}}", 400, "bad-request"),
    "underscore": (f"{POST}Content-Length: 1_0\r\n\r\n0123456789", 400, "bad-request"),
    "superscript": (f"{POST}Content-Length: \xb2\r\n\r\n{{}}", 400, "bad-request"),
    "empty length": (f"{POST}Content-Length:\r\n\r\n{{}}", 400, "bad-request"),
    "one too many": (f"{POST}Content-Length: 1048577\r\n\r\n", 413, "too-large"),
    "huge": (f"{POST}Content-Length: {'9' * 400}\r\n\r\n", 413, "too-large"),
    "no type": (
        f"POST /tasks HTTP/1.1\r\n{HOST}Content-Length: 2\r\n\r\n{{}}",
        415,
        "content-type",
    ),
    "text": (
        f"POST /tasks HTTP/1.1\r\n{HOST}Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{{}}",
        415,
        "content-type",
    ),
    "form cancel": (
        f"POST /tasks/{ID}/cancel HTTP/1.1\r\n{HOST}"
        "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 0\r\n\r\n",
        415,
        "content-type",
    ),
    "latin-1": (
        f"POST /tasks HTTP/1.1\r\n{HOST}Content-Type: application/json; charset=latin1\r\n"
        "Content-Length: 2\r\n\r\n{}",
        415,
        "content-type",
    ),
    "no body": (f"{POST}\r\n", 400, "invalid"),
    "no json": (f"{POST}Content-Length: 2\r\n\r\n{{]", 400, "invalid"),
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_refused(web: Web, name: str) -> None:
    request, status, code = RAW[name]
    with web.connect() as client:
        client.send(request.encode("latin-1"))
        said = client.read()
        assert (said.status, said.code) == (status, code)
        assert said.headers["content-type"] == "application/json"
        assert str(web.root) not in said.body.decode()
        if said.headers.get("connection") == "close":
            assert client.closed()


def test_allow_names_the_methods(web: Web) -> None:
    assert web.ask("PUT", "/tasks").headers["allow"] == "GET, POST, HEAD"
    assert web.ask("OPTIONS", "/health").headers["allow"] == "GET, HEAD"
    assert web.ask("GET", f"/tasks/{ID}/cancel").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:8080", "[::1]", "[::1]:1", "localhost:"],
)
def test_names_of_this_host(web: Web, host: str) -> None:
    assert web.ask("GET", "/openapi.json", Host=host).json == DOCUMENT


def test_head_is_get_without_the_body(web: Web) -> None:
    with web.connect() as client:
        head, get = client.ask("HEAD", "/openapi.json"), client.ask("GET", "/openapi.json")
    assert head.body == b""
    assert {**head.headers, "date": ""} == {**get.headers, "date": ""}


def test_a_refused_head_has_no_body_either(web: Web) -> None:
    with web.connect() as client:
        assert client.ask("HEAD", "/nothing").status == 404
        assert client.closed()


def test_a_body_that_nobody_reads_is_no_request(web: Web) -> None:
    hidden = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with web.connect() as client:
        assert client.ask("GET", "/openapi.json", hidden).status == 200
        assert client.ask("GET", "/tasks").json == {"tasks": [], "next": None}


def test_requests_sent_ahead_are_answered_in_turn(web: Web) -> None:
    one = f"GET /tasks HTTP/1.1\r\n{HOST}\r\n\r\n".encode()
    with web.connect() as client:
        client.send(one * 3 + f"GET /nothing HTTP/1.1\r\n{HOST}\r\n".encode() + one)
        assert [client.read().status for _ in range(4)] == [200, 200, 200, 404]
        assert client.closed()


def test_a_request_may_come_byte_by_byte(web: Web) -> None:
    with web.connect() as client:
        for byte in f"GET /tasks HTTP/1.1\r\n{HOST}\r\n".encode():
            client.send(bytes([byte]))
        assert client.read().status == 200


def test_a_client_that_has_said_all_still_gets_its_answer(web: Web) -> None:
    with web.connect() as client:
        client.send(f"GET /tasks HTTP/1.1\r\n{HOST}\r\n".encode())
        client.sock.shutdown(socket.SHUT_WR)
        assert client.read().status == 200
        assert client.closed()


@pytest.mark.parametrize("extra", ["HTTP/1.0\r\n", "HTTP/1.1\r\nConnection: close\r\n"])
def test_the_last_request_closes(web: Web, extra: str) -> None:
    with web.connect() as client:
        client.send(f"GET /tasks {extra}{HOST}\r\n".encode())
        said = client.read()
        assert (said.status, said.headers["connection"]) == (200, "close")
        assert client.closed()


def test_who_asks_first_is_told_before_it_sends_the_body(web: Web) -> None:
    with web.connect() as client:
        client.send(f"{POST}Expect: 100-continue\r\nContent-Length: 2\r\n\r\n".encode())
        assert client.file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert client.file.readline() == b"\r\n"
        client.send(b"{]")
        assert client.read().status == 400
    with web.connect() as client:
        client.send(f"{POST}Expect: 100-continue\r\nContent-Length: 9999999\r\n\r\n".encode())
        assert client.read().status == 413


def test_a_refusal_reaches_a_client_that_is_still_sending(tcp: Web) -> None:
    """Closing a socket with unread data resets it; then the reply may be lost."""
    with tcp.connect() as client:
        client.send(f"{POST}Authorization: Bearer {TOKEN}\r\n".encode())
        client.send(b"Content-Length: 4000000\r\n\r\n")
        client.send(b"x" * 4_000_000)
        assert client.read().status == 413
        assert client.closed()


def test_one_write_a_reply(tcp: Web) -> None:
    """Two small writes would cost 40 ms each time: Nagle waits for the delayed ACK."""
    with tcp.connect() as client:
        for _ in range(50):
            client.send(
                f"GET /tasks HTTP/1.1\r\n{HOST}Authorization: Bearer {TOKEN}\r\n\r\n".encode()
            )
            assert client.sock.recv(65536).endswith(b'{"tasks": [], "next": null}\n')


# --- clients that only cost ------------------------------------------------------


def test_slow_clients_harm_only_themselves(web: Web) -> None:
    """More than there are connections for: some say half a request, some do not listen."""
    fetch = f"GET /openapi.json HTTP/1.1\r\n{HOST}\r\n".encode() * 40  # more than a socket holds
    slow = [web.connect() for _ in range(300)]
    deaf = [web.connect() for _ in range(300)]
    try:
        for client in slow:
            try:
                client.send(b"GET /tas")
            except BrokenPipeError:
                continue  # it had to make room already
        for client in deaf:
            try:
                client.send(fetch)
            except BrokenPipeError:
                continue
        took = []
        for _ in range(20):
            begun = time.monotonic()
            assert web.ask("GET", "/health").json["status"] == "down"  # no master here
            took.append(time.monotonic() - begun)
        threads = len(os.listdir(f"/proc/{web.child.pid}/task"))
        assert threads < 10
        assert sorted(took)[10] < 0.2, took
    finally:
        for client in [*slow, *deaf]:
            client.__exit__(None, None, None)
    assert web.ask("GET", "/tasks").status == 200


def test_who_has_just_come_makes_no_room_for_others(web: Web) -> None:
    """Those who do not take their replies are closed first: they have kept us waiting longer."""
    fetch = f"GET /openapi.json HTTP/1.1\r\n{HOST}\r\n".encode() * 40
    deaf = [web.connect() for _ in range(CONNECTIONS)]
    try:
        for client in deaf:
            client.send(fetch)
        for client in deaf:
            client.sock.recv(1, socket.MSG_PEEK)  # its first reply has come
        with web.connect() as honest, web.connect(), web.connect():
            assert honest.ask("GET", "/tasks").status == 200
    finally:
        for client in deaf:
            client.__exit__(None, None, None)


def test_half_a_request_is_told_after_its_deadline(web: Web) -> None:
    with web.connect() as client, web.connect() as silent:
        client.send(b"GET /tasks HT")
        said = client.read()
        assert (said.status, said.code) == (408, "slow")
        assert client.closed()
        assert silent.closed()  # said nothing, is told nothing


def test_an_idle_server_costs_nothing(web: Web) -> None:
    with web.connect() as client:
        assert client.ask("GET", "/tasks").status == 200
        before = web.ticks()
        time.sleep(3)
        assert web.ticks() - before <= 1


# --- the token -------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", f"Basic {TOKEN}", f"Bearer {TOKEN}0", f"Bearer {TOKEN[:-1]}",
     TOKEN, "Bearer \xe9"],
)  # fmt: skip
def test_over_tcp_every_request_needs_the_token(tcp: Web, given: str | None) -> None:
    line = "" if given is None else f"Authorization: {given}\r\n"
    for path in ("/health", "/openapi.json", "/nothing"):
        with tcp.connect() as client:
            client.send(f"GET {path} HTTP/1.1\r\n{HOST}{line}\r\n".encode("latin-1"))
            said = client.read()
            assert (said.status, said.code) == (401, "token")
            assert said.headers["www-authenticate"].startswith("Bearer")
            assert TOKEN not in said.body.decode()


def test_the_token_opens(tcp: Web) -> None:
    assert tcp.address.startswith("http://127.0.0.1:")
    assert tcp.ask("GET", "/tasks", Authorization=f"Bearer {TOKEN}").status == 200
    assert tcp.ask("GET", "/tasks", Authorization=f"bearer {TOKEN}").status == 200


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        (None, 0, "cannot be read: No such file or directory; make one: (umask 077; openssl"),
        ("", 0o600, "is empty"),
        ("\n", 0o600, "is empty"),
        ("short", 0o600, "is no token of 16 to 512 printable characters"),
        ("two words of some length", 0o600, "is no token"),
        (TOKEN, 0o644, "is open to everybody on this host: chmod o="),
    ],
)
def test_a_token_that_guards_nothing_is_refused(
    tmp_path: Path, text: str | None, mode: int, why: str
) -> None:
    if text is not None:
        secret(tmp_path / "token", text, mode)
    status, log = Web(tmp_path, listen("127.0.0.1:0")).ended()
    assert status == Exit.CONFIGURATION
    assert f"http.token_file {tmp_path}/token {why}" in log
    assert TOKEN not in log


def test_no_token_and_one_that_is_no_file(tmp_path: Path) -> None:
    """A socket of systemd's may be one of TCP whatever http.listen says."""
    with pytest.raises(NoSocket, match=r"http\.token_file is not set"):
        sockets.token(None)
    with pytest.raises(NoSocket, match=r"cannot be read: Is a directory$"):
        sockets.token(tmp_path)


# --- where it listens ---------------------------------------------------------------


def test_the_socket_is_for_the_group(web: Web) -> None:
    path = web.root / "run" / "http.sock"
    assert web.said == f"listening unix:{path}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_off_is_no_error(tmp_path: Path) -> None:
    one = Web(tmp_path, "http:\n  listen: off\n")
    assert one.said == ""
    status, log = one.ended()
    assert status == Exit.DONE
    assert "http.off" in log


def test_a_port_in_use_is_named(tmp_path: Path, tcp: Web) -> None:
    port = tcp.address.rpartition(":")[2]
    other = tmp_path / "other"
    other.mkdir()
    secret(other / "token", TOKEN)
    status, log = Web(other, listen(f"127.0.0.1:{port}")).ended()
    assert status == Exit.UNAVAILABLE
    assert f"port {port} of 127.0.0.1 is in use; name another in http.listen" in log


def test_a_live_server_is_not_pushed_aside(tmp_path: Path) -> None:
    with Web(tmp_path) as first:
        status, log = Web(tmp_path).ended()
        assert status == Exit.UNAVAILABLE
        assert f"another server listens on {tmp_path}/run/http.sock already" in log
        assert first.ask("GET", "/tasks").status == 200


def test_a_dead_servers_socket_is_replaced(tmp_path: Path) -> None:
    first = Web(tmp_path)
    first.child.kill()
    first.ended()
    assert (tmp_path / "run" / "http.sock").is_socket()
    with Web(tmp_path) as second:
        assert second.ask("GET", "/tasks").status == 200


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run" / "http.sock"
    path.parent.mkdir()
    path.write_text("precious")
    status, log = Web(tmp_path).ended()
    assert status == Exit.CONFIGURATION
    assert f"{path} is there and is no socket; move it away" in log
    assert path.read_text() == "precious"


def test_a_root_too_deep_for_a_socket_is_told(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    status, log = Web(deep).ended()
    assert status == Exit.CONFIGURATION
    assert "http.sock is too long a name for a socket" in log


def refused(listen: Path | tuple[str, int]) -> tuple[Exit, str]:
    """Why nobody can listen there."""
    with pytest.raises(NoSocket) as caught:
        sockets.bind(HttpConfig(listen), {})
    return caught.value.status, str(caught.value)


def crowd(path: Path, clients: ExitStack) -> NoReturn:
    """Connect, again and again, until that would have to wait."""
    while True:
        client = clients.enter_context(socket.socket(socket.AF_UNIX))
        client.setblocking(False)
        client.connect(str(path))


def test_a_server_with_many_waiting_is_alive(tmp_path: Path) -> None:
    """It takes no connection more now; that is no reason to take its place."""
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as server, ExitStack() as clients:
        server.bind(str(path))
        server.listen(0)
        with pytest.raises(BlockingIOError):
            crowd(path, clients)
        assert refused(path) == (
            Exit.UNAVAILABLE, f"another server listens on {path} already",
        )  # fmt: skip


def test_a_socket_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        assert refused(path)[1].startswith(f"cannot listen on {path}: ")
    assert path.is_socket()


def test_where_nobody_can_listen_it_says_why(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    path = tmp_path / "run" / "http.sock"
    assert refused(path) == (Exit.UNAVAILABLE, f"cannot listen on {path}: File exists")
    status, why = refused(("192.0.2.1", 8087))  # an address that is nobody's
    assert (status, why.startswith("cannot listen on 192.0.2.1 port 8087: ")) == (69, True)


def test_with_a_configuration_that_cannot_be_it_does_not_begin(tmp_path: Path) -> None:
    status, log = Web(tmp_path, "http:\n  listen: 8087\n").ended()
    assert (status, log.count("\n")) == (Exit.CONFIGURATION, 1)
    assert "codexd.yaml:2: http.listen: found '8087'; allowed: " in log


def test_a_port_that_is_for_root_alone(tmp_path: Path) -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if first < 2:
        pytest.skip("here every port is for everybody")
    secret(tmp_path / "token", TOKEN)
    status, log = Web(tmp_path, listen("127.0.0.1:1"), within=POWERLESS).ended()
    assert status == Exit.PERMISSION
    assert "port 1 is for root alone; name one above 1023 in http.listen" in log


# As systemd does: the socket is descriptor 3, and the process is told that it is meant.
ACTIVATE = """
import os, sys
given, *command = sys.argv[1:]
os.dup2(int(given), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, *command])
"""


def activated(root: Path, sock: socket.socket | IO[bytes], config: str) -> subprocess.Popen[str]:
    (root / "codexd.yaml").write_text(config)
    fd = sock.fileno()
    return subprocess.Popen(
        [sys.executable, "-c", ACTIVATE, str(fd), "-m", "codexd.http", "--root", str(root)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[fd],
    )


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_an_inherited_socket_comes_first(tmp_path: Path, transport: str) -> None:
    secret(tmp_path / "token", TOKEN)
    if transport == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(tmp_path / "given.sock"))
        address = f"unix:{tmp_path}/given.sock"
    else:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with sock:
        sock.listen()
        child = activated(tmp_path, sock, "http:\n  token_file: token\n")
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == f"listening {address}\n"
            with Client(address) as client:
                assert client.ask("GET", "/tasks").status == (200 if transport == "unix" else 401)
        finally:
            child.terminate()
            child.communicate(timeout=PATIENCE)
    assert child.returncode == Exit.DONE
    assert not (tmp_path / "run").exists()
    if transport == "unix":
        assert (tmp_path / "given.sock").is_socket()  # systemd's to remove


@pytest.mark.parametrize("where", ["0.0.0.0", "\0abstract-codexd-test", "datagram"])
def test_an_inherited_socket_that_is_open_to_others_is_refused(tmp_path: Path, where: str) -> None:
    if where.startswith("\0"):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(where)
        sock.listen()
    elif where == "datagram":
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    else:
        sock = socket.socket()
        sock.bind((where, 0))
        sock.listen()
    with sock:
        child = activated(tmp_path, sock, "")
        _, log = child.communicate(timeout=PATIENCE)
    assert child.returncode == Exit.CONFIGURATION
    assert "ListenStream= must be a path or 127.0.0.1:PORT" in log


def test_an_inherited_file_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        child = activated(tmp_path, file, "")
        _, log = child.communicate(timeout=PATIENCE)
    assert child.returncode == Exit.CONFIGURATION
    assert "inherited descriptor 3 is no socket: " in log


def test_off_sends_away_who_waits_at_an_inherited_socket(tmp_path: Path) -> None:
    """As long as somebody waits, systemd starts the server; and it has to come up to be done."""
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as client, \
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:  # fmt: skip
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        sock.bind(str(tmp_path / "given.sock"))
        sock.listen()
        client.settimeout(PATIENCE)
        client.connect(str(tmp_path / "given.sock"))
        os.environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        try:
            child = activated(tmp_path, sock, "http:\n  listen: off\n")
        finally:
            del os.environ["NOTIFY_SOCKET"]
        _, log = child.communicate(timeout=PATIENCE)
        assert (child.returncode, "http.off" in log) == (Exit.DONE, True)
        assert manager.recv(100) == b"READY=1"
        assert client.recv(100) == b""


def test_the_manager_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        told = [f"NOTIFY_SOCKET={tmp_path}/notify", "WATCHDOG_USEC=100000"]
        with Web(tmp_path, within=["env", *told]) as web:
            heard = [manager.recv(4096).decode() for _ in range(5)]
            web.child.terminate()
            while heard[-1] != "STOPPING=1":
                heard.append(manager.recv(4096).decode())
    assert heard[:2] == ["READY=1", f"STATUS=listening on {web.address}"]
    assert heard[2:5] == ["WATCHDOG=1"] * 3


# --- the end ---------------------------------------------------------------------------


def unread(pipe: IO[bytes]) -> int:
    """Bytes that nobody has read yet."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """And not before: a word from it says that it lives."""
    one = Web(tmp_path)
    assert one.child.stdin is not None
    one.child.stdin.write(b".")
    one.child.stdin.flush()
    until(lambda: not unread(one.child.stdin), "it has heard that")
    assert one.ask("GET", "/health").status == 503  # the master is down
    one.child.stdin.close()
    status, log = one.ended()
    assert (status, log) == (Exit.DONE, "")
    assert not (tmp_path / "run" / "http.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_told_and_keeps_nobody_waiting(tmp_path: Path, number: int) -> None:
    one = Web(tmp_path)
    with one.connect() as idle, one.connect() as half:
        half.send(b"GET /ta")
        assert idle.ask("GET", "/tasks").status == 200
        one.child.send_signal(number)
        begun = time.monotonic()
        assert one.ended() == (Exit.DONE, "")
        assert time.monotonic() - begun < 5.0
        assert idle.closed()
        assert half.closed()


def test_who_has_just_come_is_answered_before_the_end(tmp_path: Path) -> None:
    one = Web(tmp_path)
    with one.connect() as just, one.connect() as half, one.connect() as idle:
        half.send(b"GET /tasks HTTP/1.1\r\n")
        assert idle.ask("GET", "/tasks").status == 200  # so the others were accepted
        one.child.send_signal(signal.SIGTERM)
        assert idle.closed()
        assert just.ask("GET", "/tasks").status == 200
        assert just.closed()
        half.send(b"Host: localhost\r\n\r\n")
        assert half.read().status == 200
        begun = time.monotonic()
        assert one.ended() == (Exit.DONE, "")
        assert time.monotonic() - begun < 2.0, "nobody is left to wait for"


def test_a_bug_is_told_in_the_log_and_not_to_the_client(tmp_path: Path) -> None:
    (tmp_path / "sessions").write_text("no directory")
    with Web(tmp_path) as one:
        said = one.ask("GET", "/sessions")
        assert (said.status, said.code) == (500, "internal")
        assert said.json["error"]["message"] == "codexd failed; its log says how"
        assert one.ask("GET", "/health").json["status"] == "down"
        assert "http.failed" in one.log.read_text()


def test_many_clients_at_once(web: Web) -> None:
    """Each gets its own answers, in order."""
    wrong: list[str] = []

    def talk() -> None:
        with web.connect() as client:
            for _ in range(20):
                wrong.extend(
                    path
                    for path, status in (("/tasks", 200), ("/sessions/none", 404))
                    if client.ask("GET", path).status != status
                )

    threads = [threading.Thread(target=talk) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong
