"""When a spent quota comes back, as far as Codex's message tells.

Codex prints the time for a person: a minute on the local clock ("9:02 AM"), with
a date if it is another day, or, in old versions, a span ("in 3 days 6 hours").
Promises: no message raises, and none closes the gate for longer than 400 days.
Part of the room `codex`, which is the door to it.
"""

from __future__ import annotations

import re
import time

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_CLOCK = r"(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)\s*(?P<half>[AaPp])\.?[Mm]"
_DATE = r"(?P<month>[A-Za-z]{3})[a-z]*\.? (?P<day>\d{1,2})(?:st|nd|rd|th)?,? (?P<year>\d{4}),? "
_AT = rf"(?i)try again (?:at|on) (?:{_DATE}(?:at )?)?{_CLOCK}"
_IN = r"(?i)try again in (?P<time>less than a minute|(?:(?:and |, ?)?[\d.]+ ?[a-z]+ ?)+)"
_PART = r"(?i)([\d.]+) ?(ms|[wdhms])"
_SECONDS = {"w": 604800.0, "d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_LATE = 600  # seconds by which the local clock may be ahead of the service's
_FAR = 400 * 86400


def retry_at(message: str, now: float) -> float | None:
    """When a quota message lets us try again; None if it does not say.

    `now` and the result are epoch seconds.  The message gives no more than a
    minute, of local time: the result is the beginning of the next one.  A time
    of day that has passed is tomorrow's, unless it has only just passed.
    """
    if found := re.search(_AT, message):
        at = _date(found, now) if found["month"] else _time_of_day(found, now)
    elif found := re.search(_IN, message):
        at = now + _duration(found["time"])
    else:
        return None
    if at is None or at > now + _FAR:
        return None  # a damaged date must not close the gate for ever
    return (max(at, now) // 60 + 1) * 60


def _hour(found: re.Match[str]) -> int:
    return int(found["hour"]) % 12 + (12 if found["half"] in "Pp" else 0)


def _time_of_day(found: re.Match[str], now: float) -> float:
    today = time.localtime(now)

    def on(day: int) -> float:
        clock = (_hour(found), int(found["minute"]), 0)
        return time.mktime((today.tm_year, today.tm_mon, day, *clock, 0, 0, -1))

    at = on(today.tm_mday)
    return at if at + _LATE > now else on(today.tm_mday + 1)  # it carries over a month's end


def _date(found: re.Match[str], now: float) -> float | None:
    month, day = found["month"].lower(), int(found["day"])
    if month not in _MONTHS or not 1 <= day <= 31:
        return None
    number = _MONTHS.index(month) + 1
    when = (int(found["year"]), number, day, _hour(found), int(found["minute"]), 0, 0, 0, -1)
    try:
        at = time.mktime(when)
    except OverflowError:
        return None
    return at if time.localtime(at).tm_mday == day else None


def _duration(text: str) -> float:
    """Seconds; "less than a minute" has no number and is 0."""
    total = 0.0
    for number, unit in re.findall(_PART, text):
        try:
            total += float(number) * _SECONDS[unit.lower()]
        except ValueError:
            continue  # "1.2.3" is no number
    return total
