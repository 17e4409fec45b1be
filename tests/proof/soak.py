"""The soak: mixed load for hours, and whether what the daemon has stays flat.

    make soak HOURS=n          python -m tests.proof.soak --hours n

Files, requests, schedules, retries, cancels, controls and rejections keep coming; once a
minute one line says how many descriptors, threads and bytes of memory the daemon and its
HTTP server have, how many files there are, and how fast work is done.  Retention is a day's,
and whatever is kept of a task is a bounded number of files, so these must not be more than
the tasks that are kept explain.  The exit status is 1 when something does not stay flat.

The workers are child processes here.  Units are not counted: tests/test_survival.py looks in
a booted box whether any are left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from codexd.ledger import Follower
from tests.daemon import Daemon, until
from tests.processes import naming
from tests.proof.place import report, seed_of
from tests.proof.test_load import SlowClients, health
from tests.test_bad_input import FAKE
from tests.web import Client, Said

CONFIG = f"""\
codex:
  bin: {FAKE}
limits:
  disk_free: 0
retention: {{answers: 1d, archive: 1d, rejected: 1d}}
http:
  listen: unix
"""
FRONT = ("", "", "session: web", "session: docs", "priority: 9", "not_before: 20s",
         "verify: {command: 'true'}", "nonsense: 1", "timeout: 1s",
         "workdir: /nowhere")  # fmt: skip


@dataclass(frozen=True)
class Sample:
    minute: float
    fds: int
    threads: int
    rss_mib: int
    http_fds: int
    http_threads: int
    http_rss_mib: int
    processes: int
    live: int
    files: int
    kept: int
    ended: int


# What must not grow, and by how much it may differ by chance.
FLAT = {"fds": 8, "threads": 3, "rss_mib": 12, "http_fds": 280, "http_threads": 4,
        "http_rss_mib": 16, "processes": 20, "live": 60}  # fmt: skip
_DAYS = 30  # hours after which retention has begun, and tasks that are kept are no more either
# Files of one task that is kept: its record, four of each attempt of which there are a few,
# its answer, its thread, its session, its transcript, and what holds for all.
_OF_A_TASK, _OF_ALL = 14, 100


def status(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition(f"\n{name}:")[2].split()[0])


def fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class Soak:
    """One daemon, its load, and what it had."""

    def __init__(self, root: Path, chance: random.Random, rate: float) -> None:
        self.daemon = Daemon(root, config=CONFIG)
        self.chance = chance
        self.pause = 1 / rate
        self.samples: list[Sample] = []
        self.number = self.again = 0
        self.ids: list[str] = []

    def run(self, seconds: float, every: float) -> None:
        with self.daemon as daemon:
            address = daemon.ready.rpartition("http=")[2]
            self.reader = Follower(daemon.dirs.ledger)
            began = time.monotonic()
            with SlowClients(address):
                due = began + min(every, 10.0)  # what is made once, is made
                while (now := time.monotonic()) < began + seconds:
                    self.work(address)
                    if now >= due:
                        due = now + every
                        self.sample(now - began)
                    until(lambda now=now: time.monotonic() >= now + self.pause, "the next")  # type: ignore[misc]
                self.sample(time.monotonic() - began)  # at least one, however short it was
            until(lambda: health(address)["queued"] == 0, "an empty queue", 600)
            self.reader.close()

    def work(self, address: str) -> None:
        """One thing that somebody might do."""
        self.number += 1
        what = self.chance.random()
        if what < 0.5:
            front = self.chance.choice(FRONT)
            self.daemon.drop(f"s{self.number}.md", f"---\n{front}\n---\n{self.number}\n")
        elif what < 0.8:
            key = f"soak-{self.number}"  # so that it may be said again
            body = json.dumps({"prompt": key, "session": "http", "key": key}).encode()
            said = self.ask(address, "POST", "/tasks", body)
            assert said.status == 202, said
            self.ids.append(said.json["id"])
        elif self.ids:
            verb = self.chance.choice(("cancel", "retry", "hold", "release"))
            id = self.chance.choice(self.ids[-50:])
            (self.daemon.dirs.inbox / f"{id}.{verb}").touch()
            if verb == "hold":
                (self.daemon.dirs.inbox / f"{id}.release").touch()
        self.ask(address, "GET", self.chance.choice(("/tasks", "/health", "/sessions", "/metrics")))

    def ask(self, address: str, method: str, path: str, body: bytes | None = None) -> Said:
        """Again, if we were the oldest of too many, all of whom had said nothing yet."""
        for _ in range(5):
            with suppress(OSError, ValueError), Client(address) as client:
                return client.ask(method, path, body)
            self.again += 1
        raise TimeoutError(f"{method} {path}: no answer, five times")

    def sample(self, age: float) -> None:
        assert self.daemon.child is not None
        pid = self.daemon.child.pid
        http = next(p for p in naming(str(self.daemon.root)) if "codexd.http" in command(p))
        self.reader.refresh()
        files = sum(len(names) for _, _, names in os.walk(self.daemon.root))
        one = Sample(
            round(age / 60, 1), fds(pid), status(pid, "Threads"), status(pid, "VmRSS") >> 10,
            fds(http), status(http, "Threads"), status(http, "VmRSS") >> 10,
            len(naming(str(self.daemon.root))), len(self.reader.book.tasks), files, self.kept(),
            len(list(self.daemon.dirs.answers.iterdir())),
        )  # fmt: skip
        if not self.samples:
            print(" ".join(f"{f.name:>12}" for f in fields(Sample)), flush=True)
        print(" ".join(f"{value:>12}" for value in astuple(one)), flush=True)
        self.samples.append(one)

    def kept(self) -> int:
        """Tasks of which something is there, and files that were rejected."""
        dirs = self.daemon.dirs
        return sum(1 for place in ("archive/*/*", "tasks/*") for _ in dirs.state.glob(place)) + sum(
            1 for _ in dirs.rejected.glob("*.reason")
        )

    def problems(self) -> list[str]:
        """What is not flat: the last quarter against the second."""
        quarter = len(self.samples) // 4
        found = [
            f"{s.files} files of {s.kept} tasks that are kept"
            for s in self.samples
            if s.files > _OF_ALL + _OF_A_TASK * s.kept
        ]
        long = self.samples and self.samples[-1].minute > 60 * _DAYS
        for name, play in ({**FLAT, "kept": 400} if long else FLAT).items():
            values = [getattr(s, name) for s in self.samples]
            early, late = values[quarter : 2 * quarter + 1], values[-quarter - 1 :]
            if min(late) > max(early) + play:
                found.append(f"{name} grew from {max(early)} to {min(late)}")
        log = self.daemon.log.read_text()
        return found + [f"the log has {word}" for word in ("Traceback", "http.died") if word in log]


def command(pid: int) -> str:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="mixed load for hours: does all stay flat?")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two samples")
    parser.add_argument("--rate", type=float, default=1.0, help="pieces of work a second")
    parser.add_argument("--seed")
    args = parser.parse_args()
    told, began = seed_of(args), time.monotonic()
    with tempfile.TemporaryDirectory() as top:
        soak = Soak(Path(top) / "root", random.Random(f"soak {told}"), args.rate)
        soak.run(args.hours * 3600, args.every)
        last = soak.samples[-1]
        figures: dict[str, object] = {
            "samples": len(soak.samples),
            "pieces": soak.number,
            "again": soak.again,
        }
        figures |= {f.name: getattr(last, f.name) for f in fields(Sample)}
        return report("soak", soak.problems(), began, figures)


if __name__ == "__main__":
    sys.exit(main())
