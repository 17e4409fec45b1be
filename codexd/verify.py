"""The task's own check: a command that says by its exit status whether the work is done.

It is run after a turn that ended well, by `codex sandbox`: in the sandbox that
Codex gives the commands of the model, with no more rights than they have.  (With
danger-full-access there is no sandbox, for them as for it.)

Its environment is what Codex calls core (PATH, HOME, USER, LOGNAME, SHELL,
LANG, LC_ALL, LC_CTYPE, TMPDIR) and what the configuration of Codex sets for
commands; no key is in it.  Standard input is empty.  What it prints is kept in
verify-R.txt of the attempt, both ends of it if it is much; it is never looked
at, only quoted.

Whether it was run at all is not told by its status, which it may choose: a mark
comes before its output.  A program that is missing (127) is one that the model
may have to write, so it is a failure like any other.

Raises OSError or ValueError when it cannot be started.  Lean: the worker uses it.
"""

from __future__ import annotations

import os
import re

from codexd import command, durable
from codexd.child import Child, Kept
from codexd.codex import sentence
from codexd.events import plain
from codexd.outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from codexd.service import Service

KEPT = 1 << 20  # bytes of the beginning of the output
QUOTED = 4000  # characters of its end for the prompt
_TAIL = 4 * QUOTED  # bytes, of which a character has four at most
_MARK = b"codexd runs the command\n"
# What is printed on standard error is Codex's own: why the sandbox cannot be set up.
_RUN = f'echo "{_MARK.decode().strip()}"; exec /bin/sh -c "$1" 2>&1'
_GIVEN = frozenset(["PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR", "CODEX_HOME"])
_COLOURS = r"\x1b\[[0-9;:?]*[ -/]*[@-~]"
_NOT_RUN = {126: " (it cannot be run)", 127: " (it was not found)"}


class Check(Child):
    """One run of the command."""

    def __init__(
        self,
        line: str,
        path: str,
        process: tuple[int, int, int],
        timeout: float,
        manager: Service | None,
    ) -> None:
        """`line` is the command, `path` the file to keep its output in."""
        pid, out, err = process
        super().__init__(pid, {out: self._output, err: self._errors}, timeout, manager)
        self.line = line
        self.shown = plain(line, 80)
        self.ran = False  # the sandbox stands, and the command began
        self._head = self._said = self._tail = b""
        self._size = 0
        self._file = Kept(path, KEPT + 2 * _TAIL)

    def doing(self) -> str:
        return f"verifying: {self.shown}"

    def _output(self, data: bytes) -> None:
        if not self.ran:
            self._head += data
            self.ran = self._head.startswith(_MARK)
            data = self._head[len(_MARK) :] if self.ran else b""
        self._file.add(data[: max(0, KEPT - self._size)])
        self._size += len(data)
        self._tail = (self._tail + data)[-_TAIL:]

    def _errors(self, data: bytes) -> None:
        self._said = (self._said + data)[:_TAIL]

    def close(self) -> None:
        if self._size > KEPT:
            note = f"\n[codexd left something out; these are the last of {self._size} bytes:]\n"
            self._file.add(note.encode() + self._tail)
        self._file.close()

    @property
    def missed(self) -> bool:
        """Whether it ended by itself before the command began."""
        return not self.ran and self.stop_reason is None

    @property
    def told(self) -> int | None:
        """Its exit status, if it came to one by itself."""
        return self.status if self.ran and self.stop_reason is None else None

    def quoted(self) -> tuple[str, bool]:
        """The end of the output, without what could act on a terminal; whether more came
        before it."""
        from codexd import memory

        text = memory.plain(re.sub(_COLOURS.encode(), b"", self._tail))
        cut = self._size > len(self._tail)
        if len(text) > QUOTED or cut:
            text, cut = text[-QUOTED:], True
            whole = text.partition("\n")[2]
            text = whole or text  # of a single long line, its end
        return text, cut

    def verdict(self, number: int, rounds: int) -> tuple[Outcome, str]:
        """What run `number` of at most `rounds` means; a sentence ("" for done)."""
        if self.stop_reason == "interrupted":
            return Outcome.INTERRUPTED, f"codexd had to stop the check {self.shown!r}"
        if self.stop_reason == "timeout":
            return Outcome.TIMEOUT, f"The task's time was used up by the check {self.shown!r}"
        if not self.ran:
            why = sentence(self._said.decode("utf-8", "replace")) or f"status {self.status}"
            return Outcome.HOST, f"Codex's sandbox cannot run the check {self.shown!r}: {why}"
        if self.status == 0:
            return Outcome.DONE, ""
        last = sentence(self.quoted()[0].rpartition("\n")[2])
        how = f"status {self.status}{_NOT_RUN.get(self.status, '')}"
        words = f"; its last words: {plain(last, 300)}" if last else ", and it said nothing"
        where = f"in round {number} of {rounds}"
        return Outcome.VERIFY, f"The check {self.shown!r} ended {where} with {how}{words}"


def begin(
    line: str, orders: Mapping[str, Any], sandbox: str, add_dirs: Sequence[str], env: dict[str, str]
) -> tuple[int, int, int]:
    """Start the command `line` in the current directory; as `command.spawn`.

    `orders` are those of the attempt; `sandbox`, `add_dirs` and `env` are those of the turn.
    """
    argv = command.sandboxed(
        orders["bin"],
        orders["sandbox_verb"],
        sandbox=sandbox,
        profile=orders["profile"],
        command=["/bin/sh", "-c", _RUN, "sh", line],
        write=_writable(orders["home"], sandbox, add_dirs),
    )
    kept = {k: v for k, v in env.items() if k in _GIVEN or k.startswith("LC_")}
    return command.spawn(
        command.ending(orders, argv), kept, os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    )


def _writable(home: str, sandbox: str, add_dirs: Sequence[str]) -> list[str]:
    """Those of `add_dirs` that Codex opens to commands of the model.

    None if they may only read, and none that the profile denies by this very name: to
    say it again here would take the place of that.
    """
    if not add_dirs or sandbox != f"{command.PERMISSIONS}workspace-write":
        return []
    text = durable.read(os.path.join(home, f"{command.PROFILE}.config.toml"), 1 << 20).decode()
    rules = text.splitlines()
    return [path for path in add_dirs if f'{command.quoted(path)} = "deny"' not in rules]
