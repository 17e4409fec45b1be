"""What happens in a simulated month: the work that comes in, and what goes wrong.

An hour is a step: its work is dropped, its misfortune comes, and time goes on only
when nothing more can happen at this time.  Within an hour the clock stops where a
waiting task is due.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from codexd import clock as times
from codexd.model import State
from tests.daemon import PYTHON, until
from tests.processes import commands, kill
from tests.proof.simulated import Simulated
from tests.test_bad_input import FAKE, fill

HOUR, DAY = 3600.0, 86400.0
KEPT = 7  # days of retention
TOKENS = 5000  # a day's budget; a turn of the fake Codex is 110
CONFIG = f"""\
workers: 4
timeout: 24h
idle_timeout: 24h
codex:
  bin: {FAKE}
limits:
  disk_free: 1M
  day_tokens: {TOKENS}
retention: {{answers: {KEPT}d, archive: {KEPT}d, rejected: {KEPT}d}}
http:
  listen: off
"""
NIGHTLY = "---\noverlap: queue\n---\nLook after the house.\n"
QUOTA, CRASH, WELL = "replay:e429usage", "crash", "answer"
MISFORTUNES = {QUOTA, CRASH, "full disk", "reboot in a turn", "dead worker", "compact"}

_NOT_ITS = ("ballast", "serve.log")


@dataclass(frozen=True)
class Size:
    """What the daemon takes at the end of a day."""

    kept: int  # tasks in the archive
    files: int  # below the root
    disk: int  # bytes of them
    ledger: int  # bytes
    rss: int  # bytes of the daemon
    fds: int


class Month:
    """Days of a daemon on a root, by chance."""

    def __init__(self, daemon: Simulated, chance: random.Random, step: float) -> None:
        self.daemon, self.chance, self.step = daemon, chance, step
        self.dropped: dict[str, str] = {}  # marker of a task file: its name
        self.met: Counter[str] = Counter()  # what was done to it
        self.sizes: list[Size] = []
        self.until: dict[str, float] = {}  # of what goes on for hours: when it ends
        self.deck: list[Callable[[], bool]] = []
        self.untouched: set[str] = set()  # tasks that came and ended while all was well
        self.mode = WELL
        self.number = 0

    # --- time -----------------------------------------------------------------------

    def day(self) -> None:
        for _ in range(round(DAY / self.step)):
            self.hour()
        self.daemon.reader.read()
        self.sizes.append(self.size())

    def hour(self) -> None:
        end = self.daemon.clock.now + self.step
        reader = self.daemon.reader
        reader.read()  # before anything can ask for a rotation
        before, well = set(reader.files), not self.until
        self.better()
        well = not self.misfortune() and well
        self.work()
        self.daemon.quiet()
        while (due := self.due()) < end:
            self.daemon.advance(max(1.0, due - self.daemon.clock.now))
            self.daemon.quiet()
        self.daemon.advance(end - self.daemon.clock.now)
        reader.read()
        if well:
            self.untouched |= reader.ends.keys() - before

    def due(self) -> float:
        """When the next waiting task, or the gate, is due."""
        book = self.daemon.reader.book()
        told = [t.until for t in book.tasks.values() if t.state is State.WAITING]
        told += [str(g["until"]) for g in book.gate.values() if g.get("until")]
        ahead = [times.epoch(at) for at in told if at]
        return min((at for at in ahead if at > self.daemon.clock.now), default=float("inf"))

    # --- work -----------------------------------------------------------------------

    def work(self) -> None:
        if "disk" in self.until:
            return self.drop("", "full.md", raw=True)
        self.scheduled()
        for _ in range(self.chance.choice((0, 1, 1, 2, 3))):
            front = self.chance.choice(
                ("", "session: web", "session: web", "priority: 9", "not_before: 5h", "key: KEY",
                 "session: docs\nattempts: 1", "workdir: /nowhere", "nonsense: 1")
            )  # fmt: skip
            self.drop(front.replace("KEY", f"key-{self.number}"), "task.md")
        if self.chance.random() < 0.02:  # a heavy day: the budget will not do
            for _ in range(30):
                self.drop("", "heavy.md")
            self.met["heavy"] += 1
        return None

    def drop(self, front: str, stem: str, raw: bool = False) -> None:
        self.number += 1
        marker = f"mark-{self.number:06}"
        text = f"---\n{front}\n---\n{marker}\n" if front else f"{marker}\n"
        name = f"{marker}-{stem}"
        try:
            self.daemon.drop(name, text)
        except OSError:
            assert raw, "only a full disk refuses a drop"
            self.met["refused"] += 1
            return
        if "nonsense" not in front and "nowhere" not in front:
            self.dropped[marker] = name

    def scheduled(self) -> None:
        """What codexd-schedule@nightly.timer does."""
        os.spawnve(
            os.P_WAIT, PYTHON,
            [PYTHON, "-m", "codexd.schedule", "--root", str(self.daemon.root), "nightly"],
            {**self.daemon.env, "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip

    # --- misfortune -----------------------------------------------------------------

    def misfortune(self) -> bool:
        """Sometimes; each of them comes before any comes again."""
        if self.chance.random() > (0.15 if self.step < 4 * HOUR else 0.4):
            return False
        if not self.deck:
            self.deck = [self.spent, self.crashes, self.full, self.reboot, self.worker_dies,
                         self.reboot, self.worker_dies, self.compact]  # fmt: skip
            self.chance.shuffle(self.deck)
        if not self.deck[-1]():
            self.chance.shuffle(self.deck)  # its time will come
        else:
            self.deck.pop()
        return True

    def spent(self) -> bool:
        self.behave(QUOTA, 7 * HOUR)
        return True

    def crashes(self) -> bool:
        self.behave(CRASH, 2 * HOUR)
        return True

    def compact(self) -> bool:
        (self.daemon.dirs.inbox / "all.compact").touch()
        self.met["compact"] += 1
        return True

    def better(self) -> None:
        """End what has gone on for long enough."""
        for what, end in list(self.until.items()):
            if self.daemon.clock.now >= end:
                del self.until[what]
                if what == "disk":
                    (self.daemon.root / "ballast").unlink()
                    self.daemon.wake()
                    until(self.has_room, "the disk, seen")
                else:
                    self.behave(WELL, 0)

    def has_room(self) -> bool:
        """Whether the daemon has said so, everywhere."""
        return "disk" not in self.daemon.reader.book().gate and not self.daemon.told_full()

    def behave(self, mode: str, seconds: float, delay: float = 0.0) -> None:
        """What Codex does from now on."""
        self.mode = mode
        path = self.daemon.dirs.codex_home / "fake.json"
        told = {"mode": mode, "delay": delay, "dump": str(self._dump)}
        path.with_suffix(".new").write_text(json.dumps(told))
        path.with_suffix(".new").rename(path)
        if seconds:
            self.met[mode] += 1
            self.until["codex"] = self.daemon.clock.now + seconds

    @property
    def _dump(self) -> Path:
        return self.daemon.root.parent / "dump"

    def starts(self) -> Counter[tuple[str, str]]:
        """Each attempt (ID, N) that Codex says it was started for, and how often."""
        found: Counter[tuple[str, str]] = Counter()
        for line in self._dump.read_text().splitlines():
            argv = json.loads(line)["argv"]
            id, number = argv[argv.index("-o") + 1].split("/")[-3:-1]
            found[id, number] += 1
        return found

    def full(self) -> bool:
        if self.until:
            return False
        fill(self.daemon.root)
        self.met["full disk"] += 1
        self.until["disk"] = self.daemon.clock.now + 3 * HOUR
        self.daemon.wake()
        return True

    def in_a_turn(self) -> bool:
        """Wait until Codex is in the middle of a turn, where it can be."""
        if self.mode != WELL or self.until:
            return False
        self.behave(WELL, 0, delay=20.0)
        self.drop("", "hit.md")
        until(lambda: self.turns() or self.daemon.reader.book().gate, "a turn")
        self.behave(WELL, 0)
        return self.turns()

    def turns(self) -> bool:
        mine = str(self.daemon.root)
        return any("exec" in argv and mine in " ".join(argv) for argv in commands().values())

    def reboot(self) -> bool:
        """Everything is gone at once."""
        self.met["reboot in a turn" if self.in_a_turn() else "reboot"] += 1
        self.daemon.kill()
        self.daemon.start()
        return True

    def worker_dies(self) -> bool:
        """Somewhere in its turn."""
        if not self.in_a_turn():
            return False
        mine = str(self.daemon.dirs.tasks)
        kill([p for p, argv in commands().items() if "--tasks" in argv and mine in argv])
        self.met["dead worker"] += 1
        return True

    # --- what it came to --------------------------------------------------------------

    def size(self) -> Size:
        sizes = []
        for top, _, names in os.walk(self.daemon.root):
            for name in names:
                with suppress(FileNotFoundError):  # it was just moved on
                    sizes.append(0 if name in _NOT_ITS else os.lstat(f"{top}/{name}").st_size)
        status = Path(f"/proc/{self.daemon.pid}/status").read_text()
        rss = int(status.partition("VmRSS:")[2].split()[0]) << 10
        fds = len(os.listdir(f"/proc/{self.daemon.pid}/fd"))
        kept = sum(1 for _ in self.daemon.dirs.archive.glob("*/*"))
        return Size(kept, len(sizes), sum(sizes), self.daemon.dirs.ledger.stat().st_size, rss, fds)

    def calm(self) -> None:
        """The end of the month: nothing is wrong any more, and days pass until all is done."""
        for what in list(self.until):
            self.until[what] = 0.0
        self.better()
        end = time.monotonic() + 120
        while self.daemon.reader.book().tasks and time.monotonic() < end:
            self.daemon.quiet()
            self.daemon.advance(min(6 * HOUR, max(1.0, self.due() - self.daemon.clock.now)))
        self.daemon.reader.read()
