"""codexd uninstall: takes away what `install` laid down; what somebody edited stays.

State, configuration, users and group stay as well: tasks that were running go on after
the next install.

Raises Trouble, OSError.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from codexd.install import BOOTED, asked, laid, remove, run
from codexd.program import Exit


def uninstall(args: argparse.Namespace) -> int:
    """The verb: state, configuration, user and group stay."""
    one = asked(args, "takes units of the whole system away")
    found = list(laid(one.target))
    live = bool(found) and BOOTED.is_dir() and not one.prefix
    if live and not one.packaged:
        names = ["codexd.service", "codexd-http.socket", "codexd-http.service"]
        run(*one.manager, "disable", "--now", *names, need=False)
        # After the master, which would take their end for a cancel.
        instances = ("codexd-schedule@*.timer", "codexd-worker@*.service", "codexd-hook@*.service")
        if run(*one.manager, "stop", *instances, need=False):
            _forget(one.config.dirs.exits)
    remove(found)
    if one.prefix:
        return Exit.DONE
    if found and not one.user:
        run("journalctl", "--update-catalog", need=False)
    if live:
        run(*one.manager, "daemon-reload", need=False)
    if not found:
        print("found     nothing that codexd install wrote")
    dirs = one.config.dirs
    places = sorted({str(p) for p in (dirs.state, dirs.inbox.parent, dirs.config_file.parent)})
    print(f"\nTasks, answers and configuration stay in {', '.join(places)}.")
    if one.packaged:
        print("The units are a package's: apt remove codexd")
    return Exit.DONE


def _forget(exits: Path) -> None:
    """The workers that were stopped: else the next master, in this boot, takes that for cancels."""
    if exits.exists():
        shutil.rmtree(exits)
