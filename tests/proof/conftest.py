"""The figures of all proofs, in one table at the end of the run."""

from __future__ import annotations

import pytest

from tests.proof.level import LEVEL, Figures, seed

_MARK = "figure: "


@pytest.fixture
def figure(record_property: Figures) -> Figures:
    """Tell one measured figure: its name, and what was measured."""
    return lambda name, value: record_property(f"{_MARK}{name}", value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    told = [
        (str(r.nodeid).rpartition("/")[2], name.removeprefix(_MARK), value)
        for r in reports
        for name, value in r.user_properties
        if name.startswith(_MARK)
    ]
    if told:
        terminalreporter.section(f"proof: figures ({LEVEL}, SEED={seed()})")
        for where, name, value in sorted(told):
            terminalreporter.write_line(f"{where.partition('::')[0]:<20} {name:<46} {value}")
