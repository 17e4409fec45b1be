"""Workers as instances of the unit codexd-worker@.service.

Owns run/exits (but for the records, which the units themselves write) and
run/limits.  Workers outlive the daemon; the next one adopts what systemd says
is there.  All is asked of `systemctl`, many units at once, as a child that is
never waited for: its answer is looked at when it has ended, and one that takes
longer than DEADLINE has said nothing.

A worker has ended when systemd says so, in an answer that was asked for after
the worker was started.  An exit record, and a ring of the bell (a FIFO that
workers and ExecStopPost= write to), only make us ask at once.

Raises UnitsMissing where there is no such unit, OSError while systemd does not
answer: then nobody knows which workers live, and nothing may be started.  It may
answer later: at a boot D-Bus is slow.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

from codexd import durable, exits
from codexd.config import Directories
from codexd.exits import Ended
from codexd.model import ID_PATTERN

DEADLINE = 5.0  # seconds for systemctl
LOOK = 5.0  # seconds between looks at workers that tell nothing
BATCH = 16  # units a call: a hundred starts in one transaction take a second
BELL = ".bell"
_UNIT = re.compile(rf"codexd-worker@({ID_PATTERN})\.service", re.ASCII)
_STOPS = frozenset({"stop", "restart"})
_GONE = frozenset({"inactive", "failed"})
_LIST = ("list-units", "--all", "--output=json", "codexd-worker@*.service")


class UnitsMissing(Exception):
    """systemd cannot start workers here; the text says why."""


@dataclass(slots=True)
class _Call:
    """A systemctl that is running."""

    process: subprocess.Popen[bytes]
    verb: str
    ids: list[str]
    began: float


class Units:
    """Workers as systemd units."""

    kind = "systemd"
    survives = True
    why: str | None = None

    def __init__(self, dirs: Directories, listen: Callable[[int], None]) -> None:
        """`listen` is told a descriptor that is readable when the bell rang."""
        self._exits, self._limits = dirs.exits, dirs.limits
        self._systemctl = _systemctl(dirs)
        self._calls: list[_Call] = []
        self._alive: dict[str, float] = {}  # id -> since when we take it to be there
        self._over: set[str] = set()  # of which systemd said that they are gone
        self._started: set[str] = set()  # of which systemd said to us that it starts them
        self._stopped: set[str] = set()  # of which systemd said that somebody stops them
        self._refused: dict[str, str] = {}
        self._asked_at = -math.inf  # when we last asked about all workers
        self._answered = False
        self._doubtful = False  # whether a start failed after the last answer
        self._check()
        for place in (self._exits, self._limits):
            place.mkdir(mode=0o750, parents=True, exist_ok=True)
        listen(_open_bell(self._exits / BELL))
        self._over = {path.name for path in self._exits.iterdir() if path.name[0] != "."}
        self._ask()
        try:
            self._calls[-1].process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            pass  # it is asked again, and nothing is done before it answers
        self._tend()

    def _check(self) -> None:
        """Whether there is such a unit.  Raises UnitsMissing, OSError."""
        sample = "codexd-worker@00000000t000000-0000000000.service"
        try:
            told = subprocess.run(
                [*self._systemctl, "show", "--property=LoadState", "--value", sample],
                capture_output=True, text=True, timeout=DEADLINE, check=False,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise UnitsMissing("there is no systemctl") from error
        except subprocess.TimeoutExpired as error:
            why = f"systemctl did not answer within {DEADLINE:g} s"
            raise OSError(errno.ETIMEDOUT, why) from error
        if told.returncode:
            raise OSError(errno.ENOTCONN, f"systemctl: {_first(told.stderr)}")
        if told.stdout.strip() != "loaded":
            why = "the unit codexd-worker@.service is not installed; `codexd install` does it"
            raise UnitsMissing(why)

    # --- calls ------------------------------------------------------------------

    def _call(self, verb: str, ids: list[str], *options: str) -> None:
        units = [unit(id) for id in ids]
        process = subprocess.Popen(
            [*self._systemctl, verb, *options, "--", *units],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._calls.append(_Call(process, verb, ids, time.monotonic()))

    def _each(self, verb: str, ids: Iterable[str], *options: str) -> None:
        for batch in _batches(ids):
            self._call(verb, batch, *options)

    def _ask(self) -> None:
        """Which workers are there?"""
        process = subprocess.Popen(
            [*self._systemctl, *_LIST],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._asked_at = time.monotonic()
        self._calls.append(_Call(process, "list", [], self._asked_at))

    def _tend(self) -> None:
        """Look at the calls that have ended; ask again where that is due."""
        now = time.monotonic()
        for call in list(self._calls):
            if call.process.poll() is None:
                if now - call.began < DEADLINE:
                    continue
                call.process.kill()
            said, complaint = call.process.communicate()
            self._calls.remove(call)
            self._heard(call, said, complaint.decode("utf-8", "replace"))
        if self._due(now) and not any(call.verb == "list" for call in self._calls):
            self._ask()

    def _due(self, now: float) -> bool:
        """Whether to ask which workers are there."""
        return now - self._asked_at >= self._rest

    @property
    def _rest(self) -> float:
        """Seconds between two questions."""
        if not self._answered or self._doubtful:
            return 1.0
        if any(self._has_record(id) for id in self._alive):
            return 0.1  # it has ended, and its unit is just going
        return LOOK if self._alive else math.inf

    def _heard(self, call: _Call, said: bytes, complaint: str) -> None:
        if call.verb == "list":
            if call.process.returncode == 0:
                self._answered, self._doubtful = True, False
                units = _listed(said)
                self._stopped |= {id for id, (_, job) in units.items() if job in _STOPS}
                self._counted(_there(units), call.began)
        elif call.verb == "start" and call.process.returncode == 0:
            self._started.update(call.ids)
        elif call.verb == "start":
            why = _first(complaint) or f"systemctl did not answer within {DEADLINE:g} s"
            self._refused |= dict.fromkeys(call.ids, why)
            # Some of them may have been started all the same: the next answer says which.
            self._doubtful, self._asked_at = True, -math.inf

    def _counted(self, there: set[str], asked: float) -> None:
        """What systemd says is there, as of the time that it was asked."""
        starting = {id for call in self._calls if call.verb == "start" for id in call.ids}
        for id, since in list(self._alive.items()):
            if id not in there and id not in starting and since < asked:
                del self._alive[id]
                self._over.add(id)
        for id in there - self._alive.keys():
            self._alive[id] = asked
            self._over.discard(id)
        for id in there & self._refused.keys():
            del self._refused[id]

    def _known(self) -> None:
        self._tend()
        if not self._answered:
            what = "systemd does not say which workers there are"
            raise OSError(errno.ETIMEDOUT, what, "systemctl list-units")

    def _has_record(self, id: str) -> bool:
        return durable.is_there(self._exits / id)

    # --- what the master does -----------------------------------------------------

    def start(self, ids: Iterable[str], limits: Mapping[str, Mapping[str, int]]) -> None:
        able = []
        for id in ids:
            try:
                self._prepare(id, limits.get(id))
                able.append(id)
            except OSError as error:
                self._refuse([id], error)
        for batch in _batches(able):
            try:
                self._call("start", batch, "--no-block")
            except OSError as error:  # there is no systemctl, or no process can be made
                self._refuse(batch, error)

    def _prepare(self, id: str, limits: Mapping[str, int] | None) -> None:
        (self._exits / id).unlink(missing_ok=True)
        self._over.discard(id)
        self._started.discard(id)
        self._stopped.discard(id)
        self._refused.pop(id, None)
        self._alive[id] = time.monotonic()
        if limits:
            text = "".join(f"{name}={value}\n" for name, value in limits.items())
            (self._limits / id).write_text(text)

    def _refuse(self, ids: Iterable[str], error: OSError) -> None:
        """None of them was started; the ledger has them as running."""
        for id in ids:
            self._alive.pop(id, None)
            self._over.add(id)
            self._refused[id] = str(error)

    def refusal(self, id: str) -> str | None:
        return self._refused.pop(id, None)

    def working(self) -> Set[str]:
        self._known()
        return {id for id in self._alive if not self._has_record(id)}

    def active(self) -> Set[str]:
        self._known()
        return self._alive.keys()

    def ended(self, id: str) -> Ended | None:
        record = exits.read(self._exits / id)
        if record is None and id in self._started and id in self._over:
            return exits.vanished()
        return replace(record, stopped=True) if record and id in self._stopped else record

    def stop(self, ids: Iterable[str]) -> None:
        self._each("stop", ids, "--no-block")

    def kill(self, ids: Iterable[str]) -> None:
        self._each("kill", ids, "--signal=SIGKILL")

    def tidy(self, running: Set[str]) -> None:
        for id in self._over - running:
            (self._exits / id).unlink(missing_ok=True)
            (self._limits / id).unlink(missing_ok=True)
            for known in (self._over, self._started, self._stopped):
                known.discard(id)

    def pause(self, now: float) -> float:
        # Their end is a SIGCHLD; this is for those that do not end.
        waits = [max(0.05, call.began + DEADLINE - now) for call in self._calls]
        return min([*waits, self._rest])


def still_there(dirs: Directories) -> set[str]:
    """Workers that are units, of a daemon that ran before in this boot.

    Raises OSError where there may be some, and systemd does not say.
    """
    if not durable.is_there(dirs.exits / BELL):
        return set()
    try:
        told = subprocess.run(
            [*_systemctl(dirs), *_LIST], capture_output=True, timeout=DEADLINE, check=True
        )
    except (subprocess.SubprocessError, FileNotFoundError) as error:
        what = f"workers may still run as units, and systemd does not say: {error}"
        raise OSError(errno.ETIMEDOUT, what) from error
    return _there(_listed(told.stdout))


def _systemctl(dirs: Directories) -> list[str]:
    manager = "--system" if dirs.systemwide else "--user"
    return ["systemctl", manager, "--no-ask-password", "--no-pager"]


def unit(id: str) -> str:
    return f"codexd-worker@{id}.service"


def _batches(ids: Iterable[str]) -> Iterator[list[str]]:
    every = list(ids)
    for first in range(0, len(every), BATCH):
        yield every[first : first + BATCH]


def _listed(said: bytes) -> dict[str, tuple[str, str]]:
    """Of each worker that list-units names, by its id, the state and the job."""
    listed = json.loads(said or b"[]")
    found = {one["unit"]: (one["active"], one.get("job") or "") for one in listed}
    return {match[1]: told for name, told in found.items() if (match := _UNIT.fullmatch(name))}


def _there(units: Mapping[str, tuple[str, str]]) -> set[str]:
    """The ids of those that are not gone; one that waits for another unit has a job."""
    return {id for id, (state, job) in units.items() if job or state not in _GONE}


def _open_bell(path: Path) -> int:
    """The FIFO, kept from daemon to daemon: workers hold on to it."""
    try:
        os.mkfifo(path, 0o600)
    except FileExistsError:
        pass
    # Also for writing, so that it has no end when the last worker closes it.
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)


def _first(text: str) -> str:
    """The first line of what systemctl said."""
    return text.strip().split("\n")[0][:300]
