"""The try of Codex's sandbox: it leaves nothing, it is made, and it is not believed for ever."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

import pytest

from codexd import exits, place, spool, tidy
from codexd.config import Config, Directories, load
from codexd.exits import Ended
from codexd.gate import Keeper
from codexd.ledger import Ledger
from codexd.master import Master
from codexd.outcome import Outcome
from codexd.probe import Probe
from codexd.service import Service
from codexd.spend import Spend


def silent(*_: object, **__: object) -> None:
    """A log that nobody reads."""


class Units:
    """A launcher whose workers have all ended, with this result."""

    survives = True

    def __init__(self, dirs: Directories) -> None:
        self.dirs = dirs
        self.result: dict[str, object] | None = {"outcome": "done"}
        self.started: list[str] = []
        self.at_work: set[str] = set()

    def start(self, ids: Iterable[str], _limits: Mapping[str, Mapping[str, int]]) -> None:
        for id in ids:
            self.started.append(id)
            attempt = place.attempt(self.dirs, id, 1)
            (attempt / "started").touch()
            if self.result:
                (attempt / "result.json").write_text(json.dumps(self.result))

    def active(self) -> set[str]:
        return self.at_work

    def refusal(self, _id: str) -> None: ...

    def tidy(self, kept: Set[str]) -> None:
        self.kept = kept

    def ended(self, _id: str) -> Ended:
        return exits.vanished()


class Trial:
    def __init__(self, root: Path, text: str = "") -> None:
        (root / "codexd.yaml").write_text(text)
        self.config: Config = load(Directories.below(root), explicit=False)
        self.dirs = self.config.dirs
        spool.prepare(self.dirs)
        self.ledger = Ledger(self.dirs.ledger, self.dirs.checkpoint)
        spend = Spend(self.dirs.usage, silent)
        self.keeper = Keeper(self.config, self.ledger, spend, silent, silent)
        self.keeper.binary = "/usr/bin/codex"
        self.units = Units(self.dirs)
        self.probe = Probe(self.config, self.units, self.keeper)  # type: ignore[arg-type]

    def tend(self) -> None:
        for _ in range(2):
            self.probe.tend(0.0)


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path)


def test_it_leaves_nothing(trial: Trial) -> None:
    trial.tend()
    assert (len(trial.units.started), trial.probe.problem) == (1, None)
    assert os.listdir(trial.dirs.tasks) == []


def test_what_was_found_before_is_forgotten(trial: Trial) -> None:
    """The unit may be another since, which nothing tells; that goes for the first task, too."""
    known = Path(trial.keeper.home) / ".codexd" / "sandbox.json"
    known.parent.mkdir(parents=True)
    known.touch()
    trial.probe.tend(0.0)
    assert not known.exists()


def test_what_a_crash_left_of_it_goes_at_the_next_start(trial: Trial) -> None:
    trial.probe.tend(0.0)
    assert trial.probe.running == set(trial.units.started) == set(os.listdir(trial.dirs.tasks))
    tidy.tidy(trial.dirs, trial.ledger.book, silent)
    assert os.listdir(trial.dirs.tasks) == []


def test_what_it_found_is_over_when_a_task_runs(trial: Trial) -> None:
    trial.units.result = {"outcome": "host", "message": "no namespaces"}
    trial.tend()
    assert trial.probe.problem == trial.keeper.closed["host"]["message"] == "no namespaces"
    trial.keeper.open(Outcome.HOST.value)
    trial.tend()
    assert trial.probe.problem is None
    assert len(trial.units.started) == 1


def test_without_a_result_its_exit_record_tells(trial: Trial) -> None:
    trial.units.result = None
    trial.tend()
    assert "could not be set up" in str(trial.probe.problem)


def test_its_exit_record_stays_until_it_was_read(trial: Trial) -> None:
    trial.ledger.close()
    master = Master(trial.config, Service("test"), lambda: trial.config, embedded=True)
    master.keeper.binary = "/usr/bin/codex"
    master.launcher = trial.units  # type: ignore[assignment]
    master.probe = Probe(trial.config, trial.units, master.keeper)  # type: ignore[arg-type]
    kept = []
    for _ in range(2):
        master.probe.tend(0.0)
        master.tend(0.0)
        kept.append(trial.units.kept)
    assert kept == [set(trial.units.started), set()]
    master.ledger.close()


def test_what_the_host_refuses_is_tried_again(trial: Trial) -> None:
    trial.dirs.tasks.rmdir()
    trial.dirs.tasks.touch()
    for _ in range(2):
        with pytest.raises(OSError, match="Not a directory"):
            trial.probe.tend(0.0)
    trial.dirs.tasks.unlink()
    trial.dirs.tasks.mkdir()
    trial.tend()
    assert len(trial.units.started) == 1


def test_what_was_written_in_part_is_removed(trial: Trial) -> None:
    """As of a full disk: a directory is there, and its file has no room."""
    trial.keeper.sandbox(None, trial.config.codex.sandbox)  # what is written before is there
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            trial.probe.tend(0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert os.listdir(trial.dirs.tasks) == []
    trial.tend()
    assert len(trial.units.started) == 1


def test_it_is_waited_for(trial: Trial) -> None:
    trial.probe.tend(0.0)
    trial.units.at_work = set(trial.units.started)
    trial.tend()
    assert trial.probe.running == trial.units.at_work
    trial.units.at_work = set()
    trial.tend()
    assert (trial.probe.running, len(trial.units.started)) == (set(), 1)


def test_a_damaged_result_is_no_good_one(trial: Trial) -> None:
    trial.probe.tend(0.0)
    (id,) = trial.units.started
    (place.attempt(trial.dirs, id, 1) / "result.json").write_text("{")
    trial.probe.tend(0.0)
    assert "its result is damaged: " in str(trial.probe.problem)
    assert trial.probe.problem == trial.keeper.closed["host"]["message"]
    assert os.listdir(trial.dirs.tasks) == []


def test_without_a_sandbox_there_is_nothing_to_try(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "codex: {sandbox: danger-full-access}\n")
    trial.tend()
    assert (trial.units.started, trial.probe.problem) == ([], None)
