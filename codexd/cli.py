"""codexd: the command that people use.

Everything that changes something is a file put into the inbox; everything that
is shown is read from the state.  So it needs no lock, works while the daemon is
down, and has no more power than the inbox's permissions give.

Each verb is one function, found by its name in RUN; the parser is in `usage`,
`ask` and `submit` are in `submit`, `check` in `valid`.  stdout carries only what was asked for, all
else goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from codexd import config, controlfile, overview, report, taskfile
from codexd.config import FILE_MOST
from codexd.ledger import LedgerBroken
from codexd.lock import Locked
from codexd.model import State
from codexd.program import (
    Exit,
    Trouble,
    Unfailing,
    clean,
    directories,
    load,
    open_streams,
    refusal,
    silence,
)  # fmt: skip
from codexd.submit import (
    ask,
    give,
    goes_on,
    going_on,
    has_ended,
    retried,
    seconds,
    submit,
    task_of,
    until_drained,
    until_ended,
    view_of,
    watched,
)
from codexd.usage import parser
from codexd.valid import check
from codexd.view import Json, View, is_held

_LONGEST_NAME = 255  # bytes of a file's name


# --- serving ----------------------------------------------------------------------


def serve(args: argparse.Namespace) -> int:
    from codexd.serve import serve as run

    return run(args)


def install(args: argparse.Namespace) -> int:
    from codexd.install import install as run

    return run(args)


def uninstall(args: argparse.Namespace) -> int:
    from codexd.uninstall import uninstall as run

    return run(args)


def doctor(args: argparse.Namespace) -> int:
    from codexd.doctor import doctor as run

    return run(args)


def ledger(args: argparse.Namespace) -> int:
    from codexd.ledgerverbs import run

    return run(args)


def selftest(args: argparse.Namespace) -> int:
    from codexd.selftest import run

    return run(load(args))


# --- tasks ------------------------------------------------------------------------


def task_list(args: argparse.Namespace) -> int:
    view = view_of(args)
    tasks = view.short_list(args.state, args.session)
    report.dump(tasks) if hasattr(args, "json") else report.table(tasks)
    return Exit.DONE


def show(args: argparse.Namespace) -> int:
    view = view_of(args)
    task = task_of(view, args.id)
    report.dump(task) if hasattr(args, "json") else report.task(view.dirs, task)
    return Exit.DONE


def wait(args: argparse.Namespace) -> int:
    view = view_of(args)
    timeout, began = seconds(args.timeout), time.monotonic()
    tasks: list[Json] = []
    for id in args.ids:
        task_of(view, id)  # not after a wait for the others
    waited = list(args.ids)
    with going_on(args, waited):
        for id in args.ids:
            left = None if timeout is None else max(0.0, timeout - (time.monotonic() - began))
            tasks.append(until_ended(view, id, left, watched(view, lambda _: None)))
            if has_ended(tasks[-1]):
                waited.remove(id)
    report.dump(tasks) if hasattr(args, "json") else report.table(tasks)
    if waited:
        goes_on(args, waited)
    return _status(tasks)


def _status(tasks: Sequence[Json]) -> Exit:
    if not all(has_ended(task) for task in tasks):
        return Exit.UNFINISHED
    return Exit.DONE if all(t["state"] == State.DONE for t in tasks) else Exit.FAILED


def follow(args: argparse.Namespace) -> int:
    view = view_of(args)
    json = hasattr(args, "json")
    follower = report.progress(view.dirs, sys.stderr if json else sys.stdout)
    with going_on(args, [args.id]):
        task = until_ended(view, args.id, seconds(args.timeout), watched(view, follower))
    if json:
        report.dump(task)
    if not has_ended(task):
        goes_on(args, [args.id])
    return _status([task])


def control(args: argparse.Namespace) -> int:
    view = view_of(args)
    ids = []
    for id in args.ids:
        if args.control == "retry" and view.task(id) is None and view.is_lost(id):
            ids.append(id)  # how the ledger is repaired
            continue
        task = task_of(view, id)
        ids.append(str(task["id"]))
        if args.control == "retry" and not has_ended(task):
            raise Trouble(Exit.FAILED, f"task {id} has not ended; cancel it first, or wait")
        if args.control == "hold" and task["state"] == State.RUNNING:
            then = "it is held if it comes back to the queue; to end it: codexd task cancel"
            print(f"task {id} is running and goes on; {then}", file=sys.stderr)
    if args.control == "retry":
        new, refused = retried(view, ids)
        report.lines(new)
        if refused:
            raise Trouble(Exit.FAILED, "; ".join(refused))
        return Exit.DONE
    give(view, *(f"{id}.{args.control}" for id in ids))
    return Exit.DONE


def gate(args: argparse.Namespace) -> int:
    give(View(directories(args)), f"all.{args.verb}")
    return Exit.DONE


def drain(args: argparse.Namespace) -> int:
    timeout = seconds(args.timeout)
    if timeout is not None and not args.wait:
        raise Trouble(Exit.USAGE, "--timeout: only with --wait")
    view = View(directories(args))
    give(view, "all.drain")
    return until_drained(view, timeout) if args.wait else Exit.DONE


# --- sessions, memory, health, checks -----------------------------------------------


def session_list(args: argparse.Namespace) -> int:
    sessions = view_of(args).sessions()
    report.dump(sessions) if hasattr(args, "json") else report.sessions(sessions)
    return Exit.DONE


def session_show(args: argparse.Namespace) -> int:
    found = view_of(args).session(args.name)
    if found is None:
        raise Trouble(Exit.NO_TASK, f"there is no session {args.name}")
    report.dump(found) if hasattr(args, "json") else report.session(found)
    return Exit.DONE


def session_reset(args: argparse.Namespace) -> int:
    view = view_of(args)
    if view.session(args.name) is None:
        raise Trouble(Exit.NO_TASK, f"there is no session {args.name}")
    name = controlfile.Control(controlfile.Verb.RESET, args.name).name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        why = "its name is too long for a control file; say `resume: never` in its next task"
        raise Trouble(Exit.FAILED, f"session {args.name}: {why}")
    give(view, name)
    return Exit.DONE


def memory(args: argparse.Namespace) -> int:
    from codexd import memory as notes

    settings = load(args)
    view_of(args)
    given = (
        sys.stdin.buffer.read(FILE_MOST).decode("utf-8", "replace") if args.words == ["-"] else ""
    )
    text = given or " ".join(args.words)
    found = notes.search(
        list(settings.memory.paths),
        str(settings.workdir),
        text,
        hits=settings.memory.hits,
        chars=settings.memory.chars,
    )
    if hasattr(args, "json"):
        report.dump(report.hits(found))
    else:
        report.memory(found, args.explain)
    return Exit.DONE


def status(args: argparse.Namespace) -> int:
    if hasattr(args, "json"):
        health = View(directories(args)).health()[1]
        report.dump(health)
    else:
        view = view_of(args)
        health = view.health()[1]
        overview.status(view, health)
    if is_held(health):
        return Exit.UNAVAILABLE
    return Exit.FAILED if overview.problems(health) else Exit.DONE


def usage(args: argparse.Namespace) -> int:
    view = view_of(args)
    found = view.usage(args.by)
    report.dump(found) if hasattr(args, "json") else report.used(args.by, found)
    for damage in view.damaged:
        print(f"codexd: {clean(damage)}; not counted", file=sys.stderr)
    return Exit.DONE


def gc(args: argparse.Namespace) -> int:
    from codexd import sweep

    view_of(args)  # a mistyped --root has nothing old
    try:
        found, problems = (sweep.listed if args.dry_run else sweep.at_once)(load(args))
    except Locked:
        why = "a daemon serves here, and removes what is old by itself, once a day"
        raise Trouble(Exit.UNAVAILABLE, f"{why}; codexd gc --dry-run lists it") from None
    told = [{"kind": o.kind, "path": str(o.paths[0]), "bytes": o.bytes} for o in found]
    report.dump(told) if hasattr(args, "json") else report.removed(told)
    for problem in problems:
        print(f"codexd: {clean(_said(problem))}", file=sys.stderr)
    return Exit.FAILED if problems else Exit.DONE


# --- the program ------------------------------------------------------------------


RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    one.__name__: one
    for one in (
        ask, check, control, doctor, drain, follow, gate, gc, install, ledger, memory, selftest,
        serve, session_list, session_reset, session_show, show, status, submit, task_list,
        uninstall, usage, wait,
    )
}  # fmt: skip


def main() -> None:
    """Run the verb; every failure is one line on stderr and an exit status."""
    open_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    failing = sys.stderr
    sys.stderr = heard = Unfailing(
        failing.buffer, encoding=failing.encoding, errors="backslashreplace", line_buffering=True
    )
    try:
        args = parser().parse_args()
    except SystemExit:  # as of --help
        if why := _unprinted():
            _die(Exit.UNAVAILABLE, why)
        raise
    if args.run == "serve":
        heard.detach()
        sys.stderr = failing  # its log: on a disk that has room again, it goes on
    try:
        status = RUN[args.run](args)
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:  # who read us has seen enough
        silence(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except Trouble as trouble:
        _die(trouble.status, str(trouble))
    except taskfile.Refused as why:
        _die(Exit.USAGE, str(why))
    except config.ConfigError as why:
        _die(refusal(why), str(why))
    except PermissionError as error:
        _die(Exit.PERMISSION, _said(error))
    except OSError as error:
        _die(Exit.UNAVAILABLE, _unprinted() or _said(error))
    except LedgerBroken as broken:
        _die(Exit.UNAVAILABLE, str(broken))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _unprinted() -> str | None:
    """Why standard output does not take what was printed; None if it does."""
    try:
        sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)
        return f"standard output: {error.strerror}"
    return None


def _said(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what


def _die(status: Exit, text: str) -> None:
    print(f"codexd: {clean(text)}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
