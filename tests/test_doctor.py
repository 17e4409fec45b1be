"""codexd doctor: each thing that can be wrong is found, and said with what mends it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from codex_cli_bin import bundled_codex_path

from codexd import checks, codexchecks, config, doctor, heartbeat, lock, spool, unitchecks
from codexd.config import Directories, load
from tests.box import BIN, Box
from tests.box.host import require
from tests.daemon import Daemon, uncovered, until
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
        self.wrapper: tuple[str, ...] = ()
        spool.prepare(self.dirs)
        self.configure()

    def configure(self, text: str = "workers: 2\n", codex: str | Path | None = None) -> None:
        chosen = codex or bundled_codex_path()
        self.dirs.config_file.write_text(f"{text}codex:\n  bin: {chosen}\n")

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        codexd = [sys.executable, "-m", "codexd.cli", "--root", str(self.dirs.state)]
        command = [*self.wrapper, *codexd, "doctor"]
        # Of all else of ours: what counts the lines that are run.
        counts = {name: os.environ[name] for name in os.environ.keys() - uncovered().keys()}
        env = {"PATH": os.defpath, "HOME": str(self.dirs.state), **counts, **self.env}
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


UNSAFE = 'test "$1" = --version && echo codex-cli 0.163.0 || { echo "bwrap: no" >&2; exit 101; }'


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


def test_packages_that_do_not_say_which_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirs = Directories.below(tmp_path)
    host = checks.Host(dirs, load(dirs, explicit=False), None, False, os.defpath)
    monkeypatch.setattr(sys, "path", [])  # where they would say it
    version = ".".join(map(str, sys.version_info[:3]))
    assert list(checks.python(host)) == [checks.ok(f"Python {version}")]


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
    patient.env.clear()
    assert patient.bad("login")["mend"].endswith(f"={patient.dirs.codex_home} codex login")
    patient.configure(codex=script(tmp_path / "codex", "echo codex-cli 0.100.0"))
    assert "older than 0.130.0" in patient.bad("codex")["what"]


def test_no_login(patient: Patient) -> None:
    home = patient.dirs.codex_home
    patient.env.clear()
    one = patient.bad("login")
    assert one["what"].startswith(f"neither a login in {home} nor CODEX_API_KEY in the environment")
    mend = one["mend"].removeprefix(f"CODEX_HOME={home} ").removesuffix(" login")
    assert Path(mend).is_absolute(), "what pip installs is not on PATH"
    assert os.access(mend, os.X_OK)
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
    patient.configure(codex=script(tmp_path / "codex", UNSAFE))
    assert patient.bad("sandbox")["what"].endswith("bwrap: no")


@pytest.mark.parametrize(("settings", "mend"), [
    ({"kernel/unprivileged_userns_clone": "0", "user/max_user_namespaces": "63000"},
     "sysctl -w kernel.unprivileged_userns_clone=1, and the same in /etc/sysctl.d: "),
    ({"kernel/apparmor_restrict_unprivileged_userns": "1"},
     "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, and the same in /etc/sysctl.d; "
     "or give Codex an AppArmor profile: "),
    ({"user/max_user_namespaces": "0", "kernel/unprivileged_userns_clone": "0"},
     "sysctl -w kernel.unprivileged_userns_clone=1; sysctl -w user.max_user_namespaces=10000, "
     "and the same in /etc/sysctl.d: "),
    ({"kernel/unprivileged_userns_clone": "1"}, "let users make namespaces: "),
])  # fmt: skip
def test_what_lets_users_make_namespaces(
    tmp_path: Path, settings: dict[str, str], mend: str
) -> None:
    for name, value in settings.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    assert codexchecks.namespaces(tmp_path) == f"{mend}see CAVEATS in codexd(7)"


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
    one = patient.bad("directories", "warn")
    assert (one["what"], one["mend"]) == (
        f"{tasks} is missing", shlex.join(["codexd", "--root", str(patient.dirs.state), "serve"])
    )  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else(patient: Patient) -> None:
    os.chown(patient.dirs.answers, 12345, -1)
    assert patient.bad("directories")["mend"] == f"chown root: {patient.dirs.answers}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be anybody")
def test_a_user_without_a_name(patient: Patient) -> None:
    """As in containers: who it is, the number says."""
    patient.wrapper = ("unshare", "--user", "--map-user=54321")
    (patient.dirs.state / "api.env").write_text("CODEX_API_KEY=x\n")
    found = patient.found()
    assert found["directories"][0]["what"].endswith(" are 54321's, with the right modes")
    assert "; chown 54321: " in found["keys"][0]["mend"]


def test_before_there_is_a_user_codexd(tmp_path: Path) -> None:
    """Nobody is there whom Codex could be run as: that alone is said."""
    dirs = Directories.system()
    host = checks.Host(dirs, load(dirs, explicit=False), None, True, str(tmp_path))
    if host.user:
        pytest.skip("there is one here")
    assert list(checks.directories(host)) == [
        checks.fail("there is no user codexd", "codexd install")
    ]
    (codex,) = codexchecks.cli(host)
    assert codex.what.endswith("; its version is asked as user codexd")
    assert list(codexchecks.sandbox(host)) == []


def test_places_that_are_not_there(patient: Patient, tmp_path: Path) -> None:
    text = f"workdirs: [work, {tmp_path}/w]\nmemory: {{paths: [{tmp_path}/n]}}\n"
    patient.configure(text)
    found = {one["mend"] for one in patient.found()["places"]}
    assert found == {f"mkdir -p {tmp_path}/w", f"mkdir -p {tmp_path}/n"}


def test_a_full_disk(patient: Patient) -> None:
    patient.configure("limits: {disk_free: 1024G}\n")
    assert "less than limits.disk_free" in patient.bad("disk")["what"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_nearly_full(patient: Patient) -> None:
    small = f'mount -t tmpfs -o size=256M none {patient.dirs.state} && exec "$@"'
    patient.wrapper = ("unshare", "--mount", "sh", "-c", small, "sh")
    assert patient.bad("disk", "warn")["mend"] == "make room, or codexd gc"


@pytest.mark.parametrize(("tool", "status"), [("echo yes", ["ok"]), ("echo no", ["warn"]),
                                              ("exit 1", []), ("", [])])  # fmt: skip
def test_the_clock(patient: Patient, tmp_path: Path, tool: str, status: list[str]) -> None:
    """As timedatectl says; where it is not there, or has nobody to ask, nothing is said."""
    patient.configure(codex=script(tmp_path / "codex", "echo codex-cli 0.163.0"))
    if tool:
        script(tmp_path / "timedatectl", tool)
    patient.env["PATH"] = str(tmp_path)
    assert [one["status"] for one in patient.found().get("clock", [])] == status


def test_a_master_that_is_down_or_holds_tasks_back(patient: Patient) -> None:
    assert patient.bad("master", "warn")["mend"] == f"codexd --root {patient.dirs.state} serve"
    with Daemon(patient.dirs.state, patient.env, patient.dirs.config_file.read_text()) as daemon:
        daemon.run("hold")
        until(lambda: len(patient.found()["master"]) > 1, "the gate is closed")
        assert patient.bad("master")["what"].startswith("no task starts: hold: ")


def test_a_master_that_holds_back_the_tasks_of_one_profile(patient: Patient) -> None:
    held = lock.hold(patient.dirs.lock, 1.0)
    heartbeat.write(patient.dirs.heartbeat, {"gate": {"quota:work": {"message": "spent"}}})
    told = patient.bad("master", "warn")["what"]
    os.close(held)
    assert told == "tasks of single profiles wait: quota:work: spent"


@pytest.mark.parametrize(("told", "status"), [(None, "ok"), ("bwrap: no", "fail")])
def test_what_the_master_says_of_the_sandbox(
    patient: Patient, told: str | None, status: str
) -> None:
    held = lock.hold(patient.dirs.lock, 1.0)
    heartbeat.write(patient.dirs.heartbeat, {"launcher": "systemd", "sandbox": told})
    (one,) = patient.found()["worker sandbox"]
    os.close(held)
    assert (one["status"], (told or "works") in one["what"]) == (status, True)


def test_a_configuration_that_the_master_refused(patient: Patient) -> None:
    """It goes on with the one before; who looks only at the file may have mended it since."""
    held = lock.hold(patient.dirs.lock, 1.0)
    heartbeat.write(patient.dirs.heartbeat, {"config_problem": "codexd.yaml:1: wrokers"})
    one = patient.bad("master")
    os.close(held)
    assert one["what"] == "the master refused codexd.yaml: codexd.yaml:1: wrokers"


def with_units(patient: Patient, text: str, path: str = os.defpath) -> checks.Host:
    """The patient, if systemd were to start its workers."""
    patient.configure(text)
    return checks.Host(patient.dirs, config.load(patient.dirs, explicit=False), None, True, path)


def test_a_hook_that_its_unit_does_not_see(patient: Patient) -> None:
    (one,) = unitchecks.hooks(with_units(patient, "on:\n  done: /tmp/hook\n"))
    assert one.what == "on.done: /tmp/hook is hidden from codexd-hook@.service"
    assert one.mend == "put it into /etc/codexd or /usr/local"


def test_a_place_that_no_unit_can_name(patient: Patient) -> None:
    (one,) = unitchecks.drop_ins(with_units(patient, "workdirs: [work, '/srv/a$b']\n"))
    assert one.what.startswith("'/srv/a$b' has characters that a unit file cannot name; ")
    assert one.mend == "mend that, then: codexd install --user"


def test_units_that_systemd_does_not_know(
    patient: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were laid down, and it has not looked since."""
    script(tmp_path / "systemctl", "echo LoadState=not-found")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = list(unitchecks.units(with_units(patient, "workers: 2\n")))
    assert found[0].what == "systemd does not know codexd.service"
    assert {one.mend for one in found} == {
        "codexd install --user; systemctl --user daemon-reload",
    }  # fmt: skip


def test_of_a_codex_that_nobody_finds_its_own_check_tells(patient: Patient) -> None:
    host = with_units(patient, "workers: 2\n")
    nowhere = replace(host.config.codex, bin="no-such-codex-anywhere")
    bare = replace(host, config=replace(host.config, codex=nowhere))
    assert list(unitchecks.service_path(bare)) == []


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
    (one,) = examined(box, user=ALICE).values()  # nothing is said of what she does not have
    inbox = "/var/spool/codexd/inbox"
    assert one[0]["status"] == "ok"
    assert (
        f"nothing of your own is here; the system's codexd takes files dropped into {inbox}"
        in (one[0]["what"])
    )
    for verb in (["status"], ["ask", "x"], ["hold"], ["task", "list"]):
        done = box.run(f"{BIN}/codexd", *verb, user=ALICE, check=False)
        assert (done.returncode, done.stdout) == (69, "")
        assert f"the system's codexd takes files dropped into {inbox}, and HTTP: " in done.stderr
    asked = re.search(r"curl --unix-socket \S+ \S+/tasks", done.stderr)
    assert asked
    assert json.loads(box.run(*asked[0].split(), user=ALICE).stdout) == {"tasks": [], "next": None}
    box.run("mkdir", "-p", f"/home/{ALICE}/.local/state/codexd")
    box.run("chown", "-R", f"{ALICE}:", f"/home/{ALICE}/.local")
    assert len(examined(box, user=ALICE)) > 5, "she has begun to have one of her own"
    box.run("rm", "-r", f"/home/{ALICE}/.local")
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
def test_units_that_fail_again_and_again(box: Box) -> None:
    box.push({"/etc/codexd/codexd.yaml": "wrokers: 2\n"})
    box.run("systemctl", "restart", "codexd", check=False)
    tries = lambda: int(box.show("codexd", "NRestarts")["NRestarts"])  # noqa: E731
    until(lambda: tries() > 0, "systemd tries again")
    one = problem(box, "systemd", "fail")
    assert re.fullmatch(
        r"codexd.service fails \(.*\), and was started again \d+ times", one["what"]
    )
    assert one["mend"] == "journalctl -e -u codexd.service"
    box.push({"/etc/codexd/codexd.yaml": f"codex: {{bin: {CODEX}}}\n"})
    box.run("systemctl", "restart", "codexd")
    broken = "/etc/systemd/system/codexd-http.service.d/broken.conf"
    box.push({broken: "[Service]\nExecStartPre=/bin/false\n"})
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "stop", "codexd-http.service")
    ask = ("curl", "-sS", "-m", "2", "--unix-socket", "/run/codexd/http.sock", "http://localhost/")
    box.run(*ask, check=False)
    assert problem(box, "systemd", "fail")["what"].startswith("codexd-http.service fails (")
    box.run("rm", broken)
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "restart", "codexd-http")
    assert {one["status"] for one in examined(box)["systemd"]} == {"ok"}


@box_tests
def test_http_that_is_to_listen_elsewhere_or_nowhere(box: Box) -> None:
    as_it_was, command = f"codex: {{bin: {CODEX}}}\n", f"{BIN}/codexd"
    box.push({"/etc/codexd/token": "a-token-of-this-test\n"}, mode=0o600, owner="codexd-http")
    tcp = "http: {listen: '127.0.0.1:8087', token_file: /etc/codexd/token}\n"
    box.push({"/etc/codexd/codexd.yaml": as_it_was + tcp})
    mend = "systemctl restart codexd-http.socket"
    assert f"It has changed:  {mend}\n" in box.run(command, "install").stdout
    one = problem(box, "systemd", "warn")  # systemd itself shows the new address by now
    assert one["what"].startswith("nothing listens on 127.0.0.1:8087: ")
    assert one["mend"] == mend
    box.run(*mend.split())
    assert {one["status"] for one in examined(box)["systemd"]} == {"ok"}
    assert "It has changed" not in box.run(command, "install").stdout
    box.push({"/etc/codexd/codexd.yaml": as_it_was + "http: {listen: off}\n"})
    told = box.run(command, "install").stdout
    assert "HTTP is off:     systemctl mask --now codexd-http.socket\n" in told
    mend = problem(box, "systemd", "warn")["mend"]
    assert mend == "systemctl mask --now codexd-http.socket"
    box.run("systemctl", "restart", "codexd-http.socket")
    starts = lambda: box.journal("CODEXD_EVENT=http.off")  # noqa: E731
    before = len(starts())
    ask = ("curl", "-sS", "-m", "5", "--unix-socket", "/run/codexd/http.sock", "http://localhost/")
    assert box.run(*ask, check=False).returncode in (52, 56), "closed, without a word"
    until(lambda: box.show("codexd-http", "ActiveState") == {"ActiveState": "inactive"}, "its end")
    assert box.show("codexd-http", "Result") == {"Result": "success"}
    box.run(*mend.split())
    box.run("systemctl", "restart", "codexd")
    assert box.show("codexd-http.socket", "ActiveState") == {"ActiveState": "inactive"}
    assert len(starts()) == before + 1, "one request was one start"
    assert {one["status"] for one in examined(box)["systemd"]} == {"ok"}
    box.push({"/etc/codexd/codexd.yaml": as_it_was})
    box.run(command, "install")
    mend = problem(box, "systemd", "warn")["mend"]
    assert mend == "systemctl unmask codexd-http.socket; systemctl start codexd-http.socket"
    box.run("sh", "-c", mend)
    assert {one["status"] for one in examined(box)["systemd"]} == {"ok"}


@box_tests
def test_what_user_codexd_may_have_written_is_not_run_by_root(box: Box) -> None:
    text = f"#!/bin/sh\nid -u >> /var/tmp/who\n{UNSAFE}\n"
    box.push({"/srv/codex": text}, mode=0o755, owner="codexd")
    box.push({"/etc/codexd/codexd.yaml": "codex: {bin: /srv/codex}\n"})
    box.run("rm", "-f", "/var/tmp/who")
    assert examined(box)["codex"][0]["what"] == "Codex 0.163.0: /srv/codex"
    uid = box.run("id", "-u", "codexd").stdout.strip()
    asked = box.pull("/var/tmp/who").decode().split()
    assert len(asked) >= 2, "asked for its version, and for a sandbox"
    assert set(asked) == {uid}
    box.push({"/etc/codexd/codexd.yaml": f"codex: {{bin: {CODEX}}}\n"})


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
def test_a_worker_s_unit_that_is_missing(box: Box) -> None:
    """The master's own unit would keep child processes from working, so there are none."""
    unit = "/usr/local/lib/systemd/system/codexd-worker@.service"
    box.run("mv", unit, "/root/")
    box.run("systemctl", "daemon-reload")
    assert box.run("systemctl", "restart", "codexd", check=False).returncode
    shown = box.run("journalctl", "-u", "codexd", "-o", "cat", "--no-pager").stdout
    assert "status=78/CONFIG" in shown
    assert "codexd.service cannot start workers: the unit codexd-worker@.service is not" in shown
    box.run("mv", "/root/codexd-worker@.service", unit)
    box.run("systemctl", "daemon-reload")
    until(lambda: box.show("codexd", "ActiveState") == {"ActiveState": "active"}, "it is back")
    assert examined(box)["master"][0]["status"] == "ok"


@box_tests
def test_a_service_of_another_name_says_why_its_workers_are_children(box: Box) -> None:
    """Where nothing keeps child processes from working they are used; everybody is told."""
    worker = "/usr/local/lib/systemd/system/codexd-worker@.service"
    box.run("mv", worker, "/root/")
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "stop", "codexd")
    own = f"[Service]\nType=notify\nUser=codexd\nExecStart={BIN}/codexd-master\n"
    box.push({"/etc/systemd/system/mine.service": own})
    box.run("systemctl", "start", "mine")
    why = "the unit codexd-worker@.service is not installed"
    assert f"\nworkers: {why}" in box.run(f"{BIN}/codexd", "status").stdout
    assert why in examined(box)["master"][0]["what"]
    (told,) = box.journal("CODEXD_EVENT=started", "_SYSTEMD_UNIT=mine.service")
    assert f'launcher=process launcher_why="{why}' in told["MESSAGE"]
    box.run("systemctl", "stop", "mine")
    box.run("rm", "/etc/systemd/system/mine.service")
    box.run("mv", "/root/codexd-worker@.service", worker)
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "start", "codexd")


@box_tests
def test_what_may_not_be_looked_at_is_said(box: Box) -> None:
    """By user codexd, who may not read the key."""
    (one,) = (one for one in examined(box, user="codexd")["login"])
    assert one["what"] == "cannot be looked at: /etc/codexd/api.env: Permission denied"
    assert one["mend"] == "run codexd doctor as root"


@box_tests
def test_limits_where_there_is_only_cgroup_v2() -> None:
    """Where v1 has the controllers, as here, no other boot of this kind would change it."""
    require("unified")
    with Box("unified") as box:
        box.run(f"{BIN}/codexd", "install")
        (one,) = examined(box)["limits"]
        assert (one["status"], one["what"].startswith("cgroup v2 without cpu, ")) == ("warn", True)
        assert one["mend"].startswith("boot without cgroup_disable=")
