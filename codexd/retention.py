"""Retention: what is old and may go, and nothing that is still needed.

It only looks; `sweep` removes.  What has a time (the keys `retention`) is:

    sessions      sessions/NAME.json, its transcript, and their Codex threads
    archive       archive/YYYY-MM/ID with the threads it ran in; keys/, usage/
    answers       answers/STEM.ID.md
    rejected      rejected/NAME and NAME.reason

Promises: it never finds anything of a task that has not ended, nor the session of
such a task; nothing that is younger than its time, by the time it was last
written; nothing whose name is not exactly one that codexd makes; nothing behind a
symbolic link.  Of Codex's threads it finds those alone that a record names which
goes, that no session names any more and that nobody has used since.  It takes
many small steps, so that the daemon can do something else in between.

What cannot be looked at is kept in `problems`, and the rest goes on.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from codexd import codex, durable, place, session, spend
from codexd.config import Config
from codexd.events import THREAD_PATTERN
from codexd.model import ID_PATTERN, Task, is_id

GONE = ".gone-"  # begins the name of a task that is being removed
_BREATH = 200  # entries looked at between two pauses
_CHUNK = 1 << 20
_ANSWER = re.compile(rf"(?:[A-Za-z0-9._-]{{1,100}}\.)?({ID_PATTERN})\.md", re.ASCII)
_SESSION = re.compile(r"([A-Za-z0-9%._~+-]{1,200})\.(json|damaged)", re.ASCII)
_TRANSCRIPT = re.compile(r"([A-Za-z0-9%._~+-]{1,200})\.jsonl", re.ASCII)
_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\.(?:json|damaged)", re.ASCII)
_MONTH = re.compile(r"[0-9]{4}-[0-9]{2}", re.ASCII)
_stem = lru_cache(20_000)(session.stem)  # of live tasks, again and again
# A quote within a text is escaped in JSON, so no text can pretend to be one.
_SAID_IN = re.compile(rf'"thread": "({THREAD_PATTERN})"'.encode())


@dataclass(frozen=True, slots=True)
class Old:
    """Something that may go: a file or a task's directory.

    `paths` in the order of their removal; `bytes` is what they take in all;
    `threads` are Codex's threads that nobody may need after it.
    """

    kind: str
    paths: tuple[Path, ...]
    bytes: int
    threads: frozenset[str] = frozenset()


def forgotten(id: str, kept: float, now: float) -> bool:
    """Whether a task of this id could have been removed already.

    An id begins with the time at which it was made.  One that is older than
    what is kept must not become a task: it may have been one.
    """
    made = re.sub(r"[^0-9]", "", id[:15])
    return now > kept and made < time.strftime("%Y%m%d%H%M%S", time.gmtime(now - kept))


class Retention:
    """One look at everything that has a time."""

    def __init__(self, config: Config, live: Callable[[], Mapping[str, Task]], now: float) -> None:
        """`live` gives the tasks that have not ended, as they are in each moment.

        `now` is in epoch seconds.
        """
        self.dirs = config.dirs
        self.kept = config.retention
        self.home = str(config.codex.home)
        self.live = live
        self.now = now
        self.problems: list[OSError] = []
        self._named: set[str] = set()  # threads of sessions that stay
        self._going: set[str] = set()  # tasks and threads that were found

    # --- what may go ------------------------------------------------------------

    def found(self) -> Iterator[Old | None]:
        """Everything that may go; None where one may pause."""
        for part in (
            self._sessions, self._transcripts, self._archive, self._keys,
            self._answers, self._rejected, self._days,
        ):  # fmt: skip
            try:
                yield from part()
            except OSError as error:
                self.problems.append(error)

    def _old(self, entry: os.DirEntry[str], kept: float) -> bool:
        """Whether it is a regular file that was last written so long ago."""
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_mtime < self.now - kept

    def _sessions(self) -> Iterator[Old | None]:
        """First all of them are looked at: one that stays may name a thread of another."""
        old = []
        for entry in _entries(self.dirs.sessions):
            if entry and (name := _SESSION.fullmatch(entry.name)):
                if self._old(entry, self.kept.archive) and not self._has_live(name[1]):
                    old.append((name[1], entry))
                else:
                    self._named |= _threads_of(Path(entry.path))
            elif entry is None:
                yield None
        for stem, entry in old:
            path, said = Path(entry.path), self.dirs.transcripts / f"{stem}.jsonl"
            threads = set(_threads_of(path))
            for more in _threads_said(said):
                threads |= more
                yield None
            if not self._has_live(stem) and _is_file(path):
                beside = (said,) if path.suffix == ".json" and _is_file(said) else ()
                yield _file("sessions", path, *beside, threads=threads)

    def _has_live(self, stem: str) -> bool:
        return any(_stem(task.session_name) == stem for task in self.live().values())

    def _transcripts(self) -> Iterator[Old | None]:
        """Those whose session is gone: a crash came in between, or somebody removed it."""
        for entry in _entries(self.dirs.transcripts):
            if entry and (name := _TRANSCRIPT.fullmatch(entry.name)):
                alone = not os.path.lexists(self.dirs.sessions / f"{name[1]}.json")
                if alone and self._old(entry, self.kept.archive) and not self._has_live(name[1]):
                    yield _file("sessions", Path(entry.path))
            elif entry is None:
                yield None

    def _archive(self) -> Iterator[Old | None]:
        for month in _entries(self.dirs.archive):
            if month is None or not _MONTH.fullmatch(month.name) or month.is_symlink():
                continue
            for entry in _entries(Path(month.path)):
                if entry and entry.is_dir(follow_symlinks=False):
                    id = entry.name.removeprefix(GONE)
                    if is_id(id) and id not in self.live() and self._ended(entry):
                        self._going.add(id)
                        threads = frozenset(_threads_ran(Path(entry.path)))
                        yield Old("archive", (Path(entry.path),), _tree(entry.path), threads)
                elif entry is None:
                    yield None

    def _ended(self, entry: os.DirEntry[str]) -> bool:
        """Whether a task's last word, or else its directory, is so old."""
        if entry.name.startswith(GONE):
            return True
        try:
            found = os.lstat(os.path.join(entry.path, "status.json"))
        except FileNotFoundError:
            found = entry.stat(follow_symlinks=False)
        return found.st_mtime < self.now - self.kept.archive

    def _keys(self) -> Iterator[Old | None]:
        """A key goes with the task that it stands for."""
        for entry in _entries(self.dirs.keys):
            if entry and _KEY.fullmatch(entry.name) and self._old(entry, self.kept.archive):
                try:
                    id = str(durable.read_json(entry.path, 4096).get("id"))
                except (OSError, ValueError):
                    continue  # damaged: the intake names it to whoever uses the key
                taken = id in self.live() or (is_id(id) and place.has_ended(self.dirs, id))
                if id in self._going or not taken:
                    yield _file("keys", Path(entry.path))
            elif entry is None:
                yield None

    def _answers(self) -> Iterator[Old | None]:
        for entry in _entries(self.dirs.answers):
            if entry and (name := _ANSWER.fullmatch(entry.name)):
                if name[1] not in self.live() and self._old(entry, self.kept.answers):
                    yield _file("answers", Path(entry.path))
            elif entry is None:
                yield None

    def _rejected(self) -> Iterator[Old | None]:
        """Each with its reason, whose time is that of the rejection; a directory stays."""
        for entry in _entries(self.dirs.rejected):
            if entry and entry.name.endswith(".reason") and self._old(entry, self.kept.rejected):
                why = Path(entry.path)
                what = why.with_name(entry.name.removesuffix(".reason"))
                if not os.path.lexists(what):
                    yield _file("rejected", why)
                elif what.is_symlink() or not what.is_dir():
                    yield _file("rejected", what, why)
            elif entry is None:
                yield None

    def _days(self) -> Iterator[Old | None]:
        today = f"{spend.today(self.now)}.json"
        for entry in _entries(self.dirs.usage):
            if entry is None or not _DAY.fullmatch(entry.name) or entry.name == today:
                continue
            if self._old(entry, self.kept.archive):
                yield _file("usage", Path(entry.path))

    # --- Codex's threads ----------------------------------------------------------

    def threads(self, old: Old) -> Iterator[tuple[str, Old]]:
        """Of something that is gone, the threads that may go as well; their rollouts."""
        for thread in sorted(old.threads - self._named - self._going):
            if any((task.thread or "").lower() == thread for task in self.live().values()):
                continue
            self._going.add(thread)
            try:
                for path in map(Path, codex.rollouts(self.home, thread, everywhere=False)):
                    unused = path.stat().st_mtime < self.now - self.kept.archive
                    if unused and self._is_below_home(path):
                        yield thread, _file("threads", path)
            except OSError as error:
                self.problems.append(error)

    def _is_below_home(self, path: Path) -> bool:
        """Whether no link is on the way from CODEX_HOME to it."""
        real = os.path.realpath(self.home)
        return os.path.realpath(path) == os.path.join(real, os.path.relpath(path, self.home))


def _entries(directory: Path) -> Iterator[os.DirEntry[str] | None]:
    """What is in a directory, which need not be there; None now and then, to pause."""
    try:
        with os.scandir(directory) as entries:
            for number, entry in enumerate(entries, 1):
                yield entry
                if not number % _BREATH:
                    yield None
    except FileNotFoundError:
        return


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _file(kind: str, *paths: Path, threads: Iterable[str] = ()) -> Old:
    return Old(kind, paths, sum(path.lstat().st_size for path in paths), frozenset(threads))


def _tree(path: str) -> int:
    """Bytes of all files below a directory."""
    found = ((os.path.join(at, name)) for at, _, names in os.walk(path) for name in names)
    return sum(os.lstat(file).st_size for file in found)


# --- which threads a record names -------------------------------------------------


def _threads_of(path: Path) -> set[str]:
    """Those that a session's file names; a damaged one names none."""
    try:
        data = durable.read_json(path, 1 << 20)
    except (OSError, ValueError):
        return set()
    return _valid(data.get("thread"), data.get("forgotten"))


def _threads_ran(task: Path) -> set[str]:
    """Those that an ended task's attempts ran in."""
    found = set()
    for name in os.listdir(task):
        if name.isdigit():
            try:
                data = durable.read_json(task / name / "result.json")
            except (OSError, ValueError):
                continue  # killed with its worker; the session's transcript names it
            found |= _valid(data.get("thread"))
    return found


def _threads_said(transcript: Path) -> Iterator[set[str]]:
    """Those that a transcript names, a piece at a time."""
    try:
        fd = os.open(transcript, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # there is none, or it is none of ours
    with open(fd, "rb") as file:
        rest = b""
        while piece := file.read(_CHUNK):
            yield _valid(*(found.decode() for found in _SAID_IN.findall(rest + piece)))
            rest = piece[-100:]  # one may lie across the cut


def _valid(*threads: object) -> set[str]:
    return {t.lower() for t in threads if isinstance(t, str) and codex.is_thread_id(t)}
