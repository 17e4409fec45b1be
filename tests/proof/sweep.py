"""The syscall sweep: every call that changes, opens or reads a file of ours fails, or is the last.

    python -m tests.proof.sweep [--sample N] [--scene NAME] [--call NAME] [--jobs N] [--seed N]

Each scene is recorded twice under strace; each of its calls for the root is a point, which
is played again with SIGKILL at the call, or with EIO, ENOSPC or EINTR from it, as FAULTS has
it.  What only one recording has is counted and left out.  Every point must fire.  After an
error the daemon has to go on by itself, or end; then it is started again without strace, and
the oracle is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from tests.processes import gone, kill
from tests.proof import oracle, scenes
from tests.proof.place import Place, report, scratch, seed_of
from tests.proof.scenes import ACKNOWLEDGED, FIRST, SCENES, SECOND, Template

WRITING = (
    "openat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,"
    "mkdir,mkdirat,link,linkat,ftruncate,chmod,fchmod,fchmodat,utimensat"
)
# What the kernel may say of each.  A kill at a call that changes nothing is one at the change
# before.  Not close and fcntl: a call that strace refuses is not made, and a descriptor that
# stays open after an error is no fault that a kernel has.
FAULTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(WRITING.split(","), ("KILL", "EIO", "ENOSPC", "EINTR")),
    **dict.fromkeys(("read", "pread64"), ("EIO", "EINTR")),
    **dict.fromkeys(("getdents64", "newfstatat", "statx", "fstat", "statfs"), ("EIO",)),
    "flock": ("ENOLCK", "EINTR"),
}
CALLS = ",".join(FAULTS)
KINDS = sorted({fault for faults in FAULTS.values() for fault in faults})
_CALL = re.compile(r"([a-z0-9]+)\(")
TRIES = 20  # the order of some calls depends on the moment


@dataclass(frozen=True)
class Point:
    """Call number `when` of `call` in a scene, and what happens there."""

    scene: str
    call: str
    when: int
    fault: str

    def __str__(self) -> str:
        return f"{self.scene} {self.call}#{self.when} {self.fault}"

    @property
    def inject(self) -> str:
        what = "signal=KILL" if self.fault == "KILL" else f"error={self.fault}"
        return f"inject={self.call}:{what}:when={self.when}"


# --- one run under strace ---------------------------------------------------------------


def traced(place: Place, scene: scenes.Scene, *inject: str) -> tuple[int, list[str]]:
    """Play a scene; the status of its process as of wait(2), and its calls."""
    gate, ours = os.pipe()
    pid = scenes.forked(partial(_wait_then, gate, ours, place, scene))
    os.close(gate)
    log = place.log.with_name("strace.log")
    options = ["-y", "-o", str(log), "-e", f"trace={CALLS}", "-e", "signal=none"]
    command = ["strace", *options, *inject, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if "attached" not in said:
        kill([pid])
        raise RuntimeError(f"strace: {said}")
    os.write(ours, b".")
    os.close(ours)
    _, status = os.waitpid(pid, 0)
    tracer.communicate(timeout=20)
    return status, log.read_text(errors="replace").splitlines()


def _wait_then(gate: int, ours: int, place: Place, scene: scenes.Scene) -> NoReturn:
    """In the child: until strace is there."""
    import ctypes

    os.close(ours)
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER
    os.read(gate, 1)
    if scene.worker:
        scenes.work(place, FIRST)
    scenes.drive(place, scene.goal)


def calls(lines: list[str], root: Path) -> list[tuple[str, int, bool]]:
    """Each call: its name, its number among those of its name, and whether it is at the root
    or below it."""
    found: list[tuple[str, int, bool]] = []
    numbers: Counter[str] = Counter()
    for line in lines:
        if name := _CALL.match(line):
            numbers[name[1]] += 1
            found.append((name[1], numbers[name[1]], is_ours(line, root)))
    return found


def is_ours(line: str, root: Path) -> bool:
    """Also of the root itself, whose names are synced, and whose file system is asked for room."""
    return any(f"{root}{end}" in line for end in '/">')


def points(template: Template, recordings: int) -> tuple[list[Point], int]:
    """All of a scene: what so many recordings agree on; and of how many calls they do not."""
    seen: list[set[tuple[str, int]]] = []
    for _ in range(recordings):
        place = template.fresh()
        status, lines = traced(place, template.scene)
        if status:
            raise RuntimeError(f"{template.scene.name}: {status}: {place.log.read_text()[-2000:]}")
        settle(place)
        seen.append({(name, n) for name, n, ours in calls(lines, place.root) if ours})
    found = sorted(set.intersection(*seen))
    left_out = len(set.union(*seen)) - len(found)
    return [
        Point(template.scene.name, *one, fault) for one in found for fault in FAULTS[one[0]]
    ], left_out


# --- one point --------------------------------------------------------------------------


def fired(point: Point, status: int, lines: list[str], root: Path) -> bool:
    """Whether it happened, at a call of ours."""
    if point.fault == "KILL":
        found = calls(lines, root)
        return os.WTERMSIG(status) == signal.SIGKILL and found[-1] == (point.call, point.when, True)
    return any("(INJECTED)" in line and is_ours(line, root) for line in lines)


def play(template: Template, point: Point) -> tuple[list[str], int]:
    """What the oracle says of a point, and how often it was tried until it fired."""
    tries, happened = 0, False
    while not happened:
        if tries == TRIES:
            return [f"{point}: never fired"], tries
        tries += 1
        place = template.fresh()
        status, lines = traced(place, template.scene, "-e", point.inject)
        happened = fired(point, status, lines, place.root)
        settle(place)
    problems = []
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        problems.append("it did not go on by itself")
    problems += recover(place, point.scene)
    return [f"{point}: {problem}" for problem in problems], tries


def settle(place: Place) -> None:
    """Until nothing of the daemon before is left: some end by themselves, the rest is killed."""
    try:
        gone(str(place.root), 1.0)
    except TimeoutError:
        kill(place.processes())
        gone(str(place.root))


def recover(place: Place, scene: str) -> list[str]:
    """Start again, let everything be done, ask the oracle."""
    second = [SECOND] if scene == "control" else []
    try:
        if second:
            scenes.until_over(place, scenes.empty_inbox)  # it is held, then released
        for name in ("all", *second):
            scenes.deliver(place, f"{name}.release")
        scenes.until_over(place, scenes.nothing_left)
    except RuntimeError as error:
        return [str(error)]
    problems = oracle.check(place, [*ACKNOWLEDGED, *second])
    if second:
        problems += oracle.obeyed(place, cancelled=FIRST, held=SECOND)
    late = [p for p in place.root.rglob(".*.tmp") if p.parent != place.dirs.inbox]
    return problems + [f"left behind: {path}" for path in late]


# --- the sweep ----------------------------------------------------------------------------


def recorded(home: Path, args: argparse.Namespace, seed: str) -> tuple[list[Point], Counter[str]]:
    """The points that are to be played, and of how many they are chosen."""
    every: list[Point] = []
    figures: Counter[str] = Counter()
    for name in args.scene or SCENES:
        found, left_out = points(Template(SCENES[name], home), 2)
        every += [point for point in found if point.call in (args.call or FAULTS)]
        figures["calls_left_out"] += left_out
    figures["all_points"] = len(every)
    chosen = sample(every, args.sample, random.Random(seed)) if args.sample else every
    return chosen, figures


def shard(home: Path, chosen: list[Point]) -> Iterator[tuple[str, int]]:
    """Play a part of them; problems as they come, then counts as (name, number)."""
    names = dict.fromkeys(point.scene for point in chosen)
    templates = {name: Template(SCENES[name], home) for name in names}
    for point in chosen:
        problems, tries = play(templates[point.scene], point)
        yield point.scene, 1
        yield point.fault, 1
        yield "tried_again", tries - 1
        for problem in problems:
            yield f"PROBLEM {problem}", 1


def sample(every: list[Point], number: int, chance: random.Random) -> list[Point]:
    """So many points, of each scene and each call alike: most calls are openat."""
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in chance.sample(every, len(every)):
        groups[point.scene, point.call].append(point)
    order = chance.sample(list(groups), len(groups))
    chosen: list[Point] = []
    while len(chosen) < min(number, len(every)):
        chosen += [groups[name].pop() for name in order if groups[name]]
    return chosen[:number]


def jobs(args: argparse.Namespace, seed: str) -> tuple[Counter[str], list[str]]:
    """All shards, each a process of its own; figures and problems."""
    first = scratch("sweep")
    chosen, total = recorded(first / "home", args, seed)
    shutil.rmtree(first)
    homes = [scratch(f"sweep-{number}") for number in range(args.jobs)]
    children = []
    for number, home in enumerate(homes):
        pid = os.fork()
        if pid == 0:
            found = Counter[str]()
            status = 1
            try:
                for name, count in shard(home / "home", chosen[number :: args.jobs]):
                    found[name] += count
                    if name.startswith("PROBLEM"):
                        print(name, file=sys.stderr, flush=True)  # it may be long until the end
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                (home / "found.json").write_text(json.dumps(found))
                os._exit(status)
        children.append(pid)
    problems = []
    for pid, home in zip(children, homes, strict=True):
        _, status = os.waitpid(pid, 0)
        total.update(json.loads((home / "found.json").read_text()))
        problems += [f"a shard ended with status {status}"] if status else []
        shutil.rmtree(home)
    problems += [name.removeprefix("PROBLEM ") for name in total if name.startswith("PROBLEM")]
    return Counter({k: n for k, n in total.items() if not k.startswith("PROBLEM")}), problems


def main() -> int:
    parser = argparse.ArgumentParser(description="a fault at every call for a file of ours")
    parser.add_argument("--sample", type=int, help="that many points, by chance; else all")
    parser.add_argument("--scene", action="append", choices=list(SCENES))
    parser.add_argument("--call", action="append", choices=list(FAULTS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed")
    args = parser.parse_args()
    seed, began = seed_of(args), time.monotonic()
    figures, problems = jobs(args, seed)
    total = sum(figures[fault] for fault in KINDS)
    return report("sweep", problems, began, {"points": total, **figures})


if __name__ == "__main__":
    sys.exit(main())
