"""What every program of codexd shares on its command line.

The exit statuses, the options that say where everything lies, the one way from
them to a checked configuration, and text that is safe to show.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import shlex
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn, TextIO

from codexd import __version__, config

# Spaces and joiners of many scripts: no letters, so not "printable", but no danger.
_HARMLESS = "\u00a0\u00ad\u2002\u2003\u2009\u200a\u200c\u200d\u202f\u3000"


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


class Trouble(Exception):
    """Why a command cannot be carried out, with its exit status."""

    def __init__(self, status: Exit, text: str) -> None:
        super().__init__(text)
        self.status = status


def refusal(error: config.ConfigError) -> Exit:
    """The exit status for a configuration that cannot be used."""
    return Exit.PERMISSION if isinstance(error, config.Unreadable) else Exit.CONFIGURATION


def clean(text: object, breaks: bool = False) -> str:
    """Text without anything that steers a terminal."""
    keep = _HARMLESS + ("\n\t" if breaks else "")
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "replace").decode()
        for c in str(text)
    )


def open_streams() -> None:
    """Let /dev/null stand for a standard stream that was closed.

    The next file that is opened would get its number, and what is printed.  To be
    called before anything else is opened.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(fd, True)
            setattr(sys, name, os.fdopen(fd, mode))


class Unfailing(io.TextIOWrapper):
    """Standard error for a program whose words are not what it is for: where nobody can hear
    them, as in a log on a full disk, it does all else as ever."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            silence(self)
            return len(text)


def silence(stream: TextIO) -> None:
    """Python writes what is left of its output once more when it exits: to nobody."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Parser(argparse.ArgumentParser):
    """No shortened options, which the next version could take for others; clean errors."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        super().error(clean(message))


def named(text: str) -> str:
    """The type of an option that names a place; an empty one would mean the usual place."""
    if not text:
        raise argparse.ArgumentTypeError("it must not be empty")
    return text


def shared() -> argparse.ArgumentParser:
    """Options that are allowed before and after the verb.

    SUPPRESS: with a default, the verb's copy of an option would overwrite what
    was said before the verb.
    """
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--root", metavar="DIR", type=named, help="everything lies below this directory"
    )
    parser.add_argument("--config", metavar="FILE", type=named, help="use this configuration file")
    return parser


def options(name: str, what: str) -> argparse.ArgumentParser:
    """The parser of a program that only serves."""
    parser = Parser(prog=name, description=what, parents=[shared()])
    parser.add_argument("--version", action="version", version=f"{name} {__version__}")
    return parser


def directories(args: argparse.Namespace) -> config.Directories:
    """Where everything lies, by --root, --config, the user and the environment.

    Raises config.ConfigError for a root that is no directory, a configuration that
    is not there, and a user without a home.
    """
    root, file = getattr(args, "root", None), getattr(args, "config", None)
    if root and os.path.lexists(root) and not os.path.isdir(root):
        raise config.ConfigError(f"--root {root}: it must be a directory, or a name to make one")
    if file and not os.path.lexists(file):
        why = f"cannot be read: {os.strerror(errno.ENOENT)}"
        raise config.ConfigError(f"{os.path.abspath(file)}: {why}")
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


def typed(args: argparse.Namespace, *words: str) -> str:
    """What a person types to run `codexd` on the same place."""
    return shlex.join(["codexd", *where(args), *words])


def where(args: argparse.Namespace) -> list[str]:
    """The options that lead another program to the same place."""
    found = []
    for name in ("root", "config"):
        if hasattr(args, name):
            found += [f"--{name}", os.path.abspath(getattr(args, name))]
    return found
