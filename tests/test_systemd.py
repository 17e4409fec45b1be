"""codexd as systemd runs it: the real units, in a booted systemd, with the real Codex CLI.

What a user sees, what survives, who ended what, and that nothing is left behind.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest

from codexd.units import unit
from tests.box import BIN, PYTHON, TREE, Box
from tests.box.host import require
from tests.daemon import until
from tests.installed import ALICE, MALLORY, SPOOL, STATE, WORK, Installed

pytestmark = pytest.mark.xdist_group("box")


@pytest.fixture(scope="module")
def codexd() -> Iterator[Installed]:
    require("hybrid")
    with Box("hybrid") as box:
        one = Installed(box)
        box.run("systemctl", "start", "codexd")
        yield one


def pid(one: Installed) -> int:
    return int(one.box.show("codexd", "MainPID")["MainPID"])


# --- what a user sees ----------------------------------------------------------------------


def test_a_dropped_file_is_answered(codexd: Installed) -> None:
    codexd.drop(
        "---\ntitle: a greeting\n---\nhello\n[[shell echo in $PWD]]\n[[say to Alice]]", "one.md"
    )
    task = codexd.ended("one")
    front, text = codexd.answer("one")
    assert (task["state"], text) == ("done", "to Alice\n")
    assert front["outcome"] == '"done"'
    assert task["cost"]["cpu_seconds"] > 0
    assert task["cost"]["memory_peak_bytes"] > 1 << 20, "of the whole control group"
    outputs = [out for turn in codexd.asked() for out in turn["outputs"] if "in /" in str(out)]
    assert f"in {STATE}/work" in str(outputs)


def test_what_a_task_used_is_told_everywhere(codexd: Installed) -> None:
    """As the kernel counts it, not less than in the middle of the turn."""
    codexd.drop("[[shell echo enough]]\n[[hold used]]\n[[say used]]", "used.md")
    id = codexd.running("used")
    until(lambda: any("enough" in str(turn["outputs"]) for turn in codexd.asked()), "it has begun")
    look = f"for f in $(find /sys/fs/cgroup -path '*/{unit(id)}/*'); do echo [$f]; cat $f; done"
    parts = codexd.box.run("sh", "-c", f"{look} 2>/dev/null", timeout=60).stdout.split("\n[")
    counted = dict(part.rpartition("/")[2].split("]\n", 1) for part in parts if "]\n" in part)
    codexd.release("used")
    task = codexd.ended("used")
    record = f"{STATE}/archive/{id[:4]}-{id[4:6]}/{id}/1/result.json"
    until(lambda: not codexd.box.run("test", "-e", record, check=False).returncode, "its record")
    cost = json.loads(codexd.box.pull(record))["cost"]
    assert cost["tasks_peak"] >= int(counted["pids.peak"]) > 5
    assert cost["memory_peak_bytes"] >= int(counted["memory.max_usage_in_bytes"]) > 1 << 20
    assert cost["cpu_seconds"] > 0
    for name, word in (("io_read_bytes", "Read"), ("io_write_bytes", "Write")):
        lines = map(str.split, counted.get("blkio.throttle.io_service_bytes", "").splitlines())
        figures = [int(line[2]) for line in lines if line[1] == word]
        assert cost[name] >= sum(figures) if figures else name not in cost, (cost, counted)
    (line,) = [line for line in codexd.box.pull(f"{STATE}/tasks.md").decode().splitlines()
               if id in line and "**done**" in line]  # fmt: skip
    assert f"cost={json.dumps(cost, separators=(',', ':'))}" in line
    del cost["tasks_peak"]
    unknown = dict.fromkeys(("io_read_bytes", "io_write_bytes"))
    assert task["cost"] == {**unknown, **cost}


def test_its_journal_tells_the_whole_story(codexd: Installed) -> None:
    codexd.drop("[[say a story]]", "story.md")
    id = codexd.ended("story")["id"]
    codexd.wait_gone()
    told = [one for one in codexd.box.journal(f"CODEXD_TASK={id}") if "CODEXD_EVENT" in one]
    assert {str(one["CODEXD_TASK"]) for one in told} == {id}, "once in each"
    events = [f"{one['SYSLOG_IDENTIFIER']} {one['CODEXD_EVENT']}" for one in told]
    assert events[:3] == [
        "codexd-master task.queued", "codexd-master task.running", "codexd-worker attempt.begun",
    ]  # fmt: skip
    assert set(events[3:]) == {"codexd-worker attempt.ended", "codexd-master task.done"}
    shown = codexd.box.run("journalctl", f"CODEXD_TASK={id}", "--no-pager", "-o", "cat").stdout
    assert "attempt.ended" in shown


@pytest.mark.parametrize("said", ["x" * 100, "日本語"])
def test_status_of_any_command(codexd: Installed, said: str) -> None:
    """A long one is cut, with a sign that is not Latin-1."""
    name = f"said-{len(said)}"
    codexd.drop(f"[[shell sleep 1123; : {said}]]", f"{name}.md")
    worker = unit(codexd.running(name))
    status = lambda: codexd.box.show(worker, "StatusText")["StatusText"]  # noqa: E731
    told = until(lambda: status() if "sleep 1123" in status() else "", "it says what Codex does")
    assert told.endswith("x…" if len(said) > 80 else f": {said}"), told
    codexd.box.run("systemctl", "stop", worker)
    codexd.ended(name)


def test_status_is_for_people(codexd: Installed) -> None:
    codexd.drop("[[shell sleep 3141]]", "long.md")
    id = codexd.running("long")
    look = ("systemctl", "status", "--no-pager", "--lines=0")

    def doing() -> str:
        shown = codexd.box.run(*look, unit(id), check=False).stdout
        return shown if "sleep 3141" in shown.partition("Tasks:")[0] else ""

    shown = until(doing, "the status says what Codex does")
    assert f"codexd task {id}" in shown
    assert 'Status: "running: sleep 3141"' in shown
    shown = codexd.box.run(*look, "codexd").stdout
    assert 'Status: "1 running, 0 queued, 0 waiting"' in shown
    assert (
        json.loads(codexd.box.run(f"{BIN}/codexd", "--json", "status").stdout)["launcher"]
        == "systemd"
    )
    codexd.box.run("systemctl", "stop", unit(id))
    codexd.ended("long")


def test_the_check_of_a_task(codexd: Installed) -> None:
    wait = "until test -e mend; do sleep 0.1; done"
    front = f"verify: {{command: 'test -e mend || {{ touch asked; {wait}; false; }}'}}\n"
    codexd.drop(f"---\n{front}---\n[[say a]]", "checked.md")
    id = codexd.running("checked")
    asked = ("test", "-e", f"{WORK}/asked")
    until(lambda: codexd.box.run(*asked, check=False).returncode == 0, "the check runs")
    shown = codexd.box.show(unit(id), "StatusText")["StatusText"]
    assert shown.startswith("verifying: test -e mend")
    codexd.box.run("touch", f"{WORK}/mend")
    assert codexd.ended("checked")["state"] == "done"
    codexd.wait_gone()


@pytest.mark.parametrize(("name", "others"), [
    ("codexd.service", {"network-online.target", "remote-fs.target"}),
    (unit("20260101t000000-aaaaaaaaaa"), {"network.target"}),
])  # fmt: skip
def test_what_is_there_before(codexd: Installed, name: str, others: set[str]) -> None:
    assert others <= set(codexd.box.show(name, "After")["After"].split())


# --- who ended what ------------------------------------------------------------------------


def test_systemctl_stop_cancels(codexd: Installed) -> None:
    codexd.drop("[[shell setsid sleep 2718 & sleep 2719]]", "stopped.md")
    id = codexd.running("stopped")
    until(lambda: "sleep 2719" in codexd.command_lines(), "the tool runs")
    codexd.box.run("systemctl", "stop", unit(id))
    task = codexd.ended("stopped")
    assert (task["state"], task["outcome"]) == ("cancelled", "cancelled")
    assert "systemctl stop" in task["message"]
    assert "sleep 271" not in codexd.command_lines(), "no process is left"
    front, _ = codexd.answer("stopped")
    assert front["state"] == '"cancelled"'


def test_cancel_by_command(codexd: Installed) -> None:
    codexd.drop("[[shell setsid sleep 1618 & sleep 1619]]", "unwanted.md")
    id = codexd.running("unwanted")
    codexd.box.run(f"{BIN}/codexd", "task", "cancel", id)
    task = codexd.ended("unwanted")
    assert (task["state"], task["message"]) == ("cancelled", "cancelled on request")
    codexd.wait_gone()
    assert "sleep 161" not in codexd.command_lines()


@pytest.mark.parametrize("lost", ["fails", "dies with the master"])
def test_a_cancel_is_not_lost_with_the_call_that_stops(codexd: Installed, lost: str) -> None:
    box, real = codexd.box, codexd.box.run("which", "systemctl").stdout.strip()
    loses = {"fails": "exit 1", "dies with the master": "exec sleep 600"}[lost]
    first = f"[ -e /run/codexd/master/asked ] || {{ : >/run/codexd/master/asked; {loses}; }}"
    stand_in = f'#!/bin/sh\ncase "$(id -u) $*" in 0\\ *) ;; *\\ stop\\ *) {first} ;; esac\n'
    name = lost.split()[0]
    codexd.drop(f"[[hold {name}]]", f"{name}.md")
    id = codexd.running(name)
    box.push({"/usr/local/bin/systemctl": f'{stand_in}exec {real} "$@"\n'}, mode=0o755)
    try:
        box.run(f"{BIN}/codexd", "task", "cancel", id)
        asked = ("test", "-e", "/run/codexd/master/asked")
        until(lambda: not box.run(*asked, check=False).returncode, "its unit is to be stopped")
        if lost != "fails":
            box.run("systemctl", "kill", "--signal=SIGKILL", "--kill-whom=main", "codexd")
        task = codexd.ended(name)
    finally:
        box.run("rm", "-f", "/usr/local/bin/systemctl", "/run/codexd/master/asked")
    assert (task["state"], task["message"]) == ("cancelled", "cancelled on request")


def assert_told(one: Installed, name: str, outcome: str, word: str) -> None:
    """That the answer file says what the worker ended of, and so does the task's JSON."""
    front, task = one.answer(name)[0], one.task(name)
    assert task
    assert json.loads(front["outcome"]) == task["outcome"] == outcome
    assert json.loads(front["message"]) == task["message"]
    assert word in task["message"]


def test_a_killed_worker_is_named(codexd: Installed) -> None:
    codexd.drop("---\nattempts: 1\n---\n[[shell sleep 1414]]", "killed.md")
    id = codexd.running("killed")
    codexd.box.run("systemctl", "kill", "--signal=SIGKILL", unit(id))
    task = codexd.ended("killed")
    assert task["state"] == "failed"
    assert_told(codexd, "killed", "signal", "SIGKILL")
    assert task["cost"]["cpu_seconds"] > 0, "what it used is known of a killed one, too"


def test_a_worker_that_hangs_is_named(codexd: Installed) -> None:
    codexd.drop_in("codexd-worker@.service", "[Service]\nWatchdogSec=10s\n")
    codexd.drop("---\nattempts: 1\n---\n[[shell sleep 1732]]", "hung.md")
    id = codexd.running("hung")
    codexd.box.run("systemctl", "kill", "--signal=SIGSTOP", "--kill-whom=main", unit(id))
    task = codexd.ended("hung")
    codexd.drop_in("codexd-worker@.service", "")
    assert task["state"] == "failed"
    assert_told(codexd, "hung", "stall", "watchdog")


def test_a_worker_that_runs_for_too_long_is_named(codexd: Installed) -> None:
    codexd.drop_in("codexd-worker@.service", "[Service]\nRuntimeMaxSec=2s\n")
    codexd.drop("[[shell sleep 2236]]", "late.md")
    task = codexd.ended("late")
    codexd.drop_in("codexd-worker@.service", "")
    assert task["state"] == "failed"
    assert_told(codexd, "late", "timeout", "RuntimeMaxSec")


def test_a_stop_that_takes_too_long_is_a_stop(codexd: Installed) -> None:
    deaf = "[Service]\nTimeoutStopSec=8s\nKillSignal=SIGURG\n"
    codexd.drop_in("codexd-worker@.service", deaf)
    codexd.drop("[[shell sleep 2449]]", "deaf.md")
    codexd.box.run("systemctl", "stop", unit(codexd.running("deaf")))
    task = codexd.ended("deaf")
    codexd.drop_in("codexd-worker@.service", "")
    assert task["state"] == "cancelled"
    assert_told(codexd, "deaf", "cancelled", "TimeoutStopSec")


def test_want_of_memory_is_named(codexd: Installed) -> None:
    """The worker itself gets no memory: a limit far below what Codex needs."""
    codexd.drop_in("codexd-worker@.service", "[Service]\nMemoryMax=24M\nMemorySwapMax=0\n")
    codexd.drop("---\nattempts: 1\n---\n[[say never]]", "greedy.md")
    task = codexd.ended("greedy")
    codexd.drop_in("codexd-worker@.service", "")
    assert task["state"] == "failed"
    assert_told(codexd, "greedy", "oom", "memory")


def test_a_unit_that_cannot_be_set_up_is_named(codexd: Installed) -> None:
    codexd.drop_in("codexd-worker@.service", "[Service]\nBindPaths=/nonexistent/x\n")
    codexd.drop("---\nattempts: 1\n---\n[[say never]]", "homeless.md")
    task = codexd.ended("homeless")
    codexd.drop_in("codexd-worker@.service", "")
    assert (task["state"], task["outcome"]) == ("failed", "host")
    assert "could not be set up" in task["message"]


def test_a_change_of_the_target_ends_no_task(codexd: Installed) -> None:
    codexd.box.run("systemctl", "enable", "--quiet", "codexd", "model")
    codexd.drop("[[hold isolated]]\n[[say went on]]", "isolated.md")
    id = codexd.running("isolated")
    codexd.box.run("systemctl", "isolate", "multi-user.target")
    jobs = ("systemctl", "list-jobs", "--no-legend")
    until(lambda: not codexd.box.run(*jobs).stdout, "the change is made")
    assert codexd.box.show(unit(id), "ActiveState") == {"ActiveState": "active"}
    codexd.release("isolated")
    assert codexd.ended("isolated")["attempts"] == 1
    codexd.box.run("systemctl", "disable", "--quiet", "codexd", "model")


# --- a daemon that fails -----------------------------------------------------------------------


def test_somebody_is_told_that_the_daemon_fails(codexd: Installed) -> None:
    """Once, however often systemd starts it again."""
    notify = "#!/bin/sh\necho $1 >> /var/told\n"
    codexd.box.push({"/etc/codexd/notify": notify}, mode=0o755)
    codexd.configure("wrokers: 1\n")
    codexd.box.run("systemctl", "restart", "codexd", check=False)
    tries = lambda: int(codexd.box.show("codexd", "NRestarts")["NRestarts"])  # noqa: E731
    try:
        until(lambda: tries() > 3, "systemd tries again")
        told = ("test", "-s", "/var/told")
        until(lambda: not codexd.box.run(*told, check=False).returncode, "a notice")
    finally:
        codexd.configure(codexd.config)
    until(lambda: codexd.box.show("codexd", "SubState") == {"SubState": "running"}, "it runs")
    assert codexd.box.pull("/var/told") == b"codexd\n"
    ended = len(
        codexd.box.journal("MESSAGE_ID=d9b373ed55a64feb8242e02dbe79a49c", "UNIT=codexd.service")
    )
    assert ended > 1, "it failed more often than it was told"
    codexd.box.run("rm", "/etc/codexd/notify")


def test_the_master_waits_for_a_systemd_that_does_not_answer(codexd: Installed) -> None:
    """As at a slow boot; it must not begin with child processes then.

    And what it starts is not told where systemd listens, which would have to log of each
    that it does not believe it.
    """
    box, real = codexd.box, codexd.box.run("which", "systemctl").stdout.strip()
    slow = f'#!/bin/sh\n[ "$(id -u)" != 0 ] || exec {real} "$@"\n'
    slow += "echo no bus, and I tell ${NOTIFY_SOCKET:-nobody} >&2\nexit 1\n"
    box.push({"/usr/local/bin/systemctl": slow}, mode=0o755)
    box.run("systemctl", "stop", "codexd")
    box.run("rm", "-rf", "/run/codexd/exits")
    box.run("systemctl", "start", "codexd", check=False)
    try:
        told = until(lambda: box.journal("CODEXD_EVENT=cannot.go.on"), "it says why")
    finally:
        box.run("rm", "/usr/local/bin/systemctl")
    assert told[-1]["MESSAGE"] == 'cannot.go.on why="systemctl: no bus, and I tell nobody"'
    until(lambda: box.show("codexd", "SubState") == {"SubState": "running"}, "it runs")
    assert "launcher=systemd" in box.journal("CODEXD_EVENT=started")[-1]["MESSAGE"]


# --- a sandbox that does not work --------------------------------------------------------------


def test_nothing_runs_without_a_sandbox(codexd: Installed) -> None:
    """Such a turn would end well; so it is tried before, at the start and for each task."""
    known = ("test", "-e", f"{STATE}/codex/.codexd/sandbox.json")
    until(lambda: not codexd.box.run(*known, check=False).returncode, "it is good at first")
    codexd.drop_in("codexd-worker@.service", "[Service]\nRestrictNamespaces=yes\n")
    codexd.configure(codexd.config + "retry:\n  base: 1s\n  cap: 2s\n")
    codexd.box.run("systemctl", "restart", "codexd")

    def health() -> dict[str, object]:
        return json.loads(codexd.box.run(f"{BIN}/codexd", "--json", "status", check=False).stdout)

    closed = until(lambda: health()["sandbox"], "it is noticed before there is any task")
    assert "No permissions to create" in str(closed), closed
    assert health()["status"] == "host"
    assert not codexd.box.run("ls", f"{STATE}/tasks").stdout, "the try has left nothing"
    before = len(codexd.asked())
    codexd.drop("[[say now it works]]", "unsafe.md")
    until(lambda: (codexd.task("unsafe") or {}).get("state") == "queued", "it was tried")
    assert len(codexd.asked()) == before, "the model was not asked"
    codexd.drop_in("codexd-worker@.service", "")
    ended = codexd.ended("unsafe")
    assert ended["attempts"] == 1, codexd.story()
    assert codexd.answer("unsafe")[1] == "now it works\n"
    assert (health()["status"], health()["sandbox"]) == ("ok", None)
    codexd.configure(codexd.config)
    codexd.box.run("systemctl", "restart", "codexd")


# --- what is asked for, and what was used ------------------------------------------------------


def test_limits_of_a_task(codexd: Installed) -> None:
    codexd.drop(
        "---\nlimits: {memory: 256M, cpu: 40%, tasks: 77}\n---\n[[shell sleep 1001]]", "small.md"
    )
    id = codexd.running("small")
    wanted = {"MemoryMax": str(256 << 20), "CPUQuotaPerSecUSec": "400ms", "TasksMax": "77"}
    assert codexd.box.show(unit(id), *wanted) == wanted
    codexd.box.run("systemctl", "stop", unit(id))
    codexd.ended("small")
    codexd.wait_gone()
    assert codexd.box.show(unit(id), "TasksMax") != {"TasksMax": "77"}
    left = codexd.box.run("ls", "/run/systemd/system.control", check=False).stdout
    assert id not in left


@pytest.mark.parametrize(("quota", "shown"), [("150%", "1.500000s"), ("50%", "500ms")])
def test_limits_are_no_more_than_the_units(codexd: Installed, quota: str, shown: str) -> None:
    codexd.drop_in(
        "codexd-worker@.service", f"[Service]\nMemoryMax=1G\nCPUQuota={quota}\nTasksMax=500\n"
    )
    large, name = "limits: {memory: 64G, cpu: 9000%, tasks: 100000}", f"large{quota[:-1]}"
    codexd.drop(f"---\n{large}\n---\n[[shell sleep 1002]]", f"{name}.md")
    id = codexd.running(name)
    wanted = {"MemoryMax": str(1 << 30), "CPUQuotaPerSecUSec": shown, "TasksMax": "500"}
    assert codexd.box.show(unit(id), *wanted) == wanted
    codexd.drop_in("codexd-worker@.service", "")
    codexd.box.run("systemctl", "stop", unit(id))
    codexd.ended(name)


def test_nothing_is_left_of_limits_under_which_no_worker_can_start(codexd: Installed) -> None:
    """No task can ask for so little; the file is written by user codexd, who could."""
    id = "20260101t000000-bbbbbbbbbb"
    codexd.box.push({f"/run/codexd/limits/{id}": "tasks=1\n"}, owner="codexd")
    assert codexd.box.run("systemctl", "start", unit(id), check=False).returncode
    codexd.wait_gone()
    assert id not in codexd.box.run("ls", "/run/systemd/system.control", check=False).stdout
    codexd.box.run("rm", f"/run/codexd/limits/{id}")


def test_the_least_that_a_task_can_ask_for_is_enough_to_start(codexd: Installed) -> None:
    codexd.drop("---\nlimits: {tasks: 64}\n---\n[[shell true]]\n[[say did it]]", "least.md")
    assert (codexd.ended("least")["state"], codexd.answer("least")[1]) == ("done", "did it\n")
    codexd.drop("---\nattempts: 1\nlimits: {memory: 64M}\n---\n[[say or not]]", "little.md")
    task = codexd.ended("little")
    assert task["outcome"] in ("done", "oom"), task


def test_a_tool_that_takes_too_much_memory_ends_alone(codexd: Installed) -> None:
    """The limit is enforced, and the model is told: its turn goes on."""
    greedy = "python3 -c 'b = bytearray(600 << 20); print(len(b))'; echo ended with $?"
    codexd.drop(
        f"---\nlimits: {{memory: 400M}}\n---\n[[shell {greedy}]]\n[[say went on]]", "tool.md"
    )
    task = codexd.ended("tool")
    assert (task["state"], codexd.answer("tool")[1]) == ("done", "went on\n")
    outputs = [out for turn in codexd.asked() for out in turn["outputs"]]
    assert any("ended with 137" in str(out) for out in outputs), outputs[-3:]
    assert 350 << 20 < task["cost"]["memory_peak_bytes"] <= 400 << 20


def test_all_work_can_be_capped(codexd: Installed) -> None:
    codexd.box.run("systemctl", "set-property", "--runtime", "codexd-workers.slice", "TasksMax=901")
    codexd.drop("[[shell sleep 1003]]", "capped.md")
    id = codexd.running("capped")
    assert codexd.box.show(unit(id), "Slice") == {"Slice": "codexd-workers.slice"}
    assert codexd.box.show("codexd-workers.slice", "TasksMax") == {"TasksMax": "901"}
    codexd.box.run("systemctl", "stop", unit(id))
    codexd.ended("capped")
    codexd.box.run("systemctl", "revert", "codexd-workers.slice")


# --- what survives ---------------------------------------------------------------------------


def test_workers_outlive_the_master(codexd: Installed) -> None:
    names = [f"w{n}" for n in range(4)]
    for name in names:
        codexd.drop(f"[[hold {name}]]\n[[say of {name}]]", f"{name}.md")
    ids = {name: codexd.running(name) for name in names}
    before = codexd.invocations(ids.values())
    codexd.box.run("systemctl", "restart", "codexd")
    codexd.box.run("systemctl", "stop", "codexd")
    assert codexd.invocations(ids.values()) == before
    codexd.release("w0")
    codexd.box.run("systemctl", "start", "codexd")
    for name in names:
        codexd.release(name)
    for name in names:
        assert codexd.ended(name)["state"] == "done"
        assert codexd.answer(name)[1] == f"of {name}\n"
        turns = [t for t in codexd.asked() if f"[[hold {name}]]" in t["prompt"]]
        assert len(turns) == 1, "none was run twice"


def test_a_master_that_hangs_is_ended_and_its_workers_go_on(codexd: Installed) -> None:
    own = codexd.box.pull("/etc/systemd/system/codexd.service.d/test.conf").decode()
    codexd.drop_in("codexd.service", f"{own}WatchdogSec=4s\n")  # its round is every 3 s, at least
    codexd.box.run("systemctl", "restart", "codexd")
    codexd.drop("[[hold hang]]\n[[say went on]]", "hang.md")
    id = codexd.running("hang")
    worker, was = codexd.invocations([id]), codexd.box.show("codexd", "InvocationID", "MainPID")
    codexd.box.run("kill", "-STOP", was["MainPID"])
    codexd.drop("[[say dropped meanwhile]]", "meanwhile.md")
    assert codexd.ended("meanwhile")["state"] == "done"
    why = ("UNIT=codexd.service", f"INVOCATION_ID={was['InvocationID']}")
    assert any("Watchdog timeout" in one["MESSAGE"] for one in codexd.box.journal(*why))
    codexd.drop_in("codexd.service", own)
    assert codexd.box.show("codexd", "InvocationID") != {"InvocationID": was["InvocationID"]}
    assert codexd.invocations([id]) == worker
    codexd.release("hang")
    assert (codexd.ended("hang")["attempts"], codexd.answer("hang")[1]) == (1, "went on\n")
    codexd.box.run("systemctl", "restart", "codexd")


def test_no_other_daemon_takes_over_what_units_do(codexd: Installed) -> None:
    """`codexd serve` on the same state would not see them, and run their tasks again."""
    codexd.drop("[[hold theirs]]\n[[say theirs]]", "theirs.md")
    id = codexd.running("theirs")
    codexd.box.run("systemctl", "stop", "codexd", "codexd-http.socket")
    serve = codexd.box.run(f"{BIN}/codexd", "serve", user="codexd", check=False)
    assert serve.returncode == 78
    assert "1 workers still run as units" in serve.stderr
    codexd.box.run("systemctl", "start", "codexd", "codexd-http.socket")
    codexd.release("theirs")
    assert codexd.ended("theirs")["attempts"] == 1
    assert id in str(codexd.answer("theirs")[0]["id"])


def test_the_configuration_is_read_again(codexd: Installed) -> None:
    codexd.configure(codexd.config + "workers: 0\n")
    codexd.box.run("systemctl", "reload", "codexd")
    told = until(lambda: codexd.box.journal("CODEXD_EVENT=config.refused"), "it is refused")
    assert "workers" in told[-1]["MESSAGE"]
    codexd.drop("[[say all the same]]", "same.md")
    assert codexd.ended("same")["state"] == "done"
    codexd.configure(codexd.config + "limits:\n  file: 2K\n")
    codexd.box.run("systemctl", "reload", "codexd")
    until(lambda: codexd.box.journal("CODEXD_EVENT=config.loaded"), "it is taken")
    codexd.drop("x" * 3000, "large.md")
    rejected = f"{SPOOL}/rejected/large.md.reason"
    until(lambda: not codexd.box.run("test", "-e", rejected, check=False).returncode, "a reason")
    codexd.configure(codexd.config)
    codexd.box.run("systemctl", "reload", "codexd")


# --- what gets old ------------------------------------------------------------------------------


def test_only_answers_and_rejected_files_age(codexd: Installed) -> None:
    """By tmpfiles.d, which works without a daemon; nobody can set all times of a file, so wait."""
    box, shipped = codexd.box, codexd.box.pull("/usr/lib/tmpfiles.d/codexd.conf").decode()
    box.push({"/var/short.conf": shipped.replace(" 90d\n", " 2s\n")})
    codexd.drop("[[hold live]]\n[[say lived]]", "live.md")
    codexd.running("live")
    ages = {f"{SPOOL}/answers/a.md", f"{SPOOL}/rejected/r.md", f"{SPOOL}/rejected/r.md.reason"}
    stays = {f"{SPOOL}/inbox/new.part", f"{SPOOL}/schedules/daily.md"}
    stays |= {f"{STATE}/{name}/kept" for name in ("tasks", "work", "codex", "archive", "sessions")}
    young, moved = f"{SPOOL}/answers/young.md", f"{SPOOL}/rejected/young.md"
    box.push(dict.fromkeys((*ages, *stays), "x"), owner="codexd")
    box.run("touch", "--date=2001-01-01", *ages, *stays)

    def left(conf: str) -> set[str]:
        box.run("touch", young)
        box.run("touch", "--date=2001-01-01", moved)  # old, but rejected just now
        box.run("systemd-tmpfiles", "--clean", conf)
        found = box.run("find", SPOOL, STATE, "-newermt", "2000-01-01", "-type", "f").stdout
        return set(found.splitlines())

    assert ages | stays | {young, moved} <= left("codexd.conf")
    until(lambda: not ages & (now := left("/var/short.conf")) and {young, moved} <= now, "they go")
    assert stays <= left("/var/short.conf")
    codexd.release("live")
    assert codexd.ended("live")["state"] == "done"
    box.run("rm", "-f", young, moved, *stays)


# --- who may do what -------------------------------------------------------------------------


IDLE = "20260101t000000-cccccccccc"
MANAGER = "org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager"


@pytest.fixture
def instance(codexd: Installed, request: pytest.FixtureRequest) -> Iterator[str]:
    """A worker's or a hook's unit with the id of a task, which runs and does nothing."""
    name = f"{request.param}@{IDLE}.service"
    codexd.drop_in(name, "[Service]\nType=exec\nExecStart=\nExecStart=/bin/sleep 9999\n")
    codexd.box.run("systemctl", "start", name)
    yield name
    codexd.box.run("systemctl", "stop", name)
    codexd.drop_in(name, "")
    codexd.box.run("rm", "-f", f"/run/codexd/exits/{IDLE}")


def as_codexd(one: Installed, *command: str) -> str:
    """What a command says to user codexd that fails; nothing if it does not."""
    done = one.box.run(*command, user="codexd", check=False)
    return done.stderr.lower() if done.returncode else ""


@pytest.mark.parametrize("command", [
    "systemctl --no-ask-password start ssh.service",
    "systemctl --no-ask-password stop codexd-http.socket",
    "systemctl --no-ask-password daemon-reload",
    "systemctl --no-ask-password start codexd-worker@..service",
    "systemctl --no-ask-password start codexd-worker@x.service",
    f"systemctl --no-ask-password start codexd-schedule@{IDLE}.service",
    f"systemctl --no-ask-password start codexd-worker@{IDLE}.service.service",
    "systemctl --no-ask-password set-property codexd.service MemoryMax=1G",
    "systemd-run --no-ask-password true",
    f"systemd-run --no-ask-password --unit=codexd-worker@{IDLE}.service true",
])  # fmt: skip
def test_user_codexd_may_only_start_workers(codexd: Installed, command: str) -> None:
    assert "authentication required" in as_codexd(codexd, *command.split())


@pytest.mark.parametrize("instance", ["codexd-worker", "codexd-hook"], indirect=True)
def test_user_codexd_may_do_to_a_worker_what_it_must_and_no_more(
    codexd: Installed, instance: str
) -> None:
    before = codexd.box.show(instance, "InvocationID", "MemoryMax", "UnitFileState")
    systemctl = ("systemctl", "--no-ask-password")
    for verb in (
        "restart", "try-restart", "reload", "reload-or-restart", "reload-or-try-restart", "clean",
        "enable", "disable", "mask", "unmask", "link", "revert", "set-property",
        "set-property --runtime", "bind",
    ):  # fmt: skip
        more = {"set-property": ["MemoryMax=64G"], "bind": ["/etc/hosts", "/tmp/x"]}
        what = f"/tmp/{instance}" if verb == "link" else instance
        said = as_codexd(codexd, *systemctl, *verb.split(), what, *more.get(verb.split()[0], []))
        assert "authentication required" in said, (verb, said)
    assert "access denied" in as_codexd(codexd, *systemctl, "set-environment", "A=b")
    assert codexd.box.show(instance, "InvocationID", "MemoryMax", "UnitFileState") == before
    for method in ("FreezeUnit", "ThawUnit"):  # systemd cannot do it in every layout of cgroups
        call = f"busctl call {MANAGER} {method} s {instance}"
        assert "authentication" not in as_codexd(codexd, *call.split())
    for verb in ("start", "kill", "stop", "start", "stop"):
        assert as_codexd(codexd, *systemctl, verb, instance) == "", verb
    assert "not loaded" in as_codexd(codexd, *systemctl, "reset-failed", instance)


@pytest.mark.parametrize("command", [
    f"ls {SPOOL}/answers", f"ls {SPOOL}/inbox", f"cat {STATE}/tasks.md", f"ls {STATE}/codex",
    f"touch {SPOOL}/inbox/x.md", "cat /etc/codexd/api.env", "ls /run/codexd/exits",
    f"{BIN}/python -c 'import socket; socket.socket(1).connect(\"/run/codexd/http.sock\")'",
])  # fmt: skip
def test_another_user_may_nothing(codexd: Installed, command: str) -> None:
    done = codexd.box.run("sh", "-c", command, user=MALLORY, check=False)
    assert done.returncode != 0
    assert "denied" in done.stderr.lower(), done.stderr


def test_a_member_may_not_take_away_what_others_dropped(codexd: Installed) -> None:
    codexd.box.run("useradd", "--groups", "codexd", "bob")
    codexd.box.run("systemctl", "stop", "codexd")
    codexd.drop("[[say mine]]", "mine.md")
    done = codexd.box.run("rm", "-f", f"{SPOOL}/inbox/mine.md", user="bob", check=False)
    assert "not permitted" in done.stderr
    codexd.box.run("systemctl", "start", "codexd")
    assert codexd.ended("mine")["state"] == "done"


def test_http_by_its_socket(codexd: Installed) -> None:
    ask = ("curl", "-sS", "--unix-socket", "/run/codexd/http.sock")
    health = json.loads(codexd.box.run(*ask, "http://localhost/health", user=ALICE).stdout)
    assert health["status"] == "ok"
    body = json.dumps({"prompt": "[[say over HTTP]]"})
    post = (*ask, "-H", "Content-Type: application/json", "-d", body, "http://localhost/tasks")
    id = json.loads(codexd.box.run(*post, user=ALICE).stdout)["id"]
    get = json.loads(
        codexd.box.run(*ask, f"http://localhost/tasks/{id}?wait=20", user=ALICE, timeout=40).stdout
    )
    assert get["answer"] == "over HTTP"
    assert codexd.box.show("codexd-http", "ActiveState", "User") == {
        "ActiveState": "active", "User": "codexd-http",
    }  # fmt: skip


@pytest.mark.parametrize("how", ["restart", "stop", "kill --signal=KILL"])
def test_submissions_wait_while_the_http_server_is_not_there(codexd: Installed, how: str) -> None:
    """systemd keeps the socket.  Only a kill can lose a reply, and a key makes good for that."""
    box = codexd.box
    stop, told = "/var/tmp/stop", "/var/tmp/told"
    box.run("rm", "-f", stop, told)
    client = f"{PYTHON} -m tests.box_clients /run/codexd/http.sock {how.split()[0]} {stop}"
    script = f"cd {TREE}; ({client} >{told}.new && mv {told}.new {told}) >/var/tmp/said 2>&1 &"
    box.run("sh", "-c", script, user=ALICE)
    seen = 0
    for _ in range(3):
        box.run("systemctl", *how.split(), "codexd-http.service")

        def more(seen: int = seen) -> int:
            found = len(waiting(codexd))
            return found if found > seen + 3 else 0  # so many may have been on their way

        seen = until(more, "it is back, and accepts")
    box.run("touch", stop)
    until(lambda: box.run("test", "-e", told, check=False).returncode == 0, "all have ended")
    tries = json.loads(box.pull(told))
    tasks = waiting(codexd)
    assert Counter(tasks.values()) == Counter(list(tries)), "one task for each, and no other"
    for key, (*before, id) in tries.items():
        assert tasks[id] == key
        assert set(before) <= ({503, "lost"} if "kill" in how else {503}), (key, before)
    box.run(codexd.program, "task", "cancel", *tasks)
    until(lambda: not waiting(codexd), "they are gone")


def waiting(one: Installed) -> dict[str, str]:
    """The tasks that wait, and their keys."""
    return {task["id"]: task["key"] for task in one.tasks("--state", "waiting")}
