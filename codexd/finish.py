"""What an attempt came to: judged from what it left, written down, then said.

Part of the master.  For each attempt that has ended: transcript, session and
answer are written, each keyed by (ID, N) so that doing it again after a crash
changes nothing, then status.json; the ledger's line, appended by the caller for
a whole batch, is the commit.

What it came to is told by `evidence`, what follows by `policy`.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from zlib import crc32

from codexd import answerfile, clock, codex, durable, place, policy, session, transcript
from codexd.config import Config
from codexd.evidence import Evidence, Result
from codexd.exits import Ended
from codexd.model import Event, Kind, State, Task, apply, to_json
from codexd.outcome import Outcome
from codexd.sane import word
from codexd.spend import Spend

_NOTHING: tuple[object, ...] = (None, "", {})
_INLINE = 1 << 20  # bytes of an answer that still go into JSON


@dataclass(frozen=True, slots=True)
class Finished:
    """One attempt's next ledger line, and what the gate has to know."""

    event: Event
    outcome: Outcome
    message: str
    close: bool
    ran: bool
    turned: bool
    delay: float
    profile: str | None  # the task's own
    at: float | None  # when the attempt ended, in epoch seconds, if it says so


class Finish:
    """Judges attempts and writes what they came to."""

    def __init__(
        self, config: Config, spend: Spend, told: Callable[..., None] = lambda *_, **__: None
    ) -> None:
        self.config = config
        self.spend = spend
        self.dirs = config.dirs
        self.evidence = Evidence(config)
        self.told = told  # the master's log
        # Tasks with their last word, to be moved to the archive once the ledger has it.
        self.concluded: set[str] = set()

    # --- the step ---------------------------------------------------------------

    def judge(
        self,
        task: Task,
        ended: Ended | None = None,
        refused: str | None = None,
        outage: bool = False,
        own: Collection[Outcome] = frozenset(),
    ) -> Finished:
        """Write down what the attempt came to; the event that says so.

        `refused` is why the host did not start the worker: a reason to hold all tasks.
        `outage`: others of its credential fail for the same reasons; `own`: what others do
        not meet, or not any more.
        Raises OSError when the host refuses; then nothing was said, and the
        same is done again later.
        """
        left = _unfit(self.evidence.result(task, ended), refused)
        found = _told(task, left)
        refusals = task.refusals + (found.outcome in own)
        step = self._step(task, found, outage, refusals)
        used = self._remember(task, found, step) if found.ran else {}
        if found.ran:
            attempt = f"{task.id}/{task.launches}"
            self.spend.add(attempt, task.session, found.model, used, time.time())
        event = self._event(task, found, step, used)
        if step.close and refusals:
            event = replace(event, facts={**event.facts, "refusals": refusals})
        if apply(task, event).state.ended:
            self.conclude(apply(task, event), found.answer)
        # A task that is cancelled may have met what holds the others all the same.
        met, close = (left, True) if left.gate else (found, step.close)
        return Finished(
            event, met.outcome, met.message, close, found.ran, found.turned,
            step.delay, task.profile, self._ended_at(task) if close else None,
        )  # fmt: skip

    def senseless(self, task: Task, why: Exception) -> Event:
        """The end of a task whose records nobody can make sense of; they are kept."""
        text = f"its records cannot be understood, and are kept: {type(why).__name__}: {why}"
        facts = {"outcome": Outcome.UNKNOWN.value, "message": text[:2000]}
        return self.end(task, Kind.FAILED, facts)

    def unjudged(self, task: Task, why: Exception) -> Finished:
        """The same of one that has run."""
        event = self.senseless(task, why)
        return Finished(
            event, Outcome.UNKNOWN, str(event.facts["message"]), close=False, ran=True,
            turned=True, delay=0.0, profile=task.profile, at=None,
        )  # fmt: skip

    def _step(self, task: Task, found: Result, outage: bool, refusals: int) -> policy.Step:
        """What follows."""
        retry = self.config.retry
        step = policy.after(
            found.outcome,
            turned=found.turned,
            attempts=task.attempts,
            limit=task.limit,
            interruptions=task.interruptions,
            base=retry.base,
            cap=retry.cap,
            chance=(crc32(f"{task.id}/{task.launches}".encode()) % 1000) / 1000,
            launches=task.launches,
            outage=outage,
            unfit=found.gate and found.outcome is Outcome.HOST,
            refusals=refusals,
        )
        if step.kind is Kind.QUEUED and not found.began and task.interruptions:
            # The host cannot start it again and again: it may be short of something.
            delay = policy.backoff(task.interruptions, retry.base, retry.cap, 1.0)
            step = replace(step, kind=Kind.WAITING, delay=delay)
        return step

    def _ended_at(self, task: Task) -> float | None:
        """When the attempt's result was written; None if there is none."""
        try:
            told = place.result(self.dirs, task.id, task.launches)
            return clock.epoch(str(told["ended"])) if told else None
        except (ValueError, KeyError):
            return None

    def _event(
        self, task: Task, found: Result, step: policy.Step, used: Mapping[str, int]
    ) -> Event:
        ended = step.kind in (Kind.DONE, Kind.FAILED, Kind.CANCELLED)
        fresh = step.fresh and not ended
        beside = place.told_beside(self.dirs, task.id) if ended else ""
        facts: dict[str, object] = {
            "outcome": found.outcome.value if ended else None,
            "message": _message(found, step, beside),
            "thread": None if fresh else _thread(task, found),
            "usage": _sum(task.usage, used),
            "cost": _sum(task.cost, found.cost or {}),
        }
        if fresh:
            facts["fresh"] = True
        if not step.counted:
            facts["attempts"] = task.attempts - 1
            facts["interruptions"] = task.interruptions + (not step.patient)
        if not ended:
            facts["reason"] = found.outcome.value
        if step.delay:
            facts["until"] = clock.stamp(clock.epoch(clock.now()) + step.delay)
        if ended:
            facts["attempts"] = task.attempts
        return Event(
            clock.now(), step.kind, task.id, {k: v for k, v in facts.items() if v not in _NOTHING}
        )

    # --- what is kept -----------------------------------------------------------

    def _remember(self, task: Task, found: Result, step: policy.Step) -> Mapping[str, int]:
        """Transcript, then session; what the attempt used."""
        name, attempt = task.session_name, f"{task.id}/{task.launches}"
        known = self.session(name)
        if known.applied == attempt:
            return known.used
        now = clock.now()
        length = self._write(known, self._said(task, found, now))
        after = session.add(known, attempt, _thread(task, found), found.usage or {}, now)
        ended = step.kind in (Kind.DONE, Kind.FAILED, Kind.CANCELLED)
        after = replace(after, transcript=length, tasks=after.tasks + ended)
        session.save(self.dirs.sessions, session.lose(after, now) if step.fresh else after)
        return after.used

    def _write(self, known: session.Session, said: list[dict[str, object]]) -> int:
        """Add to the transcript; its new length.  What is no file there is kept aside."""
        path = self.dirs.transcripts / f"{session.stem(known.name)}.jsonl"
        try:
            return transcript.append(path, known.transcript if known.applied else None, said)
        except durable.NotAFile as damage:
            kept, then = durable.set_aside(path), "it begins a new one"
            self.told("transcript.damaged", session=known.name, why=damage, kept=kept, then=then)
            return transcript.append(path, None, said)

    def session(self, name: str) -> session.Session:
        """The session as its file tells it; a damaged file is kept aside."""
        try:
            return session.load(self.dirs.sessions, name)
        except ValueError as damage:
            kept = session.set_aside(self.dirs.sessions, name)
            then = "it begins a new thread"
            self.told("session.damaged", session=name, why=damage, kept=kept, then=then)
            return session.Session(name)

    def _said(self, task: Task, found: Result, now: str) -> list[dict[str, object]]:
        key = {"task": task.id, "attempt": task.launches}
        lines: list[dict[str, object]] = []
        if not any(self.evidence.ran(task.id, n) for n in range(1, task.launches)):
            lines.append({"ts": task.started, **key, "role": "user", "text": self._prompt(task)})
        said: dict[str, object] = {
            "ts": now, **key, "role": "assistant", "thread": found.thread
        }  # fmt: skip
        for one in found.rounds:
            lines.append({**said, "text": one.get("answer"), "verified": one.get("status")})
            lines.append({"ts": now, **key, "role": "user", "text": one.get("asked")})
        if found.verified is not None:
            said["verified"] = found.verified
        if found.outcome is Outcome.DONE:
            return [*lines, {**said, "text": found.answer}]
        failed = {"outcome": found.outcome.value, "error": found.message}
        return [*lines, {**said, "text": found.answer or "", **failed}]

    def _prompt(self, task: Task) -> str | None:
        try:
            request = place.load(self.dirs, task.id).get("request")
        except (FileNotFoundError, ValueError):
            return None  # damaged meanwhile: the turn was run all the same
        text = request.get("prompt") if isinstance(request, dict) else None
        return text if isinstance(text, str) else None

    def conclude(self, task: Task, answer: str | None) -> None:
        """The answer's file and the last word of a task that has ended."""
        self._make_home(task.id)
        name = place.answer_name(task.id, task.file)
        place.write_answer(self.dirs, name, answerfile.content(task, answer))
        short = (
            answer if answer is None or len(answer.encode("utf-8", "replace")) <= _INLINE else None
        )
        file = str(self.dirs.answers / name)
        place.conclude(self.dirs, task.id, to_json(task, short, file))
        self.concluded.add(task.id)

    def _make_home(self, id: str) -> None:
        """The directory of a task, should it be lost.  Raises OSError where it is not, but the
        task has ended already: what it came to must not be written over."""
        home = self.dirs.tasks / id
        if durable.is_directory(home):
            return
        if place.known(self.dirs, id):
            there = str(place.archived(self.dirs, id))
            raise OSError(errno.EALREADY, "the task has ended already; restart codexd", there)
        home.mkdir(mode=0o750)

    def end(self, task: Task, kind: Kind, facts: Mapping[str, object]) -> Event:
        """End a task that is not running: its answer, then the event that says so."""
        said = [str(facts.get("message") or ""), place.told_beside(self.dirs, task.id)]
        event = Event(clock.now(), kind, task.id, {**facts, "message": _joined(*said) or None})
        self.conclude(apply(task, event), None)
        return event

    def archive(self, live: Mapping[str, Task], refused: Callable[..., None]) -> None:
        """Move those away whose end the ledger has; what the host refuses is told."""
        for id in sorted(self.concluded - live.keys()):
            try:
                place.archive(self.dirs, id)
                self.concluded.discard(id)
            except OSError as error:
                refused(error, task=id)

    def retold(self, task: Task) -> list[Event]:
        """The end of a live task that lies in the archive already: the ledger's line
        of it was damaged.  Nothing is run or written again."""
        if not place.known(self.dirs, task.id):
            return []
        try:
            told = place.status(self.dirs, task.id) or {}
            kind = Kind(word(State, "state", told.get("state")))
            outcome = word(Outcome, "outcome", told.get("outcome"))
        except ValueError as damage:
            text = f"{place.archived(self.dirs, task.id)}/status.json is damaged: {damage}"
            kind, outcome, told = Kind.FAILED, Outcome.UNKNOWN, {"message": text}
        now, events = clock.now(), []
        if kind is Kind.DONE and task.state is State.WAITING:
            events.append(Event(now, Kind.QUEUED, task.id))
        if kind is Kind.DONE and task.state is not State.RUNNING:
            events.append(Event(now, Kind.RUNNING, task.id))
        facts = {"outcome": outcome.value, "message": told.get("message")}
        return [*events, Event(now, kind, task.id, facts)]


def _unfit(found: Result, refused: str | None) -> Result:
    """The evidence, with `gate` and the outcome `host` where no other task could run either."""
    general = codex.is_general(found.outcome, found.message)
    if not (found.gate or general or (refused and not found.began)):
        return found
    return replace(found, gate=True, outcome=Outcome.HOST, message=refused or found.message)


def _message(found: Result, step: policy.Step, beside: str) -> str:
    """The attempt's own words, and what has to be said besides."""
    own = ""
    if step.close and step.kind is Kind.FAILED:
        own = f"met {policy.REFUSALS} times, although others did not meet it in between"
    return _joined(found.message[:2000], own, beside, found.notes)


def _joined(*sentences: str) -> str:
    return "; ".join(filter(None, sentences))


def _told(task: Task, found: Result) -> Result:
    """What the evidence comes to for this task."""
    if found.outcome is Outcome.DONE:
        return found
    if task.cancel:
        return replace(found, outcome=Outcome.CANCELLED, message="cancelled on request")
    if found.outcome is Outcome.THREAD_LOST and found.turned:
        # A turn in another thread than the one asked for: to begin again would
        # do the work a second time.
        return replace(found, outcome=Outcome.UNKNOWN)
    return found


def _thread(task: Task, found: Result) -> str | None:
    """The thread to go on in; None where Codex took another than it was asked to continue:
    what was said so far is not in that one."""
    return found.thread if task.thread in (None, found.thread) else None


def _sum(before: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Both added up; of a peak the larger."""
    total = dict(before)
    for key, value in more.items():
        if "peak" in key:
            total[key] = max(total.get(key, 0), value)
        else:
            total[key] = round(total.get(key, 0) + value, 3)
    return total
