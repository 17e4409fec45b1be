"""How much a proof does, and the figures it leaves.

PROOF=short (the default, inside `make test`), full (`make proof`) or long
(`make proof-long`); SEED replays a run.  A proof asks `pick` for its size, takes
its chances from `chances`, and tells `Figures` what it measured: the table of them
is printed at the end of the run, with the seed (tests/conftest.py).
"""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Callable
from enum import StrEnum
from typing import TypeVar

T = TypeVar("T")
Figures = Callable[[str, object], None]  # the fixture `figure`: a name and what was measured


class Level(StrEnum):
    SHORT = "short"
    FULL = "full"
    LONG = "long"


MARK = "figure: "  # begins the names of figures among what else tests record
LEVEL = Level(os.environ.get("PROOF") or "short")


def pick(short: T, full: T, long: T) -> T:
    """What belongs to this run's level."""
    return {Level.SHORT: short, Level.FULL: full, Level.LONG: long}[LEVEL]


def chances(name: str) -> random.Random:
    """This run's chances for a proof, from a seed that is printed with its figures."""
    return random.Random(f"{name} {seed()}")


def seed() -> str:
    """What replays this run: SEED=… make proof.  Children, those of xdist too, have the same."""
    if not os.environ.get("SEED"):
        os.environ["SEED"] = secrets.token_hex(4)
    return os.environ["SEED"]
