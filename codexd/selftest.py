"""codexd selftest: real turns of the real Codex CLI, without an account.

Serves a scripted model on loopback and a whole codexd below a directory of its
own, drops two tasks of one session, and checks the answers, the thread and the
files.  Nothing of the user's state, login or configuration is touched; no
token is spent.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codexd import codex, spool, taskfile
from codexd.config import Config, Directories
from codexd.model import Request
from codexd.program import Exit
from codexd.scripted import ScriptedModel
from codexd.view import Json, View

_END = 20.0  # seconds for the daemon to end
_FIRST = "Please remember the word PELICAN for me."
_SECOND = "Which word was it?"


class Bad(Exception):
    """What is not as it must be."""


def run(config: Config) -> int:
    """The exit status; every step is one line."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    try:
        binary = codex.find(config.codex.bin, os.environ.get("PATH"))
        version = codex.version(binary, codex.environment(os.environ, "/nonexistent", []))
        print(f"ok    codex {'.'.join(map(str, version))} at {binary}")
        with _root(binary) as root:
            _turns(root)
    except (Bad, codex.Missing) as problem:
        print(f"fail  {problem}")
        return Exit.FAILED
    print("ok    all is well: two turns, one thread, no account and no token used")
    return Exit.DONE


def _leave(number: int, _frame: object) -> None:
    """Told to end: not without what was begun, and that only once."""
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


@contextmanager
def _root(binary: str) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="codexd-selftest-"))
    try:
        bin = json.dumps(binary)  # quoted, as YAML has it, too
        (place / "codexd.yaml").write_text(f"codex:\n  bin: {bin}\nhttp:\n  listen: off\n")
        yield place
    finally:
        shutil.rmtree(place)


def _turns(root: Path) -> None:
    dirs = Directories.below(root)
    with ScriptedModel() as model, _served(root, model):
        view = View(dirs)
        first = _turn(view, _FIRST)
        print("ok    a dropped task was run and answered")
        second = _turn(view, _SECOND)
        if "PELICAN" not in str(second["answer"]):
            raise Bad(f"the second turn did not know the first: {second['answer']!r}")
        if first["thread"] != second["thread"]:
            raise Bad(f"two threads in one session: {first['thread']} and {second['thread']}")
        print(f"ok    a second task went on in thread {first['thread']}")
        view.close()


@contextmanager
def _served(root: Path, model: ScriptedModel) -> Iterator[None]:
    """codexd serve on `root`, from ready to its orderly end."""
    model.write_config(root / "codex")
    command = [sys.executable, "-m", "codexd.cli", "--root", str(root), "serve"]
    env = {**os.environ, **model.environment()}
    with open(root / "serve.log", "w") as log:
        child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert child.stdout is not None
        if not child.stdout.readline().startswith("ready "):
            raise Bad(f"codexd serve did not become ready: {(root / 'serve.log').read_text()}")
        print("ok    codexd serve is ready")
        yield
        if _ended(child) != 0:
            raise Bad(f"codexd serve ended with status {child.returncode}")
    finally:
        _ended(child)


def _ended(child: subprocess.Popen[str]) -> int:
    """The status of the daemon after its orderly end, which leaves nothing running."""
    child.terminate()
    try:
        return child.wait(_END)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _turn(view: View, prompt: str) -> Json:
    from codexd.submit import until_ended

    id = spool.new_id()
    request = Request(prompt, session="selftest")
    spool.deliver(view.dirs.inbox, f"{id}.json", taskfile.dump(request))
    task = until_ended(view, id, 60.0, lambda _: None)
    if task["state"] != "done":
        log = (view.dirs.state / "serve.log").read_text()[-2000:]
        raise Bad(f"task {id} is {task['state']} ({task['outcome']}): {task['message']}\n{log}")
    return task
