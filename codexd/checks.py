"""What `codexd doctor` looks at: Python, the configuration, the directories, the host.

Each check is a function from the Host to findings, and changes nothing.  The checks of
Codex are in `codexchecks`, those of units in `unitchecks`, the table of all in `doctor`.

A check may raise OSError where it may not look; that is a finding, too.
"""

from __future__ import annotations

import os
import pwd
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from shlex import quote
from typing import Any

from codexd import codex, spool
from codexd.config import Config, Directories

_LEAST = {"PyYAML": (6, 0), "watchdog": (2, 2), "sdnotify": (0, 3)}
_WAIT = 30  # seconds for a tool
_ROOM = 1 << 30  # bytes of free disk below which it is worth a word


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, and the command, or the few words, that mend it."""

    status: Status
    what: str
    mend: str | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """What the checks look at.  Without a valid configuration, with the defaults."""

    dirs: Directories
    config: Config
    problem: str | None  # why codexd.yaml is not valid
    units: bool  # whether systemd is to start workers here
    path: str  # PATH of whoever runs Codex
    serve: str = "codexd serve"  # the command that serves this root

    @property
    def user(self) -> pwd.struct_passwd | None:
        """Whom the service runs as; None if there is no such user."""
        if not self.dirs.systemwide:
            return _account(os.geteuid())
        try:
            return pwd.getpwnam("codexd")
        except KeyError:
            return None

    @property
    def codex(self) -> str:
        """Raises codex.Missing."""
        return codex.find(self.config.codex.bin, self.path)

    @property
    def keys_file(self) -> Path:
        return self.dirs.config_file.parent / "api.env"

    @property
    def manager(self) -> list[str]:
        """systemctl, for the right systemd."""
        return ["systemctl", *([] if self.dirs.systemwide else ["--user"])]


Findings = Iterator[Finding]


def _account(uid: int) -> pwd.struct_passwd:
    """A user; one without a name, as in containers, goes by the number."""
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return pwd.struct_passwd((str(uid), "x", uid, os.getegid(), "", "/", "/bin/sh"))


def ok(what: str) -> Finding:
    return Finding(Status.OK, what)


def warn(what: str, mend: str) -> Finding:
    return Finding(Status.WARN, what, mend)


def fail(what: str, mend: str) -> Finding:
    return Finding(Status.FAIL, what, mend)


def said(command: list[str], **options: Any) -> tuple[int, str]:
    """A tool's exit status and output; 127 if there is none.  Raises OSError."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_WAIT,
            **options,
        )
    except FileNotFoundError:
        return 127, f"there is no {command[0]}"
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} did not answer within {_WAIT} s") from error
    return done.returncode, done.stdout.decode("utf-8", "replace").strip()


def become(user: pwd.struct_passwd) -> dict[str, Any]:
    """For a tool that has to run as the service's user, who may have written it.

    In a session of its own: it could type into root's terminal.
    """
    if os.geteuid() == user.pw_uid:
        return {}
    who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return {**who, "start_new_session": True}


# --- programs ---------------------------------------------------------------------------


def python(host: Host) -> Findings:
    """Python and the packages; without one of them nothing would run at all."""
    told = [f"Python {'.'.join(map(str, sys.version_info[:3]))}"]
    for name, least in _LEAST.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # it is there all the same, and does not say which it is
        told.append(f"{name} {found}")
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < least:
            yield fail(f"{name} {found} is too old", f"pip install --upgrade {name}")
    yield ok(", ".join(told))


def configuration(host: Host) -> Findings:
    file = host.dirs.config_file
    if host.problem:
        yield fail(host.problem, f"mend it, then: codexd check {file}")
    else:
        yield ok(f"{file} is valid" if file.exists() else f"there is no {file}: the defaults")


# --- files --------------------------------------------------------------------------------


def directories(host: Host) -> Findings:
    """That they are there, whose they are, and who may enter."""
    dirs, user = host.dirs, host.user
    if user is None:
        yield fail("there is no user codexd", "codexd install")
        return
    wanted = {dirs.inbox: 0o3770, host.config.codex.home: 0o700}
    wanted |= dict.fromkeys((dirs.state, dirs.tasks, dirs.answers, dirs.rejected, dirs.work), 0o750)
    make = host.serve  # which makes them
    if dirs.systemwide:
        make = "systemd-tmpfiles --create codexd.conf"
    elif host.units:
        make = f"{' '.join(host.manager)} start codexd"
    bad = 0
    for path, mode in wanted.items():
        try:
            found = path.stat()
        except FileNotFoundError:
            bad += 1
            yield (fail if dirs.systemwide else warn)(f"{path} is missing", make)
            continue
        for finding in _owned(path, found, mode, user):
            bad += 1
            yield finding
    if not bad:
        yield ok(f"the directories in {dirs.state} are {user.pw_name}'s, with the right modes")


def _owned(
    path: Path, found: os.stat_result, mode: int, user: pwd.struct_passwd
) -> Iterator[Finding]:
    if found.st_uid != user.pw_uid:
        yield fail(f"{path} is not {user.pw_name}'s", f"chown {user.pw_name}: {quote(str(path))}")
    have = stat.S_IMODE(found.st_mode)
    if have & ~mode & 0o777:  # somebody may do more than should be
        yield fail(f"{path} has mode {have:o}, not {mode:o}", f"chmod {mode:o} {quote(str(path))}")
    elif have != mode and mode & 0o3000:
        yield warn(f"{path} has mode {have:o}, not {mode:o}", f"chmod {mode:o} {quote(str(path))}")


def keys(host: Host) -> Findings:
    """The file with the API key is for systemd alone."""
    file, owner = host.keys_file, 0 if host.dirs.systemwide else os.geteuid()
    try:
        found = file.stat()
    except FileNotFoundError:
        return
    if found.st_mode & 0o077 or found.st_uid != owner:
        name = quote(str(file))
        mend = f"chmod 600 {name}; chown {_account(owner).pw_name}: {name}"
        yield fail(f"{file} can be read by others, and the key in it", f"{mend}; renew the key")
    else:
        yield ok(f"{file} is for its owner alone")


def disk(host: Host) -> Findings:
    free, least = spool.free_bytes(_existing(host.dirs.state)), host.config.limits.disk_free
    text = f"{free >> 20} MiB are free for {host.dirs.state}"
    if free < least:
        yield fail(f"{text}, less than limits.disk_free: no task starts", "make room")
    elif free < _ROOM:
        yield warn(text, "make room, or codexd gc")
    else:
        yield ok(text)


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


# --- the host -----------------------------------------------------------------------------


def clock(host: Host) -> Findings:
    status, text = said(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    if status:
        return  # nobody here to ask
    if text == "yes":
        yield ok("the clock is synchronised")
    else:
        yield warn(
            "the clock is not synchronised: times in answers may be wrong",
            "timedatectl set-ntp true",
        )
