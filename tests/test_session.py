"""Sessions: one file each, a thread, and totals that are right after a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codexd import session
from codexd.session import Session
from tests.daemon import Daemon, until

AT, LATER = "2026-11-23T07:20:11.123Z", "2026-11-23T08:00:00.000Z"
FAKE = Path(__file__).parent / "bin" / "codex"
KEYS = ("input_tokens", "cached_input_tokens", "output_tokens", "reasoning_output_tokens")


def tokens(*counts: int) -> dict[str, int]:
    return dict(zip(KEYS, counts, strict=False))


# --- file names -------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)
CLOSE = st.text("aA/%_.~ -2F+é", min_size=1, max_size=8)


@given(NAMES | CLOSE, NAMES | CLOSE)
def test_no_two_sessions_share_a_file(one: str, other: str) -> None:
    assert (session.stem(one) == session.stem(other)) == (one == other)


@given(NAMES)
def test_every_name_fits_in_a_directory(name: str) -> None:
    stem = session.stem(name)
    assert 0 < len(stem) <= 180
    assert stem.isascii()
    assert stem.isprintable()
    assert "/" not in stem
    assert " " not in stem
    assert not stem.startswith(".")


def test_the_seed_s_clash() -> None:
    assert session.stem("a/b") == "a%2Fb"
    assert session.stem("a_b") == "a_b"


def test_a_name_made_like_a_shortened_one_has_its_own_file() -> None:
    from urllib.parse import unquote

    long = "/" * 100
    assert session.stem(unquote(session.stem(long))) != session.stem(long)


# --- files ------------------------------------------------------------------------


@given(NAMES, st.none() | st.text(max_size=9), st.integers(0, 1 << 60))
def test_a_session_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, name: str, thread: str | None, count: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "sessions"
    directory.mkdir(exist_ok=True)
    one = Session(name, thread, AT, LATER, count, "x/1", count, tokens(1), tokens(2), tokens(3))
    session.save(directory, one)
    assert session.load(directory, name) == one


def test_a_session_without_a_file_is_new(tmp_path: Path) -> None:
    assert session.load(tmp_path, "web") == Session("web")
    assert session.names(tmp_path) == []
    assert session.names(tmp_path / "not-yet") == []


GOOD: dict[str, Any] = {"name": "web", "thread": "T", "tasks": 1, "usage": {"input_tokens": 1}}


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"[" * 10_000,
        {**GOOD, "name": "other"},
        {**GOOD, "name": None},
        {**GOOD, "thread": 5},
        {**GOOD, "tasks": -1},
        {**GOOD, "tasks": "many"},
        {**GOOD, "transcript": 1.5},
        {**GOOD, "usage": [1]},
        {**GOOD, "usage": {"input_tokens": "x"}},
        {**GOOD, "reported": {"input_tokens": None}},
    ],
)
def test_a_damaged_file_is_kept_aside_and_harms_no_other(
    tmp_path: Path, damage: bytes | dict[str, Any]
) -> None:
    data = damage if isinstance(damage, bytes) else json.dumps(damage).encode()
    (tmp_path / "web.json").write_bytes(data)
    session.save(tmp_path, Session("fine"))
    with pytest.raises(ValueError, match=r"."):
        session.load(tmp_path, "web")
    kept = session.set_aside(tmp_path, "web")
    assert kept.read_bytes() == data
    assert session.load(tmp_path, "web") == Session("web")
    assert session.names(tmp_path) == ["fine"]


def test_a_newer_version_s_file_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "web.json").write_text(json.dumps({**GOOD, "colour": "blue"}))
    assert session.load(tmp_path, "web").thread == "T"


def test_names_are_the_sessions_own(tmp_path: Path) -> None:
    for name in ("b/c", "a", ".hidden", "ü"):
        session.save(tmp_path, Session(name))
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".x.json.1.tmp").touch()
    os.mkfifo(tmp_path / "fifo.json")
    assert session.names(tmp_path) == [".hidden", "a", "b/c", "ü"]


# --- adding up --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thread", "before", "reported", "used"),
    [
        pytest.param(None, tokens(), tokens(100, 0, 10), tokens(100, 0, 10), id="the-first"),
        pytest.param("T", tokens(100, 50, 10), tokens(250, 150, 30), tokens(150, 100, 20),
                     id="totals-of-the-thread"),
        pytest.param("T", tokens(100, 0, 10), tokens(100, 0, 10), tokens(0, 0, 0), id="no-use"),
        pytest.param("T", tokens(100, 0, 90), tokens(40, 0, 5), tokens(40, 0, 5),
                     id="a-version-that-reports-each-run"),
        pytest.param("U", tokens(100, 0, 10), tokens(250, 0, 30), tokens(250, 0, 30),
                     id="another-thread"),
        pytest.param("T", tokens(100, 50, 10), {}, {}, id="killed-before-it-said"),
        pytest.param("T", tokens(100, 50, 10), {"input_tokens": 200}, {"input_tokens": 100},
                     id="a-total-that-is-not-reported-has-not-shrunk"),
    ],
)  # fmt: skip
def test_what_an_attempt_used(
    thread: str | None, before: dict[str, int], reported: dict[str, int], used: dict[str, int]
) -> None:
    known = Session("web", thread, AT, AT, applied="x/1", usage=tokens(1, 1, 1), reported=before)
    after = session.add(known, "x/2", "T", reported, LATER)
    assert after.used == used
    assert after.usage == {k: (1 if k in KEYS[:3] else 0) + used.get(k, 0) for k in KEYS}
    assert (after.thread, after.applied, after.created, after.updated) == ("T", "x/2", AT, LATER)


def test_adding_an_attempt_again_changes_nothing() -> None:
    once = session.add(Session("web"), "x/1", "T", tokens(100), AT)
    assert session.add(once, "x/1", "T", tokens(100), LATER) == once


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 4), min_size=1, max_size=8))
def test_the_totals_of_a_thread_add_up_to_its_last_word(parts: list[tuple[int, ...]]) -> None:
    known, total = Session("web"), [0, 0, 0, 0]
    for n, part in enumerate(parts):
        total = [a + b for a, b in zip(total, part, strict=True)]
        known = session.add(known, f"x/{n}", "T", tokens(*total), AT)
        assert known.used == tokens(*part)
    assert known.usage == tokens(*total)


def test_an_attempt_killed_before_it_reported_is_counted_with_the_next() -> None:
    known = session.add(Session("web"), "x/1", "T", tokens(100, 0, 10), AT)
    killed = session.add(known, "x/2", "T", {}, AT)
    after = session.add(killed, "x/3", "T", tokens(180, 0, 30), AT)
    assert killed.usage["input_tokens"] == 100
    assert after.usage["input_tokens"] == 180


def test_an_attempt_without_a_thread_leaves_the_session_s() -> None:
    """What was reported of it, too: the next attempt in it counts from there."""
    known = session.add(Session("web"), "x/1", "T", tokens(100, 0, 10), AT)
    for reported in ({}, tokens(7, 0, 7)):
        without = session.add(known, "y/1", None, reported, AT)
        assert (without.thread, without.used) == ("T", reported)
        assert session.add(without, "z/1", "T", tokens(180, 0, 30), AT).used == tokens(80, 0, 20)


def test_forget_leaves_the_totals() -> None:
    known = session.add(Session("web"), "x/1", "T", tokens(100), AT)
    after = session.forget(known, LATER)
    assert (after.thread, after.updated) == (None, LATER)
    assert after.usage == known.usage
    assert session.add(after, "x/2", "U", tokens(30), LATER).usage["input_tokens"] == 130


def test_a_turn_that_outlives_a_reset_does_not_undo_it() -> None:
    known = session.add(Session("web"), "x/1", "T", tokens(100), AT)
    after = session.add(session.forget(known, LATER), "x/2", "T", tokens(120), LATER)
    assert after.thread is None
    assert after.used["input_tokens"] == 20
    begun = session.add(after, "x/3", "U", tokens(5), LATER)
    assert (begun.thread, begun.used["input_tokens"]) == ("U", 5)


def test_a_lost_thread_is_told_until_there_is_another() -> None:
    known = session.add(Session("web"), "x/1", "T", tokens(100), AT)
    lost = session.lose(known, LATER)
    assert (lost.thread, lost.lost) == (None, "T")
    assert session.add(lost, "x/2", None, {}, LATER).lost == "T"
    assert session.add(lost, "x/2", "U", {}, LATER).lost is None
    assert session.forget(lost, LATER).lost is None, "a reset is meant"
    assert session.lose(session.forget(known, LATER), LATER).lost is None


def test_an_attempt_that_outlives_a_reset_does_not_bring_its_thread() -> None:
    """Not even where nobody knew the thread at the time, and not by its next attempt."""
    for known in (Session("web"), session.add(Session("web"), "x/1", "T", tokens(9), AT)):
        after = session.forget(known, LATER, "y")
        assert after.created
        first = session.add(after, "y/1", "U", tokens(100), LATER)
        again = session.add(first, "y/2", "U", tokens(130), LATER)
        assert (after.thread, first.thread, again.thread) == (None, None, None)
        assert again.used["input_tokens"] == 30
        assert session.add(again, "z/1", "V", tokens(5), LATER).thread == "V"
        lost = session.lose(session.add(after, "y/1", None, {}, LATER), LATER)
        assert session.add(lost, "y/2", "U", tokens(1), LATER).thread is None


# --- in a daemon ------------------------------------------------------------------


@contextmanager
def served(root: Path, *modes: str) -> Iterator[Daemon]:
    """A daemon whose Codex does these one after another, and then the last."""
    with Daemon(root, config=f"http:\n  listen: off\ncodex:\n  bin: {FAKE}\n") as daemon:
        told = {"mode": ",".join(modes), "dump": str(root / "dump")}
        (daemon.dirs.codex_home / "fake.json").write_text(json.dumps(told))
        yield daemon


def asked(daemon: Daemon, name: str, *keys: str) -> dict[str, Any]:
    """What the answer says to the next task of the session `web`."""
    daemon.drop(f"{name}.md", "\n".join(["---", "session: web", *keys, "---", f"Say {name}."]))
    return daemon.answer(name, 60)[0]


def given(daemon: Daemon) -> list[str]:
    """What each Codex was started with, as it says itself."""
    return (daemon.root / "dump").read_text().splitlines()


def test_what_has_no_thread_costs_the_session_nothing(tmp_path: Path) -> None:
    """Else the whole thread would count again for the next task in it."""
    with served(tmp_path / "root", "answer", "silent-exit", "answer") as daemon:
        first = asked(daemon, "a")
        assert asked(daemon, "b", "resume: never")["outcome"] == "unknown"
        third = asked(daemon, "c")
        assert third["thread"] == first["thread"]
        assert (first["tokens_in"], third["tokens_in"]) == (100, 100)
        assert daemon.json("session", "show", "web")["usage"]["input_tokens"] == 200
        assert sum(day["tokens"] for day in daemon.json("usage")) == 220


def test_a_full_thread_is_given_up_by_the_last_attempt_too(tmp_path: Path) -> None:
    """Else each task after it would fail of it, until somebody resets the session."""
    with served(tmp_path / "root", "answer", "replay:ectx", "answer") as daemon:
        first, second = asked(daemon, "a"), asked(daemon, "b", "attempts: 1")
        assert (second["state"], second["outcome"]) == ("failed", "context-full")
        assert second["thread"] == first["thread"]
        assert daemon.json("session", "show", "web")["thread"] is None
        third = asked(daemon, "c", "attempts: 1")
        assert third["state"] == "done"
        assert third["thread"] != first["thread"]


def test_another_thread_than_the_one_asked_for_is_not_taken_over(tmp_path: Path) -> None:
    """The conversation goes on in its own, and counts from where it was."""
    with served(tmp_path / "root", "answer", "wrong-thread", "answer") as daemon:
        thread = asked(daemon, "a")["thread"]
        second = asked(daemon, "b")
        assert (second["outcome"], second["tokens_in"]) == ("unknown", 100)
        assert second["thread"] == thread
        assert f"instead of {thread}" in second["message"]
        third = asked(daemon, "c")
        assert (third["state"], third["thread"], third["tokens_in"]) == ("done", thread, 100)
        assert daemon.json("session", "show", "web")["usage"]["input_tokens"] == 300


@pytest.mark.parametrize(
    ("keys", "reset", "told"),
    [([], False, True), (["resume: never"], False, False), ([], True, False)],
    ids=["goes-on", "never", "reset"],
)
def test_the_next_task_is_told_what_was_said_in_a_lost_thread(
    tmp_path: Path, keys: list[str], reset: bool, told: bool
) -> None:
    """Whatever became of the task that lost it; but not where a new beginning is asked for."""
    with served(tmp_path / "root", "answer", "replay:ectx", "answer") as daemon:
        asked(daemon, "a")
        assert asked(daemon, "b", "resume: always")["outcome"] == "context-full"
        if reset:
            assert daemon.run("session", "reset", "web").returncode == 0
            until(lambda: not list(daemon.dirs.inbox.glob("*.reset")), "the reset, obeyed")
        assert asked(daemon, "c", *keys)["state"] == asked(daemon, "d")["state"] == "done"
        third, fourth = (json.loads(line)["stdin"] for line in given(daemon)[2:])
        assert ("could not be continued" in third) == ("> answer 1 to" in third) == told
        assert "> Say a." in third or not told
        assert "interrupted" not in third
        assert fourth.endswith("Say d.\n")
        assert "could not be continued" not in fourth
