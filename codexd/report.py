"""What the command prints for people: tables, one screen of status, progress.

Pure output: reads what it is given (and a followed task's events), decides
nothing.  Text that somebody else wrote never reaches a terminal raw: control
characters are shown escaped.  Into a pipe, an answer goes byte for byte.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from codexd import durable, place
from codexd.codex import Reader
from codexd.config import Directories
from codexd.program import clean
from codexd.view import Json
from codexd.wire import json_text

if TYPE_CHECKING:
    from codexd.memory import Found

_SHORT = 60  # characters of a title in a table


def dump(value: object) -> None:
    print(json_text(value, indent=2))


def lines(values: Iterable[str]) -> None:
    """One value a line."""
    sys.stdout.writelines(f"{value}\n" for value in values)


def _show(text: str, stream: TextIO) -> None:
    """Print text: cleaned for a terminal, as it is for a pipe."""
    if stream.isatty():
        stream.write(clean(text, breaks=True))
    else:
        stream.flush()
        left = memoryview(text.encode("utf-8", "replace"))
        while left:  # an unbuffered stream may take a part only
            left = left[stream.buffer.write(left) :]
    stream.flush()


def count_of(number: object, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# --- one task ---------------------------------------------------------------------


def answer(dirs: Directories, task: Json) -> None:
    """The answer and exactly one newline, and nothing else, on stdout."""
    text = task.get("answer")
    if text is None:
        text = _from_file(dirs, task)
    _show(str(text).rstrip("\n") + "\n", sys.stdout)


def _from_file(dirs: Directories, task: Json) -> str:
    """An answer too long for JSON, out of its file: what follows the front matter."""
    name = os.path.basename(str(task["answer_file"]))
    data = (dirs.answers / name).read_bytes()  # as text, its line ends would be changed
    return data.partition(b"\n---\n")[2].decode("utf-8", "replace")


def sentence(task: Json) -> str:
    """One line on how a task stands."""
    parts = [f"task {task['id']} {task['state']}"]
    if task["outcome"] and task["outcome"] != task["state"]:
        parts.append(f"({task['outcome']})")
    if task["reason"]:
        parts.append(f"({task['reason']}" + (f" until {task['until']})" if task["until"] else ")"))
    if task["message"]:
        parts.append(f": {task['message']}")
    return clean(" ".join(parts).replace(" : ", ": "))


def task(dirs: Directories, task: Json) -> None:
    """All that is known of a task, then its answer."""
    for key, value in task.items():
        if key in ("answer", "usage", "cost") or value is None:
            continue
        print(f"{key + ':':13}{clean(value)}")
    for key in ("usage", "cost"):
        table = task[key]
        known = (
            [f"{k}={v}" for k, v in table.items() if v is not None]
            if isinstance(table, dict)
            else []
        )
        if known:
            print(f"{key + ':':13}{' '.join(known)}")
    if task["state"] == "done":
        print()
        answer(dirs, task)


def progress(dirs: Directories, stream: TextIO = sys.stderr) -> Callable[[Json], None]:
    """A function to call with a task again and again; it tells what is new."""
    last = ""
    reader: Reader | None = None
    file, offset = "", 0

    def told(task: Json) -> None:
        nonlocal last, reader, file, offset
        if task["state"] == "running":
            path = _events(dirs, str(task["id"]))
            if path and path != file:
                file, offset, reader = path, 0, Reader()
            if reader is not None and file:
                offset = _feed(reader, file, offset)
        now = sentence(task)
        if task["state"] == "running" and reader is not None:
            doing = reader.activity.removeprefix("running: ")
            now = f"task {task['id']} running: {clean(doing)}"
        if now != last:
            last = now
            print(f"{time.strftime('%H:%M:%S')} {now}", file=stream, flush=True)

    return told


def _events(dirs: Directories, id: str) -> str | None:
    """The events of the latest attempt."""
    try:
        numbers = [int(n) for n in os.listdir(dirs.tasks / id) if n.isdigit()]
    except FileNotFoundError:
        return None
    return str(place.attempt(dirs, id, max(numbers)) / "events.jsonl") if numbers else None


def _feed(reader: Reader, path: str, offset: int) -> int:
    try:
        with open(path, "rb", opener=durable.opened) as file:
            file.seek(offset)
            data = file.read()
    except (FileNotFoundError, durable.NotAFile):
        return offset  # Codex has not begun, or the task has just ended
    reader.feed(data)
    return offset + len(data)


def checks(found: Sequence[Json]) -> None:
    """What is wrong with files, in the way of compilers."""
    for one in found:
        where = f"{one['file']}:{one['line']}" if one["line"] else one["file"]
        told = one["reason"] or "ok"
        print(clean(f"{where}: {told}"))


# --- tables -----------------------------------------------------------------------


def rows(head: Sequence[str], lines: Iterable[Sequence[object]], numbers: int = 0) -> None:
    """A table with aligned columns, `numbers` first; the last one is as long as it likes."""
    table = [list(head), *([clean(cell) for cell in line] for line in lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(head) - 1)]
    for line in table:
        cells = [
            cell.rjust(width) if i < numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        print("  ".join([*cells, line[-1]]).rstrip())


def table(tasks: Sequence[Json]) -> None:
    rows(
        ("ID", "STATE", "OUTCOME", "SESSION", "CREATED", "WHAT"),
        (
            (t["id"], t["state"], t["outcome"] or t["reason"] or "-", _session(t),
             str(t["created"] or "-")[:19], what_of(t))
            for t in tasks
        ),
    )  # fmt: skip


def _session(task: Json) -> str:
    return "-" if task["session"] == task["id"] else str(task["session"])[:30]


def what_of(task: Json) -> str:
    return str(task["title"] or task["file"] or "")[:_SHORT]


def sessions(found: Sequence[Json]) -> None:
    rows(
        ("SESSION", "THREAD", "TASKS", "UPDATED"),
        ((s["name"], s["thread"] or "-", s["tasks"], s["updated"] or "-") for s in found),
    )


def session(found: Json) -> None:
    for key, value in found.items():
        text = " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        text = " ".join(text) if isinstance(text, list) else text
        print(f"{key + ':':12}{clean('-' if text in (None, '') else text)}")


# --- use ------------------------------------------------------------------------------


def used(by: str, found: Sequence[Json]) -> None:
    """Tokens by day, session or model."""
    rows(
        ("TOKENS", "IN", "CACHED", "OUT", "REASONING", "ATTEMPTS", by.upper()),
        ((*(str(u[k]) for k in _USED), "-" if u[by] in (None, "") else u[by]) for u in found),
        len(_USED),
    )


_USED = ("tokens", "input_tokens", "cached_input_tokens", "output_tokens",
         "reasoning_output_tokens", "attempts")  # fmt: skip


# --- what is old ----------------------------------------------------------------------


def removed(found: Sequence[Json]) -> None:
    """What was, or would be, removed; on stderr how much of each kind that is."""
    totals: dict[str, list[int]] = {}
    for one in found:
        size = int(str(one["bytes"]))
        print(clean(f"{one['kind']:9}{size:>12}  {one['path']}"))
        totals.setdefault(str(one["kind"]), []).append(size)
    for kind, sizes in totals.items():
        print(f"{kind}: {len(sizes)}, {sum(sizes)} bytes", file=sys.stderr)
    if not totals:
        print("nothing is old enough", file=sys.stderr)


# --- memory -------------------------------------------------------------------------


def hits(found: Found) -> list[Json]:
    return [
        {"path": h.path, "line": h.line, "end": h.end, "score": round(h.score, 3), "text": h.text}
        for h in found.hits
    ]


def memory(found: Found, explain: bool) -> None:
    """The excerpts as they would be quoted, and on stderr what was found how."""
    for hit in found.hits:
        print(clean(f"{hit.path}:{hit.line}"))
        if explain:
            print(clean(f"  score {hit.score:.3f}; terms: {' '.join(sorted(hit.terms))}"))
        print("".join(f"  {clean(line)}\n" for line in hit.text.splitlines()))
    told = "no note fits"
    if found.hits:
        excerpts = count_of(len(found.hits), "excerpt")
        told = f"{excerpts} by {found.tool} in {found.seconds * 1000:.0f} ms"
    print(told + (f"; {found.note}" if found.note else ""), file=sys.stderr)
