"""The worker by itself: tasks/ID in, tasks/ID/N out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codexd import codex
from codexd.exits import UNTOLD
from codexd.model import Request
from codexd.outcome import Outcome
from codexd.processes import Processes
from codexd.worker import STOPPED
from tests.daemon import uncovered, until
from tests.processes import codex_of, kill

ID = "20261123t072011-k3f9qa7x2m"
FAKE = Path(__file__).parent / "bin" / "codex"
POWERLESS = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
# Everything the worker may have imported when it starts Codex, besides what an
# empty Python has.  A module more costs every task its time: measure before.
IMPORTS = {
    "__future__", "_json", "codexd", "codexd.canary", "codexd.command", "codexd.durable",
    "codexd.lock", "codexd.prompt",
    "codexd.start", "codexd.worker",
    # os, and what it needs:
    "_collections_abc", "_stat", "genericpath", "os", "os.path", "posixpath", "stat",
    "errno",  # a part of Python's own binary
}  # fmt: skip
_TELL = """
import sys
before = set(sys.modules)
def told(event, args):
    if event == "os.posix_spawn":
        print(*(set(sys.modules) - before), file=sys.stderr)
sys.addaudithook(told)
"""


class Place:
    """tasks/ID with one attempt ordered."""

    def __init__(self, root: Path, **changes: object) -> None:
        self.root = root
        self.tasks = root / "tasks"
        self.attempt = self.tasks / ID / "1"
        self.attempt.mkdir(parents=True)
        (root / "run").mkdir()
        (root / "work").mkdir()
        (root / "home").mkdir(mode=0o700)
        self.launcher = Processes(self.tasks, root / "run")
        request = Request("Say something.").to_json()
        task = {"id": ID, "request": {**request, **changes.pop("request", {})}}  # type: ignore[dict-item]
        (self.tasks / ID / "task.json").write_text(json.dumps(task))
        orders = {
            "attempt": 1, "thread": None, "preamble": "", "header": "", "policy": "Be brief.",
            "workdir": str(root / "work"), "workdirs": [str(root / "work")], "bin": str(FAKE),
            "home": str(root / "home"), "env": ["CODEX_FAKE_MODE"], "model": None, "profile": None,
            "sandbox": "workspace-write", "sandbox_verb": ["sandbox"],
            "timeout": 30.0, "idle_timeout": 30.0, "setpriv": None,
            "memory": {"on": True, "paths": ["MEMORY.md", "memory"], "hits": 20, "chars": 4000,
                       "rg": None},
        }  # fmt: skip
        (self.attempt / "attempt.json").write_text(json.dumps({**orders, **changes}))

    def command(self) -> list[str]:
        return self.launcher.command(ID)

    def start(self, mode: str, **more: Any) -> subprocess.Popen[str]:
        env = {**os.environ, "CODEX_FAKE_MODE": mode}
        return subprocess.Popen(self.command(), env=env, text=True, **more)

    def run(self, mode: str = "answer") -> dict[str, Any]:
        done = self.start(mode, stdin=subprocess.DEVNULL)
        assert done.wait(30) == 0
        return self.result()

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.attempt / "result.json").read_text())
        return found


def test_what_is_imported_before_codex_starts(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.run()  # the first looks at the sandbox; what it finds stands for a day
    (place.tasks / ID / "2").mkdir()
    (place.tasks / ID / "2" / "attempt.json").write_bytes(
        (place.attempt / "attempt.json").read_bytes()
    )
    command = place.command()
    at = command.index("-c") + 1
    command[at] = _TELL + command[at]
    env = {**uncovered(), "CODEX_FAKE_MODE": "answer"}
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )
    assert set(done.stderr.split()) - {"abc", "_abc"} == IMPORTS


def test_one_attempt_leaves_its_result(tmp_path: Path) -> None:
    result = Place(tmp_path).run()
    assert result["outcome"] == "done"
    assert result["id"] == ID
    assert result["attempt"] == 1
    assert result["exit_status"] == 0
    assert result["answer"]
    assert result["cost"]["cpu_seconds"] >= 0
    left = sorted(p.name for p in (tmp_path / "tasks" / ID / "1").iterdir())
    assert {"started", "prompt.md", "events.jsonl", "stderr.txt", "result.json"} <= set(left)
    assert not [name for name in left if name.endswith(".tmp")]


def test_the_prompt_is_policy_then_message(tmp_path: Path) -> None:
    Place(tmp_path, request={"prompt": "--help\n- x\n"}).run()
    text = (tmp_path / "tasks" / ID / "1" / "prompt.md").read_text()
    assert text == "Be brief.\n\n---\n\n--help\n- x\n\n"


def test_a_started_attempt_is_not_started_again(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (place.attempt / "started").touch()
    assert place.start("answer", stdin=subprocess.DEVNULL).wait(30) == 0
    assert not (place.attempt / "result.json").exists()
    assert not (place.attempt / "prompt.md").exists()


def test_two_at_once_start_codex_once(tmp_path: Path) -> None:
    place = Place(tmp_path)
    effects = tmp_path / "effects"
    env = {**os.environ, "CODEX_FAKE_MODE": "answer", "CODEX_FAKE_EFFECTS": str(effects)}
    orders = json.loads((place.attempt / "attempt.json").read_text())
    orders["env"].append("CODEX_FAKE_EFFECTS")
    (place.attempt / "attempt.json").write_text(json.dumps(orders))
    both = [subprocess.Popen(place.command(), env=env, stdin=subprocess.DEVNULL) for _ in range(2)]
    assert [one.wait(30) for one in both] == [0, 0]
    assert len(effects.read_text().splitlines()) == 1
    assert place.result()["outcome"] == "done"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"workdir": "/nowhere/at/all"}, "workdir /nowhere/at/all is not below a configured root"),
        ({"workdirs": ["/"], "workdir": "/nowhere"}, "workdir /nowhere does not exist"),
        ({"workdirs": ["/"], "workdir": f"/{'x' * 300}"}, "cannot be reached: File name too long"),
        ({"workdirs": ["/"], "workdir": "/etc/passwd"}, "workdir /etc/passwd is not a directory"),
        ({"request": {"images": ["a.png"]}}, "a.png does not exist"),
        ({"request": {"images": ["/etc/passwd"]}}, "image /etc/passwd is not below"),
        ({"thread": "yesterday"}, "'yesterday' is not the id of a Codex thread"),
        ({"home": None}, "damaged"),
    ],
)
def test_what_cannot_work_is_config(tmp_path: Path, changes: Any, sentence: str) -> None:
    result = Place(tmp_path, **changes).run()
    assert result["outcome"] == "config"
    assert sentence in result["message"]
    assert not (tmp_path / "tasks" / ID / "1" / "events.jsonl").exists()


def test_a_workdir_that_nobody_may_enter_is_config(tmp_path: Path) -> None:
    place = Place(tmp_path, workdirs=["/"], workdir=f"{tmp_path}/closed")
    (tmp_path / "closed").mkdir(mode=0)
    subprocess.run([*POWERLESS, *place.command()], stdin=subprocess.DEVNULL, check=True)
    result = place.result()
    assert result["outcome"] == "config"
    assert result["message"] == f"workdir {tmp_path}/closed cannot be entered: Permission denied"


# As of a network mount whose server is gone; the architectures differ in which of them there are.
DEAD = "?lstat,?stat,?newfstatat,?statx,?readlink,?readlinkat,?chdir"
stale = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace(1)")


def beside_a_dead_mount(place: Place, dead: Path, calls: str = DEAD) -> dict[str, Any]:
    """The result of a worker to which the disk says of `dead` that it is not there any more."""
    inject = ["-e", f"trace={calls}", "-e", f"inject={calls}:error=ESTALE"]
    strace = ["strace", "-qq", "-o", os.devnull, "-P", str(dead), *inject]
    env = {**os.environ, "CODEX_FAKE_MODE": "answer"}
    command = [*strace, *place.command()]
    subprocess.run(command, env=env, stdin=subprocess.DEVNULL, check=True, timeout=60)
    return place.result()


@stale
@pytest.mark.parametrize("first", [True, False])
def test_a_root_on_a_dead_mount_holds_up_no_task_of_another(tmp_path: Path, first: bool) -> None:
    roots = [str(tmp_path / "dead"), str(tmp_path / "work")]
    place = Place(tmp_path, workdirs=roots if first else roots[::-1])
    assert beside_a_dead_mount(place, tmp_path / "dead")["outcome"] == "done"


@stale
@pytest.mark.parametrize("what", ["workdir", "image", "directory", "root"])
def test_what_a_task_has_on_a_dead_mount_is_its_own_trouble(tmp_path: Path, what: str) -> None:
    """It is tried again, and nothing is held for all."""
    dead = tmp_path / "dead"
    changes: dict[str, dict[str, object]] = {
        "workdir": {"workdir": str(dead), "workdirs": [str(tmp_path)]},
        "image": {"request": {"images": [str(dead)]}},
        "directory": {"request": {"add_dirs": [str(dead)]}},
        "root": {"workdir": str(tmp_path), "workdirs": [str(dead)]},  # it may be a link to there
    }
    result = beside_a_dead_mount(Place(tmp_path, **changes[what]), dead)
    assert result["outcome"] == "host"
    assert result["message"] == f"{dead} cannot be looked at: Stale file handle"
    assert not result["gate"]
    assert not codex.is_general(Outcome.HOST, result["message"])


@stale
def test_a_workdir_that_goes_as_it_is_entered_is_tried_again(tmp_path: Path) -> None:
    result = beside_a_dead_mount(Place(tmp_path), tmp_path / "work", "chdir")
    assert result["outcome"] == "host"
    assert result["message"] == f"workdir {tmp_path}/work cannot be entered: Stale file handle"
    assert not codex.is_general(Outcome.HOST, result["message"])


def test_notes_where_nobody_may_look_are_told(tmp_path: Path) -> None:
    memory = {"on": True, "paths": [f"{tmp_path}/closed/notes"], "hits": 9, "chars": 99, "rg": None}
    place = Place(tmp_path, memory=memory)
    (tmp_path / "closed").mkdir(mode=0)
    env = {**os.environ, "CODEX_FAKE_MODE": "answer"}
    command = [*POWERLESS, *place.command()]
    subprocess.run(command, env=env, stdin=subprocess.DEVNULL, check=True)
    result = place.result()
    assert result["outcome"] == "done"
    assert f"{tmp_path}/closed/notes" in result["memory_note"]


@pytest.mark.parametrize("sandbox", ["", "broken"])
def test_a_probe_tries_the_sandbox_and_no_more(tmp_path: Path, sandbox: str) -> None:
    place = Place(tmp_path, probe=True)
    (place.tasks / ID / "task.json").unlink()  # as of no task
    (tmp_path / "home" / "fake.json").write_text(json.dumps({"sandbox": sandbox}))
    result = place.run()
    assert result["outcome"] == ("host" if sandbox else "done"), result
    assert not (place.attempt / "prompt.md").exists()


def test_what_is_said_at_the_end_of_much_counts(tmp_path: Path) -> None:
    """Also when Codex, or what it calls, has said much more than is looked at before."""
    talker = tmp_path / "talker"
    last = "Error: unexpected status 401 Unauthorized: Incorrect API key provided"
    talker.write_text(
        '#!/bin/sh\ntest "$1" = exec || exit 0\n'
        f"yes 'a warning of no weight' | head -n 4000 >&2\necho '{last}' >&2\nexit 1\n"
    )
    talker.chmod(0o755)
    result = Place(tmp_path, bin=str(talker)).run()
    assert result["outcome"] == "auth", result
    assert "Incorrect API key provided" in result["message"]


def test_without_orders_it_does_nothing(tmp_path: Path) -> None:
    """Somebody has started it by hand."""
    place = Place(tmp_path)
    (place.attempt / "attempt.json").unlink()
    place.attempt.rmdir()
    found = unstarted(*place.command())
    assert found == (1, f"{place.tasks}/{ID}: no attempt was ordered")
    assert [path.name for path in (place.tasks / ID).iterdir()] == ["task.json"]


def test_a_codex_that_is_not_there_is_host(tmp_path: Path) -> None:
    result = Place(tmp_path, bin="/nonexistent/codex").run()
    assert result["outcome"] == "host"
    assert "cannot start Codex" in result["message"]


@pytest.mark.parametrize(
    ("mode", "said"),
    [("hang-turn", "turn.started"), ("hang-failed", "at capacity"), ("stubborn", "turn.started")],
)
def test_sigterm_interrupts_the_turn(tmp_path: Path, mode: str, said: str) -> None:
    place = Place(tmp_path)
    worker = place.start(mode, stdin=subprocess.DEVNULL)
    events = place.attempt / "events.jsonl"
    until(lambda: events.exists() and said in events.read_text(), "a turn")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(15) == STOPPED
    assert place.result()["outcome"] == "interrupted"


def test_the_end_of_the_daemon_interrupts_the_turn(tmp_path: Path) -> None:
    place = Place(tmp_path)
    read, write = os.pipe()
    worker = place.start("hang-turn", stdin=read)
    os.close(read)
    events = place.attempt / "events.jsonl"
    until(lambda: events.exists() and "turn.started" in events.read_text(), "a turn")
    os.close(write)
    assert worker.wait(15) == STOPPED
    assert place.result()["outcome"] == "interrupted"


def test_it_rings_when_the_result_is_there(tmp_path: Path) -> None:
    place = Place(tmp_path)
    worker = place.start("answer", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    assert worker.stdout.read(1) == "."
    assert place.result()["outcome"] == "done"
    worker.stdout.close()
    assert worker.wait(15) == 0


def in_the_way(place: Place) -> Path:
    """A Codex that makes what keeps its worker from writing a result, and goes on as the fake."""
    made = place.root / "codex"
    aside = f"{place.attempt}/.result.json.$PPID.tmp"
    made.write_text(f'#!/bin/sh\ntest "$1" != exec || mkdir -p "{aside}"\nexec "{FAKE}" "$@"\n')
    made.chmod(0o755)
    orders = json.loads((place.attempt / "attempt.json").read_text())
    (place.attempt / "attempt.json").write_text(json.dumps({**orders, "bin": str(made)}))
    return made


@pytest.mark.parametrize("mode", ["answer", "no-terminal"])
def test_a_result_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, mode: str) -> None:
    place = Place(tmp_path)
    in_the_way(place)
    worker = place.start(mode, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, told = worker.communicate(timeout=30)
    path = place.attempt / "result.json"
    assert told == f"codexd-worker: {path} could not be written: Is a directory\n"
    assert worker.returncode == UNTOLD
    assert not path.exists()


def test_as_a_unit_the_journal_is_told_of_it(tmp_path: Path) -> None:
    place = Place(tmp_path)
    in_the_way(place)
    env = {**os.environ, "CODEX_FAKE_MODE": "answer", "NOTIFY_SOCKET": f"{tmp_path}/none"}
    command = [sys.executable, "-m", "codexd.worker", "--tasks", str(place.tasks), ID]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    *_, last = done.stderr.splitlines()
    assert f" attempt.untold task={ID} attempt=1 why=" in last
    assert (done.returncode, "Traceback" in done.stderr) == (UNTOLD, False)


@pytest.mark.parametrize("probe", [False, True])
def test_so_it_is_before_codex_has_begun(tmp_path: Path, probe: bool) -> None:
    """No file may have a byte: as on a full disk."""
    place = Place(tmp_path, probe=probe)
    command = ["prlimit", "--fsize=0", *place.command()]
    env = {**os.environ, "CODEX_FAKE_MODE": "answer"}
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == UNTOLD
    assert done.stderr.endswith("result.json could not be written: File too large\n")
    assert done.stderr.count("\n") == 1


def test_a_log_on_a_full_disk_does_not_change_what_it_says(tmp_path: Path) -> None:
    place = Place(tmp_path)
    in_the_way(place)
    with open("/dev/full", "w") as full:
        worker = place.start("answer", stdin=subprocess.DEVNULL, stderr=full)
        assert worker.wait(30) == UNTOLD


def test_a_codex_that_cannot_be_watched_is_ended(tmp_path: Path) -> None:
    """It has begun, and there is no room for what it says."""
    place = Place(tmp_path)
    (place.attempt / "events.jsonl").mkdir()
    worker = place.start("hang-turn", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, told = worker.communicate(timeout=30)
        assert f"Is a directory: '{place.attempt}/events.jsonl'" in told
        assert (worker.returncode, told.count("\n")) == (UNTOLD, 1)
        until(lambda: not codex_of(ID), "its end: it was killed as the worker left")
    finally:
        kill(codex_of(ID))


def unstarted(*command: str | Path) -> tuple[int, str]:
    """Exit status and the one line of a worker that starts no Codex."""
    env = {**os.environ, "CODEX_FAKE_MODE": "hang-turn"}
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr.removeprefix("codexd-worker: ").rstrip("\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
def test_a_directory_that_cannot_be_marked_is_told_in_one_line(tmp_path: Path) -> None:
    place = Place(tmp_path)
    tried = f"mount --bind {place.attempt} {place.attempt} && mount -o remount,bind,ro"
    within = f'{tried} {place.attempt} && exec "$@"'
    found = unstarted("unshare", "--mount", "sh", "-c", within, "sh", *place.command())
    assert found == (
        UNTOLD, f"{place.attempt}/started could not be written: Read-only file system"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("orders", "status", "why"),
    [
        ("", 1, "{}/1/attempt.json: not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("{}", 1, "the task's record or its orders are damaged: KeyError: 'request'"),
        ({}, UNTOLD, "{}/1/attempt.json: Is a directory"),
    ],
)
def test_orders_that_cannot_be_read(
    tmp_path: Path, orders: str | dict[str, str], status: int, why: str
) -> None:
    place = Place(tmp_path)
    path, record = place.attempt / "attempt.json", place.tasks / ID / "task.json"
    path.unlink()
    if isinstance(orders, dict):
        path.mkdir()
    else:
        path.write_text(orders)
        record.write_text("{}")
    assert unstarted(*place.command()) == (status, why.format(place.tasks / ID))


def test_a_task_that_nobody_knows(tmp_path: Path) -> None:
    place = Place(tmp_path)
    shutil.rmtree(place.tasks / ID)
    found = unstarted(*place.command())
    assert found == (1, f"{place.tasks / ID}: No such file or directory")


@pytest.mark.parametrize("args", [[], ["a", "b"], ["../x"], ["--tasks", "x"]])
def test_usage(args: list[str]) -> None:
    command = [sys.executable, "-m", "codexd.worker", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: codexd-worker")
