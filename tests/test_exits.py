"""Exit records: written by the real script, read back, and what they mean."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from codexd import cgroup, exits
from codexd.exits import Ended
from codexd.outcome import Outcome

SCRIPT = Path(__file__).resolve().parent.parent / "systemd" / "codexd-exit"
ID = "20261123t072011-k3f9qa7x2m"
BOOT = "b" * 32


def record(place: Path, **told: str) -> Ended:
    """What codexd-exit writes with these words of systemd's, as the master reads it."""
    env = {"PATH": os.environ["PATH"], "INVOCATION_ID": "a" * 32, **told}
    argv = ["sh", str(SCRIPT), f"codexd-worker@{ID}.service", ID, BOOT, str(place)]
    subprocess.run(argv, env=env, check=True, timeout=20)
    found = exits.read(place / ID)
    assert found
    assert os.listdir(place) == [ID], "whole or not at all"
    return found


def test_a_good_end(tmp_path: Path) -> None:
    found = record(tmp_path, SERVICE_RESULT="success", EXIT_CODE="exited", EXIT_STATUS="0")
    assert found == Ended("success", "exited", "0", "a" * 32, BOOT)


def test_a_bad_end_tells_what_was_used(tmp_path: Path) -> None:
    """Of the control group that the script is in: here that of the tests."""
    found = record(tmp_path, SERVICE_RESULT="signal", EXIT_CODE="killed", EXIT_STATUS="KILL")
    assert (found.result, found.code, found.status) == ("signal", "killed", "KILL")
    assert not found.stopping
    ours: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        ours |= cgroup.of_unit(line.rpartition("/")[2])
    assert found.cost.keys() == cgroup.cost(ours).keys()
    for name, value in found.cost.items():
        assert value <= cgroup.cost(ours)[name]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
@pytest.mark.parametrize(("state", "stopping"), [
    ("running", False), ("degraded", False), ("starting", False), ("stopping", True),
    ("", True), ("unknown", True), ("offline", True),
])  # fmt: skip
def test_root_asks_whether_the_host_goes_down(tmp_path: Path, state: str, stopping: bool) -> None:
    """What is asked is a stand-in; no answer is no cancel.  Here root becomes root."""
    place, tool = tmp_path / "exits", tmp_path / "systemctl"
    place.mkdir()
    tool.write_text(f"#!/bin/sh\necho {state}\nexit 1\n")
    tool.chmod(0o755)
    for status in ("KILL", "0"):
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "EXIT_STATUS": status}
        argv = [str(SCRIPT), "unit", ID, BOOT, str(place), "root"]
        subprocess.run(argv, env=env, check=True, timeout=20)
        found = exits.read(place / ID)
        assert found
        assert found.stopping is (stopping and status != "0")


def test_the_bell_rings(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".bell")
    bell = os.open(tmp_path / ".bell", os.O_RDWR | os.O_NONBLOCK)
    argv = ["sh", str(SCRIPT), "unit", ID, BOOT, str(tmp_path)]
    subprocess.run(argv, env={"PATH": os.environ["PATH"], "EXIT_STATUS": "0"}, check=True)
    assert os.read(bell, 10) == b"."
    os.close(bell)


def test_nobody_listens(tmp_path: Path) -> None:
    """It must not wait for a master that is gone."""
    os.mkfifo(tmp_path / ".bell")
    argv = ["sh", str(SCRIPT), "unit", ID, BOOT, str(tmp_path)]
    env = {"PATH": os.environ["PATH"], "EXIT_STATUS": "0"}
    subprocess.run(argv, env=env, check=True, timeout=5)
    assert exits.read(tmp_path / ID)


def test_there_is_none(tmp_path: Path) -> None:
    assert exits.read(tmp_path / ID) is None


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"result", b"[cpu.stat]", b"\n[\n[]\n"])
def test_a_damaged_record_harms_nobody(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / ID).write_bytes(damage)
    found = exits.read(tmp_path / ID)
    assert found
    assert exits.outcome(found, BOOT)[0] is Outcome.INTERRUPTED, "of no boot that we know"


@pytest.mark.parametrize("number", ["9" * 400, "9" * 5000, "-1", "²", "1e999", "nan"])
def test_a_number_that_nothing_can_count_is_left_out(tmp_path: Path, number: str) -> None:
    record = f"result=exit-code\nstatus={number}\nboot={BOOT}\n[cpu.stat]\nusage_usec {number}\n"
    record += f"[memory.peak]\n{number}\n[pids.peak]\n3\n[io.stat]\n8:0 rbytes={number} wbytes=7\n"
    (tmp_path / ID).write_text(record)
    found = exits.read(tmp_path / ID)
    assert found
    assert found.cost == {"tasks_peak": 3, "io_read_bytes": 0, "io_write_bytes": 7}
    assert exits.outcome(found, BOOT)[0] is Outcome.HOST


@pytest.mark.parametrize("what", ["FIFO", "directory", "link", "sparse"])
def test_what_is_no_record_tells_nothing(tmp_path: Path, what: str) -> None:
    path = tmp_path / ID
    make: dict[str, Callable[[], object]] = {
        "FIFO": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "link": lambda: path.symlink_to("/dev/zero"),
        "sparse": lambda: (path.touch(), os.truncate(path, 8 << 30)),
    }
    make[what]()
    found = exits.read(path)
    assert found
    outcome, text = exits.outcome(found, BOOT)
    assert (outcome, "damaged" in text) == (Outcome.INTERRUPTED, True)


@pytest.mark.parametrize(("ended", "outcome", "words"), [
    (Ended("success", "killed", "TERM"), Outcome.CANCELLED, "systemctl stop"),
    (Ended("success", "exited", "75"), Outcome.CANCELLED, "systemctl stop"),
    (Ended("success", "exited", "75", stopping=True), Outcome.INTERRUPTED, "shut down"),
    (Ended("signal", "killed", "KILL", boot="other"), Outcome.INTERRUPTED, "restarted"),
    (Ended("signal", "killed", "KILL"), Outcome.SIGNAL, "SIGKILL"),
    (Ended("core-dump", "dumped", "SEGV"), Outcome.SIGNAL, "SIGSEGV"),
    (Ended("signal", "killed", "KILL", oom_kills=1), Outcome.OOM, "memory"),
    (Ended("oom-kill", "killed", "KILL"), Outcome.OOM, "memory"),
    (Ended("timeout", "exited", "75"), Outcome.TIMEOUT, "for too long (RuntimeMaxSec=)"),
    (Ended("timeout", "killed", "TERM"), Outcome.TIMEOUT, "TimeoutStartSec"),
    (Ended("timeout", "killed", "KILL"), Outcome.TIMEOUT, "TimeoutStopSec"),
    (Ended("timeout", "killed", "KILL", stopped=True), Outcome.CANCELLED, "systemctl stop"),
    (Ended("watchdog", "killed", "ABRT"), Outcome.STALL, "watchdog"),
    (Ended("exit-code", "exited", "226"), Outcome.HOST, "could not be set up"),
    (Ended("exit-code", "exited", "1"), Outcome.HOST, "its worker failed"),
    (Ended("exit-code", "exited", "74"), Outcome.HOST, "could not read or write its directory"),
    (Ended("protocol", "exited", "0"), Outcome.HOST, "its worker failed"),
    (Ended("vanished"), Outcome.HOST, "before its worker began"),
])  # fmt: skip
def test_what_it_means(ended: Ended, outcome: Outcome, words: str) -> None:
    found, message = exits.outcome(ended, boot="")
    assert found is outcome
    assert words in message


V2 = {
    "cpu.stat": "usage_usec 1234567\nuser_usec 1000000\nsystem_usec 234567\n",
    "memory.peak": "104857600\n",
    "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\n",
    "io.stat": "8:0 rbytes=4096 wbytes=100 rios=1 wios=2 dbytes=0 dios=0\n"
               "8:16 rbytes=1 wbytes=2 rios=1 wios=1 dbytes=0 dios=0\n",
    "pids.peak": "44\n",
}  # fmt: skip
V1 = {
    "cpu.stat": "nr_periods 0\nnr_throttled 0\nthrottled_time 0\n",
    "cpuacct.usage": "1234567890\n",
    "memory.max_usage_in_bytes": "104857600\n",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "blkio.throttle.io_service_bytes": "8:0 Read 4097\n8:0 Write 102\n8:0 Total 4199\nTotal 4199\n",
    "pids.peak": "44\n",
}


@pytest.mark.parametrize("files", [V2, V1])
def test_what_a_control_group_used(files: dict[str, str]) -> None:
    assert cgroup.cost(files) == {
        "cpu_seconds": 1.235, "memory_peak_bytes": 104857600, "io_read_bytes": 4097,
        "io_write_bytes": 102, "tasks_peak": 44,
    }  # fmt: skip
    assert cgroup.oom_kills(files) == 2


def test_what_is_not_counted_is_not_guessed() -> None:
    assert cgroup.cost({}) == {}
    assert cgroup.cost({"memory.peak": "max\n", "cpu.stat": "nr_periods 0\n"}) == {}
    assert cgroup.cost({"blkio.throttle.io_service_bytes": "Total 0\n"}) == {}
    assert cgroup.oom_kills({}) == 0


def test_of_another_unit_nothing_is_told() -> None:
    assert cgroup.of_unit("codexd-worker@of-nobody.service") == {}
