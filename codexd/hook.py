"""One run of a hook's command, outside the master: what codexd-hook@ID.service does.

Its directory, which the master makes, has `order.json` (the event's id, the command,
its environment, the seconds it has) and `stdin` (the event as JSON).  The command is run
with that and nothing of our own environment; then `result.json` says whether its exit
status was 0, what happened if not, and the end of what it printed.  The master hears the
end of a child; of a unit, ExecStopPost= rings its bell.

Promises: no two runs in one directory at once, and none of an event that has its
result; whatever the command started ends with it.  The result is there whole, or not at
all: then the master tries again, and the command may see the same event twice.

May fail: whatever the command does is a result.  An order that cannot be read, or a
directory that cannot be written, is told on stderr, exit status 1.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from codexd import durable, lock

GRACE = 3.0  # seconds between SIGTERM and SIGKILL
KEPT = 64 << 10  # bytes of output, the last ones
ORDER, STDIN, RESULT = "order.json", "stdin", "result.json"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>


class Stopped(Exception):
    """Somebody wants us to end: there is no result."""


class _Run:
    """The command while it runs; `tail` is the end of what it printed."""

    def __init__(self, argv: list[str], env: dict[str, str], stdin: Path) -> None:
        """Raises OSError where it cannot be started."""
        self.tail = b""
        with open(stdin, "rb") as given:
            self.child = subprocess.Popen(
                argv, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=env, cwd="/", start_new_session=True,
            )  # fmt: skip
        assert self.child.stdout is not None
        self._pipe = self.child.stdout.fileno()
        os.set_blocking(self._pipe, False)
        self._end = os.pidfd_open(self.child.pid)
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)
        self._poll.register(self._end, select.POLLIN)

    def wait(self, seconds: float) -> bool:
        """Until the command itself has ended, whatever it left behind; False: it has not."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left * 1000):
                if fd == self._end:
                    return True
                self._hear()
        return False

    def _hear(self) -> None:
        """What it has printed by now."""
        try:
            while data := os.read(self._pipe, 64 << 10):
                self.tail = (self.tail + data)[-KEPT:]
        except BlockingIOError:
            return
        self._poll.unregister(self._pipe)  # nobody can print any more

    def close(self) -> int:
        """End what still is there; the command's status as `subprocess` has it."""
        # It was not waited for yet, so the group is still that one.
        if not self.wait(0.001):
            os.killpg(self.child.pid, signal.SIGTERM)
            self.wait(GRACE)
        os.killpg(self.child.pid, signal.SIGKILL)
        status = self.child.wait()
        try:
            self._hear()
        except KeyError:
            pass  # all was heard before
        os.close(self._end)
        self.child.stdout.close()  # type: ignore[union-attr]
        return status


def run(directory: Path) -> None:
    """One run, and its result.  Raises OSError, ValueError, Stopped."""
    order = durable.read_json(directory / ORDER)
    held = lock.hold(directory / "lock", 2 * _seconds(order))
    try:
        if _has_result(directory, order["event"]):
            return
        argv, env = order["command"], order["env"]
        if not isinstance(argv, list) or not isinstance(env, dict):
            raise ValueError(f"{directory / ORDER}: no command or no environment")
        problem, said = _ran(argv, env, directory / STDIN, _seconds(order))
        leave(directory, str(order["event"]), problem, said.decode("utf-8", "replace"))
    finally:
        os.close(held)


def _seconds(order: dict[str, object]) -> float:
    return float(str(order["limit"]))


def _has_result(directory: Path, event: object) -> bool:
    try:
        return durable.read_json(directory / RESULT).get("event") == event
    except (FileNotFoundError, ValueError):
        return False


def _ran(
    argv: list[str], env: dict[str, str], stdin: Path, limit: float
) -> tuple[str | None, bytes]:
    """What went wrong, and the output."""
    try:
        one = _Run(argv, env, stdin)
    except OSError as error:
        return f"cannot be run: {error.strerror}: {error.filename}", b""
    ended = False
    try:
        ended = one.wait(limit)
    finally:
        status = one.close()
    if not ended:
        return f"it did not end within {limit:g} s, and was killed", one.tail
    if status < 0:
        return f"killed by signal {-status}", one.tail
    return (f"exit status {status}" if status else None), one.tail


def leave(directory: Path, event: str, problem: str | None, output: str) -> None:
    """Write the result."""
    told = {"event": event, "problem": problem, "output": output}
    durable.write_json(directory / RESULT, told)


def ended(directory: Path) -> None:
    """ExecStopPost=: where a run was killed with this program, say by what; then ring."""
    try:
        event = durable.read_json(directory / ORDER)["event"]
    except FileNotFoundError:
        return  # the master has seen the result already
    how = os.environ.get("SERVICE_RESULT", "")
    if not _has_result(directory, event):
        leave(directory, str(event), f"its unit ended without a result: {how or 'stopped'}", "")
    _ring()


def _ring() -> None:
    bell = os.environ.get("CODEXD_BELL")
    if not bell:
        return
    try:
        fd = os.open(bell, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.write(fd, b".")
        os.close(fd)
    except OSError:
        pass  # nobody listens, or it is ringing; the master looks at its next start


def _stop(_number: int, _frame: object) -> None:
    raise Stopped


def _bind(parent: int) -> None:
    """End when the daemon does, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise Stopped


def _end_children() -> None:
    """Kill what left the command's group: where it lost its parent, it is our child now."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    try:
        while found := children.read_text().split():
            for pid in map(int, found):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    except (FileNotFoundError, PermissionError):
        return  # a kernel that does not tell, or somebody else's by sudo: the unit ends them


def main() -> None:
    parser = argparse.ArgumentParser("codexd-hook", description="tell one event to its hook")
    parser.add_argument("--parent", type=int, metavar="PID", help="end with this process")
    parser.add_argument(
        "--ended", action="store_true", help="only see to it that there is a result"
    )
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        if args.parent:
            _bind(args.parent)
        if args.ended:
            ended(args.directory)
        else:
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            run(args.directory)
    except Stopped:
        sys.exit(os.EX_TEMPFAIL)
    except (OSError, ValueError, KeyError, lock.Locked) as problem:
        sys.exit(f"codexd-hook: {args.directory}: {problem}")
    finally:
        _end_children()


if __name__ == "__main__":
    main()
