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

import os
import sys
import time
from collections.abc import Callable

from codexd import __version__, clock, heartbeat, launcher, lock, spool
from codexd.attempts import Attempts
from codexd.config import Config, ConfigError
from codexd.control import Controls
from codexd.finish import Finish
from codexd.gate import DISK, Keeper
from codexd.hooks import Hooks
from codexd.intake import Intake
from codexd.ledger import Ledger, LedgerBroken, LedgerFull
from codexd.model import Event, Kind, Note, State
from codexd.probe import Probe
from codexd.program import Exit, load, open_streams, options, refusal
from codexd.reload import Reload
from codexd.service import Level, Service, sentence
from codexd.spend import Spend
from codexd.sweep import Daily
from codexd.tidy import tidy

SCAN = 3.0  # seconds between looks into the inbox without a hint
STOP = 12.0  # seconds for workers to end with the daemon
PATIENCE = 2.0  # seconds more for what was killed; a process may hang in the kernel
_CHECKPOINT = 4 << 20  # bytes of ledger after which the short cut is renewed


class Master:
    """The daemon's work.  Open it under the root's lock only."""

    def __init__(
        self, config: Config, service: Service, read: Callable[[], Config], embedded: bool
    ) -> None:
        """`read` gives the configuration as it is now; `embedded`: for `codexd serve`."""
        self.config = config
        self.dirs = config.dirs
        self.service = service
        self.ledger = Ledger(self.dirs.ledger, self.dirs.checkpoint)
        self.settled = spool.Settled()
        self.watch = spool.Watch(self.dirs.inbox, self.settled, service.wake)
        self.launcher = launcher.choose(config, service, embedded)
        self.spend = Spend(self.dirs.usage, self.warn)
        self.keeper = Keeper(config, self.ledger, self.spend, self.note, self.warn)
        self.intake = Intake(
            config, self.ledger, self.settled, self.refused, limits=self.launcher.survives
        )
        self.finish = Finish(config, self.spend, self.warn)
        self.controls = Controls(
            config, self.ledger, self.launcher, self.keeper, self.finish, self.refused
        )
        self.attempts = Attempts(
            config, self.ledger, self.launcher, self.keeper, self.finish,
            self.record, self.refused, self.warn, self.error,
        )  # fmt: skip
        self.daily = Daily(config, self.ledger, self.keeper, self.note, self.warn)
        self.probe = Probe(config, self.launcher, self.keeper)
        log = (self.note, self.warn, self.error)
        self.hooks = Hooks(config, self.ledger, self.launcher.survives, *log)
        rooms = (self, self.keeper, self.intake, self.finish, self.finish.evidence, self.attempts)
        more = (self.attempts.orders, self.daily, self.probe, self.hooks)
        self.reload = Reload(service, read, config, (*rooms, *more))
        self.trouble: str | None = None  # what the host refused in the last round
        self._told: set[str] = set()  # and what was logged of it
        self.seen = 0  # files in the inbox at the last look
        self.stop_at: float | None = None
        self.beside: Callable[[], None] | None = None  # what else this process tends
        self._next_checkpoint = 0.0

    def warn(self, event: str, **fields: object) -> None:
        self.service.log(Level.WARNING, event, **fields)

    def error(self, event: str, **fields: object) -> None:
        self.service.log(Level.ERROR, event, **fields)

    def note(self, event: str, **fields: object) -> None:
        self.service.log(Level.NOTICE, event, **fields)

    def say(self, event: Event, session: str | None = None) -> None:
        """One log line for a ledger event; `session` where its facts do not name it."""
        # A file that became no task was taken under an id, which its producer may know.
        about = {"task": event.id or event.facts.get("id"), "session": session}
        level = Level.WARNING if event.kind in (Kind.FAILED, Note.REJECTED) else Level.INFO
        facts = {k: v for k, v in event.facts.items() if k not in ("id", "usage", "cost", "task")}
        self.service.log(level, ("task." if event.id else "") + event.kind, **{**about, **facts})

    def record(self, events: list[Event]) -> None:
        tasks = self.ledger.book.tasks
        sessions = {e.id: tasks[e.id].session for e in events if e.id in tasks}
        self.ledger.append(events)  # after it, tasks that have ended are no longer there
        for event in events:
            self.say(event, sessions.get(event.id))

    # --- the round --------------------------------------------------------------

    def begin(self) -> None:
        """Once, before the first round: say who we are, tidy up what a crash left."""
        book = self.ledger.book
        for line in book.told():
            self.error("ledger.damaged", where=line)
        if self.ledger.torn:
            self.warn("ledger.torn", cut_bytes=self.ledger.torn)
        facts = {"version": __version__, "pid": os.getpid(), "tasks": len(book.tasks)}
        by = {"launcher": self.launcher.kind, "launcher_why": self.launcher.why}
        try:
            self.record([Event(clock.now(), Note.STARTED, facts={**facts, **by})])
        except LedgerFull as full:
            self.refused(full)  # the first round closes the gate
        for task in list(book.tasks.values()):
            try:
                self.record(self.finish.retold(task))
            except OSError as error:
                self.refused(error, task=task.id)
        tidy(self.dirs, book, self.warn)

    def step(self) -> float:
        """One round; the seconds until the next."""
        if self.service.stopping:
            return self._stop(time.monotonic())
        now = clock.steady()
        if self.service.reloading and self.reload():
            self.keeper.look_again()
        self.trouble = None
        self.round(now)
        self.beat()
        if not self.trouble:
            self._told.clear()
        if self.beside:
            self.beside()
        return self._pause(now)

    def refused(self, error: OSError, **about: object) -> None:
        """The host does not let us go on; it is tried again, and told once."""
        self.trouble = sentence(error)
        if self.trouble not in self._told:
            self._told.add(self.trouble)
            self.service.log(Level.ERROR, "host.refuses", **about, what=self.trouble)

    def round(self, now: float) -> None:
        """Everything there is to do.  What the host refuses holds up only its own part."""
        self.intake.more = self.intake.full = False
        for part in (
            self.keeper.look,
            self.take,
            self.attempts.collect,
            self.hold,
            self.attempts.awake,
            self.probe.tend,  # so that no task goes by what it is about to forget
            self.attempts.dispatch,
            self.tend,
            self.hooks.tend,
        ):
            try:
                part(now)
            except OSError as error:
                self.refused(error)

    def take(self, now: float) -> None:
        """Obey control files, accept task files."""
        self.watch.tend()
        names, leftover = spool.scan(self.dirs.inbox)
        self.seen = len(names) + len(leftover)
        self.settled.prune(names)
        names = self.controls.obey(names, self.record)
        if DISK not in self.keeper.closed:
            for event in self.intake.take(names, leftover, now):
                self.say(event)
            # Before they can start: cancelled or held, they must not cost a turn.
            self.controls.again(self.record)

    def hold(self, now: float) -> None:
        """Tasks that were to be held and have stopped running, before they can start again."""
        self.controls.again(self.record)

    # --- the rest ---------------------------------------------------------------------

    def tend(self, now: float) -> None:
        """What ended goes to the archive, and what is old; a checkpoint, so that the
        next start is short."""
        tasks = self.ledger.book.tasks
        self.finish.archive(tasks, self.refused)
        running = {t.id for t in tasks.values() if t.state is State.RUNNING}
        self.launcher.tidy(running | self.probe.running)
        if self.ledger.unmarked >= _CHECKPOINT and now >= self._next_checkpoint:
            self._next_checkpoint = now + 10.0
            try:
                self.ledger.shorten(clock.now())
            except OSError as error:  # it only makes the next start shorter
                self.service.log(Level.ERROR, "host.refuses", what=sentence(error))
        while self.ledger.laid_aside:
            self.note("ledger.rotated", kept=self.ledger.laid_aside.pop(0))
        self.daily.tend(now)

    def summary(self) -> dict[str, object]:
        """What the heartbeat tells readers."""
        tasks = self.ledger.book.tasks.values()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "at": clock.now(),
            "launcher": self.launcher.kind,
            "launcher_why": self.launcher.why,
            "sandbox": self.probe.problem,
            "config_problem": self.reload.problem,
            "watch": self.watch.kind,
            "watch_problem": self.watch.problem,
            "codex": self.keeper.version or None,
            "running": sum(t.state is State.RUNNING for t in tasks),
            "queued": sum(t.state is State.QUEUED for t in tasks),
            "waiting": sum(t.state is State.WAITING for t in tasks),
            "seen": self.seen,
            "full": self.intake.full,
            "file_limit": self.config.limits.file,
            "profile": self.config.codex.profile,
            "trouble": self.trouble,
            "damaged": self.ledger.book.lost,
            "ended": self.ledger.book.ended,
            **self.keeper.summary(),
            "workdir_sharing": self.config.workdir_sharing,
            "hooks": self.hooks.summary(),
        }

    def beat(self) -> None:
        """Tell readers how things are."""
        told = self.summary()
        self.service.status(heartbeat.line(told))
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
        rooms = (self.daily, self.hooks, self.attempts.waits)
        due = [*(room.pause(now) for room in rooms), self.launcher.pause(time.monotonic())]
        return min([scan, *due, *(at - now for at in self.attempts.wake_at.values())])

    def _stop(self, now: float) -> float:
        """Interrupt the turns that would not survive us, collect them, leave; called until done."""
        active = set() if self.launcher.survives else self.launcher.active()
        if self.stop_at is None:
            self.stop_at = now + STOP
            self.watch.stop()
            self.service.notify("STOPPING=1")
            self.launcher.stop(active)
            self.hooks.stop()
        elif active and now >= self.stop_at:
            self.launcher.kill(active)
            active = self.launcher.active()
        if active and now < self.stop_at + PATIENCE:
            return 0.1
        try:
            self.attempts.collect(clock.steady())
            self.record([Event(clock.now(), Note.STOPPED)])
            self.ledger.checkpoint()
        except OSError as error:
            self.refused(error)  # the next start does what was left
        raise StopIteration


def run(
    config: Config,
    service: Service,
    read: Callable[[], Config],
    started: Callable[[Master], None],
    embedded: bool,
) -> None:
    """Everything under the root's lock.

    Raises lock.Locked when another daemon serves this root, OSError when a
    directory cannot be used, LedgerBroken when the ledger cannot be trusted.
    """
    config.dirs.lock.parent.mkdir(parents=True, exist_ok=True)
    held = lock.hold(config.dirs.lock, 5.0)
    try:
        spool.prepare(config.dirs)
        master = Master(config, service, read, embedded)
        master.begin()
        master.watch.tend()
        service.catch_signals()
        master.beat()  # who reads "ready" may ask at once how things are
        started(master)
        service.run(master.step)
    finally:
        os.close(held)


def serve(
    service: Service,
    read: Callable[[], Config],
    started: Callable[[Master], None],
    embedded: bool = False,
) -> int:
    """`run`, with every failure told in one line; the exit status."""
    try:
        config = read()
    except ConfigError as error:
        service.log(Level.ERROR, "configuration", why=str(error))
        return refusal(error)
    try:
        run(config, service, read, started, embedded)
    except launcher.NoLauncher as problem:
        service.log(Level.ERROR, "cannot.go.on", why=str(problem))
        return Exit.CONFIGURATION
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
    open_streams()
    args = options("codexd-master", "the codexd daemon").parse_args()
    service = Service("codexd-master")
    sys.exit(serve(service, lambda: load(args), lambda _master: service.ready()))


if __name__ == "__main__":
    main()
