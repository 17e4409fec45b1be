"""Workers as child processes: seen while anything of them lives, and ended with all of it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from codexd import config, exits, lock, spool
from codexd.config import Directories
from codexd.launcher import NoLauncher, choose
from codexd.master import STOP, Master
from codexd.outcome import Outcome
from codexd.processes import Processes
from codexd.service import Service

ROOT = Path(__file__).resolve().parent.parent
ID, OTHER = "20261123t072011-k3f9qa7x2m", "20261123t072011-k3f9qa7x2n"

# What stand-ins for a worker are made of.  Each says "ready" in a file of its own.
READY = """
import os, signal, sys, time
place, id = sys.argv[1:]
def say(name, text=""):
    aside = os.path.join(place, f".{id}.{name}")
    with open(aside, "w") as file: file.write(text)
    os.rename(aside, os.path.join(place, f"{id}.{name}"))
def leave_somebody_behind():
    if not os.fork():
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say("behind", str(os.getpid()))
        while True: time.sleep(60)
    while not os.path.exists(os.path.join(place, f"{id}.behind")): time.sleep(0.005)
def until_the_daemon_is_gone():
    say("ready", str(os.getpid()))
    while os.read(0, 1): pass
def for_ever():
    say("ready", str(os.getpid()))
    while True: time.sleep(60)
DEAF = signal.SIGTERM, signal.SIG_IGN
"""
ENDS = "say('ready')"
ENDS_LEAVING = "leave_somebody_behind(); say('ready')"
WORKS = "until_the_daemon_is_gone()"
WORKS_LEAVING = "leave_somebody_behind(); until_the_daemon_is_gone()"
DEAF = "signal.signal(*DEAF); leave_somebody_behind(); for_ever()"
WITHOUT_LOCK = "signal.signal(*DEAF); os.closerange(3, 99); for_ever()"


class Scripted(Processes):
    """The launcher, with a stand-in for the worker's program."""

    grace = 0.4

    def __init__(self, place: Path, script: str = WORKS) -> None:
        super().__init__(place / "tasks", place)
        self.place = place
        self.script = script

    def command(self, id: str) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", READY + self.script, str(self.place), id]

    def begin(self, id: str, script: str | None = None) -> int:
        """Start a worker and wait until it is at work; its pid, where it stays."""
        self.script = script or self.script
        self.start([id], {})
        until(lambda: self.ready(id).exists(), "the worker is ready")
        return int(self.ready(id).read_text() or 0)

    def ready(self, id: str) -> Path:
        return self.place / f"{id}.ready"

    def behind(self, id: str) -> int:
        return int((self.place / f"{id}.behind").read_text())


def until(look: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < end, f"still not: {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Scripted]:
    one = Scripted(tmp_path)
    yield one
    one.kill({ID, OTHER})
    until(lambda: not one.active(), "all are gone")
    os.close(one._alive)
    os.close(one._ours)


def locks(launcher: Processes) -> list[str]:
    return sorted(os.listdir(launcher._locks))


# --- the worker itself ------------------------------------------------------------


def test_the_real_worker_is_what_it_starts(tmp_path: Path) -> None:
    """A task whose result is there already: its worker has nothing to do, and says so."""
    attempt = tmp_path / "tasks" / ID / "1"
    attempt.mkdir(parents=True)
    (attempt.parent / "task.json").write_text(json.dumps({"id": ID, "request": {"prompt": "p"}}))
    for name in ("attempt.json", "result.json"):
        (attempt / name).write_text("{}")
    launcher = Processes(tmp_path / "tasks", tmp_path)
    launcher.start([ID], {})
    child = launcher._children[ID]
    assert child.wait(10) == 0
    until(lambda: not launcher.active(), "it is gone")
    assert sorted(os.listdir(attempt)) == ["attempt.json", "result.json"]
    assert locks(launcher) == []


def test_what_a_worker_is_given(launcher: Scripted) -> None:
    script = (
        "fds = {fd: os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')"
        " if os.path.exists(f'/proc/self/fd/{fd}')}\n"
        "say('told', repr((fds, os.getcwd(), os.getsid(0) == os.getpid())))\n" + WORKS
    )
    launcher.begin(ID, script)
    fds, directory, leads = eval((launcher.place / f"{ID}.told").read_text())
    assert fds.pop("0").startswith("pipe:")
    assert fds.pop("1") == os.devnull
    del fds["2"]
    assert list(fds.values()) == [str(launcher.place / "workers" / f"{ID}.lock")]
    assert (directory, leads) == ("/", True)


# --- what lives -------------------------------------------------------------------


def test_active_from_start_to_end(launcher: Scripted) -> None:
    assert (launcher.active(), launcher.working()) == (set(), set())
    launcher.begin(ID, ENDS)
    until(lambda: not launcher.active(), "it is gone")
    assert locks(launcher) == []
    launcher.begin(ID, WORKS)
    launcher.begin(OTHER, WORKS)
    assert launcher.active() == launcher.working() == {ID, OTHER}
    launcher.stop({ID})
    until(lambda: launcher.active() == {OTHER}, "one is gone")


def test_one_worker_of_a_task(launcher: Scripted) -> None:
    pid = launcher.begin(ID)
    launcher.start([ID], {})
    assert "Resource temporarily unavailable" in str(launcher.refusal(ID))
    assert launcher.refusal(ID) is None, "it is told once"
    assert alive(pid)
    assert launcher.active() == {ID}


def test_a_program_that_cannot_be_started(launcher: Scripted) -> None:
    launcher.command = lambda id: [f"/nonexistent/{id}"]  # type: ignore[method-assign]
    launcher.start([ID], {})
    assert "No such file" in str(launcher.refusal(ID))
    assert launcher.active() == set()
    assert not lock.is_held(launcher._path(ID))
    del launcher.command
    launcher.begin(ID)


def test_what_a_worker_leaves_behind_ends_with_it(launcher: Scripted) -> None:
    """A grandchild with a session of its own, deaf to SIGTERM."""
    launcher.begin(ID, ENDS_LEAVING)
    behind = launcher.behind(ID)
    until(lambda: not launcher.working(), "the worker is gone")
    assert alive(behind)
    assert launcher.active() == {ID}, "attempt 2 has to wait"
    now = time.monotonic()
    assert 0 < launcher.pause(now) < launcher.pause(now + 100) == 1.0, "ever more rarely"
    until(lambda: not launcher.active(), "it is gone")
    assert not alive(behind)
    assert locks(launcher) == []
    assert launcher.pause(time.monotonic()) == math.inf


def test_the_next_attempt_is_not_taken_for_what_the_last_left_behind(launcher: Scripted) -> None:
    launcher.begin(ID, ENDS)
    until(lambda: not launcher.working(), "the worker is gone")
    launcher.ready(ID).unlink()
    launcher.begin(ID, WORKS)
    assert launcher.active() == {ID}
    with pytest.raises(subprocess.TimeoutExpired):
        launcher._children[ID].wait(0.2)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_what_another_user_runs_is_left(launcher: Scripted) -> None:
    """As of a command with sudo: it can be killed by nobody but root."""
    argv = ["setpriv", "--reuid=65534", "sleep", "300"]
    with subprocess.Popen(argv, start_new_session=True) as left:
        until(lambda: Path(f"/proc/{left.pid}").stat().st_uid == 65534, "it is another's")
        os.seteuid(65533)
        try:
            assert launcher._end_adopted()
        finally:
            os.seteuid(0)
        assert alive(left.pid)
        left.kill()


def test_many_starts_leave_nothing(launcher: Scripted) -> None:
    launcher.script = ENDS
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for n in range(4):
            launcher.start([f"20261123t072011-{n:010}"], {})
        until(lambda: not launcher.active(), "all are gone")
    assert len(os.listdir("/proc/self/fd")) == before
    assert locks(launcher) == []


# --- ending -----------------------------------------------------------------------


def test_a_worker_that_had_no_room_for_its_result_says_so(launcher: Scripted) -> None:
    """As long as its task is running: what follows may not be written at once, either."""
    launcher.begin(ID, f"say('ready'); sys.exit({exits.UNTOLD})")
    launcher.begin(OTHER, "say('ready'); sys.exit(1)")
    until(lambda: not launcher.active(), "they are gone")
    for _ in range(2):
        launcher.tidy({ID, OTHER})
        ended = launcher.ended(ID)
        assert ended
        assert exits.outcome(ended, exits.boot())[0] is Outcome.HOST
    assert launcher.ended(OTHER) is None
    launcher.tidy({OTHER})
    assert launcher.ended(ID) is None


def test_it_says_nothing_of_the_next_attempt(launcher: Scripted) -> None:
    launcher.begin(ID, f"say('ready'); sys.exit({exits.UNTOLD})")
    until(lambda: not launcher.active(), "it is gone")
    launcher.ready(ID).unlink()
    launcher.begin(ID, WORKS)
    assert launcher.ended(ID) is None


def test_stop_asks(launcher: Scripted) -> None:
    deaf = launcher.begin(ID, DEAF)
    launcher.begin(OTHER, WORKS)
    launcher.stop({ID, OTHER, "20261123t072011-0000000000"})
    until(lambda: launcher.active() == {ID}, "the one that listens is gone")
    assert alive(deaf)


@pytest.mark.parametrize("script", [DEAF, WITHOUT_LOCK, WORKS_LEAVING, WORKS])
def test_kill_ends_it_with_everything_it_started(launcher: Scripted, script: str) -> None:
    pid = launcher.begin(ID, script)
    began = time.monotonic()
    launcher.kill({ID, OTHER})
    until(lambda: not launcher.active(), "all is gone")
    assert time.monotonic() - began < 5
    assert not alive(pid)
    if script in (DEAF, WORKS_LEAVING):
        assert not alive(launcher.behind(ID))


# --- the daemon's own end ---------------------------------------------------------

DAEMON = """
import sys, time
from pathlib import Path
from tests.test_processes import Scripted
one = Scripted(Path(sys.argv[1]))
print(one.begin(sys.argv[2], sys.argv[3]), flush=True)
time.sleep(60)
"""


def dead_daemon(place: Path, script: str) -> int:
    """The pid of a worker whose daemon was killed."""
    command = [sys.executable, "-c", DAEMON, str(place), ID, script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout
        pid = int(daemon.stdout.readline())
        daemon.send_signal(signal.SIGKILL)
    return pid


def test_a_worker_ends_with_its_daemon(tmp_path: Path) -> None:
    pid = dead_daemon(tmp_path, WORKS)
    until(lambda: not alive(pid), "it noticed")


def test_a_new_daemon_waits_for_what_the_last_left_and_then_ends_it(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pid = dead_daemon(tmp_path, DEAF)
    launcher: Scripted = request.getfixturevalue("launcher")
    began = time.monotonic()
    assert launcher.working() == launcher.active() == {ID}
    assert launcher.pause(time.monotonic()) == pytest.approx(0.1)
    launcher.start([ID], {})
    assert "Resource temporarily unavailable" in str(launcher.refusal(ID))
    assert launcher.refusal(ID) is None, "it is told once"
    assert alive(pid)
    until(lambda: not launcher.active(), "it was ended")
    assert time.monotonic() - began >= launcher.grace
    assert not alive(pid)
    assert not alive(launcher.behind(ID))
    assert locks(launcher) == []


def test_a_new_daemon_can_stop_what_the_last_left(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pid = dead_daemon(tmp_path, "for_ever()")
    launcher: Scripted = request.getfixturevalue("launcher")
    launcher.stop({ID})
    until(lambda: not alive(pid), "it was asked")
    until(lambda: not launcher.active(), "it is gone")


def test_a_systemd_that_has_no_such_unit_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Demanded, it is refused; else a daemon that is a service says why its workers are not."""
    tool = tmp_path / "systemctl"
    tool.write_text("#!/bin/sh\necho not-found\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    why = "the unit codexd-worker@.service is not installed; `codexd install` does it"
    dirs = Directories.below(tmp_path)
    spool.prepare(dirs)
    settings = config.load(dirs, explicit=False)
    demanded = replace(settings, launcher=config.Launcher.SYSTEMD)
    with pytest.raises(NoLauncher, match=f"^launcher: systemd does not work here: {why}$"):
        choose(demanded, Service("test"), embedded=True)
    either = replace(settings, launcher=config.Launcher.AUTO)
    for embedded, told in ((False, why), (True, None)):
        found = choose(either, Service("test"), embedded)
        assert (found.kind, found.why) == ("process", told)


def test_the_master_ends_in_time_whatever_its_workers_do(
    launcher: Scripted, tmp_path: Path
) -> None:
    settings = config.load(Directories.below(tmp_path), explicit=False)
    spool.prepare(settings.dirs)
    master = Master(settings, Service("test"), lambda: settings, embedded=True)
    master.launcher = launcher
    worker = launcher.begin(ID, DEAF)
    now = time.monotonic()
    assert master._stop(now) > 0
    assert master._stop(now + STOP - 1) > 0
    assert alive(worker)

    def leave() -> None:
        while True:
            time.sleep(master._stop(now + STOP))

    with pytest.raises(StopIteration):
        leave()
    assert not alive(worker)
    assert not alive(launcher.behind(ID))
    master.ledger.close()


def test_locks_that_nobody_holds_are_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    for name in (f"{ID}.lock", "notes.lock", "README"):
        (tmp_path / "workers" / name).touch()
    (tmp_path / "workers" / "dir.lock").mkdir()
    launcher = Scripted(tmp_path)
    assert launcher.active() == set()
    assert locks(launcher) == ["README", "dir.lock", "notes.lock"]
