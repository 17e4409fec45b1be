"""Removing what is old: a piece at a time, day by day, or at once for `codexd gc`.

Part of the master, which alone removes anything while a daemon serves; the
command may do it under the root's lock.  A sweep may be broken off at any point,
and the next one does the rest.

The clock decides what is old, and it may jump: a host without a battery begins
in 1970, and one wrong answer of a time server must not empty an archive.  So a
sweep begins only when the clock has not been set for an hour; never within the
first hour of a daemon.

A Codex thread is removed by Codex itself (`codex delete`), for it is in its
databases, too.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from codexd import clock, codex, lock
from codexd.config import Config
from codexd.gate import Keeper
from codexd.ledger import Follower, Ledger
from codexd.model import Task
from codexd.retention import ASIDE, GONE, Old, Retention

DEADLINE = 20.0  # seconds for Codex to remove one thread; it takes 0.2
EVERY = 86400.0  # seconds between two sweeps of the daemon
STEADY = 3600.0  # seconds without a jump of the clock
_JUMP = 5.0  # seconds; slewing moves it by less within a round
_SLICE = 0.005  # seconds of a round
_PAUSE = 0.1  # seconds between slices


class Sweep:
    """Removes what retention finds."""

    def __init__(
        self,
        config: Config,
        live: Callable[[], Mapping[str, Task]],
        binary: str,
        env: Mapping[str, str],
        now: float,
    ) -> None:
        """`binary` is Codex, "" where there is none, and `env` its environment."""
        self.dirs = config.dirs
        self.retention = Retention(config, live, now)
        self.binary = binary
        self.env = dict(env)
        self.problems = self.retention.problems  # also what could not be removed
        self.child: subprocess.Popen[bytes] | None = None
        self.counts: dict[str, int] = {}
        self.bytes = 0

    def removed(self) -> Iterator[Old | None]:
        """Remove everything that may go; each piece when it is gone.

        None is a pause; while there is a `child`, it is what is waited for.
        """
        for old in self.retention.found():
            if old is None or not self._remove(old):
                yield None
                continue
            yield old
            for thread, rollout in self.retention.threads(old):
                yield from self._delete(thread)
                if self._remove(rollout):
                    yield rollout
        for stem in self.retention.long:
            self._lay_aside(self.dirs.transcripts / f"{stem}.jsonl")

    def _lay_aside(self, transcript: Path) -> None:
        """Let a session in use begin a new transcript; the old one has its time from now.

        The length that the session remembers is the most that is kept of a file.
        """
        try:
            os.rename(transcript, transcript.with_name(transcript.stem + ASIDE))
        except OSError as error:
            self.problems.append(error)

    def _remove(self, old: Old) -> bool:
        try:
            for path in old.paths:
                if old.kind == "archive":
                    _remove_task(path)
                elif old.kind == "attempts":
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            self.problems.append(error)
            return False
        self.counts[old.kind] = self.counts.get(old.kind, 0) + 1
        self.bytes += old.bytes
        return True

    def _delete(self, thread: str) -> Iterator[None]:
        """Let Codex remove a thread, also from its databases.

        Where it cannot (an older one does not know how), its rollout alone is
        removed; nobody resumes that thread.
        """
        if not self.binary:
            return
        try:
            self.child = subprocess.Popen(
                [self.binary, "delete", "--force", thread],
                env=self.env, cwd="/", stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            self.problems.append(error)
            return
        end = time.monotonic() + DEADLINE
        while self.child.poll() is None:
            if time.monotonic() >= end:
                self.child.kill()
                self.child.wait()
            yield None
        self.child = None


def _remove_task(path: Path) -> None:
    """Out of sight at once, so that nobody meets half a task."""
    gone = path if path.name.startswith(GONE) else path.with_name(GONE + path.name)
    if gone != path:
        os.rename(path, gone)
    shutil.rmtree(gone)  # follows no link, also if one is put there meanwhile


# --- by hand ------------------------------------------------------------------------


def listed(config: Config) -> tuple[list[Old], list[OSError]]:
    """What a sweep would remove now, and what it could not look at.

    Read-only; works while a daemon serves.  Raises OSError, LedgerBroken.
    """
    looked = Retention(config, _book(config), time.time())
    found = []
    for old in looked.found():
        if old:
            found += [old, *(rollout for _, rollout in looked.threads(old))]
    return found, looked.problems


def at_once(config: Config) -> tuple[list[Old], list[OSError]]:
    """Sweep; what was removed, and what could not be.

    Raises lock.Locked while a daemon serves, PermissionError for whom the state
    does not belong to, OSError, LedgerBroken.
    """
    state = config.dirs.state
    if state.stat().st_uid != os.geteuid():
        # Codex's databases would get files that the daemon's Codex cannot write.
        raise PermissionError(errno.EPERM, "do this as the user whom it belongs to", str(state))
    held = lock.hold(config.dirs.lock, 0.0)
    try:
        binary = _binary(config)
        env = codex.environment(os.environ, str(config.codex.home), [])
        sweep = Sweep(config, _book(config), binary, env, time.time())
        found = []
        for old in sweep.removed():
            if old:
                found.append(old)
            elif sweep.child:
                time.sleep(0.01)  # it is asked again, and has a deadline
        return found, sweep.problems
    finally:
        os.close(held)


def _book(config: Config) -> Callable[[], Mapping[str, Task]]:
    reader = Follower(config.dirs.ledger, config.dirs.checkpoint)
    reader.refresh()
    reader.close()
    return lambda: reader.book.tasks


def _binary(config: Config) -> str:
    try:
        return codex.find(config.codex.bin, os.environ.get("PATH"))
    except codex.Missing:
        return ""  # then only rollouts are removed


# --- day by day -----------------------------------------------------------------------


class Daily:
    """The daemon's sweeps: a few milliseconds of a round."""

    def __init__(
        self, config: Config, ledger: Ledger, keeper: Keeper, told: Callable[..., None],
        warn: Callable[..., None], steady: float = STEADY,
    ) -> None:  # fmt: skip
        """`told` and `warn` are the master's log: what is well, and what somebody must mend."""
        self.config = config
        self.ledger = ledger
        self.keeper = keeper
        self.told = told
        self.warn = warn
        self.steady = steady
        self._next = clock.steady() + steady
        self._offset = _offset()
        self._sweep: Sweep | None = None
        self._rest: Iterator[Old | None] = iter(())

    def tend(self, now: float) -> None:
        """Go on with a sweep, or begin one when it is time; `now` is by clock.steady()."""
        offset, before = _offset(), self._offset
        self._offset = offset
        if abs(offset - before) > _JUMP:
            self._next = max(self._next, now + self.steady)
        if self._sweep is None and now >= self._next:
            self._begin()
        if self._sweep is not None and not self._slice(self._sweep):
            self._next = now + EVERY
            self._report(self._sweep)
            self._sweep = None

    def pause(self, now: float) -> float:
        """Seconds until it wants to go on."""
        return _PAUSE if self._sweep else max(0.0, self._next - now)

    def _begin(self) -> None:
        keeper = self.keeper
        env = codex.environment(os.environ, keeper.home, keeper.env_keys)
        self._sweep = Sweep(self.config, self._live, keeper.binary, env, time.time())
        self._rest = self._sweep.removed()

    def _live(self) -> Mapping[str, Task]:
        return self.ledger.book.tasks

    def _slice(self, sweep: Sweep) -> bool:
        """Some of it; whether there is more."""
        end = time.monotonic() + _SLICE
        return any(time.monotonic() >= end or (not old and sweep.child) for old in self._rest)

    def _report(self, sweep: Sweep) -> None:
        if sweep.counts:
            self.told("retention.removed", **sweep.counts, bytes=sweep.bytes)
        if sweep.problems:
            first = sweep.problems[0]
            why = f"{first.filename}: {first.strerror}"
            self.warn("retention.refused", count=len(sweep.problems), why=why)


def _offset() -> float:
    """What differs when the clock was set; sleep of the host does not change it."""
    return time.time() - clock.steady()
