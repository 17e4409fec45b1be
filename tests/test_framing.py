"""Requests as bytes: what is one, what is none, and that nothing else can happen."""

from __future__ import annotations

import io
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from codexd.framing import BODY_LIMIT, HEAD_LIMIT, LINES_LIMIT, Exchange, Problem, Reply

GOOD = (
    b"POST /tasks?x=1&y HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12\r\n"
    b"X-Two:a\r\nx-two:\t b \r\nEmpty:\r\n\r\n"
)


def take(data: bytes) -> tuple[Exchange, bool]:
    """An exchange that has taken lines until its head is whole, and whether it is."""
    exchange = Exchange()
    return exchange, any(exchange.take(line) for line in io.BytesIO(data))


def refused(data: bytes) -> int:
    with pytest.raises(Problem) as problem:
        take(data)
    return problem.value.reply.status


def test_a_head_is_whole_at_its_blank_line() -> None:
    asked, whole = take(GOOD)
    assert whole
    assert (asked.command, asked.path, asked.query) == ("POST", "/tasks", "x=1&y")
    assert (asked.one("HOST"), asked.one("empty"), asked.one("none")) == ("localhost", "", None)
    assert (asked.length, asked.close_connection) == (12, False)
    assert asked.headers.get_all("x-two") == ["a", "b "]
    with pytest.raises(Problem, match="x-two is there 2 times"):
        asked.one("x-two")


@given(st.integers(0, len(GOOD.splitlines()) - 1), st.integers(0, 3))
def test_a_head_without_its_end_is_not_whole(lines: int, blank: int) -> None:
    start = b"\r\n" * blank + b"".join(GOOD.splitlines(keepends=True)[:lines])
    assert not take(start)[1]


@pytest.mark.parametrize("target", ["//tasks", "///", "/a//b", "/tasks/%2f?a?b"])
def test_a_path_is_what_was_sent(target: str) -> None:
    asked, _ = take(f"GET {target} HTTP/1.1\r\n\r\n".encode())
    path, _, query = target.partition("?")
    assert (asked.path, asked.query) == (path, query)


@pytest.mark.parametrize(
    ("version", "connection", "keep"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: keep-alive\r\n", True),
        (b"1.1", b"Connection: te, Close\r\n", False),
        (b"1.1", b"Connection: te\r\nConnection: close\r\n", False),
        (b"1.1", b"Connection: close \r\n", False),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: keep-alive\r\n", False),
    ],
)
def test_who_keeps_the_connection(version: bytes, connection: bytes, keep: bool) -> None:
    asked, whole = take(b"GET / HTTP/" + version + b"\r\n" + connection + b"\r\n")
    assert whole
    assert asked.close_connection is not keep


@pytest.mark.parametrize("version", ["0.9", "2.0"])
def test_other_versions_are_refused(version: str) -> None:
    assert refused(f"GET / HTTP/{version}\r\n".encode()) == 505


PIECES = st.sampled_from(
    [b"GET", b" ", b"/", b"HTTP/1.1", b"\r\n", b"\n", b"\r", b"Host", b":", b"Content-Length: ",
     b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Connection: ", b"From ", b"0",
     b"9" * 9, b"-1", b"\0", b"\xff", b"\x85", b"\x1c", b"\t", b"%", b"?"]
)  # fmt: skip
HEADS = st.lists(PIECES, max_size=20).map(b"".join).map(lambda x: b"GET / HTTP/1.1\r\n" + x)


@given(st.one_of(st.binary(max_size=300), st.lists(PIECES, max_size=40).map(b"".join), HEADS))
@example(b"GET / HTTP/1.1\r\nX: a\x85Content-Length: 5\r\n\r\n")
def test_any_bytes_are_a_head_or_a_problem_or_not_enough(data: bytes) -> None:
    with suppress(Problem):  # any other exception would end the connection without a word
        asked, whole = take(data)
        if whole:
            assert asked.path.startswith("/")
            assert 0 <= asked.length <= BODY_LIMIT
            told = data.lstrip(b"\r\n").partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
            assert [f"{name}:" for name in asked.headers] == [
                line.decode("latin-1").partition(":")[0] + ":" for line in told
            ]


@pytest.mark.parametrize(
    "line", ["X: a", "X : a\r\n", " b\r\n", "X\r\n", "X: a\rY: b\r\n", ":\r\n"]
)
def test_a_line_that_could_be_read_in_two_ways_is_refused_at_once(line: str) -> None:
    assert refused(b"GET / HTTP/1.1\r\nHost: x\r\n" + line.rstrip("\n").encode() + b"\n") == 400


def test_a_head_is_refused_at_its_limit() -> None:
    start = b"GET / HTTP/1.1\r\n"
    rest = HEAD_LIMIT - len(start) - len(b"X:\r\n\r\n")
    assert take(start + b"X:" + b"x" * rest + b"\r\n\r\n")[1]
    assert refused(start + b"X:" + b"x" * rest + b"x\r\n\r\n") == 431
    assert take(start + b"X:\r\n" * (LINES_LIMIT - 1) + b"\r\n")[1]
    assert refused(start + b"X:\r\n" * LINES_LIMIT + b"\r\n") == 431
    assert refused(b"\r\n" * 1000) == 431


def test_a_reply_says_how_long_it_is_and_whether_the_connection_stays() -> None:
    asked, _ = take(b"GET / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n")
    assert asked.interim() == b"HTTP/1.1 100 Continue\r\n\r\n"
    answer = Reply(202, b"{}", (("Location", "/tasks/1"),))
    head, _, body = asked.render(answer, keep=True).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 202 Accepted\r\nServer: codexd\r\nDate: ")
    assert b"\r\nContent-Length: 2\r\n" in head
    assert b"\r\nLocation: /tasks/1" in head
    assert b"Connection" not in head
    assert body == b"{}"
    head_only, _ = take(b"HEAD / HTTP/1.1\r\n\r\n")
    assert head_only.render(answer, keep=False).endswith(b"\r\nConnection: close\r\n\r\n")


def test_a_problem_is_told_before_a_request_was_read() -> None:
    said = Exchange().render(Problem(503, "busy", "later").reply, keep=False)
    assert said.startswith(b"HTTP/1.1 503 Service Unavailable\r\nServer: codexd\r\n")
    assert said.endswith(b'\r\n\r\n{"error": {"code": "busy", "message": "later"}}\n')


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    asked, _ = take(GOOD)
    asked.render(Reply(200, b""), keep=True)
    assert capfd.readouterr() == ("", "")
