"""When to try again: every form of the time that Codex has printed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codexd.quota import retry_at
from tests.recordings import RECORDINGS

# A machine under load is no failure.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
BERLIN = "CET-1CEST,M3.5.0,M10.5.0/3"
HIT = "You’ve hit your usage limit. Upgrade to Pro (https://chatgpt.com/explore/pro) or "


@pytest.fixture(autouse=True, params=["UTC0", BERLIN, "XXX+11:30"])
def _zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def local(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))


@pytest.mark.parametrize(
    ("now", "said", "expected"),
    [
        ("2026-11-23 07:31:00", "try again at 9:02 AM.", "2026-11-23 09:03:00"),
        ("2026-11-23 07:31:00", "try again at 9:02 PM.", "2026-11-23 21:03:00"),
        ("2026-11-23 07:31:00", "try again at 12:00 PM.", "2026-11-23 12:01:00"),
        ("2026-11-23 07:31:00", "Try again at 9:02 a.m.", "2026-11-23 09:03:00"),
        ("2026-11-23 23:50:00", "try again at 12:20 AM.", "2026-11-24 00:21:00"),
        ("2026-11-23 17:00:00", "try again at 9:02 AM.", "2026-11-24 09:03:00"),
        ("2026-11-30 23:59:59", "try again at 4:10 AM.", "2026-12-01 04:11:00"),
        ("2026-12-31 23:59:59", "try again at 4:10 AM.", "2027-01-01 04:11:00"),
        # Within the minute itself, and just after it: soon, not tomorrow.
        ("2026-11-23 09:02:20", "try again at 9:02 AM.", "2026-11-23 09:03:00"),
        ("2026-11-23 09:05:20", "try again at 9:02 AM.", "2026-11-23 09:06:00"),
        ("2026-09-10 10:00:00", "try again at Sep 12th, 2026 8:32 AM.", "2026-09-12 08:33:00"),
        ("2026-09-10 10:00:00", "try again at Sep 12, 2026, 8:32 AM", "2026-09-12 08:33:00"),
        ("2026-12-30 10:00:00", "Try again at Jan 1st, 2027 12:05 AM.", "2027-01-01 00:06:00"),
        ("2026-06-30 10:00:00", "try again at July 3rd, 2026 1:16 PM.", "2026-07-03 13:17:00"),
        # A date that has passed: the account was free again meanwhile.
        ("2026-09-14 10:00:30", "try again at Sep 12th, 2026 8:32 AM.", "2026-09-14 10:01:00"),
        ("2026-11-20 07:31:10", "try again in 3 days 6 hours.", "2026-11-23 13:32:00"),
        ("2026-11-23 07:31:10", "try again in 1 hour 30 minutes.", "2026-11-23 09:02:00"),
        ("2026-11-23 07:31:10", "try again in 1 day, 2 hours and 1 minute", "2026-11-24 09:33:00"),
        ("2026-11-23 07:31:10", "try again in 5 minutes.", "2026-11-23 07:37:00"),
        ("2026-11-23 07:31:10", "try again in 1 week.", "2026-11-30 07:32:00"),
        ("2026-11-23 07:31:10", "try again in less than a minute.", "2026-11-23 07:32:00"),
        ("2026-11-23 07:31:10", "Please try again in 1.5s.", "2026-11-23 07:32:00"),
        ("2026-11-23 07:31:10", "Please try again in 6m50s. Visit", "2026-11-23 07:39:00"),
        ("2026-11-23 07:31:10", "Please try again in 350ms.", "2026-11-23 07:32:00"),
        # What is no number counts for nothing, and the rest as it stands.
        ("2026-11-23 07:31:10", "try again in 1.2.3 days and 5 minutes.", "2026-11-23 07:37:00"),
    ],
)
def test_every_form(now: str, said: str, expected: str) -> None:
    for message in (HIT + said, HIT.replace("’", "'") + said, said):
        assert retry_at(message, local(now)) == local(expected)


@pytest.mark.parametrize(
    "said",
    [
        "Quota exceeded. Check your plan and billing details.",
        "or try again later.",
        "try again at noon",
        "try again at Foo 12th, 2026 8:32 AM.",
        "try again at Feb 31st, 2026 8:32 AM.",
        "try again at Sep 12th, 9026 8:32 AM.",
        "try again in 99999999 days.",
        "try again at 9:77 AM",
        "",
    ],
)
def test_what_says_no_time_is_unknown(said: str) -> None:
    assert retry_at(HIT + said, local("2026-01-23 07:31:00")) is None


@pytest.mark.parametrize(
    ("name", "now", "expected"),
    [
        ("e429usage", "2026-11-23 07:32:00", "2026-11-23 09:03:00"),
        ("v0.130.0/e429usage", "2026-11-23 07:50:00", "2026-11-23 09:21:00"),
        ("v0.47.0/e429usage", "2026-11-23 07:48:00", "2026-11-23 09:19:00"),
    ],
)
def test_recorded_messages(name: str, now: str, expected: str) -> None:
    message = RECORDINGS[name].reader().errors[-1]
    assert retry_at(message, local(now)) == local(expected)


def test_the_hour_that_the_summer_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", BERLIN)
    time.tzset()
    evening = local("2026-03-28 23:00:00")
    assert retry_at("try again at 3:30 AM", evening) == evening + 3.5 * 3600 + 60


@PATIENT
@given(
    st.sampled_from(["at ", "in ", "on ", "at Sep ", "at Sep 12th, "]),
    st.text("0123456789:., APMapmdhst", max_size=25),
)
def test_no_message_raises_or_waits_for_ever(form: str, text: str) -> None:
    now = local("2026-11-23 07:31:10")
    at = retry_at(f"try again {form}{text}", now)
    assert at is None or now < at <= now + 401 * 86400
