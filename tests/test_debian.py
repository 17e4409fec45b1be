"""The oldest packages that are supported: those of Debian 12."""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

PYTHON = "/usr/bin/python3"
NEEDED = "import sdnotify, watchdog, yaml; from importlib.metadata import version; import sys; " \
    "sys.exit(not version('watchdog').startswith('2.'))"  # fmt: skip
TOP = Path(__file__).resolve().parent.parent


def test_two_real_turns_with_debian_s_packages(tmp_path: Path) -> None:
    there = subprocess.run([PYTHON, "-I", "-c", NEEDED], capture_output=True, text=True)
    if there.returncode != 0 and not os.environ.get("CI"):
        pytest.skip("no python3-watchdog 2, python3-yaml and python3-sdnotify of Debian 12")
    assert there.returncode == 0, there.stderr
    spec = find_spec("codex_cli_bin")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    # Only the package with the binary, not what else is installed beside it.
    (tmp_path / "codex_cli_bin").symlink_to(spec.submodule_search_locations[0])
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONHOME")}
    env |= {"PYTHONPATH": f"{TOP}:{tmp_path}", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [PYTHON, "-m", "codexd.cli", "selftest"],
        env=env,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    all is well" in done.stdout
