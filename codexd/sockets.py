"""Where the HTTP server listens, and what a client must show there.

`bind` listens: on the sockets inherited from systemd's socket activation if
there are any, else where http.listen says.  A Unix socket is guarded by its
mode (0660); over TCP, always on loopback, every request must carry the token
of http.token_file.

The socket file of a server that died is replaced, a live server's is not.
Raises NoSocket, which has a sentence for the admin and the exit status.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import re
import socket
import stat
import struct
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from codexd.config import HttpConfig
from codexd.program import Exit

BACKLOG = 1024  # the kernel cuts it to net.core.somaxconn
MODE = 0o660
_FIRST = 3  # the first descriptor that socket activation passes
_ACCEPTS, _LISTENS = "00010000", "0A"  # flags and state in /proc/net
_TOKEN = re.compile(rb"[!-~]{16,512}")
_MAKE = "make one: (umask 077; openssl rand -hex 32 > {})"


class NoSocket(Exception):
    """Why the server cannot listen, and the exit status that says so."""

    def __init__(self, status: Exit, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True, slots=True)
class Bound:
    """Listening sockets, none when HTTP is off.

    `token` is what every request over TCP must carry, `file` the socket file
    that is ours to remove.
    """

    listening: list[socket.socket]
    token: bytes | None = None
    file: Path | None = None


def bind(config: HttpConfig, env: MutableMapping[str, str]) -> Bound:
    """Listen.  Takes LISTEN_* out of `env`.  Raises NoSocket."""
    listening = _inherited(env)
    if config.listen is None:
        for sock in listening:
            _send_away(sock)
        return Bound([])
    if not listening:
        if isinstance(config.listen, Path):
            return Bound([_unix(config.listen)], file=config.listen)
        listening = [_tcp(config.listen)]
    over_tcp = not all(map(is_unix, listening))
    return Bound(listening, token(config.token_file) if over_tcp else None)


def is_unix(sock: socket.socket) -> bool:
    return sock.family == socket.AF_UNIX


def peer(sock: socket.socket) -> int:
    """The user at the other end of a Unix socket."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", found)[1])


def address(sock: socket.socket) -> str:
    """`unix:/PATH` or `http://HOST:PORT`."""
    if is_unix(sock):
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listens(where: Path | tuple[str, int]) -> bool:
    """Whether anybody on this host listens there, as the kernel tells everybody."""
    if isinstance(where, Path):
        rows = (line.split(maxsplit=7) for line in _table("unix"))
        return any(row[3] == _ACCEPTS and row[7:] == [str(where)] for row in rows)
    family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
    packed = socket.inet_pton(family, where[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    wanted = "".join(f"{word:08X}" for word in words) + f":{where[1]:04X}"
    rows = (line.split() for line in _table("tcp6" if ":" in where[0] else "tcp"))
    return any(row[1] == wanted and row[3] == _LISTENS for row in rows)


def _table(name: str) -> list[str]:
    """The sockets of a kind, see proc(5)."""
    return Path("/proc/net", name).read_text("utf-8", "replace").splitlines()[1:]


# --- socket activation ----------------------------------------------------------


def _inherited(env: MutableMapping[str, str]) -> list[socket.socket]:
    """What systemd listens on for us, as sd_listen_fds(3) describes it."""
    ours = env.get("LISTEN_PID") == str(os.getpid())
    count = env.get("LISTEN_FDS", "") if ours else ""
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        env.pop(name, None)
    number = int(count) if re.fullmatch("[0-9]{1,3}", count) else 0
    return [_adopted(fd) for fd in range(_FIRST, _FIRST + number)]


def _adopted(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        why = f"inherited descriptor {fd} is no socket: {error.strerror}"
        raise NoSocket(Exit.CONFIGURATION, why) from error
    if sock.type != socket.SOCK_STREAM or not listens or not _is_local(sock):
        sock.close()
        why = f"inherited socket {fd} is of no use: ListenStream= must be a path or 127.0.0.1:PORT"
        raise NoSocket(Exit.CONFIGURATION, why)
    sock.set_inheritable(False)
    return sock


def _send_away(sock: socket.socket) -> None:
    """Close what waits to be accepted, for which systemd would start us again and again."""
    sock.setblocking(False)
    while True:
        try:
            sock.accept()[0].close()
        except BlockingIOError:
            break
        except ConnectionAbortedError:
            continue
    sock.close()


def _is_local(sock: socket.socket) -> bool:
    """Whether only this host's users reach it; abstract Unix sockets have no mode."""
    name = sock.getsockname()
    if is_unix(sock):
        return isinstance(name, str) and name.startswith("/")
    inet = sock.family in (socket.AF_INET, socket.AF_INET6)
    return inet and ipaddress.ip_address(name[0]).is_loopback


# --- our own sockets --------------------------------------------------------------


def _tcp(where: tuple[str, int]) -> socket.socket:
    host, port = where
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            why = f"port {port} of {host} is in use; name another in http.listen"
            raise NoSocket(Exit.UNAVAILABLE, why) from error
        if error.errno == errno.EACCES:
            why = f"port {port} is for root alone; name one above 1023 in http.listen"
            raise NoSocket(Exit.PERMISSION, why) from error
        why = f"cannot listen on {host} port {port}: {error.strerror}"
        raise NoSocket(Exit.UNAVAILABLE, why) from error
    return sock


def _unix(path: Path) -> socket.socket:
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        with _alone(path.parent):
            return _fresh(path)
    except OSError as error:
        if error.errno is None:  # Python's own check; the kernel would say ENAMETOOLONG
            why = f"{path} is too long a name for a socket (107 bytes); choose a shorter directory"
            raise NoSocket(Exit.CONFIGURATION, why) from error
        status = Exit.PERMISSION if error.errno == errno.EACCES else Exit.UNAVAILABLE
        raise NoSocket(status, f"cannot listen on {path}: {error.strerror or error}") from error


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Two servers that start at once must not both find the other's socket dead."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _fresh(path: Path) -> socket.socket:
    _clear(path)
    sock = socket.socket(socket.AF_UNIX)
    before = os.umask(0o777 & ~MODE)
    try:
        sock.bind(os.fspath(path))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def _clear(path: Path) -> None:
    """Remove what a dead server left at `path`."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            why = f"{path} is there and is no socket; move it away"
            raise NoSocket(Exit.CONFIGURATION, why)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            # A full backlog is EAGAIN or a timeout: somebody listens there.
            if not isinstance(error, (TimeoutError, BlockingIOError)):
                raise
    raise NoSocket(Exit.UNAVAILABLE, f"another server listens on {path} already")


# --- the token ----------------------------------------------------------------------


def token(path: Path | None) -> bytes:
    """The token that every request over TCP must carry.  Raises NoSocket."""
    try:
        return _token(path)
    except OSError as error:
        why = f"http.token_file {path} cannot be read: {error.strerror}"
        if isinstance(error, FileNotFoundError):
            why += "; " + _MAKE.format(path)
        raise NoSocket(Exit.CONFIGURATION, why) from error


def _token(path: Path | None) -> bytes:
    if path is None:
        why = "http.token_file is not set; over TCP every request needs a token"
        raise NoSocket(Exit.CONFIGURATION, why)
    with open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        found = file.read(1024).strip()
    if mode & 0o007:
        why = f"http.token_file {path} is open to everybody on this host: chmod o= it, and renew it"
        raise NoSocket(Exit.CONFIGURATION, why)
    if not _TOKEN.fullmatch(found):
        what = "is no token of 16 to 512 printable characters" if found else "is empty"
        why = f"http.token_file {path} {what}; " + _MAKE.format(path)
        raise NoSocket(Exit.CONFIGURATION, why)
    return found
