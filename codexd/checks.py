"""What `codexd doctor` looks at: Python, Codex, the directories, the host.

Each check is a function from the Host to findings, and changes nothing (what of
Codex is run, runs as the user of the service).  The checks of units are in
`unitchecks`, the table of all in `doctor`.

A check may raise OSError where it may not look; that is a finding, too.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from codexd import codex, profile, spool
from codexd.config import Config, Directories

_LEAST = {"PyYAML": (6, 0), "watchdog": (2, 2), "sdnotify": (0, 3)}
_PYTHON = (3, 11)
_WAIT = 30  # seconds for a tool
_ROOM = 1 << 30  # bytes of free disk below which it is worth a word
_ALWAYS = "CODEX_API_KEY"
# What keeps a user from making namespaces: the kernel's setting, and what it has to be.
_NAMESPACES = {
    "kernel.apparmor_restrict_unprivileged_userns": "0",
    "kernel.unprivileged_userns_clone": "1",
}


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

    @property
    def user(self) -> pwd.struct_passwd | None:
        """Whom the service runs as; None if there is no such user."""
        try:
            if self.dirs.systemwide:
                return pwd.getpwnam("codexd")
            return pwd.getpwuid(os.geteuid())
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
    """For a tool that has to run as the service's user."""
    if os.geteuid() == user.pw_uid:
        return {}
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


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
    if sys.version_info < _PYTHON:
        yield fail(f"{told[0]} is too old", "install Python 3.11 or newer")
    yield ok(", ".join(told))


def configuration(host: Host) -> Findings:
    file = host.dirs.config_file
    if host.problem:
        yield fail(host.problem, f"mend it, then: codexd check {file}")
    else:
        yield ok(f"{file} is valid" if file.exists() else f"there is no {file}: the defaults")


def cli(host: Host) -> Findings:
    """Codex itself."""
    try:
        found = host.codex
        version = codex.version(found, codex.environment(os.environ, "/nonexistent", []))
    except codex.Missing as missing:
        yield fail(str(missing), "npm install -g @openai/codex, or codex.bin in codexd.yaml")
        return
    yield ok(f"Codex {'.'.join(map(str, version))}: {found}")


def rg(host: Host) -> Findings:
    try:
        package = Path(os.path.realpath(host.codex)).parent.parent
    except codex.Missing:
        package = Path("/nonexistent")
    found = shutil.which("rg", path=host.path) or shutil.which("rg", path=package / "codex-path")
    if found:
        yield ok(f"notes are searched by {found}")
    else:
        yield warn("there is no rg: notes are searched by slower means", "apt install ripgrep")


def login(host: Host) -> Findings:
    """Whether Codex has a login, or a key where workers get it from."""
    home = host.config.codex.home
    try:
        wanted = codex.env_keys((home / "config.toml").read_text("utf-8"))
    except FileNotFoundError:
        wanted = []
    except ValueError as error:
        yield fail(f"{home}/config.toml: {error}", "mend that line")
        return
    names = {_ALWAYS, *wanted}
    there = _keys(host.keys_file) & names if host.units else names & os.environ.keys()
    where = host.keys_file if host.units else "the environment of codexd serve"
    if (home / "auth.json").is_file():
        yield ok(f"Codex is logged in ({home}/auth.json)")
    elif there:
        yield ok(f"{', '.join(sorted(there))} is set in {where}")
    else:
        prefix = "runuser -u codexd -- env " if host.dirs.systemwide else ""
        what = f"neither a login in {home} nor {' or '.join(sorted(names))} in {where}"
        yield fail(what, f"{prefix}CODEX_HOME={home} codex login")


def _keys(file: Path) -> set[str]:
    """The variables that an EnvironmentFile= sets.  Raises OSError when it is not for us."""
    try:
        lines = file.read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return set()
    split = (line.partition("=") for line in lines if not line.lstrip().startswith(("#", ";")))
    return {name.strip() for name, _, value in split if value.strip()}


def sandbox(host: Host) -> Findings:
    """Codex's sandbox, tried now; a broken one is not told by a turn."""
    user = host.user
    try:
        found = host.codex
    except codex.Missing:
        return
    if user is None:
        return
    with tempfile.TemporaryDirectory(prefix="codexd-doctor-") as place:
        options = become(user)
        if options:
            os.chown(place, user.pw_uid, user.pw_gid)
        env = {**codex.environment(os.environ, place, []), "HOME": place}
        command = [found, "sandbox", "--", "true"]
        status, text = said(command, env=env, cwd=place, **options)
    if status == 0:
        yield ok(f"Codex's sandbox works for {user.pw_name}")
    else:
        why = " ".join(text.split())[:300]
        mend = (
            "sysctl kernel.unprivileged_userns_clone kernel.apparmor_restrict_unprivileged_userns"
        )
        yield fail(f"Codex's sandbox does not work for {user.pw_name}: {why}", mend)


def secrets(host: Host) -> Findings:
    """Whether commands of the model are kept from what they must not read."""
    if why := profile.why_not(host.config):
        mend = "see SECURITY CONSIDERATIONS in codexd(7)"
        yield warn(f"commands of the model can read secrets: {why}", mend)
    else:
        yield ok("secrets are kept from commands of the model by a permission profile")


# --- files --------------------------------------------------------------------------------


def directories(host: Host) -> Findings:
    """That they are there, whose they are, and who may enter."""
    dirs, user = host.dirs, host.user
    if user is None:
        yield fail("there is no user codexd", "codexd install")
        return
    wanted = {dirs.inbox: 0o3770, host.config.codex.home: 0o700}
    wanted |= dict.fromkeys((dirs.state, dirs.tasks, dirs.answers, dirs.rejected, dirs.work), 0o750)
    make = "systemd-tmpfiles --create codexd.conf" if dirs.systemwide else "start codexd"
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
        yield fail(f"{path} is not {user.pw_name}'s", f"chown {user.pw_name}: {path}")
    have = stat.S_IMODE(found.st_mode)
    if have & ~mode & 0o777:  # somebody may do more than should be
        yield fail(f"{path} has mode {have:o}, not {mode:o}", f"chmod {mode:o} {path}")
    elif have != mode and mode & 0o3000:
        yield warn(f"{path} has mode {have:o}, not {mode:o}", f"chmod {mode:o} {path}")


def keys(host: Host) -> Findings:
    """The file with the API key is for systemd alone."""
    file, owner = host.keys_file, 0 if host.dirs.systemwide else os.geteuid()
    try:
        found = file.stat()
    except FileNotFoundError:
        return
    if found.st_mode & 0o077 or found.st_uid != owner:
        mend = f"chmod 600 {file}; chown {pwd.getpwuid(owner).pw_name}: {file}"
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
