"""codexd: the command that people use.

Everything that changes something is a file put into the inbox; everything that
is shown is read from the state.  So it needs no lock, works while the daemon is
down, and has no more power than the inbox's permissions give.

Each verb is one function; `parser` is pure, so that the manual can be compared
with it.  stdout carries only what was asked for, all else goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from codexd import __version__, config, report, spool, taskfile
from codexd.document import Document, Form, Scalar
from codexd.ledger import LedgerBroken
from codexd.model import Note, Request, State
from codexd.program import Exit, directories, load, shared
from codexd.view import Json, View

Verb = Callable[[argparse.Namespace], int]

POLL = 0.03  # seconds between looks at the ledger while somebody waits
_WORD = 5.0  # seconds to wait for the master's word on a submission
_MOST = 64 << 20  # bytes read of a task file; the master knows its own limit
_LONGEST_NAME = 255  # bytes of a file's name


class Trouble(Exception):
    """Why a command cannot be carried out, with its exit status."""

    def __init__(self, status: Exit, text: str) -> None:
        super().__init__(text)
        self.status = status


# --- the parser -----------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="codexd", description="the spooler for the Codex CLI", parents=[shared()]
    )
    top.add_argument("--version", action="version", version=f"codexd {__version__}")
    top.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    _verb(verbs, "serve", serve, "serve in the foreground: master, HTTP, and workers")
    _ask(_verb(verbs, "ask", ask, "submit a task, wait, and print its answer", "json"))
    _task(_verb(verbs, "task", None, "tasks").add_subparsers(required=True, metavar="VERB"))
    _verb(verbs, "hold", gate, "start no more tasks")
    _verb(verbs, "release", gate, "start tasks again, and try now what was put off")
    _session(
        _verb(verbs, "session", None, "sessions").add_subparsers(required=True, metavar="VERB")
    )
    _memory(_verb(verbs, "memory", memory, "what notes a task with these words is given", "json"))
    _verb(verbs, "status", status, "one screen: is all well, and what is going on", "json")
    _verb(verbs, "selftest", selftest, "one real turn against a scripted model: no account needed")
    check_ = _verb(verbs, "check", check, "is this task file, or codexd.yaml, valid?")
    check_.add_argument("files", nargs="+", metavar="FILE")
    return top


Verbs = argparse._SubParsersAction  # the only name that argparse has for it


def _verb(
    verbs: Verbs[argparse.ArgumentParser], name: str, run: Verb | None, what: str, *extra: str
) -> argparse.ArgumentParser:
    found = verbs.add_parser(name, help=what, description=what, parents=[shared()])
    if run:
        found.set_defaults(run=run)
    if "json" in extra:
        found.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON"
        )
    if "timeout" in extra:
        found.add_argument("--timeout", metavar="TIME", help="give up waiting after this time")
    return found


def _ask(found: argparse.ArgumentParser) -> None:
    found.add_argument("-s", "--session", metavar="NAME", help="continue this session")
    found.add_argument("-C", "--workdir", metavar="DIR", help="where Codex works")
    found.add_argument(
        "-o", "--option", metavar="KEY=VALUE", action="append", default=[],
        help="any key of a task file, such as -o priority=9 -o timeout=2h",
    )  # fmt: skip
    found.add_argument("--timeout", metavar="TIME", help="give up waiting after this time")
    found.add_argument("text", metavar="TEXT", help="what to do; - reads it from standard input")


def _task(verbs: Verbs[argparse.ArgumentParser]) -> None:
    one = _verb(verbs, "submit", submit, "put task files into the inbox; print their ids", "json")
    one.add_argument("files", nargs="+", metavar="FILE", help="- reads one from standard input")
    one = _verb(verbs, "list", task_list, "live tasks, and the last that ended", "json")
    one.add_argument("--state", choices=[s.value for s in State])
    one.add_argument("--session", metavar="NAME")
    one = _verb(verbs, "show", show, "everything about one task", "json")
    one.add_argument("id", metavar="ID")
    one = _verb(verbs, "wait", wait, "wait until tasks have ended", "json", "timeout")
    one.add_argument("ids", nargs="+", metavar="ID")
    one = _verb(
        verbs, "follow", follow, "show what Codex does, until the task has ended", "timeout"
    )
    one.add_argument("id", metavar="ID")
    for name, what in (
        ("cancel", "end tasks, whatever they are doing"),
        ("retry", "submit ended tasks again"),
        ("hold", "keep queued tasks, and those behind them in their session, from starting"),
        ("release", "let held or waiting tasks start now"),
    ):
        one = _verb(verbs, name, control, what)
        one.set_defaults(control=name)
        one.add_argument("ids", nargs="+", metavar="ID")


def _session(verbs: Verbs[argparse.ArgumentParser]) -> None:
    _verb(verbs, "list", session_list, "all sessions", "json")
    one = _verb(verbs, "show", session_show, "one session: its thread, totals and tasks", "json")
    one.add_argument("name", metavar="NAME")
    one = _verb(verbs, "reset", session_reset, "forget the thread: the next task begins a new one")
    one.add_argument("name", metavar="NAME")


def _memory(found: argparse.ArgumentParser) -> None:
    found.add_argument("--explain", action="store_true", help="also scores and matched terms")
    found.add_argument("words", nargs="+", metavar="WORDS", help="- reads them from standard input")


def _view(args: argparse.Namespace) -> View:
    """The state; a mistyped --root is not an empty one."""
    view = View(directories(args))
    if not view.dirs.inbox.is_dir():
        where = f"there is no inbox {view.dirs.inbox}"
        raise Trouble(Exit.UNAVAILABLE, f"{where}: was `codexd serve` ever started there?")
    return view


# --- serving ----------------------------------------------------------------------


def serve(args: argparse.Namespace) -> int:
    from codexd.serve import serve as run

    return run(args)


def selftest(args: argparse.Namespace) -> int:
    from codexd.selftest import run

    return run(load(args))


# --- submitting -------------------------------------------------------------------


def ask(args: argparse.Namespace) -> int:
    view = View(directories(args))
    well, health = view.health()
    if not well and health["status"] == "down":
        raise Trouble(
            Exit.UNAVAILABLE,
            f"codexd is not serving {view.dirs.state}: start it with `codexd serve` or "
            "`systemctl start codexd`. Nothing was submitted",
        )
    timeout = _seconds(args.timeout)
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
    return Exit.FAILED if _ended(task) else Exit.UNFINISHED


def _request(args: argparse.Namespace) -> Request:
    """The request of `ask`, checked as a task file is."""
    text = _standard_input() if args.text == "-" else args.text
    values: dict[str, object] = {"prompt": Scalar(text, Form.TEXT)}
    for option in args.option:
        key, found, value = option.partition("=")
        if not found or key == "prompt":
            raise Trouble(Exit.USAGE, f"-o {option}: it must be KEY=VALUE, and no prompt")
        several = [Scalar(part, Form.PLAIN) for part in value.split(",")]
        values[key] = several if key in ("images", "add_dirs") else Scalar(value, Form.PLAIN)
    if args.session is not None:
        values["session"] = Scalar(args.session, Form.TEXT)
    if args.workdir is not None:
        values["workdir"] = Scalar(os.path.abspath(args.workdir), Form.TEXT)
    request = taskfile.from_mapping(Document(values))
    return request if request.title else replace(request, title=_title(request.prompt))


def _standard_input() -> str:
    """A prompt from standard input, checked as a file of plain text is."""
    try:
        return taskfile.parse("-", sys.stdin.buffer.read(_MOST + 1), max_bytes=_MOST).prompt
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
        raise _undelivered(view.dirs.inbox, error) from error
    return id


def _control(inbox: Path, name: str) -> None:
    try:
        spool.deliver_control(inbox, name)
    except OSError as error:
        raise _undelivered(inbox, error) from error


def _undelivered(inbox: Path, error: OSError) -> Trouble:
    """Why the inbox did not take a file."""
    if isinstance(error, PermissionError):
        why = "you may not put files there; those of its group may"
        return Trouble(Exit.PERMISSION, f"{inbox}: {why}")
    if isinstance(error, FileNotFoundError):
        return Trouble(Exit.UNAVAILABLE, f"there is no inbox {inbox}: was codexd started here?")
    return Trouble(Exit.UNAVAILABLE, f"{inbox}: {error.strerror}")


def _word(view: View, id: str, seconds: float = _WORD) -> str:
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
    view = _view(args)
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
    wait = _WORD
    for id, name in zip(ids, names, strict=True):
        try:
            accepted.append(_word(view, id, wait))
            if not view.accepted(id):
                wait = 0.0  # a full queue takes none of them
        except Trouble as why:
            refused.append(f"{name}: {why}")
    return accepted, refused


def _read_task(name: str) -> Request:
    try:
        if name == "-":
            return taskfile.parse("-.md", sys.stdin.buffer.read(_MOST + 1), max_bytes=_MOST)
        with open(name, "rb") as file:
            data = file.read(_MOST + 1)
        request = taskfile.parse(os.path.basename(name), data, max_bytes=_MOST)
        title = _title(os.path.basename(name))
        return request if request.title else replace(request, title=title)
    except OSError as error:
        status = Exit.PERMISSION if isinstance(error, PermissionError) else Exit.FAILED
        raise Trouble(status, f"{name}: {error.strerror}. Nothing was submitted") from error
    except taskfile.Refused as why:
        raise Trouble(Exit.FAILED, f"{name}: {why}. Nothing was submitted") from why


# --- tasks ------------------------------------------------------------------------


def _ended(task: Json) -> bool:
    return State(str(task["state"])).ended


def _task_of(view: View, id: str) -> Json:
    found = view.task(id)
    if found is None:
        verdict = view.verdict(id)
        if verdict and verdict.kind is Note.REJECTED:
            raise Trouble(Exit.FAILED, f"{id} was rejected: {verdict.facts.get('reason')}")
        raise Trouble(Exit.NO_TASK, f"there is no task {id}")
    return found


def until_ended(view: View, id: str, timeout: float | None, told: Callable[[Json], None]) -> Json:
    """The task as it ended, or as it was at the timeout (seconds)."""
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        task = _task_of(view, id)
        told(task)
        if _ended(task) or (end is not None and time.monotonic() >= end):
            return task
        time.sleep(POLL)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = config.TIMEOUT.read(Scalar(text, Form.PLAIN))
    if found is None:
        raise Trouble(Exit.USAGE, f"--timeout {text}: it must be {config.TIMEOUT.allowed}")
    return found


def task_list(args: argparse.Namespace) -> int:
    view = _view(args)
    tasks = view.short_list(args.state, args.session)
    report.dump(tasks) if hasattr(args, "json") else report.table(tasks)
    return Exit.DONE


def show(args: argparse.Namespace) -> int:
    view = _view(args)
    task = _task_of(view, args.id)
    report.dump(task) if hasattr(args, "json") else report.task(view.dirs, task)
    return Exit.DONE


def wait(args: argparse.Namespace) -> int:
    view = _view(args)
    timeout, began = _seconds(args.timeout), time.monotonic()
    tasks = []
    for id in args.ids:
        left = None if timeout is None else max(0.0, timeout - (time.monotonic() - began))
        tasks.append(until_ended(view, id, left, lambda _: None))
    report.dump(tasks) if hasattr(args, "json") else report.table(tasks)
    return _status(tasks)


def _status(tasks: Sequence[Json]) -> Exit:
    if not all(_ended(task) for task in tasks):
        return Exit.UNFINISHED
    return Exit.DONE if all(t["state"] == State.DONE for t in tasks) else Exit.FAILED


def follow(args: argparse.Namespace) -> int:
    view = _view(args)
    follower = report.progress(view.dirs, sys.stdout)
    task = until_ended(view, args.id, _seconds(args.timeout), follower)
    return _status([task])


def control(args: argparse.Namespace) -> int:
    view = _view(args)
    for id in args.ids:
        task = _task_of(view, id)
        if args.control == "retry" and not _ended(task):
            raise Trouble(Exit.FAILED, f"task {id} has not ended; cancel it first, or wait")
    for id in args.ids:
        _control(view.dirs.inbox, f"{id}.{args.control}")
    return Exit.DONE


def gate(args: argparse.Namespace) -> int:
    _control(directories(args).inbox, f"all.{args.verb}")
    return Exit.DONE


# --- sessions, memory, health, checks -----------------------------------------------


def session_list(args: argparse.Namespace) -> int:
    sessions = _view(args).sessions()
    report.dump(sessions) if hasattr(args, "json") else report.sessions(sessions)
    return Exit.DONE


def session_show(args: argparse.Namespace) -> int:
    found = _view(args).session(args.name)
    if found is None:
        raise Trouble(Exit.NO_TASK, f"there is no session {args.name}")
    report.dump(found) if hasattr(args, "json") else report.session(found)
    return Exit.DONE


def session_reset(args: argparse.Namespace) -> int:
    view = _view(args)
    if view.session(args.name) is None:
        raise Trouble(Exit.NO_TASK, f"there is no session {args.name}")
    name = taskfile.Control(taskfile.Verb.RESET, args.name).name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        why = "its name is too long for a control file; say `resume: never` in its next task"
        raise Trouble(Exit.FAILED, f"session {args.name}: {why}")
    _control(view.dirs.inbox, name)
    return Exit.DONE


def memory(args: argparse.Namespace) -> int:
    from codexd import memory as notes

    settings = load(args)
    given = sys.stdin.buffer.read(_MOST).decode("utf-8", "replace") if args.words == ["-"] else ""
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
    view = View(directories(args))
    well, health = view.health()
    if hasattr(args, "json"):
        report.dump(health)
    else:
        report.status(view, well, health)
    return Exit.DONE if well else Exit.UNAVAILABLE


def check(args: argparse.Namespace) -> int:
    bad = 0
    for name in args.files:
        try:
            if os.path.basename(name) == "codexd.yaml":
                dirs = directories(argparse.Namespace(**{**vars(args), "config": name}))
                config.load(dirs, explicit=True)
            else:
                taskfile.parse(os.path.basename(name), Path(name).read_bytes())
            print(f"{name}: ok")
        except taskfile.Refused as why:
            bad += 1
            print(f"{name}:{why.line}: {why.reason}" if why.line else f"{name}: {why.reason}")
        except config.ConfigError as why:
            bad += 1
            print(why)
        except OSError as error:
            bad += 1
            print(f"{name}: {error.strerror}")
    return Exit.FAILED if bad else Exit.DONE


# --- the program ------------------------------------------------------------------


def main() -> None:
    """Run the verb; every failure is one line on stderr and an exit status."""
    args = parser().parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = args.run(args)
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:
        # Who read us has seen enough.  Python writes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Trouble as trouble:
        _die(trouble.status, str(trouble))
    except taskfile.Refused as why:
        _die(Exit.USAGE, str(why))
    except config.ConfigError as why:
        _die(Exit.CONFIGURATION, str(why))
    except PermissionError as error:
        _die(Exit.PERMISSION, _said(error))
    except OSError as error:
        _die(Exit.UNAVAILABLE, _said(error))
    except LedgerBroken as broken:
        _die(Exit.UNAVAILABLE, str(broken))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _said(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what


def _die(status: Exit, text: str) -> None:
    print(f"codexd: {report.clean(text)}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
