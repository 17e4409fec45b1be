"""The ledger, what may start and what follows an outcome, together against a small model.

Tasks are accepted, started, judged, held, released and cancelled, the gate closes and opens,
the daemon crashes in the middle of a write, the ledger is marked and begun anew: in any
order, on a real file.  The model knows only who came when, who is at work, and how
often; what the ledger adds up to has to say the same at any time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from codexd import dispatch, policy
from codexd.dispatch import Gate
from codexd.ledger import Ledger, render
from codexd.model import Event, Kind, Note, State, Task
from codexd.outcome import Outcome
from tests.history import AT, facts_of, ident, queued, read
from tests.proof.level import Figures, chances, pick
from tests.proof.place import scratch

pytestmark = pytest.mark.timeout(pick(300, 3600, 12 * 3600))

EXAMPLES, STEPS = pick(80, 2000, 40_000), pick(40, 80, 80)
SLOTS, LIMIT = 3, 3
LATER = "2026-11-23T08:00:00.000Z"
FULL_LIFE = frozenset({Kind.DONE, Kind.FAILED, Kind.CANCELLED})


@dataclass
class Known:
    """What the model remembers of a task."""

    session: str
    starts: int = 0
    forgiven: int = 0  # starts that do not count
    interrupted: int = 0
    ends: int = 0
    cancel: bool = False


class Machine(RuleBasedStateMachine):
    """Everything that a master does to its tasks, without the master."""

    home: Path
    figures: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        shutil.rmtree(self.home, ignore_errors=True)
        (self.home / "archive").mkdir(parents=True)
        self.path = self.home / "tasks.md"
        self.ledger = Ledger(self.path, self.home / "checkpoint.json")
        self.known: dict[str, Known] = {}
        self.alive: set[str] = set()  # tasks of which some process lives
        self.closed: set[str] = set()
        self.number = 0

    def teardown(self) -> None:
        self.ledger.close()

    # --- what the model knows ---------------------------------------------------------

    @property
    def tasks(self) -> dict[str, Task]:
        return self.ledger.book.tasks

    def live(self) -> list[str]:
        return [id for id, one in self.known.items() if not one.ends]

    def those(self, *states: State) -> list[str]:
        return [task.id for task in self.tasks.values() if task.state in states]

    def chosen(self, data: st.DataObject, *states: State) -> Task:
        return self.tasks[data.draw(st.sampled_from(self.those(*states)))]

    def rest(self) -> list[str]:
        """Tasks that do not run any more, and of which something lives."""
        return sorted(self.alive.difference(self.those(State.RUNNING)))

    def append(self, *events: Event) -> None:
        self.ledger.append(list(events))
        for event in events:
            if event.kind in FULL_LIFE:
                self.known[event.id].ends += 1
        self.count(*(str(event.kind) for event in events))

    def count(self, *names: str) -> None:
        for name in names:
            self.figures[name] = self.figures.get(name, 0) + 1

    # --- tasks ------------------------------------------------------------------------

    @precondition(lambda self: len(self.tasks) < 12)
    @rule(rows=st.lists(st.tuples(st.sampled_from(["", "s", "t"]), st.integers(0, 9),
                                  st.sampled_from([None, "work"]), st.integers(0, 3)),
                        min_size=1, max_size=4))  # fmt: skip
    def accept(self, rows: list[tuple[str, int, str | None, int]]) -> None:
        for session, priority, profile, bound in rows:
            self.number += 1
            id = ident(self.number)
            bounds = {} if bound else {"not_before": LATER}
            self.append(queued(self.number, session=session or None, priority=priority,
                               profile=profile, limit=LIMIT, workdir="/w", **bounds))  # fmt: skip
            self.known[id] = Known(session or id)

    @rule(data=st.data(), probe=st.booleans())
    def round(self, data: st.DataObject, probe: bool) -> None:
        """As the master's: what has ended is judged, then what may start is started."""
        for id in self.rest():
            if data.draw(st.booleans()):
                self.alive.discard(id)  # the last process of an attempt that was judged
        for id in self.those(State.RUNNING):
            if data.draw(st.booleans()):
                self.judge(data, self.tasks[id])
        self.dispatch(data, probe)

    def dispatch(self, data: st.DataObject, probe: bool) -> None:
        gate = Gate(self.ledger.book.gate, frozenset(self.closed - {"hold"} if probe else ()))
        for task in dispatch.ready(self.tasks.values(), gate, SLOTS, self.alive):
            known = self.known[task.id]
            assert task.id not in self.alive, "something of the attempt before lives"
            assert not task.bound
            before = [i for i in self.live() if self.known[i].session == known.session]
            assert before[0] == task.id, "in order, one at a time"
            held = gate.held(task)
            assert held <= gate.probes, "held, and nobody is to find out"
            known.starts += 1
            facts = {"launches": task.launches + 1, "attempts": task.attempts + 1}
            self.append(Event(AT, Kind.RUNNING, task.id, facts))
            if data.draw(st.integers(0, 4)):  # else the daemon dies before it has done so
                self.alive.add(task.id)

    def judge(self, data: st.DataObject, task: Task) -> None:
        """An attempt has come to something."""
        outcome = data.draw(st.sampled_from([*Outcome, Outcome.DONE, Outcome.DONE]))
        turned = data.draw(st.booleans())
        known = self.known[task.id]
        if task.id not in self.alive:
            outcome, turned = Outcome.INTERRUPTED, False  # it never began
        if known.cancel:
            outcome = Outcome.CANCELLED
        step = policy.after(outcome, turned=turned, attempts=task.attempts, limit=task.limit,
                            interruptions=task.interruptions, base=10.0, cap=600.0, chance=0.5,
                            outage=data.draw(st.booleans()))  # fmt: skip
        self.append(*self.follows(task, outcome, step))
        if data.draw(st.booleans()):  # else some process of it lives on
            self.alive.discard(task.id)
        assert (step.kind is Kind.DONE) == (outcome is Outcome.DONE), "evidence alone"
        assert (step.kind is Kind.CANCELLED) == (outcome is Outcome.CANCELLED)

    def follows(self, task: Task, outcome: Outcome, step: policy.Step) -> Iterator[Event]:
        """The events of a step, as `finish` makes them; what the model makes of it."""
        known = self.known[task.id]
        facts: dict[str, object] = {"outcome": outcome.value}
        if step.kind not in FULL_LIFE:
            facts = {"reason": outcome.value, "until": LATER if step.delay else None}
            facts |= {"thread": None, "fresh": True} if step.fresh else {"thread": "T"}
        if not step.counted:
            known.forgiven += 1
            known.interrupted += not step.close
            facts |= {"attempts": task.attempts - 1, "interruptions": known.interrupted}
        yield Event(AT, step.kind, task.id, facts)
        if step.close:
            reason = outcome.value + (f":{task.profile}" if task.profile else "")
            self.closed.add(reason)
            yield Event(AT, Note.CLOSED, facts={"reason": reason, "message": "m"})

    def runs(self, id: str) -> bool:
        return self.tasks[id].state is State.RUNNING

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), verb=st.sampled_from(["cancel", "stop", "hold", "wake", "wake"]))
    def control(self, data: st.DataObject, verb: str) -> None:
        """What somebody asks for; `wake`: what a task waited for has come, or it is released."""
        some = self.those(State.RUNNING) if verb == "stop" else []
        task = self.chosen(data, *([State.RUNNING] if some else State))
        waits, runs = task.state is State.WAITING, self.runs(task.id)
        if verb == "wake" and waits:
            self.append(Event(AT, Kind.QUEUED, task.id, {"freed": True} if task.bound else {}))
        elif verb == "hold" and not runs:
            self.append(Event(AT, Kind.WAITING, task.id, {"reason": "hold"}))
        elif verb == "cancel" and not runs:
            self.append(Event(AT, Kind.CANCELLED, task.id, {"outcome": "cancelled"}))
        elif verb in ("cancel", "stop") and runs and not task.cancel:
            self.known[task.id].cancel = True
            self.append(Event(AT, Kind.STOPPING, task.id, {"cancel": True}))

    # --- the gate, and the ledger itself ------------------------------------------------

    @rule(data=st.data())
    def gate(self, data: st.DataObject) -> None:
        """It is closed by hand, or opens for one of its reasons."""
        if self.closed:
            reasons = [r for r in sorted(self.closed) if data.draw(st.integers(0, 3))]
            self.closed.difference_update(reasons)
            self.append(*(Event(AT, Note.OPENED, facts={"reason": r}) for r in reasons))
        elif not data.draw(st.integers(0, 2)):
            self.closed.add("hold")
            self.append(Event(AT, Note.CLOSED, facts={"reason": "hold", "message": "m"}))

    @rule(data=st.data(), what=st.sampled_from(["checkpoint", "rotate", "crash", "crash"]))
    def ledger_alone(self, data: st.DataObject, what: str) -> None:
        """What must not change what it says."""
        before = facts_of(self.ledger.book)
        if what == "checkpoint":
            self.ledger.checkpoint()
        elif what == "rotate":
            self.ledger.rotate(AT)
        else:
            self.crash(data)
        assert facts_of(self.ledger.book) == before
        self.count(what)

    def crash(self, data: st.DataObject) -> None:
        """In the middle of a line that nobody was told of; what lives, lives on."""
        torn = render(queued(self.number + 1, title="never acknowledged"))
        part = torn[: data.draw(st.integers(0, len(torn) - 1))]
        self.ledger.close()
        with open(self.path, "ab") as file:
            file.write(part)
        if data.draw(st.booleans()):
            (self.home / "checkpoint.json").unlink(missing_ok=True)
        self.ledger = Ledger(self.path, self.home / "checkpoint.json")
        assert self.ledger.torn == len(part)

    # --- at any time --------------------------------------------------------------------

    @invariant()
    def who_is_there(self) -> None:
        assert list(self.tasks) == self.live(), "none lost, none twice, in the order they came"
        assert all(known.ends <= 1 for known in self.known.values())
        assert set(self.ledger.book.gate) == self.closed
        assert not self.ledger.book.damaged
        for id, task in self.tasks.items():
            known = self.known[id]
            assert task.launches == known.starts
            assert task.attempts == known.starts - known.forgiven <= LIMIT
            assert task.interruptions == known.interrupted <= policy.INTERRUPTIONS
            assert task.cancel is known.cancel

    @invariant()
    def who_is_at_work(self) -> None:
        running = [id for id in self.tasks if self.runs(id)]
        assert len({*running, *self.alive}) <= SLOTS
        sessions = [self.known[id].session for id in running]
        assert len(set(sessions)) == len(sessions)

    @invariant()
    def what_others_read(self) -> None:
        """The file alone, and with the short cut, say what the writer knows."""
        whole = facts_of(self.ledger.book)
        assert facts_of(read(self.path)) == whole
        assert facts_of(read(self.path, self.home / "checkpoint.json")) == whole


def test_ledger_dispatch_and_policy_agree_with_a_model(figure: Figures) -> None:
    Machine.home = scratch("machine") / "root"
    Machine.figures = {}
    chosen = seed(chances("machine").randrange(1 << 30))(Machine)
    told = settings(
        max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    try:
        run_state_machine_as_test(chosen, settings=told)
    finally:
        shutil.rmtree(Machine.home.parent)
    figure("machine: lives", EXAMPLES)
    figure("machine: what happened in them", dict(sorted(Machine.figures.items())))
    wanted = {*map(str, Kind), str(Note.CLOSED), str(Note.OPENED), "crash", "rotate", "checkpoint"}
    assert Machine.figures.keys() >= wanted, "all of it has happened"
