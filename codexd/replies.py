"""What a scripted model is asked and can answer, in the words of the Responses API.

A script is a function: it gets one request as the model sees it (`Turn`) and
returns an answer: parts of a stream, or a whole `Reply`.  The builders here
make the answers that matter to a caller of the Codex CLI: a message, a tool
call, an edit, and every way of failing that the CLI tells apart.

No server and no socket here: that is `scripted`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

FOREVER = math.inf
_USAGE = {"input": 100, "cached": 20, "output": 10, "reasoning": 3}
# What codex itself puts into the history under the user's name.
_CONTEXT = re.compile(
    r"\s*(<(environment_context|user_instructions|turn_aborted|skill|personality_spec|model_switch"
    r"|user_shell_command|subagent_notification|permissions instructions)\b|# AGENTS\.md )"
)


class Door:
    """A door where answers wait until it is opened; it stays open then."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def open(self) -> None:
        os.eventfd_write(self._fd, 1)  # nobody reads it: readable from now on

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)


Part = bytes | float | Door  # bytes to send, seconds to wait, or a door to wait at


@dataclass(frozen=True, slots=True)
class Turn:
    """One request as the model sees it.

    `inputs` are the user's messages in the request's history, oldest first,
    without those that codex adds itself (environment, AGENTS.md, aborted turns).
    `tool_outputs` are what tools answered since the last of them: their number
    tells how far a turn of several steps has come.  `number` counts the
    requests of all threads, `ordinal` those of this one, both from 1.
    `started` is monotonic seconds.
    """

    number: int
    ordinal: int
    thread_id: str
    inputs: list[str]
    tool_outputs: list[str]
    tools: tuple[str, ...]
    body: bytes = field(repr=False)
    started: float

    @property
    def prompt(self) -> str:
        """The last user message; empty if there is none."""
        return self.inputs[-1] if self.inputs else ""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP answer: wait `before`, send the head, then the parts.

    `whole` False ends the body in the middle, as a broken connection does.
    """

    parts: Iterable[Part]
    status: int = 200
    headers: Mapping[str, str] = field(
        default_factory=lambda: {"Content-Type": "text/event-stream"}
    )
    before: float = 0.0
    whole: bool = True


Answer = Iterable[Part] | Reply
Script = Callable[[Turn], Answer]


def history(items: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The user's messages, and the tools' outputs since the last of them."""
    inputs: list[str] = []
    outputs: list[str] = []
    for one in items:
        if one.get("role") == "user":
            texts = [part.get("text", "") for part in one["content"]]
            if own := [text for text in texts if not _CONTEXT.match(text)]:
                inputs.append("\n".join(own))
                outputs = []
        elif str(one.get("type", "")).endswith("_call_output"):
            outputs.append(_text(one.get("output")))
    return inputs, outputs


def _text(output: object) -> str:
    if isinstance(output, dict):  # {"content": …, "success": …}
        output = output.get("content")
    if isinstance(output, list):
        output = "\n".join(str(part.get("text", "")) for part in output)
    return str(output)


# --- what a script can answer -----------------------------------------------------


def event(kind: str, **fields: object) -> bytes:
    """One server-sent event of the Responses API."""
    data = json.dumps({"type": kind, **fields})
    return f"event: {kind}\ndata: {data}\n\n".encode()


def item(**fields: object) -> bytes:
    """The event that an output item is complete."""
    return event("response.output_item.done", item=fields)


def message(text: str) -> bytes:
    """The item of an assistant message."""
    content = [{"type": "output_text", "text": text}]
    return item(type="message", role="assistant", content=content)


def completed(usage: Mapping[str, int] | None = None) -> bytes:
    """The last event of a response.  `usage`: tokens input, cached, output, reasoning."""
    tokens = {**_USAGE, **(usage or {})}
    counted = {
        "input_tokens": tokens["input"],
        "input_tokens_details": {"cached_tokens": tokens["cached"]},
        "output_tokens": tokens["output"],
        "output_tokens_details": {"reasoning_tokens": tokens["reasoning"]},
        "total_tokens": tokens["input"] + tokens["output"],
    }
    return event("response.completed", response={"id": "resp_scripted", "usage": counted})


def say(text: str, usage: Mapping[str, int] | None = None) -> list[Part]:
    """A final message."""
    return [message(text), completed(usage)]


def call_shell(turn: Turn, command: str, seconds: float = 30) -> list[Part]:
    """Ask for a shell command, with the tool that this codex offers for it.

    `seconds`: how long codex may wait for the command before it asks the model
    again.  Raises LookupError when no tool runs commands.
    """
    milliseconds = int(seconds * 1000)
    argv = ["bash", "-lc", command]
    arguments: dict[str, dict[str, object]] = {
        "exec_command": {"cmd": command, "yield_time_ms": milliseconds},
        "shell_command": {"command": command, "timeout_ms": milliseconds},
        "shell": {"command": argv, "timeout_ms": milliseconds},
    }
    for name, given in arguments.items():
        if name in turn.tools:
            text = json.dumps(given)
            call = {"call_id": f"call_{turn.number}", "name": name, "arguments": text}
            return [item(type="function_call", **call), completed()]
    raise LookupError(f"codex offers no tool that runs a command: {', '.join(turn.tools)}")


def patch(turn: Turn, text: str) -> list[Part]:
    """Ask for an edit of files; `text` is in apply_patch's own format."""
    if "apply_patch" not in turn.tools:
        return call_shell(turn, f"apply_patch <<'EOF'\n{text}\nEOF")
    call = {"call_id": f"call_{turn.number}", "name": "apply_patch", "input": text}
    return [item(type="custom_tool_call", **call), completed()]


def new_file(path: str, text: str) -> str:
    """The patch that adds a file."""
    lines = "\n".join("+" + line for line in text.splitlines())
    return f"*** Begin Patch\n*** Add File: {path}\n{lines}\n*** End Patch\n"


def fail(status: int, body: object, headers: Mapping[str, str] | None = None) -> Reply:
    """An HTTP error.  `body`: text, or an object for JSON."""
    kind = {"Content-Type": "text/plain" if isinstance(body, str) else "application/json"}
    text = body if isinstance(body, str) else json.dumps(body)
    return Reply([text.encode()], status, {**kind, **(headers or {})})


def stream_error(code: str, text: str) -> list[Part]:
    """A response that begins well and then reports its own failure."""
    error = {"code": code, "message": text}
    return [event("response.failed", response={"id": "resp_scripted", "error": error})]


def cut(after: Iterable[Part] = (event("response.created", response={}),)) -> Reply:
    """The connection breaks after these parts."""
    return Reply(after, whole=False)


def hang(*, before_headers: bool) -> Reply:
    """Never answer, or begin an answer and then fall silent."""
    if before_headers:
        return Reply((), before=FOREVER)
    return Reply((event("response.created", response={}), FOREVER))


def slow(wait: float | Door, then: Answer) -> Reply:
    """The answer `then`, its body late: by seconds, or until the door opens."""
    reply = then if isinstance(then, Reply) else Reply(then)
    return replace(reply, parts=chain((wait,), reply.parts))


# --- the default script -------------------------------------------------------------

_SAY = re.compile(r"^\s*Say:[ \t]*(.+?)\s*$", re.MULTILINE)
_REMEMBER = re.compile(r"\bremember the word\W+(\w+)", re.IGNORECASE)
_WHICH = re.compile(r"\bwh(?:ich|at)\b.{0,40}\bword\b", re.IGNORECASE | re.DOTALL)


def echo(turn: Turn) -> list[Part]:
    """The script of the demo and the self-test; it answers from the prompt and the history.

    `Say: X` is answered by X.  "remember the word W" in one turn and "which
    word was it?" in a later one are answered by W: the model only knows it if
    the same thread was resumed.  Anything else: how many messages it has seen.
    """
    if said := _SAY.findall(turn.prompt):
        return say(said[-1])
    if told := _REMEMBER.findall(turn.prompt):
        return say(f"I will remember the word {told[-1]}.")
    if _WHICH.search(turn.prompt):
        words = [w for text in turn.inputs[:-1] for w in _REMEMBER.findall(text)]
        return say(words[-1] if words else "I do not know: nothing was said before in this thread.")
    count = len(turn.inputs)
    return say(f"Hello from the scripted model. I have {count} of your messages in this thread.")
