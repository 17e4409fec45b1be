"""The host of the boxes: can it boot one, and what did dead ones leave?

Owns /run/codexd-boxes: a directory for each box, with its console, its lock and the
names of its cgroups.  A box is dead when nobody holds its lock and the test process that
its name tells of is gone; only such a box is ever removed.
"""

from __future__ import annotations

import fcntl
import glob
import os
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.box.cgroups import Cgroups, hierarchies
from tests.box.plan import SYSTEMD, VERSION, Mode, interpreter

PLACES = Path("/run/codexd-boxes")
PREFIX = "codexd-box-"
# Debian package → a file of it.
PACKAGES = {
    "systemd": SYSTEMD,
    "systemd-sysv": "/sbin/poweroff",
    "dbus": "/usr/bin/dbus-daemon",
    "polkitd": "/usr/lib/polkit-1/polkitd",
    "libpam-systemd": "/lib/*/security/pam_systemd.so",
    "util-linux": "/usr/bin/setpriv",
}


# --- can it? ------------------------------------------------------------------------------


def require(mode: Mode = "hybrid") -> None:
    """Skip the test where no such box can be booted, but fail it where CI is set."""
    import pytest  # the keeper needs this file, and not pytest

    if reason := missing(mode):
        if os.environ.get("CI"):
            pytest.fail(f"CI has to run the tests in a booted systemd, but {reason}", pytrace=False)
        pytest.skip(reason)


@cache
def missing(mode: Mode) -> str | None:
    """Why this machine cannot boot such a box; None: it can."""
    if os.geteuid() != 0:
        return "a booted systemd needs root"
    if lacking := [name for name, path in PACKAGES.items() if not glob.glob(path)]:
        return f"a booted systemd needs packages: apt-get install {' '.join(lacking)}"
    if _in_chroot():
        return "a booted systemd cannot be had in a chroot"
    controllers = hierarchies()
    if "" not in controllers:
        return "a booted systemd needs a mounted cgroup v2"
    if mode == "hybrid" and not any("memory" in names.split(",") for names in controllers):
        return "a hybrid box needs a host with the memory controller in cgroup v1"
    return _unreadable() or _refusal()


def _unreadable() -> str | None:
    """A shared libpython is found by its absolute path: another user's Python would take any."""
    _, binds = interpreter()
    for prefix in binds if sysconfig.get_config_var("Py_ENABLE_SHARED") else ():
        if not all(path.stat().st_mode & 0o001 for path in [Path(prefix), *Path(prefix).parents]):
            return f"a booted systemd needs /usr/bin/python{VERSION}, or {prefix} open to all users"
    return None


def _in_chroot() -> bool:
    """Whoever enters a mount namespace comes out at its real root."""
    look = ["stat", "--format=%d:%i", "/"]
    here = subprocess.check_output(look)
    there = subprocess.check_output(["nsenter", "--mount=/proc/self/ns/mnt", *look])
    return here != there


def _refusal() -> str | None:
    """Try what the keeper does first."""
    script = (
        "mount -t tmpfs box /mnt && mkdir /mnt/upper /mnt/work /mnt/root && mount -t overlay"
        " -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work box /mnt/root"
    )
    command = ["unshare", "--mount", "--cgroup", "--uts", "--ipc", "--net", "--pid", "--fork"]
    done = subprocess.run(
        [*command, "sh", "-c", script], capture_output=True, text=True, timeout=20
    )
    return f"a booted systemd is refused here: {done.stderr.strip()}" if done.returncode else None


# --- the records --------------------------------------------------------------------------


@contextmanager
def _alone() -> Iterator[None]:
    """Nobody else makes or removes a record meanwhile."""
    PLACES.mkdir(mode=0o700, exist_ok=True)
    all_records = os.open(PLACES, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(all_records, fcntl.LOCK_EX)
        yield
    finally:
        os.close(all_records)


def record(place: Path) -> list[str]:
    """Make the directory of a new box; the cgroups that it will have."""
    cgroups = [str(own / place.name) for own in hierarchies().values()]
    with _alone():
        place.mkdir()
        (place / "cgroups").write_text("".join(f"{path}\n" for path in cgroups))
        (place / "lock").touch()
    return cgroups


def hold(place: Path) -> int:
    """Lock the record for as long as this process lives.  Raises BlockingIOError."""
    lock = os.open(place / "lock", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise
    return lock


def forget(place: Path) -> None:
    with _alone():
        _remove(place)


def sweep() -> None:
    """Remove what dead boxes left, which is little: see the keeper."""
    with _alone():
        for place in PLACES.glob(f"{PREFIX}*"):
            owner = place.name.removeprefix(PREFIX).split("-")[0]
            if not Path("/proc", owner).exists():
                _sweep(place)


def _sweep(place: Path) -> None:
    (place / "lock").touch()  # whoever made the record may have been killed in the middle
    try:
        lock = hold(place)
    except BlockingIOError:
        return  # its keeper lives, and removes it
    if (place / "cgroups").exists():
        cgroups = Cgroups((place / "cgroups").read_text().splitlines())
        for folder in cgroups.folders():
            for pid in (folder / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        cgroups.remove()
    _remove(place)
    os.close(lock)


def _remove(place: Path) -> None:
    """By name: nothing must ever be deleted below what may be a mount."""
    if (place / "state").exists():
        (place / "state").rmdir()
    for name in ("console.log", "cgroups", "lock"):
        (place / name).unlink(missing_ok=True)
    place.rmdir()
