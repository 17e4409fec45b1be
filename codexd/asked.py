"""What a task asks for, held against what it may have.

Part of the master.  Looks and refuses; changes nothing.  Links in a workdir are
for the worker to resolve.

Raises Refusal, and OSError for what the host refuses.
"""

from __future__ import annotations

import os
from dataclasses import replace

from codexd import lost, place, taskfile
from codexd.config import Config
from codexd.directories import Directories
from codexd.model import Request


class Refusal(ValueError):
    """Why a dropped file does not become a task."""


def again(dirs: Directories, of: str) -> Request:
    """The request of an ended task, for a new one: checked anew, as a dropped file's is."""
    try:
        asked = taskfile.again(place.load_ended(dirs, of).get("request"))
    except FileNotFoundError:
        none = f"there is no task {of}"
        raise Refusal(lost.why(dirs, of) if lost.is_lost(dirs, of) else none) from None
    except taskfile.Refused as wrong:
        raise Refusal(f"the record of task {of} is damaged: {wrong.reason}") from wrong
    except ValueError as damage:
        raise Refusal(f"the record of task {of} is damaged: {damage}") from damage
    return replace(asked, session=asked.session or of)


def allowed(config: Config, request: Request, limits: bool) -> None:
    """Whether the configuration lets a task have this; `limits`: whether it can have its own."""
    most = config.codex.sandbox
    if request.sandbox and request.sandbox.order > most.order:
        raise Refusal(
            f"sandbox {request.sandbox} is wider than the configured {most}; "
            "a task can only lower it (codex.sandbox)"
        )
    if request.limits and not limits:
        raise Refusal(
            "limits: only where workers are systemd units can a task have limits of its own; "
            "leave them out, or start codexd as a service"
        )
    path = os.path.normpath(workdir(config, request))
    roots = [os.path.normpath(root) for root in config.workdirs]
    if not any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots):
        raise Refusal(
            f"workdir {path} is not below a configured root "
            f"({', '.join(roots)}); see workdirs in {config.dirs.config_file}"
        )


def workdir(config: Config, request: Request) -> str:
    asked = os.path.expanduser(request.workdir or "")
    return os.path.join(config.workdir, asked) if asked else str(config.workdir)
