"""The HTTP server in a process of its own, and a client that sends what it is told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PATIENCE = 20.0  # seconds until a test that hears nothing has failed


@dataclass(frozen=True)
class Said:
    """A reply; names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error, which must have exactly the contract's shape."""
        assert self.json.keys() == {"error"}, self.body
        assert self.json["error"].keys() == {"code", "message"}
        return str(self.json["error"]["code"])


class Client:
    """One connection."""

    def __init__(self, address: str) -> None:
        if address.startswith("unix:"):
            self.sock = socket.socket(socket.AF_UNIX)
            where: Any = address.removeprefix("unix:")
        else:
            host, _, port = address.removeprefix("http://").rpartition(":")
            self.sock = socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET)
            where = (host.strip("[]"), int(port))
        self.sock.settimeout(PATIENCE)
        self.sock.connect(where)
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _where: TracebackType | None,
    ) -> None:
        self.file.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read(self, bodyless: bool = False) -> Said:
        """The next reply; `bodyless` for the one to HEAD."""
        version, status, _ = self.file.readline().decode().split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {}
        while (line := self.file.readline().decode()) != "\r\n":
            name, _, value = line.partition(": ")
            assert name.lower() not in headers
            headers[name.lower()] = value.removesuffix("\r\n")
        assert headers["server"] == "codexd"
        length = 0 if bodyless or status == "100" else int(headers["content-length"])
        return Said(int(status), headers, self.file.read(length))

    def closed(self) -> bool:
        """Whether the server ends the connection, after whatever it still says."""
        try:
            return self.file.read() == b""
        except ConnectionResetError:
            return True

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Said:
        """One request; an underscore in the name of a header stands for a hyphen."""
        lines = {"Host": "localhost", **{k.replace("_", "-"): v for k, v in headers.items()}}
        if body is not None:
            lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **lines}
        head = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in lines.items()), "", ""]
        self.send("\r\n".join(head).encode() + (body or b""))
        return self.read(bodyless=method == "HEAD")


class Web:
    """`python -m codexd.http` on a root; it ends with the `with`."""

    def __init__(self, root: Path, config: str = "", within: Sequence[str] = ()) -> None:
        """`within` is a command that starts another, such as unshare."""
        root.mkdir(exist_ok=True)
        (root / "codexd.yaml").write_text(config)
        self.root = root
        self.log = root / "http.log"
        with open(self.log, "w") as log:
            self.child = subprocess.Popen(
                [*within, sys.executable, "-m", "codexd.http", "--root", str(root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.said = self.child.stdout.readline().decode()
        self.address = self.said.removeprefix("listening ").strip()

    def __enter__(self) -> Self:
        assert self.said.startswith("listening "), self.log.read_text()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _where: TracebackType | None,
    ) -> None:
        if kind:
            print(self.log.read_text()[-8000:])
        if "COVERAGE_PROCESS_CONFIG" in os.environ:
            self.child.terminate()  # what is killed cannot say which lines it has run
        else:
            self.child.kill()
        self.ended()

    def ended(self) -> tuple[int, str]:
        """Its exit status and its log, once it has ended."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        status = self.child.wait(PATIENCE)
        self.child.stdin.close()
        self.child.stdout.close()
        return status, self.log.read_text()

    def connect(self) -> Client:
        return Client(self.address)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Said:
        """One request on a connection of its own."""
        with self.connect() as client:
            return client.ask(method, path, body, **headers)

    def post(self, path: str, value: object = None, **headers: str) -> Said:
        return self.ask("POST", path, json.dumps(value or {}).encode(), **headers)

    def ticks(self) -> int:
        """CPU time used so far, in clock ticks."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


@contextmanager
def master(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The real master on a root."""
    with open(root / "master.log", "a") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "codexd.master", "--root", str(root)],
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        yield child
    finally:
        child.terminate()
        child.wait(PATIENCE)
