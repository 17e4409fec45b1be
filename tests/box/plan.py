"""What is in a box: the plan that the keeper carries out.

All decisions about the inside are here: what of the host is hidden, what is
masked, where the project and its Python are.  No effects; the keeper has them.
"""

from __future__ import annotations

import glob
import os
import sys
import sysconfig
import uuid
from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Mode = Literal["hybrid", "unified"]

PROJECT = Path(__file__).resolve().parent.parent.parent
SYSTEMD = "/lib/systemd/systemd"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Inside of the box, where nothing of the host and of a distribution is:
TOP = "/opt/box"
TREE = f"{TOP}/tree"
VENV = f"{TOP}/venv"
BIN = f"{VENV}/bin"
PYTHON = f"{BIN}/python"
SITE = f"{TOP}/packages"  # the Python packages of this run
COVERAGE = f"{TOP}/coverage"  # where covered commands leave their data
COVERAGE_DATA = PROJECT / "build"  # what it is on the host: see tests/coverage.ini
VERSION = "{}.{}".format(*sys.version_info)

# What the host's admin enabled, and what the host remembers.
EMPTIED = (
    "/etc/systemd/system", "/etc/systemd/user", "/etc/systemd/system-generators",
    "/var/lib/systemd/linger", "/var/log/journal",
)  # fmt: skip
# What cannot work in a box, or only costs time.
MASKED = (
    "dev-hugepages.mount", "dev-mqueue.mount", "getty.target", "kmod-static-nodes.service",
    "ldconfig.service", "modprobe@.service", "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount", "sys-kernel-config.mount", "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount", "systemd-binfmt.service", "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service", "systemd-journald-audit.socket",
    "systemd-modules-load.service",
    "systemd-sysctl.service", "systemd-udevd.service", "systemd-update-utmp.service",
)  # fmt: skip
_MEASURE = f"""\
[run]
branch = True
parallel = True
source_pkgs = codexd
data_file = {COVERAGE}/coverage
"""
_STARTUP = (
    "import os; os.environ.get('COVERAGE_PROCESS_START')"
    " and __import__('coverage').process_startup()"
)
GENERATORS = ("/lib/systemd/system-generators/*", "/usr/local/lib/systemd/system-generators/*")


@dataclass(slots=True)
class Inside:
    """Paths of the box: files with their text, links, and host directories seen there."""

    files: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    binds: dict[str, str] = field(default_factory=dict)


def plan(
    name: str, place: Path, mode: Mode, clean_proc: bool, cgroups: list[str]
) -> dict[str, Any]:
    """The plan, as tests/box/keeper.py reads it."""
    inside = Inside()
    _identify(inside, name)
    _mask(inside)
    _install(inside)
    return {
        "name": name,
        "place": str(place),
        "mode": mode,
        "cgroups": cgroups,
        "systemd": _command(mode),
        "clean_proc": f"{TOP}/private/proc" if clean_proc else "",
        "emptied": EMPTIED,
        "files": inside.files,
        "links": inside.links,
        "binds": inside.binds,
        "writable": [str(COVERAGE_DATA)],
    }


def _command(mode: Mode) -> list[str]:
    start = [SYSTEMD, "--system", "--show-status=no"]
    if mode == "unified":
        return [*start, "systemd.unified_cgroup_hierarchy=1"]
    legacy = "systemd.legacy_systemd_cgroup_controller=0"
    return [*start, "systemd.unified_cgroup_hierarchy=0", legacy]


def _identify(inside: Inside, name: str) -> None:
    inside.files |= {
        "/etc/machine-id": f"{uuid.uuid4().hex}\n",  # without one it is a first boot
        "/etc/hostname": f"{name}\n",
        "/etc/hosts": f"127.0.0.1 localhost {name}\n::1 localhost\n",
        "/etc/resolv.conf": "",
        "/etc/fstab": "",
    }


def _mask(inside: Inside) -> None:
    """No generator may run: they make units of the host's disks, consoles and init scripts."""
    units = "/etc/systemd/system"
    inside.links |= {f"{units}/{unit}": "/dev/null" for unit in MASKED}
    inside.links[f"{units}/default.target"] = "/lib/systemd/system/multi-user.target"
    for generator in [path for pattern in GENERATORS for path in glob.glob(pattern)]:
        masked = f"/etc/systemd/system-generators/{os.path.basename(generator)}"
        inside.links[masked] = "/dev/null"


def _install(inside: Inside) -> None:
    """A virtual environment with this run's packages, and the project's programs.

    This run's own may lie where only root, or nobody in the box, can read: /root, /tmp.
    """
    inside.binds |= {str(PROJECT): TREE, sysconfig.get_path("purelib"): SITE}
    base, bind = interpreter()
    inside.binds |= bind
    also = str(sys.prefix == sys.base_prefix).lower()
    inside.links[PYTHON] = str(base)
    inside.files |= {
        f"{VENV}/pyvenv.cfg": f"home = {base.parent}\ninclude-system-site-packages = {also}\n",
        f"{VENV}/lib/python{VERSION}/site-packages/box.pth": f"{TREE}\n{SITE}\n{_STARTUP}\n",
    }
    if covered():
        inside.binds[str(COVERAGE_DATA)] = COVERAGE
        inside.files[f"{COVERAGE}.ini"] = _MEASURE
    for program, module, function in _programs():
        lines = [f"#!{PYTHON}", "import sys", f"from {module} import {function}"]
        inside.files[f"{BIN}/{program}"] = "\n".join([*lines, f"sys.exit({function}())", ""])


def covered() -> dict[str, str]:
    """The environment of commands whose lines are counted, empty unless this run does so.

    Units do without: the hardened ones could not write what they found.
    """
    counts = "COVERAGE_PROCESS_CONFIG" in os.environ
    return {"COVERAGE_PROCESS_START": f"{COVERAGE}.ini"} if counts else {}


def interpreter() -> tuple[Path, dict[str, str]]:
    """The Python for the inside, and what has to be bound for it.

    The distribution's, where it is of this run's version: everybody can read it, and it
    is what an installation runs on.
    """
    if (system := Path(f"/usr/bin/python{VERSION}")).exists():
        return system, {}
    base, prefix = Path(sys.executable).resolve(), Path(sys.base_prefix).resolve()
    inside = Path(TOP, "python", base.relative_to(prefix))
    return inside, {str(prefix): f"{TOP}/python"}


def _programs() -> list[tuple[str, str, str]]:
    """Name, module and function of what pip would put into bin."""
    setup = ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    found = []
    for line in setup["options.entry_points"]["console_scripts"].split("\n"):
        if line:
            program, target = line.split("=")
            module, function = target.strip().split(":")
            found.append((program.strip(), module, function))
    return found
