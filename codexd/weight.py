"""How much there is of what has a time, and from when: the measure of retention.

It only looks: at the files that codexd made, by their names, never through a link.
What is to fit into a size loses its oldest first; to find where that begins, all of
it is weighed by the minute in which it was written, so a million files are a few
thousand numbers.

Every look is in small steps: an iterator gives None where one may pause.  Raises
OSError for a directory that cannot be read.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from codexd import codex, durable
from codexd.config import Directories
from codexd.model import ID_PATTERN, is_id

_BREATH = 50  # entries looked at between two pauses
_MINUTE = 60.0
YOUNG = 3600.0  # seconds; what is younger stays, however much it is
ANSWER = re.compile(rf"(?:[A-Za-z0-9._-]{{1,100}}\.)?({ID_PATTERN})\.md", re.ASCII)
SESSION = re.compile(r"([A-Za-z0-9%._~+-]{1,200})\.(json|damaged)", re.ASCII)
TRANSCRIPT = re.compile(r"([A-Za-z0-9%._~+-]{1,200})\.jsonl", re.ASCII)
MONTH = re.compile(r"[0-9]{4}-[0-9]{2}", re.ASCII)

Piece = tuple[float, int]  # when it was last written, in epoch seconds; its bytes


class Weight:
    """Bytes by the time of their writing."""

    def __init__(self) -> None:
        self._minutes: dict[int, int] = {}

    def add(self, at: float, size: int) -> None:
        minute = int(at // _MINUTE)
        self._minutes[minute] = self._minutes.get(minute, 0) + size

    def before(self, most: float, now: float) -> float:
        """What was written before this time has to go, for the rest to take `most` bytes.

        Minus infinity when nothing has to.
        """
        rest, found = sum(self._minutes.values()), -math.inf
        for minute in sorted(self._minutes):
            if rest <= most:
                break
            rest -= self._minutes[minute]
            found = min((minute + 1) * _MINUTE, now - YOUNG)
        return found


# --- what is there ------------------------------------------------------------------


def entries(directory: Path) -> Iterator[os.DirEntry[str] | None]:
    """What is in a directory, which need not be there; None now and then, to pause."""
    try:
        with os.scandir(directory) as found:
            for number, entry in enumerate(found, 1):
                yield entry
                if not number % _BREATH:
                    yield None
    except FileNotFoundError:
        return


def tasks(archive: Path) -> Iterator[os.DirEntry[str] | None]:
    """The directories of ended tasks, and of those whose removal was broken off."""
    for month in entries(archive):
        if month and MONTH.fullmatch(month.name) and not month.is_symlink():
            for entry in entries(Path(month.path)):
                if entry is None or entry.is_dir(follow_symlinks=False):
                    yield entry


def attempts(task: str) -> list[Path]:
    """What an ended task's attempts left: its directories N."""
    with os.scandir(task) as found:
        mine = [e for e in found if e.name.isdigit() and e.is_dir(follow_symlinks=False)]
    return [Path(entry.path) for entry in mine]


def tree(path: str | Path) -> int:
    """Bytes of all files below a directory."""
    found = (os.path.join(at, name) for at, _, names in os.walk(path) for name in names)
    return sum(room(os.lstat(file)) for file in found)


def room(found: os.stat_result) -> int:
    """Bytes that a file takes: of its holes none, or a sparse one would cost all others."""
    return min(found.st_size, found.st_blocks * 512)


def threads_of(path: Path) -> set[str]:
    """Codex's threads that a session's file names; a damaged one names none.  Raises OSError."""
    try:
        data = durable.read_json(path, 1 << 20)
    except (FileNotFoundError, ValueError):
        return set()
    return valid(data.get("thread"), data.get("forgotten"))


def valid(*threads: object) -> set[str]:
    return {t.lower() for t in threads if isinstance(t, str) and codex.is_thread_id(t)}


# --- what it weighs -----------------------------------------------------------------


def of_answers(dirs: Directories) -> Iterator[Piece | None]:
    for entry in entries(dirs.answers):
        yield _piece(entry) if entry and ANSWER.fullmatch(entry.name) else None


def of_rejected(dirs: Directories) -> Iterator[Piece | None]:
    """Each file at the time of its rejection, which is that of its reason."""
    for entry in entries(dirs.rejected):
        if entry and entry.name.endswith(".reason") and (why := _piece(entry)):
            what = _size(entry.path.removesuffix(".reason"))
            yield why[0], why[1] + what
        else:
            yield None


def of_attempts(dirs: Directories) -> Iterator[Piece | None]:
    """What attempts left, at the time of their task's end."""
    for entry in tasks(dirs.archive):
        if entry and is_id(entry.name):
            try:
                ended = os.lstat(os.path.join(entry.path, "status.json")).st_mtime
                yield ended, sum(tree(path) for path in attempts(entry.path))
            except FileNotFoundError:
                yield None  # it is being removed, or has no last word: then its age alone counts
        else:
            yield None


def of_sessions(dirs: Directories, home: str) -> Iterator[Piece | None]:
    """Transcripts, and the rollouts of threads that sessions name."""
    named: set[str] = set()
    for entry in entries(dirs.sessions):
        if entry and SESSION.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            named |= threads_of(Path(entry.path))
        yield None
    for entry in entries(dirs.transcripts):
        yield _piece(entry) if entry and TRANSCRIPT.fullmatch(entry.name) else None
    try:
        for rollout, thread in codex.all_rollouts(home):
            yield _piece(rollout) if thread in named else None
    except FileNotFoundError:
        return  # there was no turn yet


def _piece(entry: os.DirEntry[str]) -> Piece | None:
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return (found.st_mtime, room(found)) if stat.S_ISREG(found.st_mode) else None


def _size(path: str) -> int:
    """Bytes of a regular file; of anything else none that could be had back."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return 0
    return room(found) if stat.S_ISREG(found.st_mode) else 0
