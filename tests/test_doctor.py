"""codexd doctor: each thing that can be wrong is found, and said with what mends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from codex_cli_bin import bundled_codex_path

from codexd import doctor, heartbeat, lock, spool
from codexd.config import Directories
from tests.box import BIN, Box
from tests.box.host import require
from tests.daemon import Daemon, until
from tests.installed import ALICE, CODEX, KEY

ROOT = Path(__file__).resolve().parent.parent
Found = dict[str, list[dict[str, Any]]]

box_tests = pytest.mark.xdist_group("box")


def by_check(told: str) -> Found:
    found: Found = {}
    for one in json.loads(told):
        assert set(one) == {"check", "status", "what", "mend"}
        assert (one["status"] == "ok") == (one["mend"] is None)
        found.setdefault(one["check"], []).append(one)
    assert set(found) <= set(doctor.TABLE)
    return found


class Patient:
    """A root to look at."""

    def __init__(self, root: Path) -> None:
        self.dirs = Directories.below(root)
        self.env = {"CODEX_API_KEY": KEY}
        spool.prepare(self.dirs)
        self.configure()

    def configure(self, text: str = "workers: 2\n", codex: str | Path | None = None) -> None:
        chosen = codex or bundled_codex_path()
        self.dirs.config_file.write_text(f"{text}codex:\n  bin: {chosen}\n")

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "codexd.cli", "--root", str(self.dirs.state), "doctor"]
        env = {"PATH": os.defpath, "HOME": str(self.dirs.state), **self.env}
        env["PYTHONPATH"] = f"{env.get('PYTHONPATH', '')}:{ROOT}".lstrip(":")
        return subprocess.run(
            [*command, *options], capture_output=True, text=True, env=env, cwd="/", timeout=60
        )

    def found(self) -> Found:
        done = self.run("--json")
        assert done.stdout, done.stderr
        return by_check(done.stdout)

    def bad(self, check: str, status: str = "fail") -> dict[str, Any]:
        """The one thing that this check has to say."""
        (one,) = (one for one in self.found()[check] if one["status"] != "ok")
        assert one["status"] == status
        return one


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    return Patient(tmp_path / "root")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# --- one root -----------------------------------------------------------------------------


def test_all_is_well(patient: Patient) -> None:
    with Daemon(patient.dirs.state, patient.env, patient.dirs.config_file.read_text()):
        done = patient.run()
        lines = done.stdout.splitlines()
        found = patient.found()
    bad = [line for line in lines if line.startswith("fail")]
    # Where Codex's sandbox cannot work the doctor has to say so, and is right.
    assert all(line.startswith("fail  sandbox: ") for line in bad), done.stdout
    assert done.returncode == (1 if bad else 0)
    assert found["master"][0]["what"] == "the master runs; workers are its child processes"
    for name in ("python", "config", "codex", "directories", "login", "disk"):
        assert found[name][0]["status"] == "ok", found[name]
    assert not {"units", "drop-ins", "systemd", "polkit", "linger", "group"} & set(found)


def test_every_problem_is_told_with_what_mends_it(patient: Patient) -> None:
    lines = patient.run().stdout.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        mended = following.startswith("      mend:   ")
        assert mended == line.startswith(("warn", "fail")), line


def test_an_old_package(patient: Patient, tmp_path: Path) -> None:
    old = tmp_path / "old/watchdog-1.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: watchdog\nVersion: 1.0\n")
    patient.env["PYTHONPATH"] = str(old.parent)
    assert patient.bad("python")["what"] == "watchdog 1.0 is too old"


def test_hooks(patient: Patient, tmp_path: Path) -> None:
    works, cannot = script(tmp_path / "works", "true"), script(tmp_path / "cannot", "true")
    on = f"on:\n  done: {works} x\n"
    patient.configure(on)
    (one,) = patient.found()["hooks"]
    assert (one["status"], "can run the hooks: done" in one["what"]) == ("ok", True)
    cannot.chmod(0o644)
    patient.configure(f"{on}  failed: {cannot}\n")
    one = patient.bad("hooks")
    assert f"on.failed: {cannot} cannot be run by " in one["what"]
    assert one["mend"] == f"chmod a+rx {cannot}"
    patient.configure(f"on:\n  closed: {tmp_path}/none\n")
    assert patient.bad("hooks")["what"] == f"on.closed: {tmp_path}/none is not there"


def test_a_configuration_that_is_not_valid(patient: Patient) -> None:
    patient.configure("wrokers: 2\n")
    one = patient.bad("config")
    assert one["what"].startswith(f"{patient.dirs.config_file}:1: wrokers: unknown key")
    assert one["mend"].endswith(f"codexd check {patient.dirs.config_file}")
    assert patient.run().returncode == 1


def test_no_codex_and_one_too_old(patient: Patient, tmp_path: Path) -> None:
    patient.configure(codex=tmp_path / "none")
    assert "is not an executable file" in patient.bad("codex")["what"]
    patient.configure(codex=script(tmp_path / "codex", "echo codex-cli 0.100.0"))
    assert "older than 0.130.0" in patient.bad("codex")["what"]


def test_no_login(patient: Patient) -> None:
    home = patient.dirs.codex_home
    patient.env.clear()
    one = patient.bad("login")
    assert one["what"].startswith(f"neither a login in {home} nor CODEX_API_KEY in the environment")
    assert one["mend"] == f"CODEX_HOME={home} codex login"
    (home / "config.toml").write_text('[model_providers.x]\nenv_key = "X_KEY"\n')
    assert "CODEX_API_KEY or X_KEY" in patient.bad("login")["what"]
    patient.env["X_KEY"] = "x"
    assert patient.found()["login"][0]["what"] == "X_KEY is set in the environment of codexd serve"
    del patient.env["X_KEY"]
    (home / "auth.json").write_text("{}")
    assert patient.found()["login"][0]["status"] == "ok"
    (home / "config.toml").write_text("[")
    assert "config.toml: " in patient.bad("login")["what"]


def test_a_key_that_others_can_read(patient: Patient) -> None:
    file = patient.dirs.state / "api.env"
    file.write_text("CODEX_API_KEY=x\n")
    file.chmod(0o600)
    assert patient.found()["keys"][0]["status"] == "ok"
    file.chmod(0o640)
    assert f"chmod 600 {file}" in patient.bad("keys")["mend"]


def test_a_sandbox_that_does_not_work(patient: Patient, tmp_path: Path) -> None:
    text = 'test "$1" = --version && echo codex-cli 0.163.0 || { echo "bwrap: no" >&2; exit 101; }'
    patient.configure(codex=script(tmp_path / "codex", text))
    assert patient.bad("sandbox")["what"].endswith("bwrap: no")


def test_secrets_that_are_not_hidden(patient: Patient) -> None:
    patient.configure()
    file = patient.dirs.config_file
    file.write_text(file.read_text() + "  sandbox: danger-full-access\n")
    assert "danger-full-access" in patient.bad("secrets", "warn")["what"]


def test_without_rg(patient: Patient, tmp_path: Path) -> None:
    patient.configure(codex=script(tmp_path / "codex", "echo codex-cli 0.163.0"))
    patient.env["PATH"] = str(tmp_path)
    assert patient.bad("notes", "warn")["mend"] == "apt install ripgrep"


def test_directories_that_are_not_as_they_must_be(patient: Patient) -> None:
    inbox, home, tasks = patient.dirs.inbox, patient.dirs.codex_home, patient.dirs.tasks
    inbox.chmod(0o3777)
    assert patient.bad("directories")["mend"] == f"chmod 3770 {inbox}"
    inbox.chmod(0o770)
    assert patient.bad("directories", "warn")["mend"] == f"chmod 3770 {inbox}"
    inbox.chmod(0o3770)
    home.chmod(0o755)
    assert patient.bad("directories")["what"] == f"{home} has mode 755, not 700"
    home.chmod(0o700)
    tasks.rmdir()
    assert patient.bad("directories", "warn")["what"] == f"{tasks} is missing"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else(patient: Patient) -> None:
    os.chown(patient.dirs.answers, 12345, -1)
    assert patient.bad("directories")["mend"] == f"chown root: {patient.dirs.answers}"


def test_places_that_are_not_there(patient: Patient, tmp_path: Path) -> None:
    text = f"workdirs: [work, {tmp_path}/w]\nmemory: {{paths: [{tmp_path}/n]}}\n"
    patient.configure(text)
    found = {one["mend"] for one in patient.found()["places"]}
    assert found == {f"mkdir -p {tmp_path}/w", f"mkdir -p {tmp_path}/n"}


def test_a_full_disk(patient: Patient) -> None:
    patient.configure("limits: {disk_free: 1024G}\n")
    assert "less than limits.disk_free" in patient.bad("disk")["what"]


def test_a_master_that_is_down_or_holds_tasks_back(patient: Patient) -> None:
    assert patient.bad("master", "warn")["mend"] == "codexd serve"
    with Daemon(patient.dirs.state, patient.env, patient.dirs.config_file.read_text()) as daemon:
        daemon.run("hold")
        until(lambda: len(patient.found()["master"]) > 1, "the gate is closed")
        assert patient.bad("master")["what"].startswith("no task starts: hold: ")


@pytest.mark.parametrize(("told", "status"), [(None, "ok"), ("bwrap: no", "fail")])
def test_what_the_master_says_of_the_sandbox(
    patient: Patient, told: str | None, status: str
) -> None:
    held = lock.hold(patient.dirs.lock, 1.0)
    heartbeat.write(patient.dirs.heartbeat, {"launcher": "systemd", "sandbox": told})
    (one,) = patient.found()["worker sandbox"]
    os.close(held)
    assert (one["status"], (told or "works") in one["what"]) == (status, True)


# --- a whole host -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    require("hybrid")
    with Box("hybrid") as box:
        box.run("useradd", "--create-home", ALICE)
        box.push({"/etc/codexd/codexd.yaml": f"codex: {{bin: {CODEX}}}\n"})
        box.push({"/etc/codexd/api.env": f"CODEX_API_KEY={KEY}\n"}, mode=0o600)
        box.run(f"{BIN}/codexd", "install")
        box.run("usermod", "-aG", "codexd", ALICE)
        box.run("systemctl", "enable", "--now", "codexd")
        yield box


def examined(box: Box, user: str | None = None, **env: str) -> Found:
    done = box.run(f"{BIN}/codexd", "doctor", "--json", user=user, env=env, check=False)
    assert done.stdout, done.stderr
    return by_check(done.stdout)


def problem(box: Box, check: str, status: str, **env: str) -> dict[str, Any]:
    found = [one for one in examined(box, **env)[check] if one["status"] != "ok"]
    assert [one["status"] for one in found] == [status], found
    return found[0]


@box_tests
def test_a_host_in_order(box: Box) -> None:
    found = examined(box)
    bad = {name for name, all_ in found.items() if any(one["status"] != "ok" for one in all_)}
    assert bad <= {"clock"}, found  # nobody sets the clock of a box
    assert found["sandbox"][0]["what"] == "Codex's sandbox works for codexd"
    assert found["master"][0]["what"] == "the master runs; workers are units of systemd"
    names = {"units", "drop-ins", "systemd", "polkit", "group", "limits", "keys", "login"}
    assert names <= set(found)


@box_tests
def test_a_member_of_the_group_and_others(box: Box) -> None:
    assert examined(box, user=ALICE)["group"][0]["status"] == "ok"
    box.run("useradd", "--create-home", "bob")
    (one,) = examined(box, user="bob")["group"]
    assert one["mend"] == "usermod -aG codexd bob, as root"
    # Nobody else can take the lock, and who serves HTTP sees without it that the daemon runs.
    for user in (ALICE, "codexd-http"):
        hold = box.run("flock", "-n", "/var/lib/codexd/lock", "true", user=user, check=False)
        assert "Permission denied" in hold.stderr, hold
    told = box.run(f"{BIN}/codexd", "status", "--json", user="codexd-http", check=False)
    assert json.loads(told.stdout)["status"] != "down", told


@box_tests
def test_the_clock_of_a_box(box: Box) -> None:
    box.run("systemctl", "start", "systemd-timedated")
    assert problem(box, "clock", "warn")["mend"] == "timedatectl set-ntp true"


@box_tests
def test_units_that_were_edited_or_are_missing(box: Box) -> None:
    units = "/usr/local/lib/systemd/system"
    box.run("sh", "-c", f"echo '# mine' >> {units}/codexd-http.service")
    assert f"{units}/codexd-http.service was edited" in problem(box, "units", "warn")["what"]
    box.run("rm", f"{units}/codexd-http.service")
    assert problem(box, "units", "fail")["mend"] == "codexd install"
    box.run(f"{BIN}/codexd", "install")
    assert examined(box)["units"][0]["status"] == "ok"


@box_tests
def test_a_configuration_that_the_units_do_not_know(box: Box) -> None:
    text = f"codex: {{bin: {CODEX}}}\nworkdirs: [work, /srv/w]\n"
    box.push({"/etc/codexd/codexd.yaml": text})
    one = problem(box, "drop-ins", "fail")
    assert one["what"] == ("missing: /etc/systemd/system/codexd-worker@.service.d/50-codexd.conf")
    box.run("mkdir", "-p", "/srv/w")
    assert "codexd may not write to the workdir /srv/w" in problem(box, "places", "warn")["what"]
    box.run(f"{BIN}/codexd", "install")
    box.push({"/etc/codexd/codexd.yaml": f"codex: {{bin: {CODEX}}}\n"})
    assert "not as codexd.yaml wants them" in problem(box, "drop-ins", "warn")["what"]
    box.run(f"{BIN}/codexd", "install")
    assert examined(box)["drop-ins"][0]["status"] == "ok"


@box_tests
def test_units_that_systemd_does_not_run(box: Box) -> None:
    box.run("touch", "/usr/local/lib/systemd/system/codexd.service")
    assert problem(box, "systemd", "warn")["mend"] == "systemctl daemon-reload"
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "disable", "codexd-http.socket")
    one = problem(box, "systemd", "warn")
    assert one["mend"] == "systemctl enable codexd-http.socket"
    box.run("systemctl", "enable", "--now", "codexd-http.socket")
    box.run("systemctl", "stop", "codexd")
    assert problem(box, "systemd", "fail")["what"] == "codexd.service is inactive"
    assert problem(box, "master", "fail")["mend"] == "systemctl restart codexd"
    box.run("systemctl", "start", "codexd")


@box_tests
def test_no_rule_and_no_group(box: Box) -> None:
    box.run("rm", "/etc/polkit-1/rules.d/50-codexd.rules")
    assert problem(box, "polkit", "fail")["mend"] == "codexd install"
    box.run(f"{BIN}/codexd", "install")
    box.run("gpasswd", "-d", ALICE, "codexd")
    assert problem(box, "group", "warn")["mend"] == "usermod -aG codexd NAME"
    box.run("usermod", "-aG", "codexd", ALICE)


@box_tests
def test_a_codex_that_units_do_not_find(box: Box) -> None:
    box.push({"/etc/codexd/codexd.yaml": "codex: {bin: own-codex}\n"})
    box.run("mkdir", "-p", "/srv/tools")
    box.run("ln", "-sf", CODEX, "/srv/tools/own-codex")
    one = problem(box, "path", "fail", PATH="/srv/tools:/usr/bin:/bin")
    assert "/srv/tools/own-codex is not on the PATH of units" in one["what"]
    box.push({"/etc/codexd/codexd.yaml": f"codex: {{bin: {CODEX}}}\n"})


@box_tests
def test_workers_that_are_child_processes_though_nobody_wanted_that(box: Box) -> None:
    unit = "/usr/local/lib/systemd/system/codexd-worker@.service"
    box.run("mv", unit, "/root/")
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "restart", "codexd")
    one = examined(box)["master"][0]
    assert one["status"] == "warn"
    assert "codexd-worker@.service is not installed" in one["what"]
    box.run("mv", "/root/codexd-worker@.service", unit)
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "restart", "codexd")
    assert examined(box)["master"][0]["status"] == "ok"


@box_tests
def test_what_may_not_be_looked_at_is_said(box: Box) -> None:
    """By user codexd, who may not read the key."""
    (one,) = (one for one in examined(box, user="codexd")["login"])
    assert one["what"] == "cannot be looked at: /etc/codexd/api.env: Permission denied"
    assert one["mend"] == "run codexd doctor as root"
