"""The oracle: whether a root tells the truth about everything that was dropped into it.

Asked when nothing is left to do.  It reads the ledger, the archive, the answers and the
transcripts, and what the fake Codex wrote down by itself, and gives a list of sentences:
every promise that was broken.  None means that all were kept.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codexd import audit, spool
from codexd.ledger import Follower
from codexd.model import Event, Kind, Note
from codexd.outcome import Outcome
from tests.daemon import read_answer
from tests.proof.place import Place

ENDS = (Kind.DONE, Kind.FAILED, Kind.CANCELLED)
_MARK = re.compile(r"\[\[proof (\S+) (\S+)\]\]")
_INTERRUPTIONS = 6  # after so many a task may fail for them


@dataclass
class Story:
    """What the ledger and the archive tell of each task."""

    accepted: dict[str, Event] = field(default_factory=dict)  # in ledger order
    ends: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    runs: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, str] = field(default_factory=dict)  # file -> reason
    kinds: Counter[str] = field(default_factory=Counter)
    held: set[str] = field(default_factory=set)
    mark: dict[str, str] = field(default_factory=dict)  # id -> what its prompt says


def idle(place: Place) -> bool:
    """Whether nothing is left to do."""
    names, taken = spool.scan(place.dirs.inbox)
    if names or taken or any(place.dirs.tasks.iterdir()):
        return False
    reader = Follower(place.dirs.ledger)
    reader.refresh()
    live = bool(reader.book.tasks)
    reader.close()
    return not live


def story(place: Place, problems: list[str]) -> Story:
    """Read it all; what cannot be read is a problem."""
    told = Story()
    for event in audit.events(audit.files(place.dirs), lambda line: problems.append(str(line))):
        told.kinds[event.kind] += 1
        if event.kind is Note.REJECTED:
            told.rejected[str(event.facts["file"])] = str(event.facts["reason"])
        elif event.kind is Kind.QUEUED and event.id not in told.accepted:
            told.accepted[event.id] = event
        elif event.kind is Kind.WAITING and event.facts.get("reason") == "hold":
            told.held.add(event.id)
        elif event.kind is Kind.RUNNING:
            told.runs[event.id] += 1
        elif event.kind in ENDS:
            told.ends[event.id].append(event)
    for path in place.dirs.archive.glob("*/*/task.json"):
        try:
            prompt = json.loads(path.read_bytes())["request"]["prompt"]
        except ValueError as damage:
            problems.append(f"{path}: {damage}")
        else:
            told.mark[path.parent.name] = _MARK.findall(prompt)[-1][0]
    return told


def check(place: Place, acknowledged: Iterable[str], *, resumes: bool = True) -> list[str]:
    """Every broken promise.  `acknowledged` are names of files, or ids of tasks.

    `resumes`: Codex's own files were not lost, so that every thread could be resumed.
    """
    problems = place.lines("violations")
    told = story(place, problems)
    starts = place.starts()
    problems += _kept(told, acknowledged)
    problems += _ended(place, told)
    problems += _answered(place, told)
    problems += _started(told, starts)
    problems += _ordered(told, starts)
    problems += _said(place, told)
    if resumes:
        problems += _resumed(place, starts)
    for file in audit.files(place.dirs):
        problems += map(str, audit.check(file, audit.Checked(file.name), False))
    return problems + list(map(str, audit.compare(place.dirs)))


def obeyed(place: Place, cancelled: str, held: str) -> list[str]:
    """Whether tasks that were to be cancelled and held have been: no control file is lost."""
    told = story(place, [])
    problems = []
    if [event.kind for event in told.ends[cancelled]] != [Kind.CANCELLED]:
        problems.append(f"{cancelled} was not cancelled")
    if held not in told.held:
        problems.append(f"{held} was not held")
    return problems


def _kept(told: Story, acknowledged: Iterable[str]) -> list[str]:
    """No acknowledged task is lost, and none is there twice."""
    problems = []
    files = Counter(str(event.facts.get("file")) for event in told.accepted.values())
    for name in acknowledged:
        found = files[name] or (name in told.accepted) or (name in told.rejected)
        if not found:
            problems.append(f"{name} was acknowledged and is lost")
    problems += [f"{file} became {n} tasks" for file, n in files.items() if n > 1]
    for file, reason in told.rejected.items():
        if not file.startswith("bad-") and not file.endswith(".retry"):
            problems.append(f"{file} was rejected: {reason}")
    return problems


def _ended(place: Place, told: Story) -> list[str]:
    """Every task ended once, and for a reason."""
    problems = []
    for id in told.accepted:
        ends = told.ends[id]
        if len(ends) != 1:
            problems.append(f"{id} ended {len(ends)} times")
        elif ends[0].kind is Kind.FAILED:
            outcome, runs = ends[0].facts.get("outcome"), told.runs[id]
            if outcome != Outcome.INTERRUPTED or runs < _INTERRUPTIONS:
                problems.append(f"{id} failed after {runs} runs: {dict(ends[0].facts)}")
        if id not in told.mark:
            problems.append(f"{id} is not in the archive")
    problems += [f"{id} ended and never began" for id in told.ends if id not in told.accepted]
    problems += [f"left in tasks/: {p.name}" for p in place.dirs.tasks.iterdir()]
    return problems


def _answered(place: Place, told: Story) -> list[str]:
    """Each task has one answer, and it is its own."""
    problems = []
    answers: dict[str, list[Path]] = defaultdict(list)
    for path in place.dirs.answers.iterdir():
        answers[path.name.removesuffix(".md").rpartition(".")[2]].append(path)
    for id in told.accepted:
        found = answers.pop(id, [])
        if len(found) != 1:
            problems.append(f"{id} has the answers {found}")
            continue
        front, text = read_answer(found[0])
        kinds = [event.kind.value for event in told.ends[id]]
        if front.get("id") != id or [front.get("state")] != kinds:
            problems.append(f"{id}: the answer says {front.get('state')}, the ledger {kinds}")
        if kinds == ["done"] and text != f"answer to {told.mark.get(id)}\n":
            problems.append(f"{id} ({told.mark.get(id)}) has another's answer: {text!r}")
    problems += [f"an answer to nothing: {paths}" for paths in answers.values()]
    return problems


def _started(told: Story, starts: list[dict[str, Any]]) -> list[str]:
    """No attempt starts twice, none after the task's end, and none for another's task."""
    problems = []
    times = Counter((start["task"], start["attempt"]) for start in starts)
    problems += [f"{id}/{n} was started {k} times" for (id, n), k in times.items() if k > 1]
    for start in starts:
        id = start["task"]
        if start["attempt"] > told.runs[id]:
            problems.append(f"{id}/{start['attempt']} was started, and the ledger knows nothing")
        if start["mark"] != told.mark.get(id):
            problems.append(f"{id} was given {start['mark']}, not {told.mark.get(id)}")
    ran = {start["task"] for start in starts}
    for id, ends in told.ends.items():
        if ends and ends[0].kind is Kind.DONE and id not in ran:
            problems.append(f"{id} is done and Codex was never started")
    return problems


def _ordered(told: Story, starts: list[dict[str, Any]]) -> list[str]:
    """The tasks of a session in the order of the ledger."""
    problems = []
    place = {id: n for n, id in enumerate(told.accepted)}
    last: dict[str, tuple[int, str]] = {}
    for start in starts:
        id, session = start["task"], start["session"]
        if session == "-" or id not in place:
            continue
        here, before = (place[id], id), last.get(session, (-1, ""))
        if here < before:
            problems.append(f"session {session}: {id} was started after {before[1]}")
        last[session] = max(here, before)
    return problems


def _said(place: Place, told: Story) -> list[str]:
    """The transcripts have every attempt once, and the prompt of each task that ran once."""
    problems = []
    said: Counter[tuple[str, int]] = Counter()
    asked: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    for path in place.dirs.transcripts.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                one = json.loads(line)
            except ValueError as damage:
                problems.append(f"{path}: {damage}")
                continue
            if one["role"] == "assistant":
                said[one["task"], one["attempt"]] += 1
                answers[one["task"]] += "outcome" not in one
            else:
                asked[one["task"]] += 1
    problems += [
        f"{id}/{n} is in the transcripts {k} times" for (id, n), k in said.items() if k > 1
    ]
    problems += [
        f"the prompt of {id} is in the transcripts {asked[id]} times"
        for id in {id for id, _ in said} | asked.keys()
        if asked[id] != 1
    ]
    for id, ends in told.ends.items():
        done = bool(ends) and ends[0].kind is Kind.DONE
        if answers[id] != done:
            problems.append(f"{id}: {answers[id]} answers in the transcripts, done: {done}")
    return problems


def _resumed(place: Place, starts: list[dict[str, Any]]) -> list[str]:
    """A thread that was known is resumed, never left for a new one."""
    problems = []
    rollouts = {path.stem[-36:] for path in place.dirs.codex_home.glob("sessions/**/*.jsonl")}
    of_session: dict[str, str] = {}
    for start in starts:
        id, session = start["task"], start["session"]
        key = session if session != "-" else start["mark"]
        thread = of_session.get(key)
        if thread and start["thread"] != thread:
            problems.append(f"{id}/{start['attempt']} left {thread} for {start['thread']}")
        known = _thread(place, id, start["attempt"])
        if known in rollouts:
            of_session[key] = str(known)
    return problems


def _thread(place: Place, id: str, number: int) -> str | None:
    """The thread that an attempt's events name, as far as they were written down."""
    for path in place.dirs.archive.glob(f"*/{id}/{number}/events.jsonl"):
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            if line.endswith("\n") and '"thread.started"' in line:
                return str(json.loads(line)["thread_id"])
    return None
