"""A task file's bytes as a Request, or the reason why not.

Pure: bytes and names in, values out, no file is touched.  The name's ending
decides how a file is read: `.md` and `.markdown` are Markdown with optional
YAML front matter, `.yaml`, `.yml` and `.json` hold the same keys and `prompt`,
and anything else is a prompt in plain text.

Whatever the bytes, `parse` returns a Request or raises Refused, whose text is
one line for the person who dropped the file, with the line counted from the
top of the file.  Nothing is ignored: an unknown key, a duplicate one and a
wrong type are refusals.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from enum import StrEnum

from codexd.config import ATTEMPTS, NAME, PATH, SANDBOX, TIMEOUT, percent, size
from codexd.document import (
    BOOLEAN,
    UNPRINTABLE,
    Document,
    DocumentError,
    Fields,
    Rule,
    choice,
    integer,
    parse_json,
    parse_yaml,
    string,
)
from codexd.model import Request, Resume
from codexd.when import NOT_BEFORE

MAX_BYTES = 1 << 20
MAX_FRONT_MATTER = 16 << 10  # bytes
MAX_AFTER = 50  # tasks that one can follow
ROUNDS = 3  # runs of a check, where nothing is said
KEYS = (
    "session",
    "workdir",
    "model",
    "profile",
    "sandbox",
    "resume",
    "timeout",
    "idle_timeout",
    "priority",
    "after",
    "not_before",
    "attempts",
    "key",
    "title",
    "images",
    "add_dirs",
    "output_schema",
    "memory",
    "verify",
    "limits",
    "prompt",
)


_ONCE = ("key", "after", "not_before")
_MARKDOWN = ("md", "markdown")
_UNFINISHED = (".tmp", ".part", "~", ".swp", ".filepart", ".crdownload")
_FENCE = re.compile(r"^---[ \t]*\r?$", re.MULTILINE)
_BLANK_LINES = re.compile(r"(?:[^\S\n]*+\n)*+")

_MARKS = (  # the longer first: UTF-32's begins like UTF-16's
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


class Refused(ValueError):
    """Why a file is not taken: `reason` for a person, and the `line` if known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason, line)
        self.reason = reason
        self.line = line

    def __str__(self) -> str:
        return self.reason if self.line is None else f"line {self.line}: {self.reason}"


class Overlap(StrEnum):
    """What a schedule does while its earlier deliveries have not ended."""

    SKIP = "skip"  # deliver nothing
    QUEUE = "queue"  # let one wait besides the one that runs


def _one_line(most: int) -> Rule[str]:
    def fits(found: str) -> bool:
        return len(found) <= most and bool(found.strip()) and not UNPRINTABLE.search(found)

    return string(fits, f"1 to {most} printable characters on one line")


LABEL = _one_line(200)
_PROMPT = string(
    lambda found: found.strip() and "\0" not in found, "a text in UTF-8 that is not blank"
)
_RESUME = choice(Resume)
_PRIORITY = integer(0, 9)
_COMMAND = _one_line(1000)
_ROUNDS = integer(1, 10)
_LIMITS = {
    # With less, systemd could not even start and end the worker.
    "memory": size(64 << 20, 1 << 50, "64M to 1048576G"),
    "cpu": percent(1, 100_000, "1% to 100000%"),
    "tasks": integer(64, 1_000_000),
}


def ignored(name: str) -> bool:
    """Whether the spool leaves a file of this name alone: hidden, or not finished."""
    return name.startswith(".") or name.lower().endswith(_UNFINISHED)


def parse(name: str, data: bytes, *, max_bytes: int = MAX_BYTES) -> Request:
    """What the file `name` with the content `data` asks for.  Raises Refused."""
    try:
        return _request(*_document(name, data, max_bytes))
    except DocumentError as err:
        raise Refused(err.reason, err.line) from err


def scheduled(name: str, data: bytes, *, max_bytes: int) -> tuple[Request, Overlap | None]:
    """What a schedule's file asks for, and its key `overlap`, which no task has.

    Raises Refused.
    """
    try:
        document, body = _document(name, data, max_bytes)
        own = {key: document.values.pop(key) for key in ("overlap",) if key in document.values}
        overlap = Fields(replace(document, values=own), ["overlap"]).value(
            "overlap", None, choice(Overlap)
        )
        return _request(document, body), overlap
    except DocumentError as err:
        raise Refused(err.reason, err.line) from err


def from_mapping(document: Document) -> Request:
    """What a document with the keys of a task file asks for.  Raises Refused."""
    try:
        return _request(document, None)
    except DocumentError as err:
        raise Refused(err.reason, err.line) from err


def again(asked: object) -> Request:
    """The request of a task's record, for another task, under the rules of a file.

    What only that one task had (its key, what it waited for) is left out.  Raises Refused.
    """
    if not isinstance(asked, dict):
        raise Refused("it has no request")
    kept = {key: asked[key] for key in KEYS if key in asked and key not in _ONCE}
    text = json.dumps(kept)  # as deep as `durable.read_json` takes it
    return parse(".json", text.encode(), max_bytes=len(text))


def dump(request: Request) -> bytes:
    """The content of a `.json` task file that `parse` reads back as `request`.

    Nothing is checked: what no task file may say, `parse` refuses.
    """
    default = Request(prompt="")
    values = {
        key: getattr(request, key)
        for key in KEYS
        if key == "prompt" or getattr(request, key) != getattr(default, key)
    }
    return f"{json.dumps(values, ensure_ascii=False, indent=2)}\n".encode("utf-8", "surrogatepass")


def _text(data: bytes, max_bytes: int) -> str:
    if len(data) > max_bytes:
        raise Refused(f"larger than {max_bytes} bytes, the limit for a task file (limits.file)")
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            raise Refused(f"the file is {encoding}; save it as UTF-8")
    if (nul := data.find(b"\0")) >= 0:
        raise Refused("a NUL byte; a task file is UTF-8 text", _line_at(data, nul))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        reason = f"not UTF-8 (byte 0x{data[err.start]:02x}); save the file as UTF-8"
        raise Refused(reason, _line_at(data, err.start)) from err
    if not text.strip():
        raise Refused("the file is blank" if text else "the file is empty")
    return text


def _line_at(data: bytes, index: int) -> int:
    return data.count(b"\n", 0, index) + 1


def _document(name: str, data: bytes, max_bytes: int) -> tuple[Document, str | None]:
    """The keys and what is below them; None where the prompt is a key.  Raises DocumentError."""
    _, dot, ending = name.rpartition(".")
    ending, text = ending.lower() if dot else "", _text(data, max_bytes)
    if ending == "json":
        return parse_json(text), None
    if ending in ("yaml", "yml"):
        return parse_yaml(text), None
    if ending in _MARKDOWN and (opening := _FENCE.match(text)):
        matter, body = _split(text, opening.end())
        return parse_yaml(matter, first_line=2), body
    return Document({}), text


def _split(text: str, opened: int) -> tuple[str, str]:
    """The front matter, which begins at line 2, and the body."""
    closing = _FENCE.search(text, opened)
    if closing is None:
        reason = "a first line --- begins front matter, which needs a line --- after it"
        raise Refused(reason, 1)
    matter = text[opened + 1 : closing.start()]
    if len(matter.encode()) > MAX_FRONT_MATTER:
        raise Refused("front matter of more than 16 KiB", 1)
    return matter, text[closing.end() :]


def _request(document: Document, body: str | None) -> Request:
    """Raises DocumentError, or Refused for what has no place in the document."""
    found = _fields(document, body is not None)
    return Request(
        prompt=_prompt(found, body),
        session=found.value("session", None, LABEL),
        workdir=found.value("workdir", None, PATH),
        model=found.value("model", None, NAME),
        profile=found.value("profile", None, NAME),
        sandbox=found.value("sandbox", None, SANDBOX),
        resume=found.value("resume", Resume.AUTO, _RESUME),
        timeout=found.value("timeout", None, TIMEOUT),
        idle_timeout=found.value("idle_timeout", None, TIMEOUT),
        priority=found.value("priority", 5, _PRIORITY),
        after=found.values("after", (), LABEL, MAX_AFTER),
        not_before=found.value("not_before", None, NOT_BEFORE),
        attempts=found.value("attempts", None, ATTEMPTS),
        key=found.value("key", None, LABEL),
        title=found.value("title", None, LABEL),
        images=found.values("images", (), PATH, 20),
        add_dirs=found.values("add_dirs", (), PATH, 20),
        output_schema=found.value("output_schema", None, PATH),
        memory=found.value("memory", True, BOOLEAN),
        verify=_verify(document),
        limits=_limits(document),
    )


def _verify(document: Document) -> dict[str, object] | None:
    """The mapping `verify`, with its defaults; None if there is none."""
    found = Fields(document, ["command", "rounds"], "verify")
    command = found.value("command", None, _COMMAND)
    rounds = found.value("rounds", None, _ROUNDS)
    if command is None:
        # A mapping without a command, be it empty or blank, would let the task end unchecked.
        if found.given:
            raise found.error("command", "missing", _COMMAND.allowed)
        return None
    return {"command": command, "rounds": rounds or ROUNDS}


def _limits(document: Document) -> dict[str, int] | None:
    """What is set of the mapping `limits`; None if nothing is."""
    found = Fields(document, list(_LIMITS), "limits")
    given = {name: found.value(name, None, rule) for name, rule in _LIMITS.items()}
    return {name: value for name, value in given.items() if value is not None} or None


def _fields(document: Document, with_body: bool) -> Fields:
    for key in document.values:
        if key == "prompt" and with_body:
            reason = "prompt: not in front matter; the text below it is the prompt"
            raise DocumentError(reason, document.line((key,)))
    return Fields(document, [key for key in KEYS if not (with_body and key == "prompt")])


def _prompt(found: Fields, body: str | None) -> str:
    """The body without blank lines before and space after it; a `prompt` key as it is."""
    if body is None:
        prompt = found.value("prompt", None, _PROMPT)
        if prompt is None:
            raise found.error("prompt", "missing", _PROMPT.allowed)
        return prompt
    blank = _BLANK_LINES.match(body)
    prompt = body[blank.end() if blank else 0 :].rstrip()
    if not prompt:
        raise Refused("no prompt: nothing follows the front matter")
    return prompt
