"""Transcripts: every line once, whatever was written before a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codexd import durable, transcript


def records(attempt: str, *texts: str) -> list[dict[str, Any]]:
    return [{"task": attempt[0], "attempt": int(attempt[1:]), "text": text} for text in texts]


def texts(path: Path) -> list[object]:
    return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]


def test_appending_in_order(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    length = transcript.append(path, None, records("a1", "ask", "answer"))
    assert length == path.stat().st_size
    length = transcript.append(path, length, records("b1", "more"))
    assert texts(path) == ["ask", "answer", "more"]
    assert length == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o640


ONE = records("a1", "ask", "answer")
TWO = records("b1", "next", "reply")
LEFT = {
    "nothing": b"",
    "a torn line": b'{"task": "b", "att',
    "one line": json.dumps(TWO[0]).encode() + b"\n",
    "all lines": b"".join(json.dumps(r).encode() + b"\n" for r in TWO),
    "noise": b"\x00\xff\n\n{]\n",
}


@pytest.mark.parametrize("left", LEFT)
def test_what_a_crash_left_after_the_known_length_is_replaced(tmp_path: Path, left: str) -> None:
    path = tmp_path / "web.jsonl"
    length = transcript.append(path, None, ONE)
    with open(path, "ab") as file:
        file.write(LEFT[left])
    transcript.append(path, length, TWO)
    assert texts(path) == ["ask", "answer", "next", "reply"]


@pytest.mark.parametrize("left", [name for name in LEFT if name != "noise"])
@pytest.mark.parametrize("before", [[], ONE])
def test_without_a_known_length_the_attempt_s_own_lines_are_replaced(
    tmp_path: Path, left: str, before: list[dict[str, Any]]
) -> None:
    """The first attempt of a session, or a session whose file was damaged."""
    path = tmp_path / "web.jsonl"
    transcript.append(path, 0, before)
    with open(path, "ab") as file:
        file.write(LEFT[left])
    transcript.append(path, None, TWO)
    assert texts(path) == [r["text"] for r in before] + ["next", "reply"]


def test_a_damaged_line_in_an_old_transcript_costs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_bytes(b"\x00\xff\n[]\n" + json.dumps(ONE[0]).encode() + b"\n")
    transcript.append(path, None, TWO)
    assert path.read_bytes().startswith(b"\x00\xff\n[]\n")
    assert [r["text"] for r in transcript.last(path, 9)] == ["ask", "next", "reply"]


def test_a_length_beyond_the_end_leaves_no_hole(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    for _ in range(2):  # it was laid aside, and then there was a crash
        transcript.append(path, 10_000, ONE)
        assert texts(path) == ["ask", "answer"]


@pytest.mark.parametrize("what", ["FIFO", "directory", "too large"])
def test_what_is_no_transcript_is_neither_waited_for_nor_written(tmp_path: Path, what: str) -> None:
    path = tmp_path / "web.jsonl"
    if what == "FIFO":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 8 << 30)
    with pytest.raises(durable.NotAFile):
        transcript.append(path, None, ONE)
    assert transcript.last(path, 5) == []
    assert transcript.began(path) is None


@pytest.mark.parametrize(
    "line", [b"[" * 2000, b"\0" * (5 << 20), b'{"text": ' + b"9" * 5000 + b"}"]
)
def test_a_line_that_nobody_can_read_costs_nothing_else(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "web.jsonl"
    path.write_bytes(json.dumps(ONE[0]).encode() + b"\n" + line + b"\n")
    for _ in range(2):
        transcript.append(path, None, TWO)
        assert path.read_bytes().split(b"\n")[1] == line
        assert [r["text"] for r in transcript.last(path, 9)][-2:] == ["next", "reply"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "web.jsonl").symlink_to("precious")
    with pytest.raises(OSError, match=r"web\.jsonl"):
        transcript.append(tmp_path / "web.jsonl", None, ONE)
    assert (tmp_path / "precious").read_bytes() == b"precious"


@given(st.lists(st.text(st.characters(exclude_categories=())), min_size=1, max_size=5))
def test_every_text_is_one_line_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory, said: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    transcript.append(path, 0, records("a1", *said))
    assert path.read_bytes().count(b"\n") == len(said)
    assert [r["text"] for r in transcript.last(path, 100)] == said


def test_threads_are_those_of_a_file_of_ours(tmp_path: Path) -> None:
    """None of a link; nor does it fail where the file went since somebody saw it."""
    thread = "019e0000-0000-7000-8000-000000000001"
    (tmp_path / "one.jsonl").write_text(json.dumps({"thread": thread}) + "\n")
    (tmp_path / "link.jsonl").symlink_to("one.jsonl")
    assert list(transcript.threads(tmp_path / "one.jsonl")) == [{thread}]
    for name in ("link.jsonl", "none.jsonl"):
        assert list(transcript.threads(tmp_path / name)) == []


def test_of_damaged_lines_none_is_of_a_conversation() -> None:
    own = {"task": "a", "thread": "T"}
    assert transcript.conversation([{}, {"task": [], "thread": {}}, own], "a") == [own]


# --- reading the end --------------------------------------------------------------


def test_last(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    assert transcript.last(path, 5) == []
    transcript.append(path, None, records("a1", *"abcdef"))
    assert [r["text"] for r in transcript.last(path, 2)] == ["e", "f"]
    assert len(transcript.last(path, 100)) == 6


def test_last_reads_a_bounded_piece_of_a_long_history(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    with open(path, "wb") as file:
        file.truncate(5 << 30)  # sparse: reading all of it would be noticed
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + json.dumps(ONE[1]).encode() + b"\n")
    assert [r["text"] for r in transcript.last(path, 20)] == ["answer"]
