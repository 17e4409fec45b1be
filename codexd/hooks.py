"""Who is told: the `on:` commands, run for what happened until they have taken it.

Part of the master, which calls `tend` in every round and gives the ledger `owing`.
What is owed stands in the ledger; `delivery` decides what is told next; `errands` runs
it, outside the master and without a worker's slot.

Promises: an event is told at least once, with the same id each time, and of one task in
order; a failing hook changes no task and holds up neither the queue nor other hooks.
After a failure of an occasion's hook it is run for one event at a time, after pauses
that grow (retry.base, retry.cap) until it works again: for ten thousand events a hook
that is down costs a few runs and lines an hour, not ten thousand.

May fail: a hook that cannot be run has failed, like one that says so.  What the host
refuses to all of them is raised, and done in a later round.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from codexd import clock, delivery, errands, place, policy, spool
from codexd.config import Config
from codexd.delivery import Occasion, Owed
from codexd.errands import Children, Instances, Runs
from codexd.ledger import Ledger
from codexd.model import Event, Note
from codexd.service import sentence

AT_ONCE = 4  # runs of one occasion's hook
LIMIT = 60.0  # seconds for a command
SILENCE = LIMIT + 60.0  # seconds after which a run without a result is given up
_PASSED = (
    "DBUS_SESSION_BUS_ADDRESS", "HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "TMPDIR", "TZ",
    "USER", "XDG_RUNTIME_DIR",
)  # fmt: skip
_WHY = 300  # characters of what went wrong

Log = Callable[..., None]


@dataclass(slots=True)
class _Hook:
    """How one occasion's hook has been doing."""

    failures: int = 0  # in a row
    rest: float = 0.0  # when it may be run again, by clock.steady()
    why: str = ""


class Hooks:
    """Tells hooks what they are owed."""

    def __init__(
        self, config: Config, ledger: Ledger, units: bool, told: Log, warn: Log, error: Log
    ) -> None:
        """`units`: run them as systemd's; `told`, `warn` and `error` are the master's log."""
        self.config = config
        self.dirs = config.dirs
        self.ledger = ledger
        self.told, self.warn, self.error = told, warn, error
        self.runs: Runs = Instances(self.dirs.systemwide) if units else Children()
        self._as_of = config
        self._hooks = {occasion: _Hook() for occasion in Occasion}
        self._running: dict[str, float] = {}  # key -> since when, in monotonic seconds
        self._rest: dict[str, float] = {}  # key -> when it is tried again, by clock.steady()
        ledger.owing = self.owing
        self._resume()

    def owing(self, events: list[Event], gate: Collection[str]) -> list[Event]:
        """What of these events somebody is to be told."""
        return delivery.owing(events, self.config.on, gate) if self.config.on else []

    @property
    def owed(self) -> dict[str, Owed]:
        return self.ledger.book.owed

    def _resume(self) -> None:
        """Go on where the daemon before has stopped.  What cannot be read or removed is told:
        it keeps no daemon from starting."""
        for one in self.owed.values():
            if one.until:
                self._rest[one.key] = clock.steady() + clock.left(one.until, self.config.retry.cap)
            try:
                if errands.result(self._place(one), one.key):
                    self._running[one.key] = time.monotonic()
            except OSError as error:
                self._untidy(one.id, error)
        # What has no result yet is done again.  Where its unit goes on, that is started in
        # vain, and its result is taken.
        for id in set(errands.found(self.dirs.hooks)) - {one.id for one in self.owed.values()}:
            try:
                errands.end(self.dirs.hooks / id)
            except OSError as error:
                self._untidy(id, error)

    def _untidy(self, id: str, error: OSError) -> None:
        self.warn("not.tidied", path=self.dirs.hooks / id, why=sentence(error))

    # --- the round --------------------------------------------------------------

    def tend(self, now: float) -> None:
        """Collect what was told, give up what is hopeless, tell what is due."""
        if self.config is not self._as_of:
            self._as_of = self.config  # whoever mends a hook need not wait
            self._hooks = {occasion: _Hook() for occasion in Occasion}
            self._rest.clear()
        if self.owed:
            self._collect(now)
            self._give_up()
            self._start(now)

    def _collect(self, now: float) -> None:
        for key, since in list(self._running.items()):
            one = self.owed[key]
            lost = self.runs.lost(one.id)  # asked first: it may end between the two questions
            if lost is None and time.monotonic() - since >= SILENCE:
                lost = f"nothing was heard of it for {SILENCE:g} s"
            if found := self._found(one, lost):
                self._ended(one, *found, now)

    def _found(self, one: Owed, lost: str | None) -> tuple[str | None, str] | None:
        """What a run came to; None while there may still be a result."""
        try:
            if found := errands.result(self._place(one), one.key):
                return found
        except OSError as error:  # its command may have shut the directory
            lost = lost and f"{lost}: {sentence(error)}"
        return (lost, "") if lost else None

    def _ended(self, one: Owed, problem: str | None, output: str, now: float) -> None:
        """One run is over: keep its output, then the ledger's line, then forget it."""
        if one.occasion.of_task:
            self._keep(one, f"{clock.now()} {one.key}: {problem or 'told'}\n{output}")
        if problem is None:
            self.ledger.append([_line(Note.TOLD, one)])
            self._hooks[one.occasion] = _Hook()
            self.told("hook.told", task=one.id, hook=one.key, tries=one.tries + 1)
        else:
            self._failed(one, problem, output, now)
        del self._running[one.key]
        errands.end(self._place(one))

    def _keep(self, one: Owed, text: str) -> None:
        """In its task's directory, where anything may be in the way: that is its own trouble."""
        try:
            place.keep(self.dirs, one.id, f"hook-{one.occasion}.log", text)
        except OSError as error:
            if error.errno in spool.FULL:
                raise
            self.warn("hook.unkept", task=one.id, hook=one.key, why=sentence(error))

    def _failed(self, one: Owed, problem: str, output: str, now: float) -> None:
        said = output.strip().rpartition("\n")[2]
        why = (f"{problem}: {said}" if said else problem)[:_WHY]
        hook, tries = self._hooks[one.occasion], one.tries + 1
        if tries >= delivery.TRIES:
            self._untold([one], f"{tries} runs of its hook failed, the last: {why}")
        else:
            pause = self._backoff(tries, one.key)
            until = clock.stamp(clock.epoch(clock.now()) + pause)
            facts = {"tries": tries, "until": until, "why": why}
            self.ledger.append([_line(Note.DEFERRED, one, **facts)])
            self._rest[one.key] = now + pause
            self.warn("hook.failed", task=one.id, hook=one.key, **facts)
        hook.failures, hook.why = hook.failures + 1, why
        hook.rest = now + self._backoff(hook.failures, one.key)

    def _backoff(self, tries: int, key: str) -> float:
        retry = self.config.retry
        chance = (crc32(f"{key}/{tries}".encode()) % 1000) / 1000
        return policy.backoff(tries, retry.base, retry.cap, chance)

    def _give_up(self) -> None:
        """What has no hook any more, and the oldest of too many."""
        idle = [one for one in self.owed.values() if one.key not in self._running]
        gone = [one for one in idle if one.occasion not in self.config.on]
        self._untold(gone, "codexd.yaml has no hook for it any more")
        if (over := len(self.owed) - delivery.MOST) > 0:
            known = [one for one in idle if one.key in self.owed]
            self._untold(known[:over], f"more than {delivery.MOST} events are owed")

    def _untold(self, lost: list[Owed], why: str) -> None:
        self.ledger.append([_line(Note.UNTOLD, one, why=why) for one in lost])
        for one in lost:
            self._rest.pop(one.key, None)
            self.error("hook.untold", task=one.id, hook=one.key, tries=one.tries, why=why)

    def _start(self, now: float) -> None:
        ready = {occasion: self._room(occasion, now) for occasion in self.config.on}
        if not any(ready.values()):
            return
        not_yet = {key for key, at in self._rest.items() if now < at}
        for one in delivery.choose(self.owed.values(), self._running, ready, not_yet):
            self._rest.pop(one.key, None)
            try:
                self._begin(one)
            except OSError as error:
                if error.errno in spool.FULL:
                    raise
                self._failed(one, f"cannot be run: {sentence(error)}", "", now)

    def _begin(self, one: Owed) -> None:
        told = delivery.story(one, self._task(one))
        env = _environment(one, delivery.summary(one, told))
        command = self.config.on[one.occasion]
        errands.begin(self._place(one), one.key, command, env, LIMIT, told)
        self.runs.start(one.id, self._place(one))
        self._running[one.key] = time.monotonic()

    def _room(self, occasion: Occasion, now: float) -> int:
        """How many runs of its hook may begin."""
        hook = self._hooks[occasion]
        most = 1 if hook.failures else AT_ONCE
        busy = sum(self.owed[key].occasion is occasion for key in self._running)
        return max(0, most - busy) if now >= hook.rest else 0

    def _task(self, one: Owed) -> dict[str, object] | None:
        """The task as the contract has it."""
        if not one.occasion.of_task:
            return None
        try:
            return place.status(self.dirs, one.id)
        except ValueError as damage:
            return {"id": one.id, "state": one.occasion.value, "message": str(damage)}

    def _place(self, one: Owed) -> Path:
        return self.dirs.hooks / one.id

    # --- the rest ----------------------------------------------------------------------

    def pause(self, now: float) -> float:
        """Seconds until there may be something to do that nobody tells."""
        if not self.owed:
            return math.inf
        waits = [hook.rest - now for hook in self._hooks.values() if hook.rest > now]
        waits += [at - now for at in self._rest.values() if at > now]
        return max(0.05, min([self.runs.pause(time.monotonic()), SILENCE, *waits]))

    def stop(self) -> None:
        """End what would not outlive the daemon; the next one tells it again."""
        self.runs.stop()

    def summary(self) -> dict[str, object]:
        """For the heartbeat: how many events are owed, and why hooks fail."""
        failing = {o.value: hook.why for o, hook in self._hooks.items() if hook.failures}
        return {"owed": len(self.owed), "failing": failing}


def _line(kind: Note, one: Owed, **facts: object) -> Event:
    return Event(clock.now(), kind, facts={"event": one.key, **facts})


def _environment(one: Owed, summary: str) -> dict[str, str]:
    """A hook's: little of ours, and what it is about."""
    env = {"PATH": os.defpath, "LANG": "C.UTF-8"}
    env |= {name: os.environ[name] for name in _PASSED if name in os.environ}
    told = {"STATE": one.occasion.value, "EVENT_ID": one.key, "SUMMARY": summary}
    # Of a rejected file the id that it was taken under; the gate has none.
    task = one.id if one.occasion.of_task else str(one.facts.get("id") or "")
    return env | {f"CODEXD_{name}": value for name, value in {**told, "TASK": task}.items()}
