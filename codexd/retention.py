"""Retention: what is old and may go, and nothing that is still needed.

It only looks; `sweep` removes.  What has a time (the keys `retention`) is:

    sessions      sessions/NAME.json, its transcript, and their Codex threads
    archive       archive/YYYY-MM/ID with the threads it ran in; keys/, usage/; old ledgers
    answers       answers/STEM.ID.md
    rejected      rejected/NAME and NAME.reason

Where one of them takes more than retention.size, the oldest of it is old at once.  Of
an ended task then only the attempts go, archive/YYYY-MM/ID/N: by its record a file
dropped again under its id or key is still known.

Promises: it never finds anything of a task that has not ended, nor the session of
such a task, nor a task that it follows (`after`); nothing that is younger than its time,
by the time it was last written; nothing whose name is not exactly one that codexd makes;
nothing behind a symbolic link.  Of Codex's threads it finds those alone that a record names which
goes, that no session names any more and that nobody has used since.  It takes
many small steps, so that the daemon can do something else in between.

What cannot be looked at is kept in `problems`, and the rest goes on.
"""

from __future__ import annotations

import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from codexd import codex, durable, place, rotate, session, spend, transcript, weight
from codexd.config import Config
from codexd.model import Task, is_id
from codexd.weight import ANSWER, SESSION, TRANSCRIPT, Piece, Weight, entries, threads_of

ASIDE = "+old.jsonl"  # ends the name of a transcript laid aside; in no session's own
GONE = ".gone-"  # begins the name of a task that is being removed
_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\.(?:json|damaged)", re.ASCII)
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
        kept = config.retention
        ages = {
            "sessions": kept.archive, "archive": kept.archive, "attempts": math.inf,
            "answers": kept.answers, "rejected": kept.rejected,
        }  # fmt: skip
        self.most = kept.size
        self.before = {kind: now - age for kind, age in ages.items()}  # what is older may go
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
            self._weigh, self._sessions, self._transcripts, self._archive, self._keys,
            self._answers, self._rejected, self._days, self._ledgers,
        ):  # fmt: skip
            try:
                yield from part()
            except OSError as error:
                self.problems.append(error)

    def _weigh(self) -> Iterator[None]:
        """Where there is more than is to be kept, even what is younger may go."""
        if math.isinf(self.most):
            return
        looks: dict[str, Iterator[Piece | None]] = {
            "sessions": weight.of_sessions(self.dirs, self.home),
            "attempts": weight.of_attempts(self.dirs),
            "answers": weight.of_answers(self.dirs),
            "rejected": weight.of_rejected(self.dirs),
        }
        for kind, look in looks.items():
            found = Weight()
            try:
                for piece in look:
                    if piece:
                        found.add(*piece)
                    yield None
            except OSError as error:
                self.problems.append(error)
            self.before[kind] = max(self.before[kind], found.before(self.most, self.now))

    def _old(self, entry: os.DirEntry[str], kind: str) -> bool:
        """Whether it is a regular file that was last written so long ago."""
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_mtime < self.before[kind]

    def _sessions(self) -> Iterator[Old | None]:
        """First all of them are looked at: one that stays may name a thread of another."""
        old = []  # their stems and paths
        for entry in entries(self.dirs.sessions):
            if entry and entry.is_file(follow_symlinks=False):
                if not (name := SESSION.fullmatch(entry.name)):
                    continue
                if self._old(entry, "sessions") and not self._has_live(name[1]):
                    old.append((name[1], Path(entry.path)))
                else:
                    self._named |= threads_of(Path(entry.path))
                    self._measure(name[1])
            elif entry is None:
                yield None
        self._complete = True
        for stem, path in old:
            said = self.dirs.transcripts / f"{stem}.jsonl"
            threads = threads_of(path)
            for more in transcript.threads(said):
                threads |= more
                yield None
            # Looked at again: it may have been used since.
            if self._is_old(path, "sessions") and not self._has_live(stem):
                beside = (said,) if path.suffix == ".json" and _is_file(said) else ()
                yield _file("sessions", path, *beside, threads=threads)

    def _measure(self, stem: str) -> None:
        said = self.dirs.transcripts / f"{stem}.jsonl"
        began = transcript.began(said)
        aside = os.path.lexists(said.with_name(stem + ASIDE))
        if began is not None and began < self.before["archive"] and not aside:
            self.long.append(stem)

    def _has_live(self, stem: str) -> bool:
        return any(_stem(task.session_name) == stem for task in self.live().values())

    def _transcripts(self) -> Iterator[Old | None]:
        """Those laid aside, and those whose session is gone: a crash came in between."""
        for entry in entries(self.dirs.transcripts):
            if entry and (name := TRANSCRIPT.fullmatch(entry.name)):
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
        return not owned and self._is_old(said, "sessions")

    def _is_old(self, path: Path, kind: str) -> bool:
        try:
            found = path.lstat()
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_mtime < self.before[kind]

    def _archive(self) -> Iterator[Old | None]:
        """Tasks that ended long ago; of others, where there is too much, what attempts left."""
        for entry in weight.tasks(self.dirs.archive):
            if entry is None:
                yield None
                continue
            id, home = entry.name.removeprefix(GONE), Path(entry.path)
            if not is_id(id) or id in self.live():
                continue
            old = self._ended(entry, "archive")
            if not (old or self._ended(entry, "attempts")) or self._is_awaited(id):
                continue
            if old:
                self._going.add(id)
                threads = frozenset(_threads_ran(home))
                yield Old("archive", (home,), weight.tree(home), threads)
            elif left := weight.attempts(entry.path):
                threads = frozenset(_threads_ran(home))
                yield Old("attempts", tuple(left), sum(map(weight.tree, left)), threads)

    def _is_awaited(self, id: str) -> bool:
        """Whether a task that has not ended follows it, and asks what it came to."""
        return any(id in task.after for task in self.live().values())

    def _ended(self, entry: os.DirEntry[str], kind: str) -> bool:
        """Whether a task's last word, or else its directory, is so old."""
        if entry.name.startswith(GONE):
            return True
        try:
            found = os.lstat(os.path.join(entry.path, "status.json"))
        except FileNotFoundError:
            found = entry.stat(follow_symlinks=False)
        return found.st_mtime < self.before[kind]

    def _keys(self) -> Iterator[Old | None]:
        """A key goes with the task that it stands for."""
        for entry in entries(self.dirs.keys):
            if entry and _KEY.fullmatch(entry.name) and self._old(entry, "archive"):
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
        for entry in entries(self.dirs.answers):
            if entry and (name := ANSWER.fullmatch(entry.name)):
                if name[1] not in self.live() and self._old(entry, "answers"):
                    yield _file("answers", Path(entry.path))
            elif entry is None:
                yield None

    def _rejected(self) -> Iterator[Old | None]:
        """Each with its reason, whose time is that of the rejection; a directory stays."""
        for entry in entries(self.dirs.rejected):
            if entry and entry.name.endswith(".reason") and self._old(entry, "rejected"):
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
        for entry in entries(self.dirs.usage):
            if entry is None or not _DAY.fullmatch(entry.name) or entry.name == today:
                continue
            if self._old(entry, "archive"):
                yield _file("usage", Path(entry.path))

    def _ledgers(self) -> Iterator[Old | None]:
        for path in rotate.kept(self.dirs.ledger):
            if self._is_old(path, "archive"):
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
                    unused = path.stat().st_mtime < self.before[old.kind]
                    if unused and self._is_below_home(path):
                        yield thread, _file("threads", path)
            except OSError as error:
                self.problems.append(error)

    def _is_below_home(self, path: Path) -> bool:
        """Whether no link is on the way from CODEX_HOME to it."""
        real = os.path.realpath(self.home)
        return os.path.realpath(path) == os.path.join(real, os.path.relpath(path, self.home))


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _file(kind: str, *paths: Path, threads: Iterable[str] = ()) -> Old:
    return Old(kind, paths, sum(weight.room(path.lstat()) for path in paths), frozenset(threads))


# --- which threads a record names -------------------------------------------------


def _threads_ran(task: Path) -> set[str]:
    """Those that an ended task's attempts ran in."""
    found = set()
    for name in os.listdir(task):
        if name.isdigit():
            try:
                data = durable.read_json(task / name / "result.json")
            except (OSError, ValueError):
                continue  # killed with its worker; the session's transcript names it
            found |= weight.valid(data.get("thread"))
    return found
