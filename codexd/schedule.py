"""A schedule: delivers schedules/NAME.md into the inbox, once for each time that it is due.

Run by codexd-schedule@NAME.service, which codexd-schedule@NAME.timer starts.  When
that is, the timer says; what is to be done, the file, which is read anew each time.

Promises: the task's key is NAME and the time at which the timer elapsed (started by
hand: this minute), so to run again for the same time does nothing.  While an earlier
delivery still lies in the inbox, as it does when codexd is stopped, there is no
further one: after any outage a schedule has one task to catch up on.  With
`overlap: skip` in the file there is none while an earlier task has not ended, with
`overlap: queue` none while one waits to run; that is looked up in the ledger.

When the timer elapsed, its stamp file says (Persistent=yes).  What systemd puts into
$TRIGGER_TIMER_REALTIME_USEC cannot be used: that of version 252 stays the time of the
first start for as long as the service is loaded.

May fail: a file that is missing or not valid, an inbox that cannot be written.  Why
is logged, the exit status is not 0, and the next time is tried as if nothing was.
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

from codexd import durable, spool, taskfile
from codexd.config import FILE_MOST, ConfigError, Directories
from codexd.ledger import LedgerBroken
from codexd.model import Request, Resume, State
from codexd.program import Exit, directories, open_streams, options
from codexd.service import Level, Service
from codexd.taskfile import Overlap
from codexd.view import View

# Seconds since the timer elapsed; what is started later, somebody starts by hand.
FRESH = 300
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}", re.ASCII)
_STAMP = "%Y%m%dT%H%M%SZ"
_STAMPED = r"[0-9]{8}T[0-9]{6}Z"


def elapsed(stamp: str | None) -> float | None:
    """When the timer with this stamp file elapsed last; None: there is none."""
    try:
        return os.stat(stamp).st_mtime if stamp else None
    except FileNotFoundError:
        return None


def key(name: str, elapsed: float | None, now: float, changed: float = 0.0) -> str:
    """What stands for this one time; all in seconds since 1970.

    Whoever has mended the file, which was `changed` since, asks for another task.
    """
    if elapsed is None or abs(now - elapsed) > FRESH:
        elapsed = now // 60 * 60
    if elapsed < changed <= now:
        elapsed = changed
    return f"{name}-{time.strftime(_STAMP, time.gmtime(elapsed))}"


def _changed(file: Path) -> float:
    """When the schedule was written; 0.0 if that cannot be seen: `request` says why."""
    try:
        return os.stat(file).st_mtime
    except OSError:
        return 0.0


def request(file: Path, key: str) -> tuple[Request, Overlap | None]:
    """What the schedule's file asks for.  Raises OSError, ValueError with the reason."""
    # An admin may keep the file elsewhere; durable.read follows no link.
    data = durable.read(os.path.realpath(file), FILE_MOST)
    try:
        found, overlap = taskfile.scheduled(file.name, data, max_bytes=FILE_MOST)
    except taskfile.Refused as why:
        raise ValueError(f"{file}: {why}") from why
    if found.key is not None:
        raise ValueError(f"{file}: key: a schedule's tasks get keys of their own; remove it")
    if overlap is Overlap.QUEUE and found.session is None:
        # A session is what makes tasks run one after another.
        fresh = Resume.NEVER if found.resume is Resume.AUTO else found.resume
        found = replace(found, session=file.stem, resume=fresh)
    return replace(found, key=key), overlap


def waiting(dirs: Directories, name: str) -> str | None:
    """An earlier delivery that is no task yet, whether or not it is just being taken."""
    delivered = re.compile(rf"{re.escape(name)}-{_STAMPED}\.json", re.ASCII)
    names, taken = spool.scan(dirs.inbox)
    names += [found for id in taken if (found := spool.taken_name(dirs, id))]
    return next((found for found in names if delivered.fullmatch(found)), None)


def overlapping(dirs: Directories, name: str, overlap: Overlap | None) -> str | None:
    """Why its earlier deliveries leave no room for one more; None if they do.

    Raises OSError, LedgerBroken: then nobody knows.
    """
    if overlap is None:
        return None
    delivered = re.compile(rf"{re.escape(name)}-{_STAMPED}", re.ASCII)
    view = View(dirs)
    view.refresh()
    live = [t for t in view.live() if t.key and delivered.fullmatch(t.key)]
    view.close()
    if overlap is Overlap.QUEUE:
        live = [t for t in live if t.state is not State.RUNNING]
    return f"task {live[0].id} of {live[0].key} is {live[0].state}" if live else None


def deliver(name: str, stamp: str | None, dirs: Directories, service: Service) -> Exit:
    """One delivery, and the word about it."""
    inbox, file = dirs.inbox, dirs.schedules / f"{name}.md"
    this = key(name, elapsed(stamp), time.time(), _changed(file))
    try:
        asked, overlap = request(file, this)
        if earlier := waiting(dirs, name):
            why = f"{earlier} still lies in the inbox; is codexd running?"
            service.log(Level.WARNING, "schedule.skipped", schedule=name, key=this, why=why)
            return Exit.DONE
        if reason := overlapping(dirs, name, overlap):
            why = f"{reason} (overlap: {overlap})"
            service.log(Level.NOTICE, "schedule.skipped", schedule=name, key=this, why=why)
            return Exit.DONE
        spool.deliver(inbox, f"{this}.json", taskfile.dump(asked))
    except (OSError, ValueError, LedgerBroken) as problem:
        service.log(Level.ERROR, "schedule.refused", schedule=name, key=this, why=_why(problem))
        return Exit.PERMISSION if isinstance(problem, PermissionError) else Exit.FAILED
    service.log(Level.INFO, "schedule.delivered", schedule=name, key=this, session=asked.session)
    return Exit.DONE


def _why(problem: OSError | ValueError | LedgerBroken) -> str:
    if isinstance(problem, OSError):
        return f"{problem.filename}: {problem.strerror}"
    return str(problem)


def main() -> None:
    open_streams()
    parser = options("codexd-schedule", "deliver schedules/NAME.md into the inbox")
    parser.add_argument("--stamp", metavar="FILE", help="the timer's stamp file")
    parser.add_argument("name", metavar="NAME")
    args = parser.parse_args()
    if not NAME.fullmatch(args.name):
        parser.error(f"{args.name!r} is no schedule's name: 1 to 61 of A-Z a-z 0-9 . _ -, "
                     "beginning with a letter or a digit")  # fmt: skip
    try:
        dirs = directories(args)
    except ConfigError as error:
        parser.error(str(error))
    sys.exit(deliver(args.name, args.stamp, dirs, Service("codexd-schedule")))


if __name__ == "__main__":
    main()
