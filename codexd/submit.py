"""Submitting: `ask` and `task submit`, and waiting for what becomes of it.

Checks what it is given as the master will, delivers it into the inbox under an
id of its own making, and waits for the master's word.  Part of `cli`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

from codexd import config, report, spool, taskfile
from codexd.document import Document, Form, Scalar
from codexd.model import Note, Request, State
from codexd.program import Exit, directories, elsewhere
from codexd.view import Json, View

POLL = 0.03  # seconds between looks at the ledger while somebody waits
_LISTS = ("images", "add_dirs", "after")  # keys of several values
RESTART = 15.0  # seconds for which a daemon that others wait for may be down
_LOOK = 0.2  # seconds between looks at the daemon's sign of life
WORD = 5.0  # seconds to wait for the master's word on a submission


class Trouble(Exception):
    """Why a command cannot be carried out, with its exit status."""

    def __init__(self, status: Exit, text: str) -> None:
        super().__init__(text)
        self.status = status


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
        raise Trouble(Exit.NO_TASK, f"there is no task {id}")
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
    well, health = view.health()
    if not well and health["status"] == "down":
        raise Trouble(
            Exit.UNAVAILABLE,
            f"codexd is not serving {view.dirs.state}: "
            f"{elsewhere(view.dirs) or 'start it with `codexd serve`'}. Nothing was submitted",
        )
    timeout = seconds(args.timeout)
    id = _deliver(view, _request(args))
    id = _word(view, id)
    print(f"codexd: task {id}", file=sys.stderr)
    if not well:
        print(f"codexd: it will wait: {report.why(health)}", file=sys.stderr)
    task = until_ended(view, id, timeout, report.progress(view.dirs))
    if hasattr(args, "json"):
        report.dump(task)
    elif task["state"] == State.DONE:
        report.answer(view.dirs, task)
    if task["state"] == State.DONE:
        return Exit.DONE
    print(f"codexd: {report.sentence(task)}", file=sys.stderr)
    return Exit.FAILED if has_ended(task) else Exit.UNFINISHED


def _request(args: argparse.Namespace) -> Request:
    """The request of `ask`, checked as a task file is."""
    text = _standard_input() if args.text == "-" else args.text
    values: dict[str, object] = {"prompt": Scalar(text, Form.TEXT)}
    for option in args.option:
        key, found, value = option.partition("=")
        if not found or key == "prompt":
            raise Trouble(Exit.USAGE, f"-o {option}: it must be KEY=VALUE, and no prompt")
        several = [Scalar(part, Form.PLAIN) for part in value.split(",")]
        values[key] = several if key in _LISTS else Scalar(value, Form.PLAIN)
    if args.session is not None:
        values["session"] = Scalar(args.session, Form.TEXT)
    if args.workdir is not None:
        values["workdir"] = Scalar(os.path.abspath(args.workdir), Form.TEXT)
    request = taskfile.from_mapping(Document(values))
    return request if request.title else replace(request, title=_title(request.prompt))


def _standard_input() -> str:
    """A prompt from standard input, checked as a file of plain text is."""
    try:
        return _parsed("-", sys.stdin.buffer).prompt
    except taskfile.Refused as why:
        raise Trouble(Exit.USAGE, f"standard input: {why}. Nothing was submitted") from why


def _title(text: str) -> str:
    """What a list shows of a task that has no file name."""
    first = text.strip().splitlines()[0]
    return "".join(c for c in first if c.isprintable())[:80].strip() or "untitled"


def _deliver(view: View, request: Request) -> str:
    id = spool.new_id()
    try:
        spool.deliver(view.dirs.inbox, f"{id}.json", taskfile.dump(request))
    except OSError as error:
        raise _undelivered(view.dirs, error) from error
    return id


def give(dirs: config.Directories, name: str) -> None:
    try:
        spool.deliver_control(dirs.inbox, name)
    except OSError as error:
        raise _undelivered(dirs, error) from error


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
    serving = view.health()[1]["status"] != "down"
    requests = [_read_task(name) for name in args.files]
    ids: list[str] = []
    refused: list[str] = []
    try:
        for request in requests:
            ids.append(_deliver(view, request))
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
            if not view.accepted(id):
                wait = 0.0  # a full queue takes none of them
        except Trouble as why:
            refused.append(f"{name}: {why}")
    return accepted, refused


def _parsed(name: str, file: BinaryIO) -> Request:
    """The request of a task file; the master knows its own limit."""
    return taskfile.parse(name, file.read(config.FILE_MOST + 1), max_bytes=config.FILE_MOST)


def _read_task(name: str) -> Request:
    try:
        if name == "-":
            return _parsed("-.md", sys.stdin.buffer)
        with open(name, "rb") as file:
            request = _parsed(os.path.basename(name), file)
        title = _title(os.path.basename(name))
        return request if request.title else replace(request, title=title)
    except OSError as error:
        status = Exit.PERMISSION if isinstance(error, PermissionError) else Exit.FAILED
        raise Trouble(status, f"{name}: {error.strerror}. Nothing was submitted") from error
    except taskfile.Refused as why:
        raise Trouble(Exit.FAILED, f"{name}: {why}. Nothing was submitted") from why


def retried(view: View, ids: list[str]) -> list[str]:
    """Ask for ended tasks to be run again; the new ids, as far as the master says them."""
    before = {str(task["id"]) for task in view.short_list()}
    serving = view.health()[1]["status"] != "down"
    for id in ids:
        give(view.dirs, f"{id}.retry")
    if not serving:
        print("codexd: not serving now; that waits in the inbox", file=sys.stderr)
    end = time.monotonic() + (WORD if serving else 0.0)
    while True:
        new = {t["retry_of"]: str(t["id"]) for t in view.short_list() if t["id"] not in before}
        if new.keys() >= set(ids) or time.monotonic() >= end:
            return [new[id] for id in ids if id in new]
        time.sleep(POLL)
