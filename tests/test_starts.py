"""Starts on one CODEX_HOME: one Codex after another, until each has named its thread."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from codex_cli_bin import bundled_codex_path

from codexd import lock, start
from codexd.turn import STARTING
from tests.daemon import until
from tests.processes import kill, naming
from tests.scripted_cases import CaseModel
from tests.test_failures import prepared
from tests.test_worker import ID, STOPPED, Place

FREE = 2.0  # seconds; what waits for STARTING takes longer


class Starts:
    """Workers of several tasks, which have one CODEX_HOME."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.home.mkdir(mode=0o700)
        self.workers: list[subprocess.Popen[str]] = []

    def start(self, mode: str) -> Place:
        place = Place(self.root / str(len(self.workers)), home=str(self.home))
        self.workers.append(place.start(mode, stdin=subprocess.DEVNULL))
        return place

    def end(self) -> None:
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        assert all(worker.wait(20) in (0, STOPPED, -signal.SIGTERM) for worker in self.workers)


@pytest.fixture
def starts(tmp_path: Path) -> Iterator[Starts]:
    one = Starts(tmp_path)
    yield one
    one.end()


def codex(place: Place) -> Path:
    """What is there once its Codex was started."""
    return place.attempt / "events.jsonl"


def is_free(home: Path) -> bool:
    """Asked from elsewhere: the lock would go with our own descriptor."""
    code = "import sys; from codexd import lock; lock.hold_start(sys.argv[1], 0)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, home], cwd=root, capture_output=True)
    return done.returncode == 0


def test_a_codex_that_says_nothing_holds_up_the_next_for_a_while(starts: Starts) -> None:
    first = starts.start("hang-silent")
    until(codex(first).exists, "the first")
    began = time.monotonic()
    second = starts.start("hang-turn")
    until(codex(second).exists, "the second", STARTING + 10)
    waited = time.monotonic() - began
    assert waited > STARTING - FREE
    third = starts.start("answer")  # the second has named its thread
    began = time.monotonic()
    until(lambda: (third.attempt / "result.json").exists(), "the third's result")
    assert time.monotonic() - began < STARTING - 1


@pytest.mark.parametrize("mode", ["hang-turn", "answer", "crash", "silent-exit"])
def test_the_next_starts_when_a_thread_has_a_name_or_codex_has_ended(
    starts: Starts, mode: str
) -> None:
    first = starts.start(mode)
    until(codex(first).exists, "the first")
    began = time.monotonic()
    until(lambda: is_free(starts.home), "the lock")
    assert time.monotonic() - began < STARTING - FREE


def test_whoever_is_killed_holds_up_nobody(starts: Starts) -> None:
    first = starts.start("hang-silent")
    until(codex(first).exists, "the first")
    assert not is_free(starts.home)
    worker = starts.workers.pop()
    worker.kill()
    worker.wait()
    until(lambda: is_free(starts.home), "the lock", 2)
    kill(naming(f"{starts.root}/0/"))  # its Codex, which has no setpriv here


def test_twelve_at_once_on_a_new_home_of_the_real_cli(tmp_path: Path) -> None:
    """All make the same databases; none is refused, and no two open them at once."""
    config = "workers: 12\nhttp:\n  listen: off\n"
    with CaseModel() as model, prepared(tmp_path / "root", model, config) as daemon:
        for number in range(12):
            daemon.drop(f"t{number}.md", f"[[say {number}]]")
        for number in range(12):
            front, text = daemon.answer(f"t{number}", 60)
            assert (text, front["attempts"]) == (f"{number}\n", 1)
        assert not re.search(r"transient|interruptions", daemon.dirs.ledger.read_text())


def test_a_start_that_raced_is_tried_again_and_not_counted(tmp_path: Path) -> None:
    """A stand-in says what Codex said when it lost the race, once."""
    with CaseModel() as model, prepared(tmp_path / "root", model, CONFIG) as daemon:
        fake = daemon.root / "locked"
        fake.write_text(LOCKED.format(root=daemon.root, real=bundled_codex_path()))
        fake.chmod(0o755)
        (daemon.root / "codexd.yaml").write_text(CONFIG + f"codex:\n  bin: {fake}\n")
        daemon.stop()
        daemon.start()
        daemon.drop("raced.md", "---\nattempts: 1\n---\n[[say after the race]]")
        front, text = daemon.answer("raced", 60)
        assert (text, front["attempts"]) == ("after the race\n", 1)
        waited = [line for line in daemon.events() if "**waiting**" in line]
        assert len(waited) == 2
        assert all('reason="transient"' in line for line in waited)


CONFIG = "retry:\n  base: 1s\n  cap: 1s\nhttp:\n  listen: off\n"
LOCKED = """#!/bin/sh
if [ "$1" = exec ] && [ "$(cat {root}/races 2>/dev/null | wc -l)" -lt 2 ]; then
    echo >>{root}/races
    echo 'Error: failed to open state DB: error returned from database: (code: 5)' \\
        'database is locked' >&2
    exit 1
fi
exec {real} "$@"
"""


def test_a_held_up_start_goes_on_without_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "START_WAIT", 0.2)  # a number, not what it is about
    place = Place(tmp_path)
    one = start.Attempt(str(place.tasks), ID)
    one.cwd, one.chosen = str(tmp_path), "workspace-write"
    env = {**one.environment(), "CODEX_FAKE_MODE": "answer"}
    with held(tmp_path / "home"):
        pid, out, err = one.spawn(one.argv(None, []), env, one.opened("prompt.md", "x"))
        assert one.starting is None
        assert os.waitpid(pid, 0)[1] == 0
    assert json.loads(os.read(out, 1 << 16).splitlines()[0])["type"] == "thread.started"
    for fd in (out, err):
        os.close(fd)


@contextmanager
def held(home: Path) -> Iterator[None]:
    """Another process has the lock."""
    code = "import sys; from codexd import lock; lock.hold_start(sys.argv[1], 9); print(flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}; input()", str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        yield
    finally:
        holder.communicate(b"\n")


def test_a_further_turn_that_waits_for_the_lock_can_be_stopped(tmp_path: Path) -> None:
    go = tmp_path / "go"
    check = {"command": f"until test -e {go}; do sleep 0.02; done; exit 1", "rounds": 2}
    place = Place(tmp_path, verify=check)
    worker = place.start("answer", stdin=subprocess.DEVNULL)
    until((place.attempt / "verify-1.txt").exists, "the check")
    with held(tmp_path / "home"):
        go.touch()
        until((place.attempt / "prompt-2.md").exists, "the next turn")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(15) == STOPPED
    found = place.result()
    assert (found["outcome"], found["stop_reason"]) == ("interrupted", "interrupted")
    assert (found["rounds"], found["verified"]) == ([], 1)


def test_nothing_is_left_of_the_lock(tmp_path: Path) -> None:
    os.close(lock.hold_start(str(tmp_path), 0))
    os.close(lock.hold_start(str(tmp_path), 0))
    assert os.listdir(tmp_path / ".codexd") == ["starts.lock"]
