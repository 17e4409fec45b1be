"""Time as text: one form, whatever the zone, and back."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codexd import clock


@pytest.mark.parametrize(
    ("epoch", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1795418411.123, "2026-11-23T07:20:11.123Z"),
        (2147483648.0, "2038-01-19T03:14:08.000Z"),
        (59.9994, "1970-01-01T00:00:59.999Z"),
        (59.9996, "1970-01-01T00:01:00.000Z"),  # carried, never .1000
        (-0.5, "1969-12-31T23:59:59.500Z"),
    ],
)
def test_a_stamp_and_back(epoch: float, text: str) -> None:
    assert clock.stamp(epoch) == text
    assert clock.epoch(text) == pytest.approx(epoch, abs=0.0006)


@given(st.floats(0, 2e11))
def test_every_stamp_has_one_length_and_can_be_read_back(epoch: float) -> None:
    text = clock.stamp(epoch)
    assert len(text) == 24
    assert clock.stamp(clock.epoch(text)) == text


@given(st.floats(0, 2e11), st.floats(0, 2e11))
def test_stamps_sort_as_their_times_do(one: float, other: float) -> None:
    assert (clock.stamp(one) <= clock.stamp(other)) or one > other


@pytest.mark.parametrize(
    "text",
    ["", "now", "2026-11-23", "2026-11-23T07:20:11", "2026-11-23T07:20:11123Z",
     "2026-11-23T07:20:11.123+02:00", "2026-13-23T07:20:11.123Z", "2026-11-23T07:20:11.123Zx"],
)  # fmt: skip
def test_what_is_no_stamp_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        clock.epoch(text)


@pytest.mark.parametrize("zone", ["UTC0", "CET-1CEST,M3.5.0,M10.5.0/3", "XXX+11:30"])
def test_the_zone_of_the_host_does_not_matter(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert clock.stamp(1795418411.123) == "2026-11-23T07:20:11.123Z"
        assert clock.epoch("2026-07-23T07:20:11.123Z") == pytest.approx(1784791211.123)
        assert abs(clock.epoch(clock.now()) - time.time()) < 5
    finally:
        monkeypatch.undo()
        time.tzset()
