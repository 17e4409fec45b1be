"""The recorded runs of the real Codex CLI, as the tests use them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codexd import codex

DATA = Path(__file__).resolve().parent / "data"
SAMPLES = DATA / "codex-samples"


@dataclass(frozen=True)
class Recording:
    """One process.  A folder with several has them as NAME/0, NAME/1, …"""

    name: str
    stdout: bytes
    stderr: str
    status: int
    command: str

    @property
    def requested(self) -> str | None:
        """The thread that the command line wanted to continue."""
        found = re.search(r"\bresume\b.* ([0-9a-f]{8}-[0-9a-f-]{27}|no-such-name)", self.command)
        return found[1] if found else None

    def reader(self) -> codex.Reader:
        reader = codex.Reader()
        reader.feed(self.stdout)
        reader.finish()
        return reader


def _of(folder: Path) -> list[Recording]:
    name = folder.relative_to(SAMPLES).as_posix()
    statuses = (folder / "exit_code").read_text().split()
    command = (folder / "cmd.txt").read_text()
    several = sorted(folder.glob("stdout.*.jsonl"))
    return [
        Recording(
            f"{name}/{number}" if several else name,
            stdout.read_bytes(),
            stdout.with_name(stdout.name.replace("stdout", "stderr"))
            .with_suffix(".txt")
            .read_text(errors="replace"),
            int(statuses[number]),
            command,
        )
        for number, stdout in enumerate(several or [folder / "stdout.jsonl"])
    ]


RECORDINGS = {
    recording.name: recording
    for place in sorted(SAMPLES.rglob("cmd.txt"))
    for recording in _of(place.parent)
}

INDEX: dict[str, dict[str, Any]] = json.loads((SAMPLES / "index.json").read_text())
OUTCOMES: dict[str, dict[str, Any]] = json.loads((DATA / "outcomes.json").read_text())
