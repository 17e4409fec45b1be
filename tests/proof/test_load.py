"""Load: ten thousand queued tasks, a thousand slow clients, and somebody who asks how it goes.

Figures, not a stopwatch: in `make test` the bounds are wide.  `make proof` prints what
was measured: accepts a second, the daemon's memory, how long /health took.
"""

from __future__ import annotations

import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon import Daemon, until
from tests.proof.level import Figures, pick
from tests.test_bad_input import FAKE
from tests.web import Client

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(pick(120, 1800, 1800))]

TASKS = pick(400, 10_000, 10_000)
SLOW = pick(300, 1000, 1000)
RSS = 100 << 20  # bytes
CONFIG = f"codex:\n  bin: {FAKE}\nhttp:\n  listen: unix\nlimits:\n  disk_free: 0\n  queue: 20000\n"


class SlowClients:
    """Connections that send a byte of a request now and then, and never come to its end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sent = self.lost = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> SlowClients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        """As many as there are to be; the server closes the oldest, and a new one comes."""
        there: list[socket.socket] = []
        while not self._stop.wait(0.01):
            while len(there) < SLOW and not self._stop.is_set():
                one = socket.socket(socket.AF_UNIX)
                one.settimeout(5)
                one.connect(self.address.removeprefix("unix:"))
                there.append(one)
            for one in there[:50]:
                try:
                    one.send(b"G")
                    self.sent += 1
                except OSError:
                    self.lost += 1
                    one.close()
                    there.remove(one)
            there = there[50:] + there[:50]
        for one in there:
            one.close()


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


def rss(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def test_ten_thousand_and_a_thousand(tmp_path: Path, figure: Figures) -> None:
    with Daemon(tmp_path / "root", config=CONFIG) as daemon:
        address = daemon.ready.rpartition("http=")[2]
        assert daemon.child is not None
        pid = daemon.child.pid
        (daemon.dirs.inbox / "all.hold").touch()
        asked = Asked(address)
        queued = lambda: health(address)["queued"]  # noqa: E731
        with SlowClients(address) as slow, asked.going_on():
            half = TASKS // 2
            # By HTTP, each durable before it is answered; the rest as files.
            by_http = timed(lambda: submit(address, half))
            dropping = timed(lambda: [daemon.drop(f"t{n}.md", "x") for n in range(half)])
            taking = timed(lambda: until(lambda: queued() == 2 * half, "all accepted", 1500))
            most = rss(pid)
        times = sorted(asked.seconds)
        figure("load: tasks queued", 2 * half)
        figure("load: slow clients, and how often one was closed", (SLOW, slow.lost))
        figure("load: accepts/s by HTTP (8 clients)", round(half / by_http))
        figure("load: accepts/s of files", round(half / (dropping + taking)))
        figure("load: RSS of the daemon, MiB", round(most / (1 << 20), 1))
        figure("load: /health ms, median", round(1000 * statistics.median(times), 1))
        figure("load: /health ms, 99 %", round(1000 * times[int(0.99 * len(times))], 1))
        figure("load: /health ms, worst", round(1000 * times[-1], 1))
        assert not asked.errors, asked.errors[:3]
        assert most < RSS
        restart = timed(lambda: (daemon.kill(), daemon.start()))
        figure("load: restart with all queued, s", round(restart, 2))
        until(lambda: queued() == 2 * half, "all queued again")


def submit(address: str, count: int) -> None:
    """By eight clients at once."""
    problems: list[object] = []

    def run(numbers: range) -> None:
        with Client(address) as client:
            for number in numbers:
                body = json.dumps({"prompt": f"task {number}"}).encode()
                said = client.ask("POST", "/tasks", body)
                if said.status != 202:
                    problems.append(said)

    parts = [threading.Thread(target=run, args=(range(i, count, 8),)) for i in range(8)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert not problems, problems[:2]


def health(address: str) -> dict[str, int]:
    with Client(address) as client:
        return dict(client.ask("GET", "/health").json)
