"""What an attempt is told: everything the worker needs, written before it is started.

Part of the master.  Decides which thread an attempt continues and what the
model must know of the attempts before; writes tasks/ID/N/attempt.json, and
returns the ledger event that announces the attempt, or the one that ends a task
that cannot be attempted at all.
"""

from __future__ import annotations

import os
import shutil

from codexd import clock, codex, place, prompt, session, transcript
from codexd.config import Config
from codexd.finish import Finish
from codexd.gate import Keeper
from codexd.model import Event, Kind, Request, Resume, Task
from codexd.outcome import Outcome


class Orders:
    """Writes the orders of attempts."""

    def __init__(self, config: Config, keeper: Keeper, finish: Finish) -> None:
        self.config = config
        self.dirs = config.dirs
        self.keeper = keeper
        self.finish = finish
        self.limits: dict[str, dict[str, int]] = {}  # of tasks that ask for some of their own
        self.setpriv = shutil.which("setpriv")  # ends Codex with its worker

    def order(self, task: Task) -> Event:
        """The attempt's orders, written; the event that announces it."""
        if task.cancel:  # it went back to the queue, as older versions let it
            told = {"outcome": Outcome.CANCELLED.value, "message": "cancelled on request"}
            return self.finish.end(task, Kind.CANCELLED, told)
        try:
            record = place.load(self.dirs, task.id)
            request = Request.from_json(_mapping(record.get("request")))
        except (FileNotFoundError, ValueError, TypeError) as damage:
            return self._cannot(task, f"its record tasks/{task.id}/task.json is damaged: {damage}")
        left = self._left(task)
        if left is not None and left <= 0:
            most = self.config.limits.task_tokens
            text = f"its attempts have used the {most} tokens that a task may (limits.task_tokens)"
            before = f"; the last one said: {task.message}" if task.message else ""
            return self._cannot(task, text + before, Outcome.BUDGET)
        thread = self._thread(task, request)
        if request.resume is Resume.ALWAYS and thread is None:
            if task.reason:  # there was one; this is how it was lost
                return self._cannot(task, task.message or "", Outcome(task.reason))
            lost = self.finish.session(task.session_name).lost
            why = f"could not continue its thread {lost}" if lost else "has no thread yet"
            text = f"resume: always, but session {task.session_name} {why}"
            return self._cannot(task, text)
        if request.limits:
            self.limits[task.id] = dict(request.limits)
        number = task.launches + 1
        orders = self._orders(task, request, thread)
        place.begin_attempt(self.dirs, task.id, number, {"attempt": number, **orders})
        facts = {"launches": number, "attempts": task.attempts + 1, "thread": thread}
        return Event(clock.now(), Kind.RUNNING, task.id, facts)

    def _cannot(self, task: Task, why: str, outcome: Outcome = Outcome.CONFIG) -> Event:
        return self.finish.end(task, Kind.FAILED, {"outcome": outcome.value, "message": why})

    def _left(self, task: Task) -> int | None:
        """Tokens that the task may still use; None for as many as it likes."""
        most = self.config.limits.task_tokens
        return None if most is None else most - codex.tokens(task.usage)

    def _thread(self, task: Task, request: Request) -> str | None:
        """The thread to continue: the task's own once it has run, else its session's."""
        if task.launches:
            return task.thread
        if request.resume is Resume.NEVER:
            return None
        return self.finish.session(task.session_name).thread

    def _orders(self, task: Task, request: Request, thread: str | None) -> dict[str, object]:
        config = self.config
        named = request.profile or config.codex.profile
        most = config.codex.sandbox  # perhaps lowered since the task was accepted
        sandbox = min(request.sandbox or most, most, key=lambda one: one.order)
        return {
            "thread": thread,
            "preamble": self._preamble(task, request, thread),
            "header": config.prompt.header,
            "policy": config.prompt.policy,
            "workdir": task.workdir or str(config.workdir),
            "workdirs": [str(root) for root in config.workdirs],
            "bin": self.keeper.binary,
            "home": self.keeper.home,
            "env": self.keeper.env_keys,
            "model": request.model or config.codex.model,
            "profile": named,
            "sandbox": self.keeper.sandbox(named, sandbox),
            "sandbox_verb": self.keeper.sandbox_verb,
            "timeout": request.timeout or config.timeout,
            "idle_timeout": request.idle_timeout or config.idle_timeout,
            "tokens": self._left(task),
            "verify": request.verify,
            "setpriv": self.setpriv,
            "memory": {
                "on": request.memory,
                "paths": list(config.memory.paths),
                "hits": config.memory.hits,
                "chars": config.memory.chars,
                "rg": _rg(self.keeper.binary),
            },
        }

    def _preamble(self, task: Task, request: Request, thread: str | None) -> str:
        """What the model must know before a task that has run already, or would have continued
        a thread that was lost."""
        evidence = self.finish.evidence
        ran = any(evidence.ran(task.id, n) for n in range(1, task.launches + 1))
        known = self.finish.session(task.session_name)
        lost = None if request.resume is Resume.NEVER else known.lost
        if not ran and not lost:
            return ""
        if thread:
            return prompt.RESUMED
        path = self.dirs.transcripts / f"{session.stem(task.session_name)}.jsonl"
        records = transcript.last(path, 20)
        if known.outrun == task.id:  # of what was before the reset, only its own is still said
            records = [r for r in records if r.get("task") == task.id]
        records = transcript.conversation(records, task.id, lost)
        records = [r for r in records if not _asked(r, task.id)]
        begun, did = evidence.acted(task)
        told = prompt.fresh(begun, did, prompt.summary(records, self.config.memory.chars))
        return told or (prompt.FRESH if lost else "")


def _rg(binary: str) -> str | None:
    """The rg on PATH, else the one that comes with the package of Codex."""
    beside = os.path.join(os.path.dirname(os.path.dirname(binary)), "codex-path", "rg")
    return shutil.which("rg") or (beside if os.access(beside, os.X_OK) else None)


def _mapping(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError("request: it is not an object")
    return value


def _asked(record: dict[str, object], id: str) -> bool:
    """Whether a line of the transcript is the task's own prompt, which it says anyway."""
    return record.get("task") == id and record.get("role") == "user"
