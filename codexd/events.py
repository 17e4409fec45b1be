"""What Codex tells while it works: its event stream, read as it comes.

`Reader` takes the bytes of `codex exec --json` in pieces of any size and holds
what they said: the thread, whether the turn began and how it ended, the last
message, usage, errors, and what Codex is doing now.

Promises: no input raises; memory stays bounded; what is unknown is ignored,
because every Codex release brings new events.  It understands the
streams of all versions since 0.36.  It only reports: `verdict` judges.
Part of the room `codex`, which is the door to it.  Lean: the worker uses it.
"""

from __future__ import annotations

import json
import re

from codexd import sane
from codexd.command import is_thread_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LINE_LIMIT = 16 << 20  # bytes of one line; a longer one is skipped
_HEAD = 512  # bytes kept of a line that is skipped
_ERRORS = 10  # messages kept of each kind
_ERROR_CHARS = 1 << 16
_OPEN = 1000  # items tracked at once
_ACTIVITY = 80  # characters

# Patterns are text, not compiled here: `re` compiles and keeps them when they are
# used, and the worker's start does not pay for it.

# Codex's own retries.  They are not the end, however many there are.
_RECONNECTING = r"(?s)Re-?connecting\b|stream error: .*; retrying \d"
_SHELL = r"(?s)\S*sh -l?c (?P<quote>['\"]?)(?P<command>.*)(?P=quote)"
_CLOSED = rb'(?s)"type":\s*"item\.completed".*?"item":\s*\{\s*"id":\s*"([^"]*)"'

THREAD_PATTERN = r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"

# What the model does within its own stream is no work of Codex's: a silence then is
# a silence.  A plan ends with the turn; a search that a cut stream left never ends.
_THOUGHT = frozenset({"agent_message", "assistant_message", "reasoning", "todo_list", "plan"})
_MODELS = _THOUGHT | {"web_search"}


def as_text(value: object) -> str:
    """`value` if it is a str, else ""; always one that can be written as UTF-8.

    JSON may hold half a surrogate pair, which cannot.
    """
    if not isinstance(value, str):
        return ""
    return value.encode("utf-8", "replace").decode("utf-8")


def plain(text: str, limit: int) -> str:
    """`text` on one line, at most `limit` characters, nothing a terminal would obey."""
    line = "".join(c if c.isprintable() else " " for c in text[: 8 * limit])
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


class Reader:
    """The state of one `codex exec --json`, as its stream has told so far.

    thread          thread id (a UUID), None until told
    turn_started    the model may have acted from here on
    completed       turn.completed was the last word about the turn
    failed_message  the message of turn.failed, None if there was none
    message         the last agent message
    usage           token counts as Codex gave them: totals of the whole thread
    errors          the last messages of `error` events that are no retry
    last_error      such a message, if nothing came after it
    reconnecting    the message of Codex's own retry, if nothing came after it
    item_errors     warnings that came as items; Codex went on
    items_seen      events about items; 0: the model has done nothing yet
    open_items      id → activity of work begun and not ended
    activity        one line: what Codex is doing
    did             the last such line that was about a tool, "" if none was
    """

    __slots__ = (
        "_line", "_size", "activity", "completed", "did", "errors", "failed_message", "item_errors",
        "items_seen", "last_error", "message", "open_items", "reconnecting", "thread",
        "turn_started", "usage",
    )  # fmt: skip

    def __init__(self) -> None:
        self.thread: str | None = None
        self.turn_started = False
        self.completed = False
        self.failed_message: str | None = None
        self.message: str | None = None
        self.usage: dict[str, int] = {}
        self.errors: list[str] = []
        self.last_error: str | None = None
        self.reconnecting: str | None = None
        self.item_errors: list[str] = []
        self.items_seen = 0
        self.open_items: dict[str, str] = {}
        self.activity = "starting"
        self.did = ""
        self._line = bytearray()
        self._size = 0

    @property
    def busy(self) -> bool:
        """Whether silence is to be expected: a tool is at work, and Codex is not
        waiting for the service instead."""
        return bool(self.open_items) and self.reconnecting is None

    @property
    def ended(self) -> bool:
        """Whether the stream told how the turn ended."""
        return self.completed or self.failed_message is not None

    # --- lines ----------------------------------------------------------------

    def feed(self, data: bytes) -> bool:
        """Take the next bytes; True if they held progress, that is, any event
        but a retry of Codex's own ("Reconnecting...")."""
        *ends, rest = data.split(b"\n")
        progress = False
        for piece in ends:
            self._hold(piece)
            progress |= self._end_line()
        self._hold(rest)
        return progress

    def finish(self) -> bool:
        """The stream is over: take a last line that has no end.  As `feed`."""
        return self._end_line()

    def _hold(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= LINE_LIMIT:
            self._line += piece
        else:
            self._line += piece[:_HEAD]
            del self._line[_HEAD:]

    def _end_line(self) -> bool:
        line, size = self._line, self._size
        self._line, self._size = bytearray(), 0
        if size > LINE_LIMIT:
            return self._skip(line)
        if not line.strip():
            return False
        try:
            event = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return False
        return type(event) is dict and self._event(event)

    def _skip(self, head: bytearray) -> bool:
        """A line that was too long to keep; what it ended has ended nevertheless."""
        if found := re.search(_CLOSED, head):
            self.open_items.pop(found[1].decode("utf-8", "replace"), None)
        return True

    # --- events ---------------------------------------------------------------

    def _event(self, event: dict[str, Any]) -> bool:
        kind, msg = event.get("type"), event.get("msg")
        if isinstance(msg, dict):
            return self._msg(msg)
        if not isinstance(kind, str):
            return True  # as the two lines before the messages of old versions
        if kind == "error":
            return self._error(as_text(event.get("message")))
        self._calm()
        if kind.startswith("item."):
            self._item(kind, event.get("item"))
        elif kind in ("thread.started", "session.created"):
            self._named(event.get("thread_id") or event.get("session_id"))
        elif kind == "turn.started":
            self._begin()
        elif kind == "turn.completed":
            self._complete(event.get("usage"))
        elif kind == "turn.failed":
            error = event.get("error")
            message = error.get("message") if isinstance(error, dict) else error
            self.failed_message, self.completed = as_text(message)[:_ERROR_CHARS], False
            self.open_items.clear()
            self.activity = "failed"
        return True

    def _error(self, message: str, retry: bool = False) -> bool:
        message = message[:_ERROR_CHARS]
        if retry or re.match(_RECONNECTING, message):
            self.reconnecting, self.last_error = message, None
            self.activity = "reconnecting"
            return False
        self.errors = [*self.errors, message][-_ERRORS:]
        self.reconnecting, self.last_error = None, message
        return True

    def _calm(self) -> None:
        """Something else than an error came."""
        self.reconnecting = self.last_error = None

    def _named(self, thread: object) -> None:
        if isinstance(thread, str) and is_thread_id(thread):
            self.thread = thread

    def _begin(self) -> None:
        self.turn_started = True
        self.completed, self.failed_message = False, None
        self.activity = "thinking"

    def _complete(self, usage: object) -> None:
        self.completed, self.failed_message = True, None
        self.open_items.clear()
        self.activity = "finished"
        self._count(usage)

    def _count(self, usage: object) -> None:
        if isinstance(usage, dict):
            counts = {k: v for k, v in usage.items() if sane.is_count(v)}
            self.usage = dict(list(counts.items())[:20])

    def _item(self, kind: str, item: object) -> None:
        if not isinstance(item, dict):
            return
        what = as_text(item.get("type") or item.get("item_type"))
        if what == "error":
            warning = as_text(item.get("message"))[:_ERROR_CHARS]
            self.item_errors = [*self.item_errors, warning][-_ERRORS:]
            return
        self.turn_started = True
        self.items_seen += 1
        if kind == "item.started":
            self._open(as_text(item.get("id")), what, item)
        elif kind == "item.completed":
            self._close(as_text(item.get("id")))
            if what not in _MODELS:
                self.did = _doing(what, item)
            if what in ("agent_message", "assistant_message"):
                self._say(as_text(item.get("text")))

    def _say(self, message: str) -> None:
        self.message = message
        self.activity = "answering"

    def _open(self, name: str, what: str, item: dict[str, Any]) -> None:
        self.activity = _doing(what, item)
        if what not in _MODELS:
            self.did = self.activity
            if len(self.open_items) < _OPEN:
                self.open_items[name] = self.activity

    def _close(self, name: str) -> None:
        self.open_items.pop(name, None)
        self.activity = next(reversed(self.open_items.values()), "thinking")

    # --- the dialect of 0.42 and before ---------------------------------------

    def _msg(self, msg: dict[str, Any]) -> bool:
        kind = as_text(msg.get("type"))
        if kind in ("error", "stream_error"):
            return self._error(as_text(msg.get("message")), retry=kind == "stream_error")
        self._calm()
        if kind == "session_configured":
            self._named(msg.get("session_id"))
        elif kind == "task_started":
            self._begin()
        elif kind == "token_count":
            info = msg.get("info")
            self._count(info.get("total_token_usage") if isinstance(info, dict) else None)
        elif kind == "task_complete":
            self._complete(None)
        elif kind == "agent_message":
            self.items_seen += 1
            self._say(as_text(msg.get("message")))
        elif kind.endswith("_begin"):
            self.items_seen += 1
            self._open(as_text(msg.get("call_id")), _OLD_ITEMS.get(kind, kind[:-6]), msg)
        elif kind.endswith("_end"):
            self.items_seen += 1
            self._close(as_text(msg.get("call_id")))
        return True


_OLD_ITEMS = {
    "exec_command_begin": "command_execution",
    "patch_apply_begin": "file_change",
    "mcp_tool_call_begin": "mcp_tool_call",
    "web_search_begin": "web_search",
}


def _doing(what: str, item: dict[str, Any]) -> str:
    """An item as one line for a person: what is under way."""
    if what == "command_execution":
        command = item.get("command")
        whole = as_text(command[-1] if isinstance(command, list) and command else command)[:4096]
        inner = re.fullmatch(_SHELL, whole)
        said = "running: " + (inner["command"] if inner else whole)
    elif what == "file_change":
        changes = item.get("changes")
        named = list(changes)[:20] if isinstance(changes, (list, dict)) else []
        paths = [as_text(c.get("path") if isinstance(c, dict) else c) for c in named]
        said = "editing: " + ", ".join(paths)
    elif what == "mcp_tool_call":
        said = f"calling: {as_text(item.get('server'))} {as_text(item.get('tool'))}"
    elif what == "web_search":
        said = "searching: " + as_text(item.get("query"))
    elif what in _THOUGHT:
        said = "thinking"
    else:
        said = what.replace("_", " ") or "working"
    return plain(said, _ACTIVITY)
