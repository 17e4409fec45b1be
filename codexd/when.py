"""When a task may start at the earliest, as its file says it: a time, or a delay.

A time is RFC 3339, the seconds may be left out; without a zone it is local time of
this process.  It is what a clock shows, so a task starts when the clock shows it,
however the clock came there.  A delay is a length of time, and no clock changes it.

No I/O; the zone is the only thing that is looked up, the time now is passed in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from codexd.config import duration
from codexd.document import Rule, Scalar

MOST = 366 * 86400.0  # seconds ahead
_SPAN = "1s to 366d"
_DELAY = duration(1, int(MOST), _SPAN)
_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class When:
    """`at` in seconds since 1970; of a delay also how long it is, in seconds."""

    at: float
    delay: float | None = None


def when(text: Scalar, now: float) -> When | None:
    """What the text means at `now` (seconds since 1970); None if it is neither."""
    delay = _DELAY.read(text)
    if delay is not None:
        return When(now + delay, delay)
    if not _TIME.fullmatch(text):
        return None
    try:
        return When(datetime.fromisoformat(text.upper().replace("T", " ")).timestamp())
    except (ValueError, OverflowError):  # the 30th of February; years that no clock shows
        return None


def _read(found: Scalar) -> str | None:
    return str(found) if when(found, 0.0) else None


NOT_BEFORE = Rule(
    _read, f"a time such as 2026-11-24T02:00 or 2026-11-24T02:00:00Z, or a delay of {_SPAN}"
)
