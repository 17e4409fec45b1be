"""A quota that runs dry: nothing fails, no attempt is burnt, and all goes on by itself."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Lock

import pytest

from codexd import clock
from codexd.config import Directories, load
from codexd.gate import Keeper
from codexd.ledger import Ledger
from codexd.model import Event, Kind, Note, Request, Task
from codexd.outcome import Outcome
from codexd.replies import Answer, Turn
from codexd.spend import Spend
from tests.daemon import Daemon, until
from tests.proof.level import pick
from tests.scripted_cases import ENDINGS, CaseModel
from tests.test_failures import Seen, health, prepared

FAKE = Path(__file__).parent / "bin" / "codex"
CONFIG = "workers: 4\nhttp:\n  listen: off\n"
TASKS = 20
# Seconds until the account is good again.
RESET = int(os.environ.get("DRY") or pick(1, 90, 90))


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
                self.full_at = self.full_at or _well_before_a_minute(time.time() + self._seconds)
                self.refused.append(turn)
                left = max(1, round(self.full_at - time.time()))
                return ENDINGS["quota"](str(left))
        return self._play(turn)


def _well_before_a_minute(at: float) -> float:
    """`at`, or somewhat later: Codex tells of the next whole minute, and until then some
    commands have to look at the closed gate."""
    return at if at % 60 < 40 else at + 30


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
        # The same reason with another minute is a line more.
        dry = [line for line in notes(daemon, "closed") if "quota" in line]
        assert 1 <= len(dry) <= 2, dry
        assert sum("quota" in line for line in notes(daemon, "opened")) == 1
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


def test_a_long_turn_does_not_keep_a_mended_gate_shut(tmp_path: Path) -> None:
    """It began before, and finds out nothing; another is let through."""
    with CaseModel() as model, prepared(tmp_path / "root", model, CONFIG) as daemon:
        daemon.drop("long.md", "[[hold long]][[say long]]")
        model.wait_held("long")
        daemon.drop("spent.md", "[[first 1 quota 7200]][[say spent]]")
        Seen(daemon, "spent.md").until("queued", "quota")
        daemon.run("release")
        daemon.drop("more.md", "[[say more]]")
        assert daemon.answer("more")[1] == "more\n"
        assert daemon.answer("spent")[1] == "spent\n"
        assert health(daemon)["status"] == "ok"
        model.release("long")
        assert daemon.answer("long")[1] == "long\n"


def test_the_gate_of_a_credential_that_nobody_uses_opens(tmp_path: Path) -> None:
    with CaseModel() as model, prepared(tmp_path / "root", model, CONFIG) as daemon:
        (daemon.dirs.codex_home / "old.config.toml").write_text("")
        daemon.drop("old.md", "---\nprofile: old\n---\n[[quota 7200]]")
        old = Seen(daemon, "old.md")
        old.until("queued", "quota")
        assert health(daemon)["status"] == "quota:old"
        daemon.run("task", "cancel", old.id)
        until(lambda: health(daemon)["status"] == "ok", "all is well")
        assert len(notes(daemon, "opened")) == 1


@pytest.mark.parametrize("hours", [1, 8])
def test_a_quota_that_was_met_while_nobody_looked(tmp_path: Path, hours: int) -> None:
    """The time that Codex printed is one of the hours after it, not of those to come."""
    ended = time.time() - 10 * 3600
    clock_face = time.strftime("%I:%M %p", time.localtime(ended + hours * 3600)).lstrip("0")
    daemon = Daemon(tmp_path / "root", config=f"codex:\n  bin: {FAKE}\n{CONFIG}")
    daemon.left(
        "20261123t072011-0000000000", (Kind.QUEUED, {}), (Kind.RUNNING, {"launches": 1}),
        at=clock.stamp(ended), outcome="quota", exit_status=1, turn_started=True,
        message=f"You've hit your usage limit. Try again at {clock_face}.",
        ended=clock.stamp(ended),
    )  # fmt: skip
    with daemon:
        until(lambda: daemon.tasks()[0]["state"] == "done", "the end of its task")
        assert len(notes(daemon, "closed")) == 1


# --- an outage of the service -------------------------------------------------------------

OUT = CONFIG + "retry:\n  base: 1s\n  cap: 1s\n"


def behave(daemon: Daemon, **settings: object) -> None:
    aside = daemon.dirs.codex_home / "fake.new"
    aside.write_text(json.dumps(settings))
    aside.rename(daemon.dirs.codex_home / "fake.json")


@pytest.mark.parametrize(("sample", "reason"), [("overloaded", "transient"), ("e429", "rate")])
def test_an_outage_costs_no_task(tmp_path: Path, sample: str, reason: str) -> None:
    daemon = Daemon(tmp_path / "root", config=f"codex:\n  bin: {FAKE}\n{OUT}")
    behave(daemon, mode=f"replay:{sample}")
    with daemon:
        for number in range(8):
            daemon.drop(f"t{number}.md", f"task {number}")
        until(lambda: reason in health(daemon).get("gate", {}), "the gate closed")
        told = daemon.run("status")
        assert told.returncode == 69
        assert told.stdout.startswith(f"codexd: {reason}: ")
        before = len(notes(daemon, "running"))
        until(lambda: len(notes(daemon, "running")) >= before + 2, "some find out", 60)
        daemon.kill()
        daemon.start()  # the reason is in the ledger, and what is tried is not counted
        before = len(notes(daemon, "running"))
        until(lambda: len(notes(daemon, "running")) >= before + 2, "some find out again", 60)
        assert reason in health(daemon)["gate"]
        assert not notes(daemon, "failed")
        assert all(task["attempts"] <= 2 for task in daemon.tasks())
        behave(daemon, mode="answer", answer="fine")
        for number in range(8):
            front, text = daemon.answer(f"t{number}", 60)
            assert (front["state"], text) == ("done", "fine\n")
        until(lambda: health(daemon)["status"] == "ok", "all is well")


def test_two_tasks_that_fail_are_no_outage(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "root", config=f"codex:\n  bin: {FAKE}\n{OUT}")
    behave(daemon, mode="replay:overloaded")
    with daemon:
        for name in ("a", "b"):
            daemon.drop(f"{name}.md", "---\nattempts: 4\n---\nx")
        for name in ("a", "b"):
            front, _ = daemon.answer(name, 60)
            assert (front["state"], front["outcome"], front["attempts"]) == (
                "failed", "transient", 4,
            )  # fmt: skip
        assert not notes(daemon, "closed")


def test_what_the_model_answers_ends_the_row(tmp_path: Path) -> None:
    one = Waiting(tmp_path / "root")
    a, b, c, d = (Task(f"20261123t072011-{n:010}", launches=1) for n in range(4))

    def fails(task: Task) -> bool:
        out = one.keeper.is_out(task)
        one.keeper.heard(task, Outcome.TRANSIENT, turned=True)
        return out

    assert not any(fails(task) for task in (a, b, c))
    one.keeper.heard(d, Outcome.DONE, turned=True)
    assert not any(fails(task) for task in (a, b, c))
    assert not any(fails(task) for task in (a, b, c))  # said again after a crash
    one.keeper.heard(d, Outcome.STALL, turned=True)  # which says neither
    one.keeper.heard(d, Outcome.TRANSIENT, turned=False)  # nor does this: Codex met Codex
    assert not one.keeper.is_out(replace(d, profile="work"))  # another credential
    assert fails(d)
    one.keeper.met(Outcome.TRANSIENT, "no capacity")
    assert fails(a)
    assert one.is_due("transient", 11)
    one.keeper.passed({"transient"}, d.id)
    assert not any(fails(task) for task in (a, b, c))


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
        return reason in self.keeper.gate(clock.steady() + later).probes


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
    one.keeper.passed({"quota"}, "x")
    assert not one.keeper.closed


def test_each_credential_has_its_own_pause(tmp_path: Path) -> None:
    one = Waiting(tmp_path / "root", "codex:\n  profile: usual\n")
    words = "Quota exceeded. Check your plan and billing details."
    one.keeper.met(Outcome.QUOTA, words, "usual")
    one.keeper.met(Outcome.AUTH, words, "work")
    one.keeper.met(Outcome.HOST, words, "work")
    assert set(one.keeper.closed) == {"quota", "auth:work", "host"}
    one.keeper.passed({"quota", "host"}, "x")
    assert set(one.keeper.closed) == {"auth:work"}
    assert one.is_due("auth:work", 61)
    one.keeper.close("hold", "held by hand")
    one.keeper.passed({"hold"}, "x")
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


def test_a_gate_with_many_reasons_is_told_whole(tmp_path: Path) -> None:
    """A heartbeat has one size, and what does not fit may not make it unreadable."""
    daemon = Daemon(tmp_path / "root", config="codex:\n  bin: /nonexistent\n" + CONFIG)
    at = "2026-11-23T07:20:11.123Z"
    profiles = [f"{'p' * 96}{number:04}" for number in range(40)]
    for number, profile in enumerate(profiles):
        id = f"20261123t072011-{number:010}"
        daemon.left(id, (Kind.QUEUED, {"profile": profile}), at=at)
    ledger = Ledger(daemon.dirs.ledger, daemon.dirs.checkpoint)
    facts = {"message": "☃" * 500, "until": "2099-11-23T07:20:11.123Z"}
    ledger.append(
        [Event(at, Note.CLOSED, facts={"reason": f"quota:{p}", **facts}) for p in profiles]
    )
    ledger.close()
    with daemon:
        told = until(
            lambda: "codex" in daemon.json("status").get("gate", {}) and health(daemon), "it"
        )
        assert told["status"].startswith("codex,quota:")
        assert (len(told["gate"]), told["gate_more"]) == (16, 25)
        assert "☃" in told["gate"][f"quota:{profiles[0]}"]["message"]
        shown = daemon.run("status")
        assert shown.returncode == 69
        assert "; and 25 more" in shown.stdout
