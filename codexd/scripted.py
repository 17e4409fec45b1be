"""A scripted model: a small Responses-API server on loopback for the real Codex CLI.

`codexd selftest`, `make demo` and the tests run real turns of the real CLI
against it: no account, no tokens, no network.  What it answers is a script of
`replies`; without one, `replies.echo`.

Promises: it listens on 127.0.0.1 only, on a port the kernel chose; every
request is recorded before it is answered; closing it ends every answer that
still hangs, at once; a client that goes away ends its answer at once.

May fail: OSError when there is no port; `__exit__` raises RuntimeError when a
script failed, so that a wrong script is never taken for a wrong codexd.
"""

from __future__ import annotations

import argparse
import json
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from types import TracebackType
from typing import Any, Self

from codexd.replies import FOREVER, Door, Reply, Script, Turn, echo, fail, history

KEY = "CODEXD_SCRIPTED_KEY"  # the variable that codex takes the API key from
PROVIDER = "scripted"
_MARK = "# Written by codexd.scripted; it may be overwritten by it at any time."
# Nothing but the model is asked over the network, and no failure is waited for.
_SETTINGS = f"""\
model_provider = "{PROVIDER}"
check_for_update_on_startup = false

[analytics]
enabled = false

[features]
plugins = false
apps = false
unbounded_connection_retries = false

[shell_environment_policy]
inherit = "core"

[model_providers.{PROVIDER}]
"""
_THREAD = ("thread-id", "thread_id", "session-id", "session_id", "conversation_id")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        self.close_connection = True
        body = self._body()
        if not self.path.endswith("/responses"):
            self._send(fail(404, f"the scripted model has no {self.path}"))
            return
        model = self.server.model
        turn = model.begin(self.headers, body)
        try:
            answer = model.script(turn)
            self._send(answer if isinstance(answer, Reply) else Reply(answer))
        finally:
            model.end(turn)

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length", -1))
        body = self.rfile.read(max(0, length))
        if len(body) != length:
            raise ConnectionAbortedError("the client went away in the middle of its request")
        return body

    def _send(self, reply: Reply) -> None:
        self._wait(reply.before)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        for part in reply.parts:
            if isinstance(part, bytes):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if part else b"")
            else:
                self._wait(part)
        if reply.whole:
            self.wfile.write(b"0\r\n\r\n")

    def _wait(self, what: float | Door) -> None:
        """Wait, but not for a client that has gone.  Raises ConnectionError for it."""
        if what == 0:
            return
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if isinstance(what, Door):
            poll.register(what, select.POLLIN)
            limit = None
        else:
            limit = None if what == FOREVER else what * 1000
        ready = poll.poll(limit)
        if any(fd == self.connection.fileno() for fd, _ in ready):
            raise ConnectionAbortedError("the client closed the connection")

    def log_message(self, format: str, *args: object) -> None:
        pass  # the record of requests is `ScriptedModel.turns`


class _Server(ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, model: ScriptedModel) -> None:
        self.model = model
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is ordinary; the rest is told by `__exit__`."""
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and not isinstance(error, ConnectionError):
            self.model.errors.append(error)

    def hang_up(self) -> None:
        """Wake whoever waits on a connection: to each it looks as if the client left."""
        for connection in list(self.open):
            with suppress(OSError):  # closed by its own thread at this moment
                connection.shutdown(socket.SHUT_RDWR)


class ScriptedModel:
    """The server, as a context manager.  `turns`: every request so far, in order.

    `record` False keeps no requests, for a server that runs for long.
    """

    def __init__(self, script: Script = echo, *, record: bool = True) -> None:
        self.script = script
        self.turns: list[Turn] = []
        self.errors: list[Exception] = []
        self._record = record
        self._ends: dict[int, float] = {}
        self._seen: Counter[str] = Counter()
        self._news = threading.Condition()
        self._server = _Server(self)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._accepting = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="scripted-model", daemon=True
        )

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if self.errors and error is None:
            raise RuntimeError("the script of the scripted model failed") from self.errors[0]

    def close(self) -> None:
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._accepting.join()

    def environment(self) -> dict[str, str]:
        """The variable that codex needs besides CODEX_HOME."""
        return {KEY: "scripted"}

    def write_config(self, home: Path, **overrides: str | int) -> None:
        """Make `home` a CODEX_HOME whose model is this server.

        Overrides: `model`, and the keys of a model provider, such as
        `stream_idle_timeout_ms`.  Raises FileExistsError when `home` has a
        config.toml that somebody else wrote.
        """
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = home / "config.toml"
        if path.exists() and not path.read_text("utf-8", "replace").startswith(_MARK):
            raise FileExistsError(f"{path} is not ours: name a directory of its own")
        path.write_text(_config(self.url, **overrides), "utf-8")

    def spans(self, thread_id: str) -> list[tuple[Turn, float]]:
        """The thread's requests, each with the time its answer ended (inf: not yet)."""
        with self._news:
            turns = [turn for turn in self.turns if turn.thread_id == thread_id]
            return [(turn, self._ends.get(turn.number, FOREVER)) for turn in turns]

    def wait_for(self, wanted: Callable[[Turn], bool], timeout: float = 20) -> Turn:
        """The first request that is wanted, seen already or yet to come.

        Raises TimeoutError after `timeout` seconds.
        """

        def found() -> Turn | None:
            return next((turn for turn in self.turns if wanted(turn)), None)

        with self._news:
            turn = self._news.wait_for(found, timeout)
        if turn is None:
            raise TimeoutError(f"no such request within {timeout} s, {len(self.turns)} others")
        return turn

    # For the handler's threads:

    def begin(self, headers: Message, body: bytes) -> Turn:
        """Record a request.  Raises ValueError when it is not JSON."""
        request = json.loads(body)
        thread = next((str(headers[name]) for name in _THREAD if headers[name]), "")
        inputs, outputs = history(request["input"])
        tools = tuple(str(tool.get("name", tool["type"])) for tool in request.get("tools", ()))
        with self._news:
            self._seen[thread] += 1
            number, ordinal = self._seen.total(), self._seen[thread]
            turn = Turn(
                number, ordinal, thread, inputs, outputs, tools, body, started=time.monotonic()
            )
            if self._record:
                self.turns.append(turn)
            self._news.notify_all()
        return turn

    def end(self, turn: Turn) -> None:
        if self._record:
            with self._news:
                self._ends[turn.number] = time.monotonic()


def _config(url: str, **overrides: str | int) -> str:
    model = overrides.pop("model", "gpt-5.5")
    provider: dict[str, str | int] = {
        "name": PROVIDER,
        "base_url": url,
        "wire_api": "responses",
        "env_key": KEY,
        "request_max_retries": 1,
        "stream_max_retries": 1,
        "stream_idle_timeout_ms": 300_000,
        **overrides,
    }
    lines = (f"{key} = {json.dumps(value)}\n" for key, value in provider.items())
    return f"{_MARK}\nmodel = {json.dumps(model)}\n{_SETTINGS}{''.join(lines)}"


# --- by hand ------------------------------------------------------------------------------


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m codexd.scripted",
        description="Serve the scripted model until SIGTERM or Ctrl-C.",
    )
    parser.add_argument(
        "--home", type=Path, required=True, metavar="DIR", help="the CODEX_HOME to configure for it"
    )
    parser.add_argument("--port-file", type=Path, metavar="FILE", help="write the port there")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _arguments().parse_args(argv)
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # before there are other threads
    with ScriptedModel(record=False) as model:
        try:
            model.write_config(args.home)
        except OSError as error:
            print(f"codexd.scripted: {error}", file=sys.stderr)
            return 78
        if args.port_file:
            args.port_file.write_text(f"{model.port}\n")
        print(f"model {model.url} CODEX_HOME={args.home} {KEY}=scripted", flush=True)
        signal.sigwait(stops)
    return 0


if __name__ == "__main__":
    sys.exit(main())
