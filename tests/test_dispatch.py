"""What may start now: one of a session, at most N, by priority, then ledger order."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from codexd import dispatch
from codexd.dispatch import Gate, heads, overlap, ready
from codexd.model import State, Task

OPEN = Gate({})
Q, R, W = State.QUEUED, State.RUNNING, State.WAITING


def tasks(*rows: tuple[str, State, str, int]) -> list[Task]:
    return [Task(id, state, session or None, priority) for id, state, session, priority in rows]


@pytest.mark.parametrize(
    ("rows", "slots", "active", "started"),
    [
        pytest.param([], 4, "", "", id="nothing-to-do"),
        pytest.param([("a", Q, "", 5), ("b", Q, "", 5)], 4, "", "ab", id="no-session-is-its-own"),
        pytest.param([("a", Q, "s", 5), ("b", Q, "s", 5)], 4, "", "a", id="one-of-a-session"),
        pytest.param([("a", Q, "s", 0), ("b", Q, "s", 9)], 4, "", "a",
                     id="priority-does-not-overtake-in-a-session"),
        pytest.param([("a", R, "s", 5), ("b", Q, "s", 5)], 4, "a", "",
                     id="one-runs-the-next-waits"),
        pytest.param([("a", W, "s", 5), ("b", Q, "s", 5)], 4, "", "",
                     id="a-waiting-task-holds-back-its-session"),
        pytest.param([("a", W, "s", 5), ("b", Q, "t", 5)], 4, "", "b", id="but-no-other-session"),
        pytest.param([("a", Q, "", 1), ("b", Q, "", 9), ("c", Q, "", 9)], 2, "", "bc",
                     id="by-priority-then-ledger-order"),
        pytest.param([("a", R, "", 5), ("b", Q, "", 5), ("c", Q, "", 5)], 2, "a", "b",
                     id="slots-taken-by-running"),
        pytest.param([("a", R, "", 5), ("b", Q, "", 5)], 1, "", "",
                     id="running-in-the-ledger-counts-even-if-its-worker-is-gone"),
        pytest.param([("a", Q, "", 5), ("b", Q, "", 5)], 4, "a", "b",
                     id="attempt-2-waits-until-nothing-of-attempt-1-lives"),
        pytest.param([("b", Q, "", 5)], 1, "z", "", id="a-worker-without-a-task-takes-a-slot"),
        pytest.param([("a", Q, "", 5)], 0, "", "", id="no-slots"),
        pytest.param([("a", Q, "", 5)], 1, "xyz", "", id="more-running-than-slots"),
        pytest.param([("a", Q, "", 5), ("b", Q, "a", 5)], 4, "", "a",
                     id="a-retry-in-the-session-named-by-the-first-task-s-id"),
    ],
)  # fmt: skip
def test_ready(
    rows: list[tuple[str, State, str, int]], slots: int, active: str, started: str
) -> None:
    chosen = ready(tasks(*rows), OPEN, slots, set(active))
    assert [t.id for t in chosen] == list(started)


@pytest.mark.parametrize(
    ("closed", "probes", "trying", "running", "width"),
    [
        ([], [], [], 0, 4),
        ([], [], [], 3, 1),
        ([], [], [], 9, 0),
        (["hold"], [], [], 0, 0),
        (["quota"], [], [], 0, 0),
        (["quota"], ["quota"], [], 0, 1),
        (["quota"], ["quota"], ["quota"], 1, 0),
        # What runs may have begun before: it finds out nothing.
        (["quota"], ["quota"], [], 1, 1),
        (["host"], ["host"], [], 3, 1),
        (["quota", "hold"], ["quota"], [], 0, 0),
        (["quota", "auth"], ["quota", "auth", "more"], [], 0, 1),
        (["quota", "auth"], ["quota", "auth", "more"], ["auth"], 1, 0),
    ],
)
def test_the_gate(
    closed: list[str], probes: list[str], trying: list[str], running: int, width: int
) -> None:
    gate = Gate({r: {} for r in closed}, frozenset(probes), frozenset(trying))
    rows = [(f"r{n}", R, "", 5) for n in range(running)] + [(f"q{n}", Q, "", 5) for n in range(9)]
    assert len(ready(tasks(*rows), gate, 4, set())) == width


def of(id: str, profile: str | None = None, workdir: str | None = None, **more: Any) -> Task:
    return Task(id, profile=profile, workdir=workdir, **more)


def test_a_spent_quota_holds_those_with_its_credential() -> None:
    queue = [of("a"), of("b", "work"), of("c", "home"), of("d", "work")]
    plain, keyed = Gate({"quota": {}}), Gate({"auth:work": {}})
    assert [t.id for t in ready(queue, plain, 4, set())] == ["b", "c", "d"]
    assert [t.id for t in ready(queue, keyed, 4, set())] == ["a", "c"]
    # What codexd.yaml names is the credential of those that name none.
    assert [t.id for t in ready(queue, Gate({"quota": {}}, profile="work"), 4, set())] == ["c"]
    for reason in ("hold", "host", "budget"):
        assert not ready(queue, Gate({reason: {}}), 4, set())


def test_one_probe_for_each_credential() -> None:
    queue = [of("a"), of("b"), of("c", "work"), of("d", "work"), of("e", "home")]
    gate = Gate({"quota": {}, "quota:work": {}}, frozenset({"quota", "quota:work"}))
    assert [t.id for t in ready(queue, gate, 9, set())] == ["a", "c", "e"]
    assert [t.id for t in ready(queue, gate, 1, set())] == ["a"]
    queue[0] = replace(queue[0], state=R)
    trying = replace(gate, trying=frozenset({"quota"}))
    assert [t.id for t in ready(queue, trying, 9, set())] == ["c", "e"]
    host = Gate({"host": {}, "quota": {}}, frozenset({"host", "quota"}))
    assert [t.id for t in ready(queue, host, 9, set())] == ["b"]
    assert not ready(queue, replace(host, trying=frozenset({"host"})), 9, set())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("/w", "/w", True),
        ("/w", "/w/a/b", True),
        ("/w/a", "/w/ab", False),
        ("/w/a", "/w/b", False),
        ("/", "/w", True),
    ],
)
def test_one_workdir_for_two(one: str, other: str, same: bool) -> None:
    queue = [of("a", workdir=one), of("b", workdir=other), of("c", workdir="/c")]
    both = ["a", "c"] if same else ["a", "b", "c"]
    if one == "/":
        both = ["a"]
    assert [t.id for t in ready(queue, OPEN, 4, set(), apart=True)] == both
    assert [t.id for t in ready(queue, OPEN, 4, set())] == ["a", "b", "c"]
    queue[0] = replace(queue[0], state=R)
    assert [t.id for t in ready(queue, OPEN, 4, {"a"}, apart=True)] == both[1:]
    assert overlap(one, other) is overlap(other, one) is same


def test_who_waits_for_a_directory_is_not_overtaken() -> None:
    queue = [of("a", workdir="/w/a", state=R), of("b", workdir="/w"), of("c", workdir="/w/c")]
    more = [*queue, of("d", workdir="/d")]
    assert [t.id for t in ready(more, OPEN, 4, {"a"}, apart=True)] == ["d"]
    assert [t.id for t in ready(more[1:], OPEN, 4, set(), apart=True)] == ["b", "d"]
    assert [t.id for t in ready(more[1:], OPEN, 1, set(), apart=True)] == ["b"]


@given(st.lists(st.sampled_from(["/", "/a", "/a/b", "/ab", "/a/b/c", "/c"]), max_size=8))
def test_no_two_in_one_directory(places: list[str]) -> None:
    queue = [of(str(n), workdir=place) for n, place in enumerate(places)]
    chosen = ready(queue, OPEN, 8, set(), apart=True)
    for one in chosen:
        for other in chosen:
            assert one is other or not overlap(str(one.workdir), str(other.workdir))
    if queue:
        assert chosen[0] is queue[0]


def test_ten_thousand_that_wait_for_directories_cost_little() -> None:
    queue = [of("a", workdir="/w", state=R)]
    queue += [of(f"b{n}", workdir=f"/w/{n}/x/y/z") for n in range(10_000)]
    began = time.process_time()
    assert ready(queue, OPEN, 64, {"a"}, apart=True) == []
    assert time.process_time() - began < 1.0


def test_nobody_works_where_a_worker_is_still_there() -> None:
    """Its task waits for its next attempt, and the one before is not gone."""
    again = [of("a", workdir="/w"), of("b", workdir="/w")]
    assert [t.id for t in ready(again, OPEN, 4, {"a"}, apart=True)] == []
    queue = [of("a", workdir="/w", state=W), of("b", workdir="/w")]
    assert [t.id for t in ready(queue, OPEN, 4, {"a"}, apart=True)] == []
    assert [t.id for t in ready(queue, OPEN, 4, set(), apart=True)] == ["b"]


def test_a_probe_is_the_task_that_would_come_first() -> None:
    rows = tasks(("a", Q, "", 1), ("b", Q, "", 9))
    gate = Gate({"quota": {}}, frozenset({"quota"}))
    assert [t.id for t in ready(rows, gate, 4, set())] == ["b"]


@pytest.mark.parametrize(
    ("bound", "facts"),
    [
        ({"after": ("x",)}, {"reason": "after"}),
        ({"not_before": "T"}, {"reason": "not_before", "until": "T"}),
        ({"after": ("x",), "not_before": "T"}, {"reason": "after"}),
    ],
)
def test_what_is_bound_does_not_start_and_holds_back_its_session(
    bound: dict[str, Any], facts: dict[str, str]
) -> None:
    first, second = tasks(("a", Q, "s", 5), ("b", Q, "s", 5))
    bound_one = replace(first, **bound)
    assert ready([bound_one, second], OPEN, 4, set()) == []
    assert dispatch.wait(bound_one) == facts


def test_who_is_skipped_keeps_its_session_and_gives_up_its_slot_directory_and_probe() -> None:
    rows = tasks(("a", Q, "s", 9), ("b", Q, "s", 5), ("c", Q, "", 5))
    assert [t.id for t in ready(rows, OPEN, 1, set(), skip={"a"})] == ["c"]
    probe = Gate({"quota": {}}, frozenset({"quota"}))
    assert [t.id for t in ready(rows, probe, 1, set(), skip={"a"})] == ["c"]
    below = [of("a", workdir="/w"), of("b", workdir="/w/x")]
    assert [t.id for t in ready(below, OPEN, 4, set(), apart=True, skip={"a"})] == ["b"]


def test_heads_are_the_oldest_of_each_session() -> None:
    rows = tasks(("a", W, "s", 5), ("b", Q, "s", 5), ("c", Q, "", 5))
    assert {name: t.id for name, t in heads(rows).items()} == {"s": "a", "c": "c"}


@given(
    st.lists(
        st.tuples(st.sampled_from([Q, R, W]), st.sampled_from(["", "s", "t"]), st.integers(0, 9)),
        max_size=12,
    ),
    st.integers(0, 5),
    st.sets(st.integers(0, 11)),
)
def test_whatever_the_queue_looks_like(
    rows: list[tuple[State, str, int]], slots: int, alive: set[int]
) -> None:
    queue = tasks(*((str(n), state, name, p) for n, (state, name, p) in enumerate(rows)))
    active = {str(n) for n in alive}
    chosen = ready(queue, OPEN, slots, active)
    names = [t.session_name for t in chosen]
    assert len(set(names)) == len(names)
    assert len(chosen) <= max(0, slots - len(active))
    for one in chosen:
        assert one.state is Q
        assert one.id not in active
        before = queue[: queue.index(one)]
        assert all(t.session_name != one.session_name for t in before)
    assert chosen == ready(queue, OPEN, slots, active)


class Queue(RuleBasedStateMachine):
    """Tasks come, run, wait and end; workers outlive a restart of the daemon."""

    SLOTS = 3

    def __init__(self) -> None:
        super().__init__()
        self.queue: dict[str, Task] = {}
        self.alive: set[str] = set()
        self.order: dict[str, list[str]] = {}
        self.ended: dict[str, list[str]] = {}
        self.count = 0

    @rule(session=st.sampled_from("st"), priority=st.integers(0, 9))
    def drop(self, session: str, priority: int) -> None:
        id = f"{self.count:03}"
        self.count += 1
        self.queue[id] = Task(id, Q, session, priority)
        self.order.setdefault(session, []).append(id)

    @rule()
    def dispatch(self) -> None:
        """Also what a new daemon does first: it knows the ledger and who is alive."""
        for one in ready(self.queue.values(), OPEN, self.SLOTS, self.alive):
            self.queue[one.id] = Task(one.id, R, one.session, one.priority)
            self.alive.add(one.id)

    @precondition(lambda self: self.alive)
    @rule(pick=st.randoms(use_true_random=False), then=st.sampled_from(["end", Q, W]))
    def worker_ends(self, pick: object, then: str | State) -> None:
        id = pick.choice(sorted(self.alive))  # type: ignore[attr-defined]
        self.alive.discard(id)
        was = self.queue.pop(id) if then == "end" else self.queue[id]
        if isinstance(then, State):
            self.queue[id] = Task(id, then, was.session, was.priority)
        else:
            self.ended.setdefault(was.session_name, []).append(id)

    @rule()
    def wake(self) -> None:
        for id, one in self.queue.items():
            if one.state is W:
                self.queue[id] = Task(id, Q, one.session, one.priority)

    @invariant()
    def serial_and_bounded(self) -> None:
        assert len(self.alive) <= self.SLOTS
        names = [self.queue[id].session_name for id in self.alive]
        assert len(set(names)) == len(names)
        for session, ids in self.ended.items():
            assert ids == self.order[session][: len(ids)], "strict order within a session"


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_closed_gate_is_tried_by_another_than_who_closed_it() -> None:
    met = Task("20260101t000000-aaaaaaaaaa", priority=9, launches=1, file="a")
    other = Task("20260101t000000-bbbbbbbbbb", priority=0, file="b")
    gate = Gate({"auth": {}}, frozenset({"auth"}))
    assert ready([met, other], gate, 4, set()) == [other]
    assert ready([met], gate, 4, set()) == [met]
    assert ready([met, other], Gate({}), 4, set()) == [met, other]
