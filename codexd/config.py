"""codexd.yaml as a frozen Config, and where everything lies.

`find` chooses the directories (in `directories`), `load` reads the file.  Every key is optional
and known, has one type and a range; anything else is a ConfigError with file,
line, key, what was found and what is allowed.  Without a file the defaults hold.

Relative paths count from the state directory, `~` is the home of the user that
codexd runs as, memory.paths stay as written.  Nothing is created, no link is
resolved.  The rules for values that task files share are here too.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from codexd import document, durable
from codexd.delivery import Occasion
from codexd.directories import ConfigError as ConfigError
from codexd.directories import Directories as Directories
from codexd.directories import find as find
from codexd.document import Document, DocumentError, Fields, Rule, Scalar, integer, string
from codexd.model import Sandbox

Rules = dict[str, dict[str, Rule[Any]]]  # by section, by key
N = TypeVar("N", int, float)

FILE_MOST = 8 << 20  # bytes: the greatest limits.file; to read so much takes seconds
_SIZE = 1 << 20  # bytes of codexd.yaml

_LISTS = ("workdirs", "paths")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_WORD = re.compile(r"(?!-)[A-Za-z0-9._:/-]{1,100}", re.ASCII)
_LOOPBACK = re.compile(r"(?:127\.0\.0\.1|\[::1\]):([0-9]{1,5})", re.ASCII)


class Unreadable(ConfigError):
    """The file is there, but not for us."""


def duration(low: int, high: int, span: str) -> Rule[float]:
    """Seconds, from `90s`, `30m`, `2h`, `1d` or a plain number of seconds."""
    allowed = f"a duration from {span}, such as 90s, 30m or 2h"
    return _scaled(r"([0-9]{1,12}(?:\.[0-9]{1,20})?)([smhd]?)", _SECONDS, float, low, high, allowed)


def size(low: int, high: int, span: str) -> Rule[int]:
    """Bytes, from `512M` (K, M, G: powers of 1024) or a plain number of bytes."""
    allowed = f"a size from {span}, such as 512K, 64M or 1G"
    return _scaled(r"([0-9]{1,15})([KMG]?)", _BYTES, int, low, high, allowed)


def percent(low: int, high: int, span: str) -> Rule[int]:
    """Percent of one processor, from `150%` or a plain number of percent."""
    return _scaled(r"([0-9]{1,7})(%?)", {"": 1, "%": 1}, int, low, high, f"from {span} of one CPU")


def _scaled(
    pattern: str, units: dict[str, int], kind: type[N], low: int, high: int, allowed: str
) -> Rule[N]:
    def read(found: Scalar) -> N | None:
        match = re.fullmatch(pattern, found, re.ASCII)
        value = kind(match[1]) * units[match[2]] if match else None
        return value if value is not None and low <= value <= high else None

    return Rule(read, allowed)


def _is_address(found: str) -> bool:
    port = _LOOPBACK.fullmatch(found)
    return int(port[1]) < 65536 if port else found in ("unix", "off")


def _address(listen: str, socket: Path) -> Path | tuple[str, int] | None:
    if listen in ("unix", "off"):
        return socket if listen == "unix" else None
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def _is_path(found: str) -> bool:
    others_home = found.startswith("~") and found != "~" and not found.startswith("~/")
    return bool(found) and not others_home and "\0" not in found and len(found.encode()) <= 4096


def _words(found: Scalar) -> tuple[str, ...] | None:
    """A command as words; there is no shell."""
    try:
        words = tuple(shlex.split(found))
    except ValueError:  # a quote without its end
        return None
    command = os.path.expanduser(words[0]) if words else ""
    usable = os.path.isabs(command) and "\0" not in found and len(found.encode()) <= 4096
    return (command, *words[1:]) if usable else None


ADDRESS = string(_is_address, "unix, off, 127.0.0.1:PORT or '[::1]:PORT'")
TIMEOUT = duration(1, 86400, "1s to 24h")  # RuntimeMaxSec= of a worker's unit is 24h
_AGE = duration(3600, 36500 * 86400, "1h to 36500d")
KEPT = Rule(
    lambda text: math.inf if text == "never" else _AGE.read(text), f"never, or {_AGE.allowed}"
)
_ROOM = size(1 << 20, 1 << 50, "1M to 1048576G")
MOST = Rule(
    lambda text: math.inf if text == "any" else _ROOM.read(text), f"any, or {_ROOM.allowed}"
)
ATTEMPTS = integer(1, 20)
SANDBOX = document.choice(Sandbox)
COMMAND = Rule(_words, "the absolute path of a program, and its arguments; no shell reads them")
NAME = string(_WORD.fullmatch, "1 to 100 of A-Z a-z 0-9 . _ : / -, not beginning with -")
PATH = string(_is_path, "a path: absolute, relative or ~/..., at most 4096 bytes")


class Launcher(StrEnum):
    AUTO = "auto"
    SYSTEMD = "systemd"
    PROCESS = "process"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodexConfig:
    bin: str = "codex"
    home: Path
    model: str | None = None
    profile: str | None = None
    sandbox: Sandbox = Sandbox.WORKSPACE_WRITE


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    paths: tuple[str, ...] = ("MEMORY.md", "memory")
    hits: int = 20
    chars: int = 4000


@dataclass(frozen=True, slots=True)
class PromptConfig:
    header: str = ""
    policy: str = (
        "Work on your own until the task is finished; nobody can answer questions. End with one "
        "final message: what was done, and what could not be. Be brief; do not repeat the task."
    )


@dataclass(frozen=True, slots=True)
class HttpConfig:
    listen: Path | tuple[str, int] | None  # the Unix socket; loopback host and port; off
    token_file: Path | None = None


@dataclass(frozen=True, slots=True)
class RetryConfig:
    base: float = 10.0
    cap: float = 600.0


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    file: int = 1 << 20
    queue: int = 10_000
    disk_free: int = 64 << 20
    task_tokens: int | None = None  # no limit
    day_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class RetentionConfig:
    """Seconds that each is kept after it was written; infinite for `never`.

    `size` are the bytes that each may take, the oldest going first; infinite for `any`.
    """

    answers: float = 90 * 86400.0
    archive: float = 90 * 86400.0
    rejected: float = 90 * 86400.0
    size: float = 10 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """codexd.yaml with every default filled in.  Durations in seconds, sizes in bytes."""

    dirs: Directories
    workers: int = 4
    launcher: Launcher = Launcher.AUTO
    workdir: Path
    workdirs: tuple[Path, ...]
    workdir_sharing: bool = True
    timeout: float = 3600.0
    idle_timeout: float = 600.0
    attempts: int = 3
    codex: CodexConfig
    memory: MemoryConfig = MemoryConfig()
    prompt: PromptConfig = PromptConfig()
    http: HttpConfig
    retry: RetryConfig = RetryConfig()
    limits: LimitsConfig = LimitsConfig()
    retention: RetentionConfig = RetentionConfig()
    on: Mapping[Occasion, tuple[str, ...]] = field(default_factory=dict)  # commands, as words


def keys() -> list[str]:
    """Every key of codexd.yaml: `workers`, `codex.bin`, ..."""
    sections = _rules(Path()).items()
    return [f"{section}.{key}".lstrip(".") for section, rules in sections for key in rules]


def load(dirs: Directories, *, explicit: bool) -> Config:
    """Read dirs.config_file, which must be there if `explicit`.  Raises ConfigError."""
    try:
        doc = document.parse_yaml(_text(dirs.config_file, explicit))
        _check(config := _config(doc, dirs), doc)
    except DocumentError as err:
        place = dirs.config_file if err.line is None else f"{dirs.config_file}:{err.line}"
        kind = Unreadable if isinstance(err.__cause__, PermissionError) else ConfigError
        raise kind(f"{place}: {err.reason}", err.reason, err.line) from err
    return config


def _text(file: Path, explicit: bool) -> str:
    try:
        with open(durable.opened(file, follow=True), "rb") as one:
            data = one.read(_SIZE + 1)
        if len(data) > _SIZE:
            raise DocumentError(f"larger than {_SIZE} bytes")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = err.object.count(b"\n", 0, err.start) + 1
        raise DocumentError("not UTF-8; save the file as UTF-8", line) from err
    except OSError as err:
        # A link to a file that is not there, on a disk that is not mounted, is no wish for the
        # defaults, by which what is kept for ever would be removed.
        if isinstance(err, FileNotFoundError) and not explicit and not file.is_symlink():
            return ""
        raise DocumentError(f"cannot be read: {err.strerror}") from err


def _rules(state: Path) -> Rules:
    """The schema: each section's keys in the order they are documented in."""

    def located(found: Scalar) -> Path | None:
        path = PATH.read(found)
        return Path(os.path.normpath(state / os.path.expanduser(path))) if path else None

    path = Rule(located, PATH.allowed)
    program = Rule(lambda found: os.path.expanduser(PATH.read(found) or "") or None, PATH.allowed)
    prose = string(lambda text: "\0" not in text and len(text) <= 20_000, "up to 20000 characters")
    return {
        "": {
            "workers": integer(1, 64),
            "launcher": document.choice(Launcher),
            "workdir": path,
            "workdirs": path,
            "workdir_sharing": document.BOOLEAN,
            "timeout": TIMEOUT,
            "idle_timeout": TIMEOUT,
            "attempts": ATTEMPTS,
        },
        "codex": {"bin": program, "home": path, "model": NAME, "profile": NAME, "sandbox": SANDBOX},
        "memory": {"paths": PATH, "hits": integer(1, 200), "chars": integer(100, 100_000)},
        "prompt": {"header": prose, "policy": prose},
        "http": {"listen": ADDRESS, "token_file": path},
        "retry": {"base": duration(1, 3600, "1s to 1h"), "cap": TIMEOUT},
        "limits": {
            "file": size(1 << 10, FILE_MOST, "1K to 8M"),
            "queue": integer(1, 1_000_000),
            "disk_free": size(0, 1 << 40, "0 to 1024G"),
            "task_tokens": integer(1, 10**15),
            "day_tokens": integer(1, 10**15),
        },
        "retention": {**dict.fromkeys(("answers", "archive", "rejected"), KEPT), "size": MOST},
        "on": dict.fromkeys(Occasion, COMMAND),
    }


def _config(doc: Document, dirs: Directories) -> Config:
    rules = _rules(dirs.state)
    given = {section: _given(doc, section, rules) for section in rules}
    listen = _address(given["http"].pop("listen", "unix"), dirs.http_socket)
    top = {"workdir": dirs.work, "workdirs": (dirs.work,), **given[""]}
    top |= {"launcher": Launcher.PROCESS} if dirs.rooted else {}
    return Config(
        dirs=dirs,
        codex=CodexConfig(**{"home": dirs.codex_home, **given["codex"]}),
        memory=MemoryConfig(**given["memory"]),
        prompt=PromptConfig(**given["prompt"]),
        http=HttpConfig(listen, **given["http"]),
        retry=RetryConfig(**given["retry"]),
        limits=LimitsConfig(**given["limits"]),
        retention=RetentionConfig(**given["retention"]),
        on={Occasion(name): command for name, command in given["on"].items()},
        **top,
    )


def _given(doc: Document, section: str, rules: Rules) -> dict[str, Any]:
    """What the file says; for what it leaves out the dataclass has the default."""
    known = rules[section] if section else [*rules[""], *filter(None, rules)]
    found = Fields(doc, list(known), section)
    given = {
        key: found.values(key, None, rule, 50) if key in _LISTS else found.value(key, None, rule)
        for key, rule in rules[section].items()
    }
    return {key: value for key, value in given.items() if value is not None}


def _check(config: Config, doc: Document) -> None:
    """What one value must be because of another."""
    if not any(config.workdir.is_relative_to(root) for root in config.workdirs):
        line = doc.line(("workdir",)) or doc.line(("workdirs",))
        roots = " or ".join(repr(str(root)) for root in config.workdirs) or "none: it is empty"
        found = repr(str(config.workdir))
        raise DocumentError(f"workdir: found {found}; allowed: below workdirs, {roots}", line)
    if config.retry.cap < config.retry.base:
        reason = f"retry.cap: less than retry.base; allowed: from {config.retry.base:g}s to 24h"
        raise DocumentError(reason, doc.line(("retry", "cap")))
    if isinstance(config.http.listen, tuple) and not config.http.token_file:
        reason = "http.token_file: missing; allowed: a file with the token that TCP needs"
        raise DocumentError(reason, doc.line(("http", "listen")))
