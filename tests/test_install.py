"""codexd install and uninstall: what is laid down, and what is left alone."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

import pytest

from codexd import config, dropin, install, layout
from codexd.config import Config, Directories
from codexd.layout import Stand
from codexd.program import Trouble
from tests.box import BIN, Box
from tests.box.host import require
from tests.installed import CODEX, KEY, UNITS, Installed

ROOT = Path(__file__).resolve().parent.parent
box_tests = pytest.mark.xdist_group("box")
NAMES = ("codexd", "codexd-master", "codexd-worker", "codexd-http")


def programs(place: Path, python: str = sys.executable) -> Path:
    """A directory of programs, as pip makes it; the path of `codexd` in it."""
    modules = {"codexd": "cli"}
    for name in NAMES:
        module = modules.get(name) or name.removeprefix("codexd-")
        path = place / name
        path.write_text(f"#!{python}\nfrom codexd.{module} import main\nmain()\n")
        path.chmod(0o755)
    return place / "codexd"


@pytest.fixture
def command(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    return programs(tmp_path / "bin")


def run(command: Path, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(command), *argv], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


def laid(command: Path, *argv: str) -> dict[str, list[str]]:
    """What install or uninstall told: paths by what was done."""
    done = run(command, *argv)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        what, path = line.split(maxsplit=1)
        found.setdefault(what, []).append(path)
    return found


# --- below a prefix -----------------------------------------------------------------------


def test_everything_is_laid_down_and_then_found(command: Path, tmp_path: Path) -> None:
    into = ("--prefix", str(tmp_path / "x"))
    first = laid(command, "install", *into)
    assert list(first) == ["wrote"]
    names = {Path(path).name for path in first["wrote"]}
    sources = {p.name for p in UNITS.iterdir() if p.is_file()}
    renamed = {"codexd.sysusers", "codexd.tmpfiles", "codexd.rules"}
    assert names == sources - renamed | {"codexd.conf", "50-codexd.rules"}
    Path(first["wrote"][0]).chmod(0o600)  # as a umask may once have had it
    assert laid(command, "install", *into) == {"found": first["wrote"]}
    for path in map(Path, first["wrote"]):
        script = path.parent.name == "codexd"
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if script else 0o644)


def test_units_name_this_installation(command: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "x"
    laid(command, "install", "--prefix", str(prefix))
    units = prefix / "usr/local/lib/systemd/system"
    worker = (units / "codexd-worker@.service").read_text()
    assert f"ExecStart={command.parent}/codexd-worker %i\n" in worker
    assert " /usr/local/lib/codexd/codexd-exit " in worker
    for path in units.iterdir():
        assert "/usr/bin/codexd" not in path.read_text()
        assert "/usr/lib/codexd" not in path.read_text()
    script = (prefix / "usr/local/lib/codexd/codexd-schedule").read_text()
    assert script.startswith(f"#!{sys.executable} -")


def test_the_units_of_a_user(command: Path, tmp_path: Path) -> None:
    home, prefix = tmp_path / "home", tmp_path / "x"
    done = run(
        command, "install", "--user", "--prefix", str(prefix),
        HOME=str(home), XDG_STATE_HOME=str(home / "state"), XDG_DATA_HOME="", XDG_CONFIG_HOME="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    below = prefix / home.relative_to("/")
    units = {p.name for p in (below / ".local/share/systemd/user").iterdir()}
    assert units == {p.name for p in (UNITS / "user").iterdir()}
    text = (below / ".local/share/systemd/user/codexd-worker@.service").read_text()
    assert f"--tasks {home}/state/codexd/tasks %i" in text
    assert f"\nEnvironment=XDG_STATE_HOME={home}/state\n" in text
    assert f"{home}/.local/lib/codexd/codexd-exit" in text
    drop_in = below / ".config/systemd/user/codexd-worker@.service.d/50-codexd.conf"
    assert f"InaccessiblePaths=-{home}/.codex\n" in drop_in.read_text()


def test_what_was_edited_is_kept_and_what_is_old_is_renewed(command: Path, tmp_path: Path) -> None:
    into = ("--prefix", str(tmp_path))
    laid(command, "install", *into)
    units = tmp_path / "usr/local/lib/systemd/system"
    edited, old = units / "codexd.service", units / "codexd-http.service"
    edited.write_text(edited.read_text().replace("WatchdogSec=1min", "WatchdogSec=9min"))
    old.write_text(layout.sealed("# an older version's\n[Service]\nExecStart=/bin/true\n"))
    gone = units / "codexd-former.service"
    gone.write_text(layout.sealed("[Service]\n"))
    admins = tmp_path / "etc/systemd/system/codexd.service.d/own.conf"
    admins.parent.mkdir(parents=True)
    admins.write_text("[Service]\nCPUQuota=50%\n")
    found = laid(command, "install", *into)
    assert found["wrote"] == [str(old)]
    assert found["removed"] == [str(gone)]
    (kept,) = found["kept"]
    assert kept == f"{edited}: it is not as codexd wrote it; to get codexd's: move it away"
    assert "WatchdogSec=9min" in edited.read_text()
    found = laid(command, "uninstall", *into)
    assert [p.split(":")[0] for p in found["kept"]] == [str(edited)]
    left = {p for p in tmp_path.rglob("*") if p.is_file() and tmp_path / "bin" not in p.parents}
    assert left == {edited, admins}


def test_somebody_elses_file_is_never_written_over(command: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "usr/local/lib/systemd/system/codexd.service"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("[Service]\nExecStart=/bin/theirs\n")
    assert len(laid(command, "install", "--prefix", str(tmp_path))["kept"]) == 1
    assert theirs.read_text() == "[Service]\nExecStart=/bin/theirs\n"


def test_the_configuration_below_the_prefix_counts(command: Path, tmp_path: Path) -> None:
    (tmp_path / "etc/codexd").mkdir(parents=True)
    file = tmp_path / "etc/codexd/codexd.yaml"
    file.write_text("workdirs: [work, /srv/repo]\n")
    laid(command, "install", "--prefix", str(tmp_path))
    drop_in = tmp_path / "etc/systemd/system/codexd-worker@.service.d/50-codexd.conf"
    assert "\nBindPaths=-/srv/repo\n" in drop_in.read_text()
    file.write_text("workers: 2\n")
    assert laid(command, "install", "--prefix", str(tmp_path))["removed"] == [str(drop_in)]
    assert not drop_in.parent.exists()


def test_what_is_refused(command: Path, tmp_path: Path) -> None:
    done = run(command, "install", "--root", str(tmp_path))
    assert (done.returncode, "--root and --config are not" in done.stderr) == (2, True)
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    # By a Python that has no such programs beside it, either.
    shutil.copy(programs(lonely, sys._base_executable), lonely / "alone")  # type: ignore[attr-defined]
    for name in NAMES:
        (lonely / name).unlink()
    packages = f"{ROOT}:{sysconfig.get_path('purelib')}"
    done = run(lonely / "alone", "install", "--prefix", str(tmp_path), PYTHONPATH=packages)
    assert (done.returncode, "install codexd with pip" in done.stderr) == (1, True)
    spaced = tmp_path / "a b"
    spaced.mkdir()
    done = run(programs(spaced), "install", "--prefix", str(tmp_path))
    assert (done.returncode, "a unit cannot name such a path" in done.stderr) == (1, True)
    unfit = tmp_path / "unfit"
    (unfit / "etc/codexd").mkdir(parents=True)
    (unfit / "etc/codexd/codexd.yaml").write_text("workdirs: [work, '/srv/a:b']\n")
    done = run(command, "install", "--prefix", str(unfit))
    assert (done.returncode, "/srv/a:b" in done.stderr) == (78, True), done.stderr
    for name in ("a b", 'a"b', "a$b", "50%"):
        env = {"HOME": str(tmp_path), "XDG_STATE_HOME": f"{tmp_path}/{name}"}
        done = run(command, "install", "--user", "--prefix", str(tmp_path / "x"), **env)
        why = f"codexd: {tmp_path}/{name}/codexd: a unit cannot name such a path"
        assert (done.returncode, done.stderr.startswith(why)) == (1, True), done.stderr
    assert not (tmp_path / "usr").exists()
    assert not (tmp_path / "x").exists()


def test_the_package_knows_one_place_of_a_users_state(
    command: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(command)])
    (tmp_path / "codexd.service").touch()
    target = replace(layout.Target.user(tmp_path, {}), packaged=tmp_path)
    settings = configured(tmp_path, "", Directories.below(tmp_path))
    elsewhere = install.Scene(target, settings, user=True, prefix=None)
    with pytest.raises(Trouble, match="unset XDG_STATE_HOME"):
        install.plan(elsewhere)


def test_what_a_tool_says_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = ("sh", "-c", "echo no room >&2; exit 3")
    assert not install.run("no-such-tool")
    assert not install.run(*fails, need=False)
    with monkeypatch.context() as hurried:
        hurried.setattr(install, "_WAIT", 0.1)  # a number, not what it is about
        assert not install.run("sleep", "60", need=False)
        with pytest.raises(Trouble, match=r"status -1: not done after 0\.1 s"):
            install.run("sleep", "60")
    assert [line.split(maxsplit=1)[0] for line in capsys.readouterr().out.splitlines()] == [
        "skipped", "failed", "failed"
    ]  # fmt: skip
    with pytest.raises(Trouble, match="exit 3: status 3: no room"):
        install.run(*fails)


def test_where_systemd_does_not_run_nothing_is_asked_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "BOOTED", tmp_path / "run/systemd/system")
    target = layout.Target.user(tmp_path, {})
    one = install.Scene(target, configured(tmp_path, ""), user=True, prefix=None)
    install._run_tools(one)
    assert "daemon-reload: systemd does not run here" in capsys.readouterr().out
    assert not list(install._restarts(one, [target.units / "codexd.service"]))


def test_the_files_of_a_wheel_are_found(tmp_path: Path) -> None:
    """Without a checkout: the package in a venv, its data where setup.cfg puts them."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    shutil.copytree(ROOT / "codexd", site / "codexd")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for place, pattern in setup["options.data_files"].items():
        for path in ROOT.glob(pattern):
            (home / place).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, home / place)
    command = programs(home / "bin", str(home / "bin/python"))
    for options in ([], ["--user"]):
        into = ["--prefix", str(tmp_path / "x"), *options]
        done = run(command, "install", *into, PYTHONPATH="")
        assert done.returncode == 0, done.stderr
        laid_down = {p.name for p in (tmp_path / "x").rglob("*.service")}
    assert laid_down >= {p.name for p in UNITS.rglob("*.service")}
    units = home / "share/codexd/systemd"
    units.rename(home / "elsewhere")
    done = run(command, "install", "--prefix", str(tmp_path / "y"), PYTHONPATH="")
    if not any(Path(p, "share/codexd/systemd").exists() for p in ("/usr", "/usr/local")):
        assert (done.returncode, "; reinstall it" in done.stderr) == (1, True)


# --- what codexd.yaml asks for ------------------------------------------------------------


def configured(tmp_path: Path, text: str, dirs: Directories | None = None) -> Config:
    file = tmp_path / "codexd.yaml"
    file.write_text(text)
    found = config.Directories.system() if dirs is None else dirs
    return config.load(replace(found, config_file=file), explicit=True)


def test_the_defaults_need_no_drop_in(tmp_path: Path) -> None:
    assert (
        dropin.texts(configured(tmp_path, "workers: 1\n"), [Path("/usr")], "/usr/bin/codex") == {}
    )


def test_a_worker_gets_its_workdirs_and_notes(tmp_path: Path) -> None:
    text = "workdirs: [work, /srv/a, /srv/a/b]\nmemory: {paths: [/srv/notes, memory, /tmp/n]}\n"
    found = dropin.texts(configured(tmp_path, text), [], None)
    # What nothing hides can be read without a bind; a relative path lies in the workdir.
    binds = "[Service]\nBindPaths=-/srv/a\nBindReadOnlyPaths=-/tmp/n\n"
    assert found == {"codexd-worker@.service": binds}


def test_what_lies_in_a_home_is_shown_and_nothing_else_of_it(tmp_path: Path) -> None:
    text = "workdirs: [work, /home/x/src, /home/x/a b]\nmemory: {paths: [/home/x/src/notes]}\n"
    found = dropin.texts(configured(tmp_path, text), [Path("/home/x/venv")], None)
    assert found["codexd-worker@.service"] == (
        '[Service]\nProtectHome=tmpfs\nBindPaths="-/home/x/a b"\nBindPaths=-/home/x/src\n'
        "BindReadOnlyPaths=-/home/x/venv\n"
    )
    served = "[Service]\nProtectHome=tmpfs\nBindReadOnlyPaths=-/home/x/venv\n"
    assert found["codexd.service"] == found["codexd-http.service"] == served


def test_a_codex_and_a_codex_home_elsewhere(tmp_path: Path) -> None:
    package = tmp_path / "codex/vendor/bin"
    package.mkdir(parents=True)
    (package / "codex").touch()
    (tmp_path / "link").symlink_to(package / "codex")
    settings = configured(tmp_path, "codex: {home: /srv/codex}\n")
    found = dropin.texts(settings, [], str(tmp_path / "link"))
    assert str(tmp_path).startswith("/tmp/"), "else it is not hidden, and there is nothing to test"
    for unit in ("codexd.service", "codexd-worker@.service"):
        assert found[unit].splitlines()[1:] == [
            "BindPaths=-/srv/codex",
            f"BindReadOnlyPaths=-{package.parent}",
            f"BindReadOnlyPaths=-{package}/codex:{tmp_path}/link",
        ]
    assert "codexd-http.service" not in found


def test_a_codex_that_is_a_link_to_one_outside_of_a_package(tmp_path: Path) -> None:
    """What the link leads to is shown, and nothing of what lies around it."""
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "codex-0.163").touch()
    (tmp_path / "link").symlink_to(tmp_path / "downloads" / "codex-0.163")
    found = dropin.texts(configured(tmp_path, ""), [], str(tmp_path / "link"))
    shown = f"{tmp_path}/downloads/codex-0.163"
    assert found["codexd.service"].splitlines()[1:] == [
        f"BindReadOnlyPaths=-{shown}",
        f"BindReadOnlyPaths=-{shown}:{tmp_path}/link",
    ]


def test_a_login_of_ones_own_in_a_home_with_a_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/a b")
    found = dropin.texts(configured(tmp_path, "", Directories.user({"HOME": "/home/x"})), [], None)
    assert found["codexd-worker@.service"] == ('[Service]\nInaccessiblePaths="-/home/a b/.codex"\n')


def test_a_login_of_ones_own_that_is_codexds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd would hide it even where it binds it: its unit's list is given again without it."""
    monkeypatch.setenv("HOME", "/home/x")
    user = Directories.user({"HOME": "/home/x"})
    worker = (UNITS / "user" / dropin.WORKER).read_text()
    hidden = [w for line in re.findall("(?m)^InaccessiblePaths=(.*)", worker) for w in line.split()]
    text = configured(tmp_path, "codex: {home: ~/.codex}\n", user)
    found = dropin.texts(text, [], None, worker)[dropin.WORKER].splitlines()
    assert found[:4] == [
        "[Service]", "BindPaths=-/home/x/.codex", "[Service]", "InaccessiblePaths=",
    ]  # fmt: skip
    again = [line.removeprefix("InaccessiblePaths=") for line in found[4:]]
    assert set(hidden) - set(again) == {"-%h/.codex"}


def test_notes_that_no_worker_sees(tmp_path: Path) -> None:
    text = "memory: {paths: [/etc/codexd/notes, /srv/notes, memory, ~/.config/codexd/n]}\n"
    assert dropin.unseen(configured(tmp_path, text)) == [Path("/etc/codexd/notes")]


def test_http_over_tcp_is_the_sockets(tmp_path: Path) -> None:
    text = "http: {listen: '127.0.0.1:8080', token_file: /etc/codexd/token}\n"
    found = dropin.texts(configured(tmp_path, text), [], None)
    assert found == {"codexd-http.socket": "[Socket]\nListenStream=\nListenStream=127.0.0.1:8080\n"}


@pytest.mark.parametrize("target", [layout.Target.system(), layout.Target.user(Path("/h"), {})])
def test_what_lies_beside_the_sources_is_not_laid_down(
    tmp_path: Path, target: layout.Target
) -> None:
    beside = dict.fromkeys(("codexd.service~", "codexd.rules.orig"), "")
    place, settings = Path("/usr/bin"), configured(tmp_path, "")
    assert layout.whole(target, settings, {}, beside, place, target.scripts, "python3") == {}


@pytest.mark.parametrize("path", ['/srv/a"b', "/srv/a:b", "/srv/a\\b", "/srv/$HOME"])
def test_a_path_that_a_unit_cannot_name(tmp_path: Path, path: str) -> None:
    settings = configured(tmp_path, f"workdirs: [work, '{path}']\n")
    with pytest.raises(dropin.Unfit, match="cannot name"):
        dropin.texts(settings, [], None)


def test_specifiers_in_a_path_are_none(tmp_path: Path) -> None:
    found = dropin.texts(configured(tmp_path, "workdirs: [work, /srv/50%i]\n"), [], None)
    assert "BindPaths=-/srv/50%%i\n" in found["codexd-worker@.service"]


def test_ages_of_answers(tmp_path: Path) -> None:
    source = (UNITS / "codexd.tmpfiles").read_text()
    target = layout.Target.system()
    same = configured(tmp_path, "retention: {answers: 90d, rejected: 90d}\n")
    assert layout.ageing(target, same, source) == {}
    other = configured(tmp_path, "retention: {answers: 12h, rejected: never}\n")
    (file,) = layout.ageing(target, other, source).values()
    lines = {line.split()[1]: line.split()[-1] for line in file.text.splitlines() if line[0] == "d"}
    assert lines["/var/spool/codexd/answers"] == "43200s"
    assert lines["/var/spool/codexd/rejected"] == "-"


# --- the seal -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[Unit]\n", "#!/bin/sh\necho\n", "// x\npolkit\n", ""])
def test_a_seal_holds_until_something_changes(text: str) -> None:
    whole = layout.sealed(text)
    assert layout.is_intact(whole)
    assert whole.startswith("#!") == text.startswith("#!")
    assert not layout.is_intact(whole + "x")
    assert not layout.is_intact(text)
    assert layout.stand(whole, layout.sealed(text + "# newer\n")) is Stand.OLD


@box_tests
def test_a_task_works_where_the_drop_in_lets_it() -> None:
    """In a home, which the unit hides, with notes in another; beside it nothing is seen."""
    require("hybrid")
    with Box("hybrid") as box:
        codexd = Installed(box)
        box.run("mkdir", "-p", "/home/alice/repo", "/home/alice/private", "/srv/repo")
        box.run("chown", "codexd:", "/home/alice/repo", "/srv/repo")
        box.push({"/home/mallory/notes/a.md": "The zebra is striped.\n"})
        box.run("chmod", "755", "/home/alice")
        codexd.configure(
            f"codex: {{bin: {CODEX}}}\nworkdirs: [work, /home/alice/repo, /srv/repo]\n"
            "memory: {paths: [/home/mallory/notes]}\n"
        )
        wrote = box.run(f"{BIN}/codexd", "install").stdout
        assert "wrote     /etc/systemd/system/codexd-worker@.service.d/50-codexd.conf\n" in wrote
        box.run("systemctl", "start", "codexd")
        for place in ("/home/alice/repo", "/srv/repo"):
            name = place.replace("/", "-").strip("-")
            look = "touch here; ls /home/alice > seen; ls -A /home/mallory >> seen"
            asked = f"Is the zebra striped?\n[[shell {look}]][[say zebra]]\n"
            codexd.drop(f"---\nworkdir: {place}\n---\n{asked}", f"{name}.md")
            assert codexd.ended(name)["state"] == "done"
            assert box.run("ls", place).stdout == "here\nseen\n"
            assert box.pull(f"{place}/seen") == b"repo\nnotes\n"
        assert all("The zebra is striped." in str(asked["prompt"]) for asked in codexd.asked())


# --- for real -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    require("hybrid")
    with Box("hybrid") as box:
        yield box


@box_tests
def test_an_installation_from_the_first_to_the_last_day(box: Box) -> None:
    command = f"{BIN}/codexd"
    box.run("useradd", "--create-home", "alice")
    refused = box.run(command, "install", user="alice", check=False)
    assert (refused.returncode, "needs root; try: sudo codexd install" in refused.stderr) == (
        77,
        True,
    )
    box.push({"/etc/codexd/codexd.yaml": f"codex: {{bin: {CODEX}}}\nworkdirs: [work, /home/r]\n"})
    box.push({"/etc/codexd/api.env": f"CODEX_API_KEY={KEY}\n"}, mode=0o600)
    done = box.run(command, "install")
    assert "ran       systemctl daemon-reload\n" in done.stdout
    assert "usermod -aG codexd NAME" in done.stdout
    box.run("systemctl", "enable", "--now", "codexd")
    shown = box.show("codexd", "ActiveState", "FragmentPath", "StatusText")
    assert shown == {
        "ActiveState": "active",
        "FragmentPath": "/usr/local/lib/systemd/system/codexd.service",
        "StatusText": "0 running, 0 queued, 0 waiting",
    }
    shown = box.show("codexd-worker@20260101t000000-aaaaaaaaaa", "ProtectHome", "BindPaths")
    assert shown["ProtectHome"] == "tmpfs"
    assert "/home/r:/home/r" in shown["BindPaths"]
    assert "codexd has started" in box.run("journalctl", "-x", "-u", "codexd").stdout
    told = box.run(command, "--json", "status").stdout
    assert '"launcher": "systemd"' in told
    # A second time it changes nothing, and the daemon goes on.
    before = box.show("codexd", "InvocationID")
    assert "wrote" not in box.run(command, "install").stdout
    assert box.show("codexd", "InvocationID") == before
    own = "/etc/systemd/system/codexd.service.d/own.conf"
    box.push({own: "[Service]\nCPUWeight=20\n"})
    done = box.run(command, "uninstall")
    assert "Tasks, answers and configuration stay in /etc/codexd, /var/lib/codexd" in done.stdout
    assert box.show("codexd", "ActiveState", "LoadState")["ActiveState"] == "inactive"
    look = ("find", "/usr/local/lib", "/etc", "(", "-name", "*codexd*", ")", "-not", "-type", "d")
    left = set(box.run(*look).stdout.split())
    assert left == {"/etc/codexd/codexd.yaml"}
    assert box.run("ls", own, "/etc/codexd/api.env", "/var/lib/codexd/tasks.md").returncode == 0
    assert "nothing that codexd install wrote" in box.run(command, "uninstall").stdout


class Laid(Installed):
    """By `codexd install`."""

    def lay_down(self) -> None:
        self.configure(f"codex: {{bin: {CODEX}}}\n")
        self.box.run(self.program, "install")


@box_tests
def test_what_was_running_goes_on_after_an_uninstall_and_an_install() -> None:
    """In the same boot; nobody has cancelled it."""
    require("hybrid")
    with Box("hybrid") as box:
        codexd = Laid(box)
        box.run("systemctl", "enable", "--now", "codexd")
        codexd.drop("[[first 1 [[hold back]]]]\n[[say went on]]", "back.md")
        id = codexd.running("back")
        box.run(codexd.program, "uninstall")
        codexd.wait_gone()
        box.run(codexd.program, "install")
        box.run("systemctl", "enable", "--now", "codexd")
        task = codexd.ended("back")
        assert (task["id"], task["state"]) == (id, "done"), task
        assert codexd.answer("back")[1] == "went on\n"


@box_tests
def test_beside_a_package_only_what_the_configuration_asks_for(box: Box) -> None:
    box.push(
        {"/lib/systemd/system/codexd.service": "[Service]\nExecStart=/usr/bin/codexd-master\n"}
    )
    box.push({"/usr/lib/tmpfiles.d/codexd.conf": (UNITS / "codexd.tmpfiles").read_text()})
    box.push({"/usr/lib/sysusers.d/codexd.conf": (UNITS / "codexd.sysusers").read_text()})
    text = "workdirs: [work, /srv/r]\nretention: {answers: 7d}\n"
    box.push({"/etc/codexd/codexd.yaml": text})
    lines = box.run(f"{BIN}/codexd", "install").stdout.splitlines()
    wrote = [line.split()[1] for line in lines if line.startswith("wrote")]
    drop_in = "/etc/systemd/system/codexd-worker@.service.d/50-codexd.conf"
    assert wrote == [drop_in, "/etc/tmpfiles.d/codexd.conf"]
    assert "answers 0750 codexd codexd 604800s" in box.pull(wrote[1]).decode()
    assert "apt remove codexd" in box.run(f"{BIN}/codexd", "uninstall").stdout
    box.run("test", "-e", "/lib/systemd/system/codexd.service")


@box_tests
def test_a_user_without_a_systemd_that_runs(box: Box) -> None:
    box.run("rm", "-f", "/lib/systemd/system/codexd.service")
    box.run("useradd", "--create-home", "carol")
    done = box.run(f"{BIN}/codexd", "install", "--user", user="carol")
    assert "failed    systemctl --user daemon-reload: " in done.stdout
    unit = "/home/carol/.local/share/systemd/user/codexd.service"
    assert box.run("stat", "--format=%U %a", unit).stdout == "carol 644\n"
    refused = box.run(f"{BIN}/codexd", "install", "--user", check=False)
    assert (refused.returncode, "for other users than root" in refused.stderr) == (2, True)


@box_tests
def test_programs_that_user_codexd_could_not_run(box: Box) -> None:
    box.run("cp", "-r", BIN.removesuffix("/bin"), "/root/venv")
    box.run("sh", "-c", f"sed -i 's|#!{BIN}|#!/root/venv/bin|' /root/venv/bin/codexd*")
    done = box.run("/root/venv/bin/codexd", "install", check=False)
    assert done.returncode == 1
    assert "/root is closed to it; install codexd elsewhere" in done.stderr
    box.run("test", "!", "-e", "/usr/local/lib/systemd/system/codexd.service")
