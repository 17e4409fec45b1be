"""When a task may start at the earliest: times, in zones and without, and delays."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codexd import clock
from codexd.document import Form, Scalar
from codexd.when import MOST, When, when

NOW = clock.epoch("2026-11-23T07:20:11.000Z")


@pytest.fixture
def berlin() -> Iterator[None]:
    """Local time of this process is another one for a while."""
    was = os.environ.get("TZ")
    os.environ["TZ"] = "CET-1CEST,M3.5.0,M10.5.0/3"
    time.tzset()
    yield
    os.environ.pop("TZ")
    os.environ.update({"TZ": was} if was is not None else {})
    time.tzset()


def read(text: str, form: Form = Form.PLAIN) -> When | None:
    return when(Scalar(text, form), NOW)


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-11-24T02:00:00Z", "2026-11-24T02:00:00.000Z"),
        ("2026-11-24t02:00:00.25z", "2026-11-24T02:00:00.250Z"),
        ("2026-11-24 02:00-05:00", "2026-11-24T07:00:00.000Z"),
        ("2026-11-24T02:00", "2026-11-24T01:00:00.000Z"),  # local: winter
        ("2026-07-24 02:00:30", "2026-07-24T00:00:30.000Z"),  # local: summer
        ("1999-01-01T00:00Z", "1999-01-01T00:00:00.000Z"),
    ],
)
def test_a_time(berlin: None, text: str, utc: str) -> None:
    assert read(text) == When(clock.epoch(utc))


def test_an_hour_that_local_clocks_skip_or_show_twice_is_some_time(berlin: None) -> None:
    skipped, twice = read("2026-03-29T02:30"), read("2026-10-25T02:30")
    assert skipped is not None
    assert twice is not None
    assert clock.stamp(skipped.at) == "2026-03-29T01:30:00.000Z"
    assert clock.stamp(twice.at) == "2026-10-25T00:30:00.000Z"


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90", 90), ("1.5m", 90), ("366d", MOST), ("1s", 1)]
)
def test_a_delay_counts_from_now(text: str, seconds: float) -> None:
    assert read(text) == When(NOW + seconds, seconds)
    assert read(text, Form.NUMBER) == When(NOW + seconds, seconds)


@pytest.mark.parametrize(
    "text",
    ["", "0s", "367d", "-2h", "2026-11-24", "02:00", "2026-11-24T2:00", "2026-11-24T02", "now",
     "2026-11-24T24:30", "2026-02-30T02:00Z", "2026-11-24T02:00 Z", "2026-11-24T02:00:61Z",
     "2026-W48-2T02:00", "0000-01-01T00:00Z", "0001-01-01T00:00", "1795744800",
     "２０２６-11-24T02:00"],
)  # fmt: skip
def test_what_is_neither(text: str) -> None:
    assert read(text) is None


@given(st.text(max_size=40))
def test_whatever_the_text(text: str) -> None:
    found = read(text)
    assert found is None or found.delay is None or 1 <= found.delay <= MOST
