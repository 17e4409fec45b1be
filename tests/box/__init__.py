"""A box: the machine's own systemd, booted as PID 1 of fresh namespaces, for tests.

    with Box() as box:
        box.push({"/etc/systemd/system/x.service": UNIT})
        box.run("systemctl", "start", "x")
        assert box.show("x", "ActiveState") == {"ActiveState": "active"}

Inside is the host's file system, seen through an overlay: writable, private, and gone
with the box.  /tmp and /run are the box's own and empty; of what the host's admin enabled
(units, generators, fstab, linger) nothing is there.  The network is a loopback of its
own.  The project and the Python packages of this test run are at fixed places that every
user may read and that no PrivateTmp= or ProtectHome= hides: `PYTHON` runs them, the
project's programs are in `BIN`, its source tree is `TREE`, read-only.

Promises: what the box writes is kept from boot to boot, the journal too, and each boot
has a boot_id of its own.  A killed box keeps what it wrote without fsync: it is no power
cut.  Nothing of a box outlives it, nor the test process, however that ends.

May fail: BoxError, with the command, what it said, or the end of the console.

Not private: the kernel's clock and its settings, which are read-only inside.  The boot_id
is the host's in a /proc that systemd mounted for a unit (ProtectProc=, ProcSubset=); PID 1,
the journal and the specifier %b have the box's.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.box import host
from tests.box.plan import (
    BIN,
    COVERAGE_DATA,
    PATH,
    PROJECT,
    PYTHON,
    SITE,
    TREE,
    Mode,
    covered,
    plan,
)

__all__ = ["BIN", "PATH", "PYTHON", "SITE", "TREE", "Box", "BoxError", "Mode"]

# How a process gets into the namespaces of the box's PID 1.
ENTER = ("nsenter", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--target")
_numbers = itertools.count(1)
_kept: list[subprocess.Popen[bytes]] = []


class BoxError(Exception):
    """A box that did not do what it was told."""


class Box:
    """One box, booted and up in its `with`.

    `mode` is how its cgroups are laid out.  "hybrid" has the v1 controllers of the host, so
    limits are enforced.  "unified" is cgroup v2 alone: where v1 has the controllers, systemd
    takes every limit there and enforces none.
    `keep`: it is left running at the end, to be looked at; how is printed.
    Without `clean_proc` no user namespace can mount a /proc, as in many containers;
    bubblewrap, and with it Codex's sandbox, notices.
    """

    def __init__(self, mode: Mode = "hybrid", keep: bool = False, clean_proc: bool = True) -> None:
        self.mode = mode
        self.keep = keep
        self.clean_proc = clean_proc
        self.name = f"{host.PREFIX}{os.getpid()}-{next(_numbers)}"
        self.place = host.PLACES / self.name
        self.pid = 0  # of its PID 1, as the host sees it; 0: the box is off
        self._keeper: subprocess.Popen[bytes] | None = None

    @staticmethod
    def missing(mode: Mode = "hybrid") -> str | None:
        """Why this machine cannot boot such a box; None: it can."""
        return host.missing(mode)

    # --- its life -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        host.sweep()
        cgroups = host.record(self.place)
        if covered():
            COVERAGE_DATA.mkdir(parents=True, exist_ok=True)
            COVERAGE_DATA.chmod(0o1777)
        what = plan(self.name, self.place, self.mode, self.clean_proc, cgroups)
        command = [sys.executable, "-m", "tests.box.keeper", json.dumps(what)]
        with open(self.place / "console.log", "ab") as console:
            self._keeper = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=console,
                cwd=PROJECT, start_new_session=True,
            )  # fmt: skip
        try:
            self.boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self.keep and self.pid:
            self._leave()
        else:
            self._end()

    def boot(self) -> None:
        """Start its systemd, and wait until it is up."""
        self._order("boot")
        self.pid = int(self._told("booted", 30))
        self.wait_running()

    def wait_running(self, timeout: float = 30) -> str:
        """Wait for the end of the boot: "running", or "degraded" where a unit failed."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0 and not self._speaks(0):
            # It fails until there is a PID 1 that listens; from then on it waits by itself.
            ask = ("timeout", f"{left}", "systemctl", "is-system-running", "--wait")
            state = self.run(*ask, check=False, timeout=left + 5).stdout.strip()
            if state in ("running", "degraded"):
                return state
            time.sleep(0.02)
        jobs = self.run("timeout", "5", "systemctl", "list-jobs", check=False)
        said = jobs.stdout + jobs.stderr + self.console()
        raise BoxError(f"{self.name} does not come up: {said}")

    def poweroff(self) -> None:
        """The orderly end: systemd stops every unit.  `boot` starts the box again."""
        self._order("poweroff")
        self.wait_off()

    def kill(self) -> None:
        """Everything in the box is killed at once.  `boot` starts it again."""
        self._order("kill")
        self.wait_off()

    def wait_off(self, timeout: float = 30) -> None:
        """Wait for an end that came from inside, as of `systemctl reboot`."""
        self._told("gone", timeout)
        self.pid = 0

    # --- what a test does in it -----------------------------------------------------------

    def run(
        self,
        *argv: str,
        check: bool = True,
        user: str | None = None,
        input: str | None = None,
        timeout: float = 30,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the box, outside of any unit, in `/`; as `user` with all its groups.

        Raises BoxError when it is not done in `timeout` seconds (it is killed then), and,
        with `check`, for a status that is not 0.
        """
        data = None if input is None else input.encode()
        done = self._run(argv, check, user, data, timeout, env)
        said = _text(done.stdout), _text(done.stderr)
        return subprocess.CompletedProcess(list(argv), done.returncode, *said)

    def push(self, files: dict[str, bytes | str], mode: int = 0o644, owner: str = "root") -> None:
        """Write files that `owner` and its group own; missing directories become root's."""
        uid, gid = self._ids(owner)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for path, content in files.items():
                data = content.encode() if isinstance(content, str) else content
                entry = tarfile.TarInfo(path.lstrip("/"))
                entry.size, entry.mode, entry.mtime = len(data), mode, int(time.time())
                entry.uid, entry.gid = uid, gid
                archive.addfile(entry, io.BytesIO(data))
        self._unpack(packed.getvalue(), "/")

    def push_tree(self, source: Path, target: str) -> None:
        """Copy a directory of the host, with its modes; everything becomes root's."""

        def given_to_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            return entry

        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(source, ".", filter=given_to_root)
        self.run("mkdir", "-p", target)
        self._unpack(packed.getvalue(), target)

    def pull(self, path: str) -> bytes:
        """A file's content."""
        return self._run(("cat", "--", path)).stdout

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """What systemd tells of a unit: everything, or the properties named."""
        options = [f"--property={name}" for name in properties]
        lines = self.run("systemctl", "show", *options, "--", unit).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """The journal of all boots, oldest entry first; `matches` as journalctl takes them."""
        self.run("journalctl", "--sync")
        text = self.run("journalctl", "-o", "json", "--all", "--quiet", *matches).stdout
        return [json.loads(line) for line in text.splitlines()]

    def start_user(self, user: str) -> dict[str, str]:
        """Start the user's own systemd; the environment that `systemctl --user` needs."""
        uid, _ = self._ids(user)
        self.run("systemctl", "start", f"user@{uid}.service")
        return {"XDG_RUNTIME_DIR": f"/run/user/{uid}"}

    def boot_id(self) -> str:
        return self.pull("/proc/sys/kernel/random/boot_id").decode().strip()

    def console(self) -> str:
        """The end of what the keeper and PID 1 said."""
        return (self.place / "console.log").read_text(errors="replace")[-4000:]

    # --- how ------------------------------------------------------------------------------

    def _run(
        self,
        argv: tuple[str, ...],
        check: bool = True,
        user: str | None = None,
        data: bytes | None = None,
        timeout: float = 30,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        if not self.pid:
            raise BoxError(f"{self.name} is off and cannot run {argv}")
        command = [*ENTER, str(self.pid), "--"]
        if user:
            uid, gid = self._ids(user)
            become = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--init-groups"]
            command += [*become, "--reset-env"]
        whole = {**covered(), **(env or {})}
        command += ["env", *(f"{name}={value}" for name, value in whole.items()), *argv]
        in_time, done = _finish(command, data or b"", timeout)
        said = _text(done.stdout + done.stderr)
        if not in_time:
            raise BoxError(f"{argv}: not done in {timeout} s: {said}")
        if check and done.returncode:
            raise BoxError(f"{argv}: status {done.returncode}: {said}")
        return done

    def _ids(self, user: str) -> tuple[int, int]:
        if user == "root":
            return 0, 0
        fields = self.run("getent", "passwd", user).stdout.split(":")
        return int(fields[2]), int(fields[3])

    def _unpack(self, packed: bytes, target: str) -> None:
        command = ("tar", "--extract", "--numeric-owner", "--preserve-permissions",
                   "--no-overwrite-dir", "--directory", target)  # fmt: skip
        self._run(command, data=packed)

    def _order(self, what: str) -> None:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        try:
            self._keeper.stdin.write(f"{what}\n".encode())
        except BrokenPipeError as error:
            raise BoxError(f"the keeper of {self.name} is dead: {self.console()}") from error

    def _told(self, word: str, timeout: float) -> str:
        """What follows `word` in the next line of the keeper."""
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline().decode() if self._speaks(timeout) else ""
        if not line.startswith(word):
            raise BoxError(f"{self.name}: not {word!r} but {line!r}: {self.console()}")
        return line.removeprefix(word).strip()

    def _speaks(self, timeout: float) -> bool:
        """Whether the keeper says something, or ends, within `timeout` seconds."""
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        return bool(select.select([self._keeper.stdout], [], [], timeout)[0])

    def _leave(self) -> None:
        assert self._keeper is not None
        self._order("keep")
        for stream in (self._keeper.stdin, self._keeper.stdout):
            assert stream is not None
            stream.close()
        _kept.append(self._keeper)  # else Python warns of a child that still runs
        enter = " ".join([*ENTER, str(self.pid)])
        print(f"{self.name} is kept. To enter it: {enter}  To end it: kill -9 {self.pid}")

    def _end(self) -> None:
        keeper, self._keeper, self.pid = self._keeper, None, 0
        assert keeper is not None
        keeper.communicate(timeout=30)  # the end of its stdin is the end of the box
        if keeper.returncode:
            raise BoxError(f"the keeper of {self.name} failed: {self.console()}")


def _finish(
    command: list[str], data: bytes, timeout: float
) -> tuple[bool, subprocess.CompletedProcess[bytes]]:
    """Whether it was done in time, else all of it was killed; and what came of it."""
    pipe = subprocess.PIPE
    clean = {"PATH": PATH, "LANG": "C.UTF-8"}
    in_time = True
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=clean, cwd="/", start_new_session=True
    ) as process:
        try:
            said = process.communicate(data, timeout)
        except BaseException as error:
            # A process group spans PID namespaces; nsenter alone would leave its child behind.
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            in_time, said = False, process.communicate()
    return in_time, subprocess.CompletedProcess(command, process.returncode, *said)


def _text(said: bytes) -> str:
    return said.decode(errors="replace")
