"""The systemd journal: records with fields, by journald's native protocol.

A record is one datagram to journald's socket: `NAME=value` and a newline, or,
for a value with a newline of its own, the name, a newline, the value's length
as 64 little-endian bits, the value and a newline.  So no value can make a field
or end a record.  What is too large for a datagram goes as a sealed memory file.

Own code: python-systemd is a C extension, and would be a fourth required package.

Promises: a record is with journald once `send` returns.  May fail: OSError when
nobody takes it, which journald that hangs may delay by PATIENCE.  The socket is
looked up for each record, so a journald that was started again is found again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct

SOCKET = "/run/systemd/journal/socket"
PATIENCE = 0.2  # seconds to wait for journald to make room
# journald drops other names, and keeps those that begin with _ for itself.
_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}", re.ASCII)
_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def is_stderr(stream: str | None) -> bool:
    """Whether standard error really leads to the journal.

    `stream` is JOURNAL_STREAM, the device and inode of what the manager connected:
    a program started with its output elsewhere inherits the variable all the same.
    """
    try:
        found = os.fstat(2)
    except OSError:
        return False  # closed
    return stream == f"{found.st_dev}:{found.st_ino}"


def encode(fields: dict[str, str]) -> bytes:
    """One record.  Raises ValueError for a name that journald would not keep."""
    parts = []
    for name, value in fields.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a field of the journal")
        data = value.encode("utf-8", "backslashreplace")  # lone surrogates
        if b"\n" in data:
            parts.append(b"%b\n%b%b\n" % (name.encode(), struct.pack("<Q", len(data)), data))
        else:
            parts.append(b"%b=%b\n" % (name.encode(), data))
    return b"".join(parts)


class Journal:
    """A sender of records to the socket at `path`."""

    def __init__(self, path: str = SOCKET) -> None:
        self.path = path
        self._socket: socket.socket | None = None

    def send(self, fields: dict[str, str]) -> None:
        """Give journald one record.  Raises OSError when it does not take it."""
        data, link = encode(fields), self._open()
        try:
            link.sendto(data, self.path)
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            self._send_sealed(link, data)

    def _open(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            # The kernel's own time limit: to poll a socket that is not connected says nothing.
            limit = struct.pack("@ll", 0, int(PATIENCE * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        return self._socket

    def _send_sealed(self, link: socket.socket, data: bytes) -> None:
        """journald reads it from memory that nobody can change any more."""
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        with open(os.memfd_create("codexd-journal", flags), "wb") as file:
            file.write(data)
            file.flush()
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
            # Not socket.send_fds: of Python 3.11, it forgets the address.
            fds = struct.pack("@i", file.fileno())
            link.sendmsg([], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)], 0, self.path)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
