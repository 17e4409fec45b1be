"""An attempt up to the start of Codex: what was ordered, whether it can work, what Codex is given.

Part of the worker.  Owns tasks/ID/N but for what Codex prints; `rounds` goes on from
here.  Raises Unfit, Unreachable, ValueError, OSError or lock.Locked where Codex cannot be
started, Unsafe where it must not be, and Halted where it should not be any more; `why_not` says
what that comes to.  Untold where that cannot be written down.

Leaner than lean: every task waits for it.
"""

from __future__ import annotations

import errno
import os
import time

from codexd import command, durable, lock, prompt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from codexd.outcome import Outcome
    from codexd.service import Service

THREAD_WAIT = 5.0  # seconds to wait for another writer of the thread
START_WAIT = 30.0  # seconds to wait for other starts on this CODEX_HOME; then it does not


class Unfit(Exception):
    """The task cannot work here; the text says what to mend."""


class Unreachable(Exception):
    """The host cannot say whether the task can work: its own directory is on a dead mount, say."""


class Unsafe(Exception):
    """No task can work here: Codex's sandbox does not, or does not hide what it must."""


class Untold(Exception):
    """Its directory cannot be written, so nothing tells what it came to; the text says why."""


class Halted(Exception):
    """All has to stop; the text says what was not begun."""


class Attempt:
    """Everything about this one run."""

    def __init__(self, tasks: str, id: str) -> None:
        self.id = id
        self.home = os.path.join(tasks, id)
        numbers = [int(n) for n in os.listdir(self.home) if n.isdigit()]
        if not numbers:
            raise FileNotFoundError(errno.ENOENT, "no attempt was ordered", self.home)
        self.number = max(numbers)
        self.place = os.path.join(self.home, str(self.number))
        self.orders: Any = durable.read_json(os.path.join(self.place, "attempt.json"))
        self.task: Any = {"request": {}}
        if not self.orders.get("probe"):
            self.task = durable.read_json(os.path.join(self.home, "task.json"))
        self.request: Any = self.task["request"]
        self.began = time.time()
        self.memory_note: str | None = None
        self.notes = 0
        self.cwd = ""
        self.chosen = ""  # the sandbox
        self.held: str | None = None  # the thread whose lock we have
        self.starting: int | None = None  # the lock that Codex was started under
        self.pause: Callable[[float], None] = time.sleep  # between tries to take a lock

    def log(self, manager: Service | None, event: str, **fields: object) -> None:
        """A line in the journal, where we are a unit; else the master tells enough."""
        if manager:
            from codexd.service import Level

            about = {"task": self.id, "session": self.request.get("session")}
            manager.log(Level.INFO, event, **about, attempt=self.number, **fields)

    def path(self, name: str) -> str:
        return os.path.join(self.place, name)

    def mark(self) -> bool:
        """Pass the at-most-once point; False when somebody did before.  Raises Untold."""
        path = self.path("started")
        try:
            if durable.is_there(self.path("result.json")):
                return False
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
            os.fsync(fd)
            os.close(fd)
            durable.sync_directory(self.place)
        except FileExistsError:
            return False
        except OSError as problem:
            raise Untold(f"{path} could not be written: {problem.strerror}") from problem
        return True

    # --- before Codex ---------------------------------------------------------

    def below_roots(self, path: str, base: str, what: str) -> str:
        """`path` resolved, if it exists below a configured root."""
        full, why = _resolved(os.path.join(base, os.path.expanduser(path)))
        roots, dead = self._roots()
        if not any(full == root or full.startswith(root.rstrip("/") + "/") for root in roots):
            if dead:
                raise dead
            raise Unfit(f"{what} {full} is not below a configured root ({', '.join(roots)})")
        if why:
            raise Unfit(f"{what} {full} {why}")
        return full

    def _roots(self) -> tuple[list[str], Unreachable | None]:
        """Without links; and what is said of one that cannot be looked at: it may be another's."""
        roots, dead = [], None
        for root in self.orders["workdirs"]:
            try:
                roots.append(_resolved(root)[0])
            except Unreachable as problem:
                dead = problem
        return roots, dead

    def enter(self) -> None:
        """Be in the workdir: a turn may have put another directory in its place."""
        self.cwd = self.below_roots(self.orders["workdir"], "/", "workdir")
        try:
            os.chdir(self.cwd)
        except NotADirectoryError:
            raise Unfit(f"workdir {self.cwd} is not a directory") from None
        except OSError as problem:  # no fault of Codex's place or of the host at large
            why = f"workdir {self.cwd} cannot be entered: {problem.strerror}"
            raise (Unfit if problem.errno in _OF_THE_PATH else Unreachable)(why) from None

    def sandbox(self) -> str:
        """As ordered; a plain one where Codex does not heed ours, which keeps secrets.

        Raises Unsafe where commands are kept from nothing, or that cannot be told.
        """
        ordered = str(self.orders["sandbox"])
        plain = ordered.removeprefix(command.PERMISSIONS)
        if plain == "danger-full-access":
            return plain
        from codexd import canary

        codex = self.orders["bin"], self.orders["home"], self.environment()
        if why := canary.works(*codex, self.orders["sandbox_verb"]):
            raise Unsafe(why)
        try:
            hides = plain != ordered and canary.hides(*codex) is None
        except canary.Untold as problem:
            raise Unsafe(str(problem)) from None
        return ordered if hides else plain

    def add_dirs(self) -> list[str]:
        found = self.request["add_dirs"]
        return [self.below_roots(path, self.cwd, "directory") for path in found]

    def argv(self, thread: str | None, images: Sequence[str]) -> list[str]:
        ask, orders, workdir = self.request, self.orders, self.cwd
        schema = ask.get("output_schema")
        argv = command.argv(
            orders["bin"],
            workdir=workdir,
            sandbox=self.chosen,
            model=orders["model"],
            profile=orders["profile"],
            images=[self.below_roots(p, workdir, "image") for p in images],
            add_dirs=self.add_dirs(),
            output_schema=self.below_roots(schema, workdir, "output_schema") if schema else None,
            last_message_file=self.path("last.md"),
            thread=thread,
            unguided=command.is_unguided(workdir, orders["home"]),
        )
        return command.ending(orders, argv)

    def remembered(self, workdir: str) -> str:
        """The notes that go into the prompt; never a reason to fail."""
        settings = self.orders["memory"]
        if not settings["on"] or not any(_may_be(workdir, p) for p in settings["paths"]):
            return ""
        from codexd import memory

        found = memory.search(
            settings["paths"],
            workdir,
            self.request["prompt"],
            hits=settings["hits"],
            chars=settings["chars"],
            rg=settings["rg"],
        )
        self.memory_note = found.note
        self.notes = len(found.hits)
        return memory.fence(found, os.urandom(8).hex()) if found.hits else ""

    def text(self) -> str:
        """The first prompt."""
        return prompt.build(
            header=self.orders["header"],
            preamble=self.orders["preamble"],
            memory=self.remembered(self.cwd),
            policy=self.orders["policy"],
            message=self.request["prompt"],
        )

    def opened(self, name: str, text: str) -> int:
        """A prompt in a file, opened for Codex to read: whole, even if we die now."""
        fd = os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o640)
        durable.write_all(fd, text.encode("utf-8", "replace"))
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def environment(self) -> dict[str, str]:
        home = self.orders["home"]
        env = command.environment(os.environ, home, self.orders["env"])
        scratch = os.path.realpath(env.get("TMPDIR", "/tmp"))
        if os.path.realpath(home).startswith(scratch.rstrip("/") + "/"):
            # Codex refuses to put its helpers below the temporary directory.
            env["TMPDIR"] = self.path("tmp")
            os.makedirs(env["TMPDIR"], 0o700, exist_ok=True)
        return env

    def begin(self) -> tuple[int, int, int]:
        """Start Codex: its pid, and what to read its output and its errors from."""
        self.enter()
        self.chosen = self.sandbox()
        argv, env = self.argv(self.orders["thread"], self.request["images"]), self.environment()
        if self.orders["thread"]:
            self.hold(self.orders["thread"])
        return self.spawn(argv, env, self.opened("prompt.md", self.text()))

    def again(self, thread: str, text: str, number: int) -> tuple[int, int, int]:
        """As `begin`, for turn `number` of the attempt, which is given `text`."""
        self.enter()
        self.hold(thread)
        try:
            os.unlink(self.path("last.md"))  # a turn that fails leaves it as it is
        except FileNotFoundError:
            pass  # Codex did not write it
        argv = self.argv(thread, [])
        return self.spawn(argv, self.environment(), self.opened(f"prompt-{number}.md", text))

    def spawn(self, argv: list[str], env: dict[str, str], stdin: int) -> tuple[int, int, int]:
        """Start Codex when no other begins on this CODEX_HOME; `Turn` lets the next one.

        The lock keeps them from a race for Codex's databases, and is no more than
        that: what keeps it for too long must not keep us.
        """
        try:
            self.starting = lock.hold_start(self.orders["home"], START_WAIT, self.pause)
        except lock.Locked:
            self.starting = None
        return command.spawn(argv, env, stdin)

    def hold(self, thread: str) -> None:
        """No other worker writes the thread from here on."""
        if self.held != thread:
            lock.hold_thread(self.orders["home"], thread, THREAD_WAIT, self.pause)
            self.held = thread

    def finish(self, outcome: str, message: str, **evidence: object) -> None:
        """result.json: from here on the attempt has ended, whoever dies.  Raises Untold."""
        from codexd import clock

        result = {
            "id": self.id,
            "attempt": self.number,
            "outcome": outcome,
            "message": message,
            "thread": self.orders.get("thread"),
            "started": clock.stamp(self.began),
            "ended": clock.now(),
            "notes": self.notes,
            "memory_note": self.memory_note,
        }
        path = self.path("result.json")
        try:
            durable.write_json(path, {**result, **evidence})
        except OSError as problem:
            raise Untold(f"{path} could not be written: {problem.strerror}") from problem


# What is wrong with a path itself, and not with the disk that is asked for it.
_OF_THE_PATH = durable.ABSENT | {errno.EACCES, errno.ENAMETOOLONG}


def _resolved(path: str) -> tuple[str, str]:
    """`path` without links, and why nothing can be there, if so.

    Raises Unreachable where it is the host that cannot say: that is no fault of the task.
    """
    try:
        return os.path.realpath(path, strict=True), ""
    except OSError as problem:
        if problem.errno not in _OF_THE_PATH:
            raise Unreachable(f"{path} cannot be looked at: {problem.strerror}") from None
        why = f"cannot be reached: {problem.strerror}"
        if problem.errno in durable.ABSENT:
            why = "does not exist"
        return os.path.realpath(path), why


def _may_be(workdir: str, path: str) -> bool:
    """Whether there can be notes; where we may not look, the search says so."""
    try:
        os.lstat(os.path.join(workdir, os.path.expanduser(path)))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def why_not(problem: Exception) -> tuple[Outcome, str]:
    """Outcome and sentence for what kept Codex from starting."""
    from codexd.outcome import Outcome

    too_long = isinstance(problem, OSError) and problem.errno == errno.E2BIG
    if too_long or isinstance(problem, Unfit | ValueError):
        return Outcome.CONFIG, str(problem)
    if isinstance(problem, lock.Locked):
        return Outcome.THREAD_BUSY, f"{problem} is written by another process"
    if isinstance(problem, OSError):
        return Outcome.HOST, f"cannot start Codex: {problem}"
    if isinstance(problem, Unsafe | Unreachable):
        return Outcome.HOST, str(problem)
    if isinstance(problem, Halted):
        return Outcome.INTERRUPTED, str(problem)
    kind = type(problem).__name__
    return Outcome.CONFIG, f"the task's record or its orders are damaged: {kind}: {problem}"
