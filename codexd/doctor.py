"""codexd doctor: is this host ready?  Each thing that is not, with the command that mends it.

Runs the checks of `checks`, `codexchecks` and `unitchecks`, in the order of TABLE,
which is that in which things have to be mended.  Needs neither root nor systemd nor a
daemon; what it may not look at, it says.  Changes nothing.

The exit status is 1 if a check failed; a warning is no failure.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from codexd import checks, codexchecks, config, install, report, unitchecks
from codexd.checks import Finding, Findings, Host, Status
from codexd.config import ConfigError, Directories, Launcher
from codexd.program import Exit, clean, directories, elsewhere, typed

TABLE: dict[str, Callable[[Host], Findings]] = {
    "python": checks.python,
    "config": checks.configuration,
    "codex": codexchecks.cli,
    "path": unitchecks.service_path,
    "directories": checks.directories,
    "login": codexchecks.login,
    "keys": checks.keys,
    "sandbox": codexchecks.sandbox,
    "secrets": codexchecks.secrets,
    "hooks": unitchecks.hooks,
    "notes": codexchecks.rg,
    "places": unitchecks.places,
    "units": unitchecks.files,
    "drop-ins": unitchecks.drop_ins,
    "systemd": unitchecks.units,
    "polkit": unitchecks.polkit,
    "group": unitchecks.group,
    "linger": unitchecks.linger,
    "limits": unitchecks.cgroup,
    "disk": checks.disk,
    "clock": checks.clock,
    "master": unitchecks.master,
    "worker sandbox": unitchecks.sandbox,
}


def doctor(args: argparse.Namespace) -> int:
    """The verb."""
    one = host(args)
    if hint := elsewhere(one.dirs):
        # Somebody who uses the system's has none to be looked at.
        found = [("group", checks.ok(f"nothing of your own is here; {hint}"))]
    else:
        found = list(examine(one))
    if hasattr(args, "json"):
        report.dump(
            [{"check": n, "status": f.status, "what": f.what, "mend": f.mend} for n, f in found]
        )
    else:
        for name, finding in found:
            print(f"{finding.status:4}  {name}: {clean(finding.what)}")
            if finding.mend:
                print(f"      {'mend:':8}{clean(finding.mend)}")
    failed = any(finding.status is Status.FAIL for _, finding in found)
    return Exit.FAILED if failed else Exit.DONE


def examine(host: Host) -> Iterator[tuple[str, Finding]]:
    """Every check's findings."""
    for name, check in TABLE.items():
        try:
            for finding in check(host):
                yield name, finding
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            yield name, checks.warn(f"cannot be looked at: {what}", "run codexd doctor as root")


def host(args: argparse.Namespace) -> Host:
    """What there is to look at.  Raises ConfigError for a bad --root."""
    install.runtime()
    dirs = directories(args)
    if dirs.systemwide:
        install.system_home()
    problem: str | None = None
    try:
        found = config.load(dirs, explicit=hasattr(args, "config"))
    except ConfigError as error:
        problem = str(error)
        bare = replace(dirs, config_file=Path("/nonexistent/codexd.yaml"))
        found = config.load(bare, explicit=False)
    units = not dirs.rooted and found.launcher is not Launcher.PROCESS and install.BOOTED.is_dir()
    path = os.environ.get("PATH", os.defpath)
    used = _path(dirs) if units else path
    return Host(dirs, found, problem, units, used, typed(args, "serve"))


def _path(dirs: Directories) -> str:
    """PATH in units."""
    status, text = checks.said(
        ["systemctl", *([] if dirs.systemwide else ["--user"]), "show-environment"]
    )
    told = dict(line.partition("=")[::2] for line in text.splitlines()) if not status else {}
    return told.get("PATH") or install.SERVICE_PATH
