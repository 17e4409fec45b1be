"""codexd ledger: verify, compact, export.

`verify` and `export` only read, also while a daemon serves; `compact` delivers
`all.compact`, which the daemon obeys.  Output is written as it is found, so a
history may have any length.

In CSV the cells are text that somebody else wrote: what steers a terminal is escaped,
and what a spreadsheet would take for a formula has an apostrophe before it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from typing import BinaryIO

from codexd import audit, report
from codexd.audit import Checked, Problem
from codexd.config import Directories
from codexd.model import Event
from codexd.program import Exit, Trouble, clean, directories
from codexd.submit import give
from codexd.view import View
from codexd.wire import json_text

# Facts with a column of their own; the others stand in the last one, in JSON.
_COLUMNS = ("session", "file", "title", "launches", "attempts", "outcome", "reason", "until",
            "thread", "message")  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def run(args: argparse.Namespace) -> int:
    """The verbs.  Raises Trouble, OSError, LedgerBroken."""
    dirs = directories(args)
    if args.ledger == "compact":
        give(View(dirs), "all.compact")
        return Exit.DONE
    try:
        return _verify(dirs, args) if args.ledger == "verify" else _export(dirs, args)
    except FileNotFoundError as error:
        raise Trouble(Exit.UNAVAILABLE, f"{error.filename}: there is none") from error


# --- verify ---------------------------------------------------------------------------


def _verify(dirs: Directories, args: argparse.Namespace) -> int:
    found: list[Problem] = []
    looked: list[Checked] = []

    def told(problems: Iterable[Problem]) -> None:
        for problem in problems:
            found.append(problem)
            if not hasattr(args, "json"):
                print(clean(_line(problem)))

    def look(file: BinaryIO) -> None:
        looked.append(Checked(file.name))
        told(audit.check(file, looked[-1], audit.is_written(dirs, file)))
        if not hasattr(args, "json"):
            print(clean(_summary(looked[-1])))

    if args.file is not None:
        with open(args.file, "rb") as one:
            look(one)
    else:
        for file in audit.files(dirs):
            look(file)
        if all(problem.kind != "format" for problem in found):  # else nobody can read it
            told(audit.compare(dirs))
    if hasattr(args, "json"):
        report.dump({"files": list(map(_checked, looked)), "problems": list(map(_json, found))})
    return Exit.FAILED if found else Exit.DONE


def _line(one: Problem) -> str:
    where = one.file if one.line is None else f"{one.file}:{one.line}: byte {one.byte}"
    return f"{where}: {one.what}"


def _summary(one: Checked) -> str:
    form = "unknown" if one.format is None else one.format
    sizes = f"{one.lines} lines, {one.bytes} bytes, {len(one.book.tasks)} live tasks"
    return f"{one.file}: format {form}, {sizes}"


def _json(one: Problem) -> dict[str, object]:
    return {name: getattr(one, name) for name in ("file", "line", "byte", "kind", "what")}


def _checked(one: Checked) -> dict[str, object]:
    told = {name: getattr(one, name) for name in ("file", "format", "lines", "bytes")}
    return {**told, "tasks": len(one.book.tasks)}


# --- export ---------------------------------------------------------------------------


def _export(dirs: Directories, args: argparse.Namespace) -> int:
    damaged = 0

    def told(what: str) -> None:
        nonlocal damaged
        damaged += 1
        print(f"codexd: {clean(what)}; left out", file=sys.stderr)

    found = audit.events(audit.files(dirs), told)
    if args.format == "csv":
        rows = csv.writer(sys.stdout, lineterminator="\n")
        rows.writerow(["at", "kind", "id", *_COLUMNS, "facts"])
        rows.writerows(map(_row, found))
    else:
        sys.stdout.writelines(map(_object, found))
    return Exit.FAILED if damaged else Exit.DONE


def _object(event: Event) -> str:
    told = {"at": event.at, "kind": event.kind, "id": event.id or None, "facts": event.facts}
    return json_text(told) + "\n"


def _row(event: Event) -> list[str]:
    facts = dict(event.facts)
    own = [_cell(facts.pop(name, None)) for name in _COLUMNS]
    return [event.at, event.kind, event.id, *own, json_text(facts) if facts else ""]


def _cell(value: object) -> str:
    text = "" if value is None else clean(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
