"""Killed at every event of a turn: the model gets the whole task in the end, and the answer
is that of the resumed turn.

Worker, Codex, or both are killed when the real CLI has just printed the event, in the
first turn of a thread and in a later one.  Two events the stand-in prints instead:
`item.updated`, because the CLI of today offers its model no plan, and `turn.completed`,
because it exits at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from codexd.replies import (
    Answer,
    Turn,
    call_shell,
    completed,
    message,
    new_file,
    patch,
    slow,
)  # fmt: skip
from tests.daemon import Daemon, until
from tests.processes import codex_of, gone, kill, worker_of
from tests.scripted_cases import CaseModel
from tests.test_failures import front_matter, id_of, prepared

pytestmark = pytest.mark.xdist_group("every-event")

FAKE = Path(__file__).parent / "bin" / "codex"
CONFIG = "workers: 16\nretry:\n  base: 1s\n  cap: 1s\nhttp:\n  listen: off\n"
Event = dict[str, Any]


def _is(kind: str, item: str = "") -> Callable[[Event], bool]:
    return lambda event: event["type"] == kind and (not item or event["item"]["type"] == item)


# where the end comes, and at which step the model holds its breath for it
EVENTS: dict[str, tuple[Callable[[Event], bool], int]] = {
    "thread.started": (_is("thread.started"), 0),
    "turn.started": (_is("turn.started"), 0),
    "item.started": (_is("item.started", "command_execution"), 1),
    "item.completed": (_is("item.completed", "command_execution"), 2),
    "file_change": (_is("item.completed", "file_change"), 4),
    "before turn.completed": (_is("item.completed", "agent_message"), 3),
}
WHO: dict[str, Callable[[str], list[int]]] = {
    "worker": worker_of,
    "codex": codex_of,
    "both": lambda id: [*worker_of(id), *codex_of(id)],
}
CASES = [(event, who, turn) for event in EVENTS for who in WHO for turn in ("first", "later")]


class Halting(CaseModel):
    """Plays a command and a message, and stops for ever at the step that the task names;
    a turn that resumes is answered."""

    def __init__(self) -> None:
        super().__init__()
        self.killed: set[str] = set()

    def _play(self, turn: Turn) -> Answer:
        halt = re.search(r"^HALT (\d+) (\d)$", turn.prompt, re.MULTILINE)
        if not halt:
            return super()._play(turn)
        name, at = halt[1], int(halt[2])
        # Killed early, the next attempt is in a new thread, and may not be told of the one before.
        if "An earlier attempt" in turn.prompt or name in self.killed:
            return [message(f"resumed {name}"), completed()]
        if at == 0:
            return slow(self._hold(f"never {name}", turn), [message("too late")])
        if not turn.tool_outputs and at == 4:
            return patch(turn, new_file(f"{name}.txt", "half"))
        if not turn.tool_outputs:
            return call_shell(turn, "sleep 60" if at == 1 else "true")
        door = self._hold(f"never {name}", turn)
        if at in (2, 4):
            return slow(door, [message("too late")])
        return [message(f"cut short {name}"), door, completed()]


@pytest.fixture(scope="module")
def model() -> Iterator[Halting]:
    with Halting() as model:
        yield model


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, model: Halting) -> Iterator[Daemon]:
    with prepared(tmp_path_factory.mktemp("events") / "root", model, CONFIG) as one:
        yield one


def said(daemon: Daemon, id: str) -> list[Event]:
    """The events of its first attempt, those that are whole."""
    path = daemon.dirs.tasks / id / "1" / "events.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize(("event", "who", "turn"), CASES)
def test_killed_at_an_event(
    daemon: Daemon, model: Halting, event: str, who: str, turn: str
) -> None:
    is_it, step = EVENTS[event]
    name = f"{CASES.index((event, who, turn))}"
    options = f"session: s{name}"
    if turn == "later":
        daemon.drop(f"seed{name}.md", front_matter(options) + "[[say begun]]")
        seed = daemon.answer(f"seed{name}")[0]["thread"]
    asked = f"Do all of this.\nHALT {name} {step}"
    daemon.drop(f"t{name}.md", front_matter(options) + asked)
    id = id_of(daemon, f"t{name}.md")
    until(lambda: any(map(is_it, said(daemon, id))), event)
    before = said(daemon, id)
    if step > 1:
        model.wait_held(f"never {name}")  # else this attempt could still be answered
    model.killed.add(name)
    kill(WHO[who](id))
    front, text = daemon.answer(f"t{name}", 60)
    # Codex alone, killed by somebody: that counts.  The worker: that is the host's doing.
    counted = 2 if who == "codex" else 1
    assert (front["state"], front["outcome"]) == ("done", "done"), front
    assert text == f"resumed {name}\n"
    assert front["attempts"] == counted, front
    prompts = model.prompts(front["thread"])
    assert prompts[-1].endswith(f"\n---\n\n{asked}\n")
    if turn == "later":
        assert front["thread"] == seed
        assert prompts[0].endswith("[[say begun]]\n")
    if event not in ("thread.started", "turn.started"):
        assert front["thread"] == before[0]["thread_id"]
        assert "An earlier attempt" in prompts[-1]
    assert not any(e["type"] == "turn.completed" for e in before)
    gone(id)


# --- the last event, and one of old versions ------------------------------------------------

# the event, who is killed, the task's check: what the attempt comes to, its message, attempts
LAST = {
    "completed, worker": ("turn.completed", "worker", "", "done", "the turn was complete when", 1),
    "completed, both": ("turn.completed", "both", "", "done", "the turn was complete when", 1),
    "completed, codex": ("turn.completed", "codex", "", "signal", "killed by signal 9", 2),
    "completed, unchecked": (
        "turn.completed", "worker", "verify: {command: 'true', rounds: 1}", "interrupted",
        "before the task's check had passed", 1,
    ),
    "updated, worker": ("item.updated", "worker", "", "interrupted", "in the middle of the tur", 1),
    "updated, codex": ("item.updated", "codex", "", "signal", "killed by signal 9", 2),
}  # fmt: skip


@pytest.mark.parametrize("case", LAST)
def test_killed_at_an_event_of_the_stand_in(tmp_path: Path, case: str) -> None:
    event, who, options, outcome, words, attempts = LAST[case]
    effects = tmp_path / "effects"
    mode = "hang-completed" if event == "turn.completed" else "hang-updated"
    with Daemon(tmp_path / "root", config=f"codex:\n  bin: {FAKE}\n{CONFIG}") as daemon:
        settings = {"mode": f"{mode},answer", "effects": str(effects)}
        (daemon.dirs.codex_home / "fake.json").write_text(json.dumps(settings))
        daemon.drop("t.md", front_matter(options) + "Do all of this.")
        id = id_of(daemon, "t.md")
        until(lambda: any(map(_is(event), said(daemon, id))), event)
        kill(WHO[who](id))
        front, text = daemon.answer("t", 60)
        assert (front["state"], front["attempts"]) == ("done", attempts), front
        starts = [line.split()[0] for line in effects.read_text().splitlines()]
        if outcome == "done":
            assert starts == ["new"], "what was complete is not run again"
            assert words in front["message"]
            assert text.startswith("answer 1 to ")
        else:
            assert starts == ["new", front["thread"]]
            (back,) = (e for e in daemon.events() if f'reason="{outcome}"' in e and id in e)
            assert words in back
        if event == "item.updated":
            told = (daemon.dirs.transcripts / f"{id}.jsonl").read_text().splitlines()
            assert json.loads(told[1])["text"] == "First I look.", "it was read, and is kept"
        gone(id)
