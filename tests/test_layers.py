"""The rooms and who may import whom: the table, held against the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "codexd"

# Top down: a file may import what stands above it, never what stands below.
# One line is one layer; files of one layer do not import each other.
LAYERS = [
    "outcome wire sane",
    "model clock messages",
    "dispatch policy prompt line relevance command delivery answerfile",
    "durable orphans directories document lock events notes settled journal cgroup",
    "config canary rollout quota verdict replies book heartbeat exits service",
    "when rotate child",
    "codex taskfile memory take processes units dropin",
    "controlfile spool place profile ledger session spend transcript turn scripted program layout",
    "evidence start verify hook weight pauses free lost",
    "rounds",
    "parents asked view gate finish retention framing metrics openapi sockets launcher checks",
    "errands codexchecks",
    "aside beside audit report control intake waits orders sweep routes usage hooks asking",
    "attempts probe tidy reload overview",
    "worker master api submit schedule",
    "http install ledgerverbs valid",
    "serve unitchecks uninstall",
    "doctor",
    "cli",
    "selftest",
]
ORDER = {name: n for n, line in enumerate(LAYERS) for name in line.split()}
PURE = ["outcome", "sane", "model", "dispatch", "policy", "prompt", "messages", "delivery"]
LEAN = ["sane", "outcome", "clock", "prompt", "durable", "lock", "events", "verdict", "quota",
        "codex",
        "rollout", "memory", "relevance", "notes", "turn", "worker",
        "orphans", "canary", "child", "rounds",
        "start", "verify", "command",
        "cgroup", "journal", "messages"]  # fmt: skip
# One home for each third-party package.
HOMES = {"yaml": "document", "watchdog": "spool", "sdnotify": "service"}
# Only these speak to a log or a terminal; rooms raise.
SPEAKERS = {
    "service",
    "master",
    "worker",
    "http",
    "serve",
    "cli",
    "submit",
    "report",
    "overview",
    "selftest",
    "install",
    "uninstall",
    "ledgerverbs",
    "doctor",
    "scripted",
}


def files() -> list[str]:
    return sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


def imports(name: str, *, at_start: bool = False) -> set[str]:
    """Everything a file imports, as dotted names; `at_start`: not inside functions."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    nodes = _top(tree.body) if at_start else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "codexd":
            found |= {f"codexd.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def _top(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements run at import; `if TYPE_CHECKING:` is none of them."""
    return [n for n in body if not isinstance(n, ast.FunctionDef | ast.ClassDef | ast.If)]


def inside(name: str) -> set[str]:
    found = {i.split(".")[1] for i in imports(name) if i.startswith("codexd.")}
    return found - {"__version__"}


def test_every_file_has_a_place() -> None:
    assert set(files()) == set(ORDER) & set(files())
    assert sorted(ORDER) == files()


@pytest.mark.parametrize("name", files())
def test_imports_only_point_up(name: str) -> None:
    lazy = {("cli", "selftest")}  # a verb
    wrong = {o for o in inside(name) if ORDER[o] >= ORDER[name] and (name, o) not in lazy}
    assert not wrong, f"{name} must not import {wrong}"


@pytest.mark.parametrize("name", PURE)
def test_values_and_rules_touch_nothing(name: str) -> None:
    allowed = {"re", "enum", "dataclasses", "collections.abc", "typing", "__future__", "zlib"}
    assert {i for i in imports(name) if not i.startswith("codexd")} <= allowed


@pytest.mark.parametrize("name", files())
def test_third_party_packages_have_one_home(name: str) -> None:
    for package, home in HOMES.items():
        used = any(i.split(".")[0] == package for i in imports(name))
        assert used == (name == home), f"{package} belongs into {home} alone"


@pytest.mark.parametrize("name", sorted(set(files()) - SPEAKERS))
def test_rooms_are_silent(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call)
             and isinstance(n.func, ast.Name)}  # fmt: skip
    assert "print" not in calls
    assert "logging" not in imports(name)


@pytest.mark.parametrize("name", [n for n in LEAN if n in files()])
def test_lean_files_import_little(name: str) -> None:
    costly = {"dataclasses", "typing", "collections.abc", "subprocess", "pathlib", "logging",
              "argparse", "tempfile", "shutil", "glob", "asyncio", "http.server"}  # fmt: skip
    assert not imports(name, at_start=True) & costly
