"""Codex's databases damaged under the real CLI: they are moved aside, and threads go on."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from codexd import aside, lock
from codexd.outcome import Outcome
from tests.scripted_cases import CaseModel
from tests.test_failures import Seen, prepared


@pytest.fixture
def model() -> Iterator[CaseModel]:
    with CaseModel() as model:
        yield model


def corrupt(home: Path, how: str) -> list[str]:
    """Damage every database; the names of what is there."""
    files = sorted(home.glob("*.sqlite"))
    assert files
    for path in files:
        with closing(sqlite3.connect(path)) as database:  # all of it is in the file then
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for path in home.glob("*.sqlite-*"):
        path.unlink()
    for path in files:
        whole = path.read_bytes()
        damaged = {
            "head": b"\xff" * 200 + whole[200:],
            "pages": whole[:4096] + b"Z" * (len(whole) - 4096),
            "cut": whole[:1000],
        }
        path.write_bytes(damaged[how])
    return [path.name for path in files]


def asides(home: Path) -> list[Path]:
    return sorted((home / ".codexd").glob("aside-*"))


@pytest.mark.parametrize("how", ["head", "pages", "cut"])
def test_a_thread_goes_on_after_its_databases_were_damaged(
    tmp_path: Path, model: CaseModel, how: str
) -> None:
    with prepared(tmp_path / "root", model) as daemon:
        home = daemon.dirs.codex_home
        daemon.drop("one.md", "---\nsession: s\n---\n[[say one]]")
        thread = daemon.answer("one")[0]["thread"]
        names = corrupt(home, how)
        daemon.drop("two.md", "---\nsession: s\n---\n[[say two]]")
        front, text = daemon.answer("two", 60)
        assert (text, front["attempts"], front["thread"]) == ("two\n", 1, thread)
        assert model.prompts(thread)[0].endswith("[[say one]]\n")
        (place,) = asides(home)
        assert set(names) <= {path.name for path in place.iterdir()}
        log = daemon.log.read_text()
        assert log.count("codex.databases") == 1
        assert str(place) in log
        assert daemon.json("status")["status"] == "ok"
        closed = [line for line in daemon.events() if "**closed**" in line]
        assert len(closed) == 1
        # Damaged once more, at once: whatever does that is not mended by it.
        corrupt(home, how)
        daemon.drop("three.md", "---\nsession: s\n---\n[[say three]]")
        Seen(daemon, "three.md").until("queued", "host")
        assert not model.asked("[[say three]]")
        assert daemon.json("status")["status"] == "host"
        assert asides(home) == [place]


def test_not_while_a_codex_of_ours_runs(tmp_path: Path, model: CaseModel) -> None:
    with prepared(tmp_path / "root", model) as daemon:
        home = daemon.dirs.codex_home
        daemon.drop("one.md", "---\nsession: s\n---\n[[say one]]")
        daemon.answer("one")
        daemon.drop("long.md", "[[hold long]][[say long]]")
        model.wait_held("long")
        corrupt(home, "head")
        daemon.drop("two.md", "---\nsession: s\n---\n[[say two]]")
        Seen(daemon, "two.md").until("queued", "host")
        assert not asides(home)
        model.release("long")
        assert daemon.answer("two", 60)[1] == "two\n"
        assert len(asides(home)) == 1


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    os.close(lock.hold_start(str(home), 0.0))
    for minute in range(5):
        for name in ("state_5.sqlite", "state_5.sqlite-wal", "config.toml", ".sqlite_migration"):
            (home / name).write_text(name)
        place, names = aside.move(str(home), f"2026-11-23T07:0{minute}:00.000Z")
        aside.drop_older(str(home))
        assert names == ["state_5.sqlite", "state_5.sqlite-wal"]
        assert sorted(os.listdir(place)) == names
    assert [path.name for path in asides(home)] == [
        f"aside-2026-11-23T070{minute}00.000Z" for minute in (2, 3, 4)
    ]
    assert sorted(os.listdir(home)) == [".codexd", ".sqlite_migration", "config.toml"]
    assert (home / ".codexd" / "starts.lock").exists()


class Gate:
    """What `Aside` needs of the keeper of the gate."""

    def __init__(self, home: Path) -> None:
        self.home = str(home)
        self.opened: list[str] = []

    def open(self, reason: str) -> None:
        self.opened.append(reason)


WORDS = "Error: thread/resume failed: list_turns is not supported yet (code -32601)"


def test_nothing_is_moved_while_codex_starts_or_runs(tmp_path: Path) -> None:
    (tmp_path / "state_5.sqlite").write_text("damaged")
    gate = Gate(tmp_path)
    told: list[tuple[str, dict[str, object]]] = []
    mend = aside.Aside(gate, lambda event, **fields: told.append((event, fields)))  # type: ignore[arg-type]
    mend.tend(idle=True)
    assert (tmp_path / "state_5.sqlite").exists()
    mend.met(Outcome.HOST, WORDS)
    mend.tend(idle=False)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"\n"
    mend.tend(idle=True)
    assert (tmp_path / "state_5.sqlite").exists()
    assert not gate.opened
    other.communicate()
    mend.tend(idle=True)
    assert not (tmp_path / "state_5.sqlite").exists()
    assert gate.opened == ["host"]
    assert [event for event, _ in told] == ["codex.databases"]
    assert told[0][1]["why"] == WORDS
    (tmp_path / "state_5.sqlite").write_text("damaged again")
    mend.met(Outcome.HOST, WORDS)
    mend.tend(idle=True)
    assert (tmp_path / "state_5.sqlite").exists()


HOLD = """
import sys
from codexd import lock
lock.hold_start(sys.argv[1], 0)
print(flush=True)
sys.stdin.read()
"""


def test_what_cannot_be_cleaned_up_is_told_and_keeps_nobody(tmp_path: Path) -> None:
    (tmp_path / ".codexd").mkdir()
    (tmp_path / ".codexd" / "aside-1").touch()  # no directory
    for number in (2, 3):
        (tmp_path / ".codexd" / f"aside-{number}").mkdir()
    (tmp_path / "state_5.sqlite").write_text("damaged")
    gate = Gate(tmp_path)
    told: list[str] = []
    mend = aside.Aside(gate, lambda event, **_: told.append(event))  # type: ignore[arg-type]
    mend.met(Outcome.HOST, WORDS)
    for _ in range(2):
        mend.tend(idle=True)
    assert gate.opened == ["host"]
    assert told == ["codex.databases", "not.tidied"]
    assert len(asides(tmp_path)) == 4
