"""A quota that runs dry: nothing fails, no attempt is burnt, and all goes on by itself."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

import pytest

from codexd.config import Directories, load
from codexd.gate import Keeper
from codexd.ledger import Ledger
from codexd.model import Event, Kind, Request
from codexd.outcome import Outcome
from codexd.replies import Answer, Turn
from codexd.spend import Spend
from tests.daemon import Daemon, until
from tests.scripted_cases import ENDINGS, CaseModel
from tests.test_failures import Seen, health, prepared

FAKE = Path(__file__).parent / "bin" / "codex"
CONFIG = "workers: 4\nhttp:\n  listen: off\n"
TASKS = 20
# Seconds until the account is good again; DRY=90 for a longer drought.
RESET = int(os.environ.get("DRY", "1"))


class DryModel(CaseModel):
    """Answers five turns, and then no more until `seconds` later."""

    def __init__(self, seconds: int) -> None:
        super().__init__()
        self._seconds = seconds
        self._turns = Lock()
        self._answered = 0
        self.script = self._dry
        self.full_at: float | None = None  # when the account is good again; epoch seconds
        self.refused: list[Turn] = []

    def _dry(self, turn: Turn) -> Answer:
        with self._turns:
            if self._answered < 5:
                self._answered += 1
            elif self.full_at is None or time.time() < self.full_at:
                self.full_at = self.full_at or time.time() + self._seconds
                self.refused.append(turn)
                left = max(1, round(self.full_at - time.time()))
                return ENDINGS["quota"](str(left))
        return self._play(turn)


def notes(daemon: Daemon, kind: str) -> list[str]:
    return [line for line in daemon.events() if f"**{kind}**" in line]


# The time that Codex prints has no seconds, so even one second takes up to a minute.
@pytest.mark.timeout(300 + RESET)
def test_twenty_tasks_while_the_quota_runs_dry(tmp_path: Path) -> None:
    with DryModel(RESET) as model, prepared(tmp_path / "root", model, CONFIG) as daemon:
        for number in range(TASKS):
            daemon.drop(f"t{number:02}.md", f"[[sleep 0.2]][[say {number}]]")
        until(lambda: "quota" in daemon.json("status").get("gate", {}), "the gate closed")
        gate = health(daemon)["gate"]["quota"]
        assert re.search(r"usage limit.* try again at \d+:\d\d [AP]M", gate["message"])
        assert gate["until"]
        told = daemon.run("status")
        assert told.returncode == 69
        assert gate["until"] in told.stdout
        for number in range(TASKS):
            front, text = daemon.answer(f"t{number:02}", 150 + RESET)
            assert (front["state"], text, front["attempts"]) == ("done", f"{number}\n", 1)
        assert health(daemon)["status"] == "ok"
        met = len(model.refused)
        assert 1 <= met <= 4  # those that ran when it was spent, and nobody after
        assert len(model.turns) == TASKS + met
        assert len(notes(daemon, "closed")) <= 2
        assert len(notes(daemon, "opened")) == len(notes(daemon, "closed"))
        assert len(notes(daemon, "running")) == TASKS + met
        one_probe(model)


def one_probe(model: DryModel) -> None:
    """The first request after the last that was refused had the model for itself."""
    last = max(turn.number for turn in model.refused)
    later = sorted((t for t in model.turns if t.number > last), key=lambda turn: turn.started)
    probe, following = later[0], later[1]
    spans = {turn.number: end for turn, end in model.spans(probe.thread_id)}
    assert following.started >= spans[probe.number]


def test_who_was_running_does_not_open_the_gate(tmp_path: Path) -> None:
    """It is done, but it had its answer before the quota was spent."""
    with CaseModel() as model, prepared(tmp_path / "root", model, CONFIG) as daemon:
        daemon.drop("long.md", "[[hold long]][[say long]]")
        model.wait_held("long")
        daemon.drop("spent.md", "[[first 1 quota 7200]][[say spent]]")
        task = Seen(daemon, "spent.md")
        task.until("queued", "quota")
        model.release("long")
        assert daemon.answer("long")[1] == "long\n"
        daemon.drop("more.md", "[[say more]]")
        more = Seen(daemon, "more.md")
        time.sleep(1)  # time enough to start it wrongly
        assert (task.now()["state"], more.now()["state"]) == ("queued", "queued")
        assert len(model.asked("[[say spent]]")) == 1
        assert len(notes(daemon, "opened")) == 0
        daemon.run("release")
        assert daemon.answer("more")[1] == "more\n"
        assert daemon.answer("spent")[1] == "spent\n"


def test_a_long_probe_does_not_hold_up_the_others(tmp_path: Path) -> None:
    with CaseModel() as model, prepared(tmp_path / "root", model, CONFIG) as daemon:
        daemon.drop("long.md", "[[shell true]][[first 1 quota 7200]][[hold long]][[say long]]")
        Seen(daemon, "long.md").until("queued", "quota")
        daemon.run("release")
        model.wait_held("long")  # it has been answered once
        daemon.drop("more.md", "[[say more]]")
        assert daemon.answer("more")[1] == "more\n"
        assert health(daemon)["status"] == "ok"
        model.release("long")
        front, text = daemon.answer("long")
        assert (text, front["attempts"]) == ("long\n", 1)


def silent(_event: str, **_fields: object) -> None:
    """A log that nobody reads."""


class Waiting:
    """A keeper of the gate, and the pauses that it makes."""

    def __init__(self, root: Path, config: str = "") -> None:
        dirs = Directories.below(root)
        root.mkdir()
        dirs.config_file.write_text(config)
        self.ledger = Ledger(dirs.ledger, dirs.checkpoint)
        spend = Spend(dirs.usage, silent)
        self.keeper = Keeper(load(dirs, explicit=True), self.ledger, spend, silent, silent)

    def is_due(self, reason: str, later: float) -> bool:
        return reason in self.keeper.gate(time.monotonic() + later).probes


def test_pauses_of_unknown_length_grow_with_the_probes_alone(tmp_path: Path) -> None:
    one = Waiting(tmp_path / "root")
    words = "Quota exceeded. Check your plan and billing details."
    for _ in range(4):  # all that were running meet it
        one.keeper.met(Outcome.QUOTA, words)
    assert not one.is_due("quota", 59)
    assert one.is_due("quota", 61)
    for pause in (120, 240, 480):
        one.keeper.release()
        assert one.is_due("quota", 0)
        one.keeper.met(Outcome.QUOTA, words)
        assert not one.is_due("quota", pause - 1)
        assert one.is_due("quota", pause + 1)
    assert one.ledger.path.read_text().count("**closed**") == 1
    one.keeper.passed({"quota"})
    assert not one.keeper.closed


def test_each_credential_has_its_own_pause(tmp_path: Path) -> None:
    one = Waiting(tmp_path / "root", "codex:\n  profile: usual\n")
    words = "Quota exceeded. Check your plan and billing details."
    one.keeper.met(Outcome.QUOTA, words, "usual")
    one.keeper.met(Outcome.AUTH, words, "work")
    one.keeper.met(Outcome.HOST, words, "work")
    assert set(one.keeper.closed) == {"quota", "auth:work", "host"}
    one.keeper.passed({"quota", "host"})
    assert set(one.keeper.closed) == {"auth:work"}
    assert one.is_due("auth:work", 61)
    one.keeper.close("hold", "held by hand")
    one.keeper.passed({"hold"})
    assert "hold" in one.keeper.closed


@pytest.mark.parametrize("reason", ["quota", "auth"])
def test_a_task_with_another_profile_goes_on(tmp_path: Path, reason: str) -> None:
    directive = {"quota": "first 1 quota 7200", "auth": "first 2 http 401"}[reason]
    with CaseModel() as model, prepared(tmp_path / "root", model, CONFIG) as daemon:
        home = daemon.dirs.codex_home
        for name in ("work", "home"):
            (home / f"{name}.config.toml").write_text('model = "gpt-5.5"\n')
        daemon.drop("w.md", f"---\nprofile: work\n---\n[[{directive}]][[say w]]")
        Seen(daemon, "w.md").until("queued", reason)
        assert list(health(daemon)["gate"]) == [f"{reason}:work"]
        assert health(daemon)["status"] == f"{reason}:work"
        daemon.drop("again.md", "---\nprofile: work\n---\n[[say again]]")
        daemon.drop("plain.md", "[[say plain]]")
        daemon.drop("home.md", "---\nprofile: home\n---\n[[say home]]")
        assert daemon.answer("plain")[1] == "plain\n"
        assert daemon.answer("home")[1] == "home\n"
        assert list(health(daemon)["gate"]) == [f"{reason}:work"]
        assert not model.asked("[[say again]]")
        daemon.stop()
        daemon.start()  # the key is in the ledger
        assert list(health(daemon)["gate"]) in ([f"{reason}:work"], [])
        daemon.run("release")
        for name in ("w", "again"):
            front, text = daemon.answer(name)
            assert (text, front["attempts"]) == (f"{name}\n", 1)
        assert health(daemon)["status"] == "ok"


# --- ten thousand -----------------------------------------------------------------------


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with 10,000 queued tasks, and a Codex whose quota is spent."""
    config = f"codex:\n  bin: {FAKE}\n{CONFIG}"
    one = Daemon(tmp_path / "root", config=config)
    (one.dirs.codex_home / "fake.json").write_text(json.dumps({"mode": "replay:e429usage"}))
    one.dirs.tasks.mkdir(parents=True, exist_ok=True)
    at = "2026-11-23T07:20:11.123Z"
    request = Request("Do it.").to_json()
    events = []
    for number in range(10_000):
        id = f"20261123t072011-{number:010}"
        record = {"id": id, "file": f"{number}.md", "created": at, "request": request}
        (one.dirs.tasks / id).mkdir()
        (one.dirs.tasks / id / "task.json").write_text(json.dumps(record))
        facts = {"file": f"{number}.md", "limit": 3, "workdir": str(one.dirs.work)}
        events.append(Event(at, Kind.QUEUED, id, facts))
    one.dirs.work.mkdir(exist_ok=True)
    ledger = Ledger(one.dirs.ledger, one.dirs.checkpoint)
    ledger.append(events)
    ledger.close()
    with one:
        yield one


def test_ten_thousand_tasks_cost_a_handful_of_lines(crowd: Daemon) -> None:
    before = 10_001
    until(lambda: notes(crowd, "closed"), "the gate closed", 60)
    until(lambda: not crowd.json("status")["running"], "those that ran have met it")
    time.sleep(4)  # a few rounds more
    lines = crowd.events()[before:]
    kinds = [re.search(r"\*\*(\w+)\*\*", line)[1] for line in lines]  # type: ignore[index]
    assert len(lines) <= 12, lines
    assert set(kinds) == {"started", "running", "queued", "closed"}
    assert kinds.count("closed") == 1
    assert kinds.count("running") == kinds.count("queued") <= 4
    told = crowd.json("status")
    assert (told["queued"], told["running"], list(told["gate"])) == (10_000, 0, ["quota"])
