"""Submitting: `ask` and `task submit`, and waiting for what becomes of it.

Delivers what `asking` has checked into the inbox, under an id of its own making, and
waits for the master's word.  Who asks for something and hears nothing of it is told
why.  Part of `cli`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from codexd import asking, config, lost, overview, report, spool
from codexd.document import Form, Scalar
from codexd.model import Note, State
from codexd.program import Exit, Trouble, directories, elsewhere, typed
from codexd.view import WORD, Json, View

POLL = 0.03  # seconds between looks at the ledger while somebody waits
RESTART = 15.0  # seconds for which a daemon that others wait for may be down
_LOOK = 0.2  # seconds between looks at the daemon's sign of life,
_GLANCE = 1.0  # and while it is the task that is waited for


def view_of(args: argparse.Namespace) -> View:
    """The state; a mistyped --root is not an empty one."""
    view = View(directories(args))
    if not view.dirs.inbox.is_dir():
        raise _no_inbox(view.dirs)
    return view


def _no_inbox(dirs: config.Directories) -> Trouble:
    hint = elsewhere(dirs) or "was `codexd serve` ever started there?"
    return Trouble(Exit.UNAVAILABLE, f"there is no inbox {dirs.inbox}: {hint}")


def has_ended(task: Json) -> bool:
    return State(str(task["state"])).ended


def task_of(view: View, id: str) -> Json:
    """The task of that id, or the one that a file of that id repeated.  Raises Trouble."""
    found = view.task(id)
    if found is None:
        verdict = view.verdict(id)
        if verdict and verdict.kind is Note.REJECTED:
            raise Trouble(Exit.FAILED, f"{id} was rejected: {verdict.facts.get('reason')}")
        if verdict and (first := view.task(str(verdict.facts.get("first")))):
            return first  # the same key, the same content: the same task
        none = f"there is no task {id}"
        raise Trouble(Exit.NO_TASK, lost.why(view.dirs, id) if view.is_lost(id) else none)
    return found


def until_ended(view: View, id: str, timeout: float | None, told: Callable[[Json], None]) -> Json:
    """The task as it ended, or as it was at the timeout (seconds)."""
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        task = task_of(view, id)
        told(task)
        if has_ended(task) or (end is not None and time.monotonic() >= end):
            return task
        time.sleep(POLL)


def until_drained(view: View, timeout: float | None) -> Exit:
    """Wait until the daemon says that it is drained and that nothing runs."""
    end = None if timeout is None else time.monotonic() + timeout
    down = None  # since when; a restart takes its time
    while True:
        health = view.health()[1]
        gate, now = health.get("gate"), time.monotonic()
        down = None if health["status"] != "down" else now if down is None else down
        if down is None and isinstance(gate, dict) and "drain" in gate and not health["running"]:
            return Exit.DONE
        if end is not None and now >= end:
            return Exit.UNFINISHED
        if down is not None and now >= down + RESTART:
            why = "codexd is not serving: all.drain waits in the inbox, and what runs is unknown"
            raise Trouble(Exit.UNAVAILABLE, why)
        time.sleep(_LOOK)


def seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = config.TIMEOUT.read(Scalar(text, Form.PLAIN))
    if found is None:
        raise Trouble(Exit.USAGE, f"--timeout {text}: it must be {config.TIMEOUT.allowed}")
    return found


def ask(args: argparse.Namespace) -> int:
    view = View(directories(args))
    health = view.health()[1]
    if health["status"] == "down":
        what = elsewhere(view.dirs) or f"start it with `{typed(args, 'serve')}`"
        why = f"codexd is not serving {view.dirs.state}: {what}. Nothing was submitted"
        raise Trouble(Exit.UNAVAILABLE, why)
    timeout, began = seconds(args.timeout), time.monotonic()
    request = asking.by_options(args, most := asking.limit(args, health))
    id = _deliver(view, asking.content(request, most))
    with going_on(args, [id]):
        id = _word(view, id, WORD if timeout is None else min(WORD, timeout))
        print(f"codexd: task {id}", file=sys.stderr)
        if why := overview.holds(health, request.profile):
            print(f"codexd: it will wait: {why}", file=sys.stderr)
        _tell_untaken(view, [id])
        left = None if timeout is None else max(0.0, timeout - (time.monotonic() - began))
        task = until_ended(view, id, left, watched(view, report.progress(view.dirs)))
    if hasattr(args, "json"):
        report.dump(task)
    elif task["state"] == State.DONE:
        report.answer(view.dirs, task)
    if not has_ended(task):
        goes_on(args, [id])
        return Exit.UNFINISHED
    return Exit.DONE if task["state"] == State.DONE else Exit.FAILED


def _deliver(view: View, data: bytes) -> str:
    id = spool.new_id()
    try:
        spool.deliver(view.dirs.inbox, f"{id}.json", data)
    except OSError as error:
        raise _undelivered(view.dirs, error) from error
    return id


def give(view: View, *names: str) -> None:
    """Deliver control files; where nobody obeys them now, that is said."""
    for name in names:
        try:
            spool.deliver_control(view.dirs.inbox, name)
        except OSError as error:
            raise _undelivered(view.dirs, error) from error
    if not serves(view):
        print("codexd: not serving now; that is obeyed when codexd serves", file=sys.stderr)


def _undelivered(dirs: config.Directories, error: OSError) -> Trouble:
    """Why the inbox did not take a file."""
    if isinstance(error, PermissionError):
        why = "you may not put files there; those of its group may"
        return Trouble(Exit.PERMISSION, f"{dirs.inbox}: {why}")
    if isinstance(error, FileNotFoundError):
        return _no_inbox(dirs)
    return Trouble(Exit.UNAVAILABLE, f"{dirs.inbox}: {error.strerror}")


def _word(view: View, id: str, seconds: float = WORD) -> str:
    """Wait for the master's word; the id that stands for what was submitted."""
    end = time.monotonic() + seconds
    while not view.accepted(id) and time.monotonic() < end:
        time.sleep(POLL)
        view.refresh()
    verdict = view.verdict(id)
    if verdict is None:
        return id
    if verdict.kind is Note.REPEATED:
        return str(verdict.facts["first"])
    raise Trouble(Exit.FAILED, f"rejected: {verdict.facts.get('reason')}")


def submit(args: argparse.Namespace) -> int:
    view = view_of(args)
    health = view.health()[1]
    serving = health["status"] != "down"
    most = asking.limit(args, health)
    contents = [asking.by_file(name, most) for name in args.files]
    ids: list[str] = []
    refused: list[str] = []
    try:
        for data in contents:
            ids.append(_deliver(view, data))
        if serving:
            ids, refused = _words(view, ids, args.files)
        else:
            print("codexd: not serving now; the tasks wait in the inbox", file=sys.stderr)
    finally:  # what was submitted before a failure is submitted
        report.dump(ids) if hasattr(args, "json") else report.lines(ids)
    if refused:
        raise Trouble(Exit.FAILED, "; ".join(refused))
    return Exit.DONE


def _words(view: View, ids: list[str], names: list[str]) -> tuple[list[str], list[str]]:
    """The ids of what was accepted, and why the rest was not."""
    accepted: list[str] = []
    refused: list[str] = []
    wait = WORD
    for id, name in zip(ids, names, strict=True):
        try:
            accepted.append(_word(view, id, wait))
            if not view.accepted(accepted[-1]):
                wait = 0.0  # a full queue takes none of them
        except Trouble as why:
            refused.append(f"{name}: {why}")
    _tell_untaken(view, accepted)
    return accepted, refused


def retried(view: View, ids: list[str]) -> tuple[list[str], list[str]]:
    """Ask for ended tasks to be run again; the new ids, as far as the master says them,
    and why there are none of others."""
    before = {str(task["id"]) for task in view.short_list()} | view.rejections().keys()
    names = {id: f"{id}.retry" for id in ids}
    give(view, *names.values())
    end = time.monotonic() + (WORD if serves(view) else 0.0)
    while True:
        new = {t["retry_of"]: str(t["id"]) for t in view.short_list() if t["id"] not in before}
        said = [event.facts for id, event in view.rejections().items() if id not in before]
        refused = {facts.get("file"): f"rejected: {facts.get('reason')}" for facts in said}
        rest = [id for id, name in names.items() if id not in new and name not in refused]
        if not rest or time.monotonic() >= end:
            break
        time.sleep(POLL)
    if serves(view):
        for id in rest:
            print(f"codexd: {names[id]} lies in the inbox: {_why_not(view)}", file=sys.stderr)
    why = [f"{name}: {refused[name]}" for name in names.values() if name in refused]
    return [new[id] for id in names if id in new], why


# --- what is not heard of -------------------------------------------------------------


def serves(view: View) -> bool:
    return view.health()[1]["status"] != "down"


def _tell_untaken(view: View, ids: Sequence[str]) -> None:
    """Of which submissions the master has not said a word yet, and why."""
    for id in ids:
        if not view.accepted(id):
            print(f"codexd: task {id} lies in the inbox: {_why_not(view)}", file=sys.stderr)


def _why_not(view: View) -> str:
    health = view.health()[1]
    if health["status"] == "down":
        return "codexd is not serving now"
    if health.get("full"):
        return "the queue is full (limits.queue)"
    return "codexd has not taken it yet"


def watched(view: View, told: Callable[[Json], None]) -> Callable[[Json], None]:
    """`told`, and when the daemon stops for which somebody waits, that."""
    down, look = False, time.monotonic() + _GLANCE

    def both(task: Json) -> None:
        nonlocal down, look
        told(task)
        if time.monotonic() < look or has_ended(task):
            return
        look = time.monotonic() + _GLANCE
        if serves(view) == down:
            down = not down
            what = "not serving now; it goes on when codexd serves" if down else "serving again"
            print(f"codexd: {what}", file=sys.stderr)

    return both


@contextmanager
def going_on(args: argparse.Namespace, ids: list[str]) -> Iterator[None]:
    """Whoever ends the command meanwhile is told that the tasks, those in `ids`, go on."""
    try:
        yield
    except KeyboardInterrupt:
        goes_on(args, ids)
        raise


def goes_on(args: argparse.Namespace, ids: Sequence[str]) -> None:
    what, verb = ("task goes", "follow") if len(ids) == 1 else ("tasks go", "wait")
    command = typed(args, "task", verb, *ids)
    print(f"codexd: the {what} on: {command}", file=sys.stderr)
