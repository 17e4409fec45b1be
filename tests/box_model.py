"""The scripted model as a program inside of a box, told what to do by a FIFO.

    python -m tests.box_model CODEX_HOME PLACE

Makes CODEX_HOME's config.toml, then PLACE/orders, and says that it is ready (systemd's
READY=1).  Orders, one a line: `release NAME` opens [[hold NAME]]; `tell FILE` writes, as JSON
and whole, what was asked so far: a list of {"thread", "prompt", "outputs", "inputs"}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import sdnotify

from tests.scripted_cases import CaseModel


def told(model: CaseModel) -> str:
    turns = [
        {
            "thread": turn.thread_id,
            "prompt": turn.prompt,
            "outputs": turn.tool_outputs,
            "inputs": turn.inputs,
        }
        for turn in list(model.turns)
    ]
    return json.dumps(turns, default=str)


def main() -> None:
    home, place = Path(sys.argv[1]), Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    orders = place / "orders"
    if not orders.exists():
        os.mkfifo(orders)
    with CaseModel() as model:
        model.write_config(home)
        os.chmod(home / "config.toml", 0o644)
        sdnotify.SystemdNotifier().notify("READY=1")
        # Also for writing: it has no end when who gave an order closes it.
        with os.fdopen(os.open(orders, os.O_RDWR), "r") as lines:
            for line in lines:
                verb, argument = line.split()
                if verb == "release":
                    model.release(argument)
                elif verb == "tell":
                    Path(argument + ".tmp").write_text(told(model))
                    os.rename(argument + ".tmp", argument)


if __name__ == "__main__":
    main()
