"""One line: an event that a person reads, and that nothing a user wrote can forge."""

from __future__ import annotations

import re
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codexd.line import parse, render, seal
from codexd.model import Event, Kind, Note
from tests.history import AT, HEAD, ident, move, queued

# --- one line ---------------------------------------------------------------------

ANY = st.text(st.characters(exclude_categories=()))  # lone surrogates, controls, all of it
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3),
    max_leaves=5,
)
FACTS = st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), VALUES, max_size=4)
HOSTILE = {
    "backticks": "`` ` ```",
    "an end of the comment": "--> <!-- -->\n",
    "a forged line": "x`\n" + render(move(1, Kind.DONE)).decode(),
    "a carriage return": "a\r- b\r\n",
    "escapes": "\x1b]0;pwned\x07\x1b[2J\x9b31m",
    "separators of lines": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "lone surrogates": "\ud800 \udfff",
    "the edges": "\x00\x7f\ufeff\uffff\U0010ffff",
    "quotes and slashes": "\"\\'\\u0060 \\\\`",
    "other directions": "\u202egnp.exe",
    "a megabyte": "`\n" * 500_000,
    "Markdown": "**bold** [a](javascript:x) <script>|a|b| &lt; # - * 1.",
    "facts": 'outcome="done" priority=9',
}


def code_spans(line: str) -> tuple[str, list[str]]:
    """The text around the code spans of a line, as CommonMark finds them, and the spans.

    Every run of backticks here must be a single one, so each pair is a span.
    """
    assert "``" not in line
    parts = line.split("`")
    assert len(parts) % 2 == 1, "a code span that does not end"
    return "".join(parts[::2]), parts[1::2]


def check_line(line: bytes, event: Event) -> None:
    """One printable ASCII line, whose Markdown nothing of a user's text can reach."""
    assert parse(line) == event
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    text = line[:-1].decode("ascii")
    assert text.isprintable()
    around, spans = code_spans(text)
    about = isinstance(event.kind, Kind)
    assert spans[:about] == ([event.id] if about else [])
    assert len(spans) == about + bool(event.facts)
    pattern = r"[-*] \S{24} {1,2}\*\*[a-z]+\*\* {2,3}<!-- [@A-O]{9} -->"
    assert re.fullmatch(pattern, around), around
    assert zlib.crc32(line) == 0, "any CRC-32 tool checks it"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_facts_neither_forge_lines_nor_break_markdown(name: str) -> None:
    text = HOSTILE[name]
    check_line(render(queued(1, title=text)), queued(1, title=text))
    note = Event(AT, Note.REJECTED, facts={"file": text, "reason": text})
    check_line(render(note), note)
    check_line(render(queued(1, usage={text: 1})), queued(1, usage={text: 1}))


@given(FACTS)
def test_every_event_comes_back_from_its_line(facts: dict[str, Any]) -> None:
    event = Event(AT, Kind.RUNNING, ident(1), facts)
    check_line(render(event), event)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=300))
def test_every_text_can_be_sealed(text: str) -> None:
    line = seal(text)
    assert zlib.crc32(line) == 0
    assert line.startswith(text.encode() + b"  <!-- ")
    assert zlib.crc32(HEAD + line + line) == 0, "a run of lines is sealed as well"


def test_a_fact_of_none_is_not_written() -> None:
    assert b"thread" not in render(move(1, Kind.RUNNING, thread=None))


@pytest.mark.parametrize(
    "event",
    [
        Event("yesterday", Kind.QUEUED, ident(1)),
        Event(AT, Kind.QUEUED, "short"),
        Event(AT, Kind.QUEUED, ident(1), {"Key": 1}),
        Event(AT, Kind.QUEUED, ident(1), {"a b": 1}),
        Event(AT, Kind.QUEUED, ident(1), {"": 1}),
    ],
)
def test_what_could_not_be_read_back_is_not_written(event: Event) -> None:
    with pytest.raises(ValueError, match="no ledger line"):
        render(event)


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"- \n",
        b"# codexd ledger, format 1\n",
        render(queued(1)).replace(b"queued", b"failed"),
        render(queued(1))[:-1],
        render(queued(1)) + b"\n",
        seal("a person's note"),
        seal(f"- {AT} `{ident(1)}` **vanished**"),
        seal(f"* {AT} **vanished**"),
        seal(f"- {AT} `{ident(1)}` **queued** `priority=`"),
        seal(f"- {AT} `{ident(1)}` **queued** `priority=1 x`"),
        seal(f"- {AT} `{ident(1)}` **queued** `nothing`"),
    ],
)
def test_what_is_no_line_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(line)
