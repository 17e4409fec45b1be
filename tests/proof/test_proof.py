"""The crash proofs in short: their long forms are `make proof` and `make proof-long`.

The seed is printed with the figures: SEED=… in the environment plays a run again.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.daemon import PYTHON, uncovered, until
from tests.processes import kill
from tests.proof import oracle, powercut, soak
from tests.proof.level import Figures, pick, seed
from tests.proof.place import TOP, Place

needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace(1)")


DAYS = 86400
pytestmark = pytest.mark.timeout(pick(400, DAYS, 7 * DAYS))


def prove(figure: Figures, table: Path, name: str, *options: object) -> list[dict[str, object]]:
    """One harness, as a process of its own; its figures."""
    command = [PYTHON, "-m", f"tests.proof.{name}", "--seed", seed(), *map(str, options)]
    env = {**uncovered(), "CODEXD_PROOF": str(table)}
    done = subprocess.run(command, cwd=TOP, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    found: list[dict[str, object]] = list(map(json.loads, table.read_text().splitlines()))
    for row in found:
        for key, value in row.items():
            if key != "proof":
                figure(f"{row['proof']}: {key}", value)
    return found


def test_killed_at_random_moments(figure: Figures, tmp_path: Path) -> None:
    cycles = pick(300, 2000, 20_000)
    (found,) = prove(figure, tmp_path / "table", "kills", "--cycles", cycles)
    assert found["kills"] == cycles


def test_mixed_load_for_a_while(figure: Figures, tmp_path: Path) -> None:
    """In short, the figures are only taken a few times: what grows at once is found."""
    quick = ("--every", 2, "--rate", 10)
    options = pick(("--hours", 0.004, *quick), ("--hours", 0.25, *quick), ("--hours", 48))
    (found,) = prove(figure, tmp_path / "table", "soak", *options)
    assert found["ended"]


@pytest.mark.skipif(not find_spec("atheris"), reason="needs atheris (HACKING)")
def test_input_that_coverage_guides(figure: Figures, tmp_path: Path) -> None:
    runs = pick(2000, 100_000, 5_000_000)
    (found,) = prove(figure, tmp_path / "table", "fuzz", "--runs", runs)
    assert found["inputs"] == 5 * runs  # counted where they were taken


@needs_strace
def test_a_fault_at_system_calls(figure: Figures, tmp_path: Path) -> None:
    options = pick(["--sample", "40", "--jobs", "1"], [], [])
    (found,) = prove(figure, tmp_path / "table", "sweep", *options)
    assert found["points"] == (40 if options else found["all_points"])


@pytest.mark.skipif(powercut.missing() is not None, reason=str(powercut.missing()))
@pytest.mark.parametrize("kind", powercut.KINDS)
def test_the_power_is_cut(figure: Figures, tmp_path: Path, kind: str) -> None:
    cuts = pick(10, 40, 200)
    (found,) = prove(figure, tmp_path / "table", "powercut", "--cuts", cuts, "--fs", kind)
    assert found["cuts"] == cuts
    assert found["of_them_by_http"], "a 202 has to survive, too"


def test_a_server_that_is_killed_while_it_starts_is_told(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path / "root", http=True)
    place.launch()
    kill(until(lambda: place.find("codexd.http"), "the server"))
    until(lambda: not place.up(), "the end of the daemon", 20)
    assert place.child is not None
    assert place.child.returncode == 69
    assert "error http.died status=-9" in place.log.read_text()
    assert not place.is_ready()
    place.reap()


GROWTH = {
    **{name: f"{name} grew from " for name in (*soak.FLAT, "kept")},
    "files": " files of 100 tasks that are kept",
}


def soaked(root: Path, hours: float, name: str = "threads", more: int = 0) -> list[str]:
    """What the soak says of forty samples in so many hours, of which one figure grows."""
    one = soak.Soak(root, random.Random(), 1.0)
    one.daemon.log.touch()
    flat = soak.Sample(0, *[100] * (len(fields(soak.Sample)) - 1))
    for number in range(40):
        now = {"minute": 1.5 * hours * number, name: 100 + number % 3 + more * number}
        one.samples.append(replace(flat, **now))
    return one.problems()


@pytest.mark.parametrize("name", GROWTH)
def test_the_soak_finds_what_grows(tmp_path: Path, name: str) -> None:
    (*_, problem) = soaked(tmp_path / "root", 40, name, 100)
    assert GROWTH[name] in problem


def test_the_soak_finds_nothing_else(tmp_path: Path) -> None:
    assert soaked(tmp_path / "root", 40) == []
    assert soaked(tmp_path / "root", 20, "kept", 100) == [], "retention has not begun"


def test_more_at_once_than_there_are_slots_is_written_down(tmp_path: Path) -> None:
    """The daemon believes in four, the fake in one."""
    with Place(tmp_path, tmp_path / "root") as place:
        place.work(1.0, 1.0, slots=1)
        for number in (1, 2):
            place.drop(f"{number}.md", f"[[proof m{number} -]]\n")
        (told,) = until(lambda: place.lines("violations"), "a word of it")
        assert told.endswith("/1 started while all of 1 slots was held")


# --- the oracle itself -----------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A root in which two tasks of a session were done."""
    home = tmp_path_factory.mktemp("told")
    with Place(home, home / "root") as place:
        for number in (1, 2):
            place.drop(f"{number}.md", f"---\nsession: s\n---\n[[proof m{number} s]]\n")
        until(lambda: len(place.starts()) == 2 and oracle.idle(place), "both")
        yield place


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def again(place: Place) -> None:
    path = place.notes / "starts"
    path.write_text("".join([*lines(path), lines(path)[0]]))


def reversed_(place: Place) -> None:
    path = place.notes / "starts"
    path.write_text("".join(reversed(lines(path))))


def in_a_new_thread(place: Place) -> None:
    path = place.notes / "starts"
    first, second = lines(path)
    path.write_text(first + second.replace(json.loads(second)["thread"], "another"))


def unanswered(place: Place) -> None:
    next(place.dirs.answers.glob("1.*.md")).unlink()


def mixed_up(place: Place) -> None:
    path = next(place.dirs.answers.glob("1.*.md"))
    path.write_text(path.read_text().replace("answer to m1", "answer to m2"))


def without_its_end(place: Place) -> None:
    path = place.dirs.ledger
    path.write_text("".join(line for line in lines(path) if "**done**" not in line))


def damaged(place: Place) -> None:
    path = place.dirs.ledger
    path.write_text(path.read_text().replace("**running**", "**rumbling**"))


def said_twice(place: Place) -> None:
    (path,) = place.dirs.transcripts.glob("*.jsonl")
    path.write_text("".join([*lines(path), lines(path)[-1]]))


def unasked(place: Place) -> None:
    (path,) = place.dirs.transcripts.glob("*.jsonl")
    path.write_text("".join(lines(path)[1:]))


def seen(place: Place) -> None:
    (place.notes / "violations").write_text("X/1 started while session-s was held\n")


def left_over(place: Place) -> None:
    (place.dirs.tasks / "20261123t072011-k3f9qa7x2m").mkdir()


def test_the_oracle_finds_nothing_wrong(told: Place) -> None:
    assert oracle.check(told, ["1.md", "2.md"]) == []


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda _: None, "3.md was acknowledged and is lost"),
        (again, "/1 was started 2 times"),
        (reversed_, " was started after "),
        (in_a_new_thread, "/1 left "),
        (unanswered, " has the answers []"),
        (mixed_up, "(m1) has another's answer: 'answer to m2"),
        (without_its_end, " ended 0 times"),
        (damaged, "seal"),
        (said_twice, " is in the transcripts 2 times"),
        (unasked, " is in the transcripts 0 times"),
        (seen, "X/1 started while session-s was held"),
        (left_over, "left in tasks/: 2026"),
    ],
)
def test_the_oracle_finds(
    told: Place, tmp_path: Path, harm: Callable[[Place], None], problem: str
) -> None:
    shutil.copytree(told.root, tmp_path / "root", ignore=shutil.ignore_patterns("*.sock"))
    shutil.copytree(told.notes, tmp_path / "notes")
    place = Place(tmp_path, tmp_path / "root")
    harm(place)
    found = oracle.check(place, ["1.md", "2.md", "3.md"][: 3 if "lost" in problem else 2])
    assert any(problem in one for one in found), found
