"""From a dropped file to its answer, over the bare Codex CLI on the same turn.

Twice: over Codex as anybody calls it, and over Codex with the permission profile that
codexd gives it, which takes Codex some time at its start for each path that is hidden.
The second is what codexd itself adds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.measure import Ratio, compare, timed
from codexd import codex
from codexd.command import PERMISSIONS
from codexd.config import Directories
from codexd.replies import Turn, say
from codexd.scripted import ScriptedModel

ROUNDS = 25


def _answer(_turn: Turn) -> list[object]:
    return say("done")


class Served:
    """codexd serve on a root of its own."""

    def __init__(self, root: Path, env: dict[str, str]) -> None:
        (root / "codexd.yaml").write_text("http:\n  listen: off\n")
        self.dirs = Directories.below(root)
        self.number = 0
        command = [sys.executable, "-m", "codexd.cli", "--root", str(root), "serve"]
        self.child = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.child.stdout is not None
        assert self.child.stdout.readline().startswith("ready ")

    def turn(self) -> float:
        """Seconds from the drop until the answer's file is there."""
        self.number += 1
        name = f"n{self.number}"
        aside = self.dirs.inbox / f".{name}.md.part"
        began = time.perf_counter()
        aside.write_text("Answer with one word.\n")
        aside.rename(self.dirs.inbox / f"{name}.md")
        while not any(n.startswith(f"{name}.") for n in os.listdir(self.dirs.answers)):
            time.sleep(0.001)
        return time.perf_counter() - began

    def stop(self) -> None:
        self.child.send_signal(signal.SIGTERM)
        self.child.wait()


def run() -> Iterator[Ratio]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place, ScriptedModel(_answer) as model:
        root = Path(place)
        # Codex starts a login shell, and what that leaves running slows both down.
        env = {**os.environ, **model.environment(), "HOME": str(root)}
        model.write_config(root / "codex")
        binary = codex.find("codex", os.environ.get("PATH"))
        (root / "bare").mkdir()

        def bare(sandbox: str) -> Callable[[], float]:
            command = codex.argv(
                binary, workdir=str(root / "bare"), sandbox=sandbox, model=None, profile=None,
                images=[], add_dirs=[], output_schema=None, unguided=True, thread=None,
                last_message_file=str(root / "bare" / "last.md"),
            )  # fmt: skip
            known = codex.environment(env, str(root / "codex"), list(model.environment()))
            return lambda: timed(
                lambda: subprocess.run(
                    command, input=b"Answer with one word.\n", check=True, capture_output=True,
                    env=known,
                )
            )  # fmt: skip

        served = Served(root, env)
        served.turn()  # which writes the profile
        profiled = bare(f"{PERMISSIONS}workspace-write")
        try:
            yield compare(
                "drop to answer / bare codex exec", 1.15, served.turn, bare("workspace-write"),
                ROUNDS,
            )  # fmt: skip
            yield compare(
                "drop to answer / codex exec with the profile", 1.15, served.turn, profiled, ROUNDS
            )
        finally:
            served.stop()
