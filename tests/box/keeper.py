"""The keeper of one box: the process that holds a box's state and boots its systemd.

Started by tests/box.py with a plan (JSON) as its argument, as root.  It has a mount
namespace of its own, where an overlay of `/` lies over a tmpfs: what the box writes is
there for as long as the keeper lives, through any number of boots, and the host sees
nothing of it.

On stdin it takes "boot", one line each; on stdout it says "booted PID" and, once that
PID 1 and everything below it has ended, "gone STATUS" (as a shell tells it: 128 + signal).
The end of stdin is the end of the box; after "keep" the box goes on until somebody
ends it.

Promises: whoever dies, nothing goes on.  The death of the test process is the end of
stdin; the death of the keeper kills PID 1 (PDEATHSIG), which ends the PID namespace, and
with the last mount namespace the tmpfs goes.  Only the directory of the box and its
cgroups can be left then: tests/box.py removes them at its next start.

May fail: OSError with the step that failed, on stderr, which is the box's console.log.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
# From <linux/mount.h>, <linux/sched.h>, <linux/prctl.h>: Python 3.11 has none of them.
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC = 1, 2, 4, 8, 32, 4096, 16384
PRIVATE, SHARED, DETACH = 1 << 18, 1 << 20, 2
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWPID, NEWNET = 0x20000000, 0x40000000
SET_PDEATHSIG, CAPBSET_DROP = 1, 24
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

# What would reach the kernel that the box shares with its host: sys_module sys_rawio
# sys_pacct sys_time mac_override mac_admin syslog wake_alarm block_suspend
DROPPED = (16, 17, 20, 25, 32, 33, 34, 35, 36)
DEVICES = {
    "null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9),
    "tty": (5, 0),
}  # fmt: skip
LINKS = {
    "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2",
    "ptmx": "pts/ptmx",
}  # fmt: skip


# --- the system calls ---------------------------------------------------------------------


def check(result: int, what: str) -> None:
    """Raises OSError, with what was tried, when a call of the C library failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = [text.encode() for text in (source, str(target), kind)]
    result = LIBC.mount(*words, ctypes.c_ulong(flags), data.encode())
    check(result, f"mount {kind or source} on {target}")


def bind(source: str | Path, target: Path, *, read_only: bool = False) -> None:
    mount(str(source), target, flags=BIND | REC)
    if read_only:
        mount("", target, flags=BIND | REMOUNT | RDONLY)


def tmpfs(target: Path, data: str, flags: int = NOSUID | NODEV) -> None:
    target.mkdir(exist_ok=True)
    mount("tmpfs", target, "tmpfs", flags, data)


def die_with_parent() -> None:
    check(LIBC.prctl(SET_PDEATHSIG, signal.SIGKILL), "prctl")


def in_child(work: Callable[[], None]) -> int:
    """The pid of a child that does `work` and ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:  # whatever it was: the parent's code must not run twice
        print(f"box: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def status_of(pid: int) -> int:
    """Reap the child; its exit status, or 128 + the signal that ended it."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


# --- what a box is made of ----------------------------------------------------------------


class Cgroups:
    """One private cgroup in every hierarchy, below the keeper's own."""

    def __init__(self, places: list[str]) -> None:
        self.places = [Path(place) for place in places]

    def make(self) -> None:
        for place in self.places:
            place.mkdir()
            for name in ("cpuset.cpus", "cpuset.mems"):  # v1 starts them empty: nothing may run
                above = place.parent / name
                if above.exists() and (value := above.read_text().strip()):
                    (place / name).write_text(value)

    def join(self) -> None:
        for place in self.places:
            (place / "cgroup.procs").write_text("0")

    def remove(self) -> None:
        """Once nothing runs in them; the kernel may still be at work on the last of it."""
        end = time.monotonic() + 10
        folders = [folder for place in self.places for folder, _, _ in os.walk(place, False)]
        for folder in folders:
            while True:
                try:
                    os.rmdir(folder)
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.01)


class Root:
    """The file system of the box: the overlay, and what every boot mounts anew."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.state = Path(plan["place"]) / "state"
        self.root = self.state / "root"

    def lay(self) -> None:
        """The overlay, furnished: once in the life of a box."""
        mount("", Path("/"), flags=REC | PRIVATE)
        tmpfs(self.state, "mode=755,size=4g")
        for name in ("upper", "work", "root"):
            (self.state / name).mkdir()
        where = f"lowerdir=/,upperdir={self.state}/upper,workdir={self.state}/work"
        mount("box", self.root, "overlay", 0, f"{where},index=off,metacopy=off")
        if status_of(in_child(self._furnish)):
            raise OSError("the box could not be furnished, see above")

    def drop(self) -> None:
        for path in (self.root, self.state):
            check(LIBC.umount2(str(path).encode(), DETACH), f"umount of {path}")

    def _furnish(self) -> None:
        os.chroot(self.root)  # no absolute link of the host leads out of the box
        os.chdir("/")
        for name in self.plan["emptied"]:
            shutil.rmtree(name, ignore_errors=True)
            os.makedirs(name)
        for name, text in self.plan["files"].items():
            path = _fresh(name)
            path.write_text(text)
            path.chmod(0o755 if text.startswith("#!") else 0o644)
        for name, target in self.plan["links"].items():
            _fresh(name).symlink_to(target)
        for target in self.plan["binds"].values():
            os.makedirs(target, exist_ok=True)
        if clean := self.plan["clean_proc"]:
            os.makedirs(clean)
            os.chmod(Path(clean).parent, 0o700)

    def mount_all(self) -> None:
        for source, target in self.plan["binds"].items():
            bind(source, self._at(target), read_only=True)
        self._mount_proc()
        mount("sysfs", self._at("/sys"), "sysfs", RDONLY | NOSUID | NODEV | NOEXEC)
        self._mount_dev()
        tmpfs(self._at("/run"), "mode=755")
        tmpfs(self._at("/tmp"), "mode=1777")
        if self.plan["mode"] == "unified":
            self._hierarchy("cgroup2", self._at("/sys/fs/cgroup"))
        else:
            self._hierarchies(self._at("/sys/fs/cgroup"))

    def enter(self) -> None:
        os.chdir(self.root)
        check(LIBC.pivot_root(b".", b"."), "pivot_root")
        check(LIBC.umount2(b".", DETACH), "umount of the old root")
        os.chdir("/")
        # Without it LoadCredential= gives an empty directory: PID 1 mounts into it later.
        mount("", Path("/"), flags=REC | SHARED)

    def _at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _mount_proc(self) -> None:
        flags = NOSUID | NODEV | NOEXEC
        mount("proc", self._at("/proc"), "proc", flags)
        settings = self._at("/proc/sys")
        bind(settings, settings, read_only=True)  # they are the host's
        # The kernel's boot id is the host's, too: a reboot of the box would not be seen.
        boot_id = self.state / "boot_id"
        boot_id.write_bytes(Path("/proc/sys/kernel/random/uuid").read_bytes())
        boot_id.chmod(0o444)
        bind(boot_id, settings / "kernel/random/boot_id")
        if self.plan["clean_proc"]:
            # The kernel lets a user namespace mount a /proc (bubblewrap does) only where
            # it sees one with nothing mounted on it.  Any place will do, so the masks stay.
            mount("proc", self._at(self.plan["clean_proc"]), "proc", flags)

    def _mount_dev(self) -> None:
        dev = self._at("/dev")
        tmpfs(dev, "mode=755", NOSUID)
        for name, (major, minor) in DEVICES.items():
            os.mknod(dev / name, 0o020666, os.makedev(major, minor))
            (dev / name).chmod(0o666)
        for name, target in LINKS.items():
            (dev / name).symlink_to(target)
        for name in ("pts", "mqueue"):
            (dev / name).mkdir()
        terminals = "newinstance,ptmxmode=0666,mode=620,gid=5"
        mount("devpts", dev / "pts", "devpts", NOSUID | NOEXEC, terminals)
        mount("mqueue", dev / "mqueue", "mqueue", NOSUID | NODEV | NOEXEC)
        tmpfs(dev / "shm", "mode=1777")
        (dev / "console").touch()
        bind(f"{self.plan['place']}/console.log", dev / "console")

    def _hierarchy(self, kind: str, target: Path, data: str = "") -> None:
        target.mkdir(exist_ok=True)
        mount(kind, target, kind, NOSUID | NODEV | NOEXEC, data)

    def _hierarchies(self, top: Path) -> None:
        """cgroup v1 with a v2 beside it, as the host has them."""
        tmpfs(top, "mode=755", NOSUID | NODEV | NOEXEC)
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            names = line.split(":")[1]
            if not names:
                self._hierarchy("cgroup2", top / "unified")
            elif names.startswith("name="):
                self._hierarchy("cgroup", top / names.removeprefix("name="), f"none,{names}")
            else:
                self._hierarchy("cgroup", top / names, names)
                for name in names.split(",") if "," in names else ():
                    (top / name).symlink_to(names)


def _fresh(name: str) -> Path:
    """A path where nothing is, so that nothing is written through a link."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


# --- PID 1 --------------------------------------------------------------------------------


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_:
        request = fcntl.ioctl(any_, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack_from("16sh", request)[1]
        fcntl.ioctl(any_, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def become_systemd(plan: dict[str, Any], root: Root) -> None:
    """The first process of the new namespaces, up to its exec."""
    die_with_parent()
    os.setsid()
    root.mount_all()
    loopback_up()
    socket.sethostname(plan["name"])
    root.enter()
    for capability in DROPPED:
        check(LIBC.prctl(CAPBSET_DROP, capability), f"drop of capability {capability}")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec keeps that
    env = {"container": "codexd-box", "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    os.execve(plan["systemd"][0], plan["systemd"], env)


def hold_namespaces(plan: dict[str, Any], root: Root, cgroups: Cgroups, tell: int) -> None:
    """The parent of one PID 1: a PID namespace lasts no longer than its first process."""
    die_with_parent()
    cgroups.join()
    check(LIBC.unshare(NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWPID | NEWNET), "unshare")
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # the pipes to the test process are the keeper's alone
    pid = in_child(lambda: become_systemd(plan, root))
    os.write(tell, str(pid).encode())
    os.close(tell)
    os._exit(status_of(pid))


# --- the keeper ---------------------------------------------------------------------------


class Keeper:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.root = Root(plan)
        self.cgroups = Cgroups(plan["cgroups"])
        self.orders = open(0, "rb", buffering=0)  # noqa: SIM115 (for life; unbuffered for poll)
        self.parent = 0  # of the box's PID 1; 0: the box is off
        self.init = 0

    def run(self) -> None:
        kept = False
        self.root.lay()
        while order := self._next():
            if order == "boot":
                self._boot()
            kept = kept or order == "keep"
        if not kept:
            self._kill()
        self._reap()
        self.root.drop()
        forget(Path(self.plan["place"]))

    def _next(self) -> str:
        """The next order, "" at the end; an end of the box is told when it comes."""
        while True:
            poll = select.poll()
            poll.register(self.orders, select.POLLIN)
            if self.parent:
                end = os.pidfd_open(self.parent)
                poll.register(end, select.POLLIN)
                ready = [fd for fd, _ in poll.poll()]
                os.close(end)
                if end in ready:
                    self._tell(f"gone {self._reap()}")
                    continue
            return self.orders.readline().decode().strip()

    def _boot(self) -> None:
        self.cgroups.make()
        reader, writer = os.pipe()
        self.parent = in_child(
            lambda: hold_namespaces(self.plan, self.root, self.cgroups, writer)
        )
        os.close(writer)
        with open(reader, encoding="ascii") as told:
            self.init = int(told.read() or 0)
        self._tell(f"booted {self.init}")

    def _kill(self) -> None:
        if self.parent:
            os.kill(self.init, signal.SIGKILL)

    def _reap(self) -> int:
        if not self.parent:
            return 0
        status = status_of(self.parent)
        self.parent = 0
        self.cgroups.remove()
        return status

    def _tell(self, text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            pass  # the test process is dead: the end of stdin comes next


def forget(place: Path) -> None:
    """Remove a box's directory: by name, for nothing must ever be deleted below a mount."""
    (place / "state").rmdir()
    for name in ("console.log", "cgroups", "lock"):
        (place / name).unlink(missing_ok=True)
    place.rmdir()


def main() -> None:
    plan = json.loads(sys.argv[1])
    # Held for life: whoever finds it free knows that the box is dead.
    lock = os.open(f"{plan['place']}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.umask(0o022)
    check(LIBC.unshare(NEWNS), "unshare")
    Keeper(plan).run()


if __name__ == "__main__":
    main()
