"""Every failure at every point of a turn, in the first attempt and in a resumed one.

What is expected is what `policy.TABLE` says of the outcome: the class, the next step and
the final state, as the ledger tells them.  One daemon has all that a model can do to the
real CLI, another all that keeps a turn from beginning, at the same time.

A failure comes in the first attempt and in the one that resumes it; then all is well.
What ends a task comes in the task, and in the one that retries it in its thread.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codexd.dispatch import KEYED
from codexd.line import parse
from codexd.outcome import Outcome
from codexd.policy import PREMATURE, TABLE, Then
from codexd.replies import Answer, Turn, call_shell, message
from codexd.spool import deliver_control
from codexd.view import View
from tests.daemon import Daemon, until
from tests.scripted_cases import CaseModel, directives
from tests.test_failures import Seen, front_matter, id_of, prepared

pytestmark = [pytest.mark.xdist_group("matrix"), pytest.mark.timeout(300)]

CONFIG = """\
workers: 16
idle_timeout: 3s
retry:
  base: 1s
  cap: 1s
codex:
  sandbox: danger-full-access
http:
  listen: off
"""

# directive: what it comes to
KINDS = {
    "http 500": Outcome.TRANSIENT,
    "overloaded": Outcome.TRANSIENT,
    "cut": Outcome.TRANSIENT,
    "cutclean": Outcome.TRANSIENT,
    "html": Outcome.TRANSIENT,
    "incomplete": Outcome.TRANSIENT,
    "429 retry-after 1": Outcome.RATE,
    "rate-stream": Outcome.RATE,
    "context": Outcome.CONTEXT_FULL,
    "400": Outcome.CONFIG,
    "404": Outcome.CONFIG,
    "quota 7200": Outcome.QUOTA,
    "usage-not-included": Outcome.QUOTA,
    "insufficient": Outcome.QUOTA,
    "http 401": Outcome.AUTH,
    "http 403": Outcome.AUTH,
    "hang": Outcome.STALL,
    "hangsse": Outcome.STALL,
    "empty": Outcome.NO_ANSWER,
}
# where in the turn: what comes before it
POINTS = {"at once": "", "after a tool": "[[shell true]]", "after a message": "[[tell true]]"}
# A message of before is an answer: the last word of a turn that then says nothing.
CASES = {
    f"{kind}, {point}": (kind, point)
    for kind in KINDS
    for point in POINTS
    if (kind, point) != ("empty", "after a message")
}

# what keeps a turn from beginning: exit status, standard error, what it comes to
EARLY = {
    "configuration": (1, "Error loading config.toml: x", Outcome.CONFIG),
    "usage": (2, "error: unexpected argument '--x' found", Outcome.CONFIG),
    "home": (1, "Error: failed to initialize in-process app-server client: x", Outcome.HOST),
    "panic": (101, "thread 'main' (7) panicked at x.rs:1:1:", Outcome.HOST),
    "locked": (1, "Error: failed to open state DB: (code: 5) database is locked", "transient"),
    "migration": (1, "Error: failed to migrate state DB: while executing 53", "transient"),
    "busy": (1, "Error: thread x already has an active writer", Outcome.THREAD_BUSY),
    "lost": (1, "Error: thread/resume failed: no rollout found for x", Outcome.THREAD_LOST),
    "login": (1, "Not logged in", Outcome.AUTH),
    "killed": (-9, "", Outcome.SIGNAL),
    "nothing": (0, "", Outcome.UNKNOWN),
}


class Telling(CaseModel):
    """`[[tell CMD]]`: a message and a tool call in one answer; then the rest."""

    def _play(self, turn: Turn) -> Answer:
        told = [argument for name, argument in directives(turn.prompt) if name == "tell"]
        if not told:
            return super()._play(turn)
        if not turn.tool_outputs:
            return [message("Let me see."), *call_shell(turn, told[0])]
        rest = turn.prompt.replace(f"[[tell {told[0]}]]", "")
        return super()._play(replace(turn, inputs=[rest], tool_outputs=[]))


class Matrix:
    """Tasks that were all dropped at once, by the name of their case."""

    def __init__(self, daemon: Daemon, files: dict[str, str], outcomes: dict[str, Outcome]) -> None:
        self.daemon = daemon
        self.files = {case: f"case{n}.md" for n, case in enumerate(files)}
        self.again: dict[str, str] = {}
        for case, file in self.files.items():
            daemon.drop(file, files[case])
        self.ids = {case: id_of(daemon, file) for case, file in self.files.items()}
        self.ends = {case for case in files if then(case, outcomes[case]) is Then.END}
        self.gated = {case for case in files if then(case, outcomes[case]) is Then.GATE}
        for case in self.ends:
            self.answered(file=self.files[case])
            deliver_control(daemon.dirs.inbox, f"{self.ids[case]}.retry")
        for case in self.gated:
            self.let(Seen(daemon, self.files[case]))
        self.again = {case: id_of(daemon, f"{self.ids[case]}.retry") for case in self.ends}

    def answered(self, file: str) -> None:
        stem = file.removesuffix(".md")
        self.daemon.answer(stem, 120)

    def let(self, task: Seen) -> None:
        """As somebody who pays, and says `release` until the task has ended."""

        def done() -> bool:
            if task.now()["reason"]:
                deliver_control(self.daemon.dirs.inbox, "all.release")
            return bool(task.now()["outcome"])

        until(done, f"the end of {task.id}", 120)

    def ended(self, id: str) -> dict[str, Any]:
        view = View(self.daemon.dirs)

        def look() -> dict[str, Any] | None:
            found = view.task(id)
            return found if found and found["outcome"] else None

        found = until(look, f"the end of {id}", 120)
        assert found is not None
        return found

    def steps(self, id: str) -> list[tuple[str, object]]:
        """Kind and reason or outcome of each event of the task, after the first."""
        found = []
        for line in self.daemon.dirs.ledger.read_bytes().splitlines(keepends=True)[1:]:
            event = parse(line)
            if event.id == id:
                why = event.facts.get("outcome") or event.facts.get("reason")
                found.append((event.kind.value, why))
        return found[1:]


def then(case: str, outcome: Outcome) -> Then:
    """What the table has for it; a CODEX_HOME that cannot be used is that of all tasks."""
    return Then.GATE if case.startswith("home-") else TABLE[outcome]


def expected(case: str, outcome: Outcome) -> list[tuple[str, object]]:
    """What the table makes of two such attempts in a row and one that is well."""
    step, said = then(case, outcome), outcome.value
    running, queued = ("running", None), ("queued", said)
    if step is Then.END:
        return [running, ("failed", said)]
    waits = step in (Then.RETRY, Then.WAIT)
    back = [("waiting", said), ("queued", None)] if waits else [queued]
    return [running, *back, running, *back, running, ("done", "done")]


def holds(matrix: Matrix, case: str, outcome: Outcome, counted: bool = True) -> None:
    """The class, the next steps, the final state and the count of one case."""
    id = matrix.ids[case]
    task = matrix.ended(id)
    steps = matrix.steps(id)
    assert steps == expected(case, outcome), steps
    if case in matrix.ends:
        assert (task["state"], task["outcome"], task["attempts"]) == ("failed", outcome, 1)
        second = matrix.ended(matrix.again[case])
        assert matrix.steps(matrix.again[case]) == expected(case, outcome)
        assert (second["state"], second["outcome"]) == ("failed", outcome)
        return
    assert (task["state"], task["outcome"], task["answer"]) == ("done", "done", f"well: {case}")
    free = then(case, outcome) in (Then.GATE, Then.WAIT) or not counted
    assert task["attempts"] == (1 if free else 3)


# --- what the model does -----------------------------------------------------------------


def file_of(case: str, kind: str, point: str) -> str:
    options = f"profile: p{list(CASES).index(case)}" if KINDS[kind].value in KEYED else ""
    return front_matter(options) + f"{POINTS[point]}[[first 2 {kind}]][[say well: {case}]]"


@pytest.fixture(scope="module")
def scripted() -> Iterator[Telling]:
    with Telling() as model:
        yield model


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, scripted: Telling) -> Iterator[Matrix]:
    with prepared(tmp_path_factory.mktemp("matrix") / "root", scripted, CONFIG) as daemon:
        scripted.write_config(daemon.dirs.codex_home, request_max_retries=0, stream_max_retries=0)
        for number in range(len(CASES)):
            (daemon.dirs.codex_home / f"p{number}.config.toml").write_text("")
        files = {case: file_of(case, *where) for case, where in CASES.items()}
        outcomes = {case: KINDS[kind] for case, (kind, _) in CASES.items()}
        yield Matrix(daemon, files, outcomes)


@pytest.mark.parametrize("case", CASES)
def test_what_the_model_does(matrix: Matrix, scripted: Telling, case: str) -> None:
    kind, point = CASES[case]
    outcome = KINDS[kind]
    holds(matrix, case, outcome)
    asked = [t for t in scripted.turns if f"[[say well: {case}]]" in t.prompt]
    fresh = TABLE[outcome] is Then.FRESH
    assert len({turn.thread_id for turn in asked}) == (3 if fresh else 1)
    whole = f"{POINTS[point]}[[first 2 {kind}]][[say well: {case}]]\n"
    assert all(turn.prompt.endswith(f"\n---\n\n{whole}") for turn in asked)
    if case in matrix.ids and case not in matrix.ends and not fresh:
        prompts = asked[-1].inputs
        assert len(prompts) == 3
        assert ["An earlier attempt" in prompt for prompt in prompts] == [False, True, True]
    if case in matrix.gated:
        closed = [line for line in matrix.daemon.events() if "**closed**" in line]
        number = list(CASES).index(case)
        assert any(f'reason="{outcome.value}:p{number}"' in line for line in closed)


# --- what keeps a turn from beginning ------------------------------------------------------

SHIM = """\
#!{python} -IS
import os, re, sys
HERE, FAKE = {here!r}, {fake!r}
prompt = sys.stdin.buffer.read() if sys.argv[1] == "exec" else b""
found = re.search(rb"^EARLY (\\S+) (-?\\d+) ([12]) ?(.*)$", prompt, re.M)
path = os.path.join(HERE, found[1].decode()) if found else ""
resumed = "resume" in sys.argv
if found and (found[3] == b"1" or resumed):
    with open(path, "a") as file:
        file.write(".")
    if os.path.getsize(path) <= 2:
        if found[2] == b"-9":
            os.kill(os.getpid(), 9)
        sys.stderr.write(found[4].decode() + "\\n")
        sys.exit(int(found[2]))
read, write = os.pipe()
os.write(write, prompt)
os.close(write)
os.dup2(read, 0)
if found:
    os.environ["CODEX_FAKE_ANSWER"] = "well: " + found[1].decode()
os.execv(FAKE, [FAKE, *sys.argv[1:]])
"""
WHEN = ("first", "resumed")
STARTS = {f"{name}-{when}": (name, when) for name in EARLY for when in WHEN}


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    place = tmp_path_factory.mktemp("early")
    shim, fake = place / "codex", Path(__file__).parent / "bin" / "codex"
    shim.write_text(SHIM.format(python=sys.executable, here=str(place), fake=str(fake)))
    shim.chmod(0o755)
    config = CONFIG.replace("codex:\n", f"codex:\n  bin: {shim}\n")
    with Daemon(place / "root", config=config) as daemon:
        for case, (_, when) in STARTS.items():
            if when == "resumed":
                daemon.drop(f"seed-{case}.md", f"---\nsession: {case}\n---\nBegin.")
        for case, (_, when) in STARTS.items():
            if when == "resumed":
                daemon.answer(f"seed-{case}", 60)
        files, outcomes = {}, {}
        for case, (name, when) in STARTS.items():
            status, text, outcome = EARLY[name]
            options = f"session: {case}\nprofile: p-{case}"
            line = f"EARLY {case} {status} {2 if when == 'resumed' else 1} {text}"
            files[case], outcomes[case] = front_matter(options) + line, Outcome(outcome)
        yield Matrix(daemon, files, outcomes)


@pytest.mark.parametrize("case", STARTS)
def test_what_keeps_a_turn_from_beginning(early: Matrix, case: str) -> None:
    name, when = STARTS[case]
    outcome = Outcome(EARLY[name][2])
    if outcome is Outcome.THREAD_LOST and when == "resumed":
        # The next attempt is in a new thread, where nothing can be lost.
        steps = early.steps(early.ids[case])
        assert steps == [("running", None), ("queued", "thread-lost"), ("running", None),
                         ("done", "done")]  # fmt: skip
        assert early.ended(early.ids[case])["attempts"] == 1
        return
    holds(early, case, outcome, counted=outcome not in {*PREMATURE, Outcome.THREAD_LOST})


def test_all_kinds_of_step_are_here() -> None:
    met = {*KINDS.values(), *(Outcome(outcome) for _, _, outcome in EARLY.values())}
    assert {TABLE[outcome] for outcome in met} == set(Then) - {Then.RESTART}
