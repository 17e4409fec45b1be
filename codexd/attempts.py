"""Attempts: those that ended are judged, those that may begin are begun.

Part of the master, which calls `collect`, `awake` and `dispatch` in every round,
in this order.  A worker is started only after its orders and its ledger line
are on disk.  One whose task was cancelled, says the ledger, is stopped until it ends.
An attempt is judged at once when its result is there, for Codex ended before that,
and without a result only when nothing of it lives.

May fail: what the host refuses is told, and done again in the next round.  A task whose
attempt it does not let begin lets others go first, and is tried again from time to time.
"""

from __future__ import annotations

from collections.abc import Callable

from codexd import clock, dispatch, durable, place
from codexd.aside import Aside
from codexd.beside import Beside
from codexd.config import Config
from codexd.dispatch import NOT_BEFORE
from codexd.finish import Finish, Finished
from codexd.gate import Keeper
from codexd.launcher import Launcher
from codexd.ledger import Ledger
from codexd.model import Event, Kind, State, Task
from codexd.orders import Orders
from codexd.outcome import Outcome
from codexd.policy import ANSWERED
from codexd.waits import Waits

# What Python raises for data that nobody foresaw.  One task's must not end the daemon, at
# each start again; where a file is known to be damaged, its reader says so.
_DATA = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError)

Record = Callable[[list[Event]], None]
RETRY = 3.0  # seconds until one more of those that could not begin is tried again
_AGAIN = 5.0  # seconds after which what was cancelled and still works is stopped again


class Attempts:
    """What runs, and what comes of it."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        launcher: Launcher,
        keeper: Keeper,
        finish: Finish,
        record: Record,
        refused: Callable[..., None],
        warn: Callable[..., None],
        error: Callable[..., None],
    ) -> None:
        """`refused` is told what the host would not do, `warn` and `error` are the
        master's log."""
        self.config = config
        self.dirs = config.dirs
        self.ledger = ledger
        self.launcher = launcher
        self.keeper = keeper
        self.finish = finish
        self.orders = Orders(config, keeper, finish)
        self.record = record
        self.refused = refused
        self.error = error
        self.wake_at: dict[str, float] = {}
        self._stop_at: dict[str, float] = {}  # those cancelled: when to stop them, once more
        self.aside = Aside(keeper, error)
        self.beside = Beside(self.dirs, ledger.book.tasks, warn, refused)
        # Tasks that were let through a closed gate, and what they are to find out.
        self.probing: dict[str, frozenset[str]] = {}
        self.waits = Waits(ledger, finish, record, refused)
        # Tasks whose attempt the host did not let begin, and why; tried longest ago, first.
        self._late: dict[str, OSError] = {}
        self._retry_at = 0.0

    # --- attempts that ended ------------------------------------------------------

    def collect(self, now: float) -> None:
        """Judge every attempt that has ended."""
        running = [t for t in self.ledger.book.tasks.values() if t.state is State.RUNNING]
        ended = [t for t in running if self._has_result(t)]
        if len(ended) < len(running):
            working = self.launcher.working()
            others = [t for t in running if t not in ended]
            self._stop([t for t in others if t.cancel and t.id in working], now)
            lost = [t for t in others if t.id not in working]
            alive = self.launcher.active() if lost else set()
            ended += [t for t in lost if t.id not in alive]
        finished = [f for f in map(self._judged, ended) if f]
        self.finish.spend.save()  # before the ledger: what it has is not judged again
        self.record([f.event for f in finished])
        for one in finished:
            try:
                self._after(one, now)
            except OSError as error:  # no room to say that the gate opens: the next one does
                self.refused(error, task=one.event.id)

    def _stop(self, cancelled: list[Task], now: float) -> None:
        """Stop what was cancelled and still works.

        More than once: the daemon may have died with the call that was to do it, systemd not
        have answered it, or have heard of it before it was asked to start the worker.
        """
        at = {task.id: self._stop_at.get(task.id, now) for task in cancelled}
        due = [id for id, when in at.items() if when <= now]
        self._stop_at = {**at, **dict.fromkeys(due, now + _AGAIN)}
        self.launcher.stop(due)

    def _judged(self, task: Task) -> Finished | None:
        """What its attempt came to; None while that cannot be said, or not be written."""
        try:
            return self._found(task)
        except OSError as error:
            self.refused(error, task=task.id, session=task.session)
            return None

    def _found(self, task: Task) -> Finished | None:
        try:
            if why := self.launcher.refusal(task.id):
                self.error("worker.refused", task=task.id, session=task.session, why=why)
                return self.finish.judge(task, refused=why, own=self.keeper.its_own(task))
            ended = self.launcher.ended(task.id)
            if ended is None and self._is_ending(task):
                return None  # its exit record will say who stopped it
            self.beside.look(task)
            out, own = self.keeper.is_out(task), self.keeper.its_own(task)
            found = self.finish.judge(task, ended, outage=out, own=own)
            self.keeper.heard(task, found.outcome, found.turned)
            return found
        except OSError:
            raise
        except _DATA as fault:
            return self.finish.unjudged(task, fault)

    def _is_ending(self, task: Task) -> bool:
        """Whether its worker was stopped by somebody, and its unit is not gone yet."""
        stopped = self.launcher.survives and self.finish.evidence.was_stopped(task)
        return stopped and task.id in self.launcher.active()

    def _has_result(self, task: Task) -> bool:
        path = place.attempt(self.dirs, task.id, task.launches) / "result.json"
        try:
            return durable.is_there(path)
        except OSError as error:
            self.refused(error, task=task.id, session=task.session)
            return False

    def _after(self, one: Finished, now: float) -> None:
        probed = self.probing.pop(one.event.id, frozenset())
        self.aside.met(one.outcome, one.message)
        if one.delay:
            self.wake_at[one.event.id] = now + one.delay
        if one.close:
            self.keeper.met(one.outcome, one.message, one.profile, one.at)
        elif one.outcome in ANSWERED:
            # Not whoever else is done: it may have asked the model before it was spent.
            self.keeper.passed(probed, one.event.id)
        if one.ran and not (one.close and one.outcome is Outcome.HOST):
            self.keeper.open(Outcome.HOST.value, one.event.id)

    def awake(self, now: float) -> None:
        """Tasks whose pause is over, or that waited for what has come, go to the queue."""
        # Not `now`: until here the round may have taken long, and delays would be shorter.
        self.waits.tend(clock.steady())
        events = []
        tasks = self.ledger.book.tasks
        for id in [i for i in self.wake_at if i not in tasks or not tasks[i].until]:
            del self.wake_at[id]  # released, held or cancelled meanwhile
        for task in tasks.values():
            if task.state is State.WAITING and task.until and task.reason != NOT_BEFORE:
                if task.id not in self.wake_at:  # we were started meanwhile
                    self.wake_at[task.id] = now + clock.left(task.until, self.config.retry.cap)
                if now >= self.wake_at[task.id]:
                    del self.wake_at[task.id]
                    events.append(Event(clock.now(), Kind.QUEUED, task.id))
        self.record(events)

    # --- attempts that begin --------------------------------------------------------

    def dispatch(self, now: float) -> None:
        """Start what may start: orders, then the ledger, then the worker."""
        active = self.launcher.active()
        self.aside.tend(idle=not active)
        self._look_at_probes()
        gate = self.keeper.gate(now, frozenset().union(*self.probing.values()))
        apart = not self.config.workdir_sharing
        tasks, slots = self.ledger.book.tasks.values(), self.config.workers
        skip = self._skipped(now, free=len(active) < slots)
        chosen = dispatch.ready(tasks, gate, slots, active, apart, skip)
        events = [e for e in (self._ordered(task, now) for task in chosen) if e]
        begun = {e.id for e in events if e.kind is Kind.RUNNING}
        self.record(events)
        self.probing |= {t.id: held for t in chosen if t.id in begun and (held := gate.held(t))}
        self.launcher.start([e.id for e in events if e.id in begun], self.orders.limits)
        self.orders.limits.clear()

    def _look_at_probes(self) -> None:
        """The model has answered one: the others need not wait until its turn has ended."""
        for id, held in list(self.probing.items()):
            task = self.ledger.book.tasks.get(id)
            try:
                if task and task.state is State.RUNNING and self.finish.evidence.answered(task):
                    self.keeper.passed(held, id)
                    del self.probing[id]
            except OSError as error:
                self.refused(error, task=id)

    def _skipped(self, now: float, free: bool) -> set[str]:
        """Those that could not begin, but for the one whose turn it is to be tried again:
        at the head of the queue they would take the slot from all behind them."""
        tasks = self.ledger.book.tasks
        for id in [i for i in self._late if i not in tasks or tasks[i].state is not State.QUEUED]:
            del self._late[id]
        for id, error in self._late.items():
            self.refused(error, task=id, session=tasks[id].session)
        skip = set(self._late)
        if skip and free and now >= self._retry_at:
            id = next(iter(self._late))
            self._late[id] = self._late.pop(id)
            skip.remove(id)
        return skip

    def _ordered(self, task: Task, now: float) -> Event | None:
        """The event that begins its attempt; None while a file of its own is in the way."""
        try:
            event = self._begun(task)
        except OSError as error:
            self.refused(error, task=task.id, session=task.session)
            self._late[task.id] = error.with_traceback(None)  # which would keep all it knew
            self._retry_at = now + RETRY
            return None
        if task.id in self._late:
            self._late.clear()  # what was in its way was in the way of others, as a rule
        return event

    def _begun(self, task: Task) -> Event:
        try:
            return self.orders.order(task)
        except OSError:
            raise
        except _DATA as fault:
            return self.finish.senseless(task, fault)
