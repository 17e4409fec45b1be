"""What every program of codexd shares on its command line.

The exit statuses, the options that say where everything lies, and the one way
from them to a checked configuration.
"""

from __future__ import annotations

import argparse
import os
from enum import IntEnum
from pathlib import Path

from codexd import __version__, config


class Exit(IntEnum):
    """Exit statuses; the numbers above 2 are those of sysexits.h."""

    DONE = 0
    FAILED = 1  # the task failed or was cancelled; a check found something
    USAGE = 2
    NO_TASK = 66
    UNAVAILABLE = 69
    UNFINISHED = 75  # at --timeout
    PERMISSION = 77
    CONFIGURATION = 78


def shared() -> argparse.ArgumentParser:
    """Options that are allowed before and after the verb.

    SUPPRESS: with a default, the verb's copy of an option would overwrite what
    was said before the verb.
    """
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--root", metavar="DIR", help="everything lies below this directory")
    parser.add_argument("--config", metavar="FILE", help="use this configuration file")
    return parser


def options(name: str, what: str) -> argparse.ArgumentParser:
    """The parser of a program that only serves."""
    parser = argparse.ArgumentParser(prog=name, description=what, parents=[shared()])
    parser.add_argument("--version", action="version", version=f"{name} {__version__}")
    return parser


def directories(args: argparse.Namespace) -> config.Directories:
    """Where everything lies, by --root, --config, the user and the environment.

    Raises config.ConfigError for a root that is no directory.
    """
    root, file = getattr(args, "root", None), getattr(args, "config", None)
    if root and os.path.lexists(root) and not os.path.isdir(root):
        raise config.ConfigError(f"--root {root}: it must be a directory, or a name to make one")
    return config.find(
        Path(root).absolute() if root else None,
        Path(file).absolute() if file else None,
        os.environ,
        os.geteuid(),
    )


def elsewhere(dirs: config.Directories) -> str | None:
    """How to reach the system's codexd, for who has none of their own and may submit to it."""
    system = config.Directories.system()
    alone = not (dirs.rooted or dirs.systemwide or dirs.state.exists())
    if not alone or not os.access(system.inbox, os.W_OK | os.X_OK):
        return None
    http = f"curl --unix-socket {system.http_socket} http://localhost/tasks"
    return f"the system's codexd takes files dropped into {system.inbox}, and HTTP: {http}"


def load(args: argparse.Namespace) -> config.Config:
    """The checked configuration.  Raises config.ConfigError."""
    return config.load(directories(args), explicit=hasattr(args, "config"))
