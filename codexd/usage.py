"""The command line of codexd: every verb, option and argument.  Pure.

`run` of what was parsed is the name of the verb's function in `cli`; so the
manual can be compared with the parser, and nothing has to run for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from codexd import __version__
from codexd.model import State
from codexd.program import Parser, named, shared

_BY = ("day", "session", "model")
_FORMATS = ("json", "csv")


def _one(of: Sequence[str]) -> str:
    """The values that an option may have, for its help."""
    return f"{', '.join(of[:-1])} or {of[-1]}"


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top: argparse.ArgumentParser = Parser(
        prog="codexd", description="the spooler for the Codex CLI", parents=[shared()]
    )
    top.add_argument("--version", action="version", version=f"codexd {__version__}")
    top.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    _verb(verbs, "serve", "serve", "serve in the foreground: master, HTTP, and workers")
    _ask(_verb(verbs, "ask", "ask", "submit a task, wait, and print its answer", "json"))
    _task(_verb(verbs, "task", None, "tasks").add_subparsers(required=True, metavar="VERB"))
    _verb(verbs, "hold", "gate", "start no more tasks")
    drained = _verb(verbs, "drain", "drain", "start no more tasks; what runs goes on", "timeout")
    drained.add_argument("--wait", action="store_true", help="until none runs")
    _verb(verbs, "release", "gate", "start tasks again, and try now what was put off")
    _session(
        _verb(verbs, "session", None, "sessions").add_subparsers(required=True, metavar="VERB")
    )
    _memory(_verb(verbs, "memory", "memory", "what notes a task with these words is given", "json"))
    _verb(verbs, "status", "status", "one screen: is all well, and what is going on", "json")
    used = _verb(verbs, "usage", "usage", "tokens, by day, session or model", "json")
    used.add_argument("--by", choices=_BY, default=_BY[0], metavar="WHAT", help=_one(_BY))
    swept = _verb(verbs, "gc", "gc", "remove what is older than the configuration keeps", "json")
    swept.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
    found = _verb(verbs, "ledger", None, "the ledger")
    _ledger(found.add_subparsers(required=True, metavar="VERB"))
    _verb(verbs, "doctor", "doctor", "is this host ready? what mends it if not", "json")
    for name, what in (
        ("install", "lay down units for this installation"),
        ("uninstall", "take them away; tasks and answers stay"),
    ):
        _install(_verb(verbs, name, name, what))
    _verb(verbs, "selftest", "selftest", "two real turns with a scripted model: no account needed")
    check_ = _verb(verbs, "check", "check", "is this task file, or codexd.yaml, valid?", "json")
    check_.add_argument("files", nargs="+", metavar="FILE")
    return top


Verbs = argparse._SubParsersAction  # the only name that argparse has for it


def _verb(
    verbs: Verbs[argparse.ArgumentParser], name: str, run: str | None, what: str, *extra: str
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
    found.add_argument("-C", "--workdir", metavar="DIR", type=named, help="where Codex works")
    found.add_argument(
        "-o", "--option", metavar="KEY=VALUE", action="append", default=[],
        help="any key of a task file, such as -o priority=9 -o limits.memory=1G",
    )  # fmt: skip
    found.add_argument("--timeout", metavar="TIME", help="give up waiting after this time")
    found.add_argument("text", metavar="TEXT", help="what to do; - reads it from standard input")


def _task(verbs: Verbs[argparse.ArgumentParser]) -> None:
    one = _verb(verbs, "submit", "submit", "submit task files; print their ids", "json")
    one.add_argument("files", nargs="+", metavar="FILE", help="- reads one from standard input")
    one = _verb(verbs, "list", "task_list", "live tasks, and the last that ended", "json")
    states = [s.value for s in State]
    one.add_argument("--state", choices=states, metavar="STATE", help=f"only {_one(states)}")
    one.add_argument("--session", metavar="NAME", type=named, help="only those of this session")
    one = _verb(verbs, "show", "show", "everything about one task", "json")
    one.add_argument("id", metavar="ID")
    one = _verb(verbs, "wait", "wait", "wait until tasks have ended", "json", "timeout")
    one.add_argument("ids", nargs="+", metavar="ID")
    one = _verb(
        verbs,
        "follow",
        "follow",
        "show what Codex does, until the task has ended",
        "json",
        "timeout",
    )
    one.add_argument("id", metavar="ID")
    for name, what in (
        ("cancel", "end tasks, whatever they are doing"),
        ("retry", "submit ended tasks again; print the new ids"),
        ("hold", "keep queued tasks, and those behind them in their session, from starting"),
        ("release", "let held or waiting tasks start now"),
    ):
        one = _verb(verbs, name, "control", what)
        one.set_defaults(control=name)
        one.add_argument("ids", nargs="+", metavar="ID")


def _session(verbs: Verbs[argparse.ArgumentParser]) -> None:
    _verb(verbs, "list", "session_list", "all sessions", "json")
    one = _verb(verbs, "show", "session_show", "one session: its thread, totals and tasks", "json")
    one.add_argument("name", metavar="NAME")
    one = _verb(verbs, "reset", "session_reset", "forget the thread: the next task begins one")
    one.add_argument("name", metavar="NAME")


def _ledger(verbs: Verbs[argparse.ArgumentParser]) -> None:
    one = _verb(verbs, "verify", "ledger", "is every line of it sound?", "json")
    one.set_defaults(ledger="verify")
    one.add_argument("file", nargs="?", metavar="FILE", help="only this file")
    _verb(verbs, "compact", "ledger", "begin it anew; the old one is kept").set_defaults(
        ledger="compact"
    )
    one = _verb(verbs, "export", "ledger", "print every event, the oldest first", "json")
    one.set_defaults(ledger="export")
    one.add_argument(
        "--format", choices=_FORMATS, default=_FORMATS[0], metavar="FORMAT", help=_one(_FORMATS)
    )


def _install(found: argparse.ArgumentParser) -> None:
    found.add_argument("--user", action="store_true", help="for the user who calls it alone")
    found.add_argument(
        "--prefix", metavar="DIR", type=named, help="below DIR, and run nothing: for packages"
    )


def _memory(found: argparse.ArgumentParser) -> None:
    found.add_argument("--explain", action="store_true", help="also scores and matched terms")
    found.add_argument("words", nargs="+", metavar="WORDS", help="- reads them from standard input")
