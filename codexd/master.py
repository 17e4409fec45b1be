"""codexd-master: take, dispatch, collect; the only writer of shared state.

One round does everything there is to do, and every step of it may be repeated
after a crash.  A hint (a file event, a worker's end, a signal) only makes the
next round come sooner.

Promises: a file is a task once its ledger line is on disk, and no sooner gone
from the inbox; a worker is started only after its ledger line and its orders
are on disk; when an attempt has ended, transcript, session and answer are
written, and only then the ledger says so; attempt N+1 waits until nothing of
attempt N lives.

May fail: a full disk closes the gate and is tried again; a ledger that cannot
be trusted ends the process, and the next start replays it.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable

from codexd import __version__, clock, dispatch, heartbeat, lock, place, spool
from codexd.config import Config, ConfigError
from codexd.control import Controls
from codexd.finish import Finish, Finished
from codexd.gate import DISK, Keeper
from codexd.intake import Intake
from codexd.launcher import Processes
from codexd.ledger import Ledger, LedgerBroken, LedgerFull
from codexd.model import Event, Kind, Note, State, Task, is_id
from codexd.orders import Orders
from codexd.outcome import Outcome
from codexd.program import Exit, load, options
from codexd.service import Level, Service

SCAN = 3.0  # seconds between looks into the inbox without a hint
STOP = 12.0  # seconds for workers to end with the daemon
PATIENCE = 2.0  # seconds more for what was killed; a process may hang in the kernel
_CHECKPOINT = 4 << 20  # bytes of ledger after which the short cut is renewed


class Master:
    """The daemon's work.  Open it under the root's lock only."""

    def __init__(self, config: Config, service: Service) -> None:
        self.config = config
        self.dirs = config.dirs
        self.service = service
        self.ledger = Ledger(self.dirs.ledger, self.dirs.checkpoint)
        self.settled = spool.Settled()
        self.watch = spool.Watch(self.dirs.inbox, self.settled, service.wake)
        self.launcher = Processes(self.dirs.tasks, self.dirs.run, service.bell)
        self.keeper = Keeper(config, self.ledger, self.note)
        self.intake = Intake(config, self.ledger, self.settled, self.refused)
        self.finish = Finish(config, self.warn)
        self.controls = Controls(
            config, self.ledger, self.launcher, self.keeper, self.finish, self.refused
        )
        self.orders = Orders(config, self.keeper, self.finish)
        self.trouble: str | None = None  # what the host refused in the last round
        self._told: set[str] = set()  # and what was logged of it
        self.stop_at: float | None = None
        self.beside: Callable[[], None] | None = None  # what else this process tends
        self._wake_at: dict[str, float] = {}
        self._ended: set[str] = set()  # to be moved to the archive
        self._next_checkpoint = 0.0

    def warn(self, event: str, **fields: object) -> None:
        self.service.log(Level.WARNING, event, **fields)

    def note(self, event: str, **fields: object) -> None:
        self.service.log(Level.NOTICE, event, **fields)

    def say(self, event: Event) -> None:
        """One log line for a ledger event."""
        about = {"task": event.id} if event.id else {}
        level = Level.WARNING if event.kind in (Kind.FAILED, Note.REJECTED) else Level.INFO
        facts = {k: v for k, v in event.facts.items() if k not in ("usage", "cost", "task")}
        self.service.log(level, ("task." if event.id else "") + event.kind, **about, **facts)

    def record(self, events: list[Event]) -> None:
        self.ledger.append(events)
        for event in events:
            self.say(event)

    # --- the round --------------------------------------------------------------

    def begin(self) -> None:
        """Once, before the first round: say who we are, tidy up what a crash left."""
        book = self.ledger.book
        for line in book.damaged:
            self.service.log(Level.ERROR, "ledger.damaged", where=line)
        if self.ledger.torn:
            self.warn("ledger.torn", cut_bytes=self.ledger.torn)
        facts = {"version": __version__, "pid": os.getpid(), "tasks": len(book.tasks)}
        try:
            self.record([Event(clock.now(), Note.STARTED, facts=facts)])
            for task in list(book.tasks.values()) if book.damaged else ():
                self.record(self.finish.retold(task))
        except LedgerFull as full:
            self.refused(full)  # the first round closes the gate
        for id in sorted(p.name for p in self.dirs.tasks.iterdir()):
            try:
                if id not in book.tasks:
                    self._tidy(id)
            except OSError as error:
                self.warn("not.tidied", path=self.dirs.tasks / id, why=sentence(error))

    def _tidy(self, id: str) -> None:
        """A directory of no live task: ended, being taken, or never taken."""
        if os.path.lexists(self.dirs.inbox / (spool.TAKE + id)):
            return
        if not is_id(id):
            self.warn("not.ours", path=self.dirs.tasks / id, why="no task; left as it is")
        elif (self.dirs.tasks / id / "status.json").exists():
            place.archive(self.dirs, id)
        elif (self.dirs.tasks / id / "task.json").exists():
            why = "the ledger's line of it is lost; left as it is: drop it again if it is wanted"
            self.warn("task.unknown", task=id, why=why)
        else:
            spool.discard(self.dirs, id)

    def step(self) -> float:
        """One round; the seconds until the next."""
        now = time.monotonic()
        if self.service.stopping:
            return self._stop(now)
        self.trouble = None
        self.round(now)
        self.beat()
        if not self.trouble:
            self._told.clear()
        if self.beside:
            self.beside()
        return self._pause(now)

    def refused(self, error: OSError) -> None:
        """The host does not let us go on; it is tried again, and told once."""
        self.trouble = sentence(error)
        if self.trouble not in self._told:
            self._told.add(self.trouble)
            self.service.log(Level.ERROR, "host.refuses", what=self.trouble)

    def round(self, now: float) -> None:
        """Everything there is to do.  What the host refuses holds up only its own part."""
        self.intake.more = self.intake.full = False
        for part in (
            self.keeper.look,
            self.take,
            self.collect,
            self.awake,
            self.dispatch,
            self.tend,
        ):
            try:
                part(now)
            except OSError as error:
                self.refused(error)

    def take(self, now: float) -> None:
        """Obey control files, accept task files."""
        self.watch.tend()
        names, leftover = spool.scan(self.dirs.inbox)
        self.settled.prune(names)
        names = self.controls.obey(names, self.record)
        if DISK not in self.keeper.closed:
            for event in self.intake.take(names, leftover, now):
                self.say(event)
            # Before they can start: cancelled or held, they must not cost a turn.
            self.controls.obey(self.controls.waiting, self.record)

    # --- attempts that ended ------------------------------------------------------

    def collect(self, now: float) -> None:
        """Judge every attempt that has ended.

        With its result at once, for Codex ended before that; without one only
        when nothing of it lives, for Codex may have outlived its worker.
        """
        running = [t for t in self.ledger.book.tasks.values() if t.state is State.RUNNING]
        ended = [t for t in running if self._has_result(t)]
        if len(ended) < len(running):
            working = self.launcher.working()
            lost = [t for t in running if t not in ended and t.id not in working]
            alive = self.launcher.active() if lost else set()
            ended += [t for t in lost if t.id not in alive]
        finished = [f for f in map(self._judged, ended) if f]
        self.record([f.event for f in finished])
        for one in finished:
            self._after(one, now)

    def _judged(self, task: Task) -> Finished | None:
        """What its attempt came to; None while a file of its own is in the way."""
        try:
            return self.finish.judge(task)
        except OSError as error:
            self.refused(error)
            return None

    def _has_result(self, task: Task) -> bool:
        return (place.attempt(self.dirs, task.id, task.launches) / "result.json").exists()

    def _after(self, one: Finished, now: float) -> None:
        if one.close:
            self.keeper.met(one.outcome, one.message)
        elif one.outcome in (Outcome.DONE, Outcome.NO_ANSWER):
            self.keeper.passed()
        if one.event.id not in self.ledger.book.tasks:
            self._ended.add(one.event.id)
        elif one.delay:
            self._wake_at[one.event.id] = now + one.delay

    def awake(self, now: float) -> None:
        """Tasks whose pause is over go back to the queue."""
        events = []
        tasks = self.ledger.book.tasks
        for id in [i for i in self._wake_at if i not in tasks or not tasks[i].until]:
            del self._wake_at[id]  # released, held or cancelled meanwhile
        for task in tasks.values():
            if task.state is State.WAITING and task.until:
                if task.id not in self._wake_at:  # we were started meanwhile
                    left = clock.epoch(task.until) - time.time()
                    self._wake_at[task.id] = now + min(max(left, 0.0), self.config.retry.cap)
                if now >= self._wake_at[task.id]:
                    del self._wake_at[task.id]
                    events.append(Event(clock.now(), Kind.QUEUED, task.id))
        self.record(events)

    # --- attempts that begin --------------------------------------------------------

    def dispatch(self, now: float) -> None:
        """Start what may start: orders, then the ledger, then the worker."""
        active = self.launcher.active()
        gate = self.keeper.gate(now)
        chosen = dispatch.ready(self.ledger.book.tasks.values(), gate, self.config.workers, active)
        events = [e for e in map(self._ordered, chosen) if e]
        self.record(events)
        for event in events:
            if event.kind is Kind.RUNNING:
                self._launch(event.id)
            else:
                self._ended.add(event.id)

    def _ordered(self, task: Task) -> Event | None:
        """The event that begins its attempt; None while a file of its own is in the way."""
        try:
            return self.orders.order(task)
        except OSError as error:
            self.refused(error)
            return None

    def _launch(self, id: str) -> None:
        try:
            self.launcher.start(id)
        except OSError as error:
            # The next round finds a running task without a worker and without
            # `started`, and puts it back uncounted.
            self.service.log(Level.ERROR, "worker.refused", task=id, why=str(error))

    # --- the rest ---------------------------------------------------------------------

    def tend(self, now: float) -> None:
        """What ended goes to the archive; a checkpoint, so that the next start is short."""
        for id in sorted(self._ended):
            try:
                place.archive(self.dirs, id)
                self._ended.discard(id)
            except OSError as error:
                self.refused(error)
        if self.ledger.unmarked >= _CHECKPOINT and now >= self._next_checkpoint:
            self._next_checkpoint = now + 10.0
            try:
                self.ledger.checkpoint()
            except OSError as error:  # it is no more than a short cut
                self.service.log(Level.ERROR, "host.refuses", what=sentence(error))

    def summary(self) -> dict[str, object]:
        """What the heartbeat tells readers."""
        tasks = self.ledger.book.tasks.values()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "at": clock.now(),
            "launcher": self.launcher.kind,
            "watch": self.watch.kind,
            "watch_problem": self.watch.problem,
            "codex": self.keeper.version or None,
            "running": sum(t.state is State.RUNNING for t in tasks),
            "queued": sum(t.state is State.QUEUED for t in tasks),
            "waiting": sum(t.state is State.WAITING for t in tasks),
            "full": self.intake.full,
            "trouble": self.trouble,
            "damaged": len(self.ledger.book.damaged),
            "gate": self.keeper.closed,
        }

    def beat(self) -> None:
        """Tell readers how things are."""
        told = self.summary()
        self.service.status(_one_line(told))
        try:
            heartbeat.write(self.dirs.heartbeat, told)
        except OSError as error:
            self.refused(error)

    def _pause(self, now: float) -> float:
        if self.trouble:
            return 1.0
        if self.intake.more:
            return 0.0
        scan = 0.1 if self.settled.pending(now) else SCAN
        return min([scan, self.launcher.pause(now), *(at - now for at in self._wake_at.values())])

    def _stop(self, now: float) -> float:
        """Interrupt the turns, collect them, leave; called until done."""
        active = self.launcher.active()
        if self.stop_at is None:
            self.stop_at = now + STOP
            self.watch.stop()
            self.service.notify("STOPPING=1")
            self.launcher.stop(active)
        elif active and now >= self.stop_at:
            self.launcher.kill(active)
            active = self.launcher.active()
        if active and now < self.stop_at + PATIENCE:
            return 0.1
        try:
            self.collect(now)
            self.record([Event(clock.now(), Note.STOPPED)])
            self.ledger.checkpoint()
        except OSError as error:
            self.refused(error)  # the next start does what was left
        raise StopIteration


_MEND = {
    errno.EISDIR: "; move it away",
    errno.ENOTDIR: "; move it away",
    errno.EEXIST: "; move it away",
    errno.ENOSPC: "; make room",
    errno.EROFS: "; mount it writable",
    errno.EACCES: "; give it to the user that codexd runs as",
}


def sentence(error: OSError) -> str:
    """Where, what, and what to do."""
    what = (error.strerror or str(error)) + _MEND.get(error.errno or 0, "")
    return f"{error.filename}: {what}" if error.filename else what


def _one_line(told: dict[str, object]) -> str:
    gate = told["gate"]
    closed = f"; closed: {', '.join(gate)}" if isinstance(gate, dict) and gate else ""
    return f"{told['running']} running, {told['queued']} queued, {told['waiting']} waiting{closed}"


def run(config: Config, service: Service, started: Callable[[Master], None]) -> None:
    """Everything under the root's lock.

    Raises lock.Locked when another daemon serves this root, OSError when a
    directory cannot be used, LedgerBroken when the ledger cannot be trusted.
    """
    config.dirs.lock.parent.mkdir(parents=True, exist_ok=True)
    held = lock.hold(config.dirs.lock, 5.0)
    try:
        spool.prepare(config.dirs)
        master = Master(config, service)
        master.begin()
        master.watch.tend()
        service.catch_signals()
        master.beat()  # who reads "ready" may ask at once how things are
        started(master)
        service.run(master.step)
    finally:
        os.close(held)


def serve(config: Config, service: Service, started: Callable[[Master], None]) -> int:
    """`run`, with every failure told in one line; the exit status."""
    try:
        run(config, service, started)
    except lock.Locked:
        why = f"another codexd serves {config.dirs.state}; stop that one, or serve another --root"
        service.log(Level.ERROR, "already.served", why=why)
        return Exit.UNAVAILABLE
    except PermissionError as error:
        service.log(Level.ERROR, "no.permission", why=sentence(error))
        return Exit.PERMISSION
    except OSError as error:
        service.log(Level.ERROR, "cannot.go.on", why=sentence(error))
        return Exit.UNAVAILABLE
    except LedgerBroken as broken:
        service.log(Level.ERROR, "cannot.go.on", why=f"{config.dirs.ledger}: {broken}")
        return Exit.UNAVAILABLE
    return Exit.DONE


def main() -> None:
    """The program codexd-master, for a service unit; people use `codexd serve`."""
    args = options("codexd-master", "the codexd daemon").parse_args()
    service = Service("codexd-master")
    try:
        loaded = load(args)
    except ConfigError as error:
        service.log(Level.ERROR, "configuration", why=str(error))
        sys.exit(Exit.CONFIGURATION)
    sys.exit(serve(loaded, service, lambda _master: service.ready()))


if __name__ == "__main__":
    main()
