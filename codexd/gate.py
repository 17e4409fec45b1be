"""The gate: what holds all dispatch, and when to look whether it still must.

Part of the master.  A spent quota, a failed login, a missing Codex, a full disk,
`drain` and `hold` are not states of ten thousand tasks; each closes the gate once, by
one ledger event with its reason.  Quota, login and an outage of the service are those of a
credential, which is the CODEX_HOME and the profile: a task with another profile goes
on.  What codexd can see for itself (Codex, disk, the day's tokens) opens it again by
looking; what only the service knows is found out by letting one task through, at a
known time or after growing pauses.

That the service is out, one attempt does not tell, but several in a row of several
tasks do (`policy.is_outage`).  They are counted in memory: from a start on, anew.

The ledger may be the very thing that cannot be written (a full disk): then the
reason stands in memory alone, and is told in the heartbeat and the log.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from codexd import canary, clock, codex, command, free, policy, profile
from codexd.config import Config
from codexd.dispatch import KEYED, Gate, of_one
from codexd.ledger import Ledger, LedgerFull
from codexd.model import Event, Note, Sandbox, Task
from codexd.outcome import Outcome
from codexd.pauses import Pauses, since
from codexd.spend import Spend, midnight, whole

HOLD, DRAIN, CODEX, DISK = "hold", "drain", "codex", "disk"
BY_HAND = (HOLD, DRAIN)
BUDGET = Outcome.BUDGET.value
PROBED = KEYED | {Outcome.HOST.value}
_SHOWN = 16  # reasons that the heartbeat tells
_LOOK = 10.0  # seconds between looks at Codex
_LOGIN = ("auth.json", "config.toml")  # in CODEX_HOME


class Keeper:
    """Closes and opens the gate."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        spend: Spend,
        told: Callable[..., None],
        warn: Callable[..., None],
    ) -> None:
        """`told` and `warn` are the master's log: what is well, and what somebody must mend."""
        self.config = config
        self.ledger = ledger
        self.spend = spend
        self.told = told
        self.warn = warn
        self.binary = ""
        self.version = ""
        self.sandbox_verb = command.sandbox_verb(codex.MINIMUM)
        self.env_keys: list[str] = []
        self.unhidden: str | None = None  # why secrets are not hidden from commands
        self._unwritten: dict[str, Mapping[str, object]] = {}
        self.pauses = Pauses()
        self._opened: dict[str, str] = {}  # by whom, where it was another than codexd itself
        # By credential: attempts that failed since the model has answered one.
        self._failed: dict[str | None, dict[tuple[str, int], None]] = {}
        self._seen: tuple[object, ...] = ()
        self._login: tuple[object, ...] = ()
        self._unfit: str | None = None
        self._old: str | None = None  # why this Codex cannot be told a permission profile
        self._look_at = 0.0
        self._ask_at = 0.0

    @property
    def closed(self) -> dict[str, Mapping[str, object]]:
        return {**self.ledger.book.gate, **self._unwritten}

    def remembered(self, reason: str) -> bool:
        """Whether a hold would outlive us: its line is in the ledger, or there is none."""
        return reason not in self._unwritten

    def gate(self, now: float, trying: frozenset[str] = frozenset()) -> Gate:
        """What dispatch has to know; `now` is by clock.steady().

        `trying` are the reasons that tasks which were let through are finding out about.
        """
        closed, is_due = self.closed, self.pauses.is_due
        due = {r for r, facts in closed.items() if _is_probed(r) and is_due(r, facts, now)}
        return Gate(closed, frozenset(due), trying, self.config.codex.profile)

    # --- closing and opening --------------------------------------------------

    def close(self, reason: str, message: str, until: float | None = None) -> None:
        """One event; saying it again with the same words changes nothing."""
        facts = {"reason": reason, "message": message[:500]}
        if until is not None:
            facts["until"] = clock.stamp(until)
        old = self.closed.get(reason)
        if old and all(old.get(k) == v for k, v in facts.items()):
            return
        try:
            self.ledger.append([Event(clock.now(), Note.CLOSED, facts=facts)])
            self._unwritten.pop(reason, None)
        except LedgerFull:
            self._unwritten[reason] = {**facts, "since": clock.now()}
        if reason in BY_HAND:
            self.told("gate.closed", **facts)
        else:
            self.warn("gate.closed", **facts)

    def open(self, reason: str, by: str | None = None) -> None:
        """`by` is the task that showed that it is over."""
        self.pauses.forget(reason)
        name, _, profile = reason.partition(":")
        if name in policy.OUTAGE:
            self._failed.pop(profile or self.config.codex.profile, None)
        was = self._unwritten.pop(reason, None)
        if reason in self.ledger.book.gate:
            self.ledger.append([Event(clock.now(), Note.OPENED, facts={"reason": reason})])
        elif not was:
            return
        self._opened.pop(reason, None)
        if by:
            self._opened[reason] = by
        self.told("gate.opened", reason=reason)

    def met(
        self, outcome: Outcome, message: str, profile: str | None = None, at: float | None = None
    ) -> None:
        """A task, with that profile of its own, met a reason to hold the others.

        `at`, in epoch seconds, is when; it may have been long before we were started.
        """
        reason, now = self._reason(outcome, profile), time.time()
        until = codex.retry_at(message, at or now) if outcome is Outcome.QUOTA else None
        if outcome is Outcome.HOST:
            self._look_at = 0.0  # Codex may be what is missing
        if until is None and reason in self.closed and self.pauses.is_put_off(reason):
            return  # met at the same time by another that was running
        tries, retry = self.pauses.met(reason), self.config.retry
        pause = policy.probe_after(tries)
        if outcome not in (Outcome.QUOTA, Outcome.AUTH):  # it is over as soon as it is mended
            pause = policy.backoff(tries + 1, retry.base, retry.cap, 1.0)
        if until is not None:
            until = max(until, now)
            pause = max(1.0, until - now)
        self.pauses.put_off(reason, pause)
        self.close(reason, message, until)

    def _reason(self, outcome: Outcome, profile: str | None) -> str:
        """What the gate is closed for, by a task with that profile of its own."""
        if outcome.value in KEYED and profile not in (None, self.config.codex.profile):
            return f"{outcome.value}:{profile}"
        return outcome.value

    def its_own(self, task: Task) -> frozenset[Outcome]:
        """What only this task would be refused for: since it was closed for that, another
        task has opened the gate.  Forgotten at a start, which is in the task's favour."""
        closed = self.closed
        reasons = {o: self._reason(o, task.profile) for o in Outcome if o.value in PROBED}
        return frozenset(
            outcome
            for outcome, reason in reasons.items()
            if reason not in closed and self._opened.get(reason, task.id) != task.id
        )

    def is_out(self, task: Task) -> bool:
        """Whether one more failure, of this attempt, is not for its task to answer."""
        if any(self._reason(outcome, task.profile) in self.closed for outcome in policy.OUTAGE):
            return True
        failed = self._failed.get(task.profile or self.config.codex.profile, {})
        return policy.is_outage([*failed, (task.id, task.launches)])

    def heard(self, task: Task, outcome: Outcome, turned: bool) -> None:
        """What an attempt came to; said again after a crash it counts once."""
        credential = task.profile or self.config.codex.profile
        if outcome in policy.ANSWERED:
            self._failed.pop(credential, None)
        elif policy.may_be_outage(outcome, turned):
            self._failed.setdefault(credential, {})[task.id, task.launches] = None

    def passed(self, reasons: Iterable[str], by: str) -> None:
        """That task, let through to try them, reached the model: they are over."""
        for reason in self.closed.keys() & set(reasons):
            if _is_probed(reason):
                self.open(reason, by)

    def release(self) -> None:
        """`codexd release`: open what a person closed, try the rest now."""
        for reason in BY_HAND:
            self.open(reason)
        self.pauses.end(self.closed)

    # --- looking --------------------------------------------------------------

    @property
    def seen(self) -> tuple[object, ...]:
        """The Codex that was found: another after each upgrade."""
        return self._seen

    def look_again(self) -> None:
        """The configuration is another: what it says of Codex has to be found anew."""
        self._seen = ()
        self._look_at = 0.0

    def look(self, now: float) -> None:
        """Whether Codex and the disk are as they must be.

        What reads files of Codex comes last: a disk may refuse that in every round.
        """
        self._look_at_disk()
        self._write_down()
        if now >= self._look_at or not self.binary:
            self._look_at = now + _LOOK
            self._look_for_codex(now)
        self._look_at_budget(time.time())
        self._look_at_users()
        self._look_at_login()
        self._look_at_profile()

    def _write_down(self) -> None:
        """Say in the ledger what it had no room for."""
        for facts in list(self._unwritten.values()):
            known = {k: v for k, v in facts.items() if k != "since"}
            try:
                self.ledger.append([Event(clock.now(), Note.CLOSED, facts=known)])
            except LedgerFull:
                return
            del self._unwritten[str(facts["reason"])]

    def _look_at_disk(self) -> None:
        if why := free.shortage(self.config):
            self.close(DISK, why)
        elif DISK in self.closed:
            self.open(DISK)

    def _look_at_budget(self, when: float) -> None:
        most, used = self.config.limits.day_tokens, codex.tokens(self.spend.at(when).total)
        if most is not None and used >= most:
            text = f"{most} tokens were used today (limits.day_tokens); work goes on at midnight"
            self.close(BUDGET, text, midnight(when))
        elif BUDGET in self.closed:
            self.open(BUDGET)

    def summary(self) -> dict[str, object]:
        """For the heartbeat: why nothing starts, and what was used when it was looked at last."""
        # Those of single profiles come last: there may be as many as anybody likes.
        closed, day = self.closed, self.spend.day
        shown = sorted(closed, key=of_one)[:_SHOWN]
        used = {"day": day.day, **whole(day.total)} if day else None
        return {
            "gate": {reason: closed[reason] for reason in shown},
            "gate_more": len(closed) - len(shown),
            "today": used and {**used, "limit": self.config.limits.day_tokens},
        }

    def _look_for_codex(self, now: float) -> None:
        try:
            binary = codex.find(self.config.codex.bin, os.environ.get("PATH"))
            found = os.stat(binary)
            seen = (binary, found.st_ino, found.st_mtime_ns, found.st_size)
            if seen == self._seen and now < self._ask_at:
                return  # what it said stands: to ask costs a process
            self._seen, self._ask_at = seen, math.inf
            version = codex.version(binary, codex.environment(os.environ, self.home, []))
            self.version = ".".join(map(str, version))
            self.sandbox_verb = command.sandbox_verb(version)
            self._old = profile.too_old(version)
            self.binary = binary
            self.told("codex.found", bin=binary, version=self.version)
            self.pauses.end([Outcome.HOST.value])
        except (codex.Missing, OSError) as problem:
            self._ask_at = clock.steady() + _LOOK  # from now: to ask may have taken long
            self.binary = self.version = ""
            self.close(CODEX, str(problem))
        else:
            self.open(CODEX)

    @property
    def home(self) -> str:
        return str(self.config.codex.home)

    def sandbox(self, named: str | None, asked: Sandbox) -> str:
        """What Codex is told for a task: a permission profile, kept as it must be, or `asked`.

        The worker takes `asked` after all where Codex cannot be kept from secrets.
        """
        if profile.unused(named, asked):
            return asked.value
        if self._old:
            self._unfit = self._old
            return asked.value
        try:
            profile.write(self.config, self.env_keys)
            self._unfit = None
        except ValueError as problem:
            self._unfit = str(problem)
            return asked.value
        return profile.name(asked)

    def _look_at_users(self) -> None:
        """Where nobody waits to find out, the next who comes does."""
        keyed = {r for r in self.closed if r.partition(":")[0] in KEYED}
        if keyed:
            used = {task.profile for task in self.ledger.book.tasks.values()}
            for reason in keyed.difference(*map(self.gate(0.0).holding, used)):
                self.open(reason)

    def _look_at_profile(self) -> None:
        """What the workers found out: whether secrets are hidden from commands."""
        why = self._unfit or canary.verdict(self.home)
        if why and why != self.unhidden:
            self.warn("codex.profile", why=why)
        self.unhidden = why

    def _look_at_login(self) -> None:
        """A changed login or configuration is a reason to try at once."""
        home = Path(self.home)
        stamps = tuple(_stamp(home / name) for name in _LOGIN)
        login = (self.home, self.config.codex.profile, *stamps)
        if login == self._login:
            return
        known, self._login = self._login, login
        changed = max(stamp[0] for stamp in stamps)
        closed = self.closed.items()  # perhaps by a daemon before us
        self.pauses.end(r for r, facts in closed if known or changed > since(facts))
        try:
            self.env_keys = codex.env_keys(codex.configuration(home))
        except FileNotFoundError:
            self.env_keys = []
        except (OSError, ValueError) as problem:
            self.warn("codex.config", problem=str(problem))


def _is_probed(reason: str) -> bool:
    return reason.partition(":")[0] in PROBED


def _stamp(path: Path) -> tuple[float, int, int]:
    """When it was changed, or put there; and what differs between two of one moment."""
    try:
        found = path.stat()
    except OSError:
        return 0.0, 0, 0
    return found.st_ctime, found.st_mtime_ns, found.st_size
