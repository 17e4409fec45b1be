"""Two sessions in one directory: told, or one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codexd import place
from codexd.beside import Beside
from codexd.config import Directories
from codexd.model import State, Task
from tests.daemon import Daemon, until
from tests.scripted_cases import CaseModel
from tests.test_failures import Seen, front_matter, prepared

CONFIG = "workers: 8\nhttp:\n  listen: off\n"
APART = CONFIG + "workdir_sharing: no\n"


@pytest.fixture
def model() -> Iterator[CaseModel]:
    with CaseModel() as model:
        yield model


def served(root: Path, model: CaseModel, config: str) -> Daemon:
    one = prepared(root, model, config)
    for name in ("a/below", "b"):
        (one.dirs.work / name).mkdir(parents=True)
    return one


def held(daemon: Daemon, model: CaseModel, name: str, text: str, **options: str) -> Seen:
    """A task that has done this and now waits for its model."""
    front = front_matter("\n".join(f"{k}: {v}" for k, v in options.items()))
    daemon.drop(f"{name}.md", f"{front}{text}[[hold {name}]][[say {name}]]")
    task = Seen(daemon, f"{name}.md")
    model.wait_held(name)
    return task


def end(daemon: Daemon, model: CaseModel, name: str) -> dict[str, Any]:
    model.release(name)
    front, text = daemon.answer(name)
    assert (front["state"], front["outcome"], text) == ("done", "done", f"{name}\n")
    return front


def test_both_are_told_when_both_may_have_written(tmp_path: Path, model: CaseModel) -> None:
    with served(tmp_path / "root", model, CONFIG) as daemon:
        one = held(daemon, model, "one", "[[shell true]]", session="web", workdir="a")
        two = held(daemon, model, "two", "[[patch x.txt hello]]", workdir="a/below")
        three = held(daemon, model, "three", "[[shell true]]", workdir="b")
        idle = held(daemon, model, "idle", "", workdir="a")
        reader = held(daemon, model, "reader", "[[shell true]]", workdir="a", sandbox="read-only")
        # The first of them that ends is told of the other, which is told later, by a
        # daemon that was started meanwhile.
        said = end(daemon, model, "two")["message"]
        work = daemon.dirs.work
        assert said == (
            f"task {one.id} of session web worked in {work}/a at the same time; "
            "both may have changed files there"
        )
        for name in ("idle", "reader", "three"):
            assert end(daemon, model, name)["message"] is None
        assert {idle.id, reader.id, three.id}
        log = daemon.log.read_text()
        assert log.count("workdir.shared") == 2
        daemon.stop()
        daemon.start()
        said = end(daemon, model, "one")["message"]
        assert said.startswith(f"task {two.id} worked in {work}/a/below at the same time; both")
        assert daemon.json("task", "show", one.id)["message"] == said


@pytest.mark.parametrize("end", ["failed", "cancelled", "cancelled later"])
def test_who_is_not_done_is_told_as_well(tmp_path: Path, model: CaseModel, end: str) -> None:
    """It has changed files all the same."""
    with served(tmp_path / "root", model, CONFIG) as daemon:
        last = "[[400]]" if end == "failed" else "[[first 1 insufficient]][[say x]]"
        daemon.drop("bad.md", front_matter("workdir: a") + f"[[shell true]][[hold bad]]{last}")
        bad = Seen(daemon, "bad.md")
        model.wait_held("bad")
        daemon.drop("good.md", front_matter("workdir: a") + "[[shell true]][[say good]]")
        told = daemon.answer("good")[0]["message"]
        assert told.startswith(f"task {bad.id} worked in ")
        if end == "cancelled later":
            model.release("bad")
            bad.until("queued", "quota")
        if end != "failed":
            daemon.run("task", "cancel", bad.id)
        model.release("bad")
        front, _ = daemon.answer("bad")
        assert front["state"] == end.split()[0]
        good = Seen(daemon, "good.md").id
        assert f"; task {good} worked in {daemon.dirs.work}/a at the same" in front["message"]
        assert daemon.json("task", "show", bad.id)["message"] == front["message"]


def test_one_after_the_other_is_nothing_to_tell(tmp_path: Path, model: CaseModel) -> None:
    with served(tmp_path / "root", model, CONFIG) as daemon:
        for name in ("one", "two"):
            daemon.drop(f"{name}.md", f"[[shell touch {name}]][[say {name}]]")
            assert daemon.answer(name)[0]["message"] is None
        assert "workdir.shared" not in daemon.log.read_text()


def test_apart_the_second_waits_and_says_for_whom(tmp_path: Path, model: CaseModel) -> None:
    with served(tmp_path / "root", model, APART) as daemon:
        first = held(daemon, model, "first", "", workdir="a")
        for name, workdir in (("other", "b"), ("same", "a"), ("below", "a/below")):
            daemon.drop(f"{name}.md", front_matter(f"workdir: {workdir}") + f"[[say {name}]]")
        assert daemon.answer("other")[1] == "other\n"
        daemon.drop("above.md", front_matter("workdir: .") + "[[say above]]")
        waiting = [Seen(daemon, f"{name}.md") for name in ("same", "below", "above")]
        for task in waiting:
            told = task.until("queued", "workdir")
            where = f"{daemon.dirs.work}/a"
            assert told["message"] == f"task {first.id} works in {where} (workdir_sharing: no)"
            assert task.now()["attempts"] == 0
        listed = {t["id"]: t["reason"] for t in daemon.json("task", "list")}
        assert all(listed[task.id] == "workdir" for task in waiting)
        assert "workdir_sharing: no" in daemon.run("task", "show", waiting[0].id).stdout
        for task in waiting:  # nothing is written for those that wait
            assert sum(f"`{task.id}`" in line for line in daemon.events()) == 1
        end(daemon, model, "first")
        for name in ("same", "below", "above"):
            front, text = daemon.answer(name)
            assert (text, front["message"], front["attempts"]) == (f"{name}\n", None, 1)
        assert not overlapping(model)


def overlapping(model: CaseModel) -> list[tuple[str, str]]:
    """Prompts of the tasks in `a` whose requests were open at the same time."""
    spans = [
        (turn, end)
        for thread in model.threads()
        for turn, end in model.spans(thread)
        if "[[say other]]" not in turn.prompt
    ]
    return [
        (one.prompt, other.prompt)
        for one, ended in spans
        for other, _ in spans
        if one.started < other.started < ended
    ]


def test_a_task_of_the_same_session_waits_for_its_session(tmp_path: Path, model: CaseModel) -> None:
    with served(tmp_path / "root", model, APART) as daemon:
        held(daemon, model, "first", "", workdir="a", session="s")
        daemon.drop("second.md", front_matter("workdir: b\nsession: s") + "[[say second]]")
        second = Seen(daemon, "second.md")
        until(lambda: second.now()["state"] == "queued", "it is accepted")
        assert second.now()["reason"] is None
        end(daemon, model, "first")
        assert daemon.answer("second")[1] == "second\n"


def test_names_that_are_long_and_notes_that_are_damaged(tmp_path: Path) -> None:
    """What is said of it is no reason to keep an answer back, and none to die."""
    dirs = Directories.below(tmp_path)
    one, other = (f"20261127t130000-{n * 10}" for n in "ab")
    workdir = "/w/" + "/".join(["d" * 200] * 19)
    tasks = {
        id: Task(id, State.RUNNING, session="\u20ac" * 60, workdir=workdir, launches=1)
        for id in (one, other)
    }
    for id in tasks:
        attempt = dirs.tasks / id / "1"
        attempt.mkdir(parents=True)
        (attempt / "attempt.json").write_text('{"sandbox": "workspace-write"}')
        (attempt / "events.jsonl").write_text('{"item": {"type": "command_execution"}}')
    Beside(dirs, tasks, lambda *_, **__: None, pytest.fail).look(tasks[one])
    said = place.told_beside(dirs, one)
    assert said.startswith(f"task {other} of session {chr(0x20AC) * 60} worked in /w/ddd")
    assert said.endswith("… at the same time; both may have changed files there")
    (dirs.tasks / one / "beside").write_bytes(b"x" * 5000)
    assert place.told_beside(dirs, one) == ""
