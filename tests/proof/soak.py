"""The soak: mixed load for hours, and whether what the daemon has stays flat.

    make soak HOURS=n          python -m tests.proof.soak --hours n

Files, requests, schedules, retries, cancels, controls and rejections keep coming; once a
minute one line says how many descriptors, threads and bytes of memory the daemon and its
HTTP server have, how many files there are, and how fast work is done.  Retention is a day's,
so in a longer run the files must stay flat as well.  The exit status is 1 when something
does not.
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
from tests.proof.level import chances, seed
from tests.proof.test_load import SlowClients, health
from tests.test_bad_input import FAKE
from tests.web import Client

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
RATE = 1.0  # seconds between two pieces of work


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
    ended: int


# What must not grow, and by how much it may differ by chance.
FLAT = {"fds": 8, "threads": 3, "rss_mib": 12, "http_fds": 280, "http_threads": 4,
        "http_rss_mib": 16, "processes": 20, "live": 60}  # fmt: skip
_DAYS = 30  # hours after which files must not grow any more


def status(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition(f"\n{name}:")[2].split()[0])


def fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class Soak:
    """One daemon, its load, and what it had."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.daemon = Daemon(root, config=CONFIG)
        self.chance = chance
        self.samples: list[Sample] = []
        self.number = 0
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
                    until(lambda now=now: time.monotonic() >= now + RATE, "the next")  # type: ignore[misc]
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
            with Client(address) as client:
                body = json.dumps({"prompt": f"{self.number}", "session": "http"}).encode()
                said = client.ask("POST", "/tasks", body)
                assert said.status == 202, said
                self.ids.append(said.json["id"])
        elif self.ids:
            verb = self.chance.choice(("cancel", "retry", "hold", "release"))
            id = self.chance.choice(self.ids[-50:])
            (self.daemon.dirs.inbox / f"{id}.{verb}").touch()
            if verb == "hold":
                (self.daemon.dirs.inbox / f"{id}.release").touch()
        with suppress(IndexError), Client(address) as client:
            client.ask("GET", self.chance.choice(("/tasks", "/health", "/sessions", "/metrics")))

    def sample(self, age: float) -> None:
        assert self.daemon.child is not None
        pid = self.daemon.child.pid
        http = next(p for p in naming(str(self.daemon.root)) if "codexd.http" in command(p))
        self.reader.refresh()
        files = sum(len(names) for _, _, names in os.walk(self.daemon.root))
        one = Sample(
            round(age / 60, 1), fds(pid), status(pid, "Threads"), status(pid, "VmRSS") >> 10,
            fds(http), status(http, "Threads"), status(http, "VmRSS") >> 10,
            len(naming(str(self.daemon.root))), len(self.reader.book.tasks), files,
            len(list(self.daemon.dirs.answers.iterdir())),
        )  # fmt: skip
        if not self.samples:
            print(" ".join(f"{f.name:>12}" for f in fields(Sample)), flush=True)
        print(" ".join(f"{value:>12}" for value in astuple(one)), flush=True)
        self.samples.append(one)

    def problems(self) -> list[str]:
        """What is not flat: the last quarter against the second."""
        quarter = len(self.samples) // 4
        found = []
        long = self.samples and self.samples[-1].minute > 60 * _DAYS
        for name, play in ({**FLAT, "files": 5000} if long else FLAT).items():
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two samples")
    args = parser.parse_args()
    print(f"SEED={seed()}", flush=True)
    with tempfile.TemporaryDirectory() as top:
        soak = Soak(Path(top) / "root", chances("soak"))
        soak.run(args.hours * 3600, args.every)
        problems = soak.problems()
    print("\n".join(problems) or "flat")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
