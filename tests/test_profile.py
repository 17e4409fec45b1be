"""The permission profile: what it hides from the commands of the model, on the real CLI."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import codex_cli_bin
import pytest

from codexd import canary, codex, command, config, profile
from codexd.config import Config, Directories
from codexd.model import Sandbox
from codexd.scripted import KEY
from codexd.spool import new_id
from tests.daemon import Daemon, until
from tests.scripted_cases import CaseModel

REAL = str(codex_cli_bin.bundled_codex_path())
FAKE = str(Path(__file__).parent / "bin" / "codex")

# Looks into every file it is told of and everywhere it can, and tries to write.  It says
# little: Codex leaves out the middle of what is long, and what was found with it.
LOOK = r"""
cat note.txt
echo mine > made-here && cat made-here
{
    env
    cat /proc/*/environ /proc/*/cmdline | tr '\0' '\n'
    cat files.txt | while read -r file; do cat "$file"; done
    grep -rahs 'CANAR[Y]' ROOT
} 2> /dev/null | grep -aoE '[A-Z0-9]+-CANAR[Y]' | sort -u
printf '%s\n' "$1"/{task.json,evil,1/result.json,1/evil} | cat writes.txt - | while read -r file; do
    (echo evil >> "$file") 2> /dev/null && echo "wrote to $file"
done
(exec 3<> /dev/tcp/127.0.0.1/PORT) 2> /dev/null && echo connected
mktemp
echo the end
"""


@pytest.fixture
def model() -> Iterator[CaseModel]:
    with CaseModel() as model:
        yield model


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory outside of /tmp, where every command may write."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="codexd-test-") as name:
        yield Path(name)


@pytest.fixture
def daemon(place: Path, model: CaseModel) -> Iterator[Daemon]:
    root = place / "root"
    keys = {KEY: "KEY-CANARY", "CODEX_API_KEY": "KEY2-CANARY", "TMPDIR": str(place / "tmp")}
    (place / "tmp").mkdir()
    settings = f"http: {{listen: '127.0.0.1:0', token_file: {root}/token}}\n"
    settings += f"memory: {{paths: [MEMORY.md, {place}/notes/MEMORY.md, {place}/notes/memory]}}\n"
    (place / "notes/memory").mkdir(parents=True)
    (place / "notes/MEMORY.md").write_text("# Notes\n")
    one = Daemon(root, keys, f"{settings}codex: {{sandbox: danger-full-access}}\n")
    (root / "token").write_text("0123456789-TOKEN-CANARY\n")
    (root / "token").chmod(0o600)
    home = one.dirs.codex_home
    model.write_config(home)
    (home / "auth.json").write_text('{"OPENAI_API_KEY": "AUTH-CANARY"}')
    (home / "history.jsonl").write_text('{"text": "HISTORY-CANARY"}\n')
    # Nothing but the profile keeps keys out of the environment of commands, or the sandbox on.
    text = (home / "config.toml").read_text()
    text = text.replace('inherit = "core"', 'inherit = "all"\nignore_default_excludes = true')
    (home / "config.toml").write_text(
        f'sandbox_mode = "danger-full-access"\n{text}# CONFIG-CANARY\n'
    )
    with one:
        yield one


def prepared(daemon: Daemon, model: CaseModel) -> Path:
    """A hostile task's workdir, beside a task that has ended and one that runs."""
    daemon.drop("ended.md", "PAST-CANARY\n[[say ANSWER-CANARY]]\n")
    daemon.answer("ended")
    daemon.drop("runs.md", "PRESENT-CANARY\n[[hold A]]\n")
    model.wait_held("A")
    workdir = daemon.dirs.work / "hostile"
    workdir.mkdir()
    files = [path for path in daemon.root.rglob("*") if path.is_file()]
    (workdir / "files.txt").write_text("".join(f"{path}\n" for path in files))
    dirs, home = daemon.dirs, daemon.dirs.codex_home
    targets = [
        dirs.inbox / "evil.md", dirs.answers / "evil.md", dirs.ledger, dirs.lock,
        home / "config.toml", home / "codexd.config.toml", home / ".codexd" / "threads.lock",
        home / ".codexd" / "hides.json", home / "evil", daemon.root / "evil",
        daemon.root.parent / "evil", dirs.run / "evil",
        daemon.root.parent / "notes/MEMORY.md", daemon.root.parent / "notes/memory/evil.md",
        *(path for path in dirs.tasks.rglob("*") if path.is_file()),
    ]  # fmt: skip
    (workdir / "writes.txt").write_text("".join(f"{path}\n" for path in targets))
    port = re.search(r"http=http://127\.0\.0\.1:(\d+)", daemon.ready)
    assert port, daemon.ready
    look = LOOK.replace("ROOT", str(daemon.root)).replace("PORT", port[1])
    (workdir / "look.sh").write_text(look)
    (workdir / "note.txt").write_text("the note\n")
    return workdir


def looked(daemon: Daemon, model: CaseModel, name: str, more: str) -> tuple[str, bytes]:
    """What a hostile turn's command told the model, and the whole of its last request."""
    workdir, id = daemon.dirs.work / "hostile", new_id()
    head = f"workdir: {workdir}\nsession: hostile\n{more}"
    look = f"[[shell bash look.sh {daemon.dirs.tasks / id} 2>&1]] [[say {name} is over]]"
    daemon.drop(f"{id}.md", f"---\n{head}---\n{look}\n")
    answer = daemon.dirs.answers / f"{id}.md"
    until(answer.exists, "its answer")
    assert answer.read_text().endswith(f"---\n{name} is over\n")
    turn = model.asked(f"[[say {name} is over]]")[-1]
    assert turn.tool_outputs, "the shell did not run"
    return turn.tool_outputs[0], turn.body


def test_what_codex_begins_to_keep_in_the_midst_of_a_turn_is_hidden_too(
    daemon: Daemon, model: CaseModel
) -> None:
    """Another, without our profile, makes a snapshot of its shell, with keys and all."""
    daemon.drop("ended.md", "[[say fine]]\n")  # which made what Codex always has
    daemon.answer("ended")
    snapshots = daemon.dirs.codex_home / "shell_snapshots"
    shutil.rmtree(snapshots, ignore_errors=True)
    head = f"---\nworkdir: {daemon.dirs.work}\nsandbox: workspace-write\n---\n"
    look = f"cat {snapshots}/1.sh; echo the end"
    daemon.drop("turn.md", f"{head}[[hold B]] [[shell {look}]] [[say over]]\n")
    model.wait_held("B")
    snapshots.mkdir(exist_ok=True)
    (snapshots / "1.sh").write_text("export KEY=LATE-CANARY\n")
    model.release("B")
    daemon.answer("turn")
    told = model.asked("[[say over]]")[-1]
    assert "the end" in told.tool_outputs[0]
    assert not canaries(told.body), told.tool_outputs[0]


def canaries(body: bytes) -> set[str]:
    return set(re.findall(r"([A-Z0-9]+)-CANARY", body.decode()))


def test_a_hostile_turn_finds_and_writes_nothing(daemon: Daemon, model: CaseModel) -> None:
    workdir = prepared(daemon, model)
    for name in ("first", "resumed"):
        told, body = looked(daemon, model, name, "sandbox: workspace-write\n")
        assert "the note\nmine\n" in told
        assert "the end" in told
        assert re.search(r"/tmp\.\w+\n", told)  # it has a temporary directory
        assert not canaries(body), told
        assert "wrote to" not in told
        assert "connected" not in told
    assert (workdir / "made-here").read_text() == "mine\n"
    threads = [model.asked(f"[[say {name} is over]]")[0].thread_id for name in ("first", "resumed")]
    assert threads[0] == threads[1]
    told, body = looked(daemon, model, "reader", "sandbox: read-only\n")
    assert "the note\n" in told
    assert "the end" in told
    assert "mktemp: failed" in told
    assert not canaries(body)
    assert "wrote to" not in told
    assert not list(daemon.root.parent.rglob("evil*"))
    assert canary.verdict(str(daemon.dirs.codex_home)) is None
    assert "codex.profile" not in daemon.log.read_text()
    model.release("A")
    assert daemon.answer("runs")[0]["state"] == "done"


def test_without_the_profile_it_finds_everything(daemon: Daemon, model: CaseModel) -> None:
    """That the test above looks well; a profile of the task's own hides what it hides."""
    prepared(daemon, model)
    (daemon.dirs.codex_home / "mine.config.toml").write_text("")
    told, body = looked(daemon, model, "open", "sandbox: workspace-write\nprofile: mine\n")
    every = {"KEY", "KEY2", "AUTH", "HISTORY", "TOKEN", "CONFIG", "PAST", "PRESENT", "ANSWER"}
    assert canaries(body) == every
    assert "wrote to" not in told  # Codex's own sandbox
    model.release("A")
    daemon.answer("runs")


# --- that it is no hindrance ----------------------------------------------------------


def test_a_task_works_as_in_the_plain_sandbox(place: Path, model: CaseModel) -> None:
    one = Daemon(place / "root", model.environment())
    model.write_config(one.dirs.codex_home)
    work = one.dirs.work
    for name in ("it/.git", "more"):
        (work / name).mkdir(parents=True)
    (work / "it" / "schema.json").write_text('{"type": "object"}')
    (work / "it" / "a.png").write_bytes(b"no picture")
    script = "ls; echo x > ../more/added; echo x > ../beside; echo x > .git/hook"
    head = (
        f"workdir: {work}/it\nadd_dirs: [{work}/more]\nimages: [a.png]\noutput_schema: schema.json"
    )
    turns = f"[[shell {script}]] [[patch new.txt text]] [[patch ../../outside.txt text]] [[say ok]]"
    with one:
        one.drop("a.md", f"---\n{head}\n---\n{turns}\n")
        assert one.answer("a")[0]["state"] == "done"
    shell, inside, outside = model.turns[-1].tool_outputs
    assert "schema.json" in shell
    assert ".git/hook: Read-only file system" in shell
    assert "beside: Read-only file system" in shell
    assert "Success" in inside
    assert "rejected" in outside
    assert (work / "more" / "added").exists()
    assert (work / "it" / "new.txt").read_text() == "text\n"
    assert {path.name for path in work.iterdir()} == {"it", "more"}


def test_what_config_toml_says_of_the_sandbox_still_counts(
    tmp_path: Path, model: CaseModel
) -> None:
    one = Daemon(tmp_path / "root", model.environment())
    home = one.dirs.codex_home
    model.write_config(home)
    (tmp_path / "more").mkdir()
    own = f'network_access = true\nwritable_roots = ["{tmp_path}/more"]\nexclude_slash_tmp = true\n'
    with open(home / "config.toml", "a") as file:
        file.write(f"\n[sandbox_workspace_write]\n{own}")
    writes = f"echo x > {tmp_path}/more/a; echo x > {tmp_path}/not-here"
    ask = f"{writes}; (: < /dev/tcp/127.0.0.1/{model.port}) && echo on"
    with one:
        one.drop("a.md", f"[[shell {ask}]] [[say ok]]\n")
        assert one.answer("a")[0]["state"] == "done"
    told = model.turns[-1].tool_outputs[0]
    assert (tmp_path / "more" / "a").exists()
    assert "not-here: Read-only file system" in told
    assert "\non\n" in told


# --- what is in the file --------------------------------------------------------------


def installed(root: Path, toml: str = "", yaml: str = "") -> Config:
    """A configuration with its directories made."""
    dirs = Directories.below(root)
    for path in (dirs.tasks, dirs.inbox, dirs.run, dirs.work, dirs.codex_home):
        path.mkdir(parents=True)
    (dirs.codex_home / "config.toml").write_text(toml)
    dirs.config_file.write_text(yaml)
    return config.load(dirs, explicit=True)


def table(found: Config, sandbox: str = "workspace-write", keys: list[str] | None = None) -> Any:
    written = tomllib.loads(profile.text(found, keys or []))
    return written["permissions"][f"codexd-{sandbox}"]


def test_the_profile_is_for_one_alone_and_written_when_it_changes(tmp_path: Path) -> None:
    found = installed(tmp_path / "root")
    path = found.codex.home / "codexd.config.toml"
    profile.write(found, ["A_KEY"])
    first = path.stat()
    assert first.st_mode & 0o777 == 0o600
    profile.write(found, ["A_KEY"])
    assert path.stat().st_ino == first.st_ino
    profile.write(found, ["A_KEY", "B_KEY"])
    assert '"B_KEY"' in path.read_text()
    (found.codex.home / "memories").mkdir()
    profile.write(found, ["A_KEY", "B_KEY"])
    assert f'"{found.codex.home}/memories" = "deny"' in path.read_text()


def test_what_a_task_needs_is_not_denied(tmp_path: Path) -> None:
    root = tmp_path / "root"
    notes = f"memory: {{paths: [{root}/transcripts/notes, MEMORY.md]}}\n"
    (root / "transcripts").mkdir(parents=True)
    (root / "answers").mkdir()
    (root / "api.env").touch()
    found = installed(root, yaml=f"{notes}workdir: answers/x\nworkdirs: [answers/x, work]\n")
    denied = profile.hidden(found)
    assert str(root / "tasks") in denied
    assert str(root / "api.env") in denied
    assert str(root / "codex" / "config.toml") in denied
    assert profile.exposed(found) == [str(root / "answers"), str(root / "transcripts")]
    assert not {str(root / "work"), *profile.exposed(found)} & set(denied)
    why = profile.why_not(found)
    assert why
    assert str(root / "transcripts") in why
    # A workdir above them is none of their business: what is nearer counts.
    wide = replace(found, workdir=root, workdirs=(tmp_path,))
    assert str(root / "tasks") in profile.hidden(wide)


def test_links_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("root")
    (tmp_path / "root").mkdir()
    found = installed(tmp_path / "link")
    assert str(tmp_path / "root" / "tasks") in profile.hidden(found)


@pytest.mark.parametrize(
    ("toml", "policy"),
    [
        ("", {"inherit": "core", "exclude": ["CODEX_API_KEY", "K", "OPENAI_API_KEY"]}),
        (
            'inherit = "all"\nexclude = ["MINE"]',
            {"exclude": ["CODEX_API_KEY", "K", "MINE", "OPENAI_API_KEY"]},
        ),
        (
            'inherit = "all"\nfilters = {A = "x"}',
            {"inherit": "core", "exclude": ["CODEX_API_KEY", "K", "OPENAI_API_KEY"]},
        ),
    ],
)
def test_keys_are_hidden_whatever_config_toml_passes(
    tmp_path: Path, toml: str, policy: dict[str, object]
) -> None:
    found = installed(tmp_path / "root", f"[shell_environment_policy]\n{toml}\n" if toml else "")
    assert tomllib.loads(profile.text(found, ["K"]))["shell_environment_policy"] == policy


def test_only_the_writing_sandbox_gets_what_config_toml_adds(tmp_path: Path) -> None:
    own = 'network_access = true\nwritable_roots = ["/srv/x", 5]\nexclude_tmpdir_env_var = true\n'
    found = installed(tmp_path / "root", f"[sandbox_workspace_write]\n{own}")
    writing, reading = table(found), table(found, "read-only")
    assert writing["network"] == {"enabled": True}
    assert writing["filesystem"]["/srv/x"] == "write"
    assert writing["filesystem"][":tmpdir"] == "read"
    assert "network" not in reading
    assert "/srv/x" not in reading["filesystem"]
    assert (writing["extends"], reading["extends"]) == (":workspace", ":read-only")


@pytest.mark.parametrize(
    ("name", "toml", "why"),
    [("a[1]", "", "takes * ? [ ] { } in it for a pattern"), ("a", "x = [", "Invalid|at line 1")],
)
def test_what_cannot_be_put_into_a_profile(tmp_path: Path, name: str, toml: str, why: str) -> None:
    found = installed(tmp_path / name, toml)
    with pytest.raises(ValueError, match=re.escape(why) if "*" in why else why):
        profile.write(found, [])
    assert not (found.codex.home / "codexd.config.toml").exists()


@pytest.mark.parametrize(
    ("toml", "why"), [("x = [", "Invalid|at line 1"), ("x = " + "[" * 10_000, "too deeply nested")]
)
def test_with_a_damaged_config_toml_nothing_is_known_to_be_hidden(
    tmp_path: Path, toml: str, why: str
) -> None:
    assert re.search(why, profile.why_not(installed(tmp_path / "root", toml)) or "")


def test_odd_names_are_quoted(tmp_path: Path) -> None:
    found = installed(tmp_path / 'a"\\\n\x7fü😀')
    assert str(found.dirs.tasks) in table(found)["filesystem"]


# --- whether it works -----------------------------------------------------------------


def test_a_sandbox_that_works_is_remembered_and_one_that_does_not_is_tried_again(
    tmp_path: Path,
) -> None:
    binary, broken = tmp_path / "codex", tmp_path / "broken"
    binary.write_text(f"#!/bin/sh\ntest ! -e {broken} || {{ echo bwrap: no >&2; exit 3; }}\n")
    binary.chmod(0o755)
    one = str(binary), str(tmp_path), {"PATH": os.defpath}, ["sandbox"]
    assert canary.works(*one) is None
    broken.touch()
    assert canary.works(*one) is None
    canary.forget(str(tmp_path))
    assert str(canary.works(*one)).endswith(", so nothing is run: bwrap: no")
    broken.unlink()
    assert canary.works(*one) is None


def test_a_real_codex_heeds_it_and_is_asked_once(tmp_path: Path) -> None:
    found = installed(tmp_path / "root")
    home = str(found.codex.home)
    profile.write(found, [])
    env = codex.environment(os.environ, home, [])
    assert canary.hides(REAL, home, env) is None
    # A profile that denies nothing is found out, when there is a reason to look.
    text = (found.codex.home / "codexd.config.toml").read_text()
    (found.codex.home / "codexd.config.toml").write_text(
        text.replace('codexd.config.toml" = "deny"', 'codexd.config.toml" = "read"')
    )
    assert canary.hides(REAL, home, env) is None
    (found.codex.home / "config.toml").write_text("# another\n")
    why = canary.hides(REAL, home, env)
    assert why == canary.verdict(home) == f"{REAL} does not heed permission profiles (read-only)"
    assert profile.why_not(found) == why


FAILING = """\
#!/bin/sh
[ "$1" = exec ] && echo "$*" >>{place}/turns
if [ "$1 $2" = "sandbox -p" ] && [ "$(cat {place}/failures 2>/dev/null | wc -l)" -lt {times} ]; then
    echo again >>{place}/failures
    echo "bwrap: Can't create file at {place}/state.sqlite-shm: Read-only file system" >&2
    exit 1
fi
exec {real} "$@"
"""


def failing(place: Path, times: int) -> Path:
    """The real Codex, but it says `times` times what it says when a denied file has just gone."""
    path = place / "failing"
    path.write_text(FAILING.format(place=place, times=times, real=REAL))
    path.chmod(0o755)
    return path


def test_a_try_that_fails_is_no_verdict(tmp_path: Path) -> None:
    found = installed(tmp_path / "root")
    home = str(found.codex.home)
    profile.write(found, [])
    env = codex.environment(os.environ, home, [])
    binary = failing(tmp_path, 3)
    assert canary.hides(str(binary), home, env) is None
    assert (tmp_path / "failures").read_text() == "again\n" * 3
    # What was kept when such a try still was one does not count.
    kept = Path(home, ".codexd", "hides.json")
    known = json.loads(kept.read_text())
    kept.write_text(json.dumps({"of": known["of"][1:], "why": "it does not work"}))
    assert canary.hides(str(binary), home, env) is None
    assert json.loads(kept.read_text()) == known


def test_nothing_is_run_while_it_cannot_be_told(place: Path, model: CaseModel) -> None:
    (place / "root").mkdir()
    binary = failing(place, 1000)
    one = Daemon(place / "root", model.environment(), UNHURRIED.format(binary=binary))
    model.write_config(one.dirs.codex_home)
    with one:
        one.drop("a.md", "[[say hidden after all]]")
        until(lambda: any("**closed**" in line for line in one.events()), "the gate to close")
        why = one.json("status")["gate"]["host"]["message"]
        assert "sandbox does not work with a permission profile" in why
        assert not (place / "turns").exists()
        failing(place, 0)
        one.run("release")
        assert one.answer("a")[1] == "hidden after all\n"
        assert one.tasks()[0]["attempts"] == 1
    assert 'default_permissions="codexd-workspace-write"' in (place / "turns").read_text()


UNHURRIED = "retry: {{base: 10m}}\nhttp: {{listen: off}}\ncodex: {{bin: {binary}}}\n"


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("0.163.0", "does not heed permission profiles"),
        ("0.133.0", "Codex 0.133.0 has no permission profiles; 0.134 has"),
    ],
)
def test_a_codex_without_profiles_runs_in_the_plain_sandbox(
    tmp_path: Path, version: str, why: str
) -> None:
    one = Daemon(tmp_path / "root", config=f"http: {{listen: off}}\ncodex: {{bin: {FAKE}}}\n")
    dump = tmp_path / "dump"
    told = {"dump": str(dump), "version": version}
    (one.dirs.codex_home / "fake.json").write_text(json.dumps(told))
    with one:
        for name in ("a", "b"):
            one.drop(f"{name}.md", "---\nverify: {command: 'true'}\n---\nWork.\n")
            assert one.answer(name)[0]["state"] == "done"
        until(lambda: "codex.profile" in one.log.read_text(), "the warning")
    assert "-s workspace-write" in " ".join(dump.read_text().split('", "'))
    assert "codexd-" not in dump.read_text().replace(str(tmp_path), "")
    warnings = [line for line in one.log.read_text().splitlines() if " codex.profile " in line]
    assert len(warnings) == 1
    assert " warning codex.profile why=" in warnings[0]
    assert why in warnings[0]


@pytest.mark.parametrize(
    ("named", "sandbox", "why"),
    [
        (None, Sandbox.WORKSPACE_WRITE, None),
        (None, Sandbox.READ_ONLY, None),
        (
            None,
            Sandbox.DANGER,
            "in the sandbox danger-full-access commands can read",
        ),
        ("mine", Sandbox.READ_ONLY, "the profile mine is used instead of codexd's own"),
    ],
)
def test_where_the_profile_is_not_used(
    tmp_path: Path, named: str | None, sandbox: Sandbox, why: str | None
) -> None:
    found = installed(tmp_path / "root")
    found = replace(found, codex=replace(found.codex, profile=named, sandbox=sandbox))
    told = profile.why_not(found)
    assert told is None if why is None else told and told.startswith(why)


# --- AGENTS.md ------------------------------------------------------------------------


def test_guides_are_read_where_there_are_any(tmp_path: Path, model: CaseModel) -> None:
    one = Daemon(tmp_path / "root", model.environment())
    model.write_config(one.dirs.codex_home)
    (one.dirs.codex_home / "AGENTS.md").write_text("OF-ALL")
    repository = one.dirs.work / "repository"
    for path in (repository, one.dirs.work / "none"):
        path.mkdir(parents=True)
    (repository / "AGENTS.md").write_text("OF-REPOSITORY")
    with one:
        for name, workdir in (("a", repository), ("b", one.dirs.work / "none")):
            one.drop(f"{name}.md", f"---\nworkdir: {workdir}\n---\n[[say {name}]]\n")
            assert one.answer(name)[0]["state"] == "done"
    guided, bare = (turn.body for turn in model.turns)
    assert b"OF-ALL" in guided
    assert b"OF-ALL" in bare
    assert b"OF-REPOSITORY" in guided
    assert b"OF-REPOSITORY" not in bare


@pytest.mark.parametrize("name", ["AGENTS.md", "AGENTS.override.md"])
def test_a_guide_anywhere_above_is_a_guide(tmp_path: Path, name: str) -> None:
    workdir = tmp_path / "a" / "b"
    workdir.mkdir(parents=True)
    assert command.is_unguided(str(workdir), str(tmp_path))
    (tmp_path / "a" / name).symlink_to("nowhere")
    assert not command.is_unguided(str(workdir), str(tmp_path))


def test_guides_may_have_other_names(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('project_doc_fallback_filenames = ["README.md"]\n')
    assert not command.is_unguided("/", str(tmp_path))


def test_a_guide_that_leads_to_a_secret_is_not_followed(place: Path, model: CaseModel) -> None:
    one = Daemon(place / "root", model.environment())
    model.write_config(one.dirs.codex_home)
    (one.dirs.codex_home / "auth.json").write_text('{"OPENAI_API_KEY": "AUTH-CANARY"}')
    one.dirs.work.mkdir()
    (one.dirs.work / "AGENTS.md").symlink_to(one.dirs.codex_home / "auth.json")
    with one:
        one.drop("a.md", "---\nattempts: 1\n---\n[[say a]]\n")
        front, _ = one.answer("a")
    assert front["state"] == "failed"
    assert "AGENTS.md" in front["message"]
    assert not any(canaries(turn.body) for turn in model.turns)
