"""Where everything of an installation lies.

`find` chooses the directories: below --root, the system's, or a user's own.
Nothing is created, no link is resolved.  Part of the room `config`, which is the
door to it.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path


class ConfigError(ValueError):
    """Why a configuration cannot be used: `FILE:LINE: key: what; allowed: ...`.

    Of a file, also the `reason` without the place, and the `line` if known.
    """

    def __init__(self, text: str, reason: str | None = None, line: int | None = None) -> None:
        super().__init__(text)
        self.reason = reason or text
        self.line = line


@dataclass(frozen=True, slots=True)
class Directories:
    """Every path of an installation.  None need exist."""

    config_file: Path
    state: Path
    run: Path
    inbox: Path
    rejected: Path
    answers: Path
    schedules: Path
    ledger: Path
    checkpoint: Path
    lock: Path
    tasks: Path
    archive: Path
    sessions: Path
    transcripts: Path
    keys: Path
    usage: Path
    work: Path
    codex_home: Path  # the default; Config.codex.home is the one in use
    http_socket: Path
    exits: Path
    limits: Path
    hooks: Path
    heartbeat: Path
    rooted: bool  # everything below one --root
    systemwide: bool  # served by a unit of the system's, not of a user's

    @classmethod
    def below(cls, root: Path) -> Directories:
        """The paths of --root."""
        root = Path(os.path.abspath(root))
        return replace(cls._at(root, root, root, root / "run"), rooted=True)

    @classmethod
    def system(cls) -> Directories:
        spool, state = Path("/var/spool/codexd"), Path("/var/lib/codexd")
        run = Path("/run/codexd")  # root's, for systemd makes the socket in it
        own = run / "master"
        found = cls._at(Path("/etc/codexd"), spool, state, run)
        return replace(found, run=own, heartbeat=own / "heartbeat", systemwide=True)

    @classmethod
    def user(cls, env: Mapping[str, str]) -> Directories:
        """XDG paths; without XDG_RUNTIME_DIR, `run` lies in the state directory.

        Raises ConfigError for a user without a home.
        """

        def base(name: str) -> Path | None:
            value = env.get(name, "")
            return Path(value) if os.path.isabs(value) else None  # XDG: ignore relative ones

        home = base("HOME") or _home(os.geteuid())
        config = (base("XDG_CONFIG_HOME") or home / ".config") / "codexd"
        state = (base("XDG_STATE_HOME") or home / ".local/state") / "codexd"
        runtime = base("XDG_RUNTIME_DIR")
        return cls._at(config, state, state, runtime / "codexd" if runtime else state / "run")

    @classmethod
    def _at(cls, config: Path, spool: Path, state: Path, run: Path) -> Directories:
        named = {name: spool / name for name in ("inbox", "rejected", "answers", "schedules")}
        named |= {name: state / name for name in ("lock", "tasks", "archive", "sessions")}
        named |= {name: state / name for name in ("transcripts", "keys", "usage", "work")}
        named |= {name: run / name for name in ("exits", "limits", "hooks", "heartbeat")}
        return cls(
            config_file=config / "codexd.yaml",
            state=state,
            run=run,
            ledger=state / "tasks.md",
            checkpoint=state / "checkpoint.json",
            codex_home=state / "codex",
            http_socket=run / "http.sock",
            rooted=False,
            systemwide=False,
            **named,
        )


def find(
    root: Path | None, config_file: Path | None, env: Mapping[str, str], uid: int
) -> Directories:
    """Below --root, else the system's for root and the user codexd, else XDG; --config.

    Raises ConfigError.
    """
    if root is not None:
        dirs = Directories.below(root)
    else:
        dirs = Directories.system() if _is_system(uid) else Directories.user(env)
    return replace(dirs, config_file=Path(os.path.abspath(config_file or dirs.config_file)))


def _home(uid: int) -> Path:
    try:
        return Path(pwd.getpwuid(uid).pw_dir)
    except KeyError:  # as in containers
        raise ConfigError(f"user {uid} has no home: set HOME, or say --root DIR") from None


def _is_system(uid: int) -> bool:
    try:
        return uid == 0 or pwd.getpwuid(uid).pw_name in ("codexd", "codexd-http")
    except KeyError:  # a uid without a name, as in containers
        return False
