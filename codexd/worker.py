"""codexd-worker ID: one attempt of one task; a function from tasks/ID to tasks/ID/N.

Reads task.json and N/attempt.json, runs Codex, and leaves in tasks/ID/N:

    started       the at-most-once point: made before Codex, never twice
    prompt.md     what Codex was given; prompt-R.md, in turn R
    verify-R.txt  what the task's own check printed after turn R, if it has one
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

from codexd import durable
from codexd.start import Attempt, Unsafe, Untold, why_not

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from codexd.service import Service

UNORDERED = 1  # exit status where there is no such task, or no orders that can be read
STOPPED = 75  # exit status after a turn that somebody else ended; codexd-exit asks who


def run(tasks: str, id: str) -> int:
    """One attempt, if it is ordered and nobody has begun it; our exit status."""
    try:
        attempt = Attempt(tasks, id)
    except Exception as problem:
        return _unordered(problem)
    try:
        begun_before = not attempt.mark()
    except Untold as problem:
        return _untold(attempt, problem, _manager())
    if begun_before:
        _manager()
        return 0
    return perform(attempt)


def _unordered(problem: Exception) -> int:
    """Say in one line why nobody knows what to do; our exit status."""
    from codexd.exits import UNTOLD

    text = str(problem)
    if isinstance(problem, OSError) and problem.filename:
        text = f"{problem.filename}: {problem.strerror}"
    elif not isinstance(problem, OSError | ValueError):
        text = f"the task's record or its orders are damaged: {type(problem).__name__}: {problem}"
    _complain(text)
    refused = isinstance(problem, OSError) and problem.errno not in durable.ABSENT
    return UNTOLD if refused else UNORDERED


def perform(attempt: Attempt) -> int:
    """Run Codex and write the result; our exit status."""
    try:
        if attempt.orders.get("probe"):  # the master wants to know whether we could
            attempt.sandbox()
            attempt.finish("done", "")
            _manager()
            return 0
        process = attempt.begin()
    except Untold as problem:
        return _untold(attempt, problem, _manager())
    except Exception as problem:
        return _not_begun(attempt, problem)
    from codexd.child import Halt
    from codexd.rounds import Rounds

    halt = Halt()
    manager = _manager()
    attempt.log(manager, "attempt.begun", pid=process[0])
    rounds = Rounds(attempt, halt, manager)
    try:
        outcome = rounds.run(process)
        _ring()
        attempt.log(manager, "attempt.ended", outcome=outcome, status=rounds.status)
    except Untold as problem:
        return _untold(attempt, problem, manager)
    finally:
        rounds.sweep()
    return STOPPED if outcome.value == "interrupted" else 0


def _not_begun(attempt: Attempt, problem: Exception) -> int:
    outcome, message = why_not(problem)
    try:
        attempt.finish(outcome, message, gate=isinstance(problem, Unsafe))
    except Untold as lost:
        return _untold(attempt, lost, _manager())
    _ring()
    attempt.log(_manager(), "attempt.ended", outcome=outcome, why=message)
    return 0


def _untold(attempt: Attempt, problem: Untold, manager: Service | None) -> int:
    """Say in one line what the result cannot; our exit status, which says it to the master."""
    from codexd.exits import UNTOLD

    attempt.log(manager, "attempt.untold", why=problem)
    if manager is None:
        _complain(str(problem))
    return UNTOLD


def _complain(text: str) -> None:
    try:
        os.write(2, f"codexd-worker: {text}\n".encode("utf-8", "replace"))
    except OSError:
        pass  # a log on the same disk


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


def main() -> NoReturn:
    args = sys.argv[1:]
    tasks = "/var/lib/codexd/tasks"
    if args[:1] == ["--tasks"] and len(args) > 2:
        tasks, args = args[1], args[2:]
    if len(args) != 1 or not args[0].replace("-", "").isalnum():
        print("usage: codexd-worker [--tasks DIRECTORY] ID", file=sys.stderr)
        sys.exit(2)
    # Nothing of the interpreter is worth tearing down: the result is on disk.
    os._exit(run(tasks, args[0]))


if __name__ == "__main__":
    main()
