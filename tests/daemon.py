"""A whole codexd below a directory of its own, as a test drives it.

`Daemon` starts `codexd serve` (or anything else of the package), drops files as
a person would, waits for what the contract promises, and kills it in every way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from codexd import spool
from codexd.config import Directories
from codexd.ledger import Ledger
from codexd.model import Event, Kind, Request
from codexd.view import View

T = TypeVar("T")
PYTHON = sys.executable


def until(look: Callable[[], T], what: str, seconds: float = 30.0) -> T:
    """What `look` gives once it gives something; an error after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds} s still not: {what}")
        time.sleep(0.02)


def uncovered() -> dict[str, str]:
    """The environment for processes of whose lines nobody takes count.

    It takes processor time, memory and system calls, which some tests measure.
    """
    return {name: v for name, v in os.environ.items() if not name.startswith("COVERAGE")}


class Daemon:
    """`codexd serve` on a root; use it in a `with`."""

    def __init__(
        self,
        root: Path,
        env: dict[str, str] | None = None,
        config: str = "",
        covered: bool = True,
    ) -> None:
        """`covered`: see `uncovered`."""
        self.root = root
        self.dirs = Directories.below(root)
        # Codex's tools run the start-up files of a login shell: not those of whoever tests.
        whole = dict(os.environ) if covered else uncovered()
        self.env = {**whole, "HOME": str(root), "PYTHONUNBUFFERED": "1", **(env or {})}
        self.log = root / "serve.log"
        self.child: subprocess.Popen[str] | None = None
        self.ready = ""
        root.mkdir(exist_ok=True)
        self.dirs.codex_home.mkdir(mode=0o700, exist_ok=True)
        (root / "codexd.yaml").write_text(config or "http:\n  listen: off\n")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        if kind is not None and self.log.exists():
            print(self.log.read_text()[-8000:])
        if self.child is not None and "COVERAGE_PROCESS_CONFIG" in os.environ:
            self.child.terminate()  # what is killed cannot say which lines it has run
            self.child.wait(30)
        self.kill()

    def start(self) -> None:
        command = [PYTHON, "-m", "codexd.cli", "--root", str(self.root), "serve"]
        with open(self.log, "a") as log:
            self.child = subprocess.Popen(
                command, env=self.env, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.child.stdout is not None
        self.ready = self.child.stdout.readline().strip()
        assert self.ready.startswith("ready "), self.log.read_text()[-4000:]

    def left(
        self, id: str, *events: tuple[Kind, dict[str, object]], at: str, **result: object
    ) -> None:
        """What a daemon before has left of a task: its record, lines of the ledger, and of
        its first attempt a result, if one is given."""
        spool.prepare(self.dirs)
        home = self.dirs.tasks / id
        home.mkdir()
        record = {"id": id, "file": f"{id}.md", "created": at, "request": Request("x").to_json()}
        (home / "task.json").write_text(json.dumps(record))
        if result:
            (home / "1").mkdir()
            (home / "1" / "started").touch()
            (home / "1" / "result.json").write_text(json.dumps(result))
        facts = {"file": f"{id}.md", "limit": 3, "workdir": str(self.dirs.work)}
        ledger = Ledger(self.dirs.ledger, self.dirs.checkpoint)
        first, *more = events or [(Kind.QUEUED, {})]
        ledger.append(
            [
                Event(at, first[0], id, {**facts, **first[1]}),
                *(Event(at, k, id, f) for k, f in more),
            ]
        )
        ledger.close()

    def stop(self) -> int:
        """SIGTERM, as the manual describes the orderly end; the exit status."""
        assert self.child is not None
        self.child.send_signal(signal.SIGTERM)
        status = self.child.wait(20)
        self._forget()
        return status

    def kill(self) -> None:
        """SIGKILL for the daemon and everything that works below its root."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self._forget()
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _forget(self) -> None:
        assert self.child is not None
        assert self.child.stdout is not None
        self.child.stdout.close()
        self.child = None

    def processes(self) -> list[int]:
        """Everything whose command line names the root."""
        return [pid for pid, line in _commands() if str(self.root) in line and pid != os.getpid()]

    # --- what a person does -------------------------------------------------------

    def run(self, *args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """The command on this root."""
        command = [PYTHON, "-m", "codexd.cli", "--root", str(self.root), *args]
        return subprocess.run(
            command, env=self.env, input=stdin, capture_output=True, text=True, timeout=120
        )

    def json(self, *args: str) -> Any:
        done = self.run(*args, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def drop(self, name: str, text: str | bytes) -> None:
        """Write aside and rename in, as the manual asks of a producer."""
        aside = self.dirs.inbox / f".{name}.part"
        aside.write_bytes(text.encode() if isinstance(text, str) else text)
        aside.rename(self.dirs.inbox / name)

    def answer(self, stem: str, seconds: float = 30.0) -> tuple[dict[str, Any], str]:
        """Front matter and text of the answer to a dropped file."""
        found = until(
            lambda: sorted(self.dirs.answers.glob(f"{stem}.*.md")), f"answer to {stem}", seconds
        )
        assert len(found) == 1, found
        return read_answer(found[0])

    def reason(self, name: str, seconds: float = 30.0) -> str:
        """Why a dropped file was rejected."""
        path = self.dirs.rejected / f"{name}.reason"
        return until(lambda: path.exists() and path.read_text(), f"reason for {name}", seconds)

    def tasks(self) -> list[dict[str, Any]]:
        """Every task, oldest first."""
        view = View(self.dirs)
        found, cursor = view.page(None, None, 10_000, None)
        assert cursor is None
        view.close()
        return list(reversed(found))

    def events(self) -> list[str]:
        return self.dirs.ledger.read_text().splitlines()


def read_answer(path: Path) -> tuple[dict[str, Any], str]:
    head, _, text = path.read_text().removeprefix("---\n").partition("\n---\n")
    values = (line.partition(": ") for line in head.splitlines())
    return {key: json.loads(value) for key, _, value in values}, text


def _commands() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                line = Path(f"/proc/{name}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            yield int(name), line.replace(b"\0", b" ").decode(errors="replace")
