"""Anything in the place of any file of the state before a start.

The daemon starts, does what is left, answers a new task of each session whose files are
damaged, says what was wrong, stays small, and nothing else is harmed.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from codexd import session, spend, transcript
from tests.daemon import Daemon
from tests.proof.level import Figures, pick
from tests.proof.states import CONFIG, FILES, KEY, NUMBERS, OTHERS, THINGS, lived, put, task

pytestmark = [pytest.mark.xdist_group("state"), pytest.mark.timeout(pick(120, 600, 600))]

ROOM = 256 << 20  # bytes
NUMERIC = (*NUMBERS, "5000 digits")  # what changes numbers only: a key's record has none
PATIENCE = 45.0  # seconds for a task, of a machine that does other things as well
# In short each thing lies in the place of all files at once; else of each by itself, too.
AT_ONCE = [(thing, tuple(FILES)) for thing in THINGS]
ALONE = [(thing, (name,)) for thing in THINGS for name in FILES]
CASES = pick(AT_ONCE, AT_ONCE + ALONE, AT_ONCE + ALONE)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root before anything is damaged; beside it, under the name it was made by, `root`."""
    root = tmp_path_factory.mktemp("state") / "root"
    lived(root)
    return root.rename(root.with_name("kept"))


@pytest.fixture
def root(kept: Path) -> Iterator[Path]:
    place = kept.with_name("root")
    shutil.copytree(kept, place, symlinks=True)
    yield place
    shutil.rmtree(place)


def peak(daemon: Daemon) -> int:
    """The most memory that it has had, in bytes."""
    assert daemon.child is not None
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{daemon.child.pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def expected(thing: str, name: str) -> str:
    """What must be said of it."""
    if thing in OTHERS:
        return FILES[name].told
    # A number of a result that makes no sense is left out; what it came to stands.
    fine = (name == "result" and thing in NUMBERS) or (name == "key" and thing in NUMERIC)
    return "" if fine else FILES[name].spoilt


@pytest.mark.parametrize(
    ("thing", "names"), CASES, ids=[f"{t}: {'all' if len(n) > 1 else n[0]}" for t, n in CASES]
)
def test_anything_in_the_place_of_a_file(
    root: Path, thing: str, names: tuple[str, ...], figure: Figures
) -> None:
    daemon = Daemon(root, config=CONFIG)
    before = session.load(daemon.dirs.sessions, "good")
    said = transcript.last(daemon.dirs.transcripts / "good.jsonl", 99)
    for name in names:
        try:
            put(FILES[name].where(daemon.dirs), THINGS[thing])
        except PermissionError:
            pytest.skip("only for root")
    began = time.monotonic()
    with daemon:
        sessions = sorted({FILES[name].session for name in names} | {"good"})
        for one in sessions:
            daemon.drop(f"new-{one}.md", task(one))
        if "key" in names and expected(thing, "key"):
            daemon.drop("keyed.md", task("good", "kboth"))
            assert KEY in daemon.reason("keyed.md")
        for one in sessions:
            assert daemon.answer(f"new-{one}", PATIENCE)[0]["state"] == "done", one
        took, room = time.monotonic() - began, peak(daemon)
        after = session.load(daemon.dirs.sessions, "good")
        assert daemon.run("status").returncode == 0
        assert daemon.run("task", "list").returncode == 0
        assert daemon.stop() == 0
    for one in sessions:
        session.load(daemon.dirs.sessions, one)  # what it has written, it can read
    for day in spend.days(daemon.dirs.usage, 9):
        spend.load(daemon.dirs.usage, day)
    assert after.thread == before.thread
    assert transcript.last(daemon.dirs.transcripts / "good.jsonl", 99)[: len(said)] == said
    assert room < ROOM
    everything = daemon.log.read_text() + "".join(
        path.read_text() for path in daemon.dirs.answers.iterdir()
    )
    assert "Traceback" not in everything
    for name in set(names) - {"key"}:
        assert expected(thing, name) in everything, name
    figure(f"state files: {thing}: s, MiB", (round(took, 1), room >> 20))
