"""What a task waits for by its own file: other tasks (`after`) and a time (`not_before`).

With a whole daemon and the fake Codex, and over crashes: who waits, who starts, who
fails because of whom, and what the ledger has of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codexd import clock, parents, spool
from codexd.config import Directories
from codexd.ledger import Ledger, parse
from codexd.model import Event, Note
from tests.daemon import until
from tests.test_cli import CONFIG, Root

GONE = "20260102t030405-nobody0000"


class Family(Root):
    """A daemon whose parents hang until they are ended."""

    def drop_task(self, name: str, **keys: object) -> None:
        self.drop(f"{name}.json", json.dumps({"prompt": name, "title": name, **keys}))

    def named(self, title: str) -> dict[str, Any]:
        """The task of this title, once it is one."""
        self.view.refresh()

        def found() -> dict[str, Any] | None:
            return next((t for t in self.view.short_list() if t["title"] == title), None)

        return until(found, f"a task {title}")

    def comes_to(self, title: str, state: str, reason: str | None = None) -> dict[str, Any]:
        def is_so() -> dict[str, Any] | None:
            task = self.named(title)
            return task if (task["state"], task["reason"]) == (state, reason) else None

        return until(is_so, f"{title} {state} {reason}")

    def lines(self, id: str) -> list[Event]:
        data = self.dirs.ledger.read_bytes().splitlines(keepends=True)
        events = [parse(line) for line in data if not line.startswith(b"#")]
        return [e for e in events if e.id == id]

    def kinds(self, id: str) -> list[str]:
        return [str(e.kind) for e in self.lines(id)]

    def rejections(self) -> list[Event]:
        data = self.dirs.ledger.read_bytes().splitlines(keepends=True)
        events = [parse(line) for line in data if not line.startswith(b"#")]
        return [e for e in events if e.kind is Note.REJECTED]

    def restart(self) -> None:
        self.kill()
        self.start()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Family]:
    with Family(tmp_path / "root") as one:
        yield one


def parent(root: Family, name: str = "parent", **keys: object) -> str:
    """A task that runs until it is cancelled."""
    root.behave(mode="hang-turn")
    id = root.submit(name, title=name, **keys)
    root.reaches(id, "running")
    begun(root, id)
    root.behave()
    return id


def begun(root: Family, id: str) -> None:
    events = root.dirs.tasks / id / "1" / "events.jsonl"
    until(lambda: events.exists() and "turn.started" in events.read_text(), "its turn")


# --- after --------------------------------------------------------------------------


def test_a_child_starts_when_its_parents_are_done(root: Family) -> None:
    root.behave(delay=20)  # two commands have to look meanwhile
    first, second = root.submit("a", key="a key"), root.submit("b")
    child = root.submit("c", after=["a key", second])
    begun(root, second)
    root.behave()
    waits = root.reaches(child, "waiting")
    assert (waits["reason"], waits["until"]) == ("after", None)
    assert waits["message"] in (f"it follows {first}, {second}", f"it follows {second}")
    shown = root.run("task", "list", "--state", "waiting").stdout
    assert "after" in shown
    assert f"message:     {waits['message']}" in root.run("task", "show", child).stdout
    done = root.reaches(child, "done")
    assert done["message"] is None
    ends = [root.task(id)["ended"] for id in (first, second)]
    assert done["started"] >= max(map(str, ends))
    assert root.kinds(child) == ["queued", "waiting", "queued", "running", "done"]
    assert root.lines(child)[0].facts["after"] == [first, second]


def test_done_already_is_not_waited_for(root: Family) -> None:
    first = root.submit("a", key="a key")
    root.reaches(first, "done")
    child = root.submit("c", after=[first, "a key", first])
    root.reaches(child, "done")
    assert root.kinds(child) == ["queued", "running", "done"]


def test_a_parent_that_does_not_end_well_fails_its_descendants(root: Family) -> None:
    """Also one that is held; one that follows another task is not touched."""
    bad = parent(root)
    child, held = root.submit("c", after=[bad]), root.submit("h", after=[bad])
    grandchild = root.submit("g", after=[child])
    other = parent(root, "other")
    untouched = root.submit("u", after=[other])
    root.run("task", "hold", held)
    root.reaches(grandchild, "waiting")
    until(lambda: root.task(held)["reason"] == "hold", "the hold")
    root.cancel(bad)
    for id, why in (
        (child, f"it follows task {bad} (parent), which is cancelled: cancelled on request"),
        (held, f"it follows task {bad} (parent), which is cancelled: cancelled on request"),
        (grandchild, f"it follows task {child} (task.json), which is failed (dependency): "),
    ):
        failed = root.reaches(id, "failed")
        assert failed["outcome"] == "dependency"
        assert failed["message"].startswith(why)
        assert (failed["attempts"], failed["started"]) == (0, None)
        assert Path(str(failed["answer_file"])).exists()
        until(lambda id=id: not (root.dirs.tasks / id).exists(), "the archive")
    assert root.task(untouched)["state"] == "waiting"
    late = root.submit("l", after=[bad])
    assert root.reaches(late, "failed")["outcome"] == "dependency"
    again = root.run("task", "retry", child).stdout.strip()
    assert root.reaches(again, "done")["outcome"] == "done", "a retry follows nobody"


def test_a_whole_family_in_any_order_of_names(root: Family) -> None:
    """Children before their parents, in one session, in chains: none is rejected or stuck."""
    ids = {name: spool.new_id() for name in "abcdef"}
    root.kill()
    root.drop_task(ids["a"], title="a", session="s", after=[ids["b"], "key of c"])
    root.drop_task(ids["b"], title="b", session="s", after=["key of c"])
    root.drop_task("z-c", title="c", session="s", key="key of c", after=[ids["d"]])
    root.drop_task(ids["d"], title="d", key="key of d")
    root.drop_task("0-e", title="e", after=["key of f", ids["a"]])
    root.drop_task("zz-f", title="f", key="key of f")
    root.start()
    ended = {name: root.comes_to(name, "done")["ended"] for name in "abcdef"}
    assert ended["d"] < ended["c"] < ended["b"] < ended["a"] < ended["e"]
    assert root.rejections() == []


def test_a_parent_that_comes_a_batch_later(root: Family) -> None:
    """More files than a round takes; the one that all of them follow is the last."""
    root.kill()
    for n in range(70):
        root.drop_task(f"child-{n:03}", after=["last"])
    root.drop_task("parent", key="last")
    root.start()
    until(lambda: len(list(root.dirs.answers.iterdir())) == 71, "all of them", 120)
    until(lambda: all(t["state"] == "done" for t in root.tasks()), "they are all done")
    tasks = root.tasks()
    ended = next(t["ended"] for t in tasks if t["title"] == "parent")
    assert min(t["started"] for t in tasks if t["title"] != "parent") > ended


@pytest.mark.parametrize("name", [GONE, "a key of nobody"])
def test_a_parent_that_is_not_there(root: Family, name: str) -> None:
    root.drop_task("orphan", after=[name])
    assert root.reason("orphan.json") == (
        f"after: there is no task with the id or key {name!r}, and none in the inbox that could "
        "be taken before this one\n"
    )
    file = root.root / "t.json"
    file.write_text(json.dumps({"prompt": "x", "after": [name]}))
    done = root.run("task", "submit", str(file))
    assert done.returncode == 1
    assert "rejected: after: there is no task with the id or key" in done.stderr


def test_a_circle_is_rejected(root: Family) -> None:
    mine, other = spool.new_id(), spool.new_id()
    root.kill()
    root.drop_task(mine, after=[other])
    root.drop_task(other, after=[mine])
    root.drop_task("self", key="me", after=["me", "me"])
    root.drop_task("good", after=["good parent"])
    root.drop_task("later", key="good parent")
    root.start()
    for name in (f"{mine}.json", f"{other}.json", "self.json"):
        assert root.reason(name).startswith("after: there is no task with the id or key")
    root.comes_to("good", "done")


def test_a_child_whose_parent_is_still_being_written_waits_for_it(root: Family) -> None:
    path = root.dirs.inbox / "z-parent.json"
    with open(path, "w") as file:
        file.write('{"prompt": "parent", "title": "z-parent", ')
        file.flush()
        root.drop_task("child", after=["slow"])
        taken = ".take-*"
        until(lambda: list(root.dirs.inbox.glob(taken)), "the child is taken")
        time.sleep(4)  # longer than a scan: nothing to wait for, as nothing must happen
        assert not (root.dirs.rejected / "child.json").exists()
        file.write('"key": "slow"}')
    root.comes_to("child", "done")


def test_a_control_file_for_a_child_that_waits_in_the_inbox(root: Family) -> None:
    id = spool.new_id()
    path = root.dirs.inbox / "z-parent.json"
    with open(path, "w") as file:
        root.drop_task(id, title="child", after=["slow"])
        until(lambda: list(root.dirs.inbox.glob(".take-*")), "the child is taken")
        assert root.task(id)["state"] == "queued"
        (root.dirs.inbox / f"{id}.cancel").touch()
        file.write('{"prompt": "parent", "key": "slow"}')
    assert root.reaches(id, "cancelled")["started"] is None


def test_all_of_it_comes_back_from_the_ledger(root: Family) -> None:
    """Killed while they wait; the parent ends while no daemon is there to see it."""
    running = parent(root)
    child, both = root.submit("c", after=[running]), root.submit("b", after=[running])
    root.reaches(both, "waiting")
    count = len(root.kinds(child))
    root.restart()
    root.reaches(running, "done")
    root.reaches(child, "done")
    root.reaches(both, "done")
    assert root.kinds(child)[count:] == ["queued", "running", "done"]


def test_a_parent_that_ended_as_the_daemon_died(root: Family) -> None:
    """Its line is in the ledger, that of the child is not: as if killed in between."""
    running = parent(root)
    child = root.submit("c", after=[running])
    root.reaches(child, "waiting")
    root.run("task", "hold", child)
    until(lambda: root.task(child)["reason"] == "hold", "the hold")
    root.cancel(running)
    root.reaches(child, "failed")
    archived = root.dirs.archive / f"{child[:4]}-{child[4:6]}" / child
    until(archived.is_dir, "it is in the archive")
    root.kill()
    # Take the child's last line away again, and its record out of the archive.
    whole = root.dirs.ledger.read_bytes()
    lines = whole.splitlines(keepends=True)
    keep = [line for line in lines if not (child.encode() in line and b"**failed**" in line)]
    root.dirs.ledger.write_bytes(b"".join(keep))
    archived.rename(root.dirs.tasks / child)
    (root.dirs.tasks / child / "status.json").unlink()
    root.start()
    failed = root.reaches(child, "failed")
    assert f"it follows task {running} (parent), which is cancelled" in str(failed["message"])


def test_release(root: Family) -> None:
    """It frees a task that waits; one that was held goes back to what it waited for."""
    running = parent(root)
    child = root.submit("c", after=[running], not_before="1h")
    root.reaches(child, "waiting")
    for reason in ("hold", "after"):
        root.run("task", "hold" if reason == "hold" else "release", child)
        until(lambda reason=reason: root.task(child)["reason"] == reason, reason)
    root.run("task", "release", child)
    root.reaches(child, "done")
    assert root.task(running)["state"] == "running"


def test_release_of_one_that_was_not_taken_yet(root: Family) -> None:
    """The control file waits with the task's, and frees it before it can wait."""
    root.stop()
    first = root.submit("a", not_before="2h")
    free = [root.submit("t", not_before="2h"), root.submit("c", after=[first], not_before="2h")]
    assert root.run("task", "release", *free).returncode == 0
    root.start()
    for id in free:
        assert root.reaches(id, "done")["attempts"] == 1
    assert root.task(first)["reason"] == "not_before"
    until(lambda: not list(root.dirs.inbox.iterdir()), "an empty inbox")
    assert root.kinds(free[0]) == ["queued", "waiting", "queued", "running", "done"]


def test_a_child_holds_back_those_behind_it_in_its_session(root: Family) -> None:
    running = parent(root)
    child = root.submit("c", session="s", after=[running])
    behind = root.submit("b", session="s")
    beside = root.submit("o", session="t")
    root.reaches(beside, "done")
    assert (root.task(child)["state"], root.task(behind)["state"]) == ("waiting", "queued")
    root.cancel(running)
    root.reaches(child, "failed")
    root.reaches(behind, "done")


def test_what_is_remembered_of_parents_is_bounded(tmp_path: Path) -> None:
    dirs = Directories.below(tmp_path)
    spool.prepare(dirs)
    ledger = Ledger(dirs.ledger, dirs.checkpoint)
    known = parents.Parents(dirs, ledger)
    for n in range(parents._KNOWN + 10):
        told = known.came_to(f"20260102t030405-{n:010}") or {}
        assert (told["state"], told["message"]) == ("unknown", "its record is gone")
    assert len(known._ended) == parents._KNOWN
    ledger.close()


def test_hundreds_of_children(tmp_path: Path) -> None:
    """More than a round ends; what tests/test_waits.py has in the large."""
    many = 300
    with Family(tmp_path / "root") as root:
        running = parent(root)
        for n in range(many):
            name = f"{n:05}.json"
            (root.dirs.inbox / f".{name}.part").write_text(
                json.dumps({"prompt": "x", "after": [running]})
            )
            (root.dirs.inbox / f".{name}.part").rename(root.dirs.inbox / name)
        until(lambda: root.health().get("waiting") == many, "all wait", 120)
        began = time.monotonic()
        other = root.submit("o")
        root.reaches(other, "done")
        assert time.monotonic() - began < 10, "another task is not held up"
        (root.dirs.inbox / "all.hold").touch()
        until(lambda: "hold" in root.health()["gate"], "the hold")
        size = root.dirs.ledger.stat().st_size
        root.restart()
        until(lambda: root.health().get("waiting") == many, "all wait again", 30)
        grown = root.dirs.ledger.stat().st_size - size
        assert grown < 5000, "nothing is said again at a start"
        root.cancel(running)
        until(lambda: root.health().get("waiting") == 0, "all have failed", 300)
        assert sum(b"**failed**" in x for x in root.dirs.ledger.read_bytes().splitlines()) == many


# --- not_before ----------------------------------------------------------------------


def test_a_delay(root: Family) -> None:
    root.drop_task("d", not_before="8s")
    waits = root.comes_to("d", "waiting", "not_before")
    id = str(waits["id"])
    assert waits["reason"] == "not_before"
    told = clock.epoch(str(waits["until"])) - clock.epoch(str(waits["created"]))
    assert told == pytest.approx(8, abs=0.002)
    done = root.reaches(id, "done")
    late = clock.epoch(str(done["started"])) - clock.epoch(str(waits["until"]))
    assert -0.01 <= late < 5
    assert root.kinds(id) == ["queued", "waiting", "queued", "running", "done"]


def test_a_time_and_one_that_has_passed(root: Family) -> None:
    at = clock.stamp(time.time() + 8)
    root.drop_task("t", not_before=at)
    root.drop_task("l", not_before="2001-01-01T00:00")
    waits = root.comes_to("t", "waiting", "not_before")
    id = str(waits["id"])
    assert waits["until"] == at
    late = str(root.comes_to("l", "done")["id"])
    assert root.kinds(late) == ["queued", "running", "done"]
    done = root.reaches(id, "done")
    assert str(done["started"]) >= at


def test_a_wait_is_as_long_over_a_restart(root: Family) -> None:
    """No cap on it: retry.cap is for retries."""
    assert "cap" not in CONFIG
    (root.root / "codexd.yaml").write_text(CONFIG.replace("base: 1s", "base: 1s\n  cap: 1s"))
    root.restart()
    at = clock.stamp(time.time() + 15)
    root.drop_task("d", not_before="15s")
    root.drop_task("t", not_before=at)
    ids = [str(root.comes_to(title, "waiting", "not_before")["id"]) for title in ("d", "t")]
    root.restart()
    untils = [str(root.task(id)["until"]) for id in ids]
    assert untils[1] == at
    for id, end in zip(ids, untils, strict=True):
        done = root.reaches(id, "done")
        late = clock.epoch(str(done["started"])) - clock.epoch(end)
        assert -0.01 <= late < 5
        assert root.kinds(id) == ["queued", "waiting", "queued", "running", "done"]


def test_first_the_others_then_the_time(root: Family) -> None:
    running = parent(root)
    child = root.submit("c", after=[running], not_before="1h")
    root.reaches(child, "waiting")
    root.restart()
    root.reaches(running, "done")
    root.comes_to("task.json", "waiting", "not_before")
    root.run("task", "release", child)
    root.reaches(child, "done")


def test_too_far_ahead(root: Family) -> None:
    root.drop_task("far", not_before="2999-01-01T00:00Z")
    assert "is more than 366 days ahead" in root.reason("far.json")
