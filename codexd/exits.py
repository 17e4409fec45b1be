"""How a worker's unit ended: the records in exits/, and what they mean.

One file an attempt, exits/ID, written by the unit's ExecStopPost= (codexd-exit)
however the worker ended, and removed by the launcher when the task has gone on.
It lies in /run: a power cut takes it away, and then it is the boot that ended
the worker.

A record says what systemd saw; whether the turn was finished by then, the
attempt's own directory says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from codexd import cgroup, durable, sane
from codexd.outcome import Outcome

DAMAGED = "damaged"  # for `result`: something else than a record lies there
UNTOLD = 74  # exit status of a worker that could not use tasks/ID/N (sysexits: EX_IOERR)
_MOST = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """An exit record.  The words are systemd's, see systemd.exec(5), $SERVICE_RESULT."""

    result: str  # success, exit-code, signal, core-dump, watchdog, timeout, oom-kill...
    code: str = ""  # exited, killed, dumped
    status: str = ""  # a number, or a signal's name
    invocation: str = ""
    boot: str = ""
    stopping: bool = False  # the manager, and so the host or the session, was going down
    stopped: bool = False  # somebody had asked for its end, as the launcher saw
    cost: Mapping[str, float] = field(default_factory=dict)
    oom_kills: int = 0


def read(path: Path) -> Ended | None:
    """The record, or None if there is none; one of `DAMAGED` tells nothing.  Raises OSError."""
    try:
        text = durable.read(path, _MOST).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except ValueError:
        return Ended(DAMAGED)
    head, *sections = text.split("\n[")
    facts = dict(line.partition("=")[::2] for line in head.splitlines())
    files = dict(section.split("]\n", 1) for section in sections if "]\n" in section)
    return Ended(
        facts.get("result", ""),
        facts.get("code", ""),
        facts.get("status", ""),
        facts.get("invocation", ""),
        facts.get("boot", ""),
        facts.get("stopping") == "yes",
        cost=cgroup.cost(files),
        oom_kills=cgroup.oom_kills(files),
    )


def vanished() -> Ended:
    """For a unit that was started and is gone, and left no record.

    Where systemd cannot set up its surroundings, it cannot run ExecStopPost= in them.
    """
    return Ended("vanished", boot=boot())


def boot() -> str:
    """The id of this boot, as exit records have it.

    systemd's own word first: in a container the kernel's file is the host's.
    """
    told = os.environ.get("CODEXD_BOOT_ID")
    return told or Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "").strip()


def outcome(ended: Ended, boot: str) -> tuple[Outcome, str]:
    """What ended a worker that did not end its turn, and a sentence about it.

    A unit that was stopped without anything wrong was stopped by hand, unless the
    whole host was stopping.
    """
    if ended.result == DAMAGED:
        return Outcome.INTERRUPTED, "its worker ended, and the record of how is damaged"
    if ended.boot != boot:
        return Outcome.INTERRUPTED, "the host was restarted in the middle of the turn"
    if ended.stopping:
        return Outcome.INTERRUPTED, "the host was shut down in the middle of the turn"
    if ended.result == "timeout":
        return _too_long(ended)
    if ended.result == "watchdog":
        return Outcome.STALL, "its worker hung, and was ended by its watchdog (WatchdogSec=)"
    if ended.result == "oom-kill" or (ended.oom_kills and ended.code in ("killed", "dumped")):
        return Outcome.OOM, "its worker was killed for want of memory (MemoryMax=)"
    if ended.result in ("signal", "core-dump"):
        return Outcome.SIGNAL, f"its worker was killed by SIG{ended.status}"
    if ended.result == "success":
        return Outcome.CANCELLED, "its unit was stopped by hand (systemctl stop)"
    return Outcome.HOST, _failed(ended)


def _too_long(ended: Ended) -> tuple[Outcome, str]:
    """A unit has three clocks, and systemd does not tell which of them it was.

    A worker that is up hears SIGTERM, and ends by itself.
    """
    if ended.stopped:
        text = "its unit was stopped by hand (systemctl stop), and killed as it did not end"
        return Outcome.CANCELLED, f"{text} (TimeoutStopSec=)"
    if ended.code == "exited":
        return Outcome.TIMEOUT, "its unit was running for too long (RuntimeMaxSec=)"
    if ended.status == "TERM":
        return Outcome.TIMEOUT, "its worker was not up in time (TimeoutStartSec=)"
    text = "its worker did not end when it was told to, and was killed"
    return Outcome.TIMEOUT, f"{text} (RuntimeMaxSec=, TimeoutStartSec= or TimeoutStopSec=)"


def _failed(ended: Ended) -> str:
    if ended.result == "vanished":
        why = "journalctl -u 'codexd-worker@*' tells why"
        return f"its unit could not be set up, or ended before its worker began; {why}"
    if (ended.result, ended.status) == ("exit-code", str(UNTOLD)):
        return "its worker could not read or write its directory: no room, or a failing disk"
    told = "journalctl -u 'codexd-worker@*' tells more"
    if ended.result == "exit-code" and 200 <= (sane.count(ended.status) or 0) < 250:
        # systemd's own: what it could not set up, before the worker was there.
        return f"its unit could not be set up (status {ended.status}, systemd.exec(5)); {told}"
    return f"its worker failed ({ended.result}, status {ended.status or 'unknown'}); {told}"
