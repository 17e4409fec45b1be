"""A root that a daemon was killed on, and everything that may lie in the place of its files.

`lived` makes the root: sessions with a past, a task that is queued, one that waits, and
five whose attempts ended and were not judged.  `FILES` has each kind of
file of the state, `THINGS` what is put in its place.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from codexd.directories import Directories
from codexd.model import Kind
from tests.daemon import Daemon
from tests.test_bad_input import FAKE

CONFIG = f"codex:\n  bin: {FAKE}\nworkers: 8\nlimits:\n  disk_free: 0\nhttp:\n  listen: off\n"
AT = "2026-11-23T07:20:11.123Z"
THREAD = "0199a213-81c0-7800-8aa1-bbab2a035a5{}"


def ident(name: str) -> str:
    return f"20261123t072011-{name:0<10}"


# --- the root -----------------------------------------------------------------------------

SESSIONS = ("good", "session", "transcript", "both")
QUEUED = "queued"
RUNNING = ("result", "events", "orders", "attempt", "others")


def task(session: str, key: str = "") -> str:
    return f"---\nsession: {session}\n{key and f'key: {key}'}\n---\nx"


def lived(root: Path) -> Daemon:
    """Not running; its files are those of a daemon that was killed."""
    daemon = Daemon(root, config=CONFIG)
    with daemon:
        for session in SESSIONS:
            daemon.drop(f"old-{session}.md", task(session, f"k{session}"))
        for session in SESSIONS:
            daemon.answer(f"old-{session}")
        daemon.drop("later.md", "---\nnot_before: 1d\n---\nx")
        assert daemon.stop() == 0
    _left(daemon, QUEUED, (Kind.QUEUED, {"session": QUEUED}))
    for number, session in enumerate(RUNNING):
        # What attempts before it have used; theirs is added.
        used = {"usage": {"input_tokens": 7}, "cost": {"cpu_seconds": 1.5}}
        ran: dict[str, object] = {"launches": 1, "attempts": 1, **used}
        _left(daemon, session, (Kind.QUEUED, {"session": session}), (Kind.RUNNING, ran))
        _attempt(daemon.dirs.tasks / ident(session), THREAD.format(number))
    return daemon


def _left(daemon: Daemon, session: str, *events: tuple[Kind, dict[str, object]]) -> None:
    daemon.left(ident(session), *events, at=AT)


def _attempt(home: Path, thread: str) -> None:
    """A whole turn in a first attempt; the result of it only for the first of them."""
    place = home / "1"
    place.mkdir()
    (place / "started").touch()
    (home / "beside").write_text("task x worked there at the same time")
    (place / "last.md").write_text("fine")
    orders = {"attempt": 1, "thread": None, "sandbox": "workspace-write", "verify": None}
    (place / "attempt.json").write_text(json.dumps(orders))
    usage = {"input_tokens": 100, "cached_input_tokens": 0, "output_tokens": 10}
    events: list[dict[str, object]] = [
        {"type": "thread.started", "thread_id": thread},
        {"type": "turn.started"},
        {"type": "item.completed", "item": {"id": "1", "type": "agent_message", "text": "fine"}},
        {"type": "turn.completed", "usage": usage},
    ]
    (place / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    result = {
        "outcome": "done", "message": "", "answer": "fine", "thread": thread, "exit_status": 0,
        "turn_started": True, "usage": usage, "cost": {"cpu_seconds": 1.5, "tasks_peak": 3},
        "verified": 0, "rounds": [{"answer": "a", "status": 1, "asked": "b"}], "ended": AT,
    }  # fmt: skip
    if home.name == ident("result"):
        (place / "result.json").write_text(json.dumps(result))


# --- its files ------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """One kind.  `told`: what the log or an answer says when there is no file in its place;
    `spoilt`: what when there is one with something else in it.  "" where neither loses
    anything: nobody has to know."""

    where: Callable[[Directories], Path]
    session: str = "good"
    told: str = ""
    spoilt: str = ""


def _attempted(session: str, name: str) -> Callable[[Directories], Path]:
    return lambda dirs: dirs.tasks / ident(session) / "1" / name


def _only(directory: Path, pattern: str) -> Path:
    return next(iter(sorted(directory.glob(pattern))))


LOST = "session.damaged"
KEY = "the record of key 'kboth' is damaged"
FILES: dict[str, File] = {
    "session": File(lambda d: d.sessions / "session.json", "session", LOST, LOST),
    "transcript": File(
        lambda d: d.transcripts / "transcript.jsonl", "transcript", "transcript.damaged"
    ),
    "both, session": File(lambda d: d.sessions / "both.json", "both", LOST, LOST),
    "both, transcript": File(
        lambda d: d.transcripts / "both.jsonl", "both", "transcript.damaged"
    ),
    "use of a day": File(
        lambda d: _only(d.usage, "*.json"), "good", "usage.damaged", "usage.damaged"
    ),
    "heartbeat": File(lambda d: d.heartbeat),
    "checkpoint": File(lambda d: d.checkpoint),
    "key": File(
        lambda d: d.keys / sha256(b"kboth").hexdigest(), "good", KEY, KEY
    ),
    "record": File(
        lambda d: d.tasks / ident(QUEUED) / "task.json", QUEUED,
        "task.json is damaged", "task.json is damaged",
    ),
    "record of a task that ran": File(
        lambda d: d.tasks / ident("others") / "task.json", "others",
    ),
    "result": File(
        _attempted("result", "result.json"), "result",
        "result.json is damaged", "result.json is damaged",
    ),
    "events": File(_attempted("events", "events.jsonl"), "events"),
    "orders": File(_attempted("orders", "attempt.json"), "orders"),
    "started": File(_attempted("others", "others"), "others"),
    "last message": File(_attempted("others", "last.md"), "others"),
    "note of others": File(lambda d: d.tasks / ident("others") / "beside", "others"),
    "attempt's directory": File(lambda d: d.tasks / ident("attempt") / "1", "attempt"),
    "configuration of Codex": File(lambda d: d.codex_home / "config.toml"),
    "end of an archived task": File(lambda d: _only(d.archive, "*/*/status.json")),
}  # fmt: skip


# --- and what lies in their place -------------------------------------------------------------

Make = Callable[[Path, bytes], object]
_NUMBER = re.compile(rb"(?<=[ :,\[])-?\d+(?:\.\d+)?(?=[\s,}\]])")
SPARSE = 8 << 30


def _numbers(*texts: bytes) -> Make:
    """Each number of it another one."""

    def make(path: Path, was: bytes) -> None:
        more = itertools.cycle(texts)
        path.write_bytes(_NUMBER.sub(lambda _: next(more), was))

    return make


def _device(path: Path, _: bytes) -> None:
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # zero: without an end


def _sparse(path: Path, was: bytes) -> None:
    path.write_bytes(was)
    os.truncate(path, SPARSE)


def _deep(levels: int) -> Make:
    """In each object of it, a value that is nested so deep."""
    value = b'{"deep":' + b"[" * levels + b"]" * levels
    return lambda path, was: path.write_bytes(
        b"\n".join(line.replace(b"{", value + b",", 1) for line in was.split(b"\n"))
    )


# Those that are no files.
OTHERS: dict[str, Make] = {
    "FIFO": lambda path, _: os.mkfifo(path),
    "directory": lambda path, _: path.mkdir(),
    "dangling link": lambda path, _: path.symlink_to("nowhere"),
    "link to /dev/zero": lambda path, _: path.symlink_to("/dev/zero"),
    "device": _device,
}
NUMBERS: dict[str, Make] = {
    "400 digits": _numbers(b"9" * 400),
    "odd numbers": _numbers(b"1e999", b"NaN", b"-7", b"1.5", b"true"),
}
THINGS: dict[str, Make] = {
    **OTHERS,
    "8 GiB, sparse": _sparse,
    "empty": lambda path, _: path.write_bytes(b""),
    "garbage": lambda path, _: path.write_bytes(b"\xff\0\n" * 999),
    "open brackets": lambda path, _: path.write_bytes(b"[" * 2000 + b"\n"),
    "400 levels": _deep(400),
    "5000 digits": _numbers(b"9" * 5000),
    **NUMBERS,
}


def put(path: Path, make: Make) -> None:
    """Something else in the place of a file, or where one may be."""
    was = b""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        was = path.read_bytes()
        path.unlink()
    make(path, was)
