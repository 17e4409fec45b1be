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

Starts fast: its imports are counted (tests/test_worker.py holds the list).
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import time

from codexd import clock, codex, durable, lock, prompt
from codexd.outcome import Outcome
from codexd.turn import Turn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

THREAD_WAIT = 5.0  # seconds to wait for another writer of the thread


class Unfit(Exception):
    """The task cannot work here; the text says what to mend."""


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
        self.task: Any = durable.read_json(os.path.join(self.home, "task.json"))
        self.orders: Any = durable.read_json(os.path.join(self.place, "attempt.json"))
        self.request: Any = self.task["request"]
        self.reader = codex.Reader()
        self.began = time.time()
        self.memory_note: str | None = None
        self.notes = 0

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

    def argv(self, workdir: str) -> list[str]:
        ask, orders = self.request, self.orders
        schema = ask.get("output_schema")
        return codex.argv(
            orders["bin"],
            workdir=workdir,
            sandbox=orders["sandbox"],
            model=orders["model"],
            profile=orders["profile"],
            images=[self.below_roots(p, workdir, "image") for p in ask["images"]],
            add_dirs=[self.below_roots(p, workdir, "directory") for p in ask["add_dirs"]],
            output_schema=self.below_roots(schema, workdir, "output_schema") if schema else None,
            last_message_file=self.path("last.md"),
            thread=orders["thread"],
        )

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
        env = codex.environment(os.environ, home, self.orders["env"])
        scratch = os.path.realpath(env.get("TMPDIR", "/tmp"))
        if os.path.realpath(home).startswith(scratch.rstrip("/") + "/"):
            # Codex refuses to put its helpers below the temporary directory.
            env["TMPDIR"] = self.path("tmp")
            os.makedirs(env["TMPDIR"], 0o700, exist_ok=True)
        return env

    # --- after Codex ----------------------------------------------------------

    def answer(self) -> str | None:
        """The last message: from the events, else from Codex's own file, else its rollout."""
        if self.reader.message:
            return str(self.reader.message)
        try:
            text = durable.read(self.path("last.md"), 64 << 20).decode("utf-8", "replace")
        except (OSError, ValueError):
            text = ""
        if text.strip() or not self.reader.completed:
            return text or None
        thread = self.reader.thread
        return codex.rollout_message(self.orders["home"], thread) if thread else None

    def finish(self, outcome: Outcome, message: str, **evidence: object) -> None:
        """result.json: from here on the attempt has ended, whoever dies."""
        durable.write_json(
            self.path("result.json"),
            {
                "id": self.id,
                "attempt": self.number,
                "outcome": outcome.value,
                "message": message,
                "thread": self.reader.thread or self.orders.get("thread"),
                "turn_started": self.reader.turn_started,
                "items": self.reader.items_seen,
                "usage": self.reader.usage or {},
                "started": clock.stamp(self.began),
                "ended": clock.now(),
                "notes": self.notes,
                "memory_note": self.memory_note,
                **evidence,
            },
        )


def perform(attempt: Attempt, wakeup: int) -> None:
    """Run Codex once and write the result; a byte in `wakeup` means to stop."""
    try:
        workdir = attempt.below_roots(attempt.orders["workdir"], "/", "workdir")
        if not os.path.isdir(workdir):
            raise Unfit(f"workdir {workdir} is not a directory")
        argv = attempt.argv(workdir)
        os.chdir(workdir)
        if attempt.orders["thread"]:
            lock.hold_thread(attempt.orders["home"], attempt.orders["thread"], THREAD_WAIT)
        env = attempt.environment()
        prompt_file = attempt.write_prompt(workdir)
        turn = Turn(attempt.place, attempt.reader, attempt.orders, prompt_file, argv, env)
    except (Unfit, ValueError) as problem:
        attempt.finish(Outcome.CONFIG, str(problem))
    except (TypeError, AttributeError, LookupError) as damage:
        text = f"the task's record or its orders are damaged: {type(damage).__name__}: {damage}"
        attempt.finish(Outcome.CONFIG, text)
    except lock.Locked as held:
        attempt.finish(Outcome.THREAD_BUSY, f"{held} is written by another process")
    except OSError as error:
        attempt.finish(Outcome.HOST, f"cannot start Codex: {error}")
    else:
        turn.run(wakeup, _parent_pipe())
        _conclude(attempt, turn)


def _conclude(attempt: Attempt, turn: Turn) -> None:
    answer = attempt.answer()
    status = turn.status if turn.status is not None else -1
    outcome, message = codex.judge(
        attempt.reader,
        exit_status=status,
        stderr_head=turn.told.decode("utf-8", "replace"),
        requested_thread=attempt.orders["thread"],
        stop_reason=turn.stop_reason,
        answer=answer,
    )
    spent = turn.usage
    attempt.finish(
        outcome,
        message,
        answer=answer,
        exit_status=status,
        stop_reason=turn.stop_reason,
        stderr=turn.told[:2000].decode("utf-8", "replace"),
        cost={
            "cpu_seconds": round(spent.ru_utime + spent.ru_stime, 3),
            "memory_peak_bytes": spent.ru_maxrss * 1024,
        },
    )


def _catch_signals() -> int:
    """From now on a signal is a byte in the pipe that is returned."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: None)
    return read


def _parent_pipe() -> int | None:
    """Standard input, if it is the pipe that tells of the daemon's end."""
    return 0 if stat.S_ISFIFO(os.fstat(0).st_mode) else None


def main() -> NoReturn:
    args = sys.argv[1:]
    tasks = "/var/lib/codexd/tasks"
    if args[:1] == ["--tasks"] and len(args) > 2:
        tasks, args = args[1], args[2:]
    if len(args) != 1 or not args[0].replace("-", "").isalnum():
        print("usage: codexd-worker [--tasks DIRECTORY] ID", file=sys.stderr)
        sys.exit(2)
    wakeup = _catch_signals()
    attempt = Attempt(tasks, args[0])
    if attempt.mark():
        perform(attempt, wakeup)
    # Nothing of the interpreter is worth tearing down: the result is on disk.
    os._exit(0)


if __name__ == "__main__":
    main()
