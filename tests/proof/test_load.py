"""Load: ten thousand queued tasks, a thousand slow clients, and somebody who asks how it goes.

The bounds are those of the promise at every level.  In `make test`, where everything else
runs beside it, seconds are those of the processors that it had, if these are less, and how
long /health may take is asked of most answers; elsewhere by the clock, and of all.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from codexd.http import CONNECTIONS, DEADLINE
from tests.daemon import Daemon, until
from tests.processes import naming
from tests.proof.level import Figures, pick
from tests.test_bad_input import FAKE
from tests.web import Client

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(pick(600, 1800, 1800))]

TASKS = 10_000
SLOW = 1000
RSS = 100 << 20  # bytes of the daemon, and of its HTTP server, at any time
RATE = 50  # accepts a second, at least
HEALTH = pick(0.5, 0.2, 0.2)  # seconds, at most; short: beside other tests
PART = pick(0.9, 1.0, 1.0)  # of the answers of /health, the quickest
OTHERS = 32  # connections that are not of slow clients, or are just coming, at most
CONFIG = f"codex:\n  bin: {FAKE}\nhttp:\n  listen: unix\nlimits:\n  disk_free: 0\n  queue: 20000\n"


@dataclass
class Slow:
    """One connection, and which it was."""

    socket: socket.socket
    number: int
    born: float


class SlowClients:
    """Connections that send a byte of a request now and then, and never come to its end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sent = self.lost = self.made = 0
        self.early: list[str] = []  # closed although others had waited for longer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> SlowClients:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        """As many as there are to be; for each that the server closes a new one comes."""
        there: deque[Slow] = deque()
        while not self._stop.wait(0.01):
            # Once all have been there, a hundred a second come anew: more is their work alone.
            most = 10 if self.made < SLOW else 1
            for _ in range(min(most, SLOW - len(there))):
                if (one := self._connected()) is None:
                    break
                there.append(one)
            for _ in range(min(10, len(there))):  # each says something about once a second
                one = there.popleft()
                try:
                    one.socket.send(b"G")
                    there.append(one)
                    self.sent += 1
                except OSError:
                    self._closed(one)
        for one in there:
            one.socket.close()

    def _connected(self) -> Slow | None:
        """One more, None while as many wait already as the server lets."""
        one = socket.socket(socket.AF_UNIX)
        one.settimeout(5)
        try:
            one.connect(self.address.removeprefix("unix:"))
        except BlockingIOError:
            one.close()
            return None
        self.made += 1
        return Slow(one, self.made, time.monotonic())

    def _closed(self, one: Slow) -> None:
        """By the server: it was too slow, or the oldest of as many as there may be."""
        one.socket.close()
        self.lost += 1
        younger, age = self.made - one.number, time.monotonic() - one.born
        if younger < CONNECTIONS - OTHERS and age < DEADLINE:
            self.early.append(f"{younger} younger ones, {age:.1f} s")


class Asked:
    """/health, ten times a second."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.seconds: list[float] = []
        self.errors: list[str] = []

    @contextmanager
    def going_on(self) -> Iterator[None]:
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(0.1):
                began = time.perf_counter()
                try:
                    with Client(self.address) as client:
                        client.ask("GET", "/health")
                except (OSError, ValueError, AssertionError) as error:
                    self.errors.append(repr(error))
                self.seconds.append(time.perf_counter() - began)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def peak(pid: int) -> int:
    """The most memory that a process ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


class Watch:
    """Seconds that something took."""

    def __init__(self, *pids: int) -> None:
        """`pids`: whose work it is, beside ours."""
        self.pids = pids
        self.began, self.had = time.monotonic(), self._had()

    def seconds(self) -> float:
        passed = time.monotonic() - self.began
        return pick(min(passed, self._had() - self.had), passed, passed)

    def _had(self) -> float:
        """Seconds of the processors that we and those had so far."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2] for pid in self.pids]
        ticks = sum(int(ticks) for line in fields for ticks in line.split()[11:13])
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def server(daemon: Daemon) -> int:
    """The HTTP server's process."""
    (pid,) = [pid for pid in naming(str(daemon.root)) if b"codexd.http" in words(pid)]
    return pid


def connections(pid: int) -> int:
    """Sockets of the HTTP server: its connections, and two or three of its own."""
    return sum(is_socket(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))


def allowed(count: int) -> int:
    """The count, 0 where it is not what the contract allows."""
    return count if CONNECTIONS - OTHERS <= count <= CONNECTIONS + OTHERS else 0


def words(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def is_socket(path: str) -> bool:
    with suppress(FileNotFoundError):  # closed meanwhile
        return os.readlink(path).startswith("socket:")
    return False


def test_ten_thousand_and_a_thousand(tmp_path: Path, figure: Figures) -> None:
    with Daemon(tmp_path / "root", config=CONFIG, covered=False) as daemon:
        address = daemon.ready.rpartition("http=")[2]
        assert daemon.child is not None
        pid, http = daemon.child.pid, server(daemon)
        (daemon.dirs.inbox / "all.hold").touch()
        asked = Asked(address)

        def queued() -> int:
            with suppress(OSError, ValueError):  # we were the slowest of all ourselves
                return health(address)["queued"]
            return 0

        with SlowClients(address) as slow, asked.going_on():
            half = TASKS // 2
            # By HTTP, each durable before it is answered; the rest as files.
            until(lambda: slow.sent + slow.lost > SLOW, "slow clients")
            watch = Watch(pid, http)
            again = submit(address, half)
            by_http = watch.seconds()
            watch = Watch(pid, http)
            for number in range(half):
                daemon.drop(f"t{number}.md", "x")
            until(lambda: queued() == 2 * half, "all accepted", 1500)
            by_file = watch.seconds()
            # For a moment it may have more: all who waited come in before the oldest are closed.
            at_once = until(lambda: allowed(connections(http)), "as many as may be")
            most, servers = peak(pid), peak(http)
        times = sorted(asked.seconds)
        figure("load: tasks queued", 2 * half)
        figure(
            "load: slow clients that connected, and how many were closed", (slow.made, slow.lost)
        )
        figure("load: accepts/s by HTTP (8 clients)", round(half / by_http))
        figure("load: requests said again", again)
        figure("load: accepts/s of files", round(half / by_file))
        figure("load: connections that the server had", at_once)
        figure("load: RSS of the daemon at its peak, MiB", round(most / (1 << 20), 1))
        figure("load: RSS of the HTTP server at its peak, MiB", round(servers / (1 << 20), 1))
        figure("load: /health ms, median", round(1000 * statistics.median(times), 1))
        figure("load: /health ms, 90 %", round(1000 * times[int(0.9 * len(times))], 1))
        figure("load: /health ms, 99 %", round(1000 * times[int(0.99 * len(times))], 1))
        figure("load: /health ms, worst", round(1000 * times[-1], 1))
        assert len(asked.errors) <= (1 - PART) * len(times) / 10, asked.errors[:3]
        assert half / by_http >= RATE
        assert half / by_file >= RATE
        assert times[int(PART * (len(times) - 1))] < HEALTH
        assert max(most, servers) < RSS
        assert slow.made >= SLOW
        assert not slow.early, slow.early[:3]
        daemon.kill()
        began = time.monotonic()
        daemon.start()
        restart = time.monotonic() - began
        figure("load: restart with all queued, s", round(restart, 2))
        until(lambda: queued() == 2 * half, "all queued again")


def submit(address: str, count: int) -> int:
    """By eight clients at once; how many requests had to be said again."""
    again: list[Exception] = []
    problems: list[object] = []

    def run(numbers: range) -> None:
        for number in numbers:
            # With a key it may be said again, should the connection be closed on us.
            body = json.dumps({"prompt": f"task {number}", "key": f"load-{number}"}).encode()
            for _ in range(5):
                try:
                    with Client(address) as client:
                        said = client.ask("POST", "/tasks", body)
                    break
                except (OSError, ValueError) as error:
                    again.append(error)
            if said.status != 202:
                problems.append(said)

    parts = [threading.Thread(target=run, args=(range(i, count, 8),)) for i in range(8)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert not problems, problems[:2]
    return len(again)


def health(address: str) -> dict[str, int]:
    with Client(address) as client:
        return dict(client.ask("GET", "/health").json)
