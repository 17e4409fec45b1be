"""The event stream: every recording, any pieces, any rubbish."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codexd import events
from codexd.events import Reader, plain
from tests.recordings import INDEX, RECORDINGS, SAMPLES

# A machine under load is no failure.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
THREAD = "01a20751-31fa-7ab0-be5f-e03bb0b3ba42"
PUBLIC = [name for name in Reader.__slots__ if not name.startswith("_")]


def state(reader: Reader) -> dict[str, object]:
    return {name: getattr(reader, name) for name in PUBLIC}


def line(**event: Any) -> bytes:
    return json.dumps(event, ensure_ascii=False).encode() + b"\n"


def item(kind: str, what: str, name: str = "item_0", **fields: Any) -> bytes:
    return line(type=f"item.{kind}", item={"id": name, "type": what, **fields})


# --- the recordings -----------------------------------------------------------


def test_every_recording_is_there() -> None:
    """None is skipped: a folder without its files would be."""
    told = {name for name in INDEX if not name.startswith("app_server_")}
    assert {name for name in told if (SAMPLES / name / "exit_code").is_file()} == told
    assert {r.name.removesuffix(f"/{r.name[-1]}") for r in RECORDINGS.values()} >= {
        name for name in told if (SAMPLES / name / "stdout.0.jsonl").exists()
    }
    assert len(RECORDINGS) >= len(told) > 240


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recording_reads_the_same_in_any_pieces(name: str) -> None:
    recording = RECORDINGS[name]
    whole = state(recording.reader())
    chance = random.Random(name)
    for most in (1, 7, 100, 5000):
        reader, rest = Reader(), recording.stdout
        while rest:
            size = chance.randint(1, most)
            reader.feed(rest[:size])
            rest = rest[size:]
        reader.finish()
        assert state(reader) == whole


@pytest.mark.parametrize("name", [n for n in RECORDINGS if n in INDEX])
def test_a_recording_says_what_the_index_tells(name: str) -> None:
    reader, told = RECORDINGS[name].reader(), INDEX[name]
    assert reader.thread == told["thread_id"]
    cut = reader.message and reader.message[:200]  # the index has no more
    assert cut == told["final_message"]
    assert (reader.usage or None) == told["usage"]
    assert reader.completed == (told["terminal"] == "turn.completed")
    assert (reader.failed_message is not None) == (told["terminal"] == "turn.failed")


@pytest.mark.parametrize("version", ["v0.36.0", "v0.42.0", "v0.47.0", "v0.130.0"])
def test_old_versions_tell_the_same_story(version: str) -> None:
    reader = RECORDINGS[f"{version}/shell"].reader()
    assert reader.message == "Shell finished."
    assert reader.usage["input_tokens"] == 350
    assert (reader.turn_started, reader.open_items) == (True, {})
    assert reader.items_seen == 3
    assert RECORDINGS[f"{version}/e429usage"].reader().errors[-1].startswith("You've hit your")


def test_the_first_and_the_last_word_of_an_old_version() -> None:
    reader = Reader()
    reader.feed(line(id="", msg={"type": "session_configured", "session_id": THREAD}))
    reader.feed(line(id="0", msg={"type": "task_started"}))
    assert (reader.thread, reader.completed) == (THREAD, False)
    reader.feed(line(id="0", msg={"type": "task_complete", "last_agent_message": "fine"}))
    assert reader.completed


def test_the_last_of_several_messages_is_the_answer() -> None:
    assert RECORDINGS["reasoning"].reader().message == "Done thinking."


def test_a_command_that_outlives_the_turn_is_not_open_after_it() -> None:
    assert RECORDINGS["shell_left_running"].reader().open_items == {}


# --- what counts as progress --------------------------------------------------


def test_retries_of_codex_are_no_progress_and_no_end() -> None:
    reader = Reader()
    assert reader.feed(line(type="thread.started", thread_id=THREAD))
    assert reader.feed(line(type="turn.started"))
    reader.feed(item("started", "command_execution", command="make"))
    for number in range(1, 4):
        message = f"Reconnecting... {number}/5 (exceeded retry limit, last status: 429 Too Many)"
        assert not reader.feed(line(type="error", message=message))
    assert reader.reconnecting
    assert (reader.errors, reader.ended) == ([], False)
    assert reader.feed(item("completed", "command_execution"))
    assert reader.reconnecting is None


@pytest.mark.parametrize(
    "message",
    ["Re-connecting... 1/1", "stream error: x; retrying 1/1 in 190ms…", "Reconnecting... waiting"],
)
def test_retries_of_every_version_are_known(message: str) -> None:
    reader = Reader()
    assert not reader.feed(line(type="error", message=message))
    assert reader.reconnecting == message


def test_an_error_stands_until_something_else_comes() -> None:
    reader = Reader()
    assert reader.feed(line(type="error", message="stream disconnected"))
    assert reader.last_error == "stream disconnected"
    assert reader.feed(item("completed", "reasoning", text="hm"))
    assert reader.errors == ["stream disconnected"]
    assert not reader.last_error


def test_half_a_line_is_no_progress() -> None:
    reader = Reader()
    assert not reader.feed(b'{"type":"turn.star')
    assert reader.feed(b'ted"}\n')
    assert not reader.feed(b'{"type":"turn.completed"}')
    assert reader.finish()
    assert reader.completed


def test_noise_is_no_progress() -> None:
    assert not Reader().feed(b"rc=0\n[1,2]\n\xff\xfe\nnull\n" + b"[" * 100_000 + b"\n\n")


def test_what_is_unknown_is_ignored_but_is_progress() -> None:
    reader = Reader()
    assert reader.feed(line(type="item.plan.delta", delta="x") + line(type="news", usage=3))
    assert reader.feed(item("started", "hologram"))
    assert reader.activity == "hologram"
    assert reader.open_items


# --- what is open -------------------------------------------------------------


def test_work_is_open_between_its_start_and_its_end() -> None:
    reader = Reader()
    reader.feed(item("started", "command_execution", "a", command="/bin/bash -lc 'make test'"))
    reader.feed(item("started", "mcp_tool_call", "b", server="s", tool="t"))
    assert reader.open_items == {"a": "running: make test", "b": "calling: s t"}
    reader.feed(item("completed", "mcp_tool_call", "b"))
    assert reader.activity == "running: make test"
    reader.feed(item("completed", "command_execution", "a"))
    assert (reader.open_items, reader.activity) == ({}, "thinking")


@pytest.mark.parametrize("what", ["todo_list", "reasoning", "agent_message", "web_search"])
def test_what_the_model_does_is_never_open(what: str) -> None:
    """A plan ends with the turn: a hang of the model would never be noticed."""
    reader = Reader()
    reader.feed(item("started", what, items=[{"text": "one", "completed": False}]))
    assert not reader.busy
    assert reader.items_seen == 1


def test_codex_is_not_busy_while_it_waits_for_the_service() -> None:
    reader = Reader()
    reader.feed(item("started", "command_execution", command="sleep 9"))
    assert reader.busy
    reader.feed(line(type="error", message="Reconnecting... 1/5 (429 Too Many Requests)"))
    assert not reader.busy
    reader.feed(item("completed", "reasoning", "b"))
    assert reader.busy


def test_open_items_are_bounded() -> None:
    reader = Reader()
    for number in range(3000):
        reader.feed(item("started", "command_execution", str(number)))
    assert len(reader.open_items) == 1000


def test_the_last_word_about_the_turn_stands() -> None:
    reader = Reader()
    reader.feed(line(type="turn.completed", usage={"input_tokens": 1}))
    assert reader.ended
    reader.feed(line(type="turn.started"))
    assert not reader.ended
    reader.feed(line(type="turn.failed", error={"message": "no"}))
    assert (reader.completed, reader.failed_message) == (False, "no")


@pytest.mark.parametrize(
    ("what", "fields", "activity"),
    [
        ("command_execution", {"command": "bash -lc \"echo 'a'\""}, "running: echo 'a'"),
        ("command_execution", {"command": "ls\n\x1b[31m -l"}, "running: ls [31m -l"),
        ("command_execution", {"command": 5}, "running:"),
        ("file_change", {"changes": [{"path": "/a"}, {"path": "/b"}]}, "editing: /a, /b"),
        ("file_change", {"changes": None}, "editing:"),
        ("web_search", {"query": "weather"}, "searching: weather"),
        ("collab_tool_call", {}, "collab tool call"),
        ("", {}, "working"),
        ("reasoning", {}, "thinking"),
    ],
)
def test_activity(what: str, fields: dict[str, Any], activity: str) -> None:
    reader = Reader()
    reader.feed(item("started", what, **fields))
    assert reader.activity == activity


def test_activity_is_one_short_line() -> None:
    reader = Reader()
    reader.feed(item("started", "command_execution", command="x\n" * 10_000))
    assert len(reader.activity) == 80


# --- limits -------------------------------------------------------------------


def test_a_line_of_megabytes_is_read() -> None:
    reader = Reader()
    text = "é" * (4 << 20)
    data = item("completed", "agent_message", text=text)
    for start in range(0, len(data), 65536):
        reader.feed(data[start : start + 65536])
    assert reader.message == text


@pytest.mark.parametrize("chunk", [1 << 16, 1 << 26])
def test_a_line_over_the_limit_is_skipped(chunk: int) -> None:
    reader = Reader()
    reader.feed(item("started", "mcp_tool_call", "item_7"))
    data = item("completed", "mcp_tool_call", "item_7", result="x" * (events.LINE_LIMIT + 1))
    progress = [reader.feed(data[i : i + chunk]) for i in range(0, len(data), chunk)]
    assert progress[-1]
    assert not any(progress[:-1])
    assert reader.open_items == {}
    reader.feed(item("completed", "agent_message", text="after it"))
    assert reader.message == "after it"


def test_memory_stays_bounded_on_a_line_without_end() -> None:
    reader, chunk = Reader(), b"x" * (1 << 20)
    tracemalloc.start()
    try:
        for _ in range(200):
            reader.feed(chunk)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * events.LINE_LIMIT
    assert now < 1 << 20  # what is skipped is not kept
    assert reader.finish()


def test_errors_are_bounded() -> None:
    reader = Reader()
    for number in range(100):
        reader.feed(line(type="error", message=f"{number} " + "x" * 100_000))
        reader.feed(item("completed", "error", message="x" * 100_000))
    assert len(reader.errors) == len(reader.item_errors) == 10
    assert reader.errors[-1].startswith("99 ")
    assert max(map(len, reader.errors + reader.item_errors)) == 1 << 16


def test_usage_holds_counts_only() -> None:
    reader = Reader()
    usage = {"input_tokens": 5, "x": True, "y": -1, "z": "7", "cost": 1.5}
    reader.feed(line(type="turn.completed", usage=usage))
    assert reader.usage == {"input_tokens": 5}


def test_a_thread_is_a_uuid_or_nothing() -> None:
    reader = Reader()
    for name in ("--last", "../x", "", None, 7, THREAD + "\n"):
        reader.feed(line(type="thread.started", thread_id=name))
        assert reader.thread is None
    reader.feed(line(type="thread.started", thread_id=THREAD))
    assert reader.thread == THREAD


def test_half_a_surrogate_pair_can_still_be_written() -> None:
    reader = Reader()
    reader.feed(b'{"type":"item.completed","item":{"type":"agent_message","text":"a\\ud800b"}}\n')
    assert reader.message == "a?b"


def test_plain() -> None:
    assert plain("a\r\n\t b\x1b[2J\x00\u202e\u2028c", 50) == "a b [2J c"
    assert plain("x" * 51, 50) == "x" * 49 + "…"


# --- rubbish ------------------------------------------------------------------

_keys = st.sampled_from(
    """type item id msg message error usage info text thread_id call_id command changes path
    item_type prompt""".split()  # noqa: SIM905
)
_kinds = st.sampled_from(
    """thread.started turn.started turn.completed turn.failed error item.started item.updated
    item.completed session.created exec_command_begin token_count""".split()  # noqa: SIM905
)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=5),
    max_leaves=12,
)


@PATIENT
@given(st.binary(max_size=400))
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    reader = Reader()
    reader.feed(data)
    reader.finish()


@PATIENT
@given(st.lists(st.tuples(_kinds, _values), max_size=8))
def test_arbitrary_events_never_raise(told: list[tuple[str, Any]]) -> None:
    reader = Reader()
    for kind, value in told:
        fields = value if isinstance(value, dict) else {"item": value, "message": value}
        reader.feed(line(**{**fields, "type": kind}))
        reader.feed(line(msg={**fields, "type": kind}))
    reader.finish()
    assert reader.message is None or reader.message.encode()
    assert len(reader.activity) <= 80
