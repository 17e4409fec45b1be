"""The Debian package: built, checked, and used on a Debian that has booted.

Its whole life is played: installed by apt, used, upgraded in the middle of work, removed,
installed again, purged.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from codexd import __version__
from tests.box import Box
from tests.box.host import require
from tests.daemon import until
from tests.installed import ALICE, CODEX, KEY, MALLORY, SPOOL, STATE, Installed

pytestmark = [pytest.mark.xdist_group("box"), pytest.mark.timeout(300)]

TOP = Path(__file__).resolve().parent.parent
NEWER = f"{__version__}+newer1"
APT = ("apt-get", "--yes", "-o", "Dpkg::Use-Pty=0")
QUIET = {"DEBIAN_FRONTEND": "noninteractive"}


def run(*command: str | Path, cwd: Path = TOP) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=200, env=env)


def packages() -> list[list[str]]:
    """Those installed here: name, priority, what it provides, what it depends on."""
    form = r"${Package}\t${Priority}\t${Provides}\t${Pre-Depends}, ${Depends}\n"
    listed = run("dpkg-query", "--show", "--showformat", form).stdout
    return [line.split("\t") for line in listed.splitlines()]


def asked_for(deb: Path) -> set[str]:
    """The packages that every Debian has, and those that this one needs; and what these need."""
    needs, real = {}, {}
    for name, _, provided, depends in packages():
        needs[name] = depends
        for virtual in re.findall(r"[a-z0-9][a-z0-9+.-]+(?=[ ,]|$)", f"{provided}, {name}"):
            real.setdefault(virtual, name)
    found = {name for name, priority, *_ in packages() if priority in ("required", "important")}
    new, needs[""] = [*found, ""], run("dpkg-deb", "--field", deb, "Depends").stdout
    while new:
        for choice in needs[new.pop()].split(","):
            names = [real.get(re.split("[ :(]", word.strip())[0]) for word in choice.split("|")]
            if (name := next(filter(None, names), None)) and name not in found:
                found.add(name)
                new.append(name)
    return found


def files(tree: Path) -> set[str]:
    return {str(path.relative_to(tree)) for path in tree.rglob("*")}


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make deb` makes of a copy of this tree."""
    tree = tmp_path_factory.mktemp("deb") / "tree"
    shipped = re.search(r"^SHIPPED := (.*)$", (TOP / "Makefile").read_text(), re.M)
    assert shipped
    for name in [*shipped[1].split(), "Makefile"]:
        copy = shutil.copytree if (TOP / name).is_dir() else shutil.copy
        tree.mkdir(exist_ok=True)
        copy(TOP / name, tree / name)
    before = files(tree)
    done = run("make", "deb", cwd=tree)
    if "sudo apt-get install" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"dist/codexd_{__version__}_all.deb\n"
    left = files(tree) - before - {"dist", "build", done.stdout.strip()}
    assert not left, "the tree is as clean as it was"
    return tree / done.stdout.strip()


@pytest.fixture(scope="module")
def newer(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a later version, whose modules refuse to be loaded by a process of this one."""
    work = tmp_path_factory.mktemp("newer")
    assert run("dpkg-deb", "--raw-extract", deb, work / "tree").returncode == 0
    package = work / "tree/usr/lib/python3/dist-packages/codexd"
    for path in (work / "tree/DEBIAN/control", package / "__init__.py"):
        changed = path.read_text().replace(__version__, NEWER)
        assert NEWER in changed
        path.write_text(changed)
    for path in package.glob("*.py"):
        with path.open("a") as module:
            module.write(f"\nimport codexd\nassert codexd.__version__ == '{NEWER}', __file__\n")
    made = work / "codexd.deb"
    done = run("dpkg-deb", "--root-owner-group", "--build", work / "tree", made)
    assert done.returncode == 0, done.stderr
    return made


class Packaged(Installed):
    """codexd in a box, by its package."""

    program = "codexd"

    def __init__(self, box: Box, deb: Path) -> None:
        self.box = box
        self.config = ""
        self.strip(asked_for(deb))
        box.run("rm", "-f", "/usr/sbin/policy-rc.d")  # containers forbid to start what is installed
        box.run("ln", "-sf", CODEX, "/usr/local/bin/codex")
        self.install(deb)
        self.furnish()

    def strip(self, wanted: set[str]) -> None:
        """Of what a clean Debian lacks the package shall only find what it asks for.

        Of Python's modules, D-Bus and polkit, that is: other programs do these tests use.
        """
        mine = (name for name, *_ in packages() if name.startswith(("python3-", "dbus", "polkitd")))
        there = sorted(set(mine) - wanted)
        # A link to a directory, as /lib is one, is a directory: it stays.
        remove = 'dpkg-query --listfiles "$@" | while read -r f; do [ -d "$f" ] || echo "$f"; done'
        self.box.run("sh", "-c", f"{remove} | xargs -d '\\n' rm -f", "sh", *there)

    def install(self, deb: Path) -> str:
        self.box.push({"/srv/codexd.deb": deb.read_bytes()})
        return self.apt("install", "--allow-downgrades", "/srv/codexd.deb")

    def apt(self, *words: str) -> str:
        return self.box.run(*APT, *words, env=QUIET, timeout=120).stdout

    def there(self, path: str) -> bool:
        return self.box.run("test", "-e", path, check=False).returncode == 0

    def active(self, name: str) -> bool:
        return self.box.show(name, "ActiveState")["ActiveState"] == "active"


@pytest.fixture(scope="module")
def codexd(deb: Path) -> Iterator[Packaged]:
    require("hybrid")
    with Box("hybrid") as box:
        yield Packaged(box, deb)


# --- the package itself -----------------------------------------------------------------------


def test_lintian_finds_nothing(deb: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed")
    done = run("lintian", "--fail-on", "error,warning", deb)
    assert (done.returncode, done.stdout) == (0, "")


def test_everything_is_in_it(deb: Path) -> None:
    listed = run("dpkg-deb", "--contents", deb).stdout
    found = {line.split()[5].lstrip(".") for line in listed.splitlines()}
    units = {p.name for p in (TOP / "systemd").iterdir()
             if p.suffix in (".service", ".socket", ".slice", ".timer")}  # fmt: skip
    assert units == {path.rpartition("/")[2] for path in found if "/systemd/system/c" in path}
    scripts = {p.name for p in (TOP / "systemd").iterdir() if p.is_file() and os.access(p, os.X_OK)}
    assert {f"/usr/lib/codexd/{name}" for name in scripts} <= found
    assert {f"/usr/lib/systemd/user/{p.name}" for p in (TOP / "systemd/user").iterdir()} <= found
    assert {f"/usr/share/man/man{p.name[-1]}/{p.name}.gz" for p in (TOP / "man").iterdir()} <= found
    assert not [path for path in found if "/test" in path]


def test_every_path_in_the_units_is_installed(deb: Path) -> None:
    listed = run("dpkg-deb", "--contents", deb).stdout
    units = "".join(p.read_text() for p in (TOP / "systemd").glob("codexd*.service"))
    called = set(re.findall(r"/usr/(?:bin|lib)/codexd[\w/-]*", units))
    assert len(called) > 4
    assert all(f" .{path}\n" in listed for path in called)


def test_needrestart_leaves_workers_alone() -> None:
    """As needrestart reads it and asks: after an upgrade of a library it restarts units."""
    ask = "do shift; $no = $nrconf{override_rc}; $it = shift; "
    ask += 'print join " ", map { $no->{$_} } grep { $it =~ /$_/ } keys %$no'
    conf = TOP / "debian/needrestart.conf"

    def told(unit: str) -> str:
        return run("perl", "-e", ask, conf, unit).stdout

    assert told("codexd-worker@20261123t072011-k3f9qa7x2m.service") == "0"
    assert told("codexd.service") == ""


def test_make_says_what_is_missing(tmp_path: Path) -> None:
    shutil.copy(TOP / "Makefile", tmp_path)
    (tmp_path / "debian").mkdir()
    control = (TOP / "debian/control").read_text()
    text = control.replace(" python3,", " python3,\n not-there (>= 3),\n nor-this,", 1)
    (tmp_path / "debian/control").write_text(text)
    done = run("make", "deb", cwd=tmp_path)
    assert done.returncode != 0
    assert "sudo apt-get install" in done.stderr
    if shutil.which("dpkg-checkbuilddeps"):
        assert re.search(r"not-there nor-this$", done.stderr, re.M)


# --- its life ---------------------------------------------------------------------------------


def test_apt_and_systemctl_are_the_whole_installation(codexd: Packaged) -> None:
    codexd.box.run("systemctl", "start", "codexd")
    codexd.drop("---\ntitle: a greeting\n---\n[[shell echo in $PWD]]\n[[say to Alice]]", "first.md")
    assert codexd.ended("first")["state"] == "done"
    assert codexd.answer("first")[1] == "to Alice\n"
    outputs = str([turn["outputs"] for turn in codexd.asked()])
    assert f"in {STATE}/work" in outputs, "commands of the model run, in Codex's sandbox"
    assert codexd.box.run("codexd", "--version").stdout == f"codexd {__version__}\n"
    enabled = codexd.box.run("systemctl", "is-enabled", "codexd", "codexd-http.socket").stdout
    assert enabled.split() == ["enabled", "enabled"]
    assert codexd.active("codexd-http.socket")
    explained = codexd.box.run("journalctl", "-x", "-t", "codexd-master", "--no-pager").stdout
    assert "codexd has started" in explained, "the catalog is known"


def test_an_upgrade_touches_no_worker(codexd: Packaged, newer: Path) -> None:
    edited = f"workers: 10\n{codexd.box.pull('/etc/codexd/codexd.yaml').decode()}"
    codexd.configure(re.sub(r"^workers: 4$", "", edited, flags=re.M))
    codexd.box.run("systemctl", "restart", "codexd")
    names = [f"u{n}" for n in range(10)]
    for name in names:
        codexd.drop(f"[[hold {name}]]\n[[say of {name}]]", f"{name}.md")
    ids = {name: codexd.running(name) for name in names}
    workers, master = codexd.invocations(ids.values()), codexd.box.show("codexd", "InvocationID")
    assert len(set(workers.values())) == 10
    codexd.install(newer)
    assert codexd.box.run("codexd", "--version").stdout == f"codexd {NEWER}\n"
    assert codexd.invocations(ids.values()) == workers
    until(lambda: codexd.active("codexd"), "the master is back")
    assert codexd.box.show("codexd", "InvocationID") != master
    assert codexd.box.pull("/etc/codexd/codexd.yaml").startswith(b"workers: 10\n")
    for name in names:
        codexd.release(name)
    for name in names:
        assert codexd.ended(name)["state"] == "done"
        assert codexd.answer(name)[1] == f"of {name}\n"
        turns = [t for t in codexd.asked() if f"[[hold {name}]]" in t["prompt"]]
        assert len(turns) == 1, "none was run twice"


def test_a_user_s_own_daemon_with_a_schedule(codexd: Packaged) -> None:
    env = codexd.box.start_user(MALLORY)

    def mallory(*command: str) -> str:
        return codexd.box.run(*command, user=MALLORY, env=env).stdout

    mallory("systemctl", "--user", "enable", "--now", "codexd")
    there = f"/home/{MALLORY}/.local/state/codexd/schedules"
    mallory("sh", "-c", f"mkdir -p {there} && echo Hello. > {there}/daily.md")
    mallory("systemctl", "--user", "start", "codexd-schedule@daily.service")
    tasks = until(lambda: json.loads(mallory("codexd", "--json", "task", "list")), "its task")
    assert [task["key"].partition("-")[0] for task in tasks] == ["daily"]
    mallory("systemctl", "--user", "disable", "--now", "codexd", "codexd-http.socket")
    assert not [task for task in codexd.tasks() if task["key"]], "nothing of it is the system's"


def test_removed_and_installed_again_it_goes_on(codexd: Packaged, deb: Path) -> None:
    codexd.drop("[[first 1 [[hold back]]]]\n[[say went on]]", "back.md")
    codexd.running("back")
    codexd.apt("remove", "codexd")
    codexd.wait_gone()
    assert not codexd.active("codexd")
    assert not codexd.active("codexd-http.socket")
    assert codexd.there("/etc/codexd/codexd.yaml")
    assert codexd.there(f"{STATE}/tasks.md")
    assert not codexd.there("/run/codexd")
    codexd.drop("[[say dropped meanwhile]]", "meanwhile.md")
    codexd.install(deb)
    codexd.box.run("systemctl", "start", "model")
    for name, text in (("back", "went on\n"), ("meanwhile", "dropped meanwhile\n")):
        task = codexd.ended(name)
        assert (task["state"], codexd.answer(name)[1]) == ("done", text), task


def test_purged_it_leaves_what_is_the_users(codexd: Packaged, deb: Path) -> None:
    if not codexd.there("/usr/bin/codexd"):
        codexd.install(deb)
    codexd.drop("[[say kept]]", "kept.md")
    codexd.ended("kept")
    names = "auth.json .credentials.json .env .env.local config.toml my.config.toml config.toml.bak"
    secrets = (f"{STATE}/codex/{name}" for name in (*names.split(), "shell_snapshots/1.sh"))
    codexd.box.push(dict.fromkeys(secrets, f"key={KEY}\n"), mode=0o600, owner="codexd")
    also = "workdirs: [work, /srv/r]\nmemory: {paths: [/tmp/notes]}\nretention: {answers: 7d}\n"
    codexd.configure(f"codex: {{home: /srv/home}}\n{also}")
    codexd.box.run("codexd", "install")
    units = "/etc/systemd/system"
    mine = f"{units}/codexd.service.d/50-codexd.conf"
    own = codexd.box.pull(mine) + b"CPUWeight=7\n"
    codexd.box.push({mine: own})
    codexd.box.run("systemctl", "enable", "codexd-schedule@nightly.timer")
    assert codexd.there("/etc/tmpfiles.d/codexd.conf")
    said = codexd.apt("purge", "codexd")
    left = codexd.box.run("find", "/etc", "-name", "*codexd*", "-path", "/etc/*/*").stdout.split()
    assert codexd.box.pull(mine) == own, "what somebody edited stays"
    assert sorted(left) == [f"{units}/codexd.service.d", mine]
    codexd.box.run("rm", "-r", f"{units}/codexd.service.d")
    assert f"rm -rf {SPOOL} {STATE}" in said
    assert codexd.answer("kept")[1] == "kept\n"
    assert not codexd.there("/etc/codexd")
    found = codexd.box.run("grep", "-rls", "-e", KEY, "/etc", STATE, SPOOL, check=False).stdout
    assert not found, "no key and no login is left"
    assert codexd.box.run("find", f"{STATE}/codex/sessions", "-name", "*.jsonl").stdout, (
        "threads are"
    )
    assert codexd.box.run("id", "-nG", ALICE).stdout.split()[-1] == "codexd", "users and group stay"
    codexd.box.run("systemctl", "stop", "model")
    codexd.box.run("rm", "-rf", SPOOL, STATE)
    codexd.install(deb)
    codexd.box.run("systemctl", "start", "codexd")
    codexd.box.run("systemctl", "stop", "codexd")
    codexd.box.run("mount", "-t", "tmpfs", "none", STATE)
    assert "what is mounted there is left, empty" in codexd.apt("purge", "codexd")
    assert codexd.box.run("ls", "-A", STATE).stdout == ""
    codexd.box.run("umount", STATE)
    codexd.install(deb)
    codexd.apt("purge", "codexd")
    for left in (SPOOL, STATE, "/etc/codexd", "/run/codexd", "/usr/lib/codexd"):
        there = codexd.box.run("find", left, STATE, check=False).stdout
        assert not codexd.there(left), there
    failed = codexd.box.run("systemctl", "list-units", "--failed", "--no-legend", "codexd*")
    assert failed.stdout == ""
