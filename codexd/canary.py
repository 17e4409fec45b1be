"""Whether Codex's sandbox works here, and keeps the files from commands that our profile denies.

A sandbox that cannot be set up is not told: commands fail one by one, or leave no
trace, and the turn ends well.  So a command is tried in it before Codex is run:
once a day, for each Codex, each boot and each start of a master that has units.

A Codex may be too old for profiles, change what they mean, or have a sandbox
that does not work; none of that is told, so it is tried, by a command in a real
sandbox that looks at the profile's own file.  It is the worker that tries: the
master's unit has no namespaces to do it in.  Tried once for each Codex and
config.toml; what the command saw is kept in CODEX_HOME/.codexd/hides.json.  That it
could not look says nothing of the profile, so it is not kept.

May fail with OSError, and with `Untold`.  Lean: the worker uses it.
"""

from __future__ import annotations

import os
import time

from codexd import durable
from codexd.command import PERMISSIONS, PROFILE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SANDBOXES = ("read-only", "workspace-write")  # there is a permission profile for each
_WAIT = 20  # seconds
_TRIES = 4  # a file that the profile denies may go just as the sandbox is set up
_FORMAT = 2  # of hides.json; in the first one a try that failed stood for "open"
_LOOK = 'if (: < "$1") 2>/dev/null; then echo open; else echo hidden; fi'


class Untold(Exception):
    """A command that could tell was not run; the text says why."""


def works(binary: str, home: str, env: Mapping[str, str], verb: Sequence[str]) -> str | None:
    """Why commands cannot be run in this Codex's sandbox here; None if they can.

    `verb`: see `command.sandbox_verb`.

    Only the good is remembered (CODEX_HOME/.codexd/sandbox.json), until `forget`: what is
    mended is seen at once.  Raises OSError when it cannot be told.
    """
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    of = [binary, _stamp(binary), boot, time.strftime("%Y-%m-%d"), "INVOCATION_ID" in os.environ]
    known = _known(home)
    try:
        if durable.read_json(known, 1 << 16).get("of") == of:
            return None
    except (FileNotFoundError, ValueError):
        pass  # not tried yet
    status, _, said = _run([binary, *verb, "--", "/bin/true"], home, env)
    if status == 0:
        durable.write_json(known, {"of": of})
        return None
    forget(home)  # another may have remembered the good just before the unit was changed
    return f"Codex's sandbox does not work here, so nothing is run: {said or f'status {status}'}"


def forget(home: str) -> None:
    """Let `works` try again: the unit may be another, which nothing here tells."""
    try:
        os.unlink(_known(home))
    except FileNotFoundError:
        pass


def _known(home: str) -> str:
    return os.path.join(home, ".codexd", "sandbox.json")


def verdict(home: str) -> str | None:
    """Why the profile was found not to be heeded; None if it is, or was not tried yet."""
    try:
        why = durable.read_json(_verdict(home), 1 << 16).get("why")
    except (FileNotFoundError, ValueError):
        return None
    return str(why) if why else None


def hides(binary: str, home: str, env: Mapping[str, str]) -> str | None:
    """Why this Codex, here, does not keep secrets from commands; None if it does.

    Tried when it is not known yet.  Raises OSError or Untold when it cannot be told.
    """
    of = [_FORMAT, binary, _stamp(binary), _stamp(os.path.join(home, "config.toml"))]
    try:
        known = durable.read_json(_verdict(home), 1 << 16)
        if known.get("of") == of:
            why = known.get("why")
            return str(why) if why else None
    except (FileNotFoundError, ValueError):
        pass  # not tried yet
    why = next(filter(None, (_try(binary, home, env, sandbox) for sandbox in SANDBOXES)), None)
    durable.write_json(_verdict(home), {"of": of, "why": why})
    return why


def _verdict(home: str) -> str:
    return os.path.join(home, ".codexd", "hides.json")


def _stamp(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return []
    return [found.st_ino, found.st_mtime_ns, found.st_size]


def _try(binary: str, home: str, env: Mapping[str, str], sandbox: str) -> str | None:
    """Why a command in a real sandbox is not kept from the profile's own file."""
    canary = os.path.join(home, f"{PROFILE}.config.toml")
    os.close(os.open(canary, os.O_RDONLY | os.O_CLOEXEC))  # there, and ours to read
    chosen = f'default_permissions="{PERMISSIONS}{sandbox}"'
    command = [binary, "sandbox", "-p", PROFILE, "-c", chosen, "--", "/bin/sh", "-c", _LOOK]
    for _ in range(_TRIES):
        status, told, said = _run([*command, "sh", canary], home, env)
        if status == 0 and told == "hidden":
            return None
        if status == 0 and told == "open":
            return f"{binary} does not heed permission profiles ({sandbox})"
    raise Untold(
        f"{binary} sandbox does not work with a permission profile ({sandbox}), and"
        f" without one secrets would not be hidden: {said or f'status {status}'}"
    )


def _run(command: list[str], home: str, env: Mapping[str, str]) -> tuple[int, str, str]:
    """Status, output and what was said of a short command of Codex's.  Raises OSError."""
    import subprocess

    place = os.path.join(home, ".codexd", "try")
    os.makedirs(place, 0o700, exist_ok=True)
    try:
        ran = subprocess.run(
            command,
            cwd=place,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_WAIT,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} sandbox did not answer within {_WAIT} s") from None
    lines = ran.stderr.decode("utf-8", "replace").splitlines()
    said = " ".join(line.strip() for line in lines if not line.startswith("WARNING"))[:300]
    return ran.returncode, ran.stdout.decode("utf-8", "replace").strip(), said
