"""Wall-clock time as text, the one form it has in every file.

Times tell people when something happened; nothing is decided by comparing
them, because the clock may jump.  Pauses are counted by `steady`; deadlines of
processes by time.monotonic(), which stands still while the host and they sleep.  Lean.
"""

from __future__ import annotations

import time


def stamp(epoch: float) -> str:
    """RFC 3339 in UTC with milliseconds: 2026-11-23T07:20:11.123Z."""
    whole, part = divmod(round(epoch * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{part:03}Z"


def now() -> str:
    return stamp(time.time())


def steady() -> float:
    """Seconds of a clock that nobody sets, and that runs on while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def left(until: str, most: float) -> float:
    """Seconds until what `stamp` wrote; between 0 and `most`, for the clock may have been set."""
    return min(max(epoch(until) - time.time(), 0.0), most)


def epoch(text: str) -> float:
    """Seconds since 1970 of what `stamp` wrote.  Raises ValueError."""
    from calendar import timegm

    # strptime checks the fraction and then drops it.
    whole = timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ"))
    return whole + int(text[20:-1].ljust(6, "0")) / 1e6
