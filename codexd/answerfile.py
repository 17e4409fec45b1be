"""What an answer's file says: front matter of the task, then the last message of Codex.

Its keys are a contract: programs read them.  No effects; `place` writes the file.
"""

from __future__ import annotations

import json
import re

from codexd.model import Task

# In what json.dumps writes; each backslash begins one: a pair of surrogates, one alone, others.
_ESCAPE = re.compile(r"\\(?:(ud[89ab]..\\ud[c-f]..)|(ud[89a-f]..)|.)")


def content(task: Task, answer: str | None) -> bytes:
    """The file of a task that has ended; without an answer it is front matter alone."""
    text = "" if answer is None else answer if answer.endswith("\n") else answer + "\n"
    return _front(task) + text.encode("utf-8", "replace")


def _front(task: Task) -> bytes:
    """Flat, one key a line, JSON scalars (which are YAML)."""
    values = {
        "id": task.id,
        "session": task.session_name,
        "state": task.state.value,
        "outcome": task.outcome.value if task.outcome else None,
        "message": task.message,
        "file": task.file,
        "created": task.created,
        "started": task.started,
        "ended": task.ended,
        "attempts": task.attempts,
        "thread": task.thread,
        "tokens_in": task.usage.get("input_tokens"),
        "tokens_out": task.usage.get("output_tokens"),
        "cpu_seconds": task.cost.get("cpu_seconds"),
        "memory_peak_bytes": task.cost.get("memory_peak_bytes"),
    }
    lines = "".join(f"{key}: {_scalar(value)}\n" for key, value in values.items())
    return f"---\n{lines}---\n".encode()


def _scalar(value: object) -> str:
    """JSON that is YAML, too.  That knows no surrogates: a pair becomes its character, and one
    alone, as of a name that is not in UTF-8, what stands for such a byte."""
    return _ESCAPE.sub(_whole, json.dumps(value))


def _whole(escape: re.Match[str]) -> str:
    if escape[1]:
        return str(json.loads(f'"{escape[0]}"'))
    return "\\ufffd" if escape[2] else escape[0]
