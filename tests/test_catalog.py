"""The journal's catalog explains every event that is logged, and nothing else."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from codexd import gate, messages, usage
from tests import logged, mdoc
from tests.box import PYTHON, Box
from tests.box.host import require

CATALOG = Path(__file__).resolve().parent.parent / "systemd" / "codexd.catalog"
ID = "20261123t072011-k3f9qa7x2m"
# Events that are always logged with a task, whose texts may name it.
OF_A_TASK = {e for e in messages.IDS if e.startswith("task.")} | {
    "worker.refused", "attempt.begun", "attempt.ended", "attempt.untold", "workdir.shared",
}  # fmt: skip


def entries() -> dict[str, tuple[str, dict[str, str], str]]:
    """By id: the comment before the entry, its head, its text."""
    found = {}
    pattern = r"^# (\S+)\n-- (\S+)\n((?:\S[^\n]*\n)+)\n(.*?)(?=^# \S+\n-- |\Z)"
    for event, id, head, text in re.findall(pattern, CATALOG.read_text(), re.M | re.S):
        assert id not in found
        found[id] = (event, dict(line.split(": ", 1) for line in head.splitlines()), text)
    return found


def test_every_event_has_an_id_and_every_id_is_used() -> None:
    assert set(messages.IDS) == logged.events()


def test_ids_are_128_bits_and_differ() -> None:
    assert all(re.fullmatch(r"[0-9a-f]{32}", id) for id in messages.IDS.values())
    assert len(set(messages.IDS.values())) == len(messages.IDS)


def test_every_id_is_explained() -> None:
    found = entries()
    assert {event: id for id, (event, _, _) in found.items()} == messages.IDS
    assert CATALOG.read_text().count("\n-- ") == len(found)
    for event, head, text in found.values():
        assert set(head) == {"Subject", "Defined-By", "Documentation"}, event
        page = re.fullmatch(r"man:(\S+)\((\d)\)", head["Documentation"])
        assert page, event
        assert f"{page[1]}.{page[2]}" in mdoc.pages()
        assert len(text.strip().split("\n\n")) >= 2, event
        assert max(map(len, text.splitlines())) < 80, event


def test_texts_name_only_fields_that_are_there() -> None:
    for event, head, text in entries().values():
        allowed = {"CODEXD_TASK"} if event in OF_A_TASK else set()
        of_session = event in ("session.damaged", "transcript.damaged")
        allowed |= {"CODEXD_SESSION"} if of_session else set()
        assert set(re.findall(r"@(\w+)@", head["Subject"] + text)) <= allowed, event


def test_commands_in_it_are_understood() -> None:
    text = CATALOG.read_text().replace("\n", " ")
    commands = [c for c in re.findall(r'"codexd ([^"]*)"', text) if c != "serve"]
    assert len(commands) > 5
    for command in commands:
        usage.parser().parse_args(shlex.split(command))


def test_every_reason_to_close_the_gate_is_explained() -> None:
    _, _, text = entries()[messages.IDS["gate.closed"]]
    reasons = {*gate.BY_HAND, gate.CODEX, gate.DISK, gate.BUDGET, *gate.PROBED}
    assert set(re.findall(r"^(\w+)  +\S", text, re.M)) == reasons


# --- in a booted systemd ------------------------------------------------------------------

LOGGER = """
from codexd.messages import IDS
from codexd.service import Level, Service
for event in IDS:
    Service("codexd-test").log(Level.INFO, event, task="TASK", session="web")
"""
UNIT = f"[Service]\nType=oneshot\nExecStart={PYTHON} /srv/logger.py\n"


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    require("unified")
    with Box("unified") as box:
        box.push(
            {
                "/usr/lib/systemd/catalog/codexd.catalog": CATALOG.read_text(),
                "/srv/logger.py": LOGGER.replace("TASK", ID),
                "/run/systemd/system/logger.service": UNIT,
            }
        )
        yield box


@pytest.mark.xdist_group("box")
def test_journalctl_explains_every_event(box: Box) -> None:
    updated = box.run("journalctl", "--update-catalog")
    assert "codexd" not in updated.stdout + updated.stderr
    listed = box.run("journalctl", "--no-pager", "--list-catalog", *messages.IDS.values()).stdout
    subjects = {id: head["Subject"] for id, (_, head, _) in entries().items()}
    assert sorted(listed.splitlines()) == sorted(f"{i} codexd: {s}" for i, s in subjects.items())
    box.run("systemctl", "start", "logger")
    box.run("journalctl", "--sync")
    shown = box.run("journalctl", "--no-pager", "-x", "_SYSTEMD_UNIT=logger.service").stdout
    for event, head, text in entries().values():
        for line in (head["Subject"], *text.strip().splitlines()):
            said = line.replace("@CODEXD_TASK@", ID).replace("@CODEXD_SESSION@", "web")
            assert said in shown, event
    assert "@CODEXD" not in shown
