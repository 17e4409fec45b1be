"""The manual's pages of files, held against the schema and against a daemon's real files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from codexd import config, controlfile, program, taskfile
from codexd.model import Resume, Sandbox
from tests import mdoc
from tests.daemon import Daemon
from tests.mdoc import flat, items, named, part
from tests.scripted_cases import CaseModel

TOP = mdoc.MAN.parent
CONFIG, TASK, OVERVIEW, WORKER = "codexd.yaml.5", "codexd-task.5", "codexd.7", "codexd-worker.8"
ID = "20261123t072011-k3f9qa7x2m"

pytestmark = pytest.mark.xdist_group("man")


# --- configuration and task files ---------------------------------------------------


def described_keys() -> dict[str, list[str]]:
    found = items(part(mdoc.lines(CONFIG), "Sh", "KEYS"))
    return {head[1]: text for head, text in found}


def documented_default(key: str, text: list[str]) -> str:
    """What stands after the word `default`, as it would stand in the file."""
    if ".Bd -filled -offset indent" in text:
        begin = text.index(".Bd -filled -offset indent") + 1
        return f'"{" ".join(text[begin : text.index(".Ed")])}"'
    at = next(i for i, line in enumerate(text) if line.lower().endswith("default"))
    return " ".join(mdoc.words(text[at + 1])).replace(r"\(dq", '"').rstrip(" .,;")


def test_every_key_is_described() -> None:
    assert list(described_keys()) == config.keys()


def test_the_described_defaults_are_the_defaults(tmp_path: Path) -> None:
    """A file made of them is the same as none."""
    dirs = config.find(None, tmp_path / "codexd.yaml", {"HOME": str(tmp_path)}, 65534)
    without = config.load(dirs, explicit=False)
    tree: dict[str, dict[str, str]] = {}
    for key, text in described_keys().items():
        section, _, name = key.rpartition(".")
        tree.setdefault(section, {})[name] = documented_default(key, text)
    body = [f"{k}: {v}" for k, v in tree.pop("").items()]
    for section, values in tree.items():
        body += [f"{section}:", *(f"  {k}: {v}" for k, v in values.items())]
    dirs.config_file.write_text("\n".join(body))
    assert config.load(dirs, explicit=True) == without


def test_the_described_ranges_are_the_ranges() -> None:
    for section, rules in config._rules(Path("/")).items():
        for key, rule in rules.items():
            text = flat(described_keys()[f"{section}.{key}".lstrip(".")])
            if bounds := re.search(r"from (\S+) to ([^\s,]+)", rule.allowed):
                assert f"from {bounds[1]} to {bounds[2]}" in text, key
            elif "-" in rule.allowed and ", " in rule.allowed and " " not in rule.allowed[:4]:
                assert all(choice in text for choice in rule.allowed.split(", ")), key


def test_the_shipped_file_says_the_same(tmp_path: Path) -> None:
    """config/codexd.yaml, with what is commented out made active, has every key."""
    text = (TOP / "config/codexd.yaml").read_text()
    active = re.sub(r"^( *)#(?=[a-z_]+:)", r"\1", text, flags=re.M)
    keys, section = [], ""
    for line in active.splitlines():
        if found := re.match(r"( *)([a-z_]+):(.*)", line):
            section = section if found[1] else ("" if found[3] else found[2])
            keys += [f"{section}.{found[2]}".lstrip(".")] if found[1] or found[3] else []
    assert keys == config.keys()
    dirs = replace(config.Directories.system(), config_file=tmp_path / "codexd.yaml")
    without = config.load(dirs, explicit=False)
    dirs.config_file.write_text(active)
    assert config.load(dirs, explicit=True) == without


def test_task_keys() -> None:
    section = part(mdoc.lines(TASK), "Sh", "KEYS")
    assert named(section) == list(taskfile.KEYS)
    text = {head[1]: flat(body) for head, body in items(section)}
    assert all(value in text["sandbox"] for value in Sandbox)
    assert all(value in text["resume"] for value in Resume)
    assert "from 0 to 9" in text["priority"]
    assert "from 1 to 20" in text["attempts"]


def test_ignored_names() -> None:
    text = part(mdoc.lines(TASK), "Ss", "How to drop a file")
    endings = [w for line in text if line.startswith(".Pa ") for w in mdoc.words(line)]
    assert endings == list(taskfile._UNFINISHED)
    assert all(taskfile.ignored("name" + ending) for ending in endings)


def test_control_files() -> None:
    names = named(part(mdoc.lines(TASK), "Sh", "CONTROL FILES"), "Pa")
    found = [controlfile.control(re.sub("^(ID|NAME)", ID, name)) for name in names]
    assert all(found)
    assert {c.verb for c in found if c} == set(controlfile.Verb)
    everywhere = {v for v in controlfile.Verb if _means_all(v)}
    assert {c.verb for c in found if c and c.target == controlfile.ALL} == everywhere


def _means_all(verb: controlfile.Verb) -> bool:
    try:
        found = controlfile.control(f"all.{verb}")
    except taskfile.Refused:
        return False
    return found is not None and verb is not controlfile.Verb.RESET  # a session may be named so


# --- what lies on the disk -----------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A root on which three tasks were run, and the daemon was stopped."""
    with CaseModel() as model:
        daemon = Daemon(tmp_path_factory.mktemp("man") / "root", model.environment())
        model.write_config(daemon.dirs.codex_home)
        with daemon:
            check = "verify:\n  command: test -e x || { touch x; exit 1; }\n"
            for name, more in {"a": "", "b": "", "c": check}.items():
                front = f"session: s\nkey: {name}\n{more}"
                daemon.drop(f"{name}.md", f"---\n{front}---\n[[say {name}]]\n")
                daemon.answer(name)
            assert daemon.stop() == 0
            yield daemon


def test_exit_statuses_are_given(served: Daemon, tmp_path: Path) -> None:
    bad = tmp_path / "codexd.yaml"
    bad.write_text("wrokers: 1\n")
    waiting = served.run("task", "submit", "-", stdin="Say nothing.").stdout.strip()
    given = {
        ("task", "list"): 0,
        ("check", str(bad)): 1,
        ("task", "list", "--state", "lost"): 2,
        ("task", "show", ID): 66,
        ("session", "show", "nobody"): 66,
        ("--root", str(tmp_path / "typo"), "task", "list"): 69,
        ("task", "wait", waiting, "--timeout", "1s"): 75,
        ("--config", str(bad), "memory", "word"): 78,
    }
    assert {args: served.run(*args).returncode for args in given} == given
    # 77 is not to be seen by root, who runs tests in containers.
    assert set(given.values()) == set(program.Exit) - {program.Exit.PERMISSION}


def test_nobody_reads_on(served: Daemon) -> None:
    """Not an exit status of ours: that of a program that a closed pipe has ended."""
    command = [sys.executable, "-m", "codexd.cli", "--root", str(served.root), "task", "list"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=served.env)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def listed(page: str, title: str) -> set[str]:
    """The names that `.It Pa` lines give, without what stands for a name below them."""
    return {re.sub(r"/.*", "", n) for n in named(part(mdoc.lines(page), "Sh", title), "Pa")}


def test_files_of_the_state(served: Daemon) -> None:
    there = {path.name for path in served.root.iterdir()} - {"codexd.yaml", "serve.log", "run"}
    there |= {path.name for path in (served.root / "run").iterdir()}
    told = listed(OVERVIEW, "FILES") | {"heartbeat", "hooks", "workers"}  # told of in the text
    assert told == there


def test_files_of_an_attempt(served: Daemon) -> None:
    place = next(served.dirs.archive.glob("*/*/1/started")).parent
    there = {path.name for path in served.dirs.archive.glob("*/*/1/*")}
    there = {re.sub(r"-\d+\.", "-R.", name) for name in there}
    assert there == listed(WORKER, "FILES")
    assert {path.name for path in place.parent.iterdir()} == {
        "name", "task.json", "status.json", "1",
    }  # fmt: skip


def test_front_matter_of_an_answer(served: Daemon) -> None:
    front, _ = served.answer("a")
    assert named(part(mdoc.lines(TASK), "Sh", "ANSWER FILES")) == list(front)


def test_a_ledger_line_is_checked_as_described(served: Daemon) -> None:
    section = part(mdoc.lines(OVERVIEW), "Ss", "Checking a line")
    one, whole = (line[len(".Dl $ ") :] for line in section if line.startswith(".Dl $ "))
    assert checked(one, served.root) == checked(whole, served.root) == "00000000"
    lines = served.events()
    assert len(lines) > 7
    (served.root / "other").mkdir(exist_ok=True)
    bad = [*lines[:6], lines[6].replace(" ", "  ", 1), *lines[7:]]
    (served.root / "other" / "tasks.md").write_text("\n".join(bad) + "\n")
    assert checked(one, served.root / "other") != "00000000"
    assert checked(whole, served.root / "other") != "00000000"
    shutil.rmtree(served.root / "other")


def checked(command: str, directory: Path) -> str:
    done = subprocess.run(["bash", "-c", command], cwd=directory, capture_output=True, text=True)
    assert not done.stderr
    return done.stdout.strip()


def test_the_first_line_of_the_ledger(served: Daemon) -> None:
    shown = (line for line in mdoc.lines(OVERVIEW) if line.startswith(".Dl # codexd"))
    assert next(shown)[len(".Dl ") :].replace("\\&", "") == served.events()[0]
