"""Killed, stopped, damaged: what a daemon finds when it starts, and makes of it.

Whatever dies, and wherever it was: no task is lost, none is run again once its
result is on disk, and what had begun goes on in its own thread with the whole
task.  State that no crash can leave behind, but a bad disk can, harms only the
task that it belongs to.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from codexd import clock, config, exits, place, spool, transcript
from codexd.directories import Directories
from codexd.evidence import Result
from codexd.exits import Ended
from codexd.finish import Finish, Finished
from codexd.ledger import Ledger
from codexd.model import Event, Kind, State, Task, apply
from codexd.outcome import Outcome
from codexd.spend import Spend
from tests.daemon import PYTHON, Daemon, read_answer, until
from tests.processes import codex_of, commands, gone, kill, worker_of
from tests.recordings import RECORDINGS
from tests.scripted_cases import CaseModel
from tests.test_failures import BEGUN, CONFIG, Seen, id_of, prepared

pytestmark = pytest.mark.xdist_group("recovery")

FAKE = Path(__file__).parent / "bin" / "codex"
UNKNOWN_THREAD = "01a20000-0000-7000-8000-000000000000"


@pytest.fixture(scope="module")
def model() -> Iterator[CaseModel]:
    with CaseModel() as model:
        yield model


@pytest.fixture
def daemon(tmp_path: Path, model: CaseModel) -> Iterator[Daemon]:
    with prepared(tmp_path / "root", model) as one:
        yield one


def kill_master(daemon: Daemon) -> None:
    """SIGKILL for the daemon alone."""
    child, daemon.child = daemon.child, None
    assert child is not None
    assert child.stdout is not None
    child.kill()
    child.wait()
    child.stdout.close()


def resumed(model: CaseModel, thread: str, text: str) -> bool:
    """Whether the thread was asked once more, told so, and given the whole task."""
    last = model.prompts(thread)[-1]
    return "An earlier attempt at the task below was interrupted" in last and last.endswith(
        f"\n---\n\n{text}\n"
    )


class Interrupted:
    """One task in its turn and one in a tool, each in a thread of its own."""

    def __init__(self, daemon: Daemon, model: CaseModel, name: str, nap: str) -> None:
        self.daemon, self.model, self.name, self.nap = daemon, model, name, f"sleep {nap}"
        self.asked = f"[[hold {name}]][[say {name} turn]]"
        self.tool = f"[[first 1 shell sleep {nap}]][[say {name} tool]]"
        daemon.drop(f"{name}-turn.md", self.asked)
        daemon.drop(f"{name}-tool.md", self.tool)
        self.turn_id = id_of(daemon, f"{name}-turn.md")
        self.tool_id = id_of(daemon, f"{name}-tool.md")
        self.thread = model.wait_held(name).thread_id
        until(self.sleeps, "the tool")

    def sleeps(self) -> bool:
        """Whether the tool is at work; before that, only its command line is there."""
        return self.nap.split() in commands().values()

    def all_gone(self) -> None:
        for text in (self.turn_id, self.tool_id, self.nap):
            gone(text)

    def finished(self, attempts: int = 1) -> None:
        self.model.release(self.name)
        front, text = self.daemon.answer(f"{self.name}-turn", 60)
        assert (text, front["attempts"]) == (f"{self.name} turn\n", attempts), front
        assert front["thread"] == self.thread
        assert resumed(self.model, self.thread, self.asked)
        front, text = self.daemon.answer(f"{self.name}-tool", 60)
        assert (text, front["attempts"]) == (f"{self.name} tool\n", attempts), front
        assert resumed(self.model, front["thread"], self.tool)


def says(path: Path, text: str) -> bool:
    return path.exists() and text in path.read_text()


# --- who is killed -----------------------------------------------------------------------


def test_the_master_alone_is_killed(daemon: Daemon, model: CaseModel) -> None:
    """The workers end by themselves and leave a result; the next master goes on from it."""
    both = Interrupted(daemon, model, "master", "7401")
    daemon.drop("behind.md", f"---\nsession: {both.turn_id}\n---\n[[say behind]]")
    id_of(daemon, "behind.md")
    kill_master(daemon)
    both.all_gone()
    for id in (both.turn_id, both.tool_id):
        result = json.loads((daemon.dirs.tasks / id / "1" / "result.json").read_text())
        assert (result["outcome"], result["stop_reason"]) == ("interrupted", "interrupted")
    daemon.start()
    both.finished()
    front, text = daemon.answer("behind")
    assert (text, front["thread"]) == ("behind\n", both.thread)
    until(lambda: not list(daemon.dirs.tasks.iterdir()), "an empty tasks/")
    assert daemon.json("session", "show", both.turn_id)["tasks"] == 2


def test_single_workers_and_single_codex_are_killed(daemon: Daemon, model: CaseModel) -> None:
    workers = Interrupted(daemon, model, "worker", "7402")
    codex = Interrupted(daemon, model, "codex", "7403")
    kill(worker_of(workers.turn_id) + worker_of(workers.tool_id))
    kill(codex_of(codex.turn_id) + codex_of(codex.tool_id))
    workers.finished()  # the host's doing: not counted
    codex.finished(attempts=2)
    for one in (workers, codex):
        one.all_gone()


def test_everything_is_killed(daemon: Daemon, model: CaseModel) -> None:
    both = Interrupted(daemon, model, "all", "7404")
    daemon.kill()
    daemon.start()
    both.finished()
    both.all_gone()


def test_killed_as_soon_as_the_thread_has_a_name(daemon: Daemon, model: CaseModel) -> None:
    """Such a thread cannot be resumed yet: Codex has not written it down."""
    daemon.drop("early.md", "[[say early]]")
    id = id_of(daemon, "early.md")
    events = daemon.dirs.tasks / id / "1" / "events.jsonl"
    until(partial(says, events, "thread.started"), "its name")
    daemon.kill()
    daemon.start()
    front, text = daemon.answer("early")
    assert (front["outcome"], text) == ("done", "early\n")


@pytest.mark.parametrize("how", ["cancel", "codex", "stop"])
def test_no_tool_gets_away_where_no_sandbox_holds_it(
    tmp_path: Path, model: CaseModel, how: str
) -> None:
    """It has a session of its own, and nothing but its descent tells whose it is."""
    nap, other = f"sleep 741{len(how)}", f"sleep 742{len(how)}"
    free = CONFIG + "codex:\n  sandbox: danger-full-access\n"
    with prepared(tmp_path / "root", model, free) as daemon:
        daemon.drop("free.md", f"[[first 1 shell setsid {nap} & {other}]][[say {how}]]")
        id = id_of(daemon, "free.md")
        until(lambda: {nap, other} <= {" ".join(argv) for argv in commands().values()}, "the tools")
        if how == "cancel":
            daemon.run("task", "cancel", id)
        elif how == "codex":
            kill(codex_of(id))
        else:
            assert daemon.stop() == 0
        gone(nap)
        gone(other)
        if how == "codex":
            assert daemon.answer("free")[1] == "codex\n"


def test_sigterm_in_the_middle_of_turns(daemon: Daemon, model: CaseModel) -> None:
    both = Interrupted(daemon, model, "stop", "7405")
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < 15
    both.all_gone()
    assert re.search(r"\*\*stopped\*\*", daemon.events()[-1])
    assert [t["state"] for t in daemon.tasks()] == ["queued", "queued"]
    daemon.start()
    both.finished()


def test_interrupted_again_and_again_a_task_has_failed(daemon: Daemon, model: CaseModel) -> None:
    daemon.drop("poison.md", "[[hold poison]]")
    task = Seen(daemon, "poison.md")
    for number in range(1, 7):
        events = daemon.dirs.tasks / task.id / str(number) / "events.jsonl"
        until(partial(says, events, "turn.started"), f"turn {number}")
        kill(worker_of(task.id))
    front, _ = daemon.answer("poison")
    assert (front["state"], front["outcome"]) == ("failed", "interrupted")
    assert front["message"] == "its worker ended without a result in the middle of the turn"
    gone(task.id)


def test_a_host_that_cannot_start_workers_gets_time(daemon: Daemon, model: CaseModel) -> None:
    """The lock of the worker cannot be made, as when a process or a file too many is asked for."""
    id = "20990101t000000-refused000"
    in_the_way = daemon.dirs.run / "workers" / f"{id}.lock"
    in_the_way.mkdir()
    daemon.drop(f"{id}.md", "[[say started at last]]")
    until(lambda: daemon.log.read_text().count("worker.refused") >= 2, "two refusals")
    shown = daemon.json("task", "show", id)
    assert shown["state"] in ("queued", "running")
    assert "host" in daemon.json("status")["gate"]
    in_the_way.rmdir()
    assert until(lambda: daemon.json("task", "show", id)["answer"], "its answer") == (
        "started at last"
    )
    assert daemon.json("task", "show", id)["attempts"] == 1
    assert "host" not in daemon.json("status")["gate"]


NO_ROOM = """#!/bin/sh
# The first turn's worker finds a directory where it wants to write its result.
at=$(dirname "$(readlink /proc/self/fd/0)")
[ "$1" != exec ] || [ "${at##*/}" != 1 ] || mkdir "$at/.result.json.$PPID.tmp"
exec "$FAKE" "$@"
"""


@pytest.mark.parametrize(("mode", "attempts"), [("answer", 1), ("no-terminal,answer", 2)])
def test_no_room_for_a_result_is_the_hosts_fault(tmp_path: Path, mode: str, attempts: int) -> None:
    """It was no kill, after which the turn would be run again at once; what is done is done."""
    codex = tmp_path / "codex"
    codex.write_text(NO_ROOM.replace("$FAKE", str(FAKE)))
    codex.chmod(0o755)
    one = Daemon(tmp_path / "root", config=f"codex:\n  bin: {codex}\n{CONFIG}")
    (one.dirs.codex_home / "fake.json").write_text(json.dumps({"mode": mode}))
    with one:
        one.drop("t.md", "Do it.")
        front, _ = one.answer("t", 60)
        assert (front["outcome"], front["attempts"]) == ("done", attempts), front
        waits = [line for line in one.events() if "**waiting**" in line]
        if attempts == 1:
            assert front["message"].startswith("the turn was complete when its worker ended")
            assert not waits
        else:
            (told,) = waits
            assert 'reason="host"' in told
            assert "its worker could not read or write its directory" in told
        assert one.log.read_text().count("result.json could not be written") == 1
        assert "Traceback" not in one.log.read_text()


# --- what is made of what an attempt left -------------------------------------------------

ID = "20261123t072011-k3f9qa7x2m"


class Judge:
    """The master's judge, and a task whose first attempt has ended."""

    def __init__(self, root: Path, **facts: object) -> None:
        self.dirs = Directories.below(root)
        self.config = config.load(self.dirs, explicit=False)
        spool.prepare(self.dirs)
        ran = Task(ID, State.RUNNING, launches=1, attempts=1, created=clock.now(), workdir="/")
        self.task = replace(ran, **facts)  # type: ignore[arg-type]
        self.at = self.dirs.tasks / ID / "1"
        self.at.mkdir(parents=True)
        self.told: list[str] = []
        used = Spend(self.dirs.usage, self.log)
        self.finish = Finish(self.config, used, self.log)

    def log(self, event: str, **_: object) -> None:
        self.told.append(event)

    def left(self, **result: object) -> Finished:
        (self.at / "started").touch()
        (self.at / "result.json").write_text(json.dumps(result))
        return self.finish.judge(self.task)


def test_a_worker_that_did_not_start_again_gets_time(tmp_path: Path) -> None:
    assert Judge(tmp_path / "a").finish.judge(Judge(tmp_path / "b").task).event.kind is Kind.QUEUED
    again = Judge(tmp_path / "c", interruptions=1)
    found = again.finish.judge(again.task)
    assert (found.event.kind, found.delay > 0) == (Kind.WAITING, True)


def test_a_turn_in_another_thread_than_the_one_asked_for_is_not_done_twice(tmp_path: Path) -> None:
    one = Judge(tmp_path)
    found = one.left(outcome="thread-lost", turn_started=True, exit_status=0)
    assert (found.event.kind, found.event.facts["outcome"]) == (Kind.FAILED, "unknown")


def test_nor_is_a_turn_that_was_cut_short_there_resumed_there(tmp_path: Path) -> None:
    one = Judge(tmp_path, session="web", thread=UNKNOWN_THREAD)
    other = UNKNOWN_THREAD.replace("0", "1")
    found = one.left(outcome="stall", thread=other, turn_started=True, exit_status=-2)
    assert apply(one.task, found.event).thread == UNKNOWN_THREAD
    assert one.finish.session("web").thread is None


@pytest.mark.parametrize("result", [{}, {"outcome": "well done"}, {"outcome": ["done"]}])
def test_a_result_without_a_known_outcome_is_not_done(
    tmp_path: Path, result: dict[str, object]
) -> None:
    facts = Judge(tmp_path).left(**result).event.facts
    assert facts["outcome"] == "unknown"
    assert "names no known outcome" in str(facts["message"])


@pytest.mark.parametrize("orders", ["{", None, '{"verify": {"command": "make"}}'])
def test_whether_a_killed_worker_had_to_check_is_not_guessed(
    tmp_path: Path, orders: str | None
) -> None:
    one = Judge(tmp_path)
    (one.at / "started").touch()
    if orders:
        (one.at / "attempt.json").write_text(orders)
    said = {"type": "agent_message", "id": "i", "text": "yes"}
    events = [
        {"type": "turn.started"}, {"type": "item.completed", "item": said},
        {"type": "turn.completed", "usage": {}},
    ]  # fmt: skip
    (one.at / "events.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in events))
    assert one.finish.evidence.result(one.task).outcome is Outcome.INTERRUPTED
    (one.at / "attempt.json").write_text('{"verify": null}')
    assert one.finish.evidence.result(one.task).outcome is Outcome.DONE


def ended_in(one: Judge, events: bytes) -> Result:
    """What is made of an attempt that Codex said this in, and that left no result."""
    (one.at / "started").touch()
    (one.at / "attempt.json").write_text('{"verify": null}')
    (one.at / "events.jsonl").write_bytes(events)
    return one.finish.evidence.result(one.task)


def test_a_conversation_that_was_not_kept_is_not_done(tmp_path: Path) -> None:
    """The disk was full for Codex, and then for the worker's own result."""
    events = RECORDINGS["home_disk_full_200k"].stdout
    found = ended_in(Judge(tmp_path), events)
    assert found.outcome is Outcome.HOST
    assert "Failed to save the conversation transcript" in found.message


@pytest.mark.parametrize(("text", "outcome"), [("yes", Outcome.DONE), (" \n", Outcome.NO_ANSWER)])
def test_a_turn_without_a_result_is_judged_as_its_worker_would(
    tmp_path: Path, text: str, outcome: Outcome
) -> None:
    said = {"type": "agent_message", "id": "i", "text": text}
    events = [{"type": "item.completed", "item": said}, {"type": "turn.completed", "usage": {}}]
    told = "".join(f"{json.dumps(e)}\n" for e in events).encode()
    assert ended_in(Judge(tmp_path), told).outcome is outcome


@pytest.mark.parametrize(
    ("left", "acted"),
    [([], False), (["started"], True), (["started", "result.json"], False), (None, True)],
)
def test_an_attempt_without_a_result_may_have_acted(
    tmp_path: Path, left: list[str] | None, acted: bool
) -> None:
    """Its events may have been lost: on a full disk, and in a power cut."""
    one = Judge(tmp_path)
    for name in left or []:
        (one.at / name).write_text('{"outcome": "quota"}')
    if left is None:
        one.at.rmdir()
    assert one.finish.evidence.acted(one.task) == (acted, "")


def test_the_exit_record_says_who_ended_a_turn(tmp_path: Path) -> None:
    one = Judge(tmp_path)
    (one.at / "started").touch()
    found = one.finish.evidence.result(
        one.task, Ended("oom-kill", "killed", "KILL", boot=exits.boot())
    )
    assert found.outcome is Outcome.OOM


def test_what_is_no_transcript_is_kept_aside_for_a_new_one(tmp_path: Path) -> None:
    one = Judge(tmp_path, session="web")
    path = one.dirs.transcripts / "web.jsonl"
    path.mkdir()
    assert one.left(outcome="done", answer="yes", exit_status=0).event.kind is Kind.DONE
    assert one.told == ["transcript.damaged"]
    assert transcript.last(path, 9)[-1]["text"] == "yes"


@pytest.mark.parametrize(
    ("state", "status", "kinds"),
    [
        (State.RUNNING, "done", ["done"]),
        (State.QUEUED, "done", ["running", "done"]),
        (State.WAITING, "done", ["queued", "running", "done"]),
        (State.WAITING, "cancelled", ["cancelled"]),
        (State.RUNNING, "running", ["failed"]),
        (State.RUNNING, "over", ["failed"]),
    ],
)
def test_whose_last_line_was_damaged_is_told_again_and_not_run(
    tmp_path: Path, state: State, status: str, kinds: list[str]
) -> None:
    one = Judge(tmp_path, state=state)
    shelf = place.archived(one.dirs, ID)
    shelf.parent.mkdir()
    (one.dirs.tasks / ID).rename(shelf)
    (shelf / "status.json").write_text(json.dumps({"id": ID, "state": status, "outcome": status}))
    events, task = one.finish.retold(one.task), one.task
    assert [event.kind.value for event in events] == kinds
    for event in events:
        task = apply(task, event)  # or the ledger would refuse them
    if kinds == ["failed"]:
        assert "status.json is damaged: " in str(events[0].facts["message"])


def test_a_wait_that_ended_while_nobody_served_is_over(tmp_path: Path) -> None:
    one = Daemon(tmp_path / "root", config=f"codex:\n  bin: {FAKE}\nhttp:\n  listen: off\n")
    waits: dict[str, object] = {"until": "2026-11-23T07:21:00.000Z", "reason": "transient"}
    ran: dict[str, object] = {"launches": 1, "attempts": 1}
    lines = (Kind.QUEUED, {}), (Kind.RUNNING, ran), (Kind.WAITING, waits)
    one.left(ID, *lines, at="2026-11-23T07:20:11.123Z", outcome="transient")
    with one:
        path = one.dirs.answers / f"{ID}.md"
        until(path.exists, "the answer")
        front, _ = read_answer(path)
    assert (front["state"], front["attempts"]) == ("done", 2)


# --- where it was, as a crash leaves it on disk --------------------------------------------


class Disk:
    """The state of a daemon that was killed, changed to what another moment would leave."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.dirs = daemon, daemon.dirs

    def forget(self, id: str, *kinds: str) -> None:
        """Take the task's lines of these kinds out of the ledger."""
        lines = self.dirs.ledger.read_bytes().splitlines(keepends=True)
        wanted = [f"`{id}` **{kind}**".encode() for kind in kinds]
        kept = [line for line in lines if not any(mark in line for mark in wanted)]
        assert len(kept) < len(lines)
        self.dirs.ledger.write_bytes(b"".join(kept))

    def say(self, *events: Event) -> None:
        ledger = Ledger(self.dirs.ledger, self.dirs.checkpoint)
        ledger.append(list(events))
        ledger.close()

    def running(self, id: str, started: bool, *lines: str) -> None:
        """A queued task as it is after the ledger's line, or after the start of Codex."""
        home = self.dirs.tasks / id / "1"
        home.mkdir()
        (home / "attempt.json").write_text('{"attempt": 1}')
        facts = {"launches": 1, "attempts": 1}
        self.say(Event("2026-01-01T00:00:00.000Z", Kind.RUNNING, id, facts))
        if started:
            (home / "started").touch()
        if lines:
            (home / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def unarchive(self, id: str) -> Path:
        """An ended task as it was before it was moved to the archive."""
        home = self.dirs.tasks / id
        place.archived(self.dirs, id).rename(home)
        return home


def held_tasks(daemon: Daemon, names: list[str]) -> dict[str, str]:
    """Tasks that are accepted and must not start yet; their ids."""
    daemon.run("hold")
    until(lambda: "**closed**" in daemon.dirs.ledger.read_text(), "the gate closed")
    for name in names:
        daemon.drop(f"{name}.md", f"[[say {name}]]")
    ids = {name: id_of(daemon, f"{name}.md") for name in names}
    until(lambda: not list(daemon.dirs.inbox.iterdir()), "an empty inbox")
    return ids


def test_every_moment_of_a_crash(daemon: Daemon, model: CaseModel) -> None:
    ended = ["judged", "said", "unsaid"]
    for name in ended:
        daemon.drop(f"{name}.md", f"---\nsession: s-{name}\n---\n[[say {name}]]")
    done = {name: id_of(daemon, f"{name}.md") for name in ended}
    for name in ended:
        assert daemon.answer(name)[0]["state"] == "done"
    until(lambda: not list(daemon.dirs.tasks.iterdir()), "the archive")
    moments = ["stored", "accepted", "ordered", "started", "named"]
    ids = held_tasks(daemon, moments)
    daemon.kill()
    disk, dirs = Disk(daemon), daemon.dirs
    # a name written down, the file not yet renamed; then renamed
    for id, name in (
        ("20990101t000000-claimed000", "noted"),
        ("20990101t000000-renamed000", "taken"),
    ):
        (dirs.tasks / id).mkdir()
        (dirs.tasks / id / "name").write_text(f"{name}.md")
        target = f"{name}.md" if name == "noted" else f".take-{id}"
        (dirs.inbox / target).write_text(f"[[say {name}]]")
    # stored, and not yet in the ledger; in the ledger, and the file still there
    disk.forget(ids["stored"], "queued")
    for name in ("stored", "accepted"):
        (dirs.inbox / f".take-{ids[name]}").write_text(f"[[say {name}]]")
    # about to be run
    disk.running(ids["ordered"], False)
    disk.running(ids["started"], True)
    thread = json.dumps({"type": "thread.started", "thread_id": UNKNOWN_THREAD})
    disk.running(ids["named"], True, thread)
    # ended, but not in the ledger: with and without what is written before; not archived
    home = disk.unarchive(done["judged"])
    disk.forget(done["judged"], "done")
    home = disk.unarchive(done["unsaid"])
    disk.forget(done["unsaid"], "done")
    (home / "status.json").unlink()
    for path in (dirs.answers / f"unsaid.{done['unsaid']}.md", dirs.sessions / "s-unsaid.json"):
        path.unlink()
    (dirs.transcripts / "s-unsaid.jsonl").write_text('{"torn": ')
    disk.unarchive(done["said"])
    daemon.start()
    daemon.run("release")
    for name in [*ended, *moments, "noted", "taken"]:
        front, text = daemon.answer(name)
        assert (front["outcome"], text, front["attempts"]) == ("done", f"{name}\n", 1), front
        assert len(model.asked(f"[[say {name}]]")) == 1  # none was run twice
    assert daemon.answer("accepted")[0]["id"] == ids["accepted"]
    assert daemon.answer("stored")[0]["id"] == ids["stored"]
    assert daemon.answer("named")[0]["thread"] != UNKNOWN_THREAD
    # which of them may have been at work is known, also where nothing tells of it
    for name in ("ordered", "started", "named"):
        (turn,) = model.asked(f"[[say {name}]]")
        assert (BEGUN in turn.prompt) == (name != "ordered"), name
    for name in ended:
        shown = daemon.json("session", "show", f"s-{name}")
        assert (shown["tasks"], shown["usage"]["input_tokens"]) == (1, 100)
        said = (dirs.transcripts / f"s-{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["role"] for line in said] == ["user", "assistant"]
    until(lambda: not list(dirs.tasks.iterdir()), "an empty tasks/")
    assert not list(dirs.inbox.iterdir())
    assert len(daemon.tasks()) == 10


# --- two daemons, and those who only ask -------------------------------------------------------


def test_a_second_daemon_and_an_ask_disturb_nobody(daemon: Daemon, model: CaseModel) -> None:
    daemon.drop("only.md", "[[hold only]][[say only once]]")
    model.wait_held("only")
    command = [PYTHON, "-m", "codexd.cli", "--root", str(daemon.root), "serve"]
    second = subprocess.Popen(
        command, env=daemon.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    asked = daemon.run("ask", "[[say an answer beside it]]")
    assert (asked.returncode, asked.stdout) == (0, "an answer beside it\n")
    out, err = second.communicate(timeout=20)
    assert (second.returncode, out) == (69, "")
    assert f'already.served why="another codexd serves {daemon.root}; stop that one' in err
    model.release("only")
    front, text = daemon.answer("only")
    assert (text, front["attempts"]) == ("only once\n", 1)
    assert len(model.asked("[[say only once]]")) == 1


def test_asking_a_daemon_that_is_down_changes_nothing(daemon: Daemon, model: CaseModel) -> None:
    daemon.drop("alone.md", "[[hold alone]][[say alone]]")
    model.wait_held("alone")
    daemon.kill()
    before = daemon.dirs.ledger.read_bytes()
    # A heartbeat is believed for a while; long enough to submit and to wait.
    asked = daemon.run("ask", "--timeout", "1s", "[[say later]]")
    assert asked.returncode in (69, 75)
    assert asked.stdout == ""
    for verb in ("status", "task list", "session list"):
        daemon.run(*verb.split())
    assert daemon.dirs.ledger.read_bytes() == before
    assert not list(daemon.dirs.tasks.glob("*/2"))
    daemon.start()
    model.release("alone")
    assert daemon.answer("alone")[1] == "alone\n"


# --- what no crash leaves behind ----------------------------------------------------------------


def flip(path: Path, wanted: str) -> None:
    """One bit of the one line that has this in it."""
    lines = path.read_bytes().splitlines(keepends=True)
    (number,) = [n for n, line in enumerate(lines) if wanted.encode() in line]
    line = lines[number]
    lines[number] = line[:10] + bytes([line[10] ^ 1]) + line[11:]
    path.write_bytes(b"".join(lines))


def damage_each(daemon: Daemon, ids: dict[str, str]) -> None:
    disk, dirs = Disk(daemon), daemon.dirs
    tasks = dirs.tasks
    (tasks / ids["garbage"] / "task.json").write_bytes(b"\x00\xff{ not JSON")
    (tasks / ids["empty"] / "task.json").write_text("")
    (tasks / ids["strange"] / "task.json").write_text('{"request": {"prompt": []}}')
    (tasks / ids["gone"] / "task.json").unlink()
    for entry in (tasks / ids["vanished"]).iterdir():
        entry.unlink()
    (tasks / ids["vanished"]).rmdir()
    for name in ("result", "attempt", "orders", "asked"):
        disk.running(ids[name], started=True)
    (tasks / ids["result"] / "1" / "result.json").write_bytes(b"\xff\xfe\x00garbage")
    for name in ("attempt.json", "started"):
        (tasks / ids["attempt"] / "1" / name).unlink()
    (tasks / ids["attempt"] / "1").rmdir()
    (tasks / ids["orders"] / "1" / "attempt.json").write_bytes(b"\xff")
    result = {"outcome": "done", "message": "", "answer": "asked", "exit_status": 0}
    (tasks / ids["asked"] / "1" / "result.json").write_text(json.dumps(result))
    (tasks / ids["asked"] / "task.json").write_bytes(b"\xff")


def damage_the_rest(daemon: Daemon) -> None:
    dirs = daemon.dirs
    (dirs.tasks / "stray.txt").write_text("what is this?")
    (dirs.tasks / "strange" / "and" / "deep").mkdir(parents=True)
    (dirs.tasks / "20990101t000000-nothing000").mkdir()
    (dirs.tasks / "20990101t000000-foreign000" / "deep").mkdir(parents=True)
    (dirs.tasks / "20990101t000000-fileonly00").write_text("a file")
    for home in (dirs.tasks, dirs.archive / "2099-01"):
        (home / "20990101t000000-twice00000").mkdir(parents=True)
        (home / "20990101t000000-twice00000" / "status.json").write_text("{}")
    dirs.checkpoint.write_bytes(b'{"format": 1, "offset": "nine"}')
    dirs.heartbeat.write_bytes(b"\xff" * 100_000)
    (dirs.run / "workers" / "junk.lock").write_text("junk")
    (dirs.archive / "junk").write_text("junk")
    (dirs.answers / ".half.123.tmp").write_text("half an answer")
    (dirs.inbox / ".take-20990101t000000-unknown000").write_text("[[say a foundling]]")
    (dirs.inbox / ".take-junk").write_text("junk")
    with open(dirs.ledger, "ab") as ledger:
        ledger.write(b"- 2026-01-01T00:00:00.000Z `torn")


NAMES = [
    "garbage", "empty", "strange", "gone", "vanished", "result", "attempt", "orders", "asked",
    "unknown", "well",
]  # fmt: skip


def test_damage_of_every_kind_harms_only_what_it_touches(
    daemon: Daemon, model: CaseModel, tmp_path: Path
) -> None:
    for name in ("kept", "json", "lost", "log", "queued"):
        daemon.drop(f"{name}.md", f"---\nsession: {name}\n---\n[[say {name}]]")
        assert daemon.answer(name)[0]["state"] == "done"
    old = {name: daemon.json("session", "show", name) for name in ("json", "lost", "log", "kept")}
    ids = held_tasks(daemon, NAMES)
    daemon.kill()
    dirs = daemon.dirs
    damage_each(daemon, ids)
    damage_the_rest(daemon)
    flip(dirs.ledger, f"`{id_of(daemon, 'lost.md')}` **done**")  # it has ended
    flip(dirs.ledger, f"`{id_of(daemon, 'queued.md')}` **running**")
    flip(dirs.ledger, f"`{ids['unknown']}` **queued**")  # it was accepted
    (dirs.sessions / "json.json").write_bytes(b"\xff garbage")
    (dirs.transcripts / "log.jsonl").write_bytes(b"\xff\xff\x00\n{}\n[1, 2]\nnull\n{")
    daemon.start()
    daemon.run("release")
    log = daemon.log.read_text()
    # those that are damaged have ended, and say why
    for name in ("garbage", "empty", "strange", "gone", "vanished"):
        front, text = daemon.answer(name)
        assert (front["state"], front["outcome"], text) == ("failed", "config", ""), front
        assert f"{ids[name]}/task.json is damaged: " in front["message"]
    front, _ = daemon.answer("result")
    assert (front["state"], front["outcome"]) == ("failed", "unknown")
    assert f"{ids['result']}/1/result.json is damaged and was not" in front["message"]
    # what can be mended was
    for name in ("attempt", "orders", "well", "asked"):
        front, text = daemon.answer(name)
        assert (front["state"], front["outcome"], text) == ("done", "done", f"{name}\n"), front
    assert not model.asked("[[say asked]]")
    # what had ended has ended, and is not run again
    for name in ("lost", "queued"):
        front, text = daemon.answer(name)
        assert (front["state"], text) == ("done", f"{name}\n")
        assert len(model.asked(f"[[say {name}]]")) == 1
        shown = daemon.json("task", "show", str(front["id"]))
        assert (shown["state"], shown["answer"]) == ("done", name)
    assert not any(t["state"] in ("running", "waiting", "queued") for t in daemon.tasks())
    # sessions go on; the damaged one in a new thread
    for name in old:
        daemon.drop(f"{name}-2.md", f"---\nsession: {name}\n---\n[[say {name} again]]")
    for name in old:
        front, text = daemon.answer(f"{name}-2")
        assert text == f"{name} again\n"
        assert (front["thread"] == old[name]["thread"]) == (name != "json")
    assert (dirs.sessions / "json.damaged").exists()
    # a file that says it was taken is looked at as if it had just been dropped
    assert (dirs.answers / "20990101t000000-unknown000.md").exists()
    # the log tells of each
    assert log.count("ledger.damaged") == 3, log
    assert re.search(rf"task\.unknown task={ids['unknown']}", log)
    assert re.search(r"not\.ours path=\S*/stray\.txt", log)
    assert re.search(r"not\.ours path=\S*/strange", log)
    assert re.search(r"not\.tidied task=\S+ path=\S*-twice00000 why=.*not empty", log)
    assert "ledger.torn" in log
    assert "session.damaged" in daemon.log.read_text()
    assert (dirs.tasks / "stray.txt").exists()
    status = daemon.run("status")
    assert status.returncode == 1
    told = "\nledger: 3 damaged lines; see codexd ledger verify\n"
    assert told in status.stdout
    # and the next start finds nothing new to say
    assert daemon.stop() == 0
    daemon.start()
    assert told in daemon.run("status").stdout


# --- cancelled, and yet in the queue ----------------------------------------------------------

BROKEN: dict[str, object] = {"outcome": "host", "message": "no sandbox here", "gate": True}
CANCEL = (Kind.STOPPING, {"cancel": True})


@pytest.mark.parametrize("again", [False, True])
def test_a_cancelled_task_stays_cancelled(daemon: Daemon, again: bool) -> None:
    """What it met on its way holds the others; an older version let it into the queue again."""
    daemon.kill()
    id, at = "20261123t072011-cancelled0", "2026-11-23T07:20:11.123Z"
    runs: tuple[Kind, dict[str, object]] = (Kind.RUNNING, {"launches": 1, "attempts": 1})
    events = [(Kind.QUEUED, {}), runs, CANCEL, *([(Kind.QUEUED, {})] if again else [])]
    daemon.left(id, *events, at=at, ended=at, **BROKEN)  # type: ignore[arg-type]
    daemon.start()
    until(lambda: daemon.json("task", "show", id)["outcome"], "its end")
    told = daemon.json("task", "show", id)
    assert (told["state"], told["message"]) == ("cancelled", "cancelled on request")
    assert sum("**running**" in line for line in daemon.events()) == 1
    closed = [line for line in daemon.events() if "**closed**" in line]
    assert len(closed) == (0 if again else 1)
    assert all("no sandbox here" in line for line in closed)
