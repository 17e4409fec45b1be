"""Every run ends with its figures and one seed, which all its processes use."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.proof.level import Figures, chances, seed
from tests.proof.place import TOP

NAME = "a chance by this seed"


@pytest.mark.parametrize("worker", ["a", "b"])
def test_a_figure(figure: Figures, worker: str) -> None:
    drawn: list[int] = []

    @settings(database=None)
    @given(st.integers())
    def draw(number: int) -> None:
        drawn.append(number)

    draw()
    figure(f"figures: {NAME}, {worker}", f"{seed()} {chances('figures').random()}/{sum(drawn)}")
    assert not os.environ.get("CODEXD_PROOF_FAILS")


def test_a_figure_that_cannot_be_taken() -> None:
    if os.environ.get("CODEXD_PROOF_FAILS"):
        pytest.skip("[here] it cannot")


def test_the_seed_and_the_figures_are_told_also_of_what_fails() -> None:
    """By one run of those three in two processes, neither of which was given a seed."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("SEED", "CI") and not k.startswith(("PYTEST", "COV"))
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-k", "test_a_figure", __file__]
    env |= {"CODEXD_PROOF_FAILS": "yes"}
    done = subprocess.run(command, cwd=TOP, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    (told,) = set(re.findall(r"SEED=(\w+)", done.stdout))
    figures = re.findall(rf"{NAME}, (\w) +(\w+) (\S+)", done.stdout)
    (chance,) = {chance for _, _, chance in figures}
    assert figures == [("a", told, chance), ("b", told, chance)]
    skipped = r"test_figures\.py +skipped: test_a_figure_that_cannot_be_taken +\[here\] it cannot"
    assert re.search(skipped, done.stdout)
