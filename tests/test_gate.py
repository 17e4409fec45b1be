"""What closes the gate for all, and what fails nobody: after one task, until it is over."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import pytest

from codexd import clock, free, heartbeat, pauses, spool
from codexd.config import Config, Directories, load
from codexd.control import Controls
from codexd.finish import Finish
from codexd.gate import Keeper
from codexd.ledger import Ledger
from codexd.model import Event, Kind, Sandbox, Task
from codexd.outcome import Outcome
from codexd.policy import REFUSALS
from codexd.spend import Spend
from tests.daemon import Daemon, until
from tests.scripted_cases import CaseModel
from tests.test_failures import Seen, health, prepared

FAKE = Path(__file__).parent / "bin" / "codex"
CONFIG = "attempts: 1\nworkers: 4\nhttp:\n  listen: off\nretry:\n  base: 1s\n  cap: 1s\n"
ID = "20261123t072011-0000000000"
SPENT = "Quota exceeded. Check your plan and billing details."


def behave(daemon: Daemon, **settings: object) -> None:
    aside = daemon.dirs.codex_home / "fake.new"
    aside.write_text(json.dumps(settings))
    aside.rename(daemon.dirs.codex_home / "fake.json")


# --- a task that is refused --------------------------------------------------------------


def test_a_gate_that_stays_closed_fails_nobody_however_often_it_was_tried(tmp_path: Path) -> None:
    """A login that has expired for a weekend, and a task that was let through all the time."""
    daemon = Daemon(tmp_path / "root", config=f"codex:\n  bin: {FAKE}\n{CONFIG}")
    daemon.left(
        ID, (Kind.QUEUED, {}), (Kind.RUNNING, {"launches": 1000, "attempts": 1}),
        at="2026-11-23T07:20:11.123Z", outcome="auth", message="Not logged in", exit_status=1,
    )  # fmt: skip
    (daemon.dirs.tasks / ID / "1").rename(daemon.dirs.tasks / ID / "1000")
    with daemon:
        until(lambda: daemon.json("status").get("gate") or daemon.tasks()[0]["outcome"], "its end")
        daemon.run("release")
        until(lambda: daemon.tasks()[0]["state"] == "done", f"its end: {daemon.tasks()}")
        assert daemon.tasks()[0]["attempts"] == 1


def test_a_task_that_brings_its_own_refusal_fails(tmp_path: Path) -> None:
    """Others of its credential are answered in between, so the gate does not belong to all."""
    with CaseModel() as model, prepared(tmp_path / "root", model, CONFIG) as daemon:
        daemon.drop("bad.md", "[[insufficient]]")
        bad = Seen(daemon, "bad.md")
        for number in range(REFUSALS):
            bad.until("queued", "quota")
            if number == REFUSALS // 2:  # what was counted is in the ledger, and is carried on
                assert daemon.run("ledger", "compact").returncode == 0
                daemon.stop()
                daemon.start()
                bad.until("queued", "quota")
            daemon.drop(f"good{number}.md", f"[[say {number}]]")
            Seen(daemon, f"good{number}.md")
            before = len(model.asked("[[insufficient]]"))
            daemon.run("release")
            assert daemon.answer(f"good{number}")[1] == f"{number}\n"
            until(lambda n=before: len(model.asked("[[insufficient]]")) > n, "it is refused again")
        front, _ = daemon.answer("bad")
        assert (front["state"], front["outcome"]) == ("failed", "quota")
        assert front["message"].endswith("met 10 times, although others did not meet it in between")


def test_what_a_task_opened_itself_is_not_held_against_it(tmp_path: Path) -> None:
    """It is the longest task of all, and uses up one quota after the other."""
    keeper = Waiting(tmp_path / "root").keeper
    one, other = Task(ID), Task(ID[:-1] + "1")
    assert not keeper.its_own(one)
    keeper.met(Outcome.QUOTA, SPENT)
    keeper.passed({"quota"}, one.id)
    assert Outcome.QUOTA not in keeper.its_own(one)
    assert keeper.its_own(other) == {Outcome.QUOTA}
    assert not keeper.its_own(replace(other, profile="work")), "another credential"
    keeper.met(Outcome.QUOTA, SPENT)
    assert not keeper.its_own(other), "nobody has shown yet that it is over"


# --- until when ---------------------------------------------------------------------------


class Waiting:
    """A keeper of the gate, as it is after a start."""

    def __init__(self, root: Path) -> None:
        self.dirs = Directories.below(root)
        self.dirs.codex_home.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(self.dirs.ledger, self.dirs.checkpoint)
        if not ledger.book.tasks:  # somebody who waits for it
            ledger.append([Event(clock.now(), Kind.QUEUED, ID, {"file": "x.md"})])
        config = load(self.dirs, explicit=False)
        config = replace(config, codex=replace(config.codex, bin=str(FAKE)))
        self.keeper = Keeper(config, ledger, Spend(self.dirs.usage, silent), silent, silent)
        self.keeper.look(clock.steady())

    def is_due(self, later: float = 0.0) -> bool:
        return "quota" in self.keeper.gate(clock.steady() + later).probes


def silent(_event: str, **_fields: object) -> None:
    """A log that nobody reads."""


def test_a_known_end_is_waited_for_across_starts_and_reloads(tmp_path: Path) -> None:
    (tmp_path / "codex").mkdir()
    (tmp_path / "codex" / "auth.json").write_text("{}")
    Waiting(tmp_path).keeper.met(
        Outcome.QUOTA, "You've hit your usage limit. Try again in 2 hours."
    )
    one = Waiting(tmp_path)
    assert not one.is_due()
    assert not one.is_due(7000)
    assert one.is_due(7300)
    one.keeper.look_again()
    one.keeper.look(clock.steady())
    assert not one.is_due()
    one.keeper.release()
    assert one.is_due()


def test_a_login_that_was_changed_meanwhile_is_tried_at_the_start(tmp_path: Path) -> None:
    Waiting(tmp_path).keeper.met(
        Outcome.QUOTA, "You've hit your usage limit. Try again in 2 hours."
    )
    time.sleep(0.01)  # the ledger knows milliseconds
    (tmp_path / "codex" / "auth.json").write_text("{}")
    assert Waiting(tmp_path).is_due()


def test_a_clock_that_was_set_back_does_not_put_it_off(tmp_path: Path) -> None:
    """No longer than it was when the gate was closed."""
    facts = {"since": "2099-11-23T07:20:11.123Z", "until": "2099-11-23T08:20:11.123Z"}
    one = Waiting(tmp_path)
    one.keeper.ledger.book.gate["quota"] = {"reason": "quota", **facts}
    assert not one.is_due()
    assert one.is_due(3601)


def test_the_one_line_of_the_service_says_until_when() -> None:
    told = {"running": 1, "queued": 2, "waiting": 0, "gate_more": 3}
    midnight = time.mktime((*time.localtime()[:3], 0, 0, 0, 0, 0, -1))
    at = clock.stamp(time.mktime((*time.localtime(midnight)[:3], 14, 3, 0, 0, 0, -1)))
    far = clock.stamp(time.mktime((2099, 1, 2, 3, 4, 0, 0, 0, -1)))
    gate = {"hold": {"message": "x"}, "quota": {"until": at}, "quota:work": {"until": far}}
    assert heartbeat.line({**told, "gate": gate}) == (
        "1 running, 2 queued, 0 waiting; closed: hold, quota until 14:03, "
        "quota:work until 2099-01-02 03:04 and 3 more"
    )
    assert heartbeat.line({**told, "gate": {}, "gate_more": 0}) == "1 running, 2 queued, 0 waiting"


# --- a host that cannot run Codex ----------------------------------------------------------


@pytest.mark.parametrize("sandbox", ["workspace-write", "danger-full-access"])
def test_a_codex_that_is_replaced_in_service_fails_nobody(tmp_path: Path, sandbox: str) -> None:
    """`npm install -g` takes it away for seconds, just after it was looked at."""
    binary, aside = tmp_path / "codex", tmp_path / "aside"
    binary.write_text(f'#!/bin/sh\nexec {FAKE} "$@"\n')
    binary.chmod(0o755)
    config = f"codex:\n  bin: {binary}\n  sandbox: {sandbox}\n{CONFIG}"
    with Daemon(tmp_path / "root", config=config) as daemon:
        behave(daemon, answer="fine")
        daemon.drop("before.md", "x")
        assert daemon.answer("before")[1] == "fine\n"
        binary.rename(aside)
        for number in range(8):
            daemon.drop(f"t{number}.md", "x")
        until(lambda: "codex" in health(daemon).get("gate", {}), "it is missed")
        until(lambda: not health(daemon)["running"], "those that met it are back")
        running = sum("**running**" in line for line in daemon.events())
        assert running <= 1 + 4, "one of each worker"
        aside.rename(binary)
        for number in range(8):
            front, text = daemon.answer(f"t{number}", 60)
            assert (text, front["attempts"]) == ("fine\n", 1), front
        until(lambda: health(daemon)["status"] == "ok", "all is well")


@pytest.mark.parametrize("sample", ["home_disk_full_1200k", "home_unwritable_by_user"])
def test_a_conversation_that_cannot_be_kept_holds_all(tmp_path: Path, sample: str) -> None:
    daemon = Daemon(tmp_path / "root", config=f"codex:\n  bin: {FAKE}\n{CONFIG}")
    behave(daemon, mode=f"replay:{sample}", effects=str(tmp_path / "effects"))
    with daemon:
        for number in range(20):
            daemon.drop(f"t{number}.md", "x")
        until(lambda: "host" in health(daemon).get("gate", {}), "the gate closed")
        until(lambda: daemon.json("status")["running"] == 0, "those that ran have met it")
        assert not [line for line in daemon.events() if "**failed**" in line]
        behave(daemon, answer="fine")
        for number in range(20):
            front, text = daemon.answer(f"t{number}", 60)
            assert (text, front["attempts"]) == ("fine\n", 1)
        starts = (tmp_path / "effects").read_text().count("\n")
        assert starts <= 10, "the workers that ran, and one from time to time"


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A directory on another file system, with less room."""
    place = Path(mkdtemp(dir="/dev/shm"))
    yield place
    shutil.rmtree(place)


def config_with(tmp_path: Path, home: Path, least: int) -> Config:
    dirs = Directories.below(tmp_path)
    dirs.config_file.write_text(f"limits:\n  disk_free: {least}\ncodex:\n  home: {home}\n")
    return load(dirs, explicit=True)


def test_of_a_gate_that_says_too_little_the_time_is_long_ago() -> None:
    assert pauses.since({}) == pauses.since({"since": "yesterday"}) == 0.0


def test_room_is_looked_for_where_codex_writes_as_well(tmp_path: Path, elsewhere: Path) -> None:
    here, there = spool.free_bytes(tmp_path), spool.free_bytes(elsewhere)
    if os.stat(tmp_path).st_dev == os.stat(elsewhere).st_dev or there + (1 << 30) > here:
        pytest.skip("no file system with less room than this one")
    least = there + (1 << 29)
    assert free.shortage(config_with(tmp_path, tmp_path, least)) is None
    why = free.shortage(config_with(tmp_path, elsewhere, least))
    assert why == (
        f"less than {free.size(least)} free below {elsewhere}; "
        "make room, work goes on by itself (limits.disk_free)"
    )
    assert free.shortage(config_with(tmp_path, elsewhere / "gone", least)) is None


@pytest.mark.parametrize(("bytes", "text"), [(3 << 30, "3G"), (512 << 10, "512K"), (1000, "1000")])
def test_a_size_is_told_as_it_is_configured(bytes: int, text: str) -> None:
    assert free.size(bytes) == text


def test_too_little_room_holds_all_until_there_is_more(tmp_path: Path) -> None:
    one = Waiting(tmp_path)
    plain = one.keeper.config
    one.keeper.config = replace(plain, limits=replace(plain.limits, disk_free=1 << 60))
    one.keeper.look(clock.steady())
    assert "make room" in str(one.keeper.closed["disk"]["message"])
    one.keeper.config = plain
    one.keeper.look(clock.steady())
    assert one.keeper.closed == {}


def test_a_damaged_configuration_of_codex_is_told_and_not_hidden_behind(tmp_path: Path) -> None:
    """Commands are in the plain sandbox then, and somebody hears of it."""
    one, told = Waiting(tmp_path), []
    one.keeper.warn = lambda event, **fields: told.append((event, *fields.values()))
    (one.dirs.codex_home / "config.toml").write_text("[")
    one.keeper.look(clock.steady())
    assert one.keeper.sandbox(None, Sandbox.WORKSPACE_WRITE) == "workspace-write"
    one.keeper.look(clock.steady())
    assert [event for event, _ in told] == ["codex.config", "codex.profile"]
    assert "Invalid initial character" in str(one.keeper.unhidden)


@pytest.mark.parametrize("what", ["directory", "link"])
def test_a_sign_of_life_is_given_whatever_lies_in_its_place(tmp_path: Path, what: str) -> None:
    path = tmp_path / "heartbeat"
    path.mkdir() if what == "directory" else path.symlink_to("/dev/zero")
    heartbeat.write(path, {"running": 3})
    assert json.loads(path.read_text())["running"] == 3


# --- a ledger without room -----------------------------------------------------------------


@contextmanager
def no_room(ledger: Path) -> Iterator[None]:
    """No file of this process may become longer than the ledger is now."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.stat().st_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Told:
    """A keeper of the gate, those who obey control files, and a launcher that is told to stop."""

    def __init__(self, root: Path) -> None:
        one = Waiting(root)
        spool.prepare(one.dirs)
        self.inbox, self.keeper, self.ledger = one.dirs.inbox, one.keeper, one.keeper.ledger
        self.stopped: list[str] = []
        self.refused: list[object] = []
        launcher = SimpleNamespace(stop=self.stopped.extend)
        settings, finish = one.keeper.config, Finish(one.keeper.config, one.keeper.spend, silent)
        self.controls = Controls(
            settings, self.ledger, launcher, self.keeper, finish,  # type: ignore[arg-type]
            lambda error, **_: self.refused.append(error),
        )  # fmt: skip

    def obey(self, *names: str) -> set[str]:
        """Give these, each later than the one before, and obey what is there; what is left."""
        for second, name in enumerate(names):
            (self.inbox / name).touch()
            os.utime(self.inbox / name, (second, second))
        self.controls.obey(os.listdir(self.inbox), self.ledger.append)  # type: ignore[arg-type]
        return set(os.listdir(self.inbox))


def test_without_room_in_the_ledger_the_file_itself_remembers_a_hold(tmp_path: Path) -> None:
    one = Told(tmp_path)
    with no_room(one.ledger.path):
        assert one.obey("all.hold") == {"all.hold"}
        one.keeper.look(clock.steady())
        assert list(one.keeper.closed) == ["hold"]
        assert one.obey("all.hold", "all.release") == set()
        assert one.keeper.closed == {}
        assert one.obey("all.hold") == {"all.hold"}
        assert one.obey("all.release", "all.hold") == {"all.hold"}, "the last word stands"
        assert list(one.keeper.closed) == ["hold"]
    assert one.ledger.book.gate == {}
    one.keeper.look(clock.steady())
    assert one.obey() == set()
    assert list(one.ledger.book.gate) == ["hold"]


def test_what_closes_the_gate_is_in_the_ledger_before_it_is_said(tmp_path: Path) -> None:
    """But for want of room there; then it is said all the same, and holds."""
    one, said = Waiting(tmp_path), []
    path = one.keeper.ledger.path
    one.keeper.warn = lambda event, **_: said.append((event, "Not logged in" in path.read_text()))
    with no_room(path):
        one.keeper.met(Outcome.AUTH, "Not logged in")
        assert said == [("gate.closed", False)]
    one.keeper.open("auth")
    one.keeper.met(Outcome.AUTH, "Not logged in")
    assert said[1:] == [("gate.closed", True)]


def test_without_room_in_the_ledger_a_cancel_stops_the_task_that_fills_the_disk(
    tmp_path: Path,
) -> None:
    one = Told(tmp_path)
    with no_room(one.ledger.path):
        assert one.obey(f"{ID}.cancel") == {f"{ID}.cancel"}
        assert (one.stopped, len(one.refused)) == ([], 1), "it does not run"
    one.ledger.append([Event(clock.now(), Kind.RUNNING, ID, {"launches": 1, "attempts": 1})])
    with no_room(one.ledger.path):
        assert one.obey() == {f"{ID}.cancel"}
        assert (one.stopped, len(one.refused)) == ([ID], 2)
    assert one.obey() == set()
    assert one.ledger.book.tasks[ID].cancel
