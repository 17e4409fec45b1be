"""codexd check: is a file valid, and if not, in which line and why?

A file is read as the daemon would, up to the limit for one; nothing is changed.
Part of `cli`.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from codexd import asking, config, controlfile, report, taskfile
from codexd.program import Exit, directories
from codexd.view import Json, View


def check(args: argparse.Namespace) -> int:
    """The verb."""
    dirs = directories(args)
    try:
        health = View(dirs).health()[1]
    except PermissionError:  # the files to be checked may be one's own
        health = {}
    most = asking.limit(args, health)
    found = [_told(dirs, most, name) for name in args.files]
    report.dump(found) if hasattr(args, "json") else report.checks(found)
    return Exit.DONE if all(one["ok"] for one in found) else Exit.FAILED


def _told(dirs: config.Directories, most: int, name: str) -> Json:
    line: int | None = None
    why: str | None = None
    try:
        path = Path(name).absolute()
        if path.name == "codexd.yaml" or path == dirs.config_file:
            config.load(replace(dirs, config_file=path), explicit=True)
        else:
            _parse(path, asking.read(os.fspath(path), most), most)
    except (taskfile.Refused, config.ConfigError) as error:
        line, why = error.line, error.reason
    except OSError as error:
        why = error.strerror or str(error)
    return {"file": name, "ok": why is None, "line": line, "reason": why}


def _parse(path: Path, data: bytes, most: int) -> None:
    """Raises Refused."""
    if taskfile.ignored(path.name):
        raise taskfile.Refused("a file of this name is ignored until it is renamed")
    control = controlfile.control(path.name)
    if control and data:
        raise taskfile.Refused(controlfile.EMPTY.format(control.verb))
    if control:
        return
    parse = taskfile.scheduled if path.parent.name == "schedules" else taskfile.parse
    parse(path.name, data, max_bytes=most)
