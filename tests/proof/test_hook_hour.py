"""A hook that is down for an hour: nothing of it is forgotten, also over restarts.

The hour is simulated; in it tasks end, work is held and goes on, the daemon is killed
and is stopped.  Then the hook works again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from codexd import clock as times
from codexd import heartbeat
from tests.daemon import until
from tests.proof.level import Figures
from tests.proof.simulated import Clock, Simulated, library
from tests.test_bad_input import FAKE
from tests.test_hooks import Told

pytestmark = pytest.mark.timeout(300)

MINUTE = 60.0
CONFIG = f"codex:\n  bin: {FAKE}\nhttp:\n  listen: off\n"  # and retry as it comes


class Hour:
    """A daemon by a clock of ours, and its hook."""

    def __init__(self, tmp_path: Path) -> None:
        self.clock = Clock(tmp_path / "clock", 3 * 3600)
        self.told = Told(tmp_path)
        on = self.told.daemon.root / "codexd.yaml"
        config = CONFIG + on.read_text().partition("cap: 1s\n")[2]
        self.daemon = Simulated(tmp_path / "root", self.clock, config, {})
        self.told.daemon = self.daemon
        (self.told.place / "down").touch()
        self.tasks = 0

    def minute(self) -> None:
        """One that passes; whatever is due in it has been tried at its end."""
        self.daemon.advance(MINUTE)
        now = self.clock.now
        until(lambda: self.beat() >= now - 1 and not os.listdir(self.daemon.dirs.hooks), "a round")

    def beat(self) -> float:
        found = heartbeat.read(self.daemon.dirs.heartbeat)
        return times.epoch(str(found[1]["at"])) if found else 0.0

    def work(self) -> None:
        """A task that ends, and work that is held for a moment."""
        name = f"t{self.tasks}"
        self.tasks += 1
        self.daemon.drop(f"{name}.md", "x")
        self.daemon.answer(name)
        assert self.daemon.run("hold").returncode == 0
        assert self.daemon.run("release").returncode == 0

    def killed(self) -> None:
        self.daemon.kill()
        self.daemon.start()

    def stopped(self) -> None:
        assert self.daemon.stop() == 0
        self.daemon.start()


def reason(told: Told, key: str) -> str | None:
    """Why work was held, or was no longer."""
    found: str | None = json.loads((told.place / f"{key}.json").read_text()).get("reason")
    return found


@pytest.mark.skipif(library() is None, reason="needs libfaketime")
def test_a_hook_that_is_down_for_an_hour(tmp_path: Path, figure: Figures) -> None:
    hour = Hour(tmp_path)
    told, daemon = hour.told, hour.daemon
    comes: dict[int, Callable[[], None]] = {20: hour.killed, 40: hour.stopped}
    with daemon:
        for minute in range(60):
            if minute % 10 == 0:
                hour.work()
            comes.get(minute, lambda: None)()
            hour.minute()
        assert told.lines("told") == []
        tried = [line.split()[0] for line in told.lines("tried")]
        told.mend()
        minutes = 0
        while not told.settled():
            hour.minute()
            minutes += 1
            assert minutes < 30, "retry.cap is ten minutes"
        tasks = daemon.tasks()
    found = told.lines("told")
    assert {(t["state"], t["attempts"]) for t in tasks} == {("done", 1)}, "a hook changes no task"
    assert Counter(found) == Counter(set(found)), "each once: no run was killed after it had told"
    assert {f"{t['id']}.done" for t in tasks} <= set(found)
    # Not by `hold`: a minute that passes while `codex --version` runs is too long for that.
    held = [key for key in found if reason(told, key) == "hold"]
    assert [key.partition(".")[2] for key in held] == ["closed", "opened"] * hour.tasks
    assert set(tried) <= set(found), "the ids are the same"
    assert len(tried) <= 80, "three occasions, each about every ten minutes"
    figure("hook hour: events told", len(found))
    figure("hook hour: runs while it was down", len(tried))
    figure("hook hour: minutes until all were told", minutes)
