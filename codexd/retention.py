"""Retention: what is old and may go, and nothing that is still needed.

It only looks; `sweep` removes.  What has a time (the keys `retention`) is:

    sessions      sessions/NAME.json, its transcript, and their Codex threads
    archive       archive/YYYY-MM/ID with the threads it ran in; keys/, usage/; old ledgers
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

from codexd import codex, durable, place, rotate, session, spend, transcript
from codexd.config import Config
from codexd.model import ID_PATTERN, Task, is_id

ASIDE = "+old.jsonl"  # ends the name of a transcript laid aside; in no session's own
GONE = ".gone-"  # begins the name of a task that is being removed
_BREATH = 50  # entries looked at between two pauses
_ANSWER = re.compile(rf"(?:[A-Za-z0-9._-]{{1,100}}\.)?({ID_PATTERN})\.md", re.ASCII)
_SESSION = re.compile(r"([A-Za-z0-9%._~+-]{1,200})\.(json|damaged)", re.ASCII)
_TRANSCRIPT = re.compile(r"([A-Za-z0-9%._~+-]{1,200})\.jsonl", re.ASCII)
_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\.(?:json|damaged)", re.ASCII)
_MONTH = re.compile(r"[0-9]{4}-[0-9]{2}", re.ASCII)
_stem = lru_cache(20_000)(session.stem)  # of live tasks, again and again


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
        self.long: list[str] = []  # sessions in use whose transcripts begin too long ago
        self._named: set[str] = set()  # threads of sessions that stay
        self._complete = False  # whether these are all
        self._going: set[str] = set()  # tasks and threads that were found

    # --- what may go ------------------------------------------------------------

    def found(self) -> Iterator[Old | None]:
        """Everything that may go; None where one may pause."""
        for part in (
            self._sessions, self._transcripts, self._archive, self._keys,
            self._answers, self._rejected, self._days, self._ledgers,
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
        old = []  # their stems and paths
        for entry in _entries(self.dirs.sessions):
            if entry and entry.is_file(follow_symlinks=False):
                if not (name := _SESSION.fullmatch(entry.name)):
                    continue
                if self._old(entry, self.kept.archive) and not self._has_live(name[1]):
                    old.append((name[1], Path(entry.path)))
                else:
                    self._named |= _threads_of(Path(entry.path))
                    self._measure(name[1])
            elif entry is None:
                yield None
        self._complete = True
        for stem, path in old:
            said = self.dirs.transcripts / f"{stem}.jsonl"
            threads = _threads_of(path)
            for more in transcript.threads(said):
                threads |= more
                yield None
            # Looked at again: it may have been used since.
            if self._is_old(path) and not self._has_live(stem):
                beside = (said,) if path.suffix == ".json" and _is_file(said) else ()
                yield _file("sessions", path, *beside, threads=threads)

    def _measure(self, stem: str) -> None:
        said = self.dirs.transcripts / f"{stem}.jsonl"
        began = transcript.began(said)
        aside = os.path.lexists(said.with_name(stem + ASIDE))
        if began is not None and began < self.now - self.kept.archive and not aside:
            self.long.append(stem)

    def _has_live(self, stem: str) -> bool:
        return any(_stem(task.session_name) == stem for task in self.live().values())

    def _transcripts(self) -> Iterator[Old | None]:
        """Those laid aside, and those whose session is gone: a crash came in between."""
        for entry in _entries(self.dirs.transcripts):
            if entry and (name := _TRANSCRIPT.fullmatch(entry.name)):
                path, threads = Path(entry.path), set[str]()
                if self._is_alone(path, name[1]):
                    for more in transcript.threads(path):
                        threads |= more
                        yield None
                    if self._is_alone(path, name[1]):  # still
                        yield _file("sessions", path, threads=threads)
            elif entry is None:
                yield None

    def _is_alone(self, said: Path, stem: str) -> bool:
        owned = os.path.lexists(self.dirs.sessions / f"{stem}.json") or self._has_live(stem)
        return not owned and self._is_old(said)

    def _is_old(self, path: Path) -> bool:
        try:
            found = path.lstat()
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_mtime < self.now - self.kept.archive

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

    def _ledgers(self) -> Iterator[Old | None]:
        for path in rotate.kept(self.dirs.ledger):
            if self._is_old(path):
                yield _file("ledger", path)

    # --- Codex's threads ----------------------------------------------------------

    def threads(self, old: Old) -> Iterator[tuple[str, Old]]:
        """Of something that is gone, the threads that may go as well; their rollouts."""
        if not self._complete:
            return  # a session that could not be looked at may need one of them
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
    """Those that a session's file names; a damaged one names none.  Raises OSError."""
    try:
        data = durable.read_json(path, 1 << 20)
    except (FileNotFoundError, ValueError):
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


def _valid(*threads: object) -> set[str]:
    return {t.lower() for t in threads if isinstance(t, str) and codex.is_thread_id(t)}
