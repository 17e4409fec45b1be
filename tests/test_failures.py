"""Every way in which a turn can fail, on the real Codex CLI: what a person is told of it.

One daemon has all the tasks at once, each in a session of its own; those that
close the gate have a daemon apart.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codexd import lock
from codexd.dispatch import KEYED
from codexd.spool import deliver_control
from codexd.view import View
from tests.daemon import Daemon, until
from tests.processes import codex_of, gone, kill, naming
from tests.scripted_cases import CaseModel, payload

pytestmark = pytest.mark.xdist_group("failures")

CONFIG = """\
workers: 16
attempts: 2
retry:
  base: 1s
  cap: 2s
http:
  listen: off
"""
BIG = 4_000_000
LONG = 300_000

# name: front matter, directives, outcome, attempts, what Codex (or codexd) said
FAILING: dict[str, tuple[str, str, str, int, str]] = {
    "cut": ("", "[[cut]]", "transient", 2, r"stream disconnected before completion: "),
    "cutclean": ("", "[[cutclean]]", "transient", 2, r"stream disconnected before completion: "),
    "html": ("", "[[html]]", "transient", 2, r"stream disconnected before completion: "),
    "once": ("attempts: 1", "[[cut]]", "transient", 1, r"stream disconnected before completion: "),
    "500": ("", "[[http 500]]", "transient", 2, r"We.re currently experiencing high demand"),
    "overloaded": ("", "[[overloaded]]", "transient", 2, r"Selected model is at capacity\."),
    "incomplete": ("", "[[incomplete]]", "transient", 2, r"Incomplete response returned, reason: "),
    "429": ("", "[[429 retry-after 1]]", "rate", 2, r"last status: 429 Too Many Requests"),
    "429-long": (
        "idle_timeout: 4s", "[[429 retry-after 3600]]", "rate", 2, r"silent .*: Reconnecting.* 429",
    ),
    "rate": ("", "[[rate-stream]]", "rate", 2, r"rate limit exceeded: Rate limit reached for gpt"),
    "context": ("", "[[context]]", "context-full", 2, r"Codex ran out of room in the model.s cont"),
    "400": ("", "[[400]]", "config", 1, r"Invalid value: 'parameter'"),
    "404": ("", "[[404]]", "config", 1, r"The model `gpt-scripted` does not exist"),
    "hang": ("idle_timeout: 4s", "[[hang]]", "stall", 2, r"Codex was silent for too long; last"),
    "hangsse": ("idle_timeout: 4s", "[[hangsse]]", "stall", 2, r"Codex was silent for too long"),
    "timeout": (
        "timeout: 4s", "[[shell sleep 7301]]", "timeout", 1, r"time was used up; .*sleep 7301",
    ),
    "slow": ("timeout: 4s", "[[hang]]", "timeout", 1, r"The task's time was used up; last seen: "),
    "empty": ("", "[[empty]]", "no-answer", 1, r"Codex completed the turn without a message\."),
    "workdir": ("workdir: nowhere", "x", "config", 1, r"workdir .*nowhere does not exist"),
    "not-a-directory": ("workdir: file", "x", "config", 1, r"workdir .*/file is not a directory"),
    "link": ("workdir: link", "x", "config", 1, r"workdir .* is not below a configured root \(/"),
    "image": ("images: [no.png]", "x", "config", 1, r"image .*no.png does not exist"),
    "comma": ('images: ["a,b.png"]', "x", "config", 1, r"an image with a comma in its path: .*a,b"),
    "always": (
        "resume: always", "x", "config", 0, r"resume: always, but session \S+ has no thread yet",
    ),
}  # fmt: skip

# name: the whole file, the answer
WELL: dict[str, tuple[str, str]] = {
    "cutonce": ("[[cutonce]][[say after a cut]]", "after a cut"),
    "tool": ("[[shell exit 3]][[say The tool failed, I am done.]]", "The tool failed, I am done."),
    "seq": ("[[shell seq 200000]][[say counted]]", "counted"),
    "megabytes": (f"[[bytes {BIG}]]", payload(BIG)),
    "help": ("--help", ""),
    "dash": ("- x", ""),
    "long": ("a long line of a long task\n" * (LONG // 27) + "\n[[say read]]", "read"),
    "lines": ("a\n" + "\n" * 5000 + "b\n[[say lines]]", "lines"),
    "unicode": ("日本語だけ 🎉 ☃ العربية", ""),
}

EMPTY = {
    "nothing.md": ("", "the file is empty"),
    "blank.md": (" \n\t\n", "the file is blank"),
    "front.md": ("---\nsession: x\n---\n\n", "no prompt: nothing follows the front matter"),
    "outside.md": ("---\nworkdir: /etc\n---\nx", "workdir /etc is not below a configured root"),
    "dots.md": ("---\nworkdir: ../..\n---\nx", "is not below a configured root"),
}


def front_matter(options: str) -> str:
    return f"---\n{options}\n---\n" if options else ""


@pytest.fixture(scope="module")
def model() -> Iterator[CaseModel]:
    with CaseModel() as model:
        yield model


def prepared(root: Path, model: CaseModel, config: str = CONFIG) -> Daemon:
    """A daemon that is not started yet.  Its HOME has no shell start-up files for Codex to run."""
    one = Daemon(root, {**model.environment(), "HOME": str(root)}, config)
    model.write_config(one.dirs.codex_home)
    return one


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, model: CaseModel) -> Iterator[Daemon]:
    """A daemon with every task of the two tables in its inbox."""
    one = prepared(tmp_path_factory.mktemp("failures") / "root", model)
    one.dirs.work.mkdir()
    (one.dirs.work / "file").write_text("not a directory")
    (one.dirs.work / "a,b.png").write_bytes(b"")
    (one.dirs.work / "link").symlink_to("/etc")
    with one:
        for name, (options, text, outcome, *_) in FAILING.items():
            if outcome in KEYED:  # a credential for each: together they would be an outage
                (one.dirs.codex_home / f"p-{name}.config.toml").write_text("")
                options = f"{options}\nprofile: p-{name}".strip()
            one.drop(f"{name}.md", front_matter(options) + text)
        for name, (text, _) in WELL.items():
            one.drop(f"{name}.txt", text)
        for name, (text, _) in EMPTY.items():
            one.drop(name, text)
        yield one


def id_of(daemon: Daemon, file: str) -> str:
    """The id that a dropped file was accepted under."""
    accepted = re.compile(r"`(\S{26})` \*\*queued\*\* `.*file=" + re.escape(json.dumps(file)))

    def look() -> str | None:
        found = accepted.search(daemon.dirs.ledger.read_text())
        return found and found[1]

    return str(until(look, f"{file} in the ledger"))


class Seen:
    """One task as readers see it."""

    def __init__(self, daemon: Daemon, file: str) -> None:
        self.id = id_of(daemon, file)
        self._view = View(daemon.dirs)

    def now(self) -> dict[str, Any]:
        found = self._view.task(self.id)
        assert found is not None
        return found

    def until(self, state: str, reason: str | None = None, seconds: float = 30) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found = self.now()
            right = found["state"] == state and reason in (None, found["reason"])
            return found if right else None

        try:
            found = until(look, f"{self.id} {state}", seconds)
        except TimeoutError as late:
            late.add_note(f"it is {self.now()}")
            raise
        assert found is not None
        return found


# --- the two tables ---------------------------------------------------------------------


@pytest.mark.parametrize("name", FAILING)
def test_failures_are_named_and_told_in_codex_own_words(daemon: Daemon, name: str) -> None:
    _, _, outcome, attempts, words = FAILING[name]
    front, _ = daemon.answer(name, 60)
    told = front["state"], front["outcome"], front["attempts"]
    assert told == ("failed", outcome, attempts), front
    assert re.search(words, front["message"]), front["message"]
    assert front["file"] == f"{name}.md"
    assert front["ended"] >= front["created"]


@pytest.mark.parametrize("name", WELL)
def test_what_looks_odd_is_done(daemon: Daemon, model: CaseModel, name: str) -> None:
    asked, said = WELL[name]
    front, text = daemon.answer(name, 60)
    assert front["state"] == front["outcome"] == "done", front
    # All work in one directory, and two of them run commands there.
    assert front["message"] is None or name in ("tool", "seq")
    assert front["attempts"] == 1
    if said:
        assert text == said + "\n"
    turns = model.asked(asked.strip())
    assert turns
    assert turns[0].prompt.endswith(f"\n---\n\n{asked}\n")  # word for word, and last


def test_a_long_answer_is_whole_in_its_file_and_null_in_json(daemon: Daemon) -> None:
    daemon.answer("megabytes", 60)
    task = daemon.json("task", "show", id_of(daemon, "megabytes.txt"))
    assert task["answer"] is None
    whole = Path(task["answer_file"]).read_bytes()
    assert whole.partition(b"\n---\n")[2] == payload(BIG).encode() + b"\n"


FRONT = """\
id session state outcome message file created started ended attempts thread tokens_in tokens_out
cpu_seconds memory_peak_bytes"""


def test_every_answer_file_tells_the_same_things(daemon: Daemon) -> None:
    for name in ("cut", "400", "workdir", "always", "seq", "megabytes"):
        front, text = daemon.answer(name, 60)
        assert list(front) == FRONT.split()
        assert bool(text) == (front["state"] == "done")
        assert (front["tokens_in"] is not None) == (front["state"] == "done")


@pytest.mark.parametrize("text", ["--help", "- x", "[[say it]]\n- x"])
def test_what_is_asked_is_never_an_option(daemon: Daemon, model: CaseModel, text: str) -> None:
    asked = daemon.run("ask", "-", stdin=text)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith(("it\n", "Hello from the scripted model."))
    assert model.asked(text)[-1].prompt.endswith(f"\n---\n\n{text}\n")


def test_an_empty_question_is_refused(daemon: Daemon) -> None:
    asked = daemon.run("ask", " \n")
    assert asked.returncode == 2
    assert asked.stdout == ""
    assert "prompt" in asked.stderr


@pytest.mark.parametrize("name", EMPTY)
def test_what_cannot_be_a_task_is_refused_with_its_reason(daemon: Daemon, name: str) -> None:
    assert EMPTY[name][1] in daemon.reason(name)


def test_nothing_is_left_running_by_what_was_stopped(daemon: Daemon) -> None:
    for name in ("hang", "hangsse", "timeout", "slow"):
        daemon.answer(name, 60)
        gone(id_of(daemon, f"{name}.md"))
    until(lambda: not naming("sleep 7301"), "the end of what was left running")


def test_a_retry_resumes_the_thread_and_has_the_whole_task(
    daemon: Daemon, model: CaseModel
) -> None:
    front, _ = daemon.answer("cut", 60)
    asked = model.prompts(front["thread"])
    assert len(asked) == 2
    assert "An earlier attempt" not in asked[0]
    assert "An earlier attempt" in asked[1]
    assert all(prompt.endswith("\n---\n\n[[cut]]\n") for prompt in asked)


def test_a_full_context_begins_a_new_thread(daemon: Daemon, model: CaseModel) -> None:
    daemon.answer("context", 60)
    turns = model.asked("[[context]]")
    assert len({turn.thread_id for turn in turns}) == 2


# --- Codex killed, tasks cancelled, held, retried -----------------------------------------


def test_codex_killed_by_a_stranger_is_retried_in_its_thread(
    daemon: Daemon, model: CaseModel
) -> None:
    daemon.drop("killed.md", "[[hold killed]][[say survived]]")
    task = Seen(daemon, "killed.md")
    thread = model.wait_held("killed").thread_id
    kill(codex_of(task.id))
    waiting = task.until("waiting", "signal")
    assert "killed by signal 9 (SIGKILL)" in waiting["message"]
    assert waiting["attempts"] == 1
    assert waiting["until"]
    model.release("killed")
    front, text = daemon.answer("killed")
    assert (text, front["attempts"], front["thread"]) == ("survived\n", 2, thread)
    assert model.prompts(thread)[-1].endswith("[[hold killed]][[say survived]]\n")


def test_codex_killed_again_and_again_fails_as_signal(daemon: Daemon, model: CaseModel) -> None:
    daemon.drop("poison.md", "---\nattempts: 1\n---\n[[hold poison]]")
    task = Seen(daemon, "poison.md")
    model.wait_held("poison")
    kill(codex_of(task.id))
    front, _ = daemon.answer("poison")
    assert (front["state"], front["outcome"], front["attempts"]) == ("failed", "signal", 1)
    assert "killed by signal 9 (SIGKILL)" in front["message"]


def test_cancel_of_a_running_task_ends_all_it_started(daemon: Daemon) -> None:
    daemon.drop("cancel.md", "[[shell setsid sleep 7302 & sleep 7303]]")
    task = Seen(daemon, "cancel.md")
    until(lambda: naming("sleep 7302") and naming("sleep 7303"), "the tool's processes")
    assert daemon.run("task", "cancel", task.id).returncode == 0
    front, text = daemon.answer("cancel")
    assert (front["state"], front["outcome"], text) == ("cancelled", "cancelled", "")
    assert front["message"].partition(";")[0] == "cancelled on request"  # all work in one place
    gone(task.id)
    gone("sleep 7302")
    gone("sleep 7303")
    assert daemon.run("task", "wait", task.id).returncode == 1


def test_cancel_of_a_queued_and_of_a_held_task(daemon: Daemon, model: CaseModel) -> None:
    for name in ("first", "second", "third"):
        daemon.drop(f"{name}.md", f"---\nsession: line\n---\n[[hold line]][[say {name}]]")
    second, third = Seen(daemon, "second.md"), Seen(daemon, "third.md")
    turn = model.wait_held("line")
    assert daemon.run("task", "hold", third.id).returncode == 0
    third.until("waiting", "hold")
    assert second.now()["state"] == "queued"
    assert daemon.run("task", "cancel", second.id, third.id).returncode == 0
    for name in ("second", "third"):
        front, text = daemon.answer(name)
        assert (front["state"], front["outcome"], text) == ("cancelled", "cancelled", "")
        assert front["message"] == "cancelled on request"
        assert (front["attempts"], front["thread"], front["started"]) == (0, None, None)
    model.release("line")
    assert daemon.answer("first")[1] == "first\n"
    assert len(model.prompts(turn.thread_id)) == 1


def test_hold_and_release_of_a_task(daemon: Daemon, model: CaseModel) -> None:
    for name in ("one", "two"):
        daemon.drop(f"{name}.md", f"---\nsession: held\n---\n[[hold {name}]][[say {name}]]")
    two = Seen(daemon, "two.md")
    model.wait_held("one")
    daemon.run("task", "hold", two.id)
    two.until("waiting", "hold")
    model.release("one")
    daemon.answer("one")
    time.sleep(1)  # time enough to start it wrongly
    assert two.now()["state"] == "waiting"
    daemon.run("task", "release", two.id)
    model.release("two")
    assert daemon.answer("two")[1] == "two\n"


def test_hold_of_a_task_that_runs_is_for_its_next_attempt(tmp_path: Path, model: CaseModel) -> None:
    with prepared(tmp_path / "root", model) as one:
        for name in ("back", "free", "cut"):
            last = "[[first 1 insufficient]]" if name == "back" else ""
            one.drop(f"{name}.md", f"[[hold {name}]]{last}[[say {name}]]")
        back, free, cut = (Seen(one, f"{name}.md") for name in ("back", "free", "cut"))
        for task, name in ((back, "back"), (free, "free"), (cut, "cut")):
            model.wait_held(name)
            said = one.run("task", "hold", task.id)
            assert said.returncode == 0
            assert f"task {task.id} is running and goes on; it is held if it" in said.stderr
        one.run("task", "release", free.id)
        until(lambda: not (one.dirs.inbox / f"{free.id}.hold").exists(), "forgotten")
        model.release("back")
        back.until("waiting", "hold")  # it met a spent quota
        assert one.run("release").returncode == 0
        one.stop()  # which interrupts the others
        model.release("free")
        one.start()
        cut.until("waiting", "hold")
        assert one.answer("free")[1] == "free\n"
        assert not list(one.dirs.inbox.glob("*.hold"))
        model.release("cut")
        for name, task in (("back", back), ("cut", cut)):
            assert task.now()["state"] == "waiting"
            one.run("task", "release", task.id)
            assert one.answer(name)[1] == f"{name}\n"


def test_hold_of_a_task_that_ends_is_forgotten(daemon: Daemon, model: CaseModel) -> None:
    daemon.drop("late.md", "[[hold late]][[say late]]")
    task = Seen(daemon, "late.md")
    model.wait_held("late")
    daemon.run("task", "hold", task.id)
    model.release("late")
    assert daemon.answer("late")[1] == "late\n"
    until(lambda: not (daemon.dirs.inbox / f"{task.id}.hold").exists(), "forgotten")
    assert not (daemon.dirs.rejected / f"{task.id}.hold").exists()


def test_release_and_cancel_of_a_task_that_waits_for_its_retry(
    tmp_path: Path, model: CaseModel
) -> None:
    """Both leave a wake-up behind, and the daemon must not spin on it."""
    with prepared(tmp_path / "root", model, CONFIG.replace("1s", "3s").replace("2s", "3s")) as one:
        for name in ("sooner", "never"):
            one.drop(f"{name}.md", f"[[first 2 cut]][[say {name} at last]]")
        sooner, never = Seen(one, "sooner.md"), Seen(one, "never.md")
        for task, verb in ((never, "cancel"), (sooner, "release")):
            task.until("waiting", "transient")
            deliver_control(one.dirs.inbox, f"{task.id}.{verb}")
        front, _ = one.answer("never")
        assert (front["state"], front["attempts"]) == ("cancelled", 1)
        assert "stream disconnected before completion" in front["message"]
        assert one.answer("sooner")[1] == "sooner at last\n"
        time.sleep(3)  # until what they waited for has come
        before = ticks(one)
        time.sleep(2)
        assert ticks(one) - before < 20


def ticks(daemon: Daemon) -> int:
    """Clock ticks of CPU that the daemon has used."""
    assert daemon.child is not None
    fields = Path(f"/proc/{daemon.child.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_retry_makes_a_new_task_in_the_same_session(daemon: Daemon, model: CaseModel) -> None:
    daemon.drop("again.md", "[[first 1 400]][[say better]]")
    first = Seen(daemon, "again.md")
    assert daemon.answer("again")[0]["state"] == "failed"
    assert daemon.run("task", "retry", first.id).returncode == 0
    second = Seen(daemon, f"{first.id}.retry")
    done = second.until("done")
    assert done["retry_of"] == first.id
    assert done["session"] == first.id == first.now()["session"]
    assert done["answer"] == "better"
    assert first.now()["state"] == "failed"
    assert done["thread"] == first.now()["thread"]
    assert len(model.prompts(done["thread"])) == 2


def test_a_key_makes_a_submission_idempotent(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "keyed.md"
    file.write_text("---\nkey: order 66\n---\n[[say once]]")
    first, again = daemon.run("task", "submit", str(file)), daemon.run("task", "submit", str(file))
    assert first.returncode == again.returncode == 0
    assert first.stdout == again.stdout
    file.write_text("---\nkey: order 66\n---\n[[say twice]]")
    other = daemon.run("task", "submit", str(file))
    assert other.returncode == 1
    assert f"key 'order 66' was used by task {first.stdout.strip()}" in other.stderr
    assert daemon.run("task", "wait", first.stdout.strip()).returncode == 0
    assert sum(t["key"] == "order 66" for t in daemon.tasks()) == 1


# --- threads -----------------------------------------------------------------------------


def begin(daemon: Daemon, name: str, text: str) -> str:
    """A first task of the session of that name; its thread."""
    daemon.drop(f"{name}-1.md", f"---\nsession: {name}\n---\n{text}")
    front, _ = daemon.answer(f"{name}-1")
    assert front["state"] == "done"
    return str(front["thread"])


def lose(daemon: Daemon, thread: str) -> None:
    """Delete a thread behind Codex's back."""
    rollouts = list(daemon.dirs.codex_home.glob(f"sessions/**/rollout-*{thread}.jsonl"))
    assert len(rollouts) == 1
    rollouts[0].unlink()


def test_a_lost_thread_goes_on_in_a_new_one(daemon: Daemon, model: CaseModel) -> None:
    old = begin(daemon, "lost", "The word is PELICAN.\n[[say It is PELICAN.]]")
    lose(daemon, old)
    daemon.drop("lost-2.md", "---\nsession: lost\n---\n[[say new]]")
    front, text = daemon.answer("lost-2")
    assert (front["outcome"], text, front["attempts"]) == ("done", "new\n", 1)
    assert front["thread"] != old
    (prompt,) = model.prompts(front["thread"])
    assert "could not be continued" in prompt
    assert "> The word is PELICAN." in prompt
    assert "> It is PELICAN." in prompt
    assert "> [[say new]]" not in prompt  # the task itself is said once, as the message
    assert prompt.endswith("\n---\n\n[[say new]]\n")
    assert daemon.json("session", "show", "lost")["thread"] == front["thread"]


BEGUN = "An earlier attempt at the task below was begun in it. Part of it may already be done"


def test_a_full_context_after_work_says_what_was_done(daemon: Daemon, model: CaseModel) -> None:
    daemon.drop("much.md", "[[shell echo much]][[first 1 context]][[say finished]]")
    front, text = daemon.answer("much", 60)
    assert (front["outcome"], text, front["attempts"]) == ("done", "finished\n", 2)
    (prompt,) = model.prompts(front["thread"])
    assert "could not be continued" in prompt
    assert BEGUN in prompt
    assert re.search(r"^> running: .*echo much", prompt, re.MULTILINE)


@pytest.mark.parametrize("acted", [True, False])
def test_a_thread_that_is_lost_in_a_crash_says_what_was_done(
    tmp_path: Path, model: CaseModel, acted: bool
) -> None:
    """What Codex wrote of it was not on the disk yet; what we had of it was."""
    name = f"crash-{acted}"
    with prepared(tmp_path / "root", model) as one:
        work = "[[shell echo acted]]" if acted else "[[first 1 insufficient]]"
        one.drop("c.md", f"{work}[[hold {name}]][[say {name}]]")
        task = Seen(one, "c.md")
        if acted:
            thread = model.wait_held(name).thread_id
        else:
            thread = task.until("queued", "quota")["thread"]
        one.kill()
        gone(task.id)
        model.release(name)
        (rollout,) = one.dirs.codex_home.glob(f"sessions/**/rollout-*{thread}.jsonl")
        rollout.write_bytes(b"")
        one.start()
        front, text = one.answer("c", 60)
        assert (front["outcome"], text, front["attempts"]) == ("done", f"{name}\n", 1)
        assert front["thread"] != thread
        (prompt,) = model.prompts(front["thread"])
        assert (BEGUN in prompt) == acted
        assert bool(re.search(r"^> running: .*echo acted", prompt, re.MULTILINE)) == acted


def test_resume_always_fails_when_the_thread_is_lost(daemon: Daemon) -> None:
    lose(daemon, begin(daemon, "must", "[[say here]]"))
    daemon.drop("must-2.md", "---\nsession: must\nresume: always\n---\n[[say never]]")
    front, text = daemon.answer("must-2")
    assert (front["state"], front["outcome"], text) == ("failed", "thread-lost", "")
    assert "no rollout found" in front["message"]


def test_resume_always_and_never(daemon: Daemon, model: CaseModel) -> None:
    old = begin(daemon, "choice", "[[say 1]]")
    for number, resume in ((2, "always"), (3, "never"), (4, "auto")):
        daemon.drop(
            f"choice-{number}.md",
            f"---\nsession: choice\nresume: {resume}\n---\n[[say {number}]]",
        )
    threads = [daemon.answer(f"choice-{n}")[0]["thread"] for n in (1, 2, 3, 4)]
    assert threads[:2] == [old, old]
    assert threads[2] == threads[3] != old
    assert len(model.prompts(threads[2])) == 2


def test_a_reset_in_the_middle_of_a_first_turn(daemon: Daemon, model: CaseModel) -> None:
    """It is no matter that nobody knows the thread yet, nor even the session."""
    threads = []
    for number in (1, 2):
        name = f"reset-{number}"
        daemon.drop(f"{name}.md", f"---\nsession: reset\n---\n[[hold {name}]][[say {number}]]")
        model.wait_held(name)
        assert daemon.run("session", "reset", "reset").returncode == 0
        control = daemon.dirs.inbox / "reset.reset"
        until(lambda gone=control: not gone.exists(), "the reset, obeyed")
        assert not (daemon.dirs.rejected / "reset.reset").exists()
        model.release(name)
        threads.append(daemon.answer(name)[0]["thread"])
        assert daemon.json("session", "show", "reset")["thread"] is None
    daemon.drop("reset-3.md", "---\nsession: reset\n---\n[[say 3]]")
    threads.append(daemon.answer("reset-3")[0]["thread"])
    assert len(set(threads)) == 3
    assert daemon.json("session", "show", "reset")["thread"] == threads[2]


def test_a_thread_that_somebody_else_writes_is_waited_for(daemon: Daemon) -> None:
    thread = begin(daemon, "busy", "[[say mine]]")
    lock.hold_thread(str(daemon.dirs.codex_home), thread, 1.0)
    daemon.drop("busy-2.md", "---\nsession: busy\n---\n[[say free]]")
    task = Seen(daemon, "busy-2.md")
    waiting = task.until("waiting", "thread-busy")
    assert waiting["message"] == f"thread {thread} is written by another process"
    # A range lock goes with the first close of its file in the process that has it.
    lock.hold_thread(str(daemon.dirs.codex_home), "0" * 36, 1.0)
    open(daemon.dirs.codex_home / ".codexd" / "threads.lock").close()
    front, text = daemon.answer("busy-2")
    assert (front["outcome"], text, front["thread"]) == ("done", "free\n", thread)


# --- what closes the gate ------------------------------------------------------------------


@pytest.fixture
def gated(tmp_path: Path, model: CaseModel) -> Iterator[Daemon]:
    with prepared(tmp_path / "root", model) as one:
        yield one


GATED = {
    "quota": ("first 1 quota 7200", "quota", r"You.ve hit your usage limit\. .*try again at "),
    "plan": ("first 1 usage-not-included", "quota", r"upgrade to Plus"),
    "credit": ("first 1 insufficient", "quota", r"Quota exceeded\. Check your plan and billing"),
    "login": ("first 2 http 401", "auth", r"unexpected status 401 Unauthorized: Incorrect API key"),
    "country": ("first 2 http 403", "auth", r"unexpected status 403 Forbidden: Country not"),
}


def health(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.json("status")
    return found


@pytest.mark.parametrize("name", GATED)
def test_only_the_task_that_met_it_goes_back_and_the_others_wait(
    gated: Daemon, model: CaseModel, name: str
) -> None:
    directive, reason, words = GATED[name]
    gated.drop("a.md", f"[[{directive}]][[say {name} a]]")
    a = Seen(gated, "a.md").until("queued", reason)
    gated.drop("b.md", f"[[say {name} b]]")
    gated.drop("c.md", f"[[say {name} c]]")
    b, c = Seen(gated, "b.md"), Seen(gated, "c.md")
    assert re.search(words, a["message"]), a["message"]
    assert (a["attempts"], a["outcome"], a["answer_file"]) == (0, None, None)
    closed = health(gated)
    assert closed["status"] == reason
    assert re.search(words, closed["gate"][reason]["message"])
    assert bool(closed["gate"][reason].get("until")) == (name == "quota")
    told = gated.run("status")
    assert told.returncode == 69
    assert re.search(f"^codexd: {reason}.*: .*{words}", told.stdout), told.stdout
    asked = len(model.turns)
    time.sleep(1.5)
    assert len(model.turns) == asked  # nobody tries while it is closed
    assert (b.now()["state"], c.now()["state"]) == ("queued", "queued")
    open_again(gated, model, reason)
    for one in ("a", "b", "c"):
        front, text = gated.answer(one)
        assert (front["outcome"], text, front["attempts"]) == ("done", f"{name} {one}\n", 1)
    assert health(gated)["status"] == "ok"
    assert gated.run("status").returncode == 0
    order = [model.asked(f"{name} {one}")[-1].number for one in ("a", "b", "c")]
    assert order[1] == min(order)  # another than the one that met it finds out


def open_again(daemon: Daemon, model: CaseModel, reason: str) -> None:
    """As a person does: `codexd release`, or a mended login."""
    if reason == "quota":
        assert daemon.run("release").returncode == 0
    else:
        model.write_config(daemon.dirs.codex_home, stream_idle_timeout_ms=300_001)


def test_a_probe_that_fails_closes_the_gate_again(gated: Daemon, model: CaseModel) -> None:
    gated.drop("probe.md", "[[first 2 quota 7200]][[say probed]]")
    task = Seen(gated, "probe.md")
    task.until("queued", "quota")
    gated.run("release")
    until(lambda: len(model.asked("[[say probed]]")) == 2, "the first probe")
    task.until("queued", "quota")
    assert health(gated)["status"] == "quota"
    gated.run("release")
    front, text = gated.answer("probe")
    assert (text, front["attempts"]) == ("probed\n", 1)
    thread = model.prompts(front["thread"])
    assert all(prompt.endswith("[[say probed]]\n") for prompt in thread)


def test_a_task_cancelled_behind_the_gate_tells_what_it_waited_for(gated: Daemon) -> None:
    gated.drop("spent.md", "[[quota 7200]]")
    task = Seen(gated, "spent.md")
    task.until("queued", "quota")
    gated.run("task", "cancel", task.id)
    front, _ = gated.answer("spent")
    assert (front["state"], front["outcome"]) == ("cancelled", "cancelled")
    assert re.search(r"on request; .*You.ve hit your usage limit\.", front["message"])


def test_hold_and_release_of_everything(gated: Daemon, model: CaseModel) -> None:
    assert gated.run("hold").returncode == 0
    until(lambda: health(gated)["status"] == "hold", "held")
    gated.drop("held.md", "[[say let go]]")
    task = Seen(gated, "held.md")
    time.sleep(1)
    assert task.now()["state"] == "queued"
    assert not model.asked("let go")
    told = gated.run("ask", "--timeout", "1s", "more")
    assert told.returncode == 75
    assert "it will wait: hold: held by hand" in told.stderr
    gated.run("release")
    assert gated.answer("held")[1] == "let go\n"
    assert health(gated)["status"] == "ok"
