"""Limits of the host: the daemon lives, says why it waits, and goes on by itself.

Descriptors, processes, inotify, inodes, room, a file system that is read-only for a
while, a watched directory that is another one, a clock that is set: each while work is
there, each for a moment, each gone again.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from codexd import clock as times
from codexd.ledger import Ledger, LedgerFull, parse
from codexd.model import Event
from tests.daemon import until
from tests.history import ident
from tests.history import queued as queued_task
from tests.proof import powercut
from tests.proof.level import Figures, pick
from tests.proof.simulated import Shifted
from tests.test_bad_input import POWERLESS, ROOT, Mortal, closed, mounted, needs_mount, refused

pytestmark = [pytest.mark.xdist_group("limits"), pytest.mark.timeout(pick(120, 900, 900))]

FLOOD = 20_000
QUEUE = pick(500, 10_000, 10_000)  # limits.queue; the rest stays in the inbox
SEEN = 6.0  # seconds


class Bounded(Mortal):
    """A daemon that a wrapper starts."""

    wrapper: tuple[str, ...] = ()

    def start(self) -> None:
        command = [*(self.wrapper or POWERLESS), sys.executable, "-m", "codexd.cli",
                   "--root", str(self.root), "serve"]  # fmt: skip
        with open(self.log, "a") as log:
            self.child = subprocess.Popen(
                command, env=self.env, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.child.stdout is not None
        self.ready = self.child.stdout.readline().strip()
        assert self.ready.startswith("ready "), self.log.read_text()[-4000:]

    @property
    def pid(self) -> int:
        assert self.child is not None
        assert self.child.poll() is None, "the daemon has died"
        return self.child.pid

    def limit(self, which: int, soft: int) -> None:
        """What the kernel lets the running daemon have from now on."""
        _, hard = resource.prlimit(self.pid, which)
        resource.prlimit(self.pid, which, (soft, hard))


def works(daemon: Mortal, name: str, seconds: float = 30.0) -> None:
    """One task from its file to its answer, and nothing is wrong any more."""
    daemon.drop(f"{name}.md", "x")
    worked(daemon, name, seconds)


def worked(daemon: Mortal, name: str, seconds: float = 30.0) -> None:
    assert daemon.answer(name, seconds)[1] == "fine\n"
    until(lambda: daemon.health()["status"] == "ok", "health: ok", seconds)


def is_seen(daemon: Bounded, name: str) -> None:
    """A file is a task, by the ledger, as soon as is promised.  In `make test`, where
    everything else runs beside it, without what the daemon waited for a processor."""
    dropped, waited = time.time(), starved(daemon.pid)
    daemon.drop(f"{name}.md", "x")

    def accepted() -> list[Event]:
        events = map(parse, daemon.dirs.ledger.read_bytes().splitlines(keepends=True)[1:])
        return [event for event in events if event.facts.get("file") == f"{name}.md"]

    (event, *_) = until(accepted, f"a task of {name}")
    took = times.epoch(event.at) - dropped
    took -= pick(starved(daemon.pid) - waited, 0.0, 0.0)
    assert took <= SEEN


def starved(pid: int) -> float:
    """Seconds that a process was ready to run, and others ran."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def complains(daemon: Mortal, text: str) -> None:
    """Wait until health says this is wrong."""

    def look() -> bool:
        told = daemon.health()
        gate: Any = told.get("gate") or {}
        said = [str(told.get("trouble")), *(str(closed["message"]) for closed in gate.values())]
        return any(text in one for one in said)

    until(look, f"a complaint: {text}")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_without_descriptors(tmp_path: Path) -> None:
    with Bounded(tmp_path / "root") as daemon:
        works(daemon, "before")
        daemon.limit(resource.RLIMIT_NOFILE, open_files(daemon.pid) + 1)
        daemon.drop("a.md", "x")
        complains(daemon, "Too many open files")
        time_of_trouble(daemon)
        daemon.limit(resource.RLIMIT_NOFILE, 1024)
        assert daemon.answer("a", 60)[1] == "fine\n"
        works(daemon, "after")


def time_of_trouble(daemon: Bounded, seconds: float = 2.0) -> None:
    """It has to go on for some rounds, and cost next to nothing."""
    before = ticks(daemon.pid)
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() > end, "the end of this test's patience")
    used = (ticks(daemon.pid) - before) / os.sysconf("SC_CLK_TCK")
    assert used < 0.6 * seconds, f"{used} s of processor in {seconds} s"


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.skipif(not ROOT, reason="needs root, to be another user with few processes")
def test_without_processes() -> None:
    """As a user of its own: root may always have one more."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # tmp_path is for the tests' user alone
    place.chmod(0o755)
    daemon = Bounded(place / "root")
    for path in (daemon.root, *daemon.root.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    # It may read the programs of root, wherever they are, but have no more processes.
    power = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    daemon.wrapper = (
        "prlimit", "--nproc=60",
        "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *power,
    )  # fmt: skip
    daemon.env = {**daemon.env, "PYTHONDONTWRITEBYTECODE": "1"}
    with daemon:
        works(daemon, "before", 60)
        all_others = subprocess.Popen(
            [*daemon.wrapper, sys.executable, "-I", "-c", FORKS],
            stdout=subprocess.PIPE, process_group=0,
        )  # fmt: skip
        assert all_others.stdout is not None
        assert all_others.stdout.readline() == b"no more\n"
        try:
            daemon.drop("a.md", "x")
            complains(daemon, "Resource temporarily unavailable")
            time_of_trouble(daemon)
        finally:
            os.killpg(all_others.pid, signal.SIGKILL)
            all_others.wait()
            all_others.stdout.close()
            reap(all_others.pid)
        assert daemon.answer("a", 90)[1] == "fine\n"
        works(daemon, "after", 60)
    shutil.rmtree(place)


def reap(group: int) -> None:
    """Ended processes count for their user until somebody waits for them: us, where a test
    before has made this process the one that orphans go to."""
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-group, 0)


NOBODY = 64_123  # a user that nobody is
FORKS = """
import os, time
try:
    while os.fork():
        pass
except OSError:
    print("no more", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not ROOT, reason="needs root, to be in a user namespace of its own")
def test_without_inotify(tmp_path: Path) -> None:
    """Polling is enough; when there is an instance again, it is used."""
    daemon = Bounded(tmp_path / "root")
    # The limit is each namespace's own: nobody else is to be without.
    none = f'echo 0 >{INSTANCES}; exec "$@"'
    daemon.wrapper = ("unshare", "--user", "--map-root-user", "sh", "-c", none, "sh")
    with daemon:
        told = daemon.health()
        assert told["watch"] == "polling", told
        assert "inotify" in str(told["watch_problem"]), told
        assert told["status"] == "ok", "polling alone is no failure"
        is_seen(daemon, "a")
        assert daemon.answer("a")[1] == "fine\n"
        inside = ["nsenter", "--user", "--preserve-credentials", f"--target={daemon.pid}"]
        subprocess.run([*inside, "sh", "-c", f"echo 64 >{INSTANCES}"], check=True)
        until(lambda: daemon.health()["watch"] == "inotify", "inotify again")
        works(daemon, "after")


INSTANCES = "/proc/sys/user/max_inotify_instances"


def test_another_inbox_in_its_place(tmp_path: Path) -> None:
    with Bounded(tmp_path / "root") as daemon:
        for number in range(3):
            daemon.dirs.inbox.rename(tmp_path / f"old-{number}")
            shutil.copytree(tmp_path / f"old-{number}", daemon.dirs.inbox)
            is_seen(daemon, f"t{number}")
            worked(daemon, f"t{number}")
        (daemon.dirs.inbox).rmdir()
        complains(daemon, "inbox")
        daemon.dirs.inbox.mkdir()
        works(daemon, "after")


@needs_mount
def test_without_inodes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    options = ("-t", "tmpfs", "-o", "size=64M,nr_inodes=400")
    with mounted(root, *options, "tmpfs"), Bounded(root) as daemon:
        works(daemon, "before")
        (root / "ballast").mkdir()
        with suppress(OSError):
            for number in range(1000):
                (root / "ballast" / str(number)).touch()
        (root / "ballast" / "0").rename(daemon.dirs.inbox / "a.md")
        (daemon.dirs.inbox / "a.md").write_text("x")
        complains(daemon, "No space left")
        shutil.rmtree(root / "ballast")
        assert daemon.answer("a", 60)[1] == "fine\n"
        works(daemon, "after")
        assert daemon.health()["damaged"] == 0


@needs_mount
@pytest.mark.parametrize("which", ["answers", "inbox"])
def test_read_only_for_a_while(tmp_path: Path, which: str) -> None:
    """A directory on a file system that the kernel has made read-only after an error."""
    with Bounded(tmp_path / "root") as daemon:
        works(daemon, "before")
        place = daemon.root / which
        with mounted(place, "-t", "tmpfs", "-o", "size=4M", "tmpfs"):
            works(daemon, "mounted")
            (daemon.dirs.inbox / "all.hold").touch()
            closed(daemon, "hold")
            daemon.drop("a.md", "x")
            remount(place, "ro")
            if which == "answers":
                assert daemon.run("release").returncode == 0
            complains(daemon, "Read-only file system")
            time_of_trouble(daemon)
            remount(place, "rw")
            if which == "inbox":
                assert daemon.run("release").returncode == 0
            assert daemon.answer("a", 60)[1] == "fine\n"
            works(daemon, "after", 60)


@pytest.mark.skipif(powercut.missing() is not None, reason=str(powercut.missing()))
def test_all_is_read_only_until_it_is_mounted_anew(tmp_path: Path) -> None:
    """As after an error of the disk: the kernel lets nobody make it writable again while it is
    in use, so the daemon has to be stopped; it does not begin before it can write."""
    powercut.unseen(lambda: _fails_and_is_mounted_anew(tmp_path))


def _fails_and_is_mounted_anew(tmp_path: Path) -> None:
    disk = powercut.Disk(tmp_path, "ext4")
    disk.mount()
    try:
        daemon = Bounded(disk.top / "root")
        daemon.log = tmp_path / "serve.log"
        with daemon:
            works(daemon, "before")
            daemon.behave(delay=2)
            os.sync()  # what this test wrote
            daemon.drop("turn.md", "x")
            until(lambda: daemon.health()["running"] == 1, "a turn")
            daemon.drop("waits.md", "---\nnot_before: 1d\n---\nx")
            until(lambda: daemon.health()["waiting"] == 1, "one that waits")
            disk.fail()
            until(lambda: "Read-only file system; mount it" in daemon.log.read_text(), "a word")
            time_of_trouble(daemon)
            daemon.kill()
            assert refused(daemon.root)[1].endswith('Read-only file system; mount it writable"')
            disk.unmount()
            disk.mount()
            daemon.start()
            assert daemon.answer("turn", 60)[1] == "fine\n"
            works(daemon, "after", 60)
            assert daemon.health()["waiting"] == 1
            assert daemon.health()["damaged"] == 0
    finally:
        disk.discard()


@pytest.mark.skipif(powercut.missing() is not None, reason=str(powercut.missing()))
def test_a_ledger_that_is_read_only_has_no_room(tmp_path: Path) -> None:
    """Where nothing was written, nothing has to be cut: that does not end the daemon."""
    disk = powercut.Disk(tmp_path, "ext4")
    disk.mount()
    try:
        one = Ledger(disk.top / "tasks.md", disk.top / "checkpoint.json")
        one.append([queued_task(1)])
        disk.fail()
        with pytest.raises(LedgerFull, match="Read-only file system"):
            one.append([queued_task(2)])
        assert list(one.book.tasks) == [ident(1)]
        one.close()
    finally:
        disk.discard()


MOUNTS = {
    "tasks": ("archive", "tasks"),
    "archive": ("archive", "tasks"),
    "rejected": ("rejected", "inbox"),
    "inbox": ("rejected", "inbox"),
}


@needs_mount
@pytest.mark.parametrize("which", MOUNTS)
def test_what_is_moved_from_one_directory_to_another_lies_on_one_file_system(
    tmp_path: Path, which: str
) -> None:
    with Bounded(tmp_path / "root") as daemon:
        daemon.stop()
    one, other = (daemon.root / name for name in MOUNTS[which])
    with mounted(daemon.root / which, "-t", "tmpfs", "tmpfs"):
        text = (
            f'cannot.go.on why="{one}: it must be on the file system of {other}, and is on '
            'another; unmount one, or mount one below both"'
        )
        assert refused(daemon.root) == (69, text)


def remount(place: Path, how: str) -> None:
    def done() -> bool:
        return not subprocess.run(["mount", "-o", f"remount,{how}", str(place)]).returncode

    until(done, f"a remount, {how}")


def test_a_flood_while_nobody_watches(tmp_path: Path, figure: Figures) -> None:
    """The daemon stands still: inotify's queue overflows, and nobody hears of that."""
    daemon = Bounded(tmp_path / "root")
    config = daemon.root / "codexd.yaml"
    config.write_text(config.read_text().replace("limits:\n", f"limits:\n  queue: {QUEUE}\n"))
    with daemon:
        (daemon.dirs.inbox / "all.hold").touch()
        closed(daemon, "hold")
        os.kill(daemon.pid, signal.SIGSTOP)
        for number in range(FLOOD):
            (daemon.dirs.inbox / f"f{number:05}.md").write_text("x")
        dropped = time.monotonic()
        known = Known(daemon)
        os.kill(daemon.pid, signal.SIGCONT)
        seen = waited(known, dropped)
        whole = waited(lambda: queued(daemon) >= QUEUE, dropped, 800)
        rest = sum(name[0] != "." for name in os.listdir(daemon.dirs.inbox))
        assert queued(daemon) + rest == FLOOD
    figure("flood: files dropped while it stood still", FLOOD)
    figure("flood: all of them seen after, s", round(seen, 2))
    figure(f"flood: {QUEUE} accepted after, s", round(whole, 1))
    figure("flood: accepts/s", round(QUEUE / whole))
    assert seen <= SEEN


class Known:
    """Whether the daemon has seen the whole flood, by two signs of life.

    `seen` is from the begin of a round, `queued` from its end: what was taken in between is
    not to be counted twice.
    """

    def __init__(self, daemon: Mortal) -> None:
        self.daemon = daemon
        self.before = daemon.health()

    def __call__(self) -> bool:
        told = self.daemon.health()
        if told["at"] == self.before["at"]:
            return False
        count = int(told["seen"]) + int(self.before["queued"])
        self.before = told
        return count >= FLOOD


def queued(daemon: Mortal) -> int:
    return int(str(daemon.health()["queued"]))


def waited(look: Callable[[], bool], since: float, seconds: float = 60.0) -> float:
    until(look, "what was waited for", seconds)
    return time.monotonic() - since


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_is_set(tmp_path: Path, days: int) -> None:
    """Only the wall clock: what waits for a span goes on, and no turn is ended by it."""
    clock = Shifted(tmp_path)
    daemon = Bounded(tmp_path / "root")
    daemon.env |= clock.environment
    daemon.behave(delay=3)
    with daemon:
        daemon.drop("turn.md", "x")
        daemon.drop("later.md", "---\nnot_before: 4s\n---\nx")
        until(lambda: daemon.health()["running"] == 1, "a turn")
        clock.set(wall=days * 86400)
        for name in ("turn", "later"):
            front, text = daemon.answer(name)
            assert (text, front["attempts"]) == ("fine\n", 1)
            began, ended = (times.epoch(str(front[key])) for key in ("started", "ended"))
            assert abs(ended - began - (days * 86400 if name == "turn" else 0)) < 30
        works(daemon, "after")
        assert daemon.health()["damaged"] == 0


def patient(place: Path) -> tuple[Bounded, Shifted]:
    """A daemon that waits for an hour before it tries again, and its clocks."""
    clock, daemon = Shifted(place), Bounded(place / "root")
    daemon.env |= clock.environment
    with open(daemon.root / "codexd.yaml", "a") as config:
        config.write("retry:\n  base: 1h\n  cap: 1h\n")
    return daemon, clock


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_host_that_slept(tmp_path: Path) -> None:
    """Retries, delays and probes are due by the time that has passed for people."""
    daemon, clock = patient(tmp_path)
    with daemon:
        daemon.behave(mode="replay:overloaded")
        daemon.drop("retried.md", "x")
        daemon.drop("delayed.md", "---\nnot_before: 1h\n---\nx")
        until(lambda: daemon.health()["waiting"] == 2, "both wait")
        daemon.behave(mode="replay:e429quota")
        daemon.drop("spent.md", "x")
        closed(daemon, "quota")
        daemon.behave()
        clock.set(slept=7200)
        for name in ("retried", "delayed", "spent"):
            assert daemon.answer(name)[1] == "fine\n"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("set_by", pick([0, -86400], [0, -86400, 86400], [0, -86400, 86400]))
def test_a_wait_across_a_restart(tmp_path: Path, set_by: int) -> None:
    """It ends at the time that was told; when the clock was set meanwhile, after retry.cap at
    the latest."""
    daemon, clock = patient(tmp_path)
    with daemon:
        daemon.behave(mode="replay:overloaded")
        daemon.drop("retried.md", "x")
        until(lambda: daemon.health()["waiting"] == 1, "a task that waits")
        (task,) = daemon.tasks()
        rest = int(times.epoch(task["until"]) - time.time())
        assert daemon.stop() == 0
        daemon.behave()
        clock.set(wall=set_by)
        daemon.start()
        if set_by <= 0:
            a_round(daemon, "first")
            whole = rest if set_by == 0 else 3600
            clock.set(wall=set_by, slept=whole - 120)
            a_round(daemon, "second")
            assert {t["file"]: t["state"] for t in daemon.tasks()}["retried.md"] == "waiting"
            clock.set(wall=set_by, slept=whole + 1)
        assert daemon.answer("retried")[1] == "fine\n"


def a_round(daemon: Mortal, name: str) -> None:
    """One in which whatever was due has been seen to."""
    daemon.drop(f"{name}.md", "x")
    assert daemon.answer(name)[1] == "fine\n"
