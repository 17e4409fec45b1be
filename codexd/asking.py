"""What is submitted: the options of `ask` and the files of `task submit`, as task files.

Checked as the master will, so that nothing wrong is delivered.  Part of `cli`.  Raises
Trouble, or Refused for what no task can say.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

from codexd import config, controlfile, taskfile
from codexd.config import FILE_MOST
from codexd.document import Document, Form, Scalar
from codexd.model import Request
from codexd.program import Exit, Trouble, load
from codexd.view import Json

_LISTS = ("images", "add_dirs", "after")  # keys of several values


def limit(args: argparse.Namespace, health: Json) -> int:
    """The bytes that a task file may have: the daemon's word, else the configuration's."""
    told = health.get("file_limit")
    if isinstance(told, int):
        return told
    try:
        return load(args).limits.file
    except config.ConfigError:
        return FILE_MOST  # then the master says its own


def read(name: str, most: int) -> bytes:
    """A file or, as `-`, standard input; of one that is too long, a byte more than `most`.

    Raises OSError.
    """
    if name == "-":
        return sys.stdin.buffer.read(most + 1)
    with open(name, "rb") as file:
        return file.read(most + 1)


def by_options(args: argparse.Namespace, most: int) -> Request:
    """What `ask` was told."""
    text = _standard_input(most) if args.text == "-" else args.text
    values: dict[str, object] = {"prompt": Scalar(text, Form.TEXT)}
    for option in args.option:
        _set(values, option)
    if args.session is not None:
        values["session"] = Scalar(args.session, Form.TEXT)
    if args.workdir is not None:
        values["workdir"] = Scalar(os.path.abspath(args.workdir), Form.TEXT)
    request = taskfile.from_mapping(Document(values))
    return replace(request, title=request.title or _title(request.prompt))


def _set(values: dict[str, object], option: str) -> None:
    """`KEY=VALUE`, or `SECTION.KEY=VALUE` for what is in a mapping of its own."""
    name, found, value = option.partition("=")
    section, inner, key = name.partition(".")
    if not found or name == "prompt":
        raise Trouble(Exit.USAGE, f"-o {option}: it must be KEY=VALUE, and no prompt")
    if not inner:
        several = [Scalar(part, Form.PLAIN) for part in value.split(",")]
        values[name] = several if name in _LISTS else Scalar(value, Form.PLAIN)
        return
    within = values.setdefault(section, {})
    if not isinstance(within, dict):
        raise Trouble(Exit.USAGE, f"-o {option}: {section} was given a value of its own")
    within[key] = Scalar(value, Form.PLAIN)


def _standard_input(most: int) -> str:
    """A prompt from standard input, checked as a file of plain text is."""
    try:
        return taskfile.parse("-", read("-", most), max_bytes=most).prompt
    except taskfile.Refused as why:
        raise Trouble(Exit.USAGE, f"standard input: {why}. Nothing was submitted") from why


def _title(text: str) -> str:
    """What a list shows of a task that has no file name."""
    first = text.strip().splitlines()[0]
    return "".join(c for c in first if c.isprintable())[:80].strip() or "untitled"


def by_file(name: str, most: int) -> bytes:
    """The task file for a file that somebody has, or for `-`."""
    try:
        data, base = read(name, most), os.path.basename(name)
        if name == "-":
            return content(taskfile.parse("-.md", data, max_bytes=most), most)
        if controlfile.control(base):
            raise taskfile.Refused("a control file, which is no task: put it into the inbox")
        request = taskfile.parse(base, data, max_bytes=most)
        return content(replace(request, title=request.title or _title(base)), most)
    except OSError as error:
        status = Exit.PERMISSION if isinstance(error, PermissionError) else Exit.FAILED
        raise Trouble(status, f"{name}: {error.strerror}. Nothing was submitted") from error
    except taskfile.Refused as why:
        raise Trouble(Exit.FAILED, f"{name}: {why}. Nothing was submitted") from why


def content(request: Request, most: int) -> bytes:
    """The request as it is delivered: in JSON, which may be longer than it was."""
    data = taskfile.dump(request)
    if len(data) > most:
        raise taskfile.Refused(
            f"larger than {most} bytes in JSON, as it is delivered (limits.file)"
        )
    return data
