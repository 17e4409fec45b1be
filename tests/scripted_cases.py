"""A scripted model that does what the prompt tells it to: the behaviours the tests need.

Directives stand at the beginning of a line of the task, several on one line if
need be, and are played in order:

    [[sleep S]]  [[hold NAME]]            wait: seconds; until `release(NAME)`
    [[shell CMD]]  [[patch FILE TEXT]]    one tool call each, then on
    [[first N DIRECTIVE]]                 only in the first N requests that come to it
    [[say X]]  [[bytes N]]  [[empty]]     an answer; N bytes of it; none at all
    [[http STATUS]]  [[400]]  [[404]]  [[429 retry-after S]]  [[overloaded]]
    [[quota S]]  [[usage-not-included]]  [[insufficient]]
    [[rate-stream]]  [[context]]  [[incomplete]]
    [[cut]]  [[cutonce]]  [[cutclean]]  [[html]]  [[hang]]  [[hangsse]]

Without an ending directive the answer is `codexd.replies.echo`'s.

`Codex` runs the real CLI against it without codexd.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from threading import Condition
from types import TracebackType

from codex_cli_bin import bundled_codex_path

from codexd.replies import (
    Answer,
    Door,
    Part,
    Reply,
    Turn,
    call_shell,
    cut,
    echo,
    event,
    fail,
    hang,
    message,
    new_file,
    patch,
    say,
    slow,
    stream_error,
)
from codexd.scripted import ScriptedModel

_LINE = re.compile(r"^\[\[.*", re.MULTILINE)
_ONE = re.compile(r"\[\[([\w-]+)(?: (.*?))?\]\]")
Directive = tuple[str, str]


def directives(prompt: str) -> list[Directive]:
    """Name and argument of each; quoted lines ("> [[say x]]") do not count."""
    return [(m[1], m[2] or "") for line in _LINE.findall(prompt) for m in _ONE.finditer(line)]


def payload(size: int) -> str:
    """The text that `[[bytes SIZE]]` answers: exactly SIZE (3 or more) ASCII characters."""
    lines = ("".join(f"{number:07}\n" for number in range(size // 8 + 1)))[: size - 3]
    return lines + "end"


# --- answers that end a turn ------------------------------------------------------------


def _error(kind: str, text: str, **more: object) -> dict[str, object]:
    return {"error": {"type": kind, "message": text, **more}}


def _http(status: str) -> Reply:
    texts = {"401": "Incorrect API key provided: sk-scripted.", "403": "Country not supported."}
    text = texts.get(status, "The server had an error while processing your request.")
    return fail(int(status), _error("scripted_error", text))


def _bad_request(_: str) -> Reply:
    return fail(400, _error("invalid_request_error", "Invalid value: 'parameter'.", code=None))


def _no_model(_: str) -> Reply:
    text = "The model `gpt-scripted` does not exist or you do not have access to it."
    return fail(404, _error("invalid_request_error", text, code="model_not_found"))


def _too_many(seconds: str) -> Reply:
    body = _error("requests", "Rate limit reached for requests.", code="rate_limit_exceeded")
    return fail(429, body, {"Retry-After": seconds.removeprefix("retry-after ") or "1"})


def _overloaded(_: str) -> Reply:
    text = "The model is overloaded."
    return fail(503, _error("server_error", text, code="server_is_overloaded"))


def _quota(seconds: str) -> Reply:
    text = "The usage limit has been reached"
    resets = int(time.time()) + int(seconds or 3600)
    return fail(429, _error("usage_limit_reached", text, plan_type="plus", resets_at=resets))


def _not_included(_: str) -> Reply:
    return fail(429, _error("usage_not_included", "Usage not included", plan_type="free"))


def _insufficient(_: str) -> Reply:
    text = "You exceeded your current quota, please check your plan and billing details."
    return fail(429, _error("insufficient_quota", text, code="insufficient_quota"))


def _incomplete(_: str) -> list[Part]:
    details = {"id": "resp_scripted", "incomplete_details": {"reason": "max_output_tokens"}}
    return [message("the first half of the ans"), event("response.incomplete", response=details)]


def _empty(_: str) -> list[Part]:
    return say("")[1:]


ENDINGS: dict[str, Callable[[str], Answer]] = {
    "say": say,
    "bytes": lambda size: say(payload(int(size))),
    "empty": _empty,
    "http": _http,
    "400": _bad_request,
    "404": _no_model,
    "429": _too_many,
    "overloaded": _overloaded,
    "quota": _quota,
    "usage-not-included": _not_included,
    "insufficient": _insufficient,
    "rate-stream": lambda _: stream_error("rate_limit_exceeded", "Rate limit reached for gpt."),
    "context": lambda _: stream_error("context_length_exceeded", "Your input is too long."),
    "incomplete": _incomplete,
    "cut": lambda _: cut(),
    "cutclean": lambda _: [message("an answer without its end")],
    "html": lambda _: Reply([b"<html>proxy</html>"], headers={"Content-Type": "text/html"}),
    "hang": lambda _: hang(before_headers=True),
    "hangsse": lambda _: hang(before_headers=False),
}
SHORT = {"cutonce": ("first", "1 cut")}


# --- the model ------------------------------------------------------------------------------


class CaseModel(ScriptedModel):
    """The scripted model of the tests: plays directives, and answers questions about them."""

    def __init__(self) -> None:
        super().__init__(self._play)
        self._doors: dict[str, Door] = {}
        self._played: Counter[tuple[object, ...]] = Counter()
        self._held: dict[str, Turn] = {}
        self._lock = Condition()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            for door in self._doors.values():
                door.close()

    def release(self, name: str) -> None:
        """Let every `[[hold NAME]]` go on, those to come as well."""
        self._door(name).open()

    def wait_held(self, name: str, timeout: float = 20) -> Turn:
        """The first request that came to `[[hold NAME]]`.  Raises TimeoutError."""
        with self._lock:
            if not self._lock.wait_for(lambda: name in self._held, timeout):
                raise TimeoutError(f"nothing came to [[hold {name}]] within {timeout} s")
            return self._held[name]

    def threads(self) -> list[str]:
        """The threads that asked, in the order of their first request."""
        return list(dict.fromkeys(turn.thread_id for turn in self.turns))

    def prompts(self, thread_id: str) -> list[str]:
        """What the user said in a thread, as its newest request tells it."""
        return [turn for turn in self.turns if turn.thread_id == thread_id][-1].inputs

    def asked(self, text: str) -> list[Turn]:
        """The requests whose prompt has this text, such as a task's nonce."""
        return [turn for turn in self.turns if text in turn.prompt]

    def overlaps(self) -> list[tuple[Turn, Turn]]:
        """Neighbours in a thread that were open at the same time.

        Empty only when no two requests of any thread overlapped.
        """
        found = []
        for thread_id in self.threads():
            for (one, ended), (other, _) in pairwise(self.spans(thread_id)):
                if other.started < ended:
                    found.append((one, other))
        return found

    def _door(self, name: str) -> Door:
        with self._lock:
            if name not in self._doors:
                self._doors[name] = Door()
            return self._doors[name]

    def _hold(self, name: str, turn: Turn) -> Door:
        with self._lock:
            self._held.setdefault(name, turn)
            self._lock.notify_all()
        return self._door(name)

    def _come_to(self, *place: object) -> int:
        """How many requests came to this place, with this one."""
        with self._lock:
            self._played[place] += 1
            return self._played[place]

    def _play(self, turn: Turn) -> Answer:
        script = directives(turn.prompt)
        done = len(turn.tool_outputs)
        waits: list[float | Door] = []
        for at, (name, argument) in enumerate(script):
            name, argument = SHORT.get(name, (name, argument))
            if name == "first":
                limit, name, argument = _limited(argument)
                if self._come_to(tuple(script), at, len(turn.tool_outputs)) > limit:
                    continue
            if name in ("shell", "patch"):
                if done:
                    done, waits = done - 1, []
                    continue
                return _late(waits, _tool(turn, name, argument))
            if name == "sleep":
                waits.append(float(argument))
            elif name == "hold":
                waits.append(self._hold(argument, turn))
            else:
                return _late(waits, ENDINGS[name](argument))
        return _late(waits, echo(turn))


def _limited(argument: str) -> tuple[int, str, str]:
    count, name, *rest = argument.split(" ", 2)
    return int(count), name, rest[0] if rest else ""


def _tool(turn: Turn, name: str, argument: str) -> list[Part]:
    if name == "shell":
        return call_shell(turn, argument)
    path, _, text = argument.partition(" ")
    return patch(turn, new_file(path, text))


def _late(waits: list[float | Door], then: Answer) -> Answer:
    for wait in reversed(waits):
        then = slow(wait, then)
    return then


# --- the real CLI, called bare -------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a `codex exec --json` came to."""

    status: int
    events: list[dict[str, object]]
    stderr: str

    @property
    def thread(self) -> str:
        return str(self.events[0]["thread_id"])

    @property
    def terminal(self) -> tuple[str, str]:
        """Type and message of the last event."""
        last = self.events[-1]
        error = last.get("error")
        return str(last["type"]), str(error["message"]) if isinstance(error, dict) else ""

    def items(self, kind: str) -> list[dict[str, object]]:
        found = [e["item"] for e in self.events if e["type"] == "item.completed"]
        return [item for item in found if isinstance(item, dict) and item["type"] == kind]

    @property
    def answer(self) -> object:
        return self.items("agent_message")[-1]["text"]


class Codex:
    """The real CLI with a CODEX_HOME and a work directory of its own."""

    def __init__(self, place: Path, model: ScriptedModel, **config: str | int) -> None:
        self.work = place / "work"
        self.work.mkdir()
        (place / "tmp").mkdir()  # codex wants its CODEX_HOME outside TMPDIR
        model.write_config(place / "home", **config)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(place),
            "TMPDIR": str(place / "tmp"),
            "CODEX_HOME": str(place / "home"),
            **model.environment(),
        }

    def start(self, prompt: str, resume: str = "") -> subprocess.Popen[str]:
        options = ["--json", "--color", "never", "--skip-git-repo-check", "-s", "workspace-write"]
        then = ["resume", resume] if resume else []
        with TemporaryFile("w+") as given:
            given.write(prompt)
            given.seek(0)
            return subprocess.Popen(
                [bundled_codex_path(), "exec", *options, *then, "-"],
                cwd=self.work,
                env=self.environment,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def run(self, prompt: str, resume: str = "") -> Run:
        return finish(self.start(prompt, resume))


def finish(process: subprocess.Popen[str]) -> Run:
    with process:
        try:
            out, err = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return Run(process.returncode, [json.loads(line) for line in out.splitlines()], err)
