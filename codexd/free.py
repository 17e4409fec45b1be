"""Whether there is room left on the disks that codexd and Codex write to.

Part of the master.  The state may lie on several file systems, and CODEX_HOME on one
more: a turn whose conversation cannot be kept costs as much as any other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from codexd import spool
from codexd.config import Config


def shortage(config: Config) -> str | None:
    """Where there is less room than there must be, and what to do; None if nowhere."""
    least = config.limits.disk_free
    for path in _places(config):
        if spool.free_bytes(path) < least:
            text = f"less than {size(least)} free below {path}"
            return text + "; make room, work goes on by itself (limits.disk_free)"
    return None


def _places(config: Config) -> Iterator[Path]:
    """One directory of each file system."""
    dirs, seen = config.dirs, set()
    for path in (
        dirs.ledger.parent, config.codex.home, dirs.inbox, dirs.answers, dirs.tasks,
        dirs.archive, dirs.sessions, dirs.transcripts,
    ):  # fmt: skip
        try:
            device = os.stat(path).st_dev
        except OSError:
            continue  # not there yet; or whoever writes there finds out
        if device not in seen:
            seen.add(device)
            yield path


def size(bytes: int) -> str:
    """A size as it is written in codexd.yaml."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if bytes >= 1 << shift and not bytes % (1 << shift):
            return f"{bytes >> shift}{unit}"
    return str(bytes)
