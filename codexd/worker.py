"""codexd-worker ID: one attempt of one task; a function from tasks/ID to tasks/ID/N.

Reads task.json and N/attempt.json, runs Codex once, and leaves in tasks/ID/N:

    started       the at-most-once point: made before Codex, never twice
    prompt.md     what Codex was given
    events.jsonl  what it printed
    stderr.txt    the same, of its standard error
    result.json   the outcome with its evidence; the last thing written

Promises: Codex is started only by the process that made `started`; whatever
happens after that, either result.json is there and whole or the master sees
that it is missing.  Ends Codex when told to (SIGTERM), when the daemon is gone
(its pipe on stdin closes), when the task's time is up, and when Codex is silent.

Starts fast, because every task waits for it: until Codex runs, next to nothing
is imported (tests/test_worker.py holds the list), and the rest while it starts.
"""

from __future__ import annotations

import os
import stat
import sys
import time

from codexd import command, durable, prompt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from codexd.codex import Reader
    from codexd.service import Service
    from codexd.turn import Turn

STOPPED = 75  # exit status after a turn that somebody else ended; codexd-exit asks who
THREAD_WAIT = 5.0  # seconds to wait for another writer of the thread
# SIGHUP, SIGINT, SIGPIPE, SIGTERM: the same on every Linux; `signal` costs 3 ms.
_DEFAULTED = (1, 2, 13, 15)


class Unfit(Exception):
    """The task cannot work here; the text says what to mend."""


class Unsafe(Exception):
    """No task can work here: Codex's sandbox does not."""


class Attempt:
    """Everything about this one run."""

    def __init__(self, tasks: str, id: str) -> None:
        self.id = id
        self.home = os.path.join(tasks, id)
        numbers = [int(n) for n in os.listdir(self.home) if n.isdigit()]
        if not numbers:
            raise FileNotFoundError(f"{self.home}: no attempt was ordered")
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

    def log(self, manager: Service | None, event: str, **fields: object) -> None:
        """A line in the journal, where we are a unit; else the master tells enough."""
        if manager:
            from codexd.service import Level

            about = {"task": self.id, "session": self.request.get("session")}
            manager.log(Level.INFO, event, **about, attempt=self.number, **fields)

    def path(self, name: str) -> str:
        return os.path.join(self.place, name)

    def mark(self) -> bool:
        """Pass the at-most-once point; False when somebody did before."""
        if os.path.exists(self.path("result.json")):
            return False
        try:
            fd = os.open(self.path("started"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        except FileExistsError:
            return False
        os.fsync(fd)
        os.close(fd)
        durable.sync_directory(self.place)
        return True

    # --- before Codex ---------------------------------------------------------

    def below_roots(self, path: str, base: str, what: str) -> str:
        """`path` resolved, if it exists below a configured root."""
        full = os.path.realpath(os.path.join(base, os.path.expanduser(path)))
        roots = [os.path.realpath(root) for root in self.orders["workdirs"]]
        if not any(full == root or full.startswith(root.rstrip("/") + "/") for root in roots):
            raise Unfit(f"{what} {full} is not below a configured root ({', '.join(roots)})")
        if not os.path.exists(full):
            raise Unfit(f"{what} {full} does not exist")
        return full

    def workdir(self) -> str:
        found = self.below_roots(self.orders["workdir"], "/", "workdir")
        if not os.path.isdir(found):
            raise Unfit(f"workdir {found} is not a directory")
        return found

    def sandbox(self) -> str:
        """As ordered; a plain one where Codex cannot keep secrets from commands.

        Raises Unsafe where it cannot keep them from anything.
        """
        ordered = str(self.orders["sandbox"])
        plain = ordered.removeprefix(command.PERMISSIONS)
        if plain == "danger-full-access":
            return plain
        from codexd import canary

        codex = self.orders["bin"], self.orders["home"], self.environment()
        if plain != ordered and canary.hides(*codex) is None:
            return ordered
        if why := canary.works(*codex):
            raise Unsafe(why)
        return plain

    def argv(self, workdir: str) -> list[str]:
        ask, orders = self.request, self.orders
        schema = ask.get("output_schema")
        argv = command.argv(
            orders["bin"],
            workdir=workdir,
            sandbox=self.sandbox(),
            model=orders["model"],
            profile=orders["profile"],
            images=[self.below_roots(p, workdir, "image") for p in ask["images"]],
            add_dirs=[self.below_roots(p, workdir, "directory") for p in ask["add_dirs"]],
            output_schema=self.below_roots(schema, workdir, "output_schema") if schema else None,
            last_message_file=self.path("last.md"),
            thread=orders["thread"],
            unguided=command.is_unguided(workdir, orders["home"]),
        )
        if orders.get("setpriv"):
            # If we are killed, Codex must not go on unseen.
            return [orders["setpriv"], "--pdeathsig", "KILL", "--", *argv]
        return argv

    def remembered(self, workdir: str) -> str:
        """The notes that go into the prompt; never a reason to fail."""
        settings = self.orders["memory"]
        if not settings["on"] or not any(
            os.path.lexists(os.path.join(workdir, os.path.expanduser(p))) for p in settings["paths"]
        ):
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

    def write_prompt(self, workdir: str) -> int:
        """prompt.md, opened for Codex to read: whole, even if we die now."""
        text = prompt.build(
            header=self.orders["header"],
            preamble=self.orders["preamble"],
            memory=self.remembered(workdir),
            policy=self.orders["policy"],
            message=self.request["prompt"],
        )
        fd = os.open(self.path("prompt.md"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o640)
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
        """Start Codex: its pid, and what to read its output and its errors from.

        Raises Unfit, ValueError, OSError, lock.Locked.
        """
        workdir = self.workdir()
        argv, env = self.argv(workdir), self.environment()
        os.chdir(workdir)
        if self.orders["thread"]:
            from codexd import lock

            lock.hold_thread(self.orders["home"], self.orders["thread"], THREAD_WAIT)
        return _spawn(argv, env, self.write_prompt(workdir))

    # --- after Codex ----------------------------------------------------------

    def answer(self, reader: Reader) -> str | None:
        """The last message: from the events, else from Codex's own file, else its rollout."""
        from codexd import codex

        if reader.message:
            return reader.message
        try:
            text = durable.read(self.path("last.md"), 64 << 20).decode("utf-8", "replace")
        except (OSError, ValueError):
            text = ""
        if text.strip() or not reader.completed:
            return text or None
        return codex.rollout_message(self.orders["home"], reader.thread) if reader.thread else None

    def spent(self, reader: Reader) -> tuple[dict[str, int], str | None]:
        """Tokens of the whole thread, and the model; a turn that did not complete
        tells them only in its rollout."""
        from codexd import codex

        usage, model = reader.usage, self.orders["model"]
        if reader.thread and not (usage and model):
            told, named = codex.spent(self.orders["home"], reader.thread)
            usage, model = usage or told, model or named
        return usage, model

    def finish(self, outcome: str, message: str, **evidence: object) -> None:
        """result.json: from here on the attempt has ended, whoever dies."""
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
        durable.write_json(self.path("result.json"), {**result, **evidence})

    def conclude(self, turn: Turn) -> str:
        """Judge the turn, and write down what it came to: its outcome."""
        from codexd import cgroup, codex
        from codexd.outcome import Outcome

        reader, answer = turn.reader, self.answer(turn.reader)
        usage, model = self.spent(reader)
        outcome, message = codex.judge(
            reader,
            exit_status=turn.status,
            stderr_head=turn.told.decode("utf-8", "replace"),
            requested_thread=self.orders["thread"],
            stop_reason=turn.stop_reason,
            answer=answer,
        )
        used = cgroup.of_unit(f"codexd-worker@{self.id}.service")
        if outcome is Outcome.SIGNAL and cgroup.oom_kills(used):
            outcome, message = Outcome.OOM, "Codex was killed for want of memory (MemoryMax=)"
        self.finish(
            outcome.value,
            message,
            thread=reader.thread or self.orders["thread"],
            turn_started=reader.turn_started,
            items=reader.items_seen,
            usage=usage,
            model=model,
            answer=answer,
            exit_status=turn.status,
            stop_reason=turn.stop_reason,
            stderr=turn.told[:2000].decode("utf-8", "replace"),
            cost={**turn.cost, **cgroup.cost(used)},
        )
        return outcome.value


def _spawn(argv: list[str], env: dict[str, str], stdin: int) -> tuple[int, int, int]:
    out, child_out = os.pipe2(os.O_CLOEXEC)
    err, child_err = os.pipe2(os.O_CLOEXEC)
    pid = os.posix_spawn(
        argv[0],
        argv,
        env,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, stdin, 0),
            (os.POSIX_SPAWN_DUP2, child_out, 1),
            (os.POSIX_SPAWN_DUP2, child_err, 2),
        ],
        setpgroup=0,
        setsigdef=_DEFAULTED,
    )
    for fd in (stdin, child_out, child_err):
        os.close(fd)
    return pid, out, err


def perform(attempt: Attempt) -> int:
    """Run Codex once and write the result; our exit status."""
    try:
        if attempt.orders.get("probe"):  # the master wants to know whether we could
            attempt.sandbox()
            attempt.finish("done", "")
            _manager()
            return 0
        process = attempt.begin()
    except Exception as problem:
        outcome, message = _why_not(problem)
        attempt.finish(outcome, message, gate=isinstance(problem, Unsafe))
        _ring()
        attempt.log(_manager(), "attempt.ended", outcome=outcome, why=message)
        return 0
    from codexd.turn import Turn, catch_signals

    wakeup = catch_signals()
    manager = _manager()
    attempt.log(manager, "attempt.begun", pid=process[0])
    turn = Turn(attempt.place, attempt.orders, *process, manager)
    turn.run(wakeup)
    outcome = attempt.conclude(turn)
    attempt.log(manager, "attempt.ended", outcome=outcome, status=turn.status)
    _ring()
    turn.sweep()
    return STOPPED if outcome == "interrupted" else 0


def _manager() -> Service | None:
    """systemd, told that we are up, where we are a unit of it.

    Asked for late, because Codex need not wait for its import.
    """
    if "NOTIFY_SOCKET" not in os.environ:
        return None
    from codexd.service import Service

    manager = Service("codexd-worker")
    manager.ready()
    return manager


def _why_not(problem: Exception) -> tuple[str, str]:
    """Outcome and sentence for what kept Codex from starting."""
    from codexd.lock import Locked
    from codexd.outcome import Outcome

    if isinstance(problem, Unfit | ValueError):
        return Outcome.CONFIG, str(problem)
    if isinstance(problem, Locked):
        return Outcome.THREAD_BUSY, f"{problem} is written by another process"
    if isinstance(problem, OSError):
        return Outcome.HOST, f"cannot start Codex: {problem}"
    if isinstance(problem, Unsafe):
        return Outcome.HOST, str(problem)
    kind = type(problem).__name__
    return Outcome.CONFIG, f"the task's record or its orders are damaged: {kind}: {problem}"


def _ring() -> None:
    """Tell the daemon that there is a result; it would see us end a moment later.

    The bell is a FIFO that the unit names, else the pipe that is our standard output.
    """
    try:
        bell = os.environ.get("CODEXD_BELL")
        fd = os.open(bell, os.O_WRONLY | os.O_NONBLOCK) if bell else 1
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.write(fd, b".")
    except OSError:
        pass  # nobody listens, or the bell is ringing already


def _done_before() -> int:
    _manager()
    return 0


def main() -> NoReturn:
    args = sys.argv[1:]
    tasks = "/var/lib/codexd/tasks"
    if args[:1] == ["--tasks"] and len(args) > 2:
        tasks, args = args[1], args[2:]
    if len(args) != 1 or not args[0].replace("-", "").isalnum():
        print("usage: codexd-worker [--tasks DIRECTORY] ID", file=sys.stderr)
        sys.exit(2)
    attempt = Attempt(tasks, args[0])
    # Nothing of the interpreter is worth tearing down: the result is on disk.
    os._exit(perform(attempt) if attempt.mark() else _done_before())


if __name__ == "__main__":
    main()
