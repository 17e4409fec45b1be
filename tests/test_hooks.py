"""Hooks: what is owed, in which order it is told, and that nothing is forgotten or held up."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codexd import config, delivery, durable, errands, hook, spool
from codexd.config import Directories
from codexd.delivery import Occasion, Owed
from codexd.errands import Children
from codexd.hooks import SILENCE, Hooks
from codexd.ledger import Follower, Ledger
from codexd.model import Event, Kind, Note, is_id
from tests.box import Box
from tests.box.host import require
from tests.daemon import Daemon, until
from tests.installed import FAKE as FAKE_THERE
from tests.installed import SPOOL, STATE, Installed
from tests.test_bad_input import Mortal

FAKE = Path(__file__).resolve().parent / "bin/codex"
AT = "2026-11-23T07:20:11.123Z"
SOON, LATER = "2026-11-23T07:21:00.000Z", "2026-11-23T08:00:00.000Z"
A, B, C = (f"20261123t07201{n}-aaaaaaaaaa" for n in range(3))
QUICK = f"codex:\n  bin: {FAKE}\nhttp:\n  listen: off\nretry:\n  base: 1s\n  cap: 1s\n"


# --- what is owed -------------------------------------------------------------------------


def event(kind: Kind | Note, id: str = "", **facts: object) -> Event:
    return Event(AT, kind, id, facts)


def keys(events: list[Event], *wanted: Occasion, gate: tuple[str, ...] = ()) -> list[str]:
    found = delivery.owing(events, wanted or tuple(Occasion), gate)
    assert all(one.kind is Note.OWED for one in found)
    return [str(one.facts["event"]) for one in found]


def test_the_end_of_a_task_is_owed() -> None:
    events = [event(Kind.QUEUED, A), event(Kind.RUNNING, A), event(Kind.WAITING, A)]
    events += [event(Kind.DONE, A), event(Kind.FAILED, B), event(Kind.CANCELLED, C)]
    assert keys(events) == [f"{A}.done", f"{B}.failed", f"{C}.cancelled"]
    assert keys(events, Occasion.FAILED) == [f"{B}.failed"]


def test_a_gate_that_is_closed_already_is_no_news() -> None:
    closed = [event(Note.CLOSED, reason="quota", until=u) for u in (AT, "later")]
    assert len(keys(closed)) == 1
    assert keys(closed, gate=("quota",)) == []
    again = [*closed, event(Note.OPENED, reason="quota"), event(Note.CLOSED, reason="quota")]
    assert [key.partition(".")[2] for key in keys(again)] == ["closed", "opened", "closed"]


def test_an_event_of_no_task_gets_an_id_of_its_own() -> None:
    """It names a unit: the form is that of a task's."""
    files = [{"file": name, "id": A, "reason": "empty"} for name in ("one", "two")]
    events = [Event(AT, Note.REJECTED, facts=facts) for facts in files]
    found = keys(events)
    assert len(set(found)) == 2
    assert found == keys(events)
    for key in found:
        assert is_id(key.partition(".")[0])


def owed(id: str, occasion: Occasion = Occasion.DONE, tries: int = 0, about: str = "") -> Owed:
    return Owed(id, occasion, AT, about or id, {}, tries)


def chosen(
    *all: Owed, ready: int = 9, busy: set[str] | None = None, rest: set[str] | None = None
) -> list[str]:
    found = delivery.choose(all, busy or set(), dict.fromkeys(Occasion, ready), rest or set())
    return [one.key for one in found]


def test_who_was_tried_least_comes_first() -> None:
    assert chosen(owed(A, tries=3), owed(B), owed(C, tries=1), ready=2) == [
        f"{B}.done",
        f"{C}.done",
    ]


def test_a_later_event_waits_for_the_one_before() -> None:
    closed, opened = (
        owed(A, Occasion.CLOSED, about="quota"),
        owed(B, Occasion.OPENED, about="quota"),
    )
    other = owed(C, Occasion.OPENED, about="disk")
    assert chosen(closed, opened, other) == [closed.key, other.key]
    assert chosen(closed, opened, other, busy={closed.key}) == [other.key]
    assert chosen(closed, opened, rest={closed.key}) == []
    assert chosen(opened) == [opened.key]


def test_there_is_room_for_each_occasion() -> None:
    many = [owed(A), owed(B), owed(C, Occasion.FAILED)]
    ready = {Occasion.DONE: 1, Occasion.FAILED: 0}
    assert [one.key for one in delivery.choose(many, set(), ready, set())] == [f"{A}.done"]


def test_a_summary_is_one_line_of_a_person_s_words() -> None:
    told = {"title": "fix\nlinks\x1b[2J", "message": "no turn\nmore"}
    text = delivery.summary(owed(A, Occasion.FAILED), told)
    assert text == "codexd: fix links [2J failed: no turn"
    assert delivery.summary(owed(A), {"file": "a.md", "message": None}) == "codexd: a.md done"


def test_a_summary_says_whom_a_gate_holds() -> None:
    closed, opened = owed(A, Occasion.CLOSED), owed(A, Occasion.OPENED)
    told = {"reason": "quota", "message": "usage limit"}
    one = {**told, "reason": "quota:cheap"}
    assert delivery.summary(closed, told) == "codexd: all work is held: quota: usage limit"
    text = "codexd: tasks with profile cheap are held: quota: usage limit"
    assert delivery.summary(closed, one) == text
    assert delivery.summary(opened, one) == "codexd: no longer held for quota:cheap"


# --- the ledger ---------------------------------------------------------------------------


def line(kind: Note, id: str, **facts: object) -> Event:
    return Event(AT, kind, facts={"event": f"{id}.done", **facts})


@pytest.fixture
def books(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "tasks.md", tmp_path / "checkpoint.json"


def test_what_is_owed_is_in_the_batch_that_says_why(books: tuple[Path, Path]) -> None:
    ledger = Ledger(*books)
    ledger.owing = lambda events, gate: delivery.owing(events, tuple(Occasion), gate)
    ledger.append([Event(AT, Kind.QUEUED, A, {"file": "a.md"})])
    tasks = ledger.append([event(Kind.FAILED, A, outcome="config")])
    assert len(tasks) == 1
    assert list(ledger.book.owed) == [f"{A}.failed"]
    assert A not in ledger.book.tasks


@pytest.mark.parametrize("marked", range(7))
def test_it_survives_a_start(books: tuple[Path, Path], marked: int) -> None:
    """With the checkpoint taken anywhere."""
    ledger = Ledger(*books)
    events = [
        line(Note.OWED, A), line(Note.OWED, B), line(Note.DEFERRED, B, tries=1, until=SOON),
        line(Note.TOLD, A), line(Note.DEFERRED, B, tries=2, until=LATER), line(Note.OWED, C),
    ]  # fmt: skip
    for n, one in enumerate(events):
        if n == marked:
            ledger.checkpoint()
        ledger.append([one])
    wanted = {f"{B}.done": replace(owed(B), tries=2, until=LATER), f"{C}.done": owed(C)}
    assert ledger.book.owed == wanted
    reader = Follower(*books)
    reader.refresh()
    assert reader.book.owed == wanted
    ledger.append([line(Note.UNTOLD, B), line(Note.TOLD, C)])
    reader.refresh()
    assert reader.book.owed == {}
    assert not reader.book.damaged
    ledger.close()


def test_what_is_owed_no_longer_is_not_put_off(books: tuple[Path, Path]) -> None:
    """The line that says so may be the damaged one."""
    ledger = Ledger(*books)
    ledger.append([line(Note.DEFERRED, B, tries=1, until=SOON)])
    assert ledger.book.owed == {}
    ledger.close()


def test_a_damaged_line_is_reported(books: tuple[Path, Path]) -> None:
    ledger = Ledger(*books)
    ledger.append([line(Note.OWED, A), line(Note.TOLD, A)])
    ledger.close()
    books[0].write_bytes(books[0].read_bytes().replace(b"told", b"t0ld"))
    again = Ledger(*books)
    assert len(again.book.damaged) == 1
    assert list(again.book.owed) == [f"{A}.done"], "told once more rather than never"


# --- one run ------------------------------------------------------------------------------


def order(place: Path, *command: str, limit: float = 20.0, **env: str) -> dict[str, Any]:
    """Run a command as the master's order; the result."""
    place.mkdir(exist_ok=True)
    (place / hook.STDIN).write_text('{"id": "x"}\n')
    asked = {"event": "x.done", "command": list(command), "env": env, "limit": limit}
    durable.write_json(place / hook.ORDER, asked)
    hook.run(place)
    return durable.read_json(place / hook.RESULT)


def test_a_command_gets_the_event_and_nothing_of_ours(tmp_path: Path) -> None:
    os.environ["CODEXD_CANARY"] = "x"
    found = order(tmp_path, "/bin/sh", "-c", "cat; env; pwd", PATH="/bin", CODEXD_STATE="done")
    assert found["problem"] is None
    said = found["output"].splitlines()
    assert said[0] == '{"id": "x"}'
    assert {one.partition("=")[0] for one in said[1:-1]} <= {
        "PATH",
        "CODEXD_STATE",
        "PWD",
        "_",
        "OLDPWD",
        "SHLVL",
    }
    assert said[-1] == "/"


@pytest.mark.parametrize(
    ("command", "limit", "problem"),
    [
        ("echo no; exit 3", 30, "exit status 3"),
        ("echo no; kill -9 $$", 30, "killed by signal 9"),
        ("echo no; sleep 60", 2, "it did not end within 2 s, and was killed"),
        (
            "echo no; trap '' TERM; sleep 60 & wait; wait",
            2,
            "it did not end within 2 s, and was killed",
        ),
    ],
)
def test_what_went_wrong_is_told(tmp_path: Path, command: str, limit: int, problem: str) -> None:
    assert order(tmp_path, "/bin/sh", "-c", command, limit=limit) == {
        "event": "x.done", "problem": problem, "output": "no\n",
    }  # fmt: skip


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    found = order(tmp_path, f"{tmp_path}/none")
    assert found["problem"] == f"cannot be run: No such file or directory: {tmp_path}/none"


def test_the_end_of_much_output_is_kept(tmp_path: Path) -> None:
    found = order(tmp_path, "/bin/sh", "-c", "yes | head -c 9000000; echo the end")
    assert found["output"].endswith("y\nthe end\n")
    assert len(found["output"]) <= hook.KEPT


def test_who_holds_its_output_does_not_hold_it_up(tmp_path: Path) -> None:
    began = time.monotonic()
    found = order(tmp_path, "/bin/sh", "-c", "sleep 300 & echo $!")
    assert found["problem"] is None
    assert time.monotonic() - began < 10
    until(lambda: not Path(f"/proc/{found['output'].strip()}/fd/0").exists(), "it is ended, too")


def test_an_event_with_a_result_is_not_told_again(tmp_path: Path) -> None:
    command = ("/bin/sh", "-c", f"echo . >> {tmp_path}/runs")
    order(tmp_path, *command)
    order(tmp_path, *command)
    assert (tmp_path / "runs").read_text() == ".\n"


def test_a_result_is_believed_of_its_own_event_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert errands.result(run, "x.done") is None
    order(run, "/bin/sh", "-c", "echo yes")
    assert errands.result(run, "x.done") == (None, "yes\n")
    assert errands.result(run, "x.failed") is None
    (run / hook.RESULT).write_text("{")
    problem, _ = errands.result(run, "x.done") or ("", "")
    assert str(problem).startswith("its result is damaged: ")
    for _ in range(2):
        errands.end(run)  # also once more, after a crash
    assert not run.exists()


def test_what_ended_a_unit_without_a_result_is_told(tmp_path: Path) -> None:
    """As systemd calls it then (ExecStopPost=)."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "codexd.hook", "--ended", str(run)]

    def ended(how: str) -> None:
        env = {**os.environ, "SERVICE_RESULT": how}
        subprocess.run(command, env=env, check=True, timeout=20)

    ended("success")
    assert not run.exists(), "the master had seen it all"
    errands.begin(run, "x.done", ["/bin/true"], {}, 20, {})
    ended("oom-kill")
    told = "its unit ended without a result: oom-kill"
    assert errands.result(run, "x.done") == (told, "")
    hook.leave(run, "x.done", None, "fine")
    ended("success")
    assert errands.result(run, "x.done") == (None, "fine")


@pytest.mark.parametrize(
    ("systemctl", "why"),
    [
        ("echo 'Failed: no such unit' >&2; echo more >&2; exit 5", "Failed: no such unit"),
        ("exec sleep 300", "systemctl did not answer within 0.2 s"),
        ("exit 0", None),
    ],
)
def test_a_unit_that_systemd_does_not_start_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, systemctl: str, why: str | None
) -> None:
    """What is asked is a stand-in for systemctl."""
    tool = tmp_path / "systemctl"
    tool.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/asked\n{systemctl}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(errands, "DEADLINE", 20.0 if "sleep" not in systemctl else 0.2)
    runs = errands.Instances(systemwide=True)
    assert runs.lost(A) is None
    runs.start(A, tmp_path)
    found: list[str | None] = []

    def over() -> bool:
        found.append(runs.lost(A))
        return runs.pause(0.0) == math.inf  # there is no call to wait for

    until(over, "the end of the call")
    assert found[-1] == why
    if why is None:
        asked = (tmp_path / "asked").read_text()
        assert asked.endswith(f" --system start -- codexd-hook@{A}.service\n")


def test_an_order_that_is_none_is_refused(tmp_path: Path) -> None:
    asked = {"event": "x.done", "command": "rm -r x", "env": {}, "limit": 20}
    durable.write_json(tmp_path / hook.ORDER, asked)
    with pytest.raises(ValueError, match="no command"):
        hook.run(tmp_path)
    assert not (tmp_path / hook.RESULT).exists()


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / hook.STDIN).write_text("{}")
    asked = {"event": "x.done", "command": ["/bin/sleep", "300"], "env": {}, "limit": 300}
    durable.write_json(tmp_path / hook.ORDER, asked)
    code = (
        "import os, subprocess, sys, time\n"
        "run = [sys.executable, '-m', 'codexd.hook', '--parent', str(os.getpid()), sys.argv[1]]\n"
        "subprocess.Popen(run)\ntime.sleep(300)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])

    def sleeper() -> list[int]:
        pids = [int(n) for n in os.listdir("/proc") if n.isdigit()]
        return [pid for pid in pids if _told(pid) == tmp_path / hook.STDIN]

    found = until(sleeper, "the command runs")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not any(map(_told, found)), "it has ended")
    assert not (tmp_path / hook.RESULT).exists()


def test_what_leaves_the_command_s_group_ends_too(tmp_path: Path) -> None:
    (tmp_path / hook.STDIN).write_text("{}")
    command = ["/bin/sh", "-c", "setsid sleep 300 > /dev/null & echo $!"]
    asked = {"event": "x.done", "command": command, "env": {"PATH": os.defpath}, "limit": 20}
    durable.write_json(tmp_path / hook.ORDER, asked)
    subprocess.run([sys.executable, "-m", "codexd.hook", str(tmp_path)], check=True, timeout=20)
    found = durable.read_json(tmp_path / hook.RESULT)
    assert found["problem"] is None
    assert not Path(f"/proc/{str(found['output']).strip()}").exists()


def told_by_program(place: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "codexd.hook", *options, str(place)],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=20,
    )  # fmt: skip


def test_an_order_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    done = told_by_program(tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith(f"codexd-hook: {tmp_path}: ")


def test_without_its_daemon_it_does_not_begin(tmp_path: Path) -> None:
    assert told_by_program(tmp_path, "--parent", str(1 << 30)).returncode == os.EX_TEMPFAIL


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_what_another_user_runs_does_not_hold_it_up(tmp_path: Path) -> None:
    """As of a command with sudo, which a hook without privileges cannot kill."""
    leave = (
        "setsid setpriv --reuid=65534 sleep 300 > /dev/null &\n"
        "until [ $(stat -c %u /proc/$!) = 65534 ]; do :; done; echo $!"
    )
    asked = {"event": "x.done", "command": ["sh", "-c", leave], "env": dict(os.environ)}
    (tmp_path / hook.STDIN).write_text("{}")
    durable.write_json(tmp_path / hook.ORDER, {**asked, "limit": 20})
    run = [sys.executable, "-m", "codexd.hook", str(tmp_path)]
    subprocess.run(["setpriv", "--bounding-set=-kill", *run], check=True, timeout=20)
    found = durable.read_json(tmp_path / hook.RESULT)
    assert found["problem"] is None
    os.kill(int(str(found["output"])), signal.SIGKILL)


def test_of_a_unit_that_was_killed_its_end_is_told(tmp_path: Path) -> None:
    """As ExecStopPost= has it: the bell rings, and nobody is waited for who does not listen."""
    os.mkfifo(tmp_path / ".bell")
    env = {"CODEXD_BELL": str(tmp_path / ".bell"), "SERVICE_RESULT": "signal"}
    assert told_by_program(tmp_path, "--ended", **env).returncode == 0
    assert not (tmp_path / hook.RESULT).exists(), "nobody has ordered anything"
    durable.write_json(tmp_path / hook.ORDER, {"event": "x.done"})
    assert told_by_program(tmp_path, "--ended", **env).returncode == 0
    found = durable.read_json(tmp_path / hook.RESULT)
    assert found["problem"] == "its unit ended without a result: signal"
    bell = os.open(tmp_path / ".bell", os.O_RDWR | os.O_NONBLOCK)
    assert told_by_program(tmp_path, "--ended", **env).returncode == 0
    assert os.read(bell, 10) == b"."
    os.close(bell)
    assert durable.read_json(tmp_path / hook.RESULT) == found


def _told(pid: int) -> Path | None:
    """What a process reads as its input."""
    try:
        return Path(os.readlink(f"/proc/{pid}/fd/0"))
    except OSError:
        return None


# --- configuration ------------------------------------------------------------------------


def read(tmp_path: Path, text: str) -> config.Config:
    (tmp_path / "codexd.yaml").write_text(text)
    return config.load(config.Directories.below(tmp_path), explicit=True)


def test_commands_are_words_without_a_shell(tmp_path: Path) -> None:
    found = read(tmp_path, "on:\n  done: /bin/x 'a b' $HOME > y\n  opened: /bin/z\n")
    assert found.on == {
        Occasion.DONE: ("/bin/x", "a b", "$HOME", ">", "y"),
        Occasion.OPENED: ("/bin/z",),
    }


@pytest.mark.parametrize("wrong", ["mail", "''", "/bin/x 'a", "[/bin/x]", "./x", "relative/x"])
def test_what_is_no_command_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(config.ConfigError, match=r"codexd.yaml:2: on\.done: found .*absolute path"):
        read(tmp_path, f"on:\n  done: {wrong}\n")


# --- with a daemon ------------------------------------------------------------------------

_HOOK = """\
#!/bin/sh
# Keeps what it is told, and then says whether it took it.
cd {place} || exit 9
echo "$CODEXD_EVENT_ID $CODEXD_STATE $CODEXD_TASK" >> tried
[ ! -e down ] || {{ echo "the service is down" >&2; exit 1; }}
[ ! -e "not-$CODEXD_TASK" ] || exit 4
cat > "$CODEXD_EVENT_ID.json.$$" && mv "$CODEXD_EVENT_ID.json.$$" "$CODEXD_EVENT_ID.json"
echo "$CODEXD_EVENT_ID" >> told
echo "$CODEXD_SUMMARY" >> summaries
"""


class Told:
    """A daemon whose hooks write down what they are told."""

    def __init__(self, tmp_path: Path, more: str = "") -> None:
        self.place = tmp_path / "hook"
        self.place.mkdir()
        program = self.place / "hook"
        program.write_text(_HOOK.format(place=self.place))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        on = "".join(f"  {o}: {program} {o}\n" for o in Occasion)
        self.daemon = Daemon(tmp_path / "root", config=f"{QUICK}{more}on:\n{on}")

    def lines(self, name: str) -> list[str]:
        path = self.place / name
        return path.read_text().splitlines() if path.exists() else []

    def mend(self) -> None:
        (self.place / "down").unlink()

    def settled(self) -> bool:
        """Whether nothing is owed any more."""
        reader = Follower(self.daemon.dirs.ledger)
        reader.refresh()
        reader.close()
        return not reader.book.owed


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    one = Told(tmp_path)
    yield one
    one.daemon.kill()


def test_the_end_of_a_task_is_told(told: Told) -> None:
    with told.daemon as daemon:
        daemon.drop("a.md", "---\ntitle: A greeting\n---\nhello")
        daemon.drop("b.md", "")
        daemon.answer("a")
        until(lambda: len(told.lines("told")) == 2, "both are told")
        until(told.settled, "the ledger says so")
        id = daemon.tasks()[0]["id"]
        assert json.loads((told.place / f"{id}.done.json").read_text()) == daemon.json(
            "task", "show", id
        )
        (rejected,) = [key for key in told.lines("told") if key.endswith(".rejected")]
        facts = json.loads((told.place / f"{rejected}.json").read_text())
        assert (facts["state"], facts["file"]) == ("rejected", "b.md")
        assert "codexd: A greeting done" in told.lines("summaries")
        assert f"{id}.done done {id}" in told.lines("tried")
        log = (daemon.dirs.archive / f"{id[:4]}-{id[4:6]}" / id / "hook-done.log").read_text()
        assert log.endswith(f"{id}.done: told\n")
        assert os.listdir(daemon.dirs.hooks) == []


def test_the_gate_is_told(told: Told) -> None:
    with told.daemon as daemon:
        daemon.run("hold")
        until(lambda: told.lines("told"), "its closing is told")
        daemon.run("release")
        until(lambda: len(told.lines("told")) == 2, "and its opening")
        assert [key.partition(".")[2] for key in told.lines("told")] == ["closed", "opened"]
        assert told.lines("summaries")[1] == "codexd: no longer held for hold"
        assert {one.split()[1] for one in told.lines("tried")} == {"closed", "opened"}


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_hook_that_fails_across_restarts(told: Told, how: str) -> None:
    """Each event at least once, with its id, of one thing in order."""
    (told.place / "down").touch()
    daemon = told.daemon
    with daemon:
        for n in range(4):
            daemon.drop(f"t{n}.md", f"task {n}")
        for n in range(4):
            daemon.answer(f"t{n}")
        daemon.run("hold")
        daemon.run("release")
        for _ in range(3):
            until(lambda: len(told.lines("tried")) >= 2, "the hook is tried")
            tried = len(told.lines("tried"))
            until(lambda tried=tried: len(told.lines("tried")) > tried, "and tried again")  # type: ignore[misc]
            if how == "stop":
                daemon.stop()
            else:
                assert daemon.child is not None
                daemon.child.kill()
                daemon.child.wait()
                daemon._forget()
            daemon.start()
        assert told.lines("told") == []
        assert all(t["state"] == "done" for t in daemon.tasks()), "a hook changes no task"
        told.mend()
        until(told.settled, "all are told", 60)
    wanted = {f"{t['id']}.done" for t in daemon.tasks()}
    found = told.lines("told")
    gate = [key for key in found if key not in wanted]
    assert wanted <= set(found)
    assert [key.partition(".")[2] for key in gate] == ["closed", "opened"]
    assert {one.split()[0] for one in told.lines("tried")} == set(found), "the ids are the same"
    assert "the service is down" in daemon.log.read_text()


def test_one_event_that_is_never_taken_holds_up_no_other(told: Told) -> None:
    with told.daemon as daemon:
        daemon.run("hold")
        daemon.drop("bad.md", "never taken")
        bad = until(daemon.tasks, "it is a task")[0]["id"]
        (told.place / f"not-{bad}").touch()
        daemon.run("release")
        daemon.answer("bad")
        for n in range(3):
            daemon.drop(f"t{n}.md", "good")
        until(
            lambda: sum(key.endswith(".done") for key in told.lines("told")) == 3,
            "the others are told",
        )
        tried = Counter(one.split()[0] for one in told.lines("tried"))
        assert tried[f"{bad}.done"] >= 1


def of_its_own_directory(tmp_path: Path, text: str) -> Mortal:
    """A daemon with a hook that is told where the runs of hooks lie."""
    program = tmp_path / "hook"
    program.write_text(text)
    program.chmod(0o755)
    daemon = Mortal(tmp_path / "root")
    with open(daemon.root / "codexd.yaml", "a") as more:
        more.write(f"retry: {{base: 1s, cap: 1s}}\non:\n  done: {program} {daemon.dirs.hooks}\n")
    return daemon


def test_what_cannot_be_removed_stops_neither_the_daemon_nor_its_next_start(
    tmp_path: Path,
) -> None:
    """The hook makes itself a directory, beside its event, that nobody may look into."""
    daemon = of_its_own_directory(tmp_path, STUBBORN)
    with daemon:
        for name in ("a", "b"):
            daemon.drop(f"{name}.md", "x")
            daemon.answer(name)
            until(lambda n=name: daemon.log.read_text().count("hook.told") > "ab".index(n), "told")
        assert daemon.stop() == 0
        (daemon.dirs.hooks / C).write_text("no directory at all")
        daemon.start()
        assert daemon.log.read_text().count("not.tidied") == 3
        daemon.drop("c.md", "x")
        daemon.answer("c")
        until(lambda: daemon.log.read_text().count("hook.told") == 3, "told")
    for path in daemon.dirs.hooks.glob("*/shut"):
        path.chmod(0o700)


STUBBORN = """\
#!/bin/sh
cd "$1/${CODEXD_EVENT_ID%%.*}" && mkdir shut && touch shut/x && chmod 0 shut
"""


def test_a_hook_that_shuts_its_own_directory_holds_up_no_other(tmp_path: Path) -> None:
    """Its result can neither be written nor read, nor can it be run again."""
    daemon = of_its_own_directory(tmp_path, SHUTTING)
    told = daemon.dirs.hooks.parent / "told"
    with daemon:
        daemon.drop("a.md", "x")
        until(lambda: _shut(daemon), "it is shut")
        daemon.drop("b.md", "x")
        until(lambda: told.exists(), "another is told")
        assert daemon.stop() == 0
        daemon.start()
        daemon.drop("c.md", "x")
        until(lambda: len(told.read_text()) == 2, "and one more, by the next daemon")
    for path in _shut(daemon):
        path.chmod(0o700)


def _shut(daemon: Daemon) -> list[Path]:
    return [p for p in daemon.dirs.hooks.iterdir() if not stat.S_IMODE(p.stat().st_mode)]


SHUTTING = """\
#!/bin/sh
cd "$1/${CODEXD_EVENT_ID%%.*}" || exit 1
mkdir "$1/../first" 2> /dev/null && exec chmod 0 .
printf . >> "$1/../told"
"""


@pytest.mark.parametrize("what", ["link", "fifo", "directory"])
def test_what_lies_in_the_place_of_its_output_does_no_harm(told: Told, what: str) -> None:
    """A task without a sandbox may have put it there; only a directory cannot be replaced."""
    (told.place / "down").touch()
    with told.daemon as daemon:
        daemon.drop("a.md", "hello")
        shelves = daemon.dirs.archive
        kept = until(lambda: next(shelves.glob("*/*/hook-done.log"), None), "it is tried")
        assert daemon.stop() == 0
        kept.unlink()
        if what == "link":
            kept.symlink_to(daemon.dirs.ledger)
        elif what == "fifo":
            os.mkfifo(kept)
        else:
            (kept / "x").mkdir(parents=True)
        told.mend()
        before = len(daemon.events())
        daemon.start()
        daemon.drop("b.md", "hello")
        until(lambda: len(told.lines("told")) == 2, "both are told")
        until(told.settled, "the ledger says so")
        assert len(daemon.events()) > before
        assert kept.is_dir() if what == "directory" else kept.read_text().endswith("told\n")
        assert ("hook.unkept" in daemon.log.read_text()) == (what == "directory")


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Where none is free; whoever wants one has to say so."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_so_does_a_hook(tmp_path: Path) -> None:
    """It has not failed: that it cannot be begun is the host's trouble, and told as that."""
    dirs = Directories.below(tmp_path)
    spool.prepare(dirs)
    ledger = Ledger(dirs.ledger, dirs.checkpoint)
    ledger.append([line(Note.OWED, A)])
    log = (lambda *_, **__: None,) * 3
    hooks = Hooks(read(tmp_path, "on:\n  done: /bin/true\n"), ledger, False, *log)
    hooks.runs = Silent()
    with no_descriptors():
        hooks.tend(0.0)
    assert hooks.summary() == {"owed": 1, "failing": {}}
    hooks.tend(1.0)
    assert list(hooks._running) == [f"{A}.done"]
    ledger.close()


def test_its_output_waits_for_a_host_that_has_no_room_for_it(tmp_path: Path) -> None:
    """Nor for anything else: here, without a descriptor that is free."""
    dirs = Directories.below(tmp_path)
    spool.prepare(dirs)
    (dirs.tasks / A).mkdir()
    ledger = Ledger(dirs.ledger, dirs.checkpoint)
    log = (lambda *_, **__: None,) * 3
    hooks = Hooks(read(tmp_path, "on:\n  done: /bin/true\n"), ledger, False, *log)
    with no_descriptors():
        hooks._keep(owed(A), "told\n")
    hooks._keep(owed(A), "told\n")
    assert (dirs.tasks / A / "hook-done.log").read_text() == "told\n"
    ledger.close()


def test_a_hook_that_is_no_longer_wanted_is_owed_nothing(told: Told) -> None:
    (told.place / "down").touch()
    with told.daemon as daemon:
        daemon.drop("a.md", "hello")
        daemon.answer("a")
        until(lambda: told.lines("tried"), "it is tried")
        (daemon.root / "codexd.yaml").write_text(QUICK)
        assert daemon.child is not None
        daemon.child.send_signal(signal.SIGHUP)
        until(told.settled, "it is given up")
        until(lambda: "hook.untold" in daemon.log.read_text(), "and that is said")


def test_who_has_mended_a_hook_need_not_wait(tmp_path: Path) -> None:
    told = Told(tmp_path)
    (told.place / "down").touch()
    config = told.daemon.root / "codexd.yaml"
    config.write_text(config.read_text().replace("base: 1s\n  cap: 1s", "base: 1h\n  cap: 1h"))
    with told.daemon as daemon:
        daemon.drop("a.md", "hello")
        until(lambda: "hook.failed" in daemon.log.read_text(), "it has failed")
        daemon.stop()
        daemon.start()
        assert len(told.lines("tried")) == 1, "a new daemon waits as well"
        told.mend()
        assert daemon.child is not None
        daemon.child.send_signal(signal.SIGHUP)
        until(lambda: told.lines("told"), "it is told")


def test_ten_thousand_owed_to_a_hook_that_is_down(told: Told) -> None:
    """The queue goes on, and the ledger does not grow by thousands of lines."""
    (told.place / "down").touch()
    daemon = told.daemon
    ids = [f"20261123t{n:06}-aaaaaaaaaa" for n in range(delivery.MOST)]
    ledger = Ledger(daemon.dirs.ledger, daemon.dirs.checkpoint)
    ledger.append([line(Note.OWED, id) for id in ids])
    ledger.close()
    with daemon:
        began = len(daemon.events())
        daemon.drop("a.md", "hello")
        daemon.answer("a", 10)
        until(lambda: len(told.lines("tried")) >= 3, "the hook is tried")
        assert len(told.lines("tried")) < 40
        assert len(daemon.events()) - began < 60
        assert len({one.split()[0] for one in told.lines("tried")}) >= 3, "not the same each time"
        until(lambda: "hook.untold" in daemon.log.read_text(), "the oldest of too many is given up")
        told.mend()
        until(lambda: len(told.lines("told")) > 20, "they are told")


def test_what_is_never_taken_is_given_up_at_last(told: Told) -> None:
    (told.place / "down").touch()
    daemon = told.daemon
    ledger = Ledger(daemon.dirs.ledger, daemon.dirs.checkpoint)
    tried = line(Note.DEFERRED, A, tries=delivery.TRIES - 1, until=AT, why="exit status 1")
    ledger.append([line(Note.OWED, A), tried])
    ledger.close()
    with daemon:
        until(told.settled, "it is given up")
        until(lambda: "hook.untold" in daemon.log.read_text(), "and that is said")
        why = "150 runs of its hook failed, the last: exit status 1: the service is down"
        assert why in daemon.log.read_text()
        assert len(told.lines("tried")) == 1


def test_the_end_of_a_task_is_told_without_its_record(told: Told) -> None:
    (told.place / "down").touch()
    with told.daemon as daemon:
        daemon.drop("a.md", "hello")
        daemon.answer("a")
        (kept,) = until(lambda: list(daemon.dirs.archive.glob("*/*/status.json")), "the archive")
        assert told.daemon.stop() == 0
        kept.write_text("{")
        told.mend()
        daemon.start()
        key = until(lambda: told.lines("told"), "it is told")[0]
        facts = json.loads((told.place / f"{key}.json").read_text())
        assert facts["state"] == "done"
        assert "status.json: not JSON" in facts["message"]


class Silent(Children):
    """Runs of which nothing is heard."""

    def start(self, id: str, directory: Path) -> None: ...

    def lost(self, id: str) -> None: ...


def test_a_run_of_which_nothing_is_heard_is_given_up(tmp_path: Path) -> None:
    dirs = Directories.below(tmp_path)
    spool.prepare(dirs)
    ledger = Ledger(dirs.ledger, dirs.checkpoint)
    ledger.append([line(Note.OWED, A)])
    said: list[str] = []
    log = (lambda event, **_: said.append(event),) * 3
    hooks = Hooks(read(tmp_path, "on:\n  done: /bin/true\n"), ledger, False, *log)
    hooks.runs = Silent()
    hooks.tend(0.0)
    hooks.tend(1.0)
    assert (list(hooks._running), said) == ([f"{A}.done"], [])
    hooks._running[f"{A}.done"] -= SILENCE  # as if that time had passed
    hooks.tend(2.0)
    assert said == ["hook.failed"]
    assert hooks.summary()["failing"] == {"done": "nothing was heard of it for 120 s"}
    ledger.close()


def test_status_says_that_a_hook_fails(told: Told) -> None:
    (told.place / "down").touch()
    with told.daemon as daemon:
        daemon.drop("a.md", "hello")
        daemon.answer("a")
        failing = until(lambda: daemon.json("status")["hooks"]["failing"], "status tells")
        assert failing == {"done": "exit status 1: the service is down"}
        assert "hooks: 1 event owed; done: exit status 1" in daemon.run("status").stdout


# --- with systemd -------------------------------------------------------------------------

_THERE = "/var/tmp/hook"


@pytest.fixture(scope="module")
def codexd() -> Iterator[Installed]:
    require("hybrid")
    with Box("hybrid") as box:
        one = Installed(box, FAKE_THERE)
        program = "/etc/codexd/hook"
        on = "".join(f"  {o}: {program} {o}\n" for o in Occasion)
        one.configure(f"{one.config}retry:\n  base: 1s\n  cap: 1s\non:\n{on}")
        box.push({program: _HOOK.format(place=_THERE)}, mode=0o755)
        box.run("install", "-d", "-o", "codexd", _THERE)
        more = "[Service]\nPrivateTmp=no\nReadWritePaths=/var/tmp/hook\n"
        one.drop_in("codexd-hook@.service", more)
        box.run("systemctl", "start", "codexd")
        yield one


def lines(one: Installed, name: str) -> list[str]:
    return one.box.run("sh", "-c", f"cat {_THERE}/{name} 2>/dev/null || true").stdout.splitlines()


@pytest.mark.xdist_group("box")
def test_a_unit_tells_it(codexd: Installed) -> None:
    codexd.drop("hello", "one.md")
    id = codexd.ended("one")["id"]
    until(lambda: f"{id}.done" in lines(codexd, "told"), "it is told")
    told = json.loads(codexd.box.pull(f"{_THERE}/{id}.done.json"))
    assert told == codexd._json("task", "show", id)
    until(
        lambda: "hook.told" in codexd.box.run("journalctl", f"CODEXD_TASK={id}").stdout,
        "the log says so",
    )
    until(lambda: not hook_units(codexd), "no unit is left")
    assert codexd.box.run("ls", "/run/codexd/hooks").stdout == ""


def hook_units(one: Installed) -> str:
    ask = ("systemctl", "list-units", "--all", "--plain", "--no-legend", "codexd-hook@*")
    return one.box.run(*ask).stdout


@pytest.mark.xdist_group("box")
def test_a_failing_unit_across_kills_of_the_master(codexd: Installed) -> None:
    box = codexd.box
    box.run("touch", f"{_THERE}/down")
    codexd.drop("hello", "two.md")
    id = codexd.ended("two")["id"]
    for _ in range(2):
        tried = len(lines(codexd, "tried"))
        until(lambda tried=tried: len(lines(codexd, "tried")) > tried, "it is tried")  # type: ignore[misc]
        box.run("systemctl", "kill", "--signal=SIGKILL", "codexd")
    box.run("rm", f"{_THERE}/down")
    until(lambda: f"{id}.done" in lines(codexd, "told"), "it is told")
    assert codexd.task("two")["state"] == "done"  # type: ignore[index]


@pytest.mark.xdist_group("box")
def test_a_unit_that_is_killed_is_tried_again(codexd: Installed) -> None:
    box = codexd.box
    text = box.pull("/etc/codexd/hook")
    box.push({"/etc/codexd/hook": "#!/bin/sh\nexec sleep 3600\n"}, mode=0o755)
    codexd.drop("hello", "three.md")
    id = codexd.ended("three")["id"]
    until(lambda: "sleep 3600" in codexd.command_lines(), "it runs")
    box.push({"/etc/codexd/hook": text}, mode=0o755)
    box.run("systemctl", "kill", "--signal=SIGKILL", f"codexd-hook@{id}")
    until(lambda: f"{id}.done" in lines(codexd, "told"), "it is told")
    assert (
        "its unit ended without a result: signal"
        in box.run("journalctl", f"CODEXD_TASK={id}").stdout
    )


@pytest.mark.xdist_group("box")
def test_a_hook_sees_its_event_and_no_secret(codexd: Installed) -> None:
    box = codexd.box
    text = box.pull("/etc/codexd/hook")
    look = f"cat /etc/codexd/api.env {STATE}/tasks.md {STATE}/codex/*; touch {SPOOL}/inbox/x"
    script = f"#!/bin/sh\nexec > {_THERE}/seen 2>&1\n{look}\ntrue\n"
    box.push({"/etc/codexd/hook": script}, mode=0o755)
    codexd.drop("hello", "four.md")
    id = codexd.ended("four")["id"]
    until(lambda: "hook.told" in box.run("journalctl", f"CODEXD_TASK={id}").stdout, "it is told")
    box.push({"/etc/codexd/hook": text}, mode=0o755)
    seen = lines(codexd, "seen")
    assert "sk-the-canary" not in str(seen)
    assert "queued" not in str(seen)
    assert any("api.env: Permission denied" in one for one in seen)
    assert any("Read-only file system" in one for one in seen)
