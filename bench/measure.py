"""Ratios of interleaved timings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Ratio:
    """What was measured over what, with the goal it has to keep below."""

    what: str
    value: float
    goal: float
    above: float  # seconds
    below: float  # seconds
    rounds: int

    def __str__(self) -> str:
        word = "ok  " if self.value <= self.goal else "over"
        return (
            f"{word} {self.what}: {self.value:.2f} (goal {self.goal}); "
            f"{self.above * 1000:.1f} ms / {self.below * 1000:.1f} ms, {self.rounds} rounds"
        )


def timed(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def compare(
    what: str, goal: float, above: Callable[[], float], below: Callable[[], float], rounds: int
) -> Ratio:
    """Both in turn, `rounds` times after one that does not count; each gives seconds."""
    above(), below()
    pairs = [(above(), below()) for _ in range(rounds)]
    a, b = median(p[0] for p in pairs), median(p[1] for p in pairs)
    return Ratio(what, a / b, goal, a, b, rounds)
