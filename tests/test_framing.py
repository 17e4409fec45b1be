"""Requests as bytes: what is one, what is none, and that nothing else can happen."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codexd.framing import BODY_LIMIT, HEAD_LIMIT, Head, Problem, Reply, render, take

GOOD = (
    b"POST /tasks?x=1&y HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12\r\n"
    b"X-Two:a\r\nx-two:\t b \r\nEmpty:\r\n\r\n"
)


def test_a_head_is_taken_off_the_front() -> None:
    buffer = bytearray(GOOD + b"the body and")
    head = take(buffer)
    assert head == Head(
        "POST",
        "/tasks",
        "x=1&y",
        {"host": ["localhost"], "content-length": ["12"], "x-two": ["a", "b"], "empty": [""]},
        12,
        True,
    )
    assert buffer == b"the body and"


@given(st.integers(0, len(GOOD) - 1))
def test_where_a_head_is_cut_makes_no_difference(cut: int) -> None:
    buffer = bytearray(GOOD[:cut])
    assert take(buffer) is None
    buffer += GOOD[cut:]
    assert take(buffer) == take(bytearray(GOOD))


@pytest.mark.parametrize(
    ("version", "connection", "keep"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: keep-alive\r\n", True),
        (b"1.1", b"Connection: te, Close\r\n", False),
        (b"1.1", b"Connection: te\r\nConnection: close\r\n", False),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: keep-alive\r\n", False),
    ],
)
def test_who_keeps_the_connection(version: bytes, connection: bytes, keep: bool) -> None:
    head = take(bytearray(b"GET / HTTP/" + version + b"\r\n" + connection + b"\r\n"))
    assert head is not None
    assert head.keep is keep


PIECES = st.sampled_from(
    [b"GET", b" ", b"/", b"HTTP/1.1", b"\r\n", b"\n", b"\r", b"Host", b":", b"Content-Length: ",
     b"Transfer-Encoding: chunked", b"0", b"9" * 9, b"-1", b"\0", b"\xff", b"\t", b"%", b"?"]
)  # fmt: skip


@given(st.one_of(st.binary(max_size=300), st.lists(PIECES, max_size=40).map(b"".join)))
def test_any_bytes_are_a_head_or_a_problem_or_not_enough(data: bytes) -> None:
    buffer = bytearray(data)
    with suppress(Problem):  # any other exception would end the connection without a word
        head = take(buffer)
        assert data.endswith(buffer)
        assert head is None or (head.path.startswith("/") and 0 <= head.length <= BODY_LIMIT)


def test_a_head_without_an_end_is_refused_at_its_limit() -> None:
    start = b"GET / HTTP/1.1\r\nX: "
    assert take(bytearray(start.ljust(HEAD_LIMIT - 1, b"x"))) is None
    with pytest.raises(Problem) as problem:
        take(bytearray(start.ljust(HEAD_LIMIT, b"x")))
    assert problem.value.reply.status == 431


def test_a_reply_says_how_long_it_is_and_whether_the_connection_stays() -> None:
    answer = Reply(202, b"{}", (("Location", "/tasks/1"),))
    head, _, body = render(answer, keep=True).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 202 Accepted\r\nServer: codexd\r\nDate: ")
    assert b"\r\nContent-Length: 2\r\n" in head
    assert b"\r\nLocation: /tasks/1" in head
    assert b"Connection" not in head
    assert body == b"{}"
    assert render(answer, keep=False, body=False).endswith(b"\r\nConnection: close\r\n\r\n")
