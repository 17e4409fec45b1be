"""codexd for one user, under that user's own systemd, with the real Codex CLI."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from codexd.units import unit
from tests.box import BIN, PYTHON, TREE, Box
from tests.box.host import require
from tests.daemon import until
from tests.installed import ALICE, CODEX, KEY

pytestmark = pytest.mark.xdist_group("box")

HOME = f"/home/{ALICE}"
STATE = f"{HOME}/.local/state/codexd"
CONFIG = f"{HOME}/.config/codexd"
ORDERS = "/var/tmp/model/orders"

_MODEL = f"""\
[Service]
Type=notify
User={ALICE}
ExecStart={PYTHON} -m tests.box_model {STATE}/codex /var/tmp/model
WorkingDirectory={TREE}
Environment=PYTHONDONTWRITEBYTECODE=1
"""


class Mine:
    """An installation of Alice's, in a box."""

    def __init__(self, box: Box) -> None:
        self.box = box
        box.run("useradd", "--create-home", ALICE)
        self.env = box.start_user(ALICE)
        self.uid = box.run("id", "-u", ALICE).stdout.strip()
        self.sh(f"mkdir -p {CONFIG} {HOME}/src {HOME}/.ssh; echo secret | tee {HOME}/.ssh/id")
        text = f"codex: {{bin: {CODEX}}}\nworkdirs: [work, ~/src]\n"
        box.push({f"{CONFIG}/codexd.yaml": text, f"{HOME}/notes": "plain\n"}, owner=ALICE)
        key = {f"{CONFIG}/api.env": f"CODEXD_SCRIPTED_KEY={KEY}\n"}
        box.push(key, mode=0o600, owner=ALICE)
        self.installed = self.codexd("install", "--user").stdout
        box.push({"/etc/systemd/system/model.service": _MODEL})
        box.run("systemctl", "start", "model")

    def sh(self, script: str, check: bool = True) -> str:
        return self.box.run("sh", "-c", script, user=ALICE, env=self.env, check=check).stdout

    def codexd(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = (f"{BIN}/codexd", *argv)
        return self.box.run(*command, user=ALICE, env=self.env, check=check, timeout=90)

    def systemctl(self, *argv: str, check: bool = True) -> str:
        command = ("systemctl", "--user", *argv)
        return self.box.run(*command, user=ALICE, env=self.env, check=check).stdout.strip()

    def shown(self, of: str, name: str) -> str:
        return self.systemctl("show", f"--property={name}", "--value", of)

    def drop(self, name: str, text: str) -> None:
        path = f"{STATE}/inbox/{name}.md"
        write = ("sh", "-c", f"cat > {path}.tmp && mv {path}.tmp {path}")
        self.box.run(*write, input=text, user=ALICE)

    def task(self, name: str) -> dict[str, Any] | None:
        tasks = json.loads(self.codexd("--json", "task", "list").stdout)
        return next((t for t in tasks if t["file"] == f"{name}.md"), None)

    def until_state(self, name: str, *states: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            task = self.task(name)
            return task if task and task["state"] in states else None

        try:
            return until(look, f"{name} is {' or '.join(states)}", 60)
        except TimeoutError as error:
            story = self.box.run("journalctl", "-n", "60", "--no-pager").stdout
            raise TimeoutError(f"{error}\n{story}") from error

    def held(self, name: str) -> str:
        """A task in whose turn Codex waits for the model; its id."""
        self.drop(name, f"[[hold {name}]][[say {name} is done]]\n")
        id = self.until_state(name, "running")["id"]
        events = f"{STATE}/tasks/{id}/1/events.jsonl"
        until(lambda: self.sh(f"cat {events}", check=False), "Codex says something")
        return str(id)

    def release(self, name: str) -> None:
        self.sh(f"echo release {name} > {ORDERS}")

    def outputs(self, thread: str) -> str:
        """What commands of a thread printed, as the model got it: Codex may not tell of them."""
        told = "/var/tmp/model/told"
        self.sh(f"rm -f {told}; echo tell {told} > {ORDERS}")
        until(lambda: self.sh(f"ls {told}", check=False), "the model tells")
        turns = json.loads(self.box.pull(told))
        return "".join(text for t in turns if t["thread"] == thread for text in t["outputs"])

    def answer(self, name: str) -> str:
        return self.sh(f"cat {STATE}/answers/{name}.*.md").split("---\n", 2)[2]

    def doctor(self) -> dict[str, list[tuple[str, str]]]:
        """Status and text of the findings, by check."""
        found: dict[str, list[tuple[str, str]]] = {}
        for one in json.loads(self.codexd("doctor", "--json", check=False).stdout):
            found.setdefault(one["check"], []).append((one["status"], one["what"]))
        return found


@pytest.fixture(scope="module")
def mine() -> Iterator[Mine]:
    require("hybrid")
    with Box("hybrid") as box:
        mine = Mine(box)
        mine.systemctl("enable", "--now", "codexd")
        yield mine


def test_install_says_what_it_did_and_what_is_next(mine: Mine) -> None:
    units = f"{HOME}/.local/share/systemd/user"
    assert f"wrote     {units}/codexd.service\n" in mine.installed
    assert "ran       systemctl --user daemon-reload\n" in mine.installed
    assert "systemctl --user enable --now codexd\n" in mine.installed
    log_in = re.search(rf"CODEX_HOME={STATE}/codex (/\S+) login\n", mine.installed)
    assert log_in, "by its path: what pip installs is not on PATH"
    assert mine.shown("codexd.service", "FragmentPath") == f"{units}/codexd.service"
    assert "wrote" not in mine.codexd("install", "--user").stdout


def test_a_dropped_file_is_answered(mine: Mine) -> None:
    mine.drop("hello", "[[say Good morning.]]\n")
    task = mine.until_state("hello", "done", "failed")
    assert (task["state"], task["message"]) == ("done", None)
    assert mine.answer("hello") == "Good morning.\n"
    health = json.loads(mine.codexd("--json", "status").stdout)
    assert (health["launcher"], health["launcher_why"]) == ("systemd", None)


def test_over_http(mine: Mine) -> None:
    socket = f"/run/user/{mine.uid}/codexd/http.sock"
    assert mine.sh(f"stat --format=%a {socket}") == "600\n"
    ask = f"curl -s --unix-socket {socket} http://localhost/tasks"
    posted = mine.sh(f"{ask} -H 'Content-Type: application/json' -d '{{\"prompt\": \"Hello.\"}}'")
    id = json.loads(posted)["id"]
    assert json.loads(mine.sh(f"{ask}/{id}?wait=30"))["state"] == "done"


# What a command of the model may do: a line for each thing that it could.
LOOK = f"""\
cat {HOME}/.ssh/id; cat {CONFIG}/api.env; cat {HOME}/notes
touch {HOME}/x; touch {STATE}/x; touch {HOME}/src/written
ls {STATE}/inbox; ls {STATE}/tasks.md; ls {STATE}/answers
XDG_RUNTIME_DIR=/run/user/$(id -u) systemctl --user list-units
env | grep {KEY}; cat /proc/*/environ | tr '\\0' '\\n' | grep {KEY}
"""


@pytest.mark.parametrize("sandbox", ["workspace-write", "danger-full-access"])
def test_what_a_command_of_the_model_can_reach(mine: Mine, sandbox: str) -> None:
    """Without Codex's sandbox it is the unit alone that keeps it from the rest."""
    script = f"{HOME}/src/look-{sandbox}"
    mine.box.push({script: LOOK}, owner=ALICE)
    mine.sh(f"rm -f {HOME}/src/written")
    config = f"codex: {{bin: {CODEX}, sandbox: {sandbox}}}\nworkdirs: [work, ~/src]\n"
    mine.box.push({f"{CONFIG}/codexd.yaml": config}, owner=ALICE)
    mine.systemctl("reload", "codexd")
    name = f"look-{sandbox}"
    mine.drop(name, f"---\nworkdir: ~/src\n---\n[[shell sh {script} 2>&1]][[say looked]]\n")
    task = mine.until_state(name, "done", "failed")
    assert task["state"] == "done", task
    told = mine.outputs(task["thread"])
    assert "plain\n" in told, told  # of the home what is no secret
    assert "secret" not in told
    assert "Failed to connect to bus: " in told
    assert "codexd.service" not in told
    for path in (f"{HOME}/x", f"{STATE}/x"):
        assert f"touch: cannot touch '{path}': " in told
    for path in (f"{STATE}/inbox", f"{STATE}/tasks.md", f"{STATE}/answers"):
        assert f"ls: cannot access '{path}': No such file or directory" in told
    assert mine.sh(f"ls {HOME}/src/written") == f"{HOME}/src/written\n"
    if sandbox == "workspace-write":  # without one, the tools of a key's owner can have it
        assert KEY not in told


def reconfigure(mine: Mine, text: str) -> str:
    """What `codexd install` says of another configuration, under which codexd runs then."""
    mine.box.push({f"{CONFIG}/codexd.yaml": text}, owner=ALICE)
    told = mine.codexd("install", "--user").stdout
    mine.systemctl("restart", "codexd")
    return told


def test_a_codex_home_of_her_own(mine: Mine) -> None:
    """The one place among her secrets that codexd may be given."""
    before = mine.box.pull(f"{CONFIG}/codexd.yaml").decode()
    mine.sh(f"cp -r {STATE}/codex {HOME}/.codex")
    look = f"{HOME}/src/look-home"
    mine.box.push({look: f"cat {HOME}/.ssh/id; cat {CONFIG}/api.env; echo looked\n"}, owner=ALICE)
    codex = f"codex: {{bin: {CODEX}, home: ~/.codex, sandbox: danger-full-access}}\n"
    reconfigure(mine, f"{codex}workdirs: [work, ~/src]\n")
    try:
        mine.drop("own", f"---\nworkdir: ~/src\n---\n[[shell sh {look} 2>&1]][[say at home]]\n")
        task = mine.until_state("own", "done", "failed", "waiting", "cancelled")
        assert task["state"] == "done", task
        assert "looked" in (told := mine.outputs(task["thread"]))
        assert "secret" not in told
        assert KEY not in told
    finally:
        reconfigure(mine, before)
        mine.sh(f"rm -r {HOME}/.codex")


def test_notes_that_no_worker_sees(mine: Mine) -> None:
    """They lie beside the key; whoever puts them there is told."""
    before = mine.box.pull(f"{CONFIG}/codexd.yaml").decode()
    notes = f"{CONFIG}/notes"
    mine.sh(f"mkdir {notes}; echo of the notes > {notes}/a.md")
    told = reconfigure(mine, f"{before}memory: {{paths: [{notes}]}}\n")
    try:
        assert f"{notes} (memory.paths), which is hidden from workers" in told
        assert ("warn", True) in [(s, notes in what) for s, what in mine.doctor()["places"]]
        mine.drop("unseen", "Have you seen the notes? [[say no]]\n")
        task = mine.until_state("unseen", "done", "failed")
        assert (task["state"], task["message"]) == ("done", f"memory: {notes}: Permission denied")
    finally:
        reconfigure(mine, before)


def test_a_restart_of_the_master_keeps_a_running_worker(mine: Mine) -> None:
    id = mine.held("kept")
    before = mine.shown(unit(id), "InvocationID")
    mine.systemctl("restart", "codexd")
    assert mine.shown(unit(id), "InvocationID") == before
    mine.release("kept")
    task = mine.until_state("kept", "done", "failed")
    assert (task["state"], task["attempts"]) == ("done", 1)
    assert mine.answer("kept") == "kept is done\n"


def test_stopping_its_unit_cancels_a_task(mine: Mine) -> None:
    id = mine.held("stopped")
    mine.systemctl("stop", unit(id))
    task = mine.until_state("stopped", "cancelled", "failed", "done")
    assert (task["state"], task["outcome"]) == ("cancelled", "cancelled")
    assert mine.box.run("pgrep", "-f", id, check=False).stdout == ""


def test_a_stop_of_everything_is_no_cancel(mine: Mine) -> None:
    """As when Alice logs out, or the host is shut down in order."""
    id = mine.held("resumed")
    thread = None
    mine.box.run("systemctl", "restart", f"user@{mine.uid}.service")
    until(lambda: mine.shown("codexd", "ActiveState") == "active", "the next master")
    task = mine.until_state("resumed", "running", "done")
    assert task["id"] == id
    thread = task["thread"]
    mine.release("resumed")
    task = mine.until_state("resumed", "done", "failed", "cancelled")
    assert (task["state"], task["thread"]) == ("done", thread)


def test_limits_of_a_task(mine: Mine) -> None:
    """They are set first; as long as that takes, its worker is not taken for dead."""
    slow = f"{HOME}/.config/systemd/user/codexd-limits@.service.d/slow.conf"
    mine.box.push({slow: "[Service]\nExecStartPre=/bin/sleep 6\n"}, owner=ALICE)
    mine.systemctl("daemon-reload")
    mine.drop("small", "---\nlimits: {memory: 300M, tasks: 9999}\n---\n[[hold small]][[say ok]]\n")
    id = mine.until_state("small", "running")["id"]
    until(lambda: mine.shown(unit(id), "ActiveState") == "active", "its worker")
    assert mine.shown(unit(id), "MemoryMax") == str(300 << 20)
    assert mine.shown(unit(id), "TasksMax") == "4096"  # the unit's own: it is never more
    mine.release("small")
    task = mine.until_state("small", "done", "failed", "cancelled", "waiting")
    assert (task["state"], task["attempts"]) == ("done", 1)
    control = f"/run/user/{mine.uid}/systemd/user.control"
    until(lambda: not mine.sh(f"ls {control}", check=False), "no drop-in is left")


def test_she_is_told_that_her_daemon_fails(mine: Mine) -> None:
    mine.box.push({f"{CONFIG}/notify": f"#!/bin/sh\necho $1 >> {HOME}/told\n"}, 0o755, ALICE)
    valid = mine.box.pull(f"{CONFIG}/codexd.yaml")
    mine.box.push({f"{CONFIG}/codexd.yaml": "wrokers: 1\n"}, owner=ALICE)
    mine.systemctl("restart", "codexd", check=False)
    try:
        until(lambda: int(mine.shown("codexd", "NRestarts")) > 1, "systemd tries again")
        until(lambda: mine.sh(f"cat {HOME}/told", check=False), "a notice")
    finally:
        mine.box.push({f"{CONFIG}/codexd.yaml": valid}, owner=ALICE)
    until(lambda: mine.shown("codexd", "SubState") == "running", "it runs")
    assert mine.sh(f"cat {HOME}/told") == "codexd\n"


def test_a_schedule(mine: Mine) -> None:
    mine.box.push({f"{STATE}/schedules/daily.md": "[[say It is time.]]\n"}, owner=ALICE)
    timer = f"{HOME}/.config/systemd/user/codexd-schedule@daily.timer.d/when.conf"
    mine.box.push({timer: "[Timer]\nOnActiveSec=1s\nRandomizedDelaySec=0\n"}, owner=ALICE)
    mine.systemctl("daemon-reload")
    mine.systemctl("start", "codexd-schedule@daily.timer")
    answers = f"cat {STATE}/answers/daily-*.md"
    until(lambda: "It is time.\n" in mine.sh(answers, check=False), "its answer")


def test_nothing_is_left_of_workers(mine: Mine) -> None:
    ask = ("list-units", "--all", "--plain", "--no-legend", "codexd-worker@*", "codexd-limits@*")
    until(lambda: not mine.systemctl(*ask), "every worker is gone")
    exits = f"/run/user/{mine.uid}/codexd/exits"
    until(lambda: not mine.sh(f"ls {exits}").split(), "every exit record was read")


def test_doctor_tells_of_linger(mine: Mine) -> None:
    found = mine.doctor()
    ((status, text),) = found["linger"]
    assert (status, "end when alice logs out" in text) == ("warn", True)
    mine.box.run("mkdir", "-p", "/var/lib/systemd/linger")
    mine.box.push({f"/var/lib/systemd/linger/{ALICE}": ""})
    found = mine.doctor()
    assert found["linger"] == [("ok", "codexd goes on when alice logs out")]
    failed = {name: f for name, f in found.items() if any(s == "fail" for s, _ in f)}
    assert set(failed) <= {"login"}, failed
    ((status, text),) = found["limits"]
    assert (status, "not enforced" in text) == ("warn", True)  # cgroup v1


def test_uninstall_leaves_the_work(mine: Mine) -> None:
    mine.sh(
        f"mkdir -p {HOME}/.config/systemd/user/codexd.service.d && "
        f"echo '[Unit]' > {HOME}/.config/systemd/user/codexd.service.d/own.conf"
    )
    told = mine.codexd("uninstall", "--user").stdout
    assert f"Tasks, answers and configuration stay in {CONFIG}, {STATE}.\n" in told
    exits = f"/run/user/{mine.uid}/codexd/exits"
    assert not mine.sh(f"ls -d {exits}", check=False), "what was stopped was not cancelled"
    assert mine.shown("codexd.service", "LoadState") == "not-found"
    assert mine.sh(f"ls {HOME}/.local/share/systemd/user {HOME}/.local/lib/codexd") == (
        f"{HOME}/.local/lib/codexd:\n\n{HOME}/.local/share/systemd/user:\n"
    )
    own = mine.sh(f"find {HOME}/.config/systemd -type f").split()
    assert f"{HOME}/.config/systemd/user/codexd.service.d/own.conf" in own
    assert "50-codexd.conf" not in {path.rpartition("/")[2] for path in own}
    assert "hello" in mine.sh(f"ls {STATE}/answers")
