"""Every event that the programs log, as the code itself tells it."""

from __future__ import annotations

import ast
from pathlib import Path

from codexd.model import Kind, Note

PACKAGE = Path(__file__).resolve().parent.parent / "codexd"
# The names under which the master lends its log, each for one level.
LENT = ("error", "warn", "note", "told")
# Ledger events that are logged by a name of their own.
_OTHERWISE = {
    Note.CLOSED, Note.OPENED, Note.ROTATED, Note.OWED, Note.TOLD, Note.DEFERRED, Note.UNTOLD,
}  # fmt: skip


def called(*names: str) -> set[str]:
    """The events that these files log by name."""
    found = set()
    for name in names:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.Call) and (event := _event(node)):
                found.add(event)
    return found


def _event(call: ast.Call) -> str | None:
    """What `x.log(LEVEL, "event", …)` or `x.warn("event", …)` logs; None for other calls."""
    name = getattr(call.func, "attr", "") or getattr(call.func, "id", "")
    arguments = 2 if name == "log" else 1 if name in LENT else 0
    last = call.args[-1] if call.args and len(call.args) == arguments else None
    value = last.value if isinstance(last, ast.Constant) else None
    return value if isinstance(value, str) else None


def files() -> set[str]:
    return {path.stem for path in PACKAGE.glob("*.py")}


def events() -> set[str]:
    """All of them: those of the ledger, and those that a file logs by name."""
    ledger = {f"task.{kind}" for kind in Kind} | {str(n) for n in Note if n not in _OTHERWISE}
    return ledger | called(*files())
