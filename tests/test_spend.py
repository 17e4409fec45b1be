"""What was used: counted once, by day, session and model; the limits of a day and of a task."""

from __future__ import annotations

import json
import os
import re
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codexd import clock, config, place, spend, spool
from codexd.config import Config, Directories
from codexd.evidence import Evidence
from codexd.exits import Ended
from codexd.finish import Finish
from codexd.gate import BUDGET, Keeper
from codexd.ledger import Ledger
from codexd.model import State, Task
from codexd.spend import Spend
from codexd.view import DAYS, View
from tests.daemon import Daemon, until
from tests.processes import kill, worker_of
from tests.scripted_cases import CaseModel

pytestmark = pytest.mark.xdist_group("spend")

ID = "20261123t072011-k3f9qa7x2m"
THREAD = "019e0000-0000-7000-8000-000000000001"
NOON = clock.epoch("2026-11-23T12:00:00.000Z")
USED = {"input_tokens": 100, "cached_input_tokens": 20, "output_tokens": 10}
CALL = 110  # tokens of one answer of the scripted model, in and out


@pytest.fixture
def zone() -> Iterator[Callable[[str], None]]:
    """Sets the time zone of this process."""
    before = os.environ.get("TZ")

    def use(name: str) -> None:
        os.environ["TZ"] = name
        time.tzset()

    use("UTC")
    yield use
    del os.environ["TZ"]
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


class Told:
    """The master's log."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __call__(self, event: str, **_: object) -> None:
        self.events.append(event)


def counts(directory: Path, day: str = "2026-11-23") -> dict[str, Any]:
    return json.loads((directory / f"{day}.json").read_text())  # type: ignore[no-any-return]


# --- counting -----------------------------------------------------------------------


def test_attempts_are_added_up_by_model_and_session(tmp_path: Path, zone: Any) -> None:
    used = Spend(tmp_path, Told())
    used.add(f"{ID}/1", "web", "gpt-x", USED, NOON)
    used.add(f"{ID}/2", "web", None, {}, NOON)
    used.add("other/1", None, "gpt-x", USED, NOON)
    used.save()
    found = counts(tmp_path)
    assert found["total"] == {"attempts": 3, "input_tokens": 200, "cached_input_tokens": 40,
                              "output_tokens": 20, "reasoning_output_tokens": 0}  # fmt: skip
    assert {name: c["attempts"] for name, c in found["models"].items()} == {
        "gpt-x": 2,
        "default": 1,
    }
    assert {name: c["attempts"] for name, c in found["sessions"].items()} == {"web": 2, "": 1}
    assert spend.whole(found["total"])["tokens"] == 220
    assert spend.load(tmp_path, "2026-11-23").total == found["total"]


def test_an_attempt_counts_once_also_after_a_crash_and_over_midnight(
    tmp_path: Path, zone: Any
) -> None:
    used = Spend(tmp_path, Told())
    used.add(f"{ID}/1", None, None, USED, NOON)
    used.add(f"{ID}/1", None, None, USED, NOON)
    used.save()
    days_later = NOON + 3 * 86400  # the host was off
    for when in (NOON + 1, days_later, days_later + 86400):
        again = Spend(tmp_path, Told())
        again.add(f"{ID}/1", None, None, USED, when)
        again.add(f"{when}/1", None, None, {}, when)
        again.save()
    assert [counts(tmp_path, d)["total"]["input_tokens"] for d in spend.days(tmp_path, 9)] == [
        0, 0, 100,
    ]  # fmt: skip


def test_what_was_not_saved_is_counted_when_it_is_said_again(tmp_path: Path, zone: Any) -> None:
    Spend(tmp_path, Told()).add(f"{ID}/1", None, None, USED, NOON)
    used = Spend(tmp_path, Told())
    used.add(f"{ID}/1", None, None, USED, NOON)
    used.save()
    assert counts(tmp_path)["total"]["attempts"] == 1


def test_the_day_is_the_local_one(tmp_path: Path, zone: Callable[[str], None]) -> None:
    late = clock.epoch("2026-03-28T23:30:00.000Z")
    zone("Europe/Berlin")  # a day of 23 hours begins at 23:00 UTC
    assert spend.today(late) == "2026-03-29"
    assert clock.stamp(spend.midnight(late)) == "2026-03-29T22:00:00.000Z"
    zone("America/New_York")
    assert spend.today(late) == "2026-03-28"
    assert clock.stamp(spend.midnight(late)) == "2026-03-29T04:00:00.000Z"


def test_a_day_stays_small_whatever_comes(tmp_path: Path, zone: Any) -> None:
    used = Spend(tmp_path, Told())
    for number in range(3000):
        used.add(f"{number}/1", f"s{number}", f"m{number}", USED, NOON)
    used.save()
    found = counts(tmp_path)
    assert len(found["models"]) == len(found["sessions"]) == 1001
    assert found["sessions"]["(others)"]["attempts"] == 2000
    assert found["total"]["attempts"] == 3000
    assert len(found["applied"]) == 256
    assert (tmp_path / "2026-11-23.json").stat().st_size < 1 << 20
    began = time.thread_time()
    used.add("new/1", "s1", "m1", USED, NOON)
    used.save()
    assert time.thread_time() - began < 0.5


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"day": "2026-11-22"}', '{"day": "2026-11-23", "applied": [], "total": 1}',
     '{"day":"2026-11-23","applied":[],"total":{},"models":{"x":{"attempts":"1"}},"sessions":{}}'],
)  # fmt: skip
def test_a_damaged_day_is_set_aside_and_told(tmp_path: Path, zone: Any, text: str) -> None:
    (tmp_path / "2026-11-23.json").write_text(text)
    told = Told()
    used = Spend(tmp_path, told)
    used.add(f"{ID}/1", None, None, USED, NOON)
    used.save()
    assert told.events == ["usage.damaged"]
    assert (tmp_path / "2026-11-23.damaged").read_text() == text
    assert counts(tmp_path)["total"]["attempts"] == 1


def test_a_report_reads_no_more_than_the_last_days(tmp_path: Path, zone: Any) -> None:
    dirs = Directories.below(tmp_path)
    dirs.usage.mkdir()
    used = Spend(dirs.usage, Told())
    for day in range(DAYS + 8):
        used.add(f"{day}/1", None, "m", USED, NOON + day * 86400)
    used.save()
    (dirs.usage / "2027-01-01.json").write_text("damaged")
    view = View(dirs)
    found = view.usage("day")
    assert len(found) == DAYS - 1
    assert found[-1]["day"] == "2027-03-02"
    assert [str(dirs.usage / "2027-01-01.json") in damage for damage in view.damaged] == [True]
    dirs.inbox.mkdir()
    done = Daemon(tmp_path).run("usage")
    assert done.returncode == 0
    assert done.stderr.startswith(f"codexd: {dirs.usage}/2027-01-01.json: ")
    assert done.stderr.endswith("; not counted\n")
    assert view.usage("model") == [
        {
            "model": "m",
            **spend.whole({k: v * (DAYS - 1) for k, v in {**USED, "attempts": 1}.items()}),
        }
    ]


def settings(root: Path, text: str = "") -> Config:
    (root / "codexd.yaml").write_text(text)
    loaded = config.load(Directories.below(root), explicit=False)
    spool.prepare(loaded.dirs)
    return loaded


@pytest.mark.parametrize("saved", [True, False])
def test_an_attempt_that_is_judged_again_counts_once(tmp_path: Path, saved: bool) -> None:
    loaded = settings(tmp_path)
    task = Task(ID, State.RUNNING, session="web", launches=1, attempts=1, created=clock.now())
    (loaded.dirs.tasks / ID).mkdir()
    place.store(loaded.dirs, ID, {"request": {"prompt": "x"}})
    at = loaded.dirs.tasks / ID / "1"
    at.mkdir()
    result = {"outcome": "done", "thread": THREAD, "answer": "yes", "exit_status": 0,
              "usage": {"input_tokens": 900, "output_tokens": 90}, "model": "gpt-x"}  # fmt: skip
    (at / "result.json").write_text(json.dumps(result))
    first = Finish(loaded, Spend(loaded.dirs.usage, Told()))
    usage = first.judge(task).event.facts["usage"]
    if saved:
        first.spend.save()
    again = Finish(loaded, Spend(loaded.dirs.usage, Told()))  # killed before the ledger's line
    assert again.judge(task).event.facts["usage"] == usage
    again.spend.save()
    assert View(loaded.dirs).usage("session")[0]["input_tokens"] == 900
    assert View(loaded.dirs).usage("model")[0]["model"] == "gpt-x"


def test_what_a_worker_used_that_was_killed_after_its_turn_is_kept(tmp_path: Path) -> None:
    """Its exit record alone tells."""
    loaded = settings(tmp_path)
    task = Task(ID, State.RUNNING, launches=1, attempts=1, created=clock.now())
    at = loaded.dirs.tasks / ID / "1"
    at.mkdir(parents=True)
    (at / "started").touch()
    (at / "attempt.json").write_text("{}")
    said = {"type": "agent_message", "id": "i", "text": "yes"}
    events: list[dict[str, object]] = [
        {"type": "thread.started", "thread_id": THREAD},
        {"type": "turn.started"},
        {"type": "item.completed", "item": said},
        {"type": "turn.completed", "usage": USED},
    ]
    (at / "events.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in events))
    used = {"cpu_seconds": 1.5, "memory_peak_bytes": 1 << 20}
    found = Evidence(loaded).result(task, Ended("signal", "killed", "KILL", cost=used))
    assert (found.outcome.value, found.answer, found.cost) == ("done", "yes", used)


def test_what_a_killed_worker_left_is_read_in_little_memory(tmp_path: Path) -> None:
    loaded = settings(tmp_path)
    task = Task(ID, State.RUNNING, session="web", launches=1, attempts=1, created=clock.now())
    at = loaded.dirs.tasks / ID / "1"
    at.mkdir(parents=True)
    (at / "started").touch()
    named = {"type": "thread.started", "thread_id": THREAD}
    output = {"type": "command_execution", "id": "i", "aggregated_output": "x" * (1 << 20)}
    line = json.dumps({"type": "item.completed", "item": output})
    with open(at / "events.jsonl", "w") as events:
        events.write(f"{json.dumps(named)}\n")
        events.writelines(f"{line}\n" for _ in range(64))
    tracemalloc.start()
    try:
        found = Evidence(loaded).result(task)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.outcome.value, found.thread) == ("interrupted", THREAD)
    assert peak < 16 << 20


# --- the limit of a day ---------------------------------------------------------------


def test_the_gate_is_closed_until_midnight(tmp_path: Path, zone: Callable[[str], None]) -> None:
    # A zone in which it is eight seconds to midnight.
    now = int(time.time())
    west = (now + 8) % 86400
    zone(f"XXX{west // 3600:02}:{west % 3600 // 60:02}:{west % 60:02}")
    loaded = settings(tmp_path, "limits:\n  day_tokens: 110\n")
    ledger = Ledger(loaded.dirs.ledger, loaded.dirs.checkpoint)
    used = Spend(loaded.dirs.usage, Told())
    keeper = Keeper(loaded, ledger, used, Told(), Told())
    keeper.look(time.monotonic())
    assert BUDGET not in keeper.closed
    used.add(f"{ID}/1", None, None, USED, time.time())
    keeper.look(time.monotonic())
    facts = keeper.closed[BUDGET]
    assert abs(clock.epoch(str(facts["until"])) - now - 8) <= 1
    assert "110 tokens" in str(facts["message"])
    assert "limits.day_tokens" in str(facts["message"])
    assert keeper.summary()["today"] == {
        "day": spend.today(now), **spend.whole({**USED, "attempts": 1}), "limit": 110,
    }  # fmt: skip
    size = loaded.dirs.ledger.stat().st_size
    for _ in range(100):
        keeper.look(time.monotonic())
    assert loaded.dirs.ledger.stat().st_size == size  # said once
    until(lambda: time.time() > now + 9, "midnight")
    keeper.look(time.monotonic())
    assert BUDGET not in keeper.closed
    assert loaded.dirs.ledger.read_text().count("budget") == 2
    ledger.close()


def test_the_limit_of_a_day_holds_whatever_else_cannot_be_looked_at(tmp_path: Path) -> None:
    """As of a failing disk; the name is one that no file system has."""
    text = f"limits:\n  day_tokens: 110\ncodex:\n  home: /{'x' * 300}\n"
    loaded = settings(tmp_path, text)
    ledger = Ledger(loaded.dirs.ledger, loaded.dirs.checkpoint)
    used = Spend(loaded.dirs.usage, Told())
    keeper = Keeper(loaded, ledger, used, Told(), Told())
    used.add(f"{ID}/1", None, None, USED, time.time())
    with pytest.raises(OSError, match="too long"):
        keeper.look(time.monotonic())
    assert BUDGET in keeper.closed
    ledger.close()


def test_without_a_limit_it_opens_at_the_next_start(tmp_path: Path, zone: Any) -> None:
    loaded = settings(tmp_path)
    ledger = Ledger(loaded.dirs.ledger, loaded.dirs.checkpoint)
    keeper = Keeper(loaded, ledger, Spend(loaded.dirs.usage, Told()), Told(), Told())
    keeper.close(BUDGET, "was spent")
    keeper.look(time.monotonic())
    assert BUDGET not in keeper.closed
    ledger.close()


# --- with the real Codex ------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Iterator[CaseModel]:
    with CaseModel() as served:
        yield served


def daemon(root: Path, model: CaseModel, text: str = "") -> Daemon:
    made = Daemon(root, model.environment(), f"http:\n  listen: off\n{text}")
    model.write_config(made.dirs.codex_home)
    return made


def test_a_day_at_work(tmp_path: Path, model: CaseModel) -> None:
    """Also a turn that was stopped, and one whose worker was killed, have used something."""
    with daemon(tmp_path / "d", model) as served:
        served.drop("a.md", "---\nsession: web\n---\n[[shell true]] [[say one]]\n")
        served.answer("a")
        served.drop("b.md", "---\nsession: web\nmodel: gpt-b\n---\n[[say two]]\n")
        served.answer("b")
        served.drop("late.md", "---\ntimeout: 3s\n---\n[[shell true]] [[hang]]\n")
        served.drop("lost.md", "---\nattempts: 1\n---\n[[shell true]] [[hold lost]] [[say x]]\n")
        model.wait_held("lost")
        id = next(t["id"] for t in served.tasks() if t["file"] == "lost.md")
        kill(worker_of(id))
        model.release("lost")
        front, _ = served.answer("lost")
        assert (front["state"], front["tokens_in"], front["tokens_out"]) == ("done", 300, 30)
        front, _ = served.answer("late")
        assert (front["outcome"], front["tokens_in"], front["tokens_out"]) == ("timeout", 100, 10)
        by_session = {r["session"]: r for r in served.json("usage", "--by", "session")}
        assert by_session["web"]["tokens"] == 3 * CALL
        assert by_session[None]["attempts"] == 3
        by_model = {r["model"]: r["tokens"] for r in served.json("usage", "--by", "model")}
        assert by_model == {"gpt-5.5": 6 * CALL, "gpt-b": CALL}
        today = served.json("status")["today"]
        assert (today["tokens"], today["attempts"], today["limit"]) == (7 * CALL, 5, None)
        assert served.json("usage") == [{k: v for k, v in today.items() if k != "limit"}]
        assert f"{today['day']}: 5 attempts, 770 tokens (700 in" in served.run("status").stdout
        table = served.run("usage", "--by", "session").stdout.splitlines()
        assert re.split(r"\s+", table[0]) == [
            "TOKENS", "IN", "CACHED", "OUT", "REASONING", "ATTEMPTS", "SESSION",
        ]  # fmt: skip
        assert table[-1].split()[-1] == "-"
        assert served.stop() == 0
        assert f"{today['day']}: 5 attempts" in served.run("status").stdout


def test_the_limit_of_a_day_holds_the_next_task(tmp_path: Path, model: CaseModel) -> None:
    with daemon(tmp_path / "d", model, "limits:\n  day_tokens: 110\n") as served:
        served.drop("a.md", "[[say one]]\n")
        served.answer("a")
        served.drop("b.md", "[[say two]]\n")
        until(lambda: served.run("status").returncode == 69, "the gate to close")
        health = served.json("status")
        assert health["status"] == BUDGET
        assert health["gate"][BUDGET]["until"]
        assert "110 tokens were used today" in served.run("status").stdout
        assert f"{CALL} tokens of 110" in served.run("status").stdout
        assert [t["state"] for t in served.tasks()] == ["done", "queued"]
        assert served.stop() == 0
        (served.root / "codexd.yaml").write_text("http:\n  listen: off\n")
        served.start()
        served.answer("b")
        assert sum("**closed**" in line for line in served.events()) == 1


# --- the limit of a task ------------------------------------------------------------

CALLS = " ".join("[[shell sleep 1.2]]" for _ in range(8))


def test_a_task_is_stopped_when_its_tokens_are_used_up(tmp_path: Path, model: CaseModel) -> None:
    text = "retry:\n  base: 1s\nlimits:\n  task_tokens: 300\n"
    with daemon(tmp_path / "d", model, text) as served:
        served.drop("long.md", f"{CALLS} [[say end]]\n")
        served.drop("short.md", "[[shell true]] [[shell true]] [[say end]]\n")
        front, _ = served.answer("long")
        assert (front["outcome"], front["state"], front["attempts"]) == ("budget", "failed", 1)
        assert 300 <= front["tokens_in"] + front["tokens_out"] <= 300 + 2 * CALL
        assert "limits.task_tokens" in front["message"]
        front, _ = served.answer("short")  # over it at its end: the work is done
        assert (front["outcome"], front["tokens_in"] + front["tokens_out"]) == ("done", 3 * CALL)


def test_attempts_share_the_tokens_of_their_task(tmp_path: Path, model: CaseModel) -> None:
    text = "retry:\n  base: 1s\nlimits:\n  task_tokens: 150\n"
    with daemon(tmp_path / "d", model, text) as served:
        served.drop("a.md", "---\nidle_timeout: 3s\n---\n[[shell true]] [[hang]]\n")
        front, _ = served.answer("a", 60)
        assert (front["outcome"], front["attempts"]) == ("budget", 2)


def test_a_task_without_tokens_left_is_not_started(tmp_path: Path) -> None:
    from codexd.orders import Orders

    loaded = settings(tmp_path, "limits:\n  task_tokens: 100\n")
    ledger = Ledger(loaded.dirs.ledger, loaded.dirs.checkpoint)
    used = Spend(loaded.dirs.usage, Told())
    keeper = Keeper(loaded, ledger, used, Told(), Told())
    orders = Orders(loaded, keeper, Finish(loaded, used))
    task = Task(ID, created=clock.now(), launches=1, attempts=1, usage={"input_tokens": 100},
                message="no capacity", limit=3)  # fmt: skip
    (loaded.dirs.tasks / ID).mkdir()
    place.store(loaded.dirs, ID, {"request": {"prompt": "x"}})
    event = orders.order(task)
    assert (event.kind, event.facts["outcome"]) == ("failed", "budget")
    assert "limits.task_tokens" in str(event.facts["message"])
    assert "no capacity" in str(event.facts["message"])
    assert not (loaded.dirs.tasks / ID / "2").exists()
    begun = orders.order(replace(task, usage={"input_tokens": 60}))
    assert begun.kind == "running"
    written = json.loads((loaded.dirs.tasks / ID / "2" / "attempt.json").read_text())
    assert written["tokens"] == 40
    ledger.close()
