"""A task file's bytes as a Request, or the reason why not.

Pure: bytes and names in, values out, no file is touched.  The name's ending
decides how a file is read: `.md` and `.markdown` are Markdown with optional
YAML front matter, `.yaml`, `.yml` and `.json` hold the same keys and `prompt`,
and anything else is a prompt in plain text.

Whatever the bytes, `parse` returns a Request or raises Refused, whose text is
one line for the person who dropped the file, with the line counted from the
top of the file.  Nothing is ignored: an unknown key, a duplicate one, a wrong
type and a key that only a later version knows are refusals.

Control files have no content; `control` reads their names.  That they are
empty is for the caller to check, which has the size at hand.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import unquote

from codexd.config import ATTEMPTS, NAME, PATH, SANDBOX, TIMEOUT, percent, size
from codexd.document import (
    BOOLEAN,
    UNPRINTABLE,
    Document,
    DocumentError,
    Fields,
    Form,
    Rule,
    Scalar,
    choice,
    integer,
    parse_json,
    parse_yaml,
    shown,
    string,
)
from codexd.model import Request, Resume, is_id

MAX_BYTES = 1 << 20
MAX_FRONT_MATTER = 16 << 10  # bytes
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
    "attempts",
    "key",
    "title",
    "images",
    "add_dirs",
    "output_schema",
    "memory",
    "limits",
    "prompt",
)
LATER = ("after", "not_before", "verify")  # keys of a later version
ALL = "all"  # the target of `all.hold` and `all.release`

_MARKDOWN = ("md", "markdown")
_UNFINISHED = (".tmp", ".part", "~", ".swp", ".filepart", ".crdownload")
_FENCE = re.compile(r"^---[ \t]*\r?$", re.MULTILINE)
_BLANK_LINES = re.compile(r"(?:[^\S\n]*+\n)*+")
_BROKEN_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
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


class Verb(StrEnum):
    """What a control file asks for."""

    CANCEL = "cancel"
    HOLD = "hold"
    RELEASE = "release"
    RETRY = "retry"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class Control:
    """A control file's meaning; `target` is a task's id, ALL, or a session's name."""

    verb: Verb
    target: str

    @property
    def name(self) -> str:
        """The file name that `control` reads back."""
        stem = self.target
        if self.verb is Verb.RESET:
            # Only what a file name cannot hold, and the dot that would hide it.
            stem = re.sub(r"[%/]|^\.", lambda found: f"%{ord(found[0]):02X}", stem)
        return f"{stem}.{self.verb}"


def _one_line(most: int) -> Rule[str]:
    def fits(found: str) -> bool:
        return len(found) <= most and bool(found.strip()) and not UNPRINTABLE.search(found)

    return string(fits, f"1 to {most} printable characters on one line")


_LABEL = _one_line(200)
_PROMPT = string(lambda found: found.strip() and "\0" not in found, "a text that is not blank")
_RESUME = choice(Resume)
_PRIORITY = integer(0, 9)
_LIMITS = {
    "memory": size(1 << 20, 1 << 50, "1M to 1048576G"),
    "cpu": percent(1, 100_000, "1% to 100000%"),
    "tasks": integer(1, 1_000_000),
}


def ignored(name: str) -> bool:
    """Whether the spool leaves a file of this name alone: hidden, or not finished."""
    return name.startswith(".") or name.lower().endswith(_UNFINISHED)


def parse(name: str, data: bytes, *, max_bytes: int = MAX_BYTES) -> Request:
    """What the file `name` with the content `data` asks for.  Raises Refused."""
    try:
        _, dot, ending = name.rpartition(".")
        return _parse(ending.lower() if dot else "", _text(data, max_bytes))
    except DocumentError as err:
        raise Refused(err.reason, err.line) from err


def from_mapping(document: Document) -> Request:
    """What a document with the keys of a task file asks for.  Raises Refused."""
    try:
        return _request(document, None)
    except DocumentError as err:
        raise Refused(err.reason, err.line) from err


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


def control(name: str) -> Control | None:
    """What a control file of this name asks for, None if it is no such name.

    Raises Refused for a name that ends in a verb but has no target for it: it is
    more likely a slip than a task.
    """
    stem, _, ending = name.rpartition(".")
    if name in ("all.drain", "all.compact"):
        raise Refused(f"{name}: this version of codexd does not have it")
    if not stem or ending not in list(Verb):
        return None
    verb = Verb(ending)
    if verb is Verb.RESET:
        return Control(verb, _session(stem))
    everyone = verb in (Verb.HOLD, Verb.RELEASE)
    if is_id(stem) or (everyone and stem == ALL):
        return Control(verb, stem)
    named = f"ID.{verb} or {ALL}.{verb}" if everyone else f"ID.{verb}"
    raise Refused(f"{shown(name)} ends like a control file ({named}); rename it to end otherwise")


def _session(stem: str) -> str:
    try:
        session = unquote(stem, errors="strict")
    except UnicodeDecodeError as err:
        raise Refused(f"{shown(stem)} is not percent-encoded UTF-8") from err
    if broken := _BROKEN_PERCENT.search(stem):
        found = shown(stem[broken.start() : broken.start() + 3])
        raise Refused(f"{shown(stem)}: {found} is no percent-encoding; write % as %25")
    if _LABEL.read(Scalar(session, Form.TEXT)) is None:
        raise Refused(f"{shown(session)} is no session's name; allowed: {_LABEL.allowed}")
    return session


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


def _parse(ending: str, text: str) -> Request:
    if ending == "json":
        return _request(parse_json(text), None)
    if ending in ("yaml", "yml"):
        return _request(parse_yaml(text), None)
    if ending in _MARKDOWN and (opening := _FENCE.match(text)):
        matter, body = _split(text, opening.end())
        return _request(parse_yaml(matter, first_line=2), body)
    return _request(Document({}), text)


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
        session=found.value("session", None, _LABEL),
        workdir=found.value("workdir", None, PATH),
        model=found.value("model", None, NAME),
        profile=found.value("profile", None, NAME),
        sandbox=found.value("sandbox", None, SANDBOX),
        resume=found.value("resume", Resume.AUTO, _RESUME),
        timeout=found.value("timeout", None, TIMEOUT),
        idle_timeout=found.value("idle_timeout", None, TIMEOUT),
        priority=found.value("priority", 5, _PRIORITY),
        attempts=found.value("attempts", None, ATTEMPTS),
        key=found.value("key", None, _LABEL),
        title=found.value("title", None, _LABEL),
        images=found.values("images", (), PATH, 20),
        add_dirs=found.values("add_dirs", (), PATH, 20),
        output_schema=found.value("output_schema", None, PATH),
        memory=found.value("memory", True, BOOLEAN),
        limits=_limits(document),
    )


def _limits(document: Document) -> dict[str, int] | None:
    """What is set of the mapping `limits`; None if nothing is."""
    found = Fields(document, list(_LIMITS), "limits")
    given = {name: found.value(name, None, rule) for name, rule in _LIMITS.items()}
    return {name: value for name, value in given.items() if value is not None} or None


def _fields(document: Document, with_body: bool) -> Fields:
    for key in document.values:
        if key in LATER:
            reason = f"{key}: this version of codexd does not have this key"
            raise DocumentError(reason, document.line((key,)))
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
