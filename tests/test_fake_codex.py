"""The stand-in for Codex does what it says, so that tests can lean on it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from codexd import codex
from codexd.outcome import Outcome

FAKE = str(Path(__file__).resolve().parent / "bin" / "codex")
PROMPT = b"do it\n"
HASH = hashlib.sha256(PROMPT).hexdigest()[:16]


class Run:
    """One start of the fake, as the worker would make it."""

    def __init__(self, home: Path, thread: str | None = None, **env: str) -> None:
        self.thread, self.last = thread, home / "last"
        args = codex.argv(
            FAKE,
            workdir="/",
            sandbox="read-only",
            model=None,
            profile=None,
            images=["/a.png"],
            add_dirs=[],
            output_schema=None,
            last_message_file=str(self.last),
            thread=thread,
        )
        base = {"PATH": os.environ["PATH"], **env}
        self.process = subprocess.Popen(
            args,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=codex.environment(base, str(home), env),
        )
        assert self.process.stdin is not None
        self.process.stdin.write(PROMPT)
        self.process.stdin.close()
        self.process.stdin = None
        self.reader = codex.Reader()

    def until(self, words: bytes) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.reader.feed(line)
            if words in line:
                return
        raise AssertionError(f"no {words!r}")

    def end(self, stop: str | None = None) -> tuple[Outcome, str]:
        out, err = self.process.communicate(timeout=60)
        self.reader.feed(out)
        self.reader.finish()
        return codex.judge(
            self.reader,
            exit_status=self.process.returncode,
            stderr_head=err.decode(),
            requested_thread=self.thread,
            stop_reason=stop,
            answer=self.reader.message,
        )


def configure(home: Path, **settings: Any) -> None:
    (home / "fake.json").write_text(json.dumps(settings))


def test_threads_go_on_and_count_their_tokens(tmp_path: Path) -> None:
    first = Run(tmp_path)
    assert first.end()[0] is Outcome.DONE
    assert first.reader.message == f"answer 1 to {HASH}" == first.last.read_text()
    thread = first.reader.thread
    assert thread
    second = Run(tmp_path, thread)
    assert second.end()[0] is Outcome.DONE
    assert second.reader.thread == thread
    assert second.reader.message == f"answer 2 to {HASH}"
    assert second.reader.usage["input_tokens"] == 200
    assert codex.rollout_message(str(tmp_path), thread) == f"answer 2 to {HASH}"
    assert Run(tmp_path, "0" * 8 + thread[8:]).end()[0] is Outcome.THREAD_LOST


@pytest.mark.parametrize(
    ("mode", "outcome"),
    [
        ("replay:plain", "done"),
        ("replay:e401", "auth"),
        ("replay:e429usage", "quota"),
        ("replay:no_git", "config"),
        ("replay:sigterm_model_wait", "signal"),
        ("replay:sigkill_model_wait", "signal"),
        ("no-terminal", "unknown"),
        ("silent-exit", "unknown"),
        ("crash", "signal"),
        ("giant", "done"),
        ("bad-utf8", "done"),
    ],
)
def test_modes_that_end(tmp_path: Path, mode: str, outcome: str) -> None:
    configure(tmp_path, mode=mode)
    assert Run(tmp_path).end()[0].value == outcome


def test_a_replay_has_a_thread_that_can_be_continued(tmp_path: Path) -> None:
    configure(tmp_path, mode="replay:cut,replay:plain,answer")
    cut = Run(tmp_path)
    assert cut.end()[0] is Outcome.TRANSIENT
    thread = cut.reader.thread
    again = Run(tmp_path, thread)
    assert again.end()[0] is Outcome.DONE
    assert again.last.read_text() == "Hello from mock."
    last = Run(tmp_path, thread)
    assert last.end()[0] is Outcome.DONE
    assert last.reader.message == f"answer 2 to {HASH}"


def test_a_wrong_thread(tmp_path: Path) -> None:
    first = Run(tmp_path)
    first.end()
    assert Run(tmp_path, first.reader.thread, CODEX_FAKE_MODE="wrong-thread").end()[0] is (
        Outcome.THREAD_LOST
    )


@pytest.mark.parametrize(
    ("mode", "words", "outcome"),
    [
        ("hang-turn", b"turn.started", "stall"),
        ("hang-item", b"item.started", "stall"),
        ("hang-completed", b"turn.completed", "done"),
        ("hang-failed", b"turn.failed", "transient"),
    ],
)
def test_modes_that_hang_end_on_sigint(
    tmp_path: Path, mode: str, words: bytes, outcome: str
) -> None:
    configure(tmp_path, mode=mode)
    run = Run(tmp_path)
    run.until(words)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.end("stall")[0].value == outcome
    assert run.process.returncode == 1
    assert bool(run.reader.open_items) == (mode == "hang-item")


def test_a_silent_hang_says_nothing(tmp_path: Path) -> None:
    effects = tmp_path / "effects"
    run = Run(tmp_path, CODEX_FAKE_MODE="hang-silent", CODEX_FAKE_EFFECTS=str(effects))
    while not effects.exists():
        assert run.process.poll() is None
        time.sleep(0.01)
    run.process.send_signal(signal.SIGTERM)
    assert run.end("interrupted")[0] is Outcome.INTERRUPTED
    assert (run.process.returncode, run.reader.thread) == (-signal.SIGTERM, None)


def test_the_stubborn_one_has_to_be_killed(tmp_path: Path) -> None:
    run = Run(tmp_path, CODEX_FAKE_MODE="stubborn")
    run.until(b"turn.started")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        run.process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        run.process.wait(0.2)
    run.process.kill()
    assert run.end("interrupted")[0] is Outcome.INTERRUPTED


def test_it_tells_what_it_was_given_and_how_often(tmp_path: Path) -> None:
    configure(
        tmp_path,
        effects=str(tmp_path / "effects"),
        dump=str(tmp_path / "dump"),
        answer="42",
        delay=0.05,
    )
    first = Run(tmp_path)
    assert first.end()[0] is Outcome.DONE
    assert first.reader.message == "42"
    Run(tmp_path, first.reader.thread).end()
    effects = (tmp_path / "effects").read_text().splitlines()
    assert effects == [f"new {HASH}", f"{first.reader.thread} {HASH}"]
    told = json.loads((tmp_path / "dump").read_text().splitlines()[0])
    assert told["argv"] == first.process.args
    assert told["stdin"] == PROMPT.decode()
    assert told["env"]["CODEX_HOME"] == str(tmp_path)
    assert told["pid"] == first.process.pid


def test_it_tells_its_version_and_refuses_what_codex_refuses(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "CODEX_HOME": str(tmp_path)}
    assert codex.version(FAKE, env) == (0, 163, 0)
    with pytest.raises(codex.TooOld):
        codex.version(FAKE, {**env, "CODEX_FAKE_VERSION": "0.98.0"})
    for args, status in [
        (["exec", "--full-auto", "-"], 2),
        (["exec", "resume", "-s", "read-only", "x", "-"], 2),
        (["exec", "-m", "--json", "-"], 2),
        (["exec", "-i", "/a.png", "resume", "x", "-"], 0),  # eaten by -i: a new thread
        (["exec", "-o", str(tmp_path / "o"), "-"], 1),  # an empty prompt
    ]:
        ran = subprocess.run(
            [FAKE, *args], env=env, input=b"x" if status == 0 else b"", capture_output=True
        )
        assert ran.returncode == status, (args, ran.stderr)
