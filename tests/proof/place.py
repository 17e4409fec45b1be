"""A root under proof: its configuration, the fake Codex's notes, and a daemon that may die.

What the fake writes down lies in a directory of its own, outside of the root, which
may be on a disk that loses its power.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.daemon import Daemon
from tests.processes import commands
from tests.proof import level

CODEX = Path(__file__).resolve().parent / "codex"
TOP = Path(__file__).resolve().parents[2]
WORKERS = 4  # at most so many are at work at once
CONFIG = f"""\
workers: {WORKERS}
attempts: 20
codex:
  bin: {CODEX}
  sandbox: danger-full-access
retry:
  base: 1s
  cap: 1s
limits:
  disk_free: 1M
"""


def scratch(name: str) -> Path:
    """A fresh directory for one run; in memory, where there is some."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    place = base / f"codexd-proof-{name}-{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


class Place(Daemon):
    """A root with the fake Codex under proof, and `codexd serve` on it."""

    def __init__(self, home: Path, root: Path, http: bool = False) -> None:
        """`home` outlives everything; `root` may not."""
        self.notes = home / "notes"
        (self.notes / "locks").mkdir(parents=True, exist_ok=True)
        listen = "unix" if http else "off"
        super().__init__(root, {"HOME": str(home)}, CONFIG + f"http:\n  listen: {listen}\n")
        self.log = home / "serve.log"
        self._said = home / "said"
        self.work()

    def work(self, delay: float = 0.0, most: float = 0.0, slots: int = WORKERS) -> None:
        """How long the fake works, in seconds; of how many at once it says nothing."""
        told = {"place": str(self.notes), "delay": delay, "most": most}
        told |= {"slots": slots, "seed": level.seed()}
        (self.dirs.codex_home / "proof.json").write_text(json.dumps(told))

    def launch(self) -> None:
        """Start the daemon, and do not wait for it: it may be killed before it is ready."""
        command = [sys.executable, "-m", "codexd.cli", "--root", str(self.root), "serve"]
        with open(self.log, "a") as log, open(self._said, "w") as said:
            self.child = subprocess.Popen(
                command, env=self.env, cwd=TOP, stdout=said, stderr=log, text=True
            )

    def up(self) -> bool:
        """Whether the daemon's process is there."""
        return self.child is not None and self.child.poll() is None

    def is_ready(self) -> bool:
        """Whether it has said so."""
        return self._said.read_text().startswith("ready ")

    def reap(self) -> None:
        """The daemon has ended, or is about to."""
        if self.child is not None:
            self.child.wait(20)
            self._forget()

    def _forget(self) -> None:
        if self.child is not None and self.child.stdout is not None:
            self.child.stdout.close()
        self.child = None

    def find(self, words: str) -> list[int]:
        """Processes of this root with `words` in their command line."""
        found = ((pid, " ".join(argv)) for pid, argv in commands().items())
        return [pid for pid, line in found if str(self.root) in line and words in line]

    def lines(self, name: str) -> list[str]:
        try:
            return (self.notes / name).read_text().splitlines()
        except FileNotFoundError:
            return []

    def starts(self) -> list[dict[str, Any]]:
        """Every start of Codex, in their order."""
        return [json.loads(line) for line in self.lines("starts")]


def seed_of(args: Any) -> str:
    """The seed of a run, printed so that it can be given again."""
    told = os.environ["SEED"] = str(args.seed or level.seed())  # also for what it starts
    print(f"SEED={told}", flush=True)
    return told


def report(name: str, problems: list[str], began: float, figures: dict[str, object]) -> int:
    """One line of figures, the problems before it; the exit status.

    With CODEXD_PROOF set, the line is added to that file too, for whoever makes a table.
    """
    for problem in problems[:50]:
        print(f"PROBLEM {problem}")
    told = {**figures, "problems": len(problems), "seconds": round(time.monotonic() - began)}
    print(f"{name}: " + " ".join(f"{key}={value}" for key, value in told.items()), flush=True)
    if table := os.environ.get("CODEXD_PROOF"):
        with open(table, "a") as file:
            file.write(json.dumps({"proof": name, **told}) + "\n")
    return 1 if problems else 0
