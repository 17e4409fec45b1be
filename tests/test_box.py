"""The booted systemd that other tests stand on: each thing that they rely on, once.

A box that lacks one of these would let a test of codexd pass, or fail, for a reason that
has nothing to do with codexd.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from codex_cli_bin import bundled_codex_path

from tests.box import BIN, PYTHON, SITE, TREE, Box, BoxError, Mode
from tests.box.cgroups import hierarchies
from tests.box.host import PLACES, PREFIX, require
from tests.daemon import until

# One box at a time: they are many processes for a small machine.
pytestmark = pytest.mark.xdist_group("box")

ROOT = Path(__file__).resolve().parent.parent
CODEX = f"{SITE}/{Path(bundled_codex_path()).relative_to(sysconfig.get_path('purelib'))}"
ID = "20261123t072011-k3f9qa7x2m"


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    require("hybrid")
    with Box("hybrid") as box:
        box.run("useradd", "--system", "--create-home", "worker")
        yield box


@pytest.fixture(scope="module")
def unified() -> Iterator[Box]:
    require("unified")
    with Box("unified") as box:
        yield box


def add(box: Box, units: dict[str, str]) -> None:
    box.push({f"/etc/systemd/system/{name}": text for name, text in units.items()})
    box.run("systemctl", "daemon-reload")


def said(box: Box, unit: str) -> list[str]:
    """What the processes of a unit wrote to their output, over all its runs."""
    return [e["MESSAGE"] for e in box.journal(f"_SYSTEMD_UNIT={unit}", "_TRANSPORT=stdout")]


# --- the box itself -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hybrid", "unified"])
def test_it_boots(mode: Mode, request: pytest.FixtureRequest) -> None:
    box: Box = request.getfixturevalue("box" if mode == "hybrid" else mode)
    assert box.wait_running() in ("running", "degraded")
    assert box.run("cat", "/proc/1/comm").stdout == "systemd\n"
    mounted = box.run("stat", "--file-system", "--format=%T", "/sys/fs/cgroup").stdout.strip()
    assert mounted == {"hybrid": "tmpfs", "unified": "cgroup2fs"}[mode]
    for unit in ("dbus", "systemd-journald", "systemd-logind"):
        assert box.show(unit, "ActiveState") == {"ActiveState": "active"}


def test_what_it_writes_is_not_the_hosts(box: Box) -> None:
    box.push({"/etc/codexd-was-here": "x", "/usr/share/codexd-was-here": "x"})
    assert not Path("/etc/codexd-was-here").exists()
    assert not Path("/usr/share/codexd-was-here").exists()
    assert box.run("touch", f"{TREE}/x", check=False).returncode != 0
    assert box.run("sh", "-c", "echo 0 > /proc/sys/kernel/panic", check=False).returncode != 0


def test_its_network_is_a_loopback_of_its_own(box: Box) -> None:
    names = box.run("sh", "-c", "tail -n +3 /proc/net/dev | cut -d: -f1").stdout.split()
    assert names == ["lo"]
    ask = "import socket, sys; socket.create_connection(('localhost', int(sys.argv[1])))"
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = box.run(PYTHON, "-c", ask, str(server.getsockname()[1]), check=False)
    assert "ConnectionRefusedError" in done.stderr  # up, and not the host's


def test_nothing_that_the_host_enabled_is_there(box: Box) -> None:
    ask = ("systemctl", "list-unit-files", "--state=enabled,linked,generated", "--no-legend")
    listed = box.run(*ask, check=False)  # its status is 1 where there is none
    assert (listed.stdout, listed.stderr) == ("", "")


def test_files_go_in_and_out(box: Box, tmp_path: Path) -> None:
    box.push({"/srv/a/b": b"\0\xff", "/srv/c": "é"}, mode=0o640, owner="worker")
    assert box.pull("/srv/a/b") == b"\0\xff"
    assert box.pull("/srv/c") == "é".encode()
    look = ("stat", "--format=%U:%G %a", "/srv/a/b", "/srv/a")
    assert box.run(*look).stdout == "worker:worker 640\nroot:root 755\n"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "program").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "deep" / "program").chmod(0o755)
    box.push_tree(tmp_path, "/srv/tree")
    assert box.run("/srv/tree/deep/program").stdout == "ran\n"


def test_a_command_fails_loudly(box: Box) -> None:
    with pytest.raises(BoxError, match="status 3: oops"):
        box.run("sh", "-c", "echo oops; exit 3")
    with pytest.raises(BoxError, match="not done in 3 s: begun"):
        box.run("sh", "-c", "echo begun; sleep 4321", timeout=3)
    until(lambda: box.run("pgrep", "-f", "sleep 432[1]", check=False).returncode, "its end")


def test_a_command_runs_as_a_user(box: Box) -> None:
    assert box.run("id", "-un", user="worker").stdout == "worker\n"
    assert box.run("cat", "/etc/shadow", user="worker", check=False).returncode == 1
    shown = box.run("env", user="worker", env={"A": "b c"}).stdout.splitlines()
    assert {"HOME=/home/worker", "A=b c"} <= set(shown)
    assert box.run("cat", input="in").stdout == "in"


def test_every_user_has_the_project_and_its_python(box: Box) -> None:
    look = "import codexd, sdnotify, sys, watchdog, yaml; print(codexd.__file__, sys.version_info)"
    shown = box.run(PYTHON, "-c", look, user="worker").stdout
    assert shown.startswith(f"{TREE}/codexd/__init__.py sys.version_info(major=3")
    assert "usage: codexd" in box.run(f"{BIN}/codexd", "--help", user="worker").stdout


# --- its lives ----------------------------------------------------------------------------


def test_a_reboot_keeps_the_disk(unified: Box) -> None:
    unit = "[Service]\nType=oneshot\nExecStart=echo up\n[Install]\nWantedBy=multi-user.target\n"
    add(unified, {"each.service": unit})
    unified.run("systemctl", "enable", "each")
    unified.push({"/var/lib/kept": "kept", "/run/lost": "", "/tmp/lost": ""})
    boots = [unified.boot_id()]
    for end in (unified.poweroff, unified.kill):
        end()
        with pytest.raises(BoxError, match="is off"):
            unified.run("true")
        unified.boot()
        boots.append(unified.boot_id())
        assert unified.pull("/var/lib/kept") == b"kept"
        assert unified.run("ls", "/run/lost", "/tmp/lost", check=False).stdout == ""
    assert len(set(boots)) == 3
    entries = [e for e in unified.journal("_SYSTEMD_UNIT=each.service") if e["MESSAGE"] == "up"]
    assert [e["_BOOT_ID"] for e in entries] == [boot.replace("-", "") for boot in boots[1:]]


def test_a_reboot_from_inside(unified: Box) -> None:
    before = unified.boot_id()
    unified.run("systemctl", "reboot")
    unified.wait_off()
    unified.boot()
    assert unified.boot_id() != before


def test_every_unit_can_know_the_boot(box: Box) -> None:
    """A /proc that systemd mounts for a unit has the host's boot_id; %b is right in all."""
    unit = "[Service]\nType=oneshot\nExecStart=echo %b\nProtectProc=invisible\nProcSubset=pid\n"
    add(box, {"boot.service": unit})
    box.run("systemctl", "start", "boot")
    assert said(box, "boot.service") == [box.boot_id().replace("-", "")]


# What a test process does that will be killed; it says which pids are its keeper and box.
VICTIM = """
import time
from tests.box import Box
box = Box("unified").__enter__()
print(box._keeper.pid, box.pid, flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("also_the_keeper", [False, True])
def test_nothing_outlives_a_killed_test(also_the_keeper: bool) -> None:
    require("unified")
    command = [sys.executable, "-c", VICTIM]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        keeper, init = map(int, victim.stdout.readline().split())
        place = PLACES / f"{PREFIX}{victim.pid}-1"
        cgroup = hierarchies()[""] / place.name
        assert place.is_dir()
        assert cgroup.is_dir()
        victim.send_signal(signal.SIGSTOP)  # it must not see its keeper die
        if also_the_keeper:
            os.kill(keeper, signal.SIGKILL)
        victim.kill()
    until(lambda: not Path(f"/proc/{init}").exists(), "the end of PID 1")
    if also_the_keeper:
        with Box("unified"):  # the next box clears away what is left
            pass
    until(lambda: not place.exists() and not cgroup.exists(), "nothing left")


def test_a_box_can_be_kept() -> None:
    require("unified")
    keep = "from tests.box import Box\nwith Box('unified', keep=True): pass"
    shown = subprocess.check_output([sys.executable, "-c", keep], cwd=ROOT, text=True)
    name, pid = shown.split()[0], int(shown.split()[-1])
    assert Path(f"/proc/{pid}/comm").read_text() == "systemd\n"
    end = os.pidfd_open(pid)
    assert select.select([end], [], [], 1) == ([], [], [])  # and it goes on
    os.close(end)
    assert f"--target {pid}" in shown
    os.kill(pid, signal.SIGKILL)
    until(lambda: not (PLACES / name).exists(), "nothing left")


def test_where_there_can_be_no_box_ci_fails(box: Box) -> None:
    """Its user is not root, and so can have no box of its own."""
    ask = (PYTHON, "-c", "from tests.box.host import require; require()")
    skipped = box.run(*ask, user="worker", check=False)
    assert "Skipped: a booted systemd needs root" in skipped.stderr
    failed = box.run(*ask, user="worker", env={"CI": "true"}, check=False)
    assert "Failed: CI has to run the tests in a booted systemd, but" in failed.stderr


# --- what units do in it ------------------------------------------------------------------

NOTIFIER = """
import sdnotify, signal, time
told = sdnotify.SystemdNotifier(debug=True)
time.sleep(0.2)
open("/run/notify.ready", "x")
told.notify("STATUS=2 running, 3 queued")
told.notify("READY=1")
signal.pause()
"""
NOTIFY = f"""
[Service]
Type=notify
ExecStart={PYTHON} /srv/notifier.py
ExecStopPost=/bin/sh -c 'env > /var/lib/stopped'
"""


def test_notify_and_the_record_of_a_killed_service(box: Box) -> None:
    box.push({"/srv/notifier.py": NOTIFIER})
    add(box, {"notify.service": NOTIFY})
    box.run("systemctl", "start", "notify")
    assert box.run("ls", "/run/notify.ready").returncode == 0  # `start` had to wait for READY=1
    shown = box.show("notify", "StatusText", "MainPID", "InvocationID")
    assert shown["StatusText"] == "2 running, 3 queued"
    box.run("systemctl", "kill", "--signal=KILL", "notify")
    until(lambda: box.show("notify", "ActiveState")["ActiveState"] == "failed", "failed")
    lines = box.pull("/var/lib/stopped").decode().splitlines()
    wanted = {"SERVICE_RESULT=signal", "EXIT_CODE=killed", "EXIT_STATUS=KILL"}
    assert wanted | {f"INVOCATION_ID={shown['InvocationID']}"} <= set(lines)


UPPER = """
import socket
with socket.socket(fileno=3) as listener:
    connection, _ = listener.accept()
    connection.sendall(connection.recv(99).upper())
"""
ASK = """
import socket
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("/run/upper.sock")
    connection.sendall(b"hello")
    print(connection.recv(99).decode())
"""


def test_socket_activation(box: Box) -> None:
    box.push({"/srv/upper.py": UPPER})
    listen = "[Socket]\nListenStream=/run/upper.sock\n"
    serve = f"[Service]\nExecStart={PYTHON} /srv/upper.py\n"
    add(box, {"upper.socket": listen, "upper.service": serve})
    box.run("systemctl", "start", "upper.socket")
    assert box.show("upper.service", "ActiveState") == {"ActiveState": "inactive"}
    assert box.run(PYTHON, "-c", ASK, user="worker").stdout == "HELLO\n"


def test_credentials(box: Box) -> None:
    box.push({"/etc/key": "opensesame\n"}, mode=0o600)
    unit = "[Service]\nType=oneshot\nUser=worker\nLoadCredential=key:/etc/key\n"
    add(box, {"secret.service": f"{unit}ExecStart=cat %d/key\n"})
    box.run("systemctl", "start", "secret")
    assert said(box, "secret.service") == ["opensesame"]


# Locked, so that a host with swap has to say no as well.
HUNGRY = """
import mmap
memory = mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x2000)
memory.write(bytes(256 << 20))
print("ate")
"""


def hungry(box: Box) -> str:
    """Let a service take more than its MemoryMax; its result."""
    unit = f"[Service]\nType=oneshot\nLimitMEMLOCK=infinity\nExecStart={PYTHON} /srv/hungry.py\n"
    box.push({"/srv/hungry.py": HUNGRY})
    add(box, {"free.service": unit, "capped.service": f"{unit}MemoryMax=64M\n"})
    box.run("systemctl", "start", "free")
    assert said(box, "free.service") == ["ate"]
    box.run("systemctl", "start", "capped", check=False)
    return box.show("capped", "Result")["Result"]


def test_memory_is_capped(box: Box) -> None:
    assert hungry(box) in ("signal", "oom-kill")  # cgroup v1 does not tell systemd of an OOM


def test_memory_is_capped_where_cgroup_v2_has_the_controller(unified: Box) -> None:
    """Where v1 has it systemd says nothing and enforces nothing: limits need the other box."""
    there = "memory" in unified.pull("/sys/fs/cgroup/cgroup.controllers").decode().split()
    assert hungry(unified) == ("oom-kill" if there else "success")


def test_collected_instances_leave_nothing(box: Box) -> None:
    service = "[Service]\nType=oneshot\nExecStart=false\n"
    collect = "[Unit]\nCollectMode=inactive-or-failed\n"
    add(box, {"piled@.service": service, "swept@.service": collect + service})
    for unit in ("piled@1", "swept@1"):
        assert box.run("systemctl", "start", unit, check=False).returncode == 1
    pattern = ("systemctl", "list-units", "--all", "--plain", "--no-legend")
    assert "failed" in box.run(*pattern, "piled@*").stdout
    until(lambda: box.run(*pattern, "swept@*").stdout == "", "no instance")


RULE = """
polkit.addRule(function(action, subject) {
    if (action.id == "org.freedesktop.systemd1.manage-units" && subject.user == "worker"
            && /^sleeper@[0-9a-z]+-[0-9a-z]+\\.service$/.test(action.lookup("unit"))
            && ["start", "stop"].indexOf(action.lookup("verb")) >= 0) {
        return polkit.Result.YES;
    }
});
"""


def test_polkit_lets_a_user_start_one_kind_of_instance(box: Box) -> None:
    box.push({"/etc/polkit-1/rules.d/50-sleeper.rules": RULE})
    sleeps = "[Service]\nExecStart=sleep 1000\n"
    add(box, {"sleeper@.service": sleeps, "other.service": sleeps})
    control = ("systemctl", "--no-ask-password")

    def may(*words: str, user: str = "worker") -> bool:
        return box.run(*control, *words, user=user, check=False).returncode == 0

    unit = f"sleeper@{ID}.service"
    assert not may("start", unit, user="nobody")
    assert may("start", unit)
    assert box.show(unit, "ActiveState") == {"ActiveState": "active"}
    assert not may("restart", unit)
    assert not may("start", "sleeper@...service")
    assert not may("start", "other.service")
    assert not may("daemon-reload")
    assert not may("poweroff")
    transient = ("systemd-run", "--no-ask-password", "true")
    assert box.run(*transient, user="worker", check=False).returncode != 0
    assert may("stop", unit)


def test_a_user_has_a_systemd_of_its_own(box: Box) -> None:
    env = box.start_user("worker")
    unit = "[Service]\nType=oneshot\nSyslogIdentifier=mine\nExecStart=echo hello\n"
    box.push({"/home/worker/.config/systemd/user/mine.service": unit}, owner="worker")
    box.run("systemctl", "--user", "daemon-reload", user="worker", env=env)
    box.run("systemctl", "--user", "start", "mine", user="worker", env=env)
    uid = box.run("id", "-u", "worker").stdout.strip()
    # Not by its unit: journald may look for that when so short a process is gone.
    entries = box.journal("SYSLOG_IDENTIFIER=mine", f"_UID={uid}")
    assert [entry["MESSAGE"] for entry in entries] == ["hello"]


# --- the real Codex CLI -------------------------------------------------------------------

HOME = "/var/lib/turn"
TURN = f"""
[Service]
User=worker
StateDirectory=turn
WorkingDirectory={HOME}
Environment=HOME={HOME} CODEX_HOME={HOME}/codex CODEXD_SCRIPTED_KEY=scripted
"""
LOOK = "cat /proc/1/comm && ! touch /var/lib/turn/x 2>/dev/null"


def sandboxed(box: Box, properties: str = "") -> str:
    """What a command in Codex's sandbox, in a unit, takes for PID 1."""
    name = f"sandbox-{len(properties)}.service"  # the journal keeps what others said
    unit = f"{TURN}{properties}Type=oneshot\nExecStart={CODEX} sandbox -- true\n"
    add(box, {name: f"{unit}ExecStart={CODEX} sandbox -- sh -c '{LOOK}'\n"})
    box.run("mkdir", "-p", f"{HOME}/codex")
    box.run("systemctl", "start", name)
    (comm,) = said(box, name)
    return comm


@pytest.mark.parametrize("properties", ["", "ProtectProc=invisible\nPrivateUsers=yes\n"])
def test_the_sandbox_of_codex_works_in_a_unit(box: Box, properties: str) -> None:
    assert sandboxed(box, properties) != "systemd"  # bubblewrap could mount a /proc of its own


def test_a_sandbox_without_a_proc_of_its_own() -> None:
    """Codex says nothing of it: the box must be able to tell a test which of both it was."""
    require("unified")
    with Box("unified", clean_proc=False) as box:
        box.run("useradd", "--system", "worker")
        assert sandboxed(box) == "systemd"


def test_a_turn_of_the_real_codex(box: Box) -> None:
    serve = f"{PYTHON} -m codexd.scripted --home {HOME}/codex --port-file {HOME}/port"
    options = "--json --color never --skip-git-repo-check -s workspace-write"
    run = f"{CODEX} exec {options} -o {HOME}/%i.md 'Say: Good morning.'"
    turn = f"{TURN}Type=oneshot\nExecStart={run}\nStandardOutput=file:{HOME}/%i.jsonl\n"
    turn += "StandardError=journal\n"  # else it is the same file
    add(box, {"model.service": f"{TURN}ExecStart={serve}\n", "turn@.service": turn})
    box.run("systemctl", "start", "model")
    until(lambda: box.run("test", "-s", f"{HOME}/port", check=False).returncode == 0, "its port")
    box.run("systemctl", "start", f"turn@{ID}")
    events = [json.loads(line) for line in box.pull(f"{HOME}/{ID}.jsonl").splitlines()]
    assert [e["type"] for e in events if e["type"].startswith("turn.")][-1] == "turn.completed"
    assert box.pull(f"{HOME}/{ID}.md").strip() == b"Good morning."
