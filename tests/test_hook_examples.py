"""The hooks of examples/hooks, against servers that keep what they get."""

from __future__ import annotations

import json
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

HOOKS = Path(__file__).resolve().parent.parent / "examples/hooks"
ID = "20261123t072011-k3f9qa7x2m"
EVENT = {
    "id": ID,
    "state": "failed",
    "outcome": "timeout",
    "title": "links",
    "answer": "Ünfinished",
}
ENV = {
    "PATH": "/usr/bin:/bin", "CODEXD_STATE": "failed", "CODEXD_EVENT_ID": f"{ID}.failed",
    "CODEXD_TASK": ID, "CODEXD_SUMMARY": "codexd: links failed: $(no) shell",
}  # fmt: skip


class _Http(BaseHTTPRequestHandler):
    """Keeps each request; refuses those to /no."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((dict(self.headers), body))  # type: ignore[attr-defined]
        self.send_response(500 if self.path == "/no" else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


class _Smtp(socketserver.StreamRequestHandler):
    """As much of SMTP as one mail needs."""

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            verb = line[:4].upper()
            if verb == b"DATA":
                self.wfile.write(b"354 go\r\n")
                mail = b""
                while (more := self.rfile.readline()) != b".\r\n":
                    mail += more
                self.server.got.append(mail)  # type: ignore[attr-defined]
            self.wfile.write(b"221 bye\r\n" if verb == b"QUIT" else b"250 ok\r\n")


def serving(server: socketserver.BaseServer) -> Iterator[socketserver.BaseServer]:
    server.got = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def http() -> Iterator[socketserver.BaseServer]:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    yield from serving(HTTPServer(("127.0.0.1", 0), _Http))


@pytest.fixture
def smtp() -> Iterator[socketserver.BaseServer]:
    yield from serving(socketserver.TCPServer(("127.0.0.1", 0), _Smtp))


def tell(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [str(HOOKS / name), *args]
    said = json.dumps(EVENT)
    return subprocess.run(command, input=said, env=ENV, capture_output=True, text=True, timeout=30)


def test_webhook(http: HTTPServer) -> None:
    url = f"http://127.0.0.1:{http.server_port}"
    assert tell("webhook", url).returncode == 0
    headers, body = http.got[0]  # type: ignore[attr-defined]
    assert json.loads(body) == EVENT
    assert headers["Idempotency-Key"] == f"{ID}.failed"
    refused = tell("webhook", f"{url}/no")
    assert refused.returncode != 0
    assert "500" in refused.stderr


def test_ntfy(http: HTTPServer) -> None:
    url = f"http://127.0.0.1:{http.server_port}"
    assert tell("ntfy", url).returncode == 0
    headers, body = http.got[0]  # type: ignore[attr-defined]
    assert body == b"codexd: links failed: $(no) shell\n"
    assert headers["Priority"] == "high"
    assert tell("ntfy", f"{url}/no").returncode != 0


def test_mail(smtp: socketserver.TCPServer) -> None:
    done = tell("mail", "ops@example.org", f"127.0.0.1:{smtp.server_address[1]}")
    assert done.returncode == 0, done.stderr
    mail = smtp.got[0].decode()  # type: ignore[attr-defined]
    assert "To: ops@example.org" in mail
    assert "Subject: codexd: links failed: $(no) shell" in mail
    assert f"Message-ID: <{ID}.failed@" in mail
    assert "outcome: timeout" in mail


def test_mail_without_a_server(smtp: socketserver.TCPServer) -> None:
    assert tell("mail", "ops@example.org", "127.0.0.1:1").returncode != 0
