"""The values, and the one table that says how a task may change."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from codexd.model import (
    FACTS,
    ID_PATTERN,
    Event,
    IllegalEvent,
    Kind,
    Note,
    Request,
    Resume,
    Sandbox,
    State,
    Task,
    apply,
    check,
    is_id,
    to_json,
)
from codexd.outcome import Outcome

ID = "20261123t072011-k3f9qa7x2m"
AT, LATER = "2026-11-23T07:20:11.123Z", "2026-11-23T08:00:00.000Z"

# The manual's words, apart from the code's table: state, event, state after it.
WAYS = """
-        queued     queued
queued   running    running
queued   waiting    waiting
queued   cancelled  cancelled
queued   failed     failed
running  stopping   running
running  queued     queued
running  waiting    waiting
running  done       done
running  failed     failed
running  cancelled  cancelled
waiting  queued     queued
waiting  waiting    waiting
waiting  cancelled  cancelled
waiting  failed     failed
"""
ALLOWED = {(was, kind): then for was, kind, then in map(str.split, WAYS.strip().splitlines())}
PAIRS = [(was, kind) for was in (None, *State) for kind in Kind]


def task(state: State | None, **facts: Any) -> Task | None:
    return Task(ID, state, **facts) if state else None


# --- ids --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        (ID, True),
        ("00000000t000000-0000000000", True),
        (ID.upper(), False),
        (ID + "\n", False),
        (" " + ID, False),
        (ID[:-1], False),
        (ID + "a", False),
        (ID.replace("1", "١"), False),  # an Arabic digit is no digit here
        (ID.replace("t", "T"), False),
        ("../../../../etc/passwd/0000", False),
        ("", False),
    ],
)
def test_an_id_is_one_pattern_and_nothing_around_it(text: str, well_formed: bool) -> None:
    assert is_id(text) is well_formed


@given(st.from_regex(re.compile(ID_PATTERN, re.ASCII), fullmatch=True))
def test_every_id_is_safe_as_a_file_name_and_a_unit_instance(id: str) -> None:
    assert is_id(id)
    assert set(id) <= set("0123456789abcdefghijklmnopqrstuvwxyz-")


# --- the table --------------------------------------------------------------------


@pytest.mark.parametrize(("was", "kind"), PAIRS)
def test_a_pair_without_a_row_cannot_happen(was: State | None, kind: Kind) -> None:
    event = Event(AT, kind, ID, {"file": "a.md"})
    then = ALLOWED.get((was or "-", kind.value))
    if then is None:
        with pytest.raises(IllegalEvent, match=ID):
            apply(task(was), event)
    else:
        assert apply(task(was), event).state == then


@pytest.mark.parametrize("state", [s for s in State if s.ended])
@pytest.mark.parametrize("kind", Kind)
def test_terminal_stays_terminal(state: State, kind: Kind) -> None:
    with pytest.raises(IllegalEvent):
        apply(task(state), Event(AT, kind, ID, {"file": "a.md"}))


@pytest.mark.parametrize("note", Note)
def test_a_note_is_not_about_a_task(note: Note) -> None:
    with pytest.raises(IllegalEvent, match=note.value):
        apply(None, Event(AT, note, ID))


def test_queued_again_is_no_acceptance() -> None:
    """The first line may be damaged: then nobody knows what the task asks for."""
    with pytest.raises(IllegalEvent, match="before it was accepted"):
        apply(None, Event(AT, Kind.QUEUED, ID, {"reason": "interrupted", "attempts": 1}))


# --- facts ------------------------------------------------------------------------

FULL = {
    "session": "web", "priority": 7, "file": "fix.md", "title": "Fix", "key": "k",
    "workdir": "/w", "launches": 1, "attempts": 1, "thread": "T", "message": "said",
    "until": LATER, "reason": "rate", "started": AT, "created": AT,
    "after": ("y", "z"), "not_before": AT, "delay": 5.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("was", "kind", "facts", "expected"),
    [
        pytest.param(State.QUEUED, Kind.RUNNING, {},
                     {"until": None, "reason": None, "message": None},
                     id="a-start-clears-what-was-said"),
        pytest.param(State.QUEUED, Kind.RUNNING, {}, {"started": AT}, id="the-first-start-stands"),
        pytest.param(State.RUNNING, Kind.STOPPING, {"cancel": True},
                     {"cancel": True, "reason": "rate", "until": LATER, "message": "said"},
                     id="stopping-clears-nothing"),
        pytest.param(State.RUNNING, Kind.WAITING, {"until": AT, "reason": "quota"},
                     {"until": AT, "reason": "quota"}, id="waiting-says-for-what"),
        pytest.param(State.WAITING, Kind.QUEUED, {}, {"until": None, "reason": None},
                     id="queued-again-waits-for-nothing"),
        pytest.param(State.RUNNING, Kind.QUEUED, {"thread": None}, {"thread": "T"},
                     id="none-says-nothing"),
        pytest.param(State.RUNNING, Kind.QUEUED, {"fresh": True}, {"thread": None},
                     id="fresh-forgets-the-thread"),
        pytest.param(State.RUNNING, Kind.QUEUED, {"fresh": True, "thread": "U"}, {"thread": None},
                     id="fresh-is-stronger"),
        pytest.param(State.WAITING, Kind.WAITING, {"after": ["x"], "not_before": LATER},
                     {"after": ("x",), "not_before": LATER}, id="bound-by-a-list-of-json"),
        pytest.param(State.WAITING, Kind.QUEUED, {"freed": True},
                     {"after": (), "not_before": None, "delay": None}, id="freed-of-all"),
        pytest.param(State.RUNNING, Kind.DONE, {"outcome": "done", "thread": "U"},
                     {"outcome": Outcome.DONE, "thread": "U", "ended": LATER}, id="an-end"),
        pytest.param(State.RUNNING, Kind.FAILED, {"outcome": Outcome.OOM},
                     {"outcome": Outcome.OOM}, id="an-outcome-as-a-value"),
        pytest.param(State.RUNNING, Kind.WAITING, {"state": "done", "id": "x", "new": 1},
                     {"id": ID, "state": State.WAITING}, id="state-and-id-are-no-facts"),
    ],
)  # fmt: skip
def test_facts(was: State, kind: Kind, facts: dict[str, Any], expected: dict[str, Any]) -> None:
    after = apply(task(was, **FULL), Event(LATER, kind, ID, facts))
    assert {name: getattr(after, name) for name in expected} == expected
    bound = {"after", "not_before", "delay"}
    untouched = FULL.keys() - {"until", "reason", "message", "thread"} - (bound & expected.keys())
    assert {name: getattr(after, name) for name in untouched} == {n: FULL[n] for n in untouched}


def test_times_come_from_the_events() -> None:
    queued = apply(None, Event(AT, Kind.QUEUED, ID, {"file": "a.md"}))
    running = apply(queued, Event(LATER, Kind.RUNNING, ID))
    assert (queued.created, queued.started, queued.ended) == (AT, None, None)
    assert (running.created, running.started, running.ended) == (AT, LATER, None)


def test_an_unknown_outcome_is_an_error() -> None:
    with pytest.raises(ValueError, match="glorious"):
        apply(task(State.RUNNING), Event(AT, Kind.DONE, ID, {"outcome": "glorious"}))


class Life(RuleBasedStateMachine):
    """One task under random events, against the manual's table and a plain dict."""

    def __init__(self) -> None:
        super().__init__()
        self.task: Task | None = None
        self.state = "-"
        self.facts: dict[str, Any] = {}
        self.clock = 0

    @rule(
        kind=st.sampled_from(list(Kind)),
        facts=st.fixed_dictionaries(
            {},
            optional={
                "file": st.just("a.md"),
                "attempts": st.integers(0, 9),
                "thread": st.none() | st.sampled_from("TU"),
                "message": st.none() | st.text(max_size=5),
                "reason": st.sampled_from(["hold", "rate"]),
                "outcome": st.sampled_from([o.value for o in Outcome]),
            },
        ),
    )
    def event(self, kind: Kind, facts: dict[str, Any]) -> None:
        self.clock += 1
        event = Event(f"{self.clock:024}", kind, ID, facts)
        then = ALLOWED.get((self.state, kind.value))
        if then is None or (self.state == "-" and "file" not in facts):
            before = self.task
            with pytest.raises(IllegalEvent):
                apply(self.task, event)
            assert self.task is before
            return
        self.task = apply(self.task, event)
        self.state = then
        if kind is not Kind.STOPPING:
            self.facts.pop("reason", None)
        if kind is Kind.RUNNING:
            self.facts.pop("message", None)
        self.facts |= {k: v for k, v in facts.items() if v is not None}

    @invariant()
    def agrees(self) -> None:
        if self.task is None:
            assert self.state == "-"
            return
        assert self.task.state.value == self.state
        assert (self.task.ended is None) == (self.state not in ("done", "failed", "cancelled"))
        for name in ("file", "thread", "message", "reason", "outcome"):
            assert getattr(self.task, name) == self.facts.get(name), name
        assert self.task.attempts == self.facts.get("attempts", 0)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_every_fact_of_a_task_has_a_type() -> None:
    assert set(FACTS) == {f.name for f in fields(Task)} - {"id", "state"}
    check({f.name: f.default for f in fields(Task) if f.default is not MISSING})
    for name, wrong in (("session", 7), ("after", [1]), ("usage", {"input_tokens": "1"})):
        with pytest.raises(IllegalEvent, match=name):
            apply(None, Event("t", Kind.QUEUED, "i", {"file": "f", name: wrong}))


# --- requests ---------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates, too
REQUESTS = st.builds(
    Request,
    prompt=TEXT,
    session=st.none() | TEXT,
    sandbox=st.none() | st.sampled_from(Sandbox),
    resume=st.sampled_from(Resume),
    timeout=st.none() | st.floats(1, 1e6),
    priority=st.integers(0, 9),
    images=st.lists(TEXT, max_size=3).map(tuple),
    add_dirs=st.lists(TEXT, max_size=3).map(tuple),
    memory=st.booleans(),
)


@given(REQUESTS)
def test_a_request_survives_its_file(request: Request) -> None:
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_a_newer_version_s_request_can_be_read() -> None:
    old = Request("p", images=("a.png",))
    assert Request.from_json({**old.to_json(), "later": ["x"], "latest": {}}) == old
    assert Request.from_json({"prompt": "p"}) == Request("p")
    with pytest.raises(ValueError, match="prompt: it is missing"):
        Request.from_json({"session": "s"})


def test_sandboxes_are_ordered_from_the_narrowest() -> None:
    assert sorted(Sandbox, key=lambda s: s.order) == ["read-only", "workspace-write",
                                                      "danger-full-access"]  # fmt: skip


# --- what readers get -------------------------------------------------------------

CONTRACT = [
    "id",
    "state",
    "outcome",
    "message",
    "until",
    "reason",
    "session",
    "title",
    "file",
    "key",
    "retry_of",
    "priority",
    "attempts",
    "created",
    "started",
    "ended",
    "workdir",
    "thread",
    "answer",
    "answer_file",
    "usage",
    "cost",
]


@pytest.mark.parametrize(
    ("state", "after", "message"),
    [
        (State.WAITING, ("a", "b"), "it follows a, b"),
        (State.WAITING, ("a", "b", "c", "d", "e"), "it follows a, b, c and 2 more"),
        (State.WAITING, (), None),
        (State.QUEUED, ("a",), None),
    ],
)
def test_who_waits_for_others_says_so(
    state: State, after: tuple[str, ...], message: str | None
) -> None:
    assert to_json(Task(ID, state, after=after), None, None)["message"] == message


@pytest.mark.parametrize(
    "subject",
    [
        Task(ID),
        Task(ID, State.DONE, "web", outcome=Outcome.DONE, usage={"input_tokens": 3, "odd": 1}),
    ],
)
def test_a_task_in_json_has_every_key_always(subject: Task) -> None:
    told = to_json(subject, "text", "/answers/a.md")
    assert list(told) == CONTRACT
    assert told["usage"] == {
        "input_tokens": subject.usage.get("input_tokens"),
        "cached_input_tokens": None,
        "output_tokens": None,
        "reasoning_output_tokens": None,
    }
    cost = {"cpu_seconds", "memory_peak_bytes", "io_read_bytes", "io_write_bytes"}
    assert told["cost"] == dict.fromkeys(cost)
    assert told["session"] == (subject.session or ID)
    json.dumps(told)
