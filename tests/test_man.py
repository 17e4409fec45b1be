"""The manual pages say what the program does, and nothing else: held both ways."""

from __future__ import annotations

import argparse
import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from codexd import codex, command, gate, policy, program, usage
from codexd.model import COST_KEYS, USAGE_KEYS, Kind, Note, State, Task, to_json
from codexd.outcome import Outcome
from tests import logged, mdoc
from tests.mdoc import flat, items, named, part

TOP = mdoc.MAN.parent
COMMAND, CONFIG, TASK = "codexd.1", "codexd.yaml.5", "codexd-task.5"
OVERVIEW, MASTER, WORKER = "codexd.7", "codexd-master.8", "codexd-worker.8"
ID = "20261123t072011-k3f9qa7x2m"


# --- the pages themselves ---------------------------------------------------------


def tool(name: str) -> str:
    """A tool's path.  Continuous integration has it; elsewhere the test is skipped."""
    found = shutil.which(name)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(f"{name} is not installed")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=mdoc.MAN, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize("page", mdoc.pages())
def test_mandoc_finds_nothing(page: str) -> None:
    assert not run(tool("mandoc"), "-T", "lint", "-W", "warning", page)


@pytest.mark.parametrize("page", mdoc.pages())
def test_groff_finds_nothing(page: str) -> None:
    assert not run(tool("groff"), "-mdoc", "-ww", "-z", page)


@pytest.mark.parametrize("page", mdoc.pages())
def test_no_line_is_too_wide_for_a_terminal(page: str) -> None:
    text = re.sub(".\b", "", run(tool("mandoc"), "-T", "utf8", "-O", "width=78", page))
    assert not [line for line in text.splitlines() if len(line) > 80]


def test_every_program_has_a_page() -> None:
    setup = configparser.ConfigParser()
    setup.read(TOP / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"].split("\n")
    programs = {line.partition(" ")[0] for line in scripts if line}
    assert programs == {page[:-2] for page in mdoc.pages() if page[-1] in "18"}


def test_pages_refer_to_each_other_and_all_are_found() -> None:
    found = set()
    for page in mdoc.pages():
        for name, section in re.findall(
            r"^\.Xr (codexd\S*) (\d)", "\n".join(mdoc.lines(page)), re.M
        ):
            assert f"{name}.{section}" in mdoc.pages(), page
            found.add(f"{name}.{section}")
    assert found == set(mdoc.pages())


# --- the command ------------------------------------------------------------------


def verbs(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every verb with its parser; a group of verbs is none itself."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for group in groups:
        for verb, below in group.choices.items():
            yield from verbs(below, f"{name} {verb}".strip())
    if not groups:
        yield name, parser


def accepted(parser: argparse.ArgumentParser) -> dict[frozenset[str], str | None]:
    """Its options, as `mdoc.options` tells them."""
    found: dict[frozenset[str], str | None] = {}
    for action in parser._actions:
        if action.option_strings:
            argument = (action.metavar or action.dest.upper()) if action.nargs is None else None
            found[frozenset(action.option_strings)] = argument  # type: ignore[assignment]
    return found


SHARED = accepted(program.shared())
HELP = {frozenset({"-h", "--help"}): None}
VERBS = dict(verbs(usage.parser()))


def of_verb(name: str) -> list[str]:
    return part(part(mdoc.lines(COMMAND), "Sh", "VERBS"), "Ss", name)


def test_every_verb_is_described() -> None:
    assert mdoc.titles(part(mdoc.lines(COMMAND), "Sh", "VERBS"), "Ss") == list(VERBS)


def test_options_for_all_verbs() -> None:
    assert mdoc.options(part(mdoc.lines(COMMAND), "Sh", "OPTIONS")) == accepted(usage.parser())


@pytest.mark.parametrize("verb", VERBS)
def test_options_of_a_verb(verb: str) -> None:
    assert {**mdoc.options(of_verb(verb)), **SHARED, **HELP} == accepted(VERBS[verb])


@pytest.mark.parametrize("verb", VERBS)
def test_usage_of_a_verb(verb: str) -> None:
    """The lines up to the first paragraph: the verb, and what it takes besides options."""
    text = of_verb(verb)
    usage = text[: text.index(".Pp")]
    assert usage[0] == f".Nm codexd Cm {verb}"
    takes = [
        [word for word in mdoc.words(line) if word != "Ar"]
        for line in usage
        if re.match(r"\.Ar |\.Op Ar [A-Z]", line)
    ]
    wanted = [
        [str(a.metavar), *(["..."] if a.nargs == "+" else [])]
        for a in VERBS[verb]._actions
        if not a.option_strings
    ]
    assert takes == wanted


def test_states_to_list() -> None:
    _, text = next(i for i in items(of_verb("task list")) if "-state" in i[0])
    assert set(re.findall(r"^\.Cm (\w+)", "\n".join(text), re.M)) == set(State)


def test_exit_statuses() -> None:
    def said(page: str) -> set[int]:
        return {int(head[0]) for head, _ in items(part(mdoc.lines(page), "Sh", "EXIT STATUS"))}

    assert said(COMMAND) == set(program.Exit)
    assert said(MASTER) < set(program.Exit)
    assert said("codexd-http.8") < set(program.Exit)


@pytest.mark.parametrize("page", [COMMAND, "README.md"])
def test_commands_in_examples_are_understood(page: str) -> None:
    text = mdoc.lines(page) if page == COMMAND else (TOP / page).read_text().splitlines()
    found = [m[1] for line in text if (m := re.match(r"(?:\.Dl | +)?\$ codexd ([^<|&#]*)", line))]
    assert found
    for line in found:
        usage.parser().parse_args(shlex.split(re.sub(r"\$\(.*\)", "X", line)))


@pytest.mark.parametrize("name", ["codexd-master", "codexd-http"])
def test_options_of_a_server(name: str) -> None:
    described = mdoc.options(part(mdoc.lines(f"{name}.8"), "Sh", "DESCRIPTION"))
    assert described == accepted(program.options(name, ""))


def test_options_of_the_worker() -> None:
    done = subprocess.run([sys.executable, "-m", "codexd.worker"], capture_output=True, text=True)
    assert done.returncode == 2
    assert set(re.findall(r"--\w+", done.stderr)) == {"--tasks"}
    assert list(mdoc.options(part(mdoc.lines(WORKER), "Sh", "DESCRIPTION"))) == [{"--tasks"}]


# --- the overview -------------------------------------------------------------------


def overview(title: str) -> list[str]:
    return part(mdoc.lines(OVERVIEW), "Sh", title)


NEXT = {
    policy.Then.END: "ends",
    policy.Then.RETRY: "retried",
    policy.Then.RESTART: "restarted",
    policy.Then.GATE: "gate",
    policy.Then.WAIT: "waits",
    policy.Then.FRESH: "new thread",
}


def test_outcomes_and_what_follows_them() -> None:
    found = {head[1]: flat(text) for head, text in items(overview("OUTCOMES")) if head[0] == "Cm"}
    assert list(found) == list(Outcome)
    for name, text in found.items():
        assert text.endswith(f"Next: {NEXT[policy.TABLE[Outcome(name)]]}."), name


def test_states() -> None:
    assert named(part(overview("THE WAY OF A TASK"), "Ss", "States")) == list(State)


def test_reasons_to_close_the_gate() -> None:
    seen = {gate.HOLD, gate.DRAIN, gate.CODEX, gate.DISK, gate.BUDGET}
    assert set(named(overview("THE GATE"))) == seen | gate.PROBED


def test_kinds_of_ledger_lines() -> None:
    # The first line, which names the format, is described apart.
    assert set(named(overview("THE LEDGER"))) == {*Kind, *Note}


def test_keys_of_a_task_in_json() -> None:
    section = overview("TASKS IN JSON")
    assert named(section) == list(to_json(Task(ID), None, None))
    text = {head[1]: flat(body) for head, body in items(section)}
    assert all(key in text["usage"] for key in USAGE_KEYS)
    assert all(key in text["cost"] for key in COST_KEYS)


def test_environment_of_codex() -> None:
    text = part(mdoc.lines(WORKER), "Sh", "ENVIRONMENT")
    names = {mdoc.words(line)[0] for line in text[text.index(".Bd -filled -offset indent") :]
             if line.startswith(".Ev ")}  # fmt: skip
    names -= {"CODEX_HOME", "TMPDIR"}
    assert {n for n in names if n != "LC_*"} | {"TMPDIR"} == command._PASSED
    given = dict.fromkeys([*names - {"LC_*"}, "LC_ALL", "SECRET", "CODEX_HOME"], "x")
    passed = {**given, "CODEX_HOME": "/h"}
    del passed["SECRET"]
    assert codex.environment(given, "/h", []) == passed


def test_what_is_logged() -> None:
    """Events besides the ledger's: all the constants that the log is called with."""
    called = logged.called(*(logged.files() - {"http"}))
    text = "\n".join(part(mdoc.lines(MASTER), "Sh", "DIAGNOSTICS"))
    described = {w for line in re.findall(r"^\.It Li (.*)", text, re.M) for w in line.split(" , ")}
    assert described == called
