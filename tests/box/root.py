"""The file system of a box: an overlay of the host's, and what every boot mounts anew.

Owns the tmpfs that takes what the box writes.  All of it is in the mount namespace of
whoever calls, which must have one of its own.  Raises OSError.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.box import kernel
from tests.box.kernel import NODEV, NOEXEC, NOSUID, PRIVATE, RDONLY, REC, SHARED, bind, mount

DEVICES = {
    "null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9),
    "tty": (5, 0),
}  # fmt: skip
LINKS = {
    "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2",
    "ptmx": "pts/ptmx",
}  # fmt: skip


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
        if os.waitpid(in_child(self._furnish), 0)[1]:
            raise OSError("the box could not be furnished: see above")

    def drop(self) -> None:
        """Nothing of it is left."""
        kernel.detach(self.root)
        kernel.detach(self.state)

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
            bind(source, self._at(target), read_only=source not in self.plan["writable"])
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
        kernel.change_root(self.root)
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


def tmpfs(target: Path, data: str, flags: int = NOSUID | NODEV) -> None:
    target.mkdir(exist_ok=True)
    mount("tmpfs", target, "tmpfs", flags, data)
