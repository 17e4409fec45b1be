"""The kill loop: a daemon under load whose parts are killed at random moments.

    python -m tests.proof.kills [--cycles N] [--jobs N] [--seed N]

Each cycle ends with SIGKILL for the master, workers, Codex, the HTTP server, or all at
once, often before the daemon was up again.  After every run of CYCLES the load ends, what
is left is done, and the oracle is asked.  Most of a run is waiting, so several go side by
side, each on a root of its own.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from codexd.model import Kind
from tests.daemon import until
from tests.processes import kill
from tests.proof import oracle
from tests.proof.load import Load
from tests.proof.place import Place, report, scratch, seed_of

CYCLES = 25  # kills of one run
START = 120.0  # seconds; a machine full of such runs gives a start what it has left
VICTIMS = {"master": 8, "worker": 6, "codex": 3, "http": 2, "all": 5}


class Killer:
    """One root, and who is killed in it."""

    def __init__(self, home: Path, chance: random.Random) -> None:
        self.place = Place(home, home / "root", http=True)
        self.place.work(0.0, 1.0)
        self.chance = chance
        self.killed: Counter[str] = Counter()

    def wait(self) -> None:
        """Until the next kill: mostly in mid-work, at times while it starts."""
        time.sleep(self.chance.uniform(0.02, 0.5))
        if self.chance.random() < 0.75:
            until(lambda: self.place.is_ready() or not self.place.up(), "the daemon", START)
            time.sleep(self.chance.uniform(0.0, 0.8))

    def strike(self) -> None:
        """Kill one or more, and start the daemon again if it is not there."""
        victim = self.chance.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        all_of_them = self.chance.random() < 0.3
        words = {"worker": "--tasks", "codex": "exec --json", "http": "codexd.http"}
        found = self.place.find(words[victim]) if victim in words else []
        if victim in words and not found:
            victim = "master"  # a kill that hits nobody would be none
        self.killed[victim] += 1
        if victim == "all":
            self.place.kill()
        elif victim == "master":
            assert self.place.child is not None
            self.place.child.kill()
            self.place.reap()
        else:
            kill(found if all_of_them else found[:1])
        if not self.place.up():
            self.place.reap()
            self.place.launch()

    def revive(self) -> None:
        """A daemon that stays: one whose HTTP server was killed too early has ended."""
        while True:
            # The one that is there may just be about to end.
            until(lambda: self.place.is_ready() or not self.place.up(), "the daemon", START)
            if self.place.up():
                return
            self.place.reap()
            self.place.launch()


def run(name: str, seed: str, cycles: int) -> tuple[list[str], Counter[str]]:
    """One run on a fresh root; what the oracle says, and the figures."""
    home = scratch(name)
    chance = random.Random(seed)
    killer = Killer(home, chance)
    load = Load(killer.place, random.Random(f"{seed} load"), 9.0, http=True)
    killer.place.launch()
    until(lambda: killer.place.dirs.inbox.is_dir(), "the inbox", 20)
    load.begin()
    problems = []
    try:
        for _ in range(cycles):
            killer.wait()
            killer.strike()
        load.end()
        killer.revive()
        load.drain()
    except TimeoutError as error:
        problems.append(f"{error}; see {home}")
    finally:
        load.end()
    killer.place.stop()
    problems += oracle.check(killer.place, load.acknowledged)
    figures = count(killer, load)
    if problems:
        problems.append(f"after kill {name}: its root is kept in {home}")
    else:
        shutil.rmtree(home)
    return problems, figures


def count(killer: Killer, load: Load) -> Counter[str]:
    figures: Counter[str] = Counter()
    told, starts = oracle.story(killer.place, []), killer.place.starts()
    figures["kills"] += sum(killer.killed.values())
    figures.update({f"killed_{victim}": n for victim, n in killer.killed.items()})
    figures["tasks"] += len(told.accepted)
    figures["acknowledged"] += len(load.acknowledged)
    figures["accepted_by_http"] += load.sent.get("202", 0)
    figures["starts"] += len(starts)
    figures["resumed"] += sum(start["told"] and start["thread"] is not None for start in starts)
    figures["rotations"] += told.kinds["rotated"]
    for kind in (Kind.DONE, Kind.CANCELLED, Kind.FAILED):
        figures[kind] += told.kinds[kind]
    return figures


def runs(cycles: int, jobs: int, seed: str) -> Iterator[tuple[list[str], Counter[str]]]:
    """All runs, as they end."""
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(
            run,
            (f"kills-{first}" for first in range(0, cycles, CYCLES)),
            (f"{seed} {first}" for first in range(0, cycles, CYCLES)),
            (min(CYCLES, cycles - first) for first in range(0, cycles, CYCLES)),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="kill the daemon at random moments")
    parser.add_argument("--cycles", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--seed")
    args = parser.parse_args()
    seed, began = seed_of(args), time.monotonic()
    figures: Counter[str] = Counter()
    problems: list[str] = []
    for found, counted in runs(args.cycles, args.jobs, seed):
        problems += found
        figures.update(counted)
    return report("kills", problems, began, dict(figures))


if __name__ == "__main__":
    sys.exit(main())
