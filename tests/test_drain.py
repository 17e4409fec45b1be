"""`codexd drain`: what runs goes on, nothing begins, and one can wait for the last."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from codexd.program import Exit
from tests.daemon import until
from tests.test_cli import Root


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    with Root(tmp_path / "root") as one:
        yield one


def running(root: Root) -> str:
    """A task in a turn that outlasts some commands, however slow."""
    root.behave(delay=20)
    id = root.submit("a")
    root.reaches(id, "running")
    events = root.dirs.tasks / id / "1" / "events.jsonl"
    until(lambda: events.exists() and "turn.started" in events.read_text(), "its turn")
    root.behave()
    return id


def waiting(root: Root, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        root.command("drain", "--wait", *more), env=root.env, stderr=subprocess.PIPE, text=True
    )


def test_what_runs_goes_on_and_nothing_begins(root: Root) -> None:
    first = running(root)
    assert root.run("drain").returncode == Exit.DONE
    until(lambda: "drain" in root.health()["gate"], "the drain")
    second = root.submit("b")
    wait = waiting(root)
    late = root.run("drain", "--wait", "--timeout", "1")
    assert late.returncode == Exit.UNFINISHED, late.stderr
    assert root.task(first)["state"] == "running"
    assert wait.wait(30) == Exit.DONE
    assert wait.communicate()[1] == ""
    assert root.task(first)["state"] == "done"
    assert root.task(second)["state"] == "queued"
    status = root.run("status")
    assert status.returncode == Exit.UNAVAILABLE
    assert "drain: drained by hand" in status.stdout
    assert root.health()["status"] == "drain"
    assert root.run("release").returncode == Exit.DONE
    root.reaches(second, "done")


def test_it_survives_the_daemon_and_ends_with_a_hold(root: Root) -> None:
    root.run("drain")
    root.run("hold")
    until(lambda: root.health()["gate"].keys() == {"drain", "hold"}, "both")
    root.kill()
    root.start()
    assert root.health()["gate"].keys() == {"drain", "hold"}
    assert root.run("drain", "--wait").returncode == Exit.DONE, "nothing runs"
    lines = [line for line in root.events() if "**closed**" in line]
    assert len(lines) == 2, "to say it again says nothing"
    root.run("release")
    until(lambda: not root.health()["gate"], "the release")
    root.reaches(root.submit("b"), "done")


def test_one_that_is_to_be_tried_again_stays_queued(root: Root) -> None:
    """The retry waits for its time, and then for the release."""
    root.behave(mode="no-terminal,answer", delay=0)
    root.run("hold")
    until(lambda: "hold" in root.health()["gate"], "the hold")
    id = root.submit("a")
    root.behave(mode="hang-failed")
    root.run("release")
    root.reaches(id, "running")
    assert root.run("drain").returncode == Exit.DONE
    until(lambda: "drain" in root.health()["gate"], "the drain")
    assert root.run("drain", "--wait").returncode == Exit.DONE
    assert root.reaches(id, "queued")["attempts"] == 1
    root.behave()
    root.run("release")
    assert root.reaches(id, "done")["attempts"] == 2


def test_without_a_daemon_it_waits_in_the_inbox(root: Root) -> None:
    root.kill()
    assert root.run("drain").returncode == Exit.DONE
    done = root.run("drain", "--wait", "--timeout", "1")
    assert done.returncode == Exit.UNFINISHED
    began = time.monotonic()
    done = root.run("drain", "--wait")
    assert (done.returncode, time.monotonic() - began > 14) == (Exit.UNAVAILABLE, True)
    assert "codexd is not serving: all.drain waits in the inbox" in done.stderr
    wait = waiting(root)
    root.start()
    assert wait.wait(30) == Exit.DONE
    wait.communicate()
    id = root.submit("a")
    time.sleep(1)  # several rounds: nothing to wait for, as nothing must happen
    assert root.task(id)["state"] == "queued"


def test_a_timeout_needs_a_wait(root: Root) -> None:
    done = root.run("drain", "--timeout", "1s")
    assert done.returncode == Exit.USAGE
    assert "--timeout: only with --wait" in done.stderr
    assert not (root.dirs.inbox / "all.drain").exists()
