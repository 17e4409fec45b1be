"""The main job on the real Codex CLI: from a dropped file to an answer."""

from __future__ import annotations

import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from codexd.scripted import ScriptedModel
from tests.daemon import Daemon, read_answer, until
from tests.scripted_cases import CaseModel

pytestmark = pytest.mark.timeout(400)  # as patient as its answers

SESSIONS, EACH = 20, 10


@pytest.fixture
def model() -> Iterator[CaseModel]:
    with CaseModel() as model:
        yield model


@pytest.fixture
def daemon(tmp_path: Path, model: ScriptedModel) -> Iterator[Daemon]:
    one = Daemon(tmp_path / "root", model.environment())
    model.write_config(one.dirs.codex_home)
    with one:
        yield one


def test_a_dropped_file_becomes_an_answer(daemon: Daemon) -> None:
    daemon.drop("greet.md", "---\nsession: web\n---\n[[say Good morning.]]\n")
    front, text = daemon.answer("greet")
    assert text == "Good morning.\n"
    assert front["state"] == front["outcome"] == "done"
    assert front["file"] == "greet.md"
    assert front["session"] == "web"
    assert front["attempts"] == 1
    assert front["tokens_in"] > 0


def test_tasks_of_one_session_share_one_thread(daemon: Daemon) -> None:
    daemon.drop("1.md", "---\nsession: a/b\n---\nPlease remember the word PELICAN for me.\n")
    daemon.drop("2.md", "---\nsession: a/b\n---\nWhich word was it?\n")
    daemon.drop("3.md", "---\nsession: a_b\n---\nWhich word was it?\n")
    assert daemon.answer("2")[1] == "PELICAN\n"
    assert daemon.answer("1")[0]["thread"] == daemon.answer("2")[0]["thread"]
    assert "PELICAN" not in daemon.answer("3")[1]
    assert daemon.answer("3")[0]["thread"] != daemon.answer("1")[0]["thread"]
    assert len(list(daemon.dirs.transcripts.iterdir())) == 2


def drop_all(daemon: Daemon) -> None:
    """200 files over 20 sessions; each session's in the order of its numbers."""
    for number in range(EACH):
        for session in range(SESSIONS):
            text = f"---\nsession: s{session}\n---\n[[say answer {session}.{number}]]\n"
            daemon.drop(f"t{number:02}-{session:02}.md", text)


def check_all(daemon: Daemon, model: CaseModel) -> None:
    """200 right answers, one thread a session, its tasks in order, never two at once."""
    threads = defaultdict(set)
    for number in range(EACH):
        for session in range(SESSIONS):
            front, text = daemon.answer(f"t{number:02}-{session:02}", 240)
            assert text == f"answer {session}.{number}\n"
            assert front["state"] == "done", front
            threads[session].add(front["thread"])
    assert all(len(found) == 1 for found in threads.values()), threads
    assert len(set().union(*threads.values())) == SESSIONS
    assert not model.overlaps()
    for session, (thread,) in threads.items():
        asked = [int(marks(prompt)[-1][1]) for prompt in model.prompts(thread)]
        assert asked == sorted(asked), (session, asked)


def marks(prompt: str) -> list[tuple[str, str]]:
    """Session and number of each task that a prompt names; the last is its own."""
    return re.findall(r"\[\[say answer (\d+)\.(\d+)", prompt)


def times_asked(model: CaseModel) -> Counter[tuple[str, str]]:
    return Counter(marks(turn.prompt)[-1] for turn in list(model.turns))


def states(daemon: Daemon) -> Counter[str]:
    return Counter(t["state"] for t in daemon.tasks())


def test_two_hundred_files_over_twenty_sessions(daemon: Daemon, model: CaseModel) -> None:
    drop_all(daemon)
    check_all(daemon, model)
    until(lambda: states(daemon) == {"done": SESSIONS * EACH}, "the last lines of the ledger")
    assert len(model.turns) == SESSIONS * EACH
    until(lambda: not list(daemon.dirs.tasks.iterdir()), "everything in the archive")
    assert not list(daemon.dirs.inbox.iterdir())


def test_kill_everything_three_times_in_the_middle(daemon: Daemon, model: CaseModel) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    drop_all(daemon)
    settled: dict[tuple[str, str], int] = {}
    for _ in range(3):
        goal = len(list(daemon.dirs.answers.iterdir())) + chance.randrange(15, 40)
        until(lambda g=goal: len(list(daemon.dirs.answers.iterdir())) >= g, "some answers", 120)
        time.sleep(chance.random() * 0.3)
        daemon.kill()
        times = times_asked(model)
        for path in daemon.dirs.answers.iterdir():
            mark = marks("[[say " + read_answer(path)[1])[0]
            settled.setdefault(mark, times[mark])
        daemon.start()
    check_all(daemon, model)
    times = times_asked(model)
    assert {mark: times[mark] for mark in settled} == settled  # none was asked for again
    until(lambda: states(daemon) == {"done": SESSIONS * EACH}, "the last lines of the ledger")
    assert any("earlier attempt" in turn.prompt for turn in model.turns)
