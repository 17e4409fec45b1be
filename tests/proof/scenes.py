"""The scenes of the syscall sweep: a root that is about to do one thing, and when it is done.

Each template is made by a real daemon, one from the other: files in the inbox, tasks in
the queue, attempts that have ended.  `drive` is that daemon: the loop of `codexd serve`,
in a process forked off ours, because what it imports would cost a third of a second each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from codexd import master, place, rotate, spool
from codexd.master import Master
from codexd.model import State
from codexd.processes import Processes
from codexd.program import load
from codexd.service import Service
from tests.proof import oracle
from tests.proof.place import Place

FIRST, SECOND = spool.new_id(), spool.new_id()  # an old one would be refused
ACKNOWLEDGED = ["one.md", FIRST, "bad-one.md"]
PATIENCE = 60  # seconds for what takes a moment on a machine that is not busy
Goal = Callable[[Place, Master], bool]

# What the daemon imports late: to find it later takes a number of calls that varies.
time.strptime("2026", "%Y")
b"".decode("utf-8-sig")


@dataclass(frozen=True)
class Scene:
    """What is swept.  `goal` says when it is over; `worker`: it is not the daemon's work."""

    name: str
    prepare: Callable[[Place], None]
    goal: Goal
    worker: bool = False


# --- the daemon -------------------------------------------------------------------------


def drive(place: Place, goal: Goal) -> NoReturn:
    """Be the daemon until the goal, then be gone without a word.  Exit 0 with the goal."""
    signal.alarm(PATIENCE)
    quiet(place)
    args = argparse.Namespace(root=str(place.root))

    def began(one: Master) -> None:
        def look() -> None:
            if goal(place, one):
                os._exit(0)

        one.beside = look

    os._exit(master.serve(Service("codexd"), lambda: load(args), began, embedded=True))


def work(place: Place, id: str) -> NoReturn:
    """Be the worker of a task, as the daemon starts it."""
    signal.alarm(PATIENCE)
    quiet(place)
    processes = Processes(place.dirs.tasks, place.dirs.run)
    alive, ours = os.pipe()  # the daemon, as the worker sees it
    os.dup2(alive, 0)
    for fd in (alive, ours):
        os.set_inheritable(fd, True)
    os.environ["HOME"] = place.env["HOME"]
    os.execv(sys.executable, processes.command(id))


def quiet(place: Place) -> None:
    """Log to the place's file; get out of the way of strace."""
    fd = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)


def forked(child: Callable[[], NoReturn]) -> int:
    """The pid of a process that does it."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    return pid


def until_over(place: Place, goal: Goal) -> None:
    """Drive to a goal; raises RuntimeError when that is not reached."""
    _, status = os.waitpid(forked(partial(drive, place, goal)), 0)
    if status:
        raise RuntimeError(f"no goal: status {status}: {place.log.read_text()[-2000:]}")


# --- goals --------------------------------------------------------------------------------


def nothing_left(place: Place, _: Master) -> bool:
    return oracle.idle(place)


def empty_inbox(place: Place, _: Master) -> bool:
    return spool.scan(place.dirs.inbox) == ([], [])


def all_running(_: Place, one: Master) -> bool:
    tasks = one.ledger.book.tasks.values()
    return bool(tasks) and all(task.state is State.RUNNING for task in tasks)


def rotated(place: Place, _: Master) -> bool:
    return bool(rotate.kept(place.dirs.ledger))


def stopped(_: Place, one: Master) -> bool:
    one.service.stopping = True  # as by SIGTERM: its last act is the checkpoint
    return False


def all_ended(root: Place, one: Master) -> bool:
    """Wait, in the middle of the daemon's round, until every worker has left a result."""
    if not all_running(root, one):
        return False
    tasks = one.ledger.book.tasks.values()
    wanted = [place.attempt(root.dirs, t.id, t.launches) / "result.json" for t in tasks]
    end = time.monotonic() + PATIENCE
    while not all(path.exists() for path in wanted) and time.monotonic() < end:
        time.sleep(0.01)
    return True


# --- templates ------------------------------------------------------------------------------


def deliver(place: Place, name: str, text: str = "") -> None:
    if text:
        spool.deliver(place.dirs.inbox, name, text.encode())
    else:
        spool.deliver_control(place.dirs.inbox, name)


def held(place: Place) -> None:
    """An empty root in which everything is held."""
    until_over(place, nothing_left)
    deliver(place, "all.hold")
    until_over(place, empty_inbox)


def dropped(place: Place) -> None:
    """Two good files and a bad one."""
    held(place)
    deliver(place, "one.md", "---\nsession: s\nkey: k\n---\n[[proof one s]]\n")
    deliver(place, f"{FIRST}.md", "[[proof first -]]\n")
    deliver(place, "bad-one.md", "---\nno: such key\n---\n")


def accepted(place: Place) -> None:
    dropped(place)
    until_over(place, empty_inbox)


def released(place: Place) -> None:
    accepted(place)
    deliver(place, "all.release")


def finished(place: Place) -> None:
    """Two attempts that have ended, and nobody has judged them."""
    released(place)
    until_over(place, all_ended)


def begun(place: Place) -> None:
    """One attempt that has ended, and one whose worker was not started yet."""
    finished(place)
    for path in list((place.dirs.tasks / FIRST / "1").iterdir()):
        if path.name != "attempt.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = "\n".join(line for line in place.lines("starts") if FIRST not in line)
    (place.notes / "starts").write_text(text + "\n")


def controlled(place: Place) -> None:
    accepted(place)
    deliver(place, f"{FIRST}.cancel")
    deliver(place, f"{SECOND}.md", "[[proof second -]]\n")
    deliver(place, f"{SECOND}.hold")


def compacted(place: Place) -> None:
    accepted(place)
    deliver(place, "all.compact")


SCENES = {
    one.name: one
    for one in (
        Scene("accept", dropped, empty_inbox),
        Scene("control", controlled, empty_inbox),
        Scene("dispatch", released, all_running),
        Scene("finish", finished, nothing_left),
        Scene("rotate", compacted, rotated),
        Scene("checkpoint", accepted, stopped),
        Scene("worker", begun, lambda *_: True, worker=True),
    )
}


class Template:
    """A scene's root as it is before, to be had again and again in one place."""

    def __init__(self, scene: Scene, home: Path) -> None:
        self.scene, self.home = scene, home
        self.kept = home.with_name(f"{home.name}.{scene.name}")
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        scene.prepare(Place(home, home / "root"))
        shutil.copytree(home, self.kept, symlinks=True)

    def fresh(self) -> Place:
        shutil.rmtree(self.home)
        shutil.copytree(self.kept, self.home, symlinks=True)
        return Place(self.home, self.home / "root")
