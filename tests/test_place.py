"""A task's directory, its answer, the archive, keys: each step repeatable."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from codexd import answerfile, durable, place, spool
from codexd.config import Directories
from codexd.model import Task
from codexd.place import Keyed

ID, OTHER = "20261123t072011-k3f9qa7x2m", "20261201t000000-0000000000"


@pytest.fixture
def dirs(tmp_path: Path) -> Directories:
    found = Directories.below(tmp_path)
    spool.prepare(found)
    return found


@pytest.fixture
def task(dirs: Directories) -> Path:
    (dirs.tasks / ID).mkdir()
    place.store(dirs, ID, {"id": ID, "request": {"prompt": "Straße \ud800"}})
    return dirs.tasks / ID


# --- the task's own directory -----------------------------------------------------


def test_what_was_asked_for_comes_back(dirs: Directories, task: Path) -> None:
    assert place.load(dirs, ID) == {"id": ID, "request": {"prompt": "Straße \ud800"}}
    assert os.listdir(task) == ["task.json"]


def test_an_attempt_s_orders_can_be_given_again(dirs: Directories, task: Path) -> None:
    for thread in (None, "T"):
        place.begin_attempt(dirs, ID, 1, {"attempt": 1, "thread": thread})
    place.begin_attempt(dirs, ID, 2, {"attempt": 2})
    assert sorted(os.listdir(task)) == ["1", "2", "task.json"]
    assert json.loads((task / "1" / "attempt.json").read_text()) == {"attempt": 1, "thread": "T"}


def test_no_orders_are_written_into_the_directory_of_another_task(
    dirs: Directories, task: Path
) -> None:
    """The attempt before may have left a link; then only its own task is held up."""
    (dirs.tasks / OTHER).mkdir()
    place.begin_attempt(dirs, OTHER, 1, {"attempt": 1})
    (task / "2").symlink_to(dirs.tasks / OTHER / "1")
    with pytest.raises(durable.NotAFile, match="a symbolic link"):
        place.begin_attempt(dirs, ID, 2, {"attempt": 2})
    orders = dirs.tasks / OTHER / "1" / "attempt.json"
    assert json.loads(orders.read_text()) == {"attempt": 1}


def test_how_far_an_attempt_came(dirs: Directories, task: Path) -> None:
    place.begin_attempt(dirs, ID, 1, {})
    assert not place.was_started(dirs, ID, 1)
    assert place.result(dirs, ID, 1) is None
    (task / "1" / "started").touch()
    assert place.was_started(dirs, ID, 1)
    assert place.result(dirs, ID, 1) is None
    (task / "1" / "result.json").write_text('{"outcome": "done"}')
    assert place.result(dirs, ID, 1) == {"outcome": "done"}
    assert not place.was_started(dirs, ID, 2)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff", b"\x00" * 100, b"[" * 100_000])
def test_a_damaged_file_is_an_error_not_a_missing_one(
    dirs: Directories, task: Path, damage: bytes
) -> None:
    place.begin_attempt(dirs, ID, 1, {})
    for path in (task / "1" / "result.json", task / "task.json", task / "status.json"):
        path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"."):
        place.result(dirs, ID, 1)
    with pytest.raises(ValueError, match=r"."):
        place.load(dirs, ID)
    with pytest.raises(ValueError, match=r"."):
        place.status(dirs, ID)


# --- answers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("fix-links.md", f"fix-links.{ID}.md"),
        ("fix.links.md", f"fix.links.{ID}.md"),
        ("notes", f"notes.{ID}.md"),
        (f"{ID}.md", f"{ID}.md"),
        (f"{ID}.json", f"{ID}.md"),
        (f"{OTHER}.md", f"{OTHER}.{ID}.md"),
        (None, f"{ID}.md"),
        ("", f"{ID}.md"),
        ("a b.md", f"a_b.{ID}.md"),
        ("ü.md", f"__.{ID}.md"),
        (os.fsdecode(b"\xff\n\x1b.md"), f"___.{ID}.md"),
        ("x" * 150 + ".md", "x" * 100 + f".{ID}.md"),
        ("-rf.md", f"-rf.{ID}.md"),
        ("a/../b.md", f"a_.._b.{ID}.md"),
    ],
)
def test_an_answer_is_named_after_the_dropped_file(file: str | None, name: str) -> None:
    assert place.answer_name(ID, file) == name


@given(st.binary(min_size=1, max_size=255))
def test_every_dropped_name_makes_a_safe_one(name: bytes) -> None:
    found = place.answer_name(ID, os.fsdecode(name))
    assert found.isascii()
    assert found.isprintable()
    assert "/" not in found
    assert len(found) <= 255
    assert found.endswith(f"{ID}.md")


def test_an_answer_can_be_written_again(dirs: Directories) -> None:
    for text in (b"one", b"two"):
        place.write_answer(dirs, "a.md", text)
    assert (dirs.answers / "a.md").read_bytes() == b"two"
    assert os.listdir(dirs.answers) == ["a.md"]


# --- the end ----------------------------------------------------------------------


def test_a_concluded_task_is_found_wherever_it_lies(dirs: Directories, task: Path) -> None:
    assert place.status(dirs, ID) is None
    assert not place.known(dirs, ID)
    place.conclude(dirs, ID, {"id": ID, "state": "done"})
    assert place.status(dirs, ID) == {"id": ID, "state": "done"}
    for _ in range(2):
        place.archive(dirs, ID)
        assert not task.exists()
        assert place.archived(dirs, ID) == dirs.archive / "2026-11" / ID
        assert place.status(dirs, ID) == {"id": ID, "state": "done"}
        assert place.load_ended(dirs, ID)["id"] == ID
        assert place.known(dirs, ID)
    assert place.status(dirs, OTHER) is None
    with pytest.raises(FileNotFoundError):
        place.load_ended(dirs, OTHER)


def test_what_killed_writers_left_does_not_go_into_the_archive(
    dirs: Directories, task: Path
) -> None:
    place.begin_attempt(dirs, ID, 1, {})
    for name in (".task.json.123.tmp", "1/.result.json.45.tmp", "1/.keep", "1/events.jsonl"):
        (task / name).write_text("half of i")
    for _ in range(2):
        place.archive(dirs, ID)
    kept = place.archived(dirs, ID)
    assert sorted(os.listdir(kept)) == ["1", "task.json"]
    assert sorted(os.listdir(kept / "1")) == [".keep", "attempt.json", "events.jsonl"]


def test_each_month_has_its_own_shelf(dirs: Directories, task: Path) -> None:
    (dirs.tasks / OTHER).mkdir()
    for id in (ID, OTHER):
        place.archive(dirs, id)
    assert sorted(os.listdir(dirs.archive)) == ["2026-11", "2026-12"]


# --- keys -------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a", "../../etc/passwd", "x" * 200, "ü\n", "A"])
def test_a_key_stands_for_its_first_task(dirs: Directories, key: str) -> None:
    assert place.keyed(dirs, key) is None
    place.remember_key(dirs, key, Keyed(ID, "5ha"))
    place.remember_key(dirs, key + ".", Keyed(OTHER, "0ther"))
    assert place.keyed(dirs, key) == Keyed(ID, "5ha")
    assert len(os.listdir(dirs.keys)) == 2


def test_a_damaged_key_is_an_error(dirs: Directories) -> None:
    place.remember_key(dirs, "k", Keyed(ID, "5ha"))
    (path,) = dirs.keys.iterdir()
    path.write_bytes(b"{")
    with pytest.raises(ValueError, match=r"."):
        place.keyed(dirs, "k")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("team \U0001f600 a\U0001f9d1\u200d\U0001f4bb", None),
        ("bad\udcff.md", "bad\ufffd.md"),
        ('\\ud83d\\ude00 \\\udcff "\u2028\x85\x7f', '\\ud83d\\ude00 \\\ufffd "\u2028\x85\x7f'),
    ],
)
def test_the_front_matter_of_any_text_is_json_and_yaml(text: str, read: str | None) -> None:
    task = Task("20261123t072011-k3f9qa7x2m", message=text, file=text, session=text)
    front = answerfile.content(task, None).decode()
    for loader in (yaml.SafeLoader, yaml.CSafeLoader):
        found = next(yaml.load_all(front, loader))
        assert (found["message"], found["file"], found["session"]) == (read or text,) * 3
    line = next(line for line in front.splitlines() if line.startswith("message: "))
    assert json.loads(line.removeprefix("message: ")) == (read or text)
