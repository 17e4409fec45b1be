"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from tests.proof.level import LEVEL, MARK, Figures, seed

# The files whose workers and errands are counted (tests/bin/python-counted).  It makes each take
# about twice as long, and what other files have of them is more of the same.
COUNTED = {
    "failures",
    "hooks",
    "probe",
    "processes",
    "profile",
    "starts",
    "verify",
    "workdirs",
    "worker",
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.stem.removeprefix("test_") in COUNTED:
        os.environ["COVERAGE_WORKERS"] = "1"
    else:
        os.environ.pop("COVERAGE_WORKERS", None)


@pytest.fixture
def figure(record_property: Figures) -> Figures:
    """Tell one measured figure: its name, and what was measured."""
    return lambda name, value: record_property(f"{MARK}{name}", str(value))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draw the seed before xdist starts its workers, which inherit it, and hypothesis looks."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = seed()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures of all proofs, and those that were skipped, in one table, and what plays the
    run again.

    Here, because the process that xdist's workers report to loads only the first conftest.
    """
    reports = [
        r for kind in ("passed", "failed", "error") for r in terminalreporter.getreports(kind)
    ]
    told = {
        (_where(r.nodeid)[0], name.removeprefix(MARK), str(value))
        for r in reports
        for name, value in getattr(r, "user_properties", ())
        if name.startswith(MARK)
    } | {
        (
            _where(r.nodeid)[0],
            f"skipped: {_where(r.nodeid)[1]}",
            r.longrepr[2].removeprefix("Skipped: "),
        )
        for r in terminalreporter.getreports("skipped")
        if r.nodeid.startswith(_PROOFS)
    }
    terminalreporter.section(f"proofs: {LEVEL}, SEED={seed()}")
    for where, name, value in sorted(told):
        terminalreporter.write_line(f"{where:<20} {name:<46} {value}")


_PROOFS = "tests/proof/"


def _where(nodeid: str) -> tuple[str, str]:
    """File and name of a test."""
    path, _, name = nodeid.partition("::")
    return path.rpartition("/")[2], name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI set, a test that was skipped has failed: there the real thing must be tested."""
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which CI does not allow: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a file that is skipped as a whole."""
    report = yield
    if os.environ.get("CI") and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped, which CI does not allow"
    return report
