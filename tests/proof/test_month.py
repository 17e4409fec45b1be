"""A month in minutes: schedules, spent quotas, reboots, crashes, full disks, budgets.

Every task ends, none is run twice, and nothing that the daemon has grows without bound.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from codexd.model import Note
from tests.proof.level import Figures, chances, pick
from tests.proof.month import CONFIG, DAY, HOUR, KEPT, MISFORTUNES, NIGHTLY, WELL, Month, Size
from tests.proof.simulated import Clock, Simulated, library
from tests.test_bad_input import mounted

pytestmark = [pytest.mark.xdist_group("month"), pytest.mark.timeout(pick(600, 3600, 7200))]

DAYS = pick(30, 30, 60)
STEP = pick(8, 1, 1) * HOUR


@pytest.mark.skipif(library() is None, reason="needs libfaketime")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
def test_a_month_in_minutes(tmp_path: Path, figure: Figures) -> None:
    root = tmp_path / "root"
    root.mkdir()
    clock = Clock(tmp_path / "clock", (DAYS + 7) * DAY)
    with mounted(root, "-t", "tmpfs", "-o", "size=96M", "tmpfs"):
        daemon = Simulated(root, clock, CONFIG, {})
        (daemon.dirs.schedules).mkdir(exist_ok=True)
        (daemon.dirs.schedules / "nightly.md").write_text(NIGHTLY)
        month = Month(daemon, chances("month"), STEP)
        month.behave(WELL, 0)
        with daemon:
            for _ in range(DAYS):
                month.day()
            month.calm()
            told(month, figure)
            all_ended(month)
            none_twice(month)
            bounded(month.sizes)
            assert set(month.met) >= MISFORTUNES, "each of them has come"


def all_ended(month: Month) -> None:
    """Every task has ended, once, and every file has become one."""
    reader = month.daemon.reader
    assert not reader.book().tasks
    assert set(reader.ends.values()) == {1}
    assert set(reader.ends) == set(reader.files)
    by_marker: dict[str, list[str]] = {}
    for id, name in reader.files.items():
        by_marker.setdefault(name[:11], []).append(id)
    for marker, name in month.dropped.items():
        assert len(by_marker.get(marker, [])) == 1, f"{name}: {by_marker.get(marker)}"
    assert not reader.book().damaged


def none_twice(month: Month) -> None:
    """No attempt, by what Codex says; no task either that nothing has happened to."""
    reader, attempts = month.daemon.reader, month.starts()
    assert not [one for one, times in attempts.items() if times > 1]
    starts = Counter(id for id, _ in attempts)
    assert not [id for id, times in starts.items() if times > reader.starts[id]]
    assert not [id for id in reader.done if not starts[id]], "done, and Codex never started"
    calm = month.untouched & reader.done
    assert len(calm) > DAYS
    assert not [id for id in calm if (starts[id], reader.starts[id]) != (1, 1)]


def bounded(sizes: list[Size]) -> None:
    """After retention has begun to work, the days are alike, but for the work they had."""
    for what in ("files", "disk", "rss", "fds", "ledger"):
        # The ledger grows until it is begun anew, about once a week.
        first, days = (0, KEPT + 4) if what == "ledger" else (KEPT + 1, 3)
        per_task = what in ("files", "disk")
        told = [getattr(s, what) / (s.kept + 10 if per_task else 1) for s in sizes]
        slack = 0 if per_task else 16
        assert min(told[-days:]) <= 1.5 * max(told[first : KEPT + 4]) + slack, (what, told)


def told(month: Month, figure: Figures) -> None:
    reader, last = month.daemon.reader, month.sizes[-1]
    figure("month: simulated days", DAYS)
    figure("month: tasks ended", sum(reader.ends.values()))
    figure("month: starts of Codex", month.starts().total())
    figure("month: tasks that nothing happened to", len(month.untouched & reader.done))
    figure("month: outcomes", dict(reader.outcomes))
    figure("month: not done", dict(reader.complaints))
    figure("month: what happened", dict(month.met))
    figure("month: gate closed, ledger lines", reader.kinds[Note.CLOSED])
    figure("month: files, day 8 and last", (month.sizes[KEPT].files, last.files))
    figure("month: RSS MiB, day 1 and last", (month.sizes[0].rss >> 20, last.rss >> 20))
    figure("month: fds, day 1 and last", (month.sizes[0].fds, last.fds))
