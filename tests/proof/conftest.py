"""What every proof can ask for."""

from __future__ import annotations

import pytest

from tests.proof.level import MARK, Figures


@pytest.fixture
def figure(record_property: Figures) -> Figures:
    """Tell one measured figure: its name, and what was measured."""
    return lambda name, value: record_property(f"{MARK}{name}", str(value))
