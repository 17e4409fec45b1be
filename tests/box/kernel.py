"""The system calls that a box is made with and Python 3.11 does not have.

Each raises OSError that says what was tried.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
# From <linux/mount.h>, <linux/sched.h>, <linux/prctl.h> and <linux/sockios.h>.
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC = 1, 2, 4, 8, 32, 4096, 16384
PRIVATE, SLAVE, SHARED = 1 << 18, 1 << 19, 1 << 20
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWPID, NEWNET = 0x20000000, 0x40000000
_DETACH, _SET_PDEATHSIG, _CAPBSET_DROP = 2, 1, 24
_GIFFLAGS, _SIFFLAGS, _UP = 0x8913, 0x8914, 1


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str | Path, target: Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = [str(text).encode() for text in (source, target, kind)]
    result = _LIBC.mount(*words, ctypes.c_ulong(flags), data.encode())
    _check(result, f"mount {kind or source} on {target}")


def bind(source: str | Path, target: Path, *, read_only: bool = False) -> None:
    mount(source, target, flags=BIND | REC)
    if read_only:
        mount("", target, flags=BIND | REMOUNT | RDONLY)


def detach(target: Path) -> None:
    """Unmount it now, and everything below it, whoever uses it."""
    _check(_LIBC.umount2(str(target).encode(), _DETACH), f"unmount {target}")


def change_root(target: Path) -> None:
    """Make the mount `target` the root, and be there; the old one is gone."""
    os.chdir(target)
    _check(_LIBC.pivot_root(b".", b"."), f"pivot_root to {target}")
    _check(_LIBC.umount2(b".", _DETACH), "unmount the old root")  # it lies on top
    os.chdir("/")


def unshare(flags: int) -> None:
    _check(_LIBC.unshare(flags), "unshare")


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that forked it ends."""
    _check(_LIBC.prctl(_SET_PDEATHSIG, signal.SIGKILL), "prctl")


def drop_capability(number: int) -> None:
    """No program that this process executes from now on has it."""
    _check(_LIBC.prctl(_CAPBSET_DROP, number), f"drop capability {number}")


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_:
        request = fcntl.ioctl(any_, _GIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack_from("16sh", request)[1]
        fcntl.ioctl(any_, _SIFFLAGS, struct.pack("16sh14x", b"lo", flags | _UP))
