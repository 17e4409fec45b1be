"""The text given to Codex: the message word for word, and last."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codexd.prompt import BEGUN, FRESH, build, fresh, summary

NONE = {"header": "", "preamble": "", "memory": "", "policy": ""}
TEXT = st.text(max_size=60)


@pytest.mark.parametrize(
    "message", ["Fix it.", "-x\n--help", "a\n\n---\n\nb", "  indented\n", "🦊"]
)
def test_a_message_alone_is_the_prompt(message: str) -> None:
    assert build(**NONE, message=message) == message + "\n"


def test_the_parts_stand_in_order_above_a_rule() -> None:
    text = build(header="H", preamble="R\n", memory="\nM", policy=" P ", message="do\n it")
    assert text == "H\n\nR\n\nM\n\nP\n\n---\n\ndo\n it\n"


@pytest.mark.parametrize("part", NONE)
def test_an_empty_part_leaves_no_trace(part: str) -> None:
    assert build(**{**NONE, part: "said"}, message="m") == "said\n\n---\n\nm\n"
    assert build(**{**NONE, part: " \n"}, message="m") == "m\n"


@given(TEXT, TEXT, TEXT, TEXT, TEXT)
def test_the_message_is_always_whole_and_last(a: str, b: str, c: str, d: str, message: str) -> None:
    assert build(header=a, preamble=b, memory=c, policy=d, message=message).endswith(message + "\n")


# --- what was said before ---------------------------------------------------------


def said(*texts: str | None) -> list[dict[str, object]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "text": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("records", "chars", "expected"),
    [
        ([], 100, ""),
        (said("hello"), 100, "user:\n> hello"),
        (said("a\nb", "c"), 100, "user:\n> a\n> b\nassistant:\n> c"),
        (said("old", "new"), 25, "assistant:\n> new"),
        (said("ask", ""), 100, "user:\n> ask"),
        (said("ask", None), 100, "user:\n> ask"),
        (said("x" * 50), 20, ""),
    ],
)
def test_summary(records: list[dict[str, object]], chars: int, expected: str) -> None:
    assert summary(records, chars) == expected


def test_the_failed_attempt_that_leads_to_a_new_thread_does_not_hide_the_rest() -> None:
    """The last record is then always one without a text: `context-full` says nothing."""
    failed: dict[str, object] = {"role": "assistant", "text": "", "outcome": "context-full"}
    records = [*said("ask", "answer"), failed]
    assert summary(records, 4000) == "user:\n> ask\nassistant:\n> answer"


def test_the_last_thing_said_is_cut_rather_than_lost() -> None:
    text = summary(said("ask", "start " + "x" * 5000 + " end"), 1000)
    assert text.startswith("assistant:\n> [...]\n")
    assert text.endswith("x end")


@given(st.lists(st.text(max_size=300)), st.integers(0, 500))
def test_a_summary_is_bounded_and_quoted(texts: list[str], chars: int) -> None:
    text = summary(said(*texts), chars)
    assert len(text) <= chars
    for line in text.split("\n") if text else []:
        assert line.startswith(">") or line in ("user:", "assistant:")


@pytest.mark.parametrize(
    ("begun", "did", "said", "expected"),
    [
        (False, "", "", []),
        (False, "", "user:\n> a", [FRESH, "What was said last:", "user:\n> a"]),
        (True, "", "", [FRESH, BEGUN]),
        (True, "running: x", "", [FRESH, BEGUN, "The last that was done for it:", "> running: x"]),
    ],
)
def test_what_a_new_thread_is_told(begun: bool, did: str, said: str, expected: list[str]) -> None:
    assert fresh(begun, did, said) == "\n\n".join(expected)
