"""Style, types and the look of files, so that one command checks everything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
TEXTS = [
    path
    for pattern in ("man/*", "config/*", "examples/**/*", "systemd/**/*", "debian/*",
                    "codexd/*.py", "tests/**/*.py", "bench/*.py", "README.md", "NEWS", "HACKING",
                    "LICENSE", "Makefile", "setup.cfg", "pyproject.toml", ".ci/*")
    for path in sorted(TOP.glob(pattern))
    if path.is_file()
]  # fmt: skip


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=TOP, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_check() -> None:
    run("ruff", "check", "--quiet", ".")


def test_ruff_format() -> None:
    run("ruff", "format", "--check", "--quiet", "--diff", ".")


def test_mypy() -> None:
    run("mypy", "--strict", "codexd")


@pytest.mark.xdist_group("lint")
def test_a_group_stays_on_one_worker(request: pytest.FixtureRequest) -> None:
    """Tests of a group share a daemon, or a whole host.  pytest-xdist marks them by an ending
    of the node id, and where a newer pytest does not take that, spreads them without a word."""
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@lint"), "pytest and pytest-xdist do not fit"


def test_texts_are_tidy() -> None:
    """UTF-8, no blanks at the end of lines, one newline at the end, tabs only in make's file."""
    assert not {str(path.relative_to(TOP)): why for path in TEXTS if (why := untidy(path))}


def untidy(path: Path) -> str:
    text = path.read_bytes().decode()
    if found := re.search(r"[ \t\r]$", text, re.MULTILINE):
        return f"line {text.count(chr(10), 0, found.start()) + 1} ends with blanks"
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        return "it does not end with one newline"
    return "it has a tab" if "\t" in text and path.name not in ("Makefile", "rules") else ""


def test_readme_is_short_and_names_what_matters() -> None:
    text = (TOP / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "make demo" in text
    assert "make test" in text
    links = set(re.findall(r"\]\((?!https:)([^)#]+)\)", text))
    assert not {link for link in links if not (TOP / link).is_file()}
    assert {str(p.relative_to(TOP)) for p in TOP.glob("man/*.[1-9]")} <= links


def test_hacking_names_every_file() -> None:
    text = (TOP / "HACKING").read_text()
    rooms = text[text.index("## The rooms") : text.index("## Rules")]
    named = set(re.findall(r"`([a-z]+)`", rooms))
    assert named == {path.stem for path in TOP.glob("codexd/*.py")} - {"__init__"}


def test_news_has_this_version() -> None:
    from codexd import __version__

    assert re.search(rf"^{re.escape(__version__)}\b", (TOP / "NEWS").read_text(), re.MULTILINE)


def test_licence_is_named_in_the_package() -> None:
    assert "license = MIT" in (TOP / "setup.cfg").read_text()
    assert (TOP / "LICENSE").read_text().startswith("MIT License")
