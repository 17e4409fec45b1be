"""Locks that the kernel frees: whoever dies, nothing stale is left."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codexd import lock

ROOT = Path(__file__).resolve().parent.parent
THREAD = "019ab3f0-1111-7222-8333-123456789abc"
OTHER = "019ab3f0-1111-7222-8333-123456789abd"


def holder(code: str, *args: str | Path) -> subprocess.Popen[bytes]:
    """A process that runs `code`, which must take a lock, and holds it until it is ended."""
    text = f"import sys, time; from codexd import lock\n{code}\nprint(flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-c", text, *map(str, args)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


HOLD = "lock.hold(sys.argv[1], 0)"
HOLD_THREAD = "lock.hold_thread(sys.argv[1], sys.argv[2], 0)"


def test_one_holder_and_none_after_it_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = holder(HOLD, path)
    assert lock.is_held(path)
    with pytest.raises(lock.Locked, match="lock"):
        lock.hold(path, 0)
    end(process)
    assert not lock.is_held(path)
    os.close(lock.hold(path, 0))
    assert not lock.is_held(path)


def test_the_deadline_is_kept(tmp_path: Path) -> None:
    process = holder(HOLD, tmp_path / "lock")
    began = time.monotonic()
    with pytest.raises(lock.Locked):
        lock.hold(tmp_path / "lock", 0.3)
    assert 0.3 <= time.monotonic() - began < 2
    end(process)


def test_a_lock_freed_in_time_is_taken(tmp_path: Path) -> None:
    process = holder(HOLD, tmp_path / "l")
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
    os.close(lock.hold(tmp_path / "l", 10))
    killer.wait()
    end(process)


def test_it_lives_as_long_as_the_last_who_inherited_it(tmp_path: Path) -> None:
    code = (
        "import os, subprocess\nnull = subprocess.DEVNULL\n"
        "fd = lock.hold(sys.argv[1], 0)\n"
        "child = subprocess.Popen(['sleep', '60'], pass_fds=[fd], stdout=null, stderr=null)\n"
        "print(child.pid, flush=True)\nos._exit(0)"
    )
    text = f"import sys; from codexd import lock\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", text, tmp_path / "l"], cwd=ROOT, capture_output=True, check=True
    )
    assert lock.is_held(tmp_path / "l")
    os.kill(int(done.stdout), 9)
    os.close(lock.hold(tmp_path / "l", 5))


def test_asking_takes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not lock.is_held(path), "a lock that nobody ever took"
    assert not path.exists()
    path.touch()
    path.chmod(0o440)
    other = os.open(path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)  # somebody else who only asks
    assert not lock.is_held(path)
    os.close(other)


def test_nobody_else_can_open_it(tmp_path: Path) -> None:
    """Whoever may read it could hold it, and keep the daemon from starting."""
    path = tmp_path / "lock"
    for _ in range(2):
        os.close(lock.hold(path, 0))
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o640)  # as another version may have left it


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    process = holder(HOLD, tmp_path / "lock")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(lock.Locked):
            lock.hold(tmp_path / "lock", 0)
        lock.is_held(tmp_path / "lock")
    assert len(os.listdir("/proc/self/fd")) == before
    end(process)


def test_one_writer_of_a_thread(tmp_path: Path) -> None:
    process = holder(HOLD_THREAD, tmp_path, THREAD)
    with pytest.raises(lock.Locked, match=THREAD):
        lock.hold_thread(str(tmp_path), THREAD, 0)
    # Ids of the same millisecond differ at their end alone.
    os.close(lock.hold_thread(str(tmp_path), OTHER, 0))
    end(process)
    os.close(lock.hold_thread(str(tmp_path), THREAD, 5))
    assert os.listdir(tmp_path / ".codexd") == ["threads.lock"], "no file for each thread"
    assert (tmp_path / ".codexd").stat().st_mode & 0o777 == 0o700


def test_a_link_in_the_place_of_a_lock_makes_no_file_elsewhere(tmp_path: Path) -> None:
    """What an unconfined task left in CODEX_HOME is opened by the master as well."""
    (tmp_path / ".codexd").mkdir()
    (tmp_path / ".codexd" / "starts.lock").symlink_to(tmp_path / "all.drain")
    with pytest.raises(OSError, match="symbolic"):
        lock.hold_start(str(tmp_path), 0)
    assert not (tmp_path / "all.drain").exists()


def test_many_threads_at_once(tmp_path: Path) -> None:
    ids = [f"019ab3f0-1111-7222-8333-{n:012x}" for n in range(0, 1 << 48, 1 << 44)]
    code = "for t in sys.argv[2:]: lock.hold_thread(sys.argv[1], t, 0)"
    # One process has each range only as long as it closes none of them.
    process = holder(code, tmp_path, *ids)
    for id in ids:
        with pytest.raises(lock.Locked):
            lock.hold_thread(str(tmp_path), id, 0)
    end(process)


def test_a_thread_s_lock_is_not_inherited_by_what_codex_leaves_behind(tmp_path: Path) -> None:
    code = (
        "import subprocess\nnull = subprocess.DEVNULL\n"
        "lock.hold_thread(sys.argv[1], sys.argv[2], 0)\n"
        "child = subprocess.Popen(['sleep', '60'], close_fds=False, stdout=null, stderr=null)\n"
        "print(child.pid, end=' ')"
    )
    text = f"import sys; from codexd import lock\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", text, tmp_path, THREAD], cwd=ROOT, capture_output=True, check=True
    )
    os.close(lock.hold_thread(str(tmp_path), THREAD, 0))
    os.kill(int(done.stdout), 9)
