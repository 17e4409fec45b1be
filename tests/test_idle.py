"""An idle daemon costs next to nothing, by the kernel's own account of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.daemon import Daemon, until

FAKE = Path(__file__).parent / "bin" / "codex"
SECONDS = 20
LIMIT = 1.0  # clock ticks in that time; three a minute
PAGED = 60.0  # ticks in that time where the host has taken the memory away
WAKES = 200  # of a process in that time; about five for each of seven rounds


def ticks(pid: int) -> float:
    """Clock ticks of processor time used so far, by a process and its dead children.

    Of the living by the scheduler's nanoseconds, where it tells them: whole ticks, in
    which utime and stime count, are too coarse for what is measured here.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own, children = (int(fields[at]) + int(fields[at + 1]) for at in (11, 13))
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        spent = sum(int((t / "schedstat").read_text().split()[0]) for t in threads)
    except FileNotFoundError:
        return float(own + children)
    return spent / 1e9 * os.sysconf("SC_CLK_TCK") + children


def wakes(pid: int) -> int:
    """How often a process has gone to sleep, with all its threads."""
    word = "\nvoluntary_ctxt_switches:"
    told = [(t / "status").read_text() for t in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int(text.partition(word)[2].split()[0]) for text in told)


def settled(daemon: Daemon, processes: int) -> list[int]:
    """The daemon's processes, once it has worked and nothing is left of that."""
    daemon.drop("a.md", "so that it has done everything once")
    daemon.answer("a")
    until(lambda: not list(daemon.dirs.tasks.iterdir()), "the task in the archive")
    until(lambda: len(daemon.processes()) == processes, f"{processes} processes")
    time.sleep(2.5)  # within which it looks more often, as more may come
    return daemon.processes()


def test_an_idle_daemon_uses_three_ticks_a_minute(tmp_path: Path) -> None:
    """Some hosts take the memory of an idle guest away, and each round pays for its return: 40
    ticks were seen there, for the same calls.  What is counted there is how often it wakes."""
    config = f"codex:\n  bin: {FAKE}\nhttp:\n  listen: "
    alone = Daemon(tmp_path / "alone", config=config + "off\n", covered=False)
    with_http = Daemon(tmp_path / "http", config=config + "unix\n", covered=False)
    with alone, with_http:
        groups = {"alone": settled(alone, 1), "with HTTP": settled(with_http, 2)}
        for _ in range(3):  # what else goes on here makes each tick do less
            every = [pid for pids in groups.values() for pid in pids]
            before, woken = {pid: ticks(pid) for pid in every}, {pid: wakes(pid) for pid in every}
            time.sleep(SECONDS)
            used = {
                name: round(sum(ticks(pid) - before[pid] for pid in pids), 2)
                for name, pids in groups.items()
            }
            woken = {pid: wakes(pid) - times for pid, times in woken.items()}
            print(used, woken)
            if max(used.values()) <= LIMIT:
                break
        assert alone.processes() + with_http.processes() == [*groups["alone"], *groups["with HTTP"]]
    found = max(used.values())
    assert found <= LIMIT or (found <= PAGED and max(woken.values()) <= WAKES), (used, woken)
