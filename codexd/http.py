"""codexd-http: the HTTP interface, for programs that have no file manager.

Listens on a Unix socket, whose mode decides who may connect, or on loopback
with a token.  Submits, cancels and answers questions; it owns nothing but its
socket, holds no state, and can be killed and started at any time.

The standard library's http.server parses every request and writes every reply,
in memory (see `framing`); asyncio only moves bytes, under a deadline.  Its own
socketserver is not used: that needs a thread a connection, and 1,000 slow
clients would be 1,000 threads.  And it accepts some framings that must be
refused, so each line of a head is checked before it is parsed.

Promises: a client that is slow, silent, hostile or gone harms only itself.  An
idle server costs nothing, and only a whole request is worked on.  When there
are too many connections, the one that has kept us waiting longest is closed,
so there is always room for the next.

May fail at its start: no socket (69), no permission (77), a token that is
missing or no secret (78).  Prints one line when it listens:
`listening unix:/PATH` or `listening http://127.0.0.1:PORT`.

Start it as a module or a program, never by its path: the directory of this
file has an `http` that is not the standard library's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
import traceback
from asyncio import StreamReader, StreamWriter

from codexd import sockets
from codexd.api import Api
from codexd.config import Config, ConfigError
from codexd.framing import HEAD_LIMIT, RETRY, Exchange, Problem, Reply, too_large_a_head
from codexd.model import is_id
from codexd.program import Exit, load, open_streams, options, refusal
from codexd.routes import Call, admit
from codexd.service import Level, Service

DEADLINE = 15.0  # seconds to send a request, and again to take its reply
CONNECTIONS = 256
GRACE = 3.0  # seconds for replies that are on their way when we are told to stop
_CHUNK = 64 << 10
_LINGER = 2.0  # seconds, and
_LINGER_BYTES = 8 << 20  # to read on, so that an early reply is not lost to a reset


class Link:
    """One connection."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.exchange = Exchange()  # the request that is received or answered
        sock = writer.get_extra_info("socket")
        self.local = sockets.is_unix(sock)
        self.uid = sockets.peer(sock) if self.local else None
        self.answered = False  # at least once
        writer.transport.set_write_buffer_limits(high=0)  # drain() means: the kernel has it

    async def send(self, data: bytes) -> None:
        """Raises TimeoutError when the client does not take it, OSError when it is gone."""
        self.writer.write(data)
        async with asyncio.timeout(DEADLINE):
            await self.writer.drain()

    def abort(self) -> None:
        self.writer.transport.abort()


class Server:
    """Talks with clients; what they ask for is the Api's."""

    def __init__(self, api: Api, service: Service, token: bytes | None) -> None:
        self.api = api
        self.service = service
        self.token = token
        self._stop = asyncio.Event()
        self._links: dict[Link, asyncio.Task[None]] = {}
        # Those we wait for, the longest first: for a request, else for a reply to be taken.
        self._awaited: dict[Link, bool] = {}

    def stop(self) -> None:
        self._stop.set()

    async def serve(self, bound: sockets.Bound) -> None:
        """Serve until `stop`; then answer whoever waits or has just come, and leave within GRACE.

        A connection of which nothing has come yet may have its request on the way: to close it
        would lose that.  Between two requests every client must expect the end.
        """
        servers = [
            await asyncio.start_server(
                self._accept, sock=sock, backlog=sockets.BACKLOG, limit=HEAD_LIMIT
            )
            for sock in bound.listening
        ]
        await self._stop.wait()
        if bound.file:
            bound.file.unlink(missing_ok=True)  # while we listen nobody else's can be there
        for server in servers:
            server.close()
        self.api.stopping = True
        for _ in range(2):  # as many turns of the loop take what was accepted to `_accept`
            await asyncio.sleep(0)
        for link in [link for link, asks in self._awaited.items() if asks and link.answered]:
            link.abort()
        if self._links:
            await asyncio.wait(self._links.values(), timeout=GRACE)
        for link in list(self._links):
            link.abort()

    # --- connections ----------------------------------------------------------------

    def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        link = Link(reader, writer)
        welcome = len(self._links) < CONNECTIONS or self._made_room()
        task = asyncio.get_running_loop().create_task(self._serve(link, welcome))
        self._links[link] = task
        self._awaited[link] = True
        task.add_done_callback(lambda _done: self._links.pop(link, None))

    def _made_room(self) -> bool:
        """Close a connection that keeps us waiting, if there is one; never one we work for."""
        oldest = next(iter(self._awaited), None)
        if oldest is None:
            return False
        del self._awaited[oldest]
        del self._links[oldest]
        oldest.abort()
        return True

    async def _serve(self, link: Link, welcome: bool) -> None:
        """Everything about one connection."""
        try:
            if not welcome:
                await self._refuse(link, Problem(503, "busy", "too many connections", RETRY))
            while welcome and await self._exchange(link):
                pass
        except (EOFError, TimeoutError, OSError):
            pass  # the client went, or would go on for ever: there is nobody to tell
        finally:
            self._awaited.pop(link, None)
            link.abort()

    async def _exchange(self, link: Link) -> bool:
        """One request and its reply; whether another may follow."""
        try:
            call, body = await self._receive(link)
        except Problem as problem:
            await self._refuse(link, problem)
            return False
        answer = await self._do(link, call, body)
        keep = not (link.exchange.close_connection or self._stop.is_set())
        await self._reply(link, answer, keep)
        return keep

    async def _refuse(self, link: Link, problem: Problem) -> None:
        """Reply to what was not read to its end, and read what still comes of it.

        Closing a socket with unread data would reset the reply away.
        """
        await self._reply(link, problem.reply, keep=False)
        self._awaited[link] = True
        link.writer.write_eof()
        left = _LINGER_BYTES
        async with asyncio.timeout(_LINGER):
            while left > 0 and (chunk := await link.reader.read(_CHUNK)):
                left -= len(chunk)

    async def _do(self, link: Link, call: Call, body: bytes) -> Reply:
        """The Api's answer; for a bug of ours a short sentence, and the rest to the log."""
        try:
            return await self.api.answer(call, body)
        except Problem as problem:
            return problem.reply
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{where.filename}:{where.lineno}"
            path = link.exchange.path[:200]
            about = {"task": _task(path), "path": path, "error": repr(error), "at": at}
            self.service.log(Level.ERROR, "http.failed", **about)
            return Problem(500, "internal", "codexd failed; its log says how").reply

    # --- one request --------------------------------------------------------------------

    async def _receive(self, link: Link) -> tuple[Call, bytes]:
        """A whole request: what it asks for, and its body.  Raises Problem, EOFError."""
        self._awaited[link] = True
        link.exchange = Exchange()
        begun = b""
        try:
            async with asyncio.timeout(DEADLINE):
                begun = await link.reader.readexactly(1)
                line = begun + await link.reader.readuntil()
                while not link.exchange.take(line):
                    line = await link.reader.readuntil()
                call = admit(link.exchange, None if link.local else self.token)
                if interim := link.exchange.interim():
                    await link.send(interim)
                return call, await link.reader.readexactly(link.exchange.length)
        except asyncio.LimitOverrunError:
            raise too_large_a_head() from None
        except TimeoutError:
            if not begun:
                raise  # it was only kept open
            slow = f"the request was not complete within {DEADLINE:g} s"
            raise Problem(408, "slow", slow) from None
        finally:
            self._awaited.pop(link, None)

    async def _reply(self, link: Link, answer: Reply, keep: bool) -> None:
        self.api.counts[answer.status] += 1
        asked = link.exchange
        if asked.command == "POST":
            where = dict(answer.headers).get("Location", asked.path)
            about = {"path": asked.path[:200], "status": answer.status, "uid": link.uid}
            self.service.log(Level.INFO, "http.post", task=_task(where), **about)
        self._awaited[link] = False
        await link.send(asked.render(answer, keep=keep))
        link.answered = True
        self._awaited.pop(link, None)


def _task(path: str) -> str | None:
    """The task that a path names."""
    return next(filter(is_id, path.split("/")), None)


# --- the program ------------------------------------------------------------------------


async def _run(config: Config, service: Service, bound: sockets.Bound) -> None:
    """Serve until we are told to stop, or our parent is gone."""
    api = Api(config)
    server = Server(api, service, bound.token)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, about: _told(service, about))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `codexd serve`: stay when a terminal goes
    if _has_parent():
        loop.add_reader(0, _listen_to_parent, server)
    watchdog = loop.create_task(_pat(service))
    service.ready()
    addresses = " ".join(sockets.address(sock) for sock in bound.listening)
    service.status(f"listening on {addresses}")
    print(f"listening {addresses}", flush=True)
    await server.serve(bound)
    service.notify("STOPPING=1")
    watchdog.cancel()
    api.close()


def _has_parent() -> bool:
    """Whether standard input is the pipe that `codexd serve` holds open."""
    return stat.S_ISFIFO(os.fstat(0).st_mode)


def _listen_to_parent(server: Server) -> None:
    if not os.read(0, 4096):
        asyncio.get_running_loop().remove_reader(0)
        server.stop()


async def _pat(service: Service) -> None:
    """Tell the manager that the loop turns, as often as its watchdog wants."""
    while limit := int(os.environ.get("WATCHDOG_USEC", 0)):
        service.notify("WATCHDOG=1")
        await asyncio.sleep(limit / 2e6)


def _told(service: Service, about: dict[str, object]) -> None:
    service.log(Level.ERROR, "http.loop", what=about.get("message"), error=about.get("exception"))


def main() -> None:
    open_streams()
    args = options("codexd-http", "the HTTP interface of codexd").parse_args()
    service = Service("codexd-http")
    try:
        config = load(args)
        bound = sockets.bind(config.http, os.environ)
    except ConfigError as error:
        service.log(Level.ERROR, "configuration", why=str(error))
        sys.exit(refusal(error))
    except sockets.NoSocket as problem:
        service.log(Level.ERROR, "cannot.listen", why=str(problem))
        sys.exit(problem.status)
    if bound.listening:
        asyncio.run(_run(config, service, bound))
    else:
        service.ready()  # else systemd would take this for a failure, and try again
        service.log(Level.INFO, "http.off", why="http.listen is off")
    sys.exit(Exit.DONE)


if __name__ == "__main__":
    main()
