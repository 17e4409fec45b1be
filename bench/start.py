"""From the start of a worker's process until Codex is exec'd, over an empty Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Ratio, compare, timed
from codexd.launcher import Processes
from codexd.model import Request

ROUNDS = 41
_CODEX = '#!/bin/sh\ndate +%s%N > "$CODEX_HOME/execd"\n'


def _orders(place: Path, binary: Path) -> dict[str, object]:
    return {
        "attempt": 1, "thread": None, "preamble": "", "header": "", "policy": "Be brief.",
        "workdir": str(place), "workdirs": [str(place)], "bin": str(binary),
        "home": str(place), "env": [], "model": None, "profile": None,
        "sandbox": "workspace-write", "sandbox_verb": ["sandbox"], "timeout": 60.0,
        "idle_timeout": 60.0, "setpriv": None,
        "memory": {"on": True, "paths": ["MEMORY.md"], "hits": 20, "chars": 4000, "rg": None},
    }  # fmt: skip


class Worker:
    """A worker of the real launcher's command, with a Codex that says when it is exec'd."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.binary = place / "codex"
        self.binary.write_text(_CODEX)
        self.binary.chmod(0o755)
        (place / "run").mkdir()
        (place / "tasks").mkdir()
        self.launcher = Processes(place / "tasks", place / "run")
        self.number = 0

    def start(self) -> float:
        self.number += 1
        id = f"20261123t072011-{self.number:010}"
        attempt = self.place / "tasks" / id / "1"
        attempt.mkdir(parents=True)
        task = {"id": id, "request": Request("Answer with one word.").to_json()}
        (attempt.parent / "task.json").write_text(json.dumps(task))
        (attempt / "attempt.json").write_text(json.dumps(_orders(self.place, self.binary)))
        began = time.time()
        subprocess.run(self.launcher.command(id), check=True, stdin=subprocess.DEVNULL)
        return int((self.place / "execd").read_text()) / 1e9 - began


def _empty() -> float:
    return timed(lambda: subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True))


def run() -> Iterator[Ratio]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        worker = Worker(Path(place))
        assert os.path.isdir(place)
        yield compare(
            "worker start until codex is exec'd / python -I -S -c pass", 3.0,
            worker.start, _empty, ROUNDS,
        )  # fmt: skip
