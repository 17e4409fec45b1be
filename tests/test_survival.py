"""What survives the end of the daemon and of the whole host, with systemd's own units.

Each test has a box of its own, because it ends it, or counts what is left in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest

from codexd.units import unit
from tests.box import Box
from tests.box.host import require
from tests.daemon import until
from tests.installed import ALICE, FAKE, SPOOL, STATE, Installed

pytestmark = [pytest.mark.xdist_group("box"), pytest.mark.timeout(400)]


@pytest.fixture
def box() -> Iterator[Box]:
    require("hybrid")
    with Box("hybrid") as box:
        yield box


def started(box: Box, codex: str = "", more: str = "") -> Installed:
    one = Installed(box, codex) if codex else Installed(box)
    if more:
        one.configure(one.config + more)
    box.run("systemctl", "enable", "--quiet", "codexd", "model")
    box.run("systemctl", "start", "codexd")
    return one


def ready(one: Installed, was: dict[str, str], running: int) -> bool:
    """Whether a master after `was` has replayed the ledger, and knows of the workers."""
    told = one.box.show("codexd", "InvocationID", "ActiveState", "StatusText")
    status = f"{running} running, 0 queued, 0 waiting"
    return (told["ActiveState"], told["StatusText"]) == ("active", status) and (
        told["InvocationID"] != was["InvocationID"]
    )


def test_fifty_kills_and_a_restart_of_the_master_do_not_touch_ten_tasks(box: Box) -> None:
    """Every other kill meets a master that has just begun, the others one that is at work."""
    one = started(box, more="workers: 10\n")
    names = [f"t{n}" for n in range(10)]
    for name in names:
        one.drop(f"[[hold {name}]]\n[[say of {name}]]", f"{name}.md")
    ids = {name: one.running(name) for name in names}
    before = one.invocations(ids.values())
    assert all(before.values())
    was = box.show("codexd", "InvocationID")
    box.run("systemctl", "restart", "codexd")
    until(lambda: ready(one, was, 10), "it has taken them over")
    for number in range(50):
        was = box.show("codexd", "InvocationID", "MainPID")
        box.run("kill", "-9", was["MainPID"])
        if number % 2:
            until(lambda was=was: ready(one, was, 10), "it has taken them over")  # type: ignore[misc]
        else:
            until(
                lambda was=was: (
                    box.show("codexd", "MainPID")["MainPID"] not in ("0", was["MainPID"])
                ),
                "it is back",
            )  # type: ignore[misc]
    assert one.invocations(ids.values()) == before
    for name in names:
        one.release(name)
    for name in names:
        task = one.ended(name)
        assert (task["state"], task["attempts"]) == ("done", 1)
        assert one.answer(name)[1] == f"of {name}\n"
    prompts = [turn["prompt"] for turn in one.asked()]
    asked = Counter(name for name in names for text in prompts if f"[[hold {name}]]" in text)
    assert asked == Counter(names), "none was run twice, in whatever thread"


@pytest.mark.parametrize("how", ["reboot", "slow reboot", "kill"])
def test_the_host_goes_down_in_mid_task(box: Box, how: str) -> None:
    one = started(box)
    if how == "slow reboot":  # the master sees how the worker ends, and D-Bus is gone before
        one.drop_in("codexd.service", "[Service]\nExecStop=/bin/sleep 2\n")
    one.drop("---\nsession: s\n---\n[[hold x]]\n[[say after it]]", "first.md")
    one.drop("---\nsession: s\n---\n[[say and then]]", "second.md")
    id = one.running("first")
    thread = until(lambda: _thread(one, id), "its thread")
    until(lambda: one.asked(), "the model was asked")
    if how == "kill":
        box.kill()
    else:
        box.poweroff()
    box.boot()
    one.release("x")
    task = one.ended("first")
    assert (task["state"], task["thread"]) == ("done", thread), "it went on in its thread"
    assert one.answer("first")[1] == "after it\n"
    second = one.ended("second")
    assert (second["state"], second["thread"]) == ("done", thread)
    resumed = [turn for turn in one.asked() if "hold x" in turn["prompt"]]
    assert len(resumed) == 1, "the model of this boot was asked once"
    assert "interrupted" in resumed[0]["prompt"], "and was told so"


def test_a_task_where_there_is_only_cgroup_v2() -> None:
    require("unified")
    with Box("unified") as box:
        one = started(box)
        one.drop("[[shell echo in $PWD]]\n[[say of v2]]", "two.md")
        task = one.ended("two")
        assert (task["state"], one.answer("two")[1]) == ("done", "of v2\n")
        assert task["cost"]["cpu_seconds"] > 0
        one.drop("---\nattempts: 1\n---\n[[shell sleep 1414]]", "killed.md")
        box.run("systemctl", "kill", "--signal=SIGKILL", unit(one.running("killed")))
        killed = one.ended("killed")
        assert (killed["outcome"], killed["cost"]["cpu_seconds"] > 0) == ("signal", True)


def _thread(one: Installed, id: str) -> str | None:
    found = one.box.run("cat", f"{STATE}/tasks/{id}/1/events.jsonl", check=False).stdout
    events = [json.loads(line) for line in found.splitlines() if line.startswith("{")]
    return next((e["thread_id"] for e in events if e.get("type") == "thread.started"), None)


def test_five_hundred_tasks_leave_nothing(box: Box) -> None:
    one = started(box, codex=FAKE, more="workers: 8\n")
    one.drop("the first makes what is made once", "first.md")
    one.ended("first")
    one.wait_gone()
    before = files(box)
    names = "".join(f"echo hello > {SPOOL}/inbox/t{n}.md\n" for n in range(500))
    box.run("sh", input=names, user=ALICE)
    count = ("sh", "-c", f"ls {SPOOL}/answers | wc -l")
    until(lambda: int(box.run(*count).stdout) == 501, "500 answers and one", 300)
    one.wait_gone()
    until(lambda: not files(box) - before, "no file is left", 10)
    groups = box.run("sh", "-c", "find /sys/fs/cgroup -name 'codexd-worker@*' | wc -l").stdout
    assert groups.strip() == "0"
    assert len(one.tasks("--state", "done")) == 50, "the list is short, the archive is not"


def files(box: Box) -> set[str]:
    """What should not grow with the tasks: temporary files, what runs, what waits."""
    places = ("/tmp", "/var/tmp", "/run", "/dev/shm", f"{STATE}/tasks", f"{SPOOL}/inbox")
    found = box.run(
        "find",
        *places,
        "-xdev",
        "-not",
        "-path",
        "/run/log/*",
        "-not",
        "-name",
        "invocation:polkit*",
        check=False,
    ).stdout
    hidden = box.run("find", STATE, SPOOL, "-name", ".*").stdout
    return set(found.splitlines()) | set(hidden.splitlines())
