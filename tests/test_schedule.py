"""Schedules: the program below a root, and its units in a booted systemd."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from codexd import schedule, spool, taskfile
from codexd.config import Directories
from codexd.ledger import Ledger
from codexd.model import Event, Kind, Resume
from tests.box import Box
from tests.box.host import require
from tests.daemon import until
from tests.installed import SPOOL, UNITS, Installed

DUE = 1_795_744_800.0  # 2026-11-27T02:00:00Z
STAMPS = "/var/lib/systemd/timers/stamp-codexd-schedule"
KEY = "nightly-20261127T020000Z"


# --- what it delivers ---------------------------------------------------------------------


@pytest.mark.parametrize("elapsed", [DUE, DUE + 0.000001, DUE + 0.999])
@pytest.mark.parametrize("late", [-1.0, 0.0, 2.0, 299.0])
def test_a_timer_s_time_is_the_key(elapsed: float, late: float) -> None:
    assert schedule.key("nightly", elapsed, elapsed + late) == KEY


@pytest.mark.parametrize("elapsed", [None, DUE - 301, DUE + 400])
def test_without_a_timer_it_is_the_minute(elapsed: float | None) -> None:
    assert schedule.key("nightly", elapsed, DUE + 59.9) == KEY
    assert schedule.key("nightly", elapsed, DUE + 60.0) != KEY


@pytest.mark.parametrize("elapsed", [None, DUE])
def test_who_mends_the_file_asks_for_another_task(elapsed: float | None) -> None:
    """As one who starts it, reads that it was rejected, and starts it again."""
    for changed, stamp in ((DUE - 1, "020000Z"), (DUE + 40, "020040Z"), (DUE + 60, "020000Z")):
        name = schedule.key("nightly", elapsed, DUE + 59, changed)
        assert name == f"nightly-20261127T{stamp}"


def test_a_timer_that_has_not_elapsed_yet(tmp_path: Path) -> None:
    """Its service, started by hand before: there is no stamp file."""
    assert schedule.elapsed(str(tmp_path / "stamp")) is None


def run(
    root: Path, name: str, *options: str, ago: float = 0.0
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run it as if its timer had elapsed so many seconds ago; what it did, and the key."""
    elapsed = time.time() - ago
    for file in (root / "schedules").glob("*.md"):
        os.utime(file, (elapsed - 1, elapsed - 1))
    (root / "stamp").touch()
    os.utime(root / "stamp", (elapsed, elapsed))
    command = [sys.executable, "-m", "codexd.schedule", "--root", root, "--stamp", root / "stamp"]
    command += options
    done = subprocess.run([*command, "--", name], capture_output=True, text=True, timeout=60)
    return done, schedule.key(name, elapsed, elapsed)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("inbox", "schedules"):
        (tmp_path / name).mkdir()
    return tmp_path


def inbox(root: Path) -> list[str]:
    return sorted(os.listdir(root / "inbox"))


def test_it_delivers_what_the_file_asks_for(root: Path) -> None:
    text = "---\nsession: web\npriority: 7\n---\nCheck the links: é.\n"
    (root / "schedules/nightly.md").write_text(text)
    done, key = run(root, "nightly")
    assert done.returncode == 0
    assert "schedule.delivered" in done.stderr
    assert f"key={key}" in done.stderr
    assert inbox(root) == [f"{key}.json"]
    found = taskfile.parse("x.json", (root / "inbox" / f"{key}.json").read_bytes())
    plain = taskfile.parse("nightly.md", text.encode())
    assert found == replace(plain, key=key)
    assert (found.session, found.priority) == ("web", 7)


def test_a_file_kept_elsewhere(root: Path) -> None:
    (root / "elsewhere.md").write_text("Hello.\n")
    (root / "schedules/nightly.md").symlink_to(root / "elsewhere.md")
    assert run(root, "nightly")[0].returncode == 0


def test_one_is_enough_to_catch_up(root: Path) -> None:
    for name in ("nightly", "nightly-2"):
        (root / f"schedules/{name}.md").write_text("Hello.\n")
    _, key = run(root, "nightly", ago=200)
    again, other = run(root, "nightly")
    assert again.returncode == 0
    assert key != other
    assert "warning schedule.skipped" in again.stderr
    assert f"{key}.json still lies in the inbox" in again.stderr
    assert inbox(root) == [f"{key}.json"]
    assert run(root, "nightly-2")[0].returncode == 0, "another schedule is another one"
    (root / "inbox" / f"{key}.json").unlink()
    _, third = run(root, "nightly")
    assert f"{third}.json" in inbox(root)


def test_one_that_is_just_being_taken_is_an_earlier_one(root: Path) -> None:
    (root / "schedules/nightly.md").write_text("---\noverlap: skip\n---\nHello.\n")
    (root / "tasks").mkdir()
    _, key = run(root, "nightly", ago=200)
    assert spool.claim(Directories.below(root), [(spool.new_id(), f"{key}.json")])
    again, _ = run(root, "nightly")
    assert again.returncode == 0
    assert f"{key}.json still lies in the inbox" in again.stderr
    assert len(inbox(root)) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        ("", "the file is empty"),
        ("---\nsesion: x\n---\nHello.\n", "line 2: sesion: unknown key"),
        ("---\nkey: mine\n---\nHello.\n", "keys of their own"),
    ],
)
def test_a_bad_file_fails_with_a_reason(root: Path, text: str | None, why: str) -> None:
    if text is not None:
        (root / "schedules/nightly.md").write_text(text)
    done, _ = run(root, "nightly")
    assert done.returncode == 1
    assert "error schedule.refused" in done.stderr
    assert why in done.stderr
    assert f"{root}/schedules/nightly.md" in done.stderr
    assert inbox(root) == []


# --- while earlier ones have not ended ----------------------------------------------------


def ledger_of(root: Path, *tasks: tuple[str, Kind | None]) -> None:
    """A ledger with tasks of these keys, each queued and then maybe moved on."""
    at = "2026-11-27T02:00:00.000Z"
    events = []
    for n, (key, kind) in enumerate(tasks):
        id = f"20261127t020000-{n:010}"
        events.append(Event(at, Kind.QUEUED, id, {"file": "x.json", "key": key}))
        events += [Event(at, kind, id)] if kind else []
    book = Ledger(root / "tasks.md", root / "checkpoint.json")
    book.append(events)
    book.close()


RUNS, WAITS, ENDED = Kind.RUNNING, Kind.WAITING, Kind.CANCELLED


@pytest.mark.parametrize(
    ("overlap", "tasks", "delivered"),
    [
        (None, [(KEY, RUNS), (KEY, None)], True),
        ("skip", [], True),
        ("skip", [(KEY, ENDED)], True),
        ("skip", [(KEY, RUNS)], False),
        ("skip", [(KEY, WAITS)], False),
        ("skip", [("nightly-2-20261127T020000Z", None), ("nightly", None), ("", None)], True),
        ("queue", [(KEY, RUNS)], True),
        ("queue", [(KEY, RUNS), (KEY, None)], False),
        ("queue", [(KEY, WAITS)], False),
        ("queue", [(KEY, None)], False),
    ],
)
def test_overlap(
    root: Path, overlap: str | None, tasks: list[tuple[str, Kind | None]], delivered: bool
) -> None:
    key = f"overlap: {overlap}\n" if overlap else ""
    (root / "schedules/nightly.md").write_text(f"---\n{key}priority: 7\n---\nHello.\n")
    ledger_of(root, *tasks)
    done, due = run(root, "nightly")
    assert done.returncode == 0, done.stderr
    assert bool(inbox(root)) == delivered
    if delivered:
        found = taskfile.parse("x.json", (root / "inbox" / f"{due}.json").read_bytes())
        queued = overlap == "queue"
        assert (found.priority, found.session) == (7, "nightly" if queued else None)
        assert found.resume is (Resume.NEVER if queued else Resume.AUTO)
    else:
        assert "notice schedule.skipped" in done.stderr
        assert f"of {KEY} is" in done.stderr
        assert f"(overlap: {overlap})" in done.stderr


def test_a_session_of_its_own_stays(root: Path) -> None:
    text = "---\noverlap: queue\nsession: web\n---\nHello.\n"
    (root / "schedules/nightly.md").write_text(text)
    _, due = run(root, "nightly")
    found = taskfile.parse("x.json", (root / "inbox" / f"{due}.json").read_bytes())
    assert (found.session, found.resume) == ("web", Resume.AUTO)


def test_what_has_not_ended_must_be_known(root: Path) -> None:
    (root / "schedules/nightly.md").write_text("---\noverlap: skip\n---\nHello.\n")
    (root / "tasks.md").mkdir()
    done, _ = run(root, "nightly")
    assert done.returncode == 1
    assert "error schedule.refused" in done.stderr
    assert inbox(root) == []


def test_overlap_is_no_key_of_a_task(root: Path) -> None:
    text = "---\noverlap: later\n---\nHello.\n"
    (root / "schedules/nightly.md").write_text(text)
    done, _ = run(root, "nightly")
    assert "line 2: overlap: found 'later'; allowed: skip, queue" in done.stderr
    (root / "schedules/good.md").write_text(text.replace("later", "skip"))
    (root / "good.md").write_text(text.replace("later", "skip"))
    check = [sys.executable, "-m", "codexd.cli", "--root", root, "check"]
    found = [
        subprocess.run([*check, path], capture_output=True, text=True, timeout=60)
        for path in (root / "schedules/good.md", root / "good.md")
    ]
    assert [one.returncode for one in found] == [0, 1]
    assert "overlap: unknown key" in found[1].stdout


def test_an_inbox_that_is_missing(root: Path) -> None:
    (root / "schedules/nightly.md").write_text("Hello.\n")
    (root / "inbox").rmdir()
    done, _ = run(root, "nightly")
    assert done.returncode == 1
    assert f"{root}/inbox: No such file" in done.stderr


@pytest.mark.parametrize("name", ["", "../x", ".x", "-x", "a/b", "a b", "x" * 62, "é", "a\n"])
def test_names_that_no_schedule_has(root: Path, name: str) -> None:
    done, _ = run(root, name)
    assert done.returncode == 2
    assert "is no schedule's name" in done.stderr


def test_a_root_that_is_no_directory(root: Path) -> None:
    (root / "file").touch()
    done, _ = run(root, "nightly", "--root", str(root / "file"))
    assert done.returncode == 2
    assert "it must be a directory" in done.stderr


# --- its units ----------------------------------------------------------------------------


def test_the_units_are_verified_in_silence(tmp_path: Path) -> None:
    for path in UNITS.glob("codexd-schedule@.*"):
        text = path.read_text().replace("/usr/lib/codexd/codexd-schedule", "/bin/true")
        if path.suffix == ".timer":
            text += "\n[Timer]\nOnCalendar=daily\n"
        (tmp_path / path.name.replace("@", "@nightly")).write_text(text)
    for path in UNITS.glob("codexd*.slice"):
        (tmp_path / path.name).write_text(path.read_text())
    names = [str(path) for path in tmp_path.glob("*@*")]
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_service_is_hardened() -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=5"]
    unit = UNITS / "codexd-schedule@.service"
    done = subprocess.run([*command, str(unit)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.fixture(scope="module")
def codexd() -> Iterator[Installed]:
    require("hybrid")
    with Box("hybrid") as box:
        one = Installed(box)
        box.run("systemctl", "start", "codexd")
        box.run("mkdir", "-p", Path(STAMPS).parent.as_posix())  # systemd's first timer does it
        yield one


def add(one: Installed, name: str, text: str, timer: str) -> None:
    one.box.push({f"{SPOOL}/schedules/{name}.md": text})
    one.drop_in(f"codexd-schedule@{name}.timer", f"[Timer]\n{timer}\n")


def active(one: Installed, name: str) -> bool:
    state = one.box.show(f"codexd-schedule@{name}.service", "ActiveState")["ActiveState"]
    return state in ("active", "activating")


def delivered(one: Installed, name: str) -> list[str]:
    """The keys of all that a schedule delivered."""
    match = ("CODEXD_EVENT=schedule.delivered", f"_SYSTEMD_UNIT=codexd-schedule@{name}.service")
    found = [re.search(r" key=(\S+)", record["MESSAGE"]) for record in one.box.journal(*match)]
    return [one[1] for one in found if one]


def done(one: Installed, name: str, at_least: int) -> list[dict[str, object]]:
    """The tasks of a schedule that are done, once there are so many."""

    def look() -> list[dict[str, object]]:
        found = [t for t in one.tasks() if str(t["key"]).startswith(f"{name}-")]
        return found if len([t for t in found if t["state"] == "done"]) >= at_least else []

    return until(look, f"{at_least} tasks of {name}", 60)


@pytest.mark.xdist_group("box")
def test_a_timer_s_tasks_are_done(codexd: Installed) -> None:
    add(codexd, "often", "[[say on time]]", "OnCalendar=*:*:0/2\nRandomizedDelaySec=0")
    codexd.box.run("systemctl", "enable", "--now", "codexd-schedule@often.timer")
    found = done(codexd, "often", 2)
    codexd.box.run("systemctl", "disable", "--now", "codexd-schedule@often.timer")
    keys = [str(t["key"]) for t in found]
    assert len(set(keys)) == len(keys)
    assert codexd.box.journal("CODEXD_EVENT=repeated") == []
    until(lambda: not active(codexd, "often"), "the last one has ended")
    stamp = codexd.box.run("stat", "--format=%Y", f"{STAMPS}@often.timer").stdout
    last = schedule.key("often", float(stamp), float(stamp))
    assert delivered(codexd, "often")[-1] == last, "the time at which it was due"


@pytest.mark.xdist_group("box")
def test_a_repeat_does_nothing(codexd: Installed) -> None:
    """Started by hand in the minutes after its timer elapsed."""
    add(codexd, "hand", "[[say by hand]]", "OnCalendar=yearly")
    codexd.box.run("touch", "--date=2 hours ago", f"{SPOOL}/schedules/hand.md")
    codexd.box.run("touch", f"{STAMPS}@hand.timer")
    for _ in range(2):
        codexd.box.run("systemctl", "start", "codexd-schedule@hand.service")
        until(lambda: not codexd.box.run("ls", f"{SPOOL}/inbox").stdout, "it is taken")
    assert len(set(delivered(codexd, "hand"))) == 1
    assert len(done(codexd, "hand", 1)) == 1
    assert len(codexd.box.journal("CODEXD_EVENT=repeated")) == 1
    codexd.box.run("touch", "--date=1 hour ago", f"{STAMPS}@hand.timer")
    codexd.box.run("systemctl", "start", "codexd-schedule@hand.service")
    assert len(done(codexd, "hand", 2)) == 2, "later it is wanted"


@pytest.mark.xdist_group("box")
def test_what_was_due_while_off_is_made_up_for_once(codexd: Installed) -> None:
    add(codexd, "missed", "[[say better late]]", "OnCalendar=daily\nRandomizedDelaySec=0")
    stamp = f"{STAMPS}@missed.timer"
    codexd.box.run("touch", "--date=30 days ago", stamp)
    codexd.box.run("systemctl", "start", "codexd-schedule@missed.timer")
    assert len(done(codexd, "missed", 1)) == 1
    when = codexd.box.run("stat", "--format=%y", stamp).stdout
    codexd.box.run("systemctl", "restart", "codexd-schedule@missed.timer")
    codexd.box.run("systemctl", "stop", "codexd-schedule@missed.timer")
    assert codexd.box.run("stat", "--format=%y", stamp).stdout == when, "it did not elapse again"
    assert len(delivered(codexd, "missed")) == 1


@pytest.mark.xdist_group("box")
def test_the_unit_may_read_the_ledger(codexd: Installed) -> None:
    """And of the state nothing else that matters."""
    add(
        codexd,
        "lonely",
        "---\noverlap: skip\n---\n[[hold lonely]][[say done]]",
        "OnCalendar=yearly",
    )
    for _ in range(2):
        codexd.box.run("systemctl", "start", "codexd-schedule@lonely.service")
        until(lambda: not codexd.box.run("ls", f"{SPOOL}/inbox").stdout, "it is taken")
    match = ("CODEXD_EVENT=schedule.skipped", "_SYSTEMD_UNIT=codexd-schedule@lonely.service")
    assert "(overlap: skip)" in codexd.box.journal(*match)[0]["MESSAGE"]
    assert len(delivered(codexd, "lonely")) == 1
    codexd.release("lonely")
    done(codexd, "lonely", 1)


@pytest.mark.xdist_group("box")
def test_a_bad_file_is_told(codexd: Installed) -> None:
    notify = "#!/bin/sh\necho $1 > /run/notified\n"
    codexd.box.push({"/etc/codexd/notify": notify}, mode=0o755)
    codexd.box.push({f"{SPOOL}/schedules/bad.md": "---\nsesion: x\n---\nHello.\n"})
    unit = "codexd-schedule@bad.service"
    assert codexd.box.run("systemctl", "start", unit, check=False).returncode == 1
    assert codexd.box.show(unit, "Result")["Result"] == "exit-code"
    (told,) = codexd.box.journal("CODEXD_EVENT=schedule.refused")
    assert "line 2: sesion" in told["MESSAGE"]
    assert told["PRIORITY"] == "3"
    read = ("cat", "/run/notified")
    said = until(lambda: codexd.box.run(*read, check=False).stdout, "somebody is told")
    assert said == "codexd-schedule@bad\n"
    codexd.box.run("rm", "/etc/codexd/notify")


@pytest.mark.xdist_group("box")
def test_it_can_write_nothing_but_the_inbox(codexd: Installed) -> None:
    """The unit's own surroundings, with another program in it."""
    where = f"{SPOOL}/* /var/lib/codexd /var /tmp/.. /etc /run"
    look = f"for d in {where}; do [ -w $$d ] && echo $$d; done; true"
    start = f"[Service]\nExecStart=\nExecStart=/bin/sh -c '{look}'\n"
    codexd.drop_in("codexd-schedule@probe.service", f"{start}StandardOutput=file:/run/probe\n")
    codexd.box.run("systemctl", "start", "codexd-schedule@probe.service")
    assert codexd.box.pull("/run/probe").decode().split() == [f"{SPOOL}/inbox"]
