"""What Codex leaves of a thread in CODEX_HOME: its rollout.

A rollout is sessions/YYYY/MM/DD/rollout-TIME-THREAD.jsonl, one JSON object a
line, which Codex appends to while it works; the day is the local one on which
the thread began.  It tells what the event stream does not: what a turn has used
before it ends, or when it never does, and which model answered.

Promises: nothing here writes; links are not followed; what cannot be read, is
torn or is unknown counts as not there; no more than the end of a file is read,
and the day of a thread is known from its id, so the answer does not depend on
how many there are.  Part of the room `codex`, which is the door to it.  Lean:
the worker uses it.
"""

from __future__ import annotations

import json
import os
import re
import time

from codexd import durable, sane
from codexd.events import THREAD_PATTERN, as_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

_ROLLOUT = rf"rollout-.*-({THREAD_PATTERN})\.jsonl"
_ROLLOUTS = 200_000  # directory entries looked at
_TAILS = (1 << 18, 1 << 25)  # bytes read from the end of a rollout, in turn
_DAY = 86400


def all_rollouts(home: str) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Every rollout below `home` with its thread id, newest directory first.

    Raises OSError.
    """
    stack, seen = [os.path.join(home, "sessions")], 0
    while stack:
        with os.scandir(stack.pop()) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            seen += 1
            if seen > _ROLLOUTS:
                return
            if entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)
            elif name := _thread_of(entry):
                yield entry, name


def _thread_of(entry: os.DirEntry[str]) -> str | None:
    found = re.fullmatch(_ROLLOUT, entry.name)
    return found[1].lower() if found and entry.is_file(follow_symlinks=False) else None


def rollouts(home: str, thread: str, *, everywhere: bool = True) -> Iterator[str]:
    """The paths of a thread's rollouts; Codex makes one.

    First where its id says; then, if none is there and `everywhere`, in all of
    them.  Raises OSError.
    """
    wanted, missing = thread.lower(), True
    for day in _days(wanted):
        try:
            with os.scandir(os.path.join(home, "sessions", day)) as entries:
                for entry in entries:
                    if wanted in entry.name.lower() and _thread_of(entry) == wanted:
                        missing = False
                        yield entry.path
        except (FileNotFoundError, NotADirectoryError):
            continue
    if missing and everywhere:
        yield from (entry.path for entry, name in all_rollouts(home) if name == wanted)


def _days(thread: str) -> list[str]:
    """Where the rollout of a thread lies whose id has its time: a UUID of version 7."""
    if thread[14:15] != "7":
        return []
    began = int(thread.replace("-", "")[:12], 16) / 1000
    # The local day of some other process: that of UTC, or one of its neighbours.
    return [time.strftime("%Y/%m/%d", time.gmtime(began + off)) for off in (0, -_DAY, _DAY)]


def _lines(path: str) -> Iterator[bytes]:
    """The last lines of a rollout, the last first; a cut first one is left out.

    They come twice where the short look did not satisfy the reader.
    """
    with open(path, "rb", opener=durable.opened) as file:
        size = file.seek(0, os.SEEK_END)
        for tail in _TAILS:
            start = max(0, size - tail)
            file.seek(start)
            lines = file.read(tail).split(b"\n")
            yield from reversed(lines[1:] if start else lines)
            if not start:
                return


def _record(line: bytes, kinds: tuple[bytes, ...]) -> tuple[str, dict[str, Any]]:
    """Type and payload of a line that names one of `kinds`; else ("", {})."""
    if not any(kind in line for kind in kinds):
        return "", {}
    try:
        record = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return "", {}  # the last line may be torn
    payload = record.get("payload") if isinstance(record, dict) else None
    if not isinstance(payload, dict):
        return "", {}
    outer = as_text(record.get("type"))
    return (as_text(payload.get("type")) if outer == "event_msg" else outer), payload


# --- what was said ------------------------------------------------------------


def rollout_message(home: str, thread: str) -> str | None:
    """The last message of the thread's last turn, from its rollout in CODEX_HOME `home`.

    None if there is no rollout, if it cannot be read, or if a later turn was
    begun and not ended: then the message would be an older turn's answer.
    """
    try:
        for path in rollouts(home, thread):
            for line in _lines(path):
                kind, payload = _record(line, (b'"task_complete"', b'"task_started"'))
                if kind == "task_complete":
                    return as_text(payload.get("last_agent_message")) or None
                if kind == "task_started":
                    return None
            return None
    except OSError:
        return None  # this is the fallback: what it cannot read is not known
    return None


# --- what was used ------------------------------------------------------------


def spent(home: str, thread: str) -> tuple[dict[str, int], str | None]:
    """Tokens of the whole thread up to now, and the model that answered last.

    {} and None where that is not known.
    """
    try:
        path = next(rollouts(home, thread, everywhere=False), "")
        return _spent_in(path) if path else ({}, None)
    except OSError:
        return {}, None


def _spent_in(path: str, model: str = "") -> tuple[dict[str, int], str | None]:
    """`spent` in one file; a `model` that is given is not looked for."""
    usage: dict[str, int] = {}
    for line in _lines(path):
        usage, model = _told(line, usage, model)
        if usage and model:
            break
    return usage, model or None


def _told(line: bytes, usage: dict[str, int], model: str) -> tuple[dict[str, int], str]:
    """What is known after one more line, looking backwards: what is known stands."""
    kind, payload = _record(line, (b'"token_count"', b'"turn_context"'))
    if kind == "turn_context":
        return usage, model or as_text(payload.get("model"))[:100]
    if kind == "token_count" and not usage:
        info = payload.get("info")
        total = info.get("total_token_usage") if isinstance(info, dict) else None
        if isinstance(total, dict):
            usage = {k: v for k, v in total.items() if sane.is_count(v)}
    return usage, model


def tokens(usage: Mapping[str, int]) -> int:
    """What counts against a limit: all that went in, cached or not, and all that came out."""
    return usage.get("input_tokens", 0) + usage.get("output_tokens", 0)


class Meter:
    """What a turn has used so far, while it goes on.

    Codex writes the tokens of each answer of the model down in the rollout.
    Where there is none, nothing counts until the end.
    """

    def __init__(self, home: str, thread: str | None) -> None:
        """Made as the turn begins, in `thread` or in a new one."""
        self.home = home
        self.used = 0  # tokens
        self._before = tokens(spent(home, thread)[0]) if thread else 0
        self._path = ""
        self._size = -1

    def look(self, thread: str | None) -> int:
        """`used`, brought up to date."""
        try:
            if thread and not self._path:
                self._path = next(rollouts(self.home, thread, everywhere=False), "")
            size = os.stat(self._path).st_size if self._path else -1
            if size != self._size:
                total = tokens(_spent_in(self._path, "any")[0])
                self.used = max(self.used, total - self._before)
                self._size = size
        except OSError:
            pass  # it comes with the first answer
        return self.used
