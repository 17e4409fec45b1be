"""Reading a ledger of a million events, and starting with its checkpoint."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Ratio, compare
from codexd.ledger import Ledger, render, seal
from codexd.model import Event, Kind

EVENTS = 1_000_000
_AT = "2026-11-23T07:20:11.123Z"

# Each in a process of its own: what one leaves in memory must not help the other.
_READ = "open(sys.argv[1], 'rb').read().split(b'\\n')"
_REPLAY = "f = Follower(Path(sys.argv[1])); f.refresh(); assert f.book.offset"
_START = "Ledger(Path(sys.argv[1]), Path(sys.argv[1]).parent / 'checkpoint.json')"
_TIMED = """
import sys, time
from pathlib import Path
from codexd.ledger import Follower, Ledger
began = time.perf_counter()
{work}
print(time.perf_counter() - began)
"""


def write(path: Path, events: int) -> None:
    """A ledger of tasks with three events each."""
    with open(path, "wb") as file:
        file.write(seal("# codexd ledger, format 1"))
        for number in range(events // 3):
            id = f"20261123t{number % 1000000:06}-{number:010}"
            facts = {"session": "web", "priority": 5, "file": "fix-links.md"}
            file.write(render(Event(_AT, Kind.QUEUED, id, facts)))
            file.write(render(Event(_AT, Kind.RUNNING, id, {"launches": 1, "attempts": 1})))
            file.write(render(Event(_AT, Kind.DONE, id, {"outcome": "done", "attempts": 1})))


def _seconds(work: str, path: Path) -> float:
    code = _TIMED.format(work=work)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def run() -> Iterator[Ratio]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        for name, events in (("full", EVENTS), ("empty", 0)):
            (Path(place) / name).mkdir()
            write(Path(place) / name / "tasks.md", events)
        full, empty = Path(place) / "full/tasks.md", Path(place) / "empty/tasks.md"
        yield compare(
            f"replay of {EVENTS} events / read().split of the file", 1.5,
            lambda: _seconds(_REPLAY, full), lambda: _seconds(_READ, full), 7,
        )  # fmt: skip
        for path in (full, empty):
            Ledger(path, path.parent / "checkpoint.json").checkpoint()
        yield compare(
            f"start with a checkpoint at {EVENTS} events / at none", 1.2,
            lambda: _seconds(_START, full), lambda: _seconds(_START, empty), 15,
        )  # fmt: skip
