"""The clocks of a turn, by the worker: when Codex is silent, and when it does not leave."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from codexd.child import STEPS
from codexd.turn import BUSY, GRACE
from tests.daemon import until
from tests.processes import kill, naming
from tests.test_worker import Place

PATIENCE = STEPS[0][1] + 8  # a stop, on a machine under load


def timed(place: Place, mode: str) -> float:
    """Seconds from the first event to the result."""
    worker = place.start(mode, stdin=subprocess.DEVNULL)
    assert worker.wait(40) == 0
    began = (place.attempt / "prompt.md").stat().st_mtime
    return (place.attempt / "result.json").stat().st_mtime - began


@pytest.mark.parametrize(
    ("mode", "limits", "outcome", "least", "said"),
    [
        ("hang-silent", {"idle_timeout": 1}, "stall", 1, "last seen: starting"),
        ("hang-turn", {"idle_timeout": 3}, "stall", 3, "last seen: thinking"),
        # A command may be silent for longer than the model, but not for ever.
        ("hang-item", {"idle_timeout": 2}, "stall", 2 * BUSY, "last seen: running: sleep 9"),
        ("hang-item", {"idle_timeout": 1, "timeout": 3}, "timeout", 3, "running: sleep 9"),
        ("hang-item", {"idle_timeout": 9, "timeout": 2}, "timeout", 2, "running: sleep 9"),
        ("hang-completed", {"idle_timeout": 1, "timeout": 3}, "done", GRACE, ""),
        ("hang-failed", {"idle_timeout": 1, "timeout": 3}, "transient", GRACE, "at capacity"),
    ],
)
def test_what_strikes_and_when(
    tmp_path: Path, mode: str, limits: dict[str, float], outcome: str, least: float, said: str
) -> None:
    place = Place(tmp_path, **limits)
    seconds = timed(place, mode)
    result = place.result()
    assert result["outcome"] == outcome, result
    assert said in result["message"]
    assert least <= seconds < least + PATIENCE
    assert result["stop_reason"] == ("grace" if least == GRACE else outcome)


def test_each_event_of_a_command_begins_its_time_anew(tmp_path: Path) -> None:
    """A stand-in whose command says something every other second, for longer than BUSY."""
    talk = "for n in 1 2 3 4; do sleep 2; " + _line("item.updated", item=ITEM) + "; done"
    place = stand_in(tmp_path, talk, idle_timeout=1)
    began = time.monotonic()
    result = place.run()
    assert result["outcome"] == "done", result
    assert time.monotonic() - began > BUSY + 1


def test_a_flood_of_events_stops_no_clock(tmp_path: Path) -> None:
    flood = "echo 1 2 3 4 5 6 | xargs -n 1 -P 6 yes"  # faster than it can be read
    place = stand_in(tmp_path, flood, timeout=1)
    try:
        assert place.run()["outcome"] == "timeout"
    finally:
        kill(naming(str(tmp_path)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start another user's process")
def test_another_users_process_that_is_left_is_no_reason_to_fail(tmp_path: Path) -> None:
    """As of a command with sudo, which a worker without privileges cannot kill."""
    leave = "sleep 86318 >/dev/null 2>&1 &"
    place = stand_in(tmp_path, f"setpriv --reuid=65534 sh -c '{leave}'")
    command = ["setpriv", "--bounding-set=-kill", *place.command()]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as worker:
        until(
            lambda: worker.poll() is not None or (place.attempt / "result.json").exists(), "an end"
        )
        kill(naming("sleep 86318"))
    assert place.result()["outcome"] == "done"
    assert worker.returncode == 0


def stand_in(place: Path, work: str, **orders: object) -> Place:
    """A Codex that does this, in sh, while a command of its turn is open."""
    fake = place / "talker"
    fake.write_text(TALKER.replace("WORK", work))
    fake.chmod(0o755)
    (place / "root").mkdir()
    return Place(place / "root", bin=str(fake), **orders)


THREAD = "01a20000-0000-7000-8000-000000000000"
ITEM = {"id": "item_0", "type": "command_execution", "command": "make", "status": "in_progress"}
SAID = {"id": "item_1", "type": "agent_message", "text": "made"}


def _line(kind: str, **fields: object) -> str:
    return f"echo '{json.dumps({'type': kind, **fields})}'"


TALKER = "\n".join(
    [
        "#!/bin/sh",
        'if [ "$1" = sandbox ]; then while [ "$1" != -- ]; do shift; done; shift; exec "$@"; fi',
        "cat >/dev/null",
        _line("thread.started", thread_id=THREAD),
        _line("turn.started"),
        _line("item.started", item=ITEM),
        "WORK",
        _line("item.completed", item={**ITEM, "status": "completed", "exit_code": 0}),
        _line("item.completed", item=SAID),
        _line("turn.completed", usage={}),
        "",
    ]
)
