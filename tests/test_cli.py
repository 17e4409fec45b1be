"""The command as people and scripts use it: every verb, to the byte and the exit status.

One daemon on the fake Codex serves most tests; what Codex answers is set for each.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codexd import __version__, clock, overview, report
from codexd.directories import Directories
from codexd.ledger import Ledger
from codexd.model import Event, Kind, Note, State
from codexd.view import View
from tests.daemon import PYTHON, Daemon, uncovered, until
from tests.scripted_cases import CaseModel

FAKE = Path(__file__).parent / "bin" / "codex"
pytestmark = pytest.mark.xdist_group("cli")
CONFIG = f"""\
workers: 8
codex:
  bin: {FAKE}
retry:
  base: 1s
http:
  listen: off
"""
ID = r"[0-9]{8}t[0-9]{6}-[0-9a-z]{10}"
NOBODY = "20260102t030405-nobody0000"
POWERLESS = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []


class Root(Daemon):
    """A daemon on the fake Codex, and the command on its root."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, config=CONFIG)
        self.view = View(self.dirs)  # what the command shows, without a process for each look
        self.behave()

    def __exit__(self, *told: Any) -> None:
        super().__exit__(*told)
        self.view.close()

    def behave(self, **settings: object) -> None:
        path = self.dirs.codex_home / "fake.json"
        path.write_text(json.dumps({"answer": "fine", **settings}))

    def command(self, *args: str) -> list[str]:
        return [PYTHON, "-m", "codexd.cli", "--root", str(self.root), *args]

    def json(self, *args: str) -> Any:
        """What a verb prints with --json, which stands first, as `--` may be among the rest."""
        done = self.run("--json", *args)
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def raw(self, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """The command, by bytes."""
        return subprocess.run(
            self.command(*args), env=self.env, input=stdin, capture_output=True, timeout=60
        )

    def submit(self, text: str = "x", **keys: object) -> str:
        """Submit a task and return its id."""
        file = self.root / "task.json"
        file.write_text(json.dumps({"prompt": text, **keys}))
        done = self.run("task", "submit", str(file))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def task(self, id: str) -> dict[str, Any]:
        return dict(self.view.task(id) or {})

    def health(self) -> dict[str, Any]:
        return dict(self.view.health()[1])

    def cancel(self, *ids: str) -> None:
        assert self.run("task", "cancel", *ids).returncode == 0
        for id in ids:
            self.reaches(id, "cancelled")

    def reaches(self, id: str, state: str) -> dict[str, Any]:
        until(lambda: self.task(id)["state"] == state, f"{id} {state}")
        return self.task(id)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    with Root(tmp_path_factory.mktemp("cli") / "root") as one:
        yield one


@pytest.fixture
def root(shared: Root) -> Root:
    shared.behave()
    return shared


# --- ask ------------------------------------------------------------------------------------

BIG = "".join(f"line {number} of a long answer ☃\r\n" for number in range(60_000))
ANSWERS = {
    "word": "yes",
    "lines": "one\ntwo\n\nfour",
    "newline": "one\n",
    "newlines": "one\n\n\n",
    "leading": "\n\n  one",
    "spaces": "  one  ",
    "returns": "one\r\ntwo\r\n",
    "unicode": "日本語 🎉 é \u00a0 \u202e العربية",
    "escapes": "\x1b]0;title\x07 \x1b[31mred\x1b[0m \x9b31m \x00 \x7f \x08",
    "markdown": "---\nid: none\n---\n\n# Title\n",
    "2 MB": BIG,
}


@pytest.mark.parametrize("case", ANSWERS)
def test_ask_prints_the_answer_and_one_newline(root: Root, case: str) -> None:
    answer = ANSWERS[case]
    root.behave(answer=answer)
    done = root.raw("ask", "Say something.")
    assert done.returncode == 0
    assert done.stdout == answer.rstrip("\n").encode() + b"\n"
    progress = done.stderr.decode().splitlines()
    assert re.fullmatch(f"codexd: task {ID}", progress[0])
    assert re.fullmatch(rf"\d\d:\d\d:\d\d task {ID} done", progress[-1])
    assert all(re.match(rf"\d\d:\d\d:\d\d task {ID} ", line) for line in progress[1:])


@pytest.mark.parametrize(
    "text", ["--help", "-", "- a list", "-o x=y", "$(id) `id` \\ ' \"", "one\n\ntwo\n", "日本"]
)
def test_ask_takes_any_text(root: Root, tmp_path: Path, text: str) -> None:
    root.behave(dump=str(tmp_path / "dump"))
    given = ["ask", "--", text] if text != "-" else ["ask", "-"]
    assert root.raw(*given, stdin=b"- from standard input\n").returncode == 0
    prompt = json.loads((tmp_path / "dump").read_text())["stdin"]
    wanted = "- from standard input" if text == "-" else text.rstrip()
    assert prompt.rstrip().endswith(f"\n{wanted}")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is blank"),
        (b"caf\xe9", "line 1: not UTF-8 (byte 0xe9); save the file as UTF-8"),
        (b"a\nb\0", "line 2: a NUL byte; a task file is UTF-8 text"),
    ],
)
def test_ask_refuses_what_is_no_text(root: Root, data: bytes, why: str) -> None:
    before = root.tasks()
    done = root.raw("ask", "-", stdin=data)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"codexd: standard input: {why}. Nothing was submitted\n"
    assert root.tasks() == before


def test_ask_with_options(root: Root, tmp_path: Path) -> None:
    root.behave(dump=str(tmp_path / "dump"))
    (root.dirs.work / "sub").mkdir()
    for image in ("a.png", "b.png"):
        (root.dirs.work / "sub" / image).touch()
    done = root.json(
        "ask", "-s", "web/site", "-C", str(root.dirs.work / "sub"), "-o", "priority=9",
        "-o", "title=A: title", "--option", "images=a.png,b.png", "-o", "sandbox=read-only",
        "-o", "model=gpt-5", "--timeout", "1m", "Go.",
    )  # fmt: skip
    assert done["state"] == "done"
    assert done["answer"] == "fine"
    assert (done["session"], done["priority"], done["title"]) == ("web/site", 9, "A: title")
    assert done["workdir"] == str(root.dirs.work / "sub")
    argv = json.loads((tmp_path / "dump").read_text())["argv"]
    assert [argv[at + 1] for at, word in enumerate(argv) if word in ("-s", "-m")] == [
        "read-only", "gpt-5",
    ]  # fmt: skip
    assert argv.count("-i") == 2


def test_ask_with_a_check_of_its_own(root: Root) -> None:
    done = root.run("ask", "-o", "verify.command=echo a=b, c; exit 3", "-o", "verify.rounds=1", "x")
    assert done.returncode == 1
    assert "failed (verify): " in done.stderr
    done = root.run("ask", "-o", "limits.memory=1G", "-o", "limits.tasks=100", "x")
    assert done.stderr.startswith("codexd: rejected: limits: only where workers are systemd units")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["-o", "verify.comand=x"], "verify.comand: unknown key (did you mean command?)"),
        (["-o", "verify.rounds=2"], "verify.command: "),
        (["-o", "verify=1", "-o", "verify.rounds=1"], "-o verify.rounds=1: verify was given a"),
        (["-o", "limits.memory=1"], "limits.memory: found '1'; allowed: a size from "),
        (["-o", "x.y=1"], "x: unknown key"),
        (["-o", "priority"], "-o priority: it must be KEY=VALUE, and no prompt"),
        (["-o", "prompt=x"], "-o prompt=x: it must be KEY=VALUE, and no prompt"),
        (["-o", "sesion=x"], "sesion: unknown key (did you mean session?); allowed: "),
        (["-o", "priority=10"], "priority: found '10'; allowed: a whole number from 0 to 9"),
        (["-o", "verify=1"], "verify: found '1'; allowed: a mapping of command, rounds"),
        (["-s", "a\nb"], "session: found 'a\\nb'; allowed: 1 to 200 printable characters"),
        (["-s", ""], "session: found ''; allowed: 1 to 200 printable characters"),
        (["--timeout", "soon"], "--timeout soon: it must be a duration from 1s to 24h, such as"),
    ],
)
def test_ask_with_options_that_are_wrong(root: Root, options: list[str], why: str) -> None:
    before = root.tasks()
    done = root.run("ask", *options, "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"codexd: {why}")
    assert len(done.stderr.splitlines()) == 1
    assert root.tasks() == before


def test_ask_tells_of_a_failure(root: Root) -> None:
    root.behave(mode="no-terminal")
    done = root.run("ask", "-o", "attempts=1", "x")
    assert (done.returncode, done.stdout) == (1, "")
    told = [line for line in done.stderr.splitlines() if " failed " in line]
    assert len(told) == 1, "once"
    assert re.fullmatch(rf"\d\d:\d\d:\d\d task {ID} failed \(\S+\): \S.*", told[0])
    assert done.stderr.endswith(f"{told[0]}\n")


def test_ask_tells_why_it_was_rejected(root: Root) -> None:
    done = root.run("ask", "-C", "/etc", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"codexd: rejected: workdir /etc is not below a configured root ({root.dirs.work}); "
        f"see workdirs in {root.root}/codexd.yaml\n"
    )


def test_ask_gives_up_waiting_but_not_the_task(root: Root) -> None:
    root.behave(mode="hang-turn")
    done = root.run("ask", "--timeout", "1s", "x")
    assert (done.returncode, done.stdout) == (75, "")
    id = re.findall(ID, done.stderr)[0]
    command = f"codexd --root {root.root} task follow {id}"
    assert done.stderr.splitlines()[-1] == f"codexd: the task goes on: {command}"
    assert root.task(id)["state"] == "running"
    root.cancel(id)


def test_ask_again_with_a_key_gets_the_first_answer(root: Root) -> None:
    first = root.json("ask", "-o", "key=once", "x")
    assert root.json("ask", "-o", "key=once", "x")["id"] == first["id"]
    done = root.run("ask", "-o", "key=once", "y")
    assert done.returncode == 1
    assert f"key 'once' was used by task {first['id']} with other content" in done.stderr


# --- when no daemon serves ------------------------------------------------------------------


def test_without_a_daemon(tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    text = (
        f"codexd: codexd is not serving {root.root}: start it with "
        f"`codexd --root {root.root} serve`. "
        "Nothing was submitted\n"
    )
    done = root.run("ask", "x")
    assert (done.returncode, done.stdout, done.stderr) == (69, "", text)
    for verb in (["task", "submit", str(root.root / "codexd.yaml")], ["task", "list"]):
        assert root.run(*verb).returncode in (1, 69)
    never = "was `codexd serve` ever started there?"
    for verb in ("hold", "status"):
        done = root.run(verb)
        assert (done.returncode, done.stdout) == (69, "")
        assert done.stderr == f"codexd: there is no inbox {root.dirs.inbox}: {never}\n"

    with root:
        root.submit()
        for end in (root.stop, root.kill):  # of the killed one the heartbeat is fresh
            end()
            done = root.run("ask", "x")
            assert (done.returncode, done.stdout, done.stderr) == (69, "", text)
            until(lambda: not list(root.dirs.inbox.iterdir()), "an empty inbox")
            assert root.run("status").stdout.startswith("codexd: the master is not running\n")
            assert root.run("status").returncode == 69
            root.start()
        root.stop()

        (tmp_path / "later.md").write_text("Do it later.")
        done = root.run("task", "submit", str(tmp_path / "later.md"))
        assert (done.returncode, len(done.stdout)) == (0, 27)
        assert done.stderr == "codexd: not serving now; the tasks wait in the inbox\n"
        id = done.stdout.strip()
        waiting = root.task(id)
        assert (waiting["state"], waiting["title"]) == ("queued", "later.md")
        assert root.run("task", "hold", id).returncode == 0
        root.start()
        assert root.reaches(id, "waiting")["reason"] == "hold"
        assert root.run("task", "release", id).returncode == 0
        assert root.run("task", "wait", id).returncode == 0


def down(tmp_path: Path, config: str = CONFIG) -> Root:
    """A root that was served, and is not now."""
    root = Root(tmp_path / "root")
    (root.root / "codexd.yaml").write_text(config)
    with root:
        root.stop()
    return root


def test_tasks_keep_the_order_in_which_they_were_submitted(tmp_path: Path) -> None:
    root = down(tmp_path)
    files = [tmp_path / f"{n}.md" for n in range(9, 0, -1)]
    for file in files:
        file.write_text(f"---\nsession: one\n---\n{file.name}")
    ids = [*root.json("task", "submit", *map(str, files[:6]))]
    ids += [root.json("task", "submit", str(file))[0] for file in files[6:]]
    with root:
        assert root.run("task", "wait", *ids).returncode == 0
        started = sorted(root.tasks(), key=lambda task: str(task["started"]))
    assert [task["id"] for task in started] == ids
    assert [task["title"] for task in started] == [file.name for file in files]


@pytest.mark.parametrize(
    ("verbs", "closed"),
    [
        (["release", "hold"], {"hold"}),
        (["release", "drain"], {"drain"}),
        (["hold", "release"], set()),
        (["drain", "hold", "release"], set()),
        (["hold", "release", "hold"], {"hold"}),
    ],
)
def test_the_last_word_stands(tmp_path: Path, verbs: list[str], closed: set[str]) -> None:
    root = down(tmp_path)
    for verb in verbs:
        done = root.run(verb)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr == "codexd: not serving now; that is obeyed when codexd serves\n"
    with root:
        until(lambda: not list(root.dirs.inbox.iterdir()), "an empty inbox")
        until(lambda: root.health()["gate"].keys() == closed, "the gate")


def test_whoever_changes_something_while_nobody_serves_is_told(tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    with root:
        ended = root.json("ask", "-s", "web", "x")["id"]
        root.stop()
        live = root.submit()
        for verb in (
            ["task", "cancel", live], ["task", "hold", live], ["task", "release", live],
            ["task", "retry", ended], ["session", "reset", "web"], ["ledger", "compact"],
        ):  # fmt: skip
            done = root.run(*verb)
            assert (done.returncode, done.stdout) == (0, ""), verb
            assert done.stderr == "codexd: not serving now; that is obeyed when codexd serves\n"


# --- submitting -----------------------------------------------------------------------------


def test_submit_prints_the_ids_in_order(root: Root, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("b.md", "a.txt", "c.yaml", "d.json")]
    texts = ["---\npriority: 7\n---\nx", "---\nplain", "prompt: x\ntitle: C", '{"prompt": "x"}']
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    done = root.raw("task", "submit", *map(str, files), "-", stdin=b"---\ntitle: E\n---\nx\n")
    assert done.returncode == 0
    ids = done.stdout.decode().splitlines()
    tasks = [root.task(id) for id in ids]
    assert [t["title"] for t in tasks] == ["b.md", "a.txt", "C", "d.json", "E"]
    assert tasks[0]["priority"] == 7
    found = root.json("task", "submit", str(files[0]), str(files[1]))
    assert len(found) == 2
    assert root.run("task", "wait", *ids, *found).returncode == 0


def test_submit_checks_all_before_it_submits_any(root: Root, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("x")
    bad.write_text("---\nsesion: x\n---\nx")
    before = root.tasks()
    for name, why in (
        (str(bad), "line 2: sesion: unknown key (did you mean session?)"),
        (str(tmp_path / "none.md"), "No such file or directory"),
        (str(tmp_path), "Is a directory"),
    ):
        done = root.run("task", "submit", str(good), name)
        assert (done.returncode, done.stdout) == (1, "[]\n"[:0])
        assert done.stderr.startswith(f"codexd: {name}: {why}")
        assert done.stderr.endswith(". Nothing was submitted\n")
    assert root.tasks() == before


def test_submit_tells_what_was_rejected_and_what_was_not(root: Root, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("x")
    bad.write_text("---\nworkdir: /etc\n---\nx")
    before = {p.name for p in root.dirs.rejected.iterdir()}
    done = root.run("task", "submit", str(bad), str(good))
    assert done.returncode == 1
    (id,) = done.stdout.splitlines()
    assert root.reaches(id, "done")["title"] == "good.md"
    assert done.stderr.startswith(f"codexd: {bad}: rejected: workdir /etc is not below a conf")
    (rejected,) = {p.name[:26] for p in root.dirs.rejected.iterdir() if p.name not in before}
    done = root.run("task", "show", rejected)
    assert done.returncode == 1
    assert done.stderr.startswith(f"codexd: {rejected} was rejected: workdir /etc")


def test_retry_tells_what_was_rejected_and_what_was_not(tmp_path: Path) -> None:
    with Root(tmp_path / "root") as root:
        good, bad = root.submit("a"), root.submit("b", sandbox="workspace-write")
        for id in (good, bad):
            root.reaches(id, "done")
        for sandbox in ("read-only", "workspace-write"):
            root.stop()
            config = CONFIG.replace("codex:\n", f"codex:\n  sandbox: {sandbox}\n")
            (root.root / "codexd.yaml").write_text(config)
            root.start()
            done = root.run("task", "retry", bad, good)
            if sandbox == "read-only":
                assert (done.returncode, len(done.stdout.split())) == (1, 1)
                assert done.stderr.startswith(f"codexd: {bad}.retry: rejected: sandbox workspace-")
        assert (done.returncode, done.stderr) == (0, ""), "what was said before is not said again"
        assert [root.reaches(id, "done")["retry_of"] for id in done.stdout.split()] == [bad, good]


def test_submit_and_check_know_the_limit(tmp_path: Path) -> None:
    """That of the configuration, also while the daemon has another one in force."""
    root = down(tmp_path, CONFIG + "limits:\n  file: 2K\n")
    good, big, quoted = tmp_path / "good.md", tmp_path / "big.md", tmp_path / "quoted.md"
    good.write_text("x")
    big.write_text("x" * 2049)
    quoted.write_text("x" + "\n" * 1500 + "x")
    for file, why in ((big, "larger than 2048 bytes"), (quoted, "larger than 2048 bytes in JSON")):
        done = root.run("task", "submit", str(good), str(file))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"codexd: {file}: {why}")
        assert done.stderr.endswith("(limits.file). Nothing was submitted\n")
    assert root.run("ask", "-", stdin="x" * 2049).returncode == 69
    assert list(root.dirs.inbox.iterdir()) == []
    done = root.run("check", str(good), str(big), "/dev/zero")
    assert done.returncode == 1
    told = "larger than 2048 bytes, the limit for a task file (limits.file)"
    assert done.stdout == f"{good}: ok\n{big}: {told}\n/dev/zero: {told}\n"
    with root:
        (root.root / "codexd.yaml").write_text(CONFIG)  # not read again yet
        assert root.run("task", "submit", str(big)).returncode == 1
        done = root.run("ask", "-", stdin="x" * 2049)
        assert done.returncode == 2
        assert done.stderr.startswith("codexd: standard input: larger than 2048 bytes")


def test_a_broken_configuration_does_not_keep_a_task_from_the_inbox(tmp_path: Path) -> None:
    """Nobody knows its limit then: the greatest of all holds, and the daemon says its own."""
    root = down(tmp_path)
    (root.root / "codexd.yaml").write_text("wrokers: 1\n")
    done = root.run("task", "submit", "-", stdin="x" * 100_000)
    assert (done.returncode, len(list(root.dirs.inbox.iterdir()))) == (0, 1), done.stderr


def test_a_full_disk_takes_no_task(tmp_path: Path) -> None:
    """The inbox on a file system of 64 KiB, in a mount namespace of the command's own."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this host gives no user namespaces")
    root, big = Root(tmp_path / "root"), tmp_path / "big.md"
    root.dirs.inbox.mkdir()
    big.write_text("x" * 200_000)
    mount = f'mount -t tmpfs -o size=64k none "{root.dirs.inbox}" && exec "$@"'
    command = [*unshare, "sh", "-c", mount, "sh", *root.command("task", "submit", str(big))]
    done = subprocess.run(command, env=root.env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == f"codexd: {root.dirs.inbox}: No space left on device\n"


def test_a_control_file_is_no_task(root: Root, tmp_path: Path) -> None:
    slip, full, empty = (tmp_path / n for n in ("notes.cancel", f"{NOBODY}.cancel", "all.hold"))
    slip.write_text("x")
    full.write_text("x")
    empty.touch()
    done = root.run("check", str(slip), str(full), str(empty))
    assert done.returncode == 1
    first, *rest = done.stdout.splitlines()
    assert first.startswith(f"{slip}: 'notes.cancel' ends like a control file (ID.cancel)")
    assert rest == [
        f"{full}: a control file (here .cancel) must be empty",
        f"{empty}: ok",
    ]
    for file in (slip, full, empty):
        assert root.run("task", "submit", str(file)).returncode == 1


def test_what_a_full_queue_leaves_in_the_inbox_is_told(tmp_path: Path) -> None:
    with Root(tmp_path / "root") as root:
        ended = root.json("ask", "x")["id"]
        root.stop()
        (root.root / "codexd.yaml").write_text(CONFIG + "limits:\n  queue: 1\n")
        root.start()
        root.behave(mode="hang-turn")
        running = root.submit()
        root.reaches(running, "running")
        file = root.root / "task.json"
        done = root.run("task", "submit", str(file), str(file))
        assert done.returncode == 0
        assert done.stderr == "".join(
            f"codexd: task {id} lies in the inbox: the queue is full (limits.queue)\n"
            for id in done.stdout.split()
        )
        begun = time.monotonic()
        done = root.run("task", "retry", ended)
        word = time.monotonic() - begun  # it waits for the master's, in vain
        assert (done.returncode, done.stdout) == (0, "")
        why = "lies in the inbox: the queue is full (limits.queue)"
        assert done.stderr == f"codexd: {ended}.retry {why}\n"
        begun = time.monotonic()
        done = root.run("ask", "--timeout", "1", "x")
        assert time.monotonic() - begun < word - 2, "the wait for the master's word is part of it"
        assert done.returncode == 75
        assert why in done.stderr
        assert "codexd: the task goes on: " in done.stderr
        status = root.run("status")
        assert status.returncode == 1
        assert status.stdout.startswith(
            "codexd: it works, but something has to be mended\n"
            "inbox: the queue is full (limits.queue); files wait until there is room\n"
        )


@pytest.mark.parametrize(("dies", "why"), [
    (False, "codexd has not taken it yet"), (True, "codexd is not serving now"),
])  # fmt: skip
def test_what_a_daemon_that_stands_still_leaves_in_the_inbox_is_told(
    tmp_path: Path, dies: bool, why: str
) -> None:
    with Root(tmp_path / "root") as root:
        assert root.child is not None
        root.child.send_signal(signal.SIGSTOP)
        try:
            command = root.command("ask", "--timeout", "2", "x")
            with subprocess.Popen(
                command, env=root.env, stderr=subprocess.PIPE, text=True
            ) as asking:
                until(lambda: list(root.dirs.inbox.iterdir()), "the file")
                if dies:
                    root.child.kill()
                _, told = asking.communicate(timeout=60)
        finally:
            root.child.send_signal(signal.SIGCONT)
    assert asking.returncode == 75
    assert re.search(f"^codexd: task {ID} lies in the inbox: {why}$", told, re.MULTILINE)


def test_whoever_waits_is_told_that_the_daemon_stops_and_that_the_task_goes_on(
    tmp_path: Path,
) -> None:
    with Root(tmp_path / "root") as root:
        root.behave(mode="hang-turn")
        log = tmp_path / "told"
        with log.open("w") as told:
            child = subprocess.Popen(root.command("ask", "x"), env=root.env, stderr=told)
        id = until(lambda: re.findall(ID, log.read_text()), "the task")[0]
        root.reaches(id, "running")
        root.stop()
        down = "codexd: not serving now; it goes on when codexd serves\n"
        until(lambda: down in log.read_text(), "that it stopped")
        root.start()
        until(lambda: "codexd: serving again\n" in log.read_text(), "that it serves")
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
        command = f"codexd --root {root.root} task follow {id}"
        assert log.read_text().endswith(f"codexd: the task goes on: {command}\n")
        done = root.run("task", "wait", "--timeout", "1", id)
        assert done.returncode == 75
        assert done.stderr == f"codexd: the task goes on: {command}\n"


# --- one task and many ----------------------------------------------------------------------


def test_wait_knows_at_once_what_it_does_not_know(root: Root) -> None:
    root.behave(mode="hang-turn")
    id = root.submit("x")
    done = root.run("task", "wait", id, "nope")
    assert (done.returncode, done.stdout) == (66, "")
    assert done.stderr == "codexd: there is no task nope\n"
    assert root.task(id)["state"] != "done"
    root.cancel(id)


def test_no_session_is_called_nothing(root: Root) -> None:
    assert root.run("task", "list", "--session", "").returncode == 2


def test_wait(root: Root) -> None:
    ids = [root.submit(), root.submit()]
    root.reaches(ids[1], "done")
    root.behave(mode="hang-turn")
    endless = root.submit()
    begun = time.monotonic()
    done = root.run("task", "wait", "--timeout", "1s", *ids, endless)
    assert done.returncode == 75
    assert time.monotonic() - begun >= 1
    root.cancel(endless)
    assert done.stdout.splitlines()[0].split() == [
        "ID", "STATE", "OUTCOME", "SESSION", "CREATED", "WHAT",
    ]  # fmt: skip
    assert root.run("task", "wait", *ids).returncode == 0
    assert [t["state"] for t in root.json("task", "wait", *ids)] == ["done", "done"]
    assert root.run("task", "wait", ids[0], endless).returncode == 1
    assert root.run("task", "wait", "--timeout", "x", ids[0]).returncode == 2
    done = root.run("task", "wait", ids[0], NOBODY)
    assert (done.returncode, done.stderr) == (66, f"codexd: there is no task {NOBODY}\n")


def test_follow(root: Root) -> None:
    root.behave(mode="hang-item,answer")
    id = root.submit()
    done = root.run("task", "follow", "--timeout", "1s", id)
    assert done.returncode == 75
    assert f"task {id} running: sleep 9\n" in done.stdout
    root.cancel(id)
    done = root.run("task", "follow", id)
    assert done.returncode == 1
    id = root.submit()
    done = root.run("task", "follow", id)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert all(re.match(rf"\d\d:\d\d:\d\d task {id} ", line) for line in lines)
    assert lines[-1].endswith(f"task {id} done")
    assert root.run("task", "follow", NOBODY).returncode == 66
    assert root.json("task", "follow", id)["state"] == "done"


def test_the_progress_of_a_task_that_left_nothing_to_follow(tmp_path: Path) -> None:
    """It may go into the archive between two looks; nor need it have been in a turn."""
    shown = io.StringIO()
    told = report.progress(Directories.below(tmp_path), shown)
    facts = dict.fromkeys(("outcome", "reason", "until", "message"))
    for state in ("running", "running", "done"):
        told({"id": "its-id", "state": state, **facts})
    lines = [line.partition(" ")[2] for line in shown.getvalue().splitlines()]
    assert lines == ["task its-id running", "task its-id done"]


def test_show_for_people(root: Root) -> None:
    root.behave(answer="An answer\nof two lines")
    id = root.submit("x", session="show", title="A title")
    root.reaches(id, "done")
    done = root.run("task", "show", id)
    assert done.returncode == 0
    facts, _, answer = done.stdout.partition("\n\n")
    assert answer == "An answer\nof two lines\n"
    told = dict(re.split(r": +", line, maxsplit=1) for line in facts.splitlines())
    assert (told["id"], told["state"], told["session"]) == (id, "done", "show")
    assert "input_tokens=100" in told["usage"]
    assert os.path.exists(told["answer_file"])
    for wrong in (NOBODY, "web", "../../etc/passwd", ""):
        done = root.run("task", "show", wrong)
        assert (done.returncode, done.stderr) == (66, f"codexd: there is no task {wrong}\n")


def test_list(root: Root) -> None:
    ids = [root.submit(session="listed") for _ in range(3)]
    root.run("task", "wait", *ids)
    found = root.json("task", "list", "--session", "listed")
    assert [t["id"] for t in found] == ids
    assert all("answer" not in t for t in found)
    assert {*found[0], "answer"} == root.task(ids[0]).keys()
    assert root.json("task", "list", "--state", "failed", "--session", "listed") == []
    lines = root.run("task", "list", "--state", "done", "--session", "listed").stdout.splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        [id, "done", "done", "listed"] for id in ids
    ]
    done = root.run("task", "list", "--state", "lost")
    assert done.returncode == 2
    assert all(state in done.stderr for state in State)


def test_cancel_hold_release_retry(root: Root) -> None:
    assert root.run("hold").returncode == 0
    until(lambda: root.health()["status"] == "hold", "the gate to close")
    status = root.run("status")
    assert status.returncode == 69
    assert status.stdout.startswith(
        "codexd: hold: held by hand; `codexd release` lets work go on\nversion "
    )
    held, queued, behind = (root.submit(session="one") for _ in range(3))
    assert root.run("task", "hold", held, behind).returncode == 0
    assert root.reaches(held, "waiting")["reason"] == "hold"
    root.reaches(behind, "waiting")
    assert root.run("task", "cancel", queued).returncode == 0
    cancelled = root.reaches(queued, "cancelled")
    assert (cancelled["outcome"], cancelled["attempts"]) == ("cancelled", 0)
    assert Path(cancelled["answer_file"]).exists()
    assert root.run("task", "wait", queued).returncode == 1

    assert root.run("release").returncode == 0
    until(lambda: root.health()["status"] == "ok", "the gate to open")
    assert root.task(held)["state"] == "waiting"
    assert root.run("task", "release", held, behind).returncode == 0
    assert root.run("task", "wait", held, behind).returncode == 0

    assert root.run("task", "retry", queued).returncode == 0
    again = until(lambda: [t for t in root.tasks() if t["retry_of"] == queued], "the retry")
    assert root.reaches(again[0]["id"], "done")["session"] == "one"


def test_cancel_a_running_task(root: Root) -> None:
    root.behave(mode="hang-turn")
    id = root.submit()
    root.reaches(id, "running")
    done = root.run("task", "retry", id)
    assert done.returncode == 1
    assert done.stderr == f"codexd: task {id} has not ended; cancel it first, or wait\n"
    assert root.run("task", "cancel", id).returncode == 0
    assert root.reaches(id, "cancelled")["message"] == "cancelled on request"
    for verb in ("cancel", "retry", "hold", "release"):
        done = root.run("task", verb, id, NOBODY)
        assert (done.returncode, done.stderr) == (66, f"codexd: there is no task {NOBODY}\n")
    assert not [t for t in root.tasks() if t["retry_of"] == id]


def test_a_release_after_a_hold_stands_though_the_clock_was_set_back(root: Root) -> None:
    root.behave(mode="hang-turn")
    id = root.submit()
    root.reaches(id, "running")
    hold = root.dirs.inbox / f"{id}.hold"
    aside = root.dirs.inbox / ".aside"
    aside.touch()
    os.utime(aside, (time.time() + 3600,) * 2)
    until(lambda: not root.health()["seen"], "nothing else was seen")
    aside.rename(hold)
    until(lambda: root.health()["seen"], "the hold was seen")
    assert root.run("task", "release", id).returncode == 0
    until(lambda: not hold.exists(), "forgotten")
    root.cancel(id)


# --- sessions -------------------------------------------------------------------------------


SESSIONS = ["a/b", "a_b", "../..", ".hidden", "50%", "%41", "ü\xa0日本", "all", "-s", "x.tmp"]


@pytest.mark.parametrize("name", [*SESSIONS, "a b", "n" * 200, NOBODY])
def test_a_session_of_any_name(root: Root, name: str) -> None:
    first = root.json("ask", f"--session={name}", "x")
    found = root.json("session", "show", "--", name)
    assert (found["name"], found["thread"], found["tasks"]) == (name, first["thread"], 1)
    assert Path(found["transcript"]).exists()
    assert name in [s["name"] for s in root.view.sessions()]
    assert root.run("session", "reset", "--", name).returncode == 0
    until(lambda: not root.view.session(name)["thread"], f"{name} reset")  # type: ignore[index]
    until(lambda: not list(root.dirs.inbox.iterdir()), "the control file to go")
    root.reaches(root.submit(session=name), "done")
    after = root.view.session(name)
    assert after is not None
    assert after["thread"] not in (None, first["thread"])
    assert after["usage"]["input_tokens"] == 200  # type: ignore[index]


def test_a_task_that_is_to_be_tried_again_goes_on_in_its_thread_after_a_reset(
    tmp_path: Path,
) -> None:
    with Root(tmp_path / "root") as root:
        root.behave(mode="hang-turn")
        id = root.submit(session="web")
        root.reaches(id, "running")
        events = root.dirs.tasks / id / "1" / "events.jsonl"
        until(lambda: events.exists() and "turn.started" in events.read_text(), "its turn")
        root.run("task", "hold", id)
        root.stop()
        root.behave()
        root.start()
        thread = root.reaches(id, "waiting")["thread"]
        assert root.run("session", "reset", "web").returncode == 0
        until(lambda: not list(root.dirs.inbox.iterdir()), "the reset, obeyed")
        root.run("task", "release", id)
        assert root.reaches(id, "done")["thread"] == thread is not None
        assert root.reaches(root.submit(session="web"), "done")["thread"] not in (None, thread)


def test_a_session_whose_name_is_too_long_for_a_control_file(root: Root) -> None:
    name = "日" * 200
    root.json("ask", "-s", name, "x")
    done = root.run("session", "reset", name)
    assert done.returncode == 1
    assert done.stderr == (
        f"codexd: session {name}: its name is too long for a control file; "
        "say `resume: never` in its next task\n"
    )


def test_sessions_for_people(root: Root) -> None:
    root.json("ask", "-s", "people", "x")
    lines = root.run("session", "list").stdout.splitlines()
    assert lines[0].split() == ["SESSION", "THREAD", "TASKS", "UPDATED"]
    assert any(re.match(r"people  +[0-9a-f-]{36}  1 ", line) for line in lines)
    shown = root.run("session", "show", "people").stdout
    assert re.search(r"^name: +people\nthread: +[0-9a-f-]{36}$", shown, re.MULTILINE)
    assert "input_tokens=100" in shown
    for verb in ("show", "reset"):
        done = root.run("session", verb, "nobody")
        assert (done.returncode, done.stderr) == (66, "codexd: there is no session nobody\n")


# --- status, check, memory ------------------------------------------------------------------


def test_status(root: Root) -> None:
    root.behave(mode="no-terminal")
    failed = root.submit("x", attempts=1, title="It fails")
    root.reaches(failed, "failed")
    root.behave(mode="hang-turn")
    running = root.submit("x", session="status", title="It runs")
    root.reaches(running, "running")
    behind = root.submit("x", session="status", title="It waits its turn")
    until(lambda: root.health()["queued"] == 1, "a queued task")
    done = root.run("status")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "codexd: all is well"
    assert lines[1] == (
        f"version {__version__}, codex 0.163.0, workers by process, inbox by inotify"
    )
    assert lines[lines.index("running: 1") + 1] == f"  task {running} running  It runs"
    assert lines[lines.index("queued: 1") + 1] == f"  task {behind} queued  It waits its turn"
    ended = str(root.task(failed)["ended"])[:19]
    assert any(line.startswith(f"  {ended}  task {failed} failed (") for line in lines)
    assert re.search(r"^\d{4}-\d\d-\d\d: [1-9]\d* attempts?, \d+ tokens \(", done.stdout, re.M)
    assert lines[-1] == f"state: {root.root}   inbox: {root.dirs.inbox} (0 files)"
    health = root.json("status")
    assert (health["status"], health["running"], health["gate"]) == ("ok", 1, {})
    root.cancel(running, behind)


def test_failures_are_found_however_many_have_ended_since(tmp_path: Path) -> None:
    with Root(tmp_path / "root") as root:
        root.behave(mode="no-terminal")
        failed = root.submit("x", attempts=1, session="old", title="It fails")
        root.reaches(failed, "failed")
        assert root.run("hold").returncode == 0
        files = [root.root / f"{number}.md" for number in range(51)]
        for file in files:
            file.write_text("x")
        ids = root.json("task", "submit", *map(str, files))
        root.cancel(*ids)
        assert failed not in [task["id"] for task in root.json("task", "list")]
        for wanted in (["--state", "failed"], ["--session", "old"]):
            assert [t["id"] for t in root.json("task", "list", *wanted)] == [failed]
        cancelled = root.json("task", "list", "--state", "cancelled")
        assert len(cancelled) == 50
        assert [t["ended"] for t in cancelled] == sorted(t["ended"] for t in cancelled)
        ended = str(root.task(failed)["ended"])[:19]
        status = root.run("status").stdout
        assert f"failed last: 1\n  {ended}  task {failed} failed (" in status


def test_status_tells_what_has_to_be_mended(tmp_path: Path) -> None:
    with Root(tmp_path / "root") as root:
        root.stop()
        with root.dirs.ledger.open("ab") as ledger:
            ledger.write(b"somebody wrote this\n")
        root.start()
        assert root.child is not None
        (root.root / "codexd.yaml").write_text("workers: many\n")
        root.child.send_signal(signal.SIGHUP)
        until(lambda: root.health()["config_problem"], "the refusal")
        done = root.run("status")
        assert done.returncode == 1
        first, refused, damaged = done.stdout.splitlines()[:3]
        assert first == "codexd: it works, but something has to be mended"
        assert refused.startswith(
            f"configuration: {root.root}/codexd.yaml:1: workers: found 'many'"
        )
        assert damaged == "ledger: 1 damaged line; see codexd ledger verify"
        assert root.run("status", "--json").returncode == 1
        assert root.run("hold").returncode == 0
        until(lambda: root.health()["status"] == "hold", "the hold")
        done = root.run("status")
        assert done.returncode == 69
        assert done.stdout.startswith("codexd: hold: ")
        assert f"\n{refused}\n{damaged}\n" in done.stdout


def test_what_holds_one_profile_holds_back_no_other(tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    config = CONFIG.replace("codex:\n", "codex:\n  profile: usual\n")
    (root.root / "codexd.yaml").write_text(config)
    closed(root, "quota:work", NOBODY, profile="work")
    with root:
        until(lambda: root.health()["gate"], "the gate")
        done = root.run("status")
        told = "quota:work until 2099-11-23T07:20:11.123Z: Quota exceeded"
        assert done.stdout.splitlines()[:2] == [
            "codexd: it works, but something has to be mended", f"profiles: {told}",
        ]  # fmt: skip
        assert done.returncode == root.run("status", "--json").returncode == 1
        done = root.run("ask", "x")
        assert (done.returncode, done.stdout) == (0, "fine\n")
        assert "it will wait" not in done.stderr
        done = root.run("ask", "--timeout", "1", "-o", "profile=work", "x")
        assert done.returncode == 75
        assert f"codexd: it will wait: {told}\n" in done.stderr
        root.stop()
        closed(root, "quota", NOBODY.replace("nobody", "usual0"))
        root.start()
        assert root.run("status").returncode == 69
        for profile, waits in (("usual", True), ("other", False)):
            options = ["-o", f"profile={profile}", *(["--timeout", "1"] if waits else [])]
            done = root.run("ask", *options, "x")
            assert done.returncode == (75 if waits else 0)
            assert ("it will wait: quota until" in done.stderr) == waits


def closed(root: Root, reason: str, id: str, **task: object) -> None:
    """A task that waits at a gate which a daemon before has closed for long."""
    root.left(id, (Kind.QUEUED, task), at=clock.now())
    ledger = Ledger(root.dirs.ledger, root.dirs.checkpoint)
    facts = {"reason": reason, "message": "Quota exceeded", "until": "2099-11-23T07:20:11.123Z"}
    ledger.append([Event(clock.now(), Note.CLOSED, facts=facts)])
    ledger.close()


def test_status_tells_whatever_the_daemon_says(
    root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"full": True, "sandbox": "no namespaces", "watch_problem": "no inotify is left"}
    overview.status(root.view, {**root.health(), **told})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "codexd: it works, but something has to be mended",
        "inbox: the queue is full (limits.queue); files wait until there is room",
        "sandbox: no namespaces",
    ]
    assert lines[4] == "inbox: no inotify is left"
    assert overview.why({"status": "hold", "gate": {"hold": None}}) == "hold", "an older one's"


def test_a_mistyped_root_is_not_an_empty_one(tmp_path: Path) -> None:
    for verb in (["usage"], ["memory", "x"], ["task", "list"], ["status"]):
        done = subprocess.run(
            [PYTHON, "-m", "codexd.cli", "--root", str(tmp_path / "none"), *verb],
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (69, "")
        assert f"there is no inbox {tmp_path}/none/inbox" in done.stderr


def test_check_for_somebody_who_may_not_look_at_the_daemon(root: Root, tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text("x")
    root.dirs.heartbeat.chmod(0)
    command = [*POWERLESS, *root.command("check", str(tmp_path / "good.md"))]
    done = subprocess.run(command, env=root.env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_check_of_a_configuration_of_any_name(root: Root, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("\nworkers: x\n")
    done = root.run("--config", str(other), "--json", "check", str(other))
    (told,) = json.loads(done.stdout)
    assert (done.returncode, told["line"]) == (1, 2)
    assert told["reason"].startswith("workers: found 'x'; allowed: ")
    endless = tmp_path / "codexd.yaml"
    endless.symlink_to("/dev/zero")
    told = root.run("check", str(endless)).stdout
    assert told == f"{endless}: cannot be read: not a regular file\n"


def test_check(root: Root, tmp_path: Path) -> None:
    files = {
        "good.md": ("---\nsession: x\n---\nx", ": ok"),
        "bad.md": ("---\nsesion: x\n---\nx", ":2: sesion: unknown key (did you mean session?)"),
        "empty.txt": ("", ": the file is empty"),
        "codexd.yaml": ("\nworkers: x\n", ":2: workers: found 'x'; allowed: a whole number"),
        "good.md.tmp": ("x", ": a file of this name is ignored until it is renamed"),
    }
    for name, (text, _) in files.items():
        (tmp_path / name).write_text(text)
    names = [str(tmp_path / name) for name in files]
    done = root.run("check", *names, str(tmp_path / "none.md"))
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    wanted = [tmp_path / name for name in files]
    for line, path, (_, told) in zip(lines, wanted, files.values(), strict=False):
        assert line.startswith(f"{path}{told}")
    assert lines[-1] == f"{tmp_path}/none.md: No such file or directory"
    done = root.run("check", names[0], str(root.root / "codexd.yaml"))
    assert done.returncode == 0
    assert done.stdout == f"{names[0]}: ok\n{root.root}/codexd.yaml: ok\n"


def test_memory(root: Root) -> None:
    notes = root.dirs.work / "MEMORY.md"
    notes.write_text("# Deploying\n\nThe staging server is called pelican.\n\n# Lunch\n\nNoon.\n")
    try:
        (hit,) = root.json("memory", "Which", "staging", "server?")
        assert "pelican" in hit["text"]
        done = root.run("memory", "--explain", "-", stdin="the staging server\n")
        assert done.returncode == 0
        assert re.match(r"MEMORY\.md:\d\n  score [0-9.]+; terms: ", done.stdout)
        assert "pelican" in done.stdout
        assert re.match(r"1 excerpt by (rg|grep|python) in \d+ ms", done.stderr)
        assert root.raw("memory", "-", stdin=b"\xff\xfe pelican").returncode == 0
        assert root.json("memory", "nothing", "whatsoever") == []
        assert root.run("memory", "nothing", "whatsoever").stderr.startswith("no note fits")
    finally:
        notes.unlink()


# --- statuses, options, streams -----------------------------------------------------------------


def test_each_exit_status(root: Root, tmp_path: Path) -> None:
    """0 and 1 by ask, above; here those that come before anything is done."""
    assert root.run("task").returncode == 2
    assert root.run("frobnicate").returncode == 2
    assert root.run("ask").returncode == 2
    assert root.run("task", "show", NOBODY).returncode == 66
    assert root.run("--root", str(tmp_path / "none"), "task", "list").returncode == 69
    assert root.run("--config", str(tmp_path / "none.yaml"), "memory", "x").returncode == 78
    assert root.run("--root", str(root.log), "status").returncode == 78
    root.behave(mode="hang-turn")
    id = root.submit()
    assert root.run("task", "wait", id, "--timeout", "1").returncode == 75
    root.cancel(id)


def test_without_permission(tmp_path: Path) -> None:
    with Root(tmp_path / "root") as root:
        id = root.submit()
        root.reaches(id, "done")
        root.dirs.inbox.chmod(0o550)
        root.dirs.ledger.chmod(0)
        refused = (
            f"codexd: {root.dirs.inbox}: you may not put files there; those of its group may\n"
        )
        unread = f"codexd: {root.dirs.ledger}: Permission denied\n"
        for args, said in (
            (["ask", "x"], refused),
            (["hold"], refused),
            (["task", "submit", str(root.root / "task.json")], refused),
            (["task", "list"], unread),
            (["status"], unread),
        ):
            done = subprocess.run(
                [*POWERLESS, *root.command(*args)], env=root.env, capture_output=True, text=True
            )
            assert (done.returncode, done.stdout, done.stderr) == (77, "", said), args
        root.dirs.inbox.chmod(0o770)
        until(lambda: not list(root.dirs.inbox.iterdir()), "an empty inbox")


@pytest.mark.parametrize(
    "order",
    [
        ["--root", "ROOT", "--json", "task", "list"],
        ["task", "--root", "ROOT", "list", "--json"],
        ["task", "list", "--json", "--root", "ROOT"],
        ["--root", "/nonexistent", "task", "list", "--json", "--root=ROOT"],
    ],
)
def test_shared_options_before_and_after_the_verb(root: Root, order: list[str]) -> None:
    root.submit()
    args = [word.replace("ROOT", str(root.root)) for word in order]
    done = subprocess.run(
        [PYTHON, "-m", "codexd.cli", *args], env=root.env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    "words",
    [
        ["--root", "", "status"],
        ["--root=", "task", "list"],
        ["--config", "", "memory", "x"],
        ["ask", "-C", "", "x"],
        ["install", "--prefix", ""],
    ],
)
def test_an_empty_place_is_not_the_usual_one(tmp_path: Path, words: list[str]) -> None:
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [PYTHON, "-m", "codexd.cli", *words], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(": it must not be empty")


def test_options_are_written_out_and_errors_steer_no_terminal(root: Root) -> None:
    assert root.run("task", "list", "--sess", "x").returncode == 2
    done = root.run("task", "list", "\x1b[2J")
    assert done.returncode == 2
    assert done.stderr.endswith("unrecognized arguments: \\x1b[2J\n")


def test_help_tells_what_an_option_may_be(root: Root) -> None:
    for verb, told in (
        (["task", "list"], "queued, running, waiting, done, failed or cancelled"),
        (["usage"], "day, session or model"),
        (["ledger", "export"], "json or csv"),
    ):
        assert told in " ".join(root.run(*verb, "--help").stdout.split())


def test_a_configuration_that_is_not_there_or_not_for_us(root: Root, tmp_path: Path) -> None:
    done = root.run("--config", "/nonexistent", "status")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == "codexd: /nonexistent: cannot be read: No such file or directory\n"
    secret = tmp_path / "secret.yaml"
    secret.touch(0)
    for verb in (["memory", "x"], ["serve"]):
        done = subprocess.run(
            [*POWERLESS, *root.command("--config", str(secret), *verb)],
            env=root.env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 77
        assert f"{secret}: cannot be read: Permission denied" in done.stderr


def test_a_user_without_a_name_or_a_home(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can be anybody")
    env = {name: value for name, value in uncovered().items() if name != "HOME"}
    # Only what setpriv itself starts may come from root's home.
    python = str(Path(sys.executable).with_name("python3"))
    done = subprocess.run(
        ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups",
         python, "-m", "codexd.cli", "status"],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (78, "")
    told = "codexd: user 54321 has no home: set HOME, or say --root DIR\n"
    assert done.stderr == told


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_streams_that_are_closed(root: Root, closed: str) -> None:
    root.submit()  # so that there is something to print
    for args, status in ((["status"], 0), (["task", "list"], 0), (["ask", "-"], 2)):
        command = f'"$@" {closed}'
        if args == ["ask", "-"] and "0" not in closed:
            continue
        done = subprocess.run(
            ["sh", "-c", command, "sh", *root.command(*args)],
            env=root.env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        assert done.returncode == status, done.stderr
        assert bool(done.stdout) == (status == 0 and "1" not in closed)


def test_a_root_with_a_blank_in_its_name(tmp_path: Path) -> None:
    place = tmp_path / "a root"
    config = CONFIG.replace("listen: off", "listen: unix")
    with Daemon(place, config=config) as root:
        where = f"inbox={place}/inbox http=unix:{place}/run/http.sock"
        assert root.ready == f"ready {where}"


def test_a_daemon_whose_streams_are_closed(tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    with subprocess.Popen(
        ["sh", "-c", '"$@" 0<&- 1>&- 2>&-', "sh", *root.command("serve")], env=root.env
    ) as child:
        until(lambda: root.health()["status"] == "ok", "the daemon")
        assert root.run("ask", "x").stdout == "fine\n"
        until(lambda: root.processes(), "the daemon's process")
        for pid in root.processes():
            os.kill(pid, signal.SIGTERM)
        child.wait(20)


def test_help_and_version(root: Root) -> None:
    assert root.run("--version").stdout == f"codexd {__version__}\n"
    for words in (["--help"], ["ask", "--help"], ["task", "--help"], ["task", "wait", "--help"]):
        done = root.run(*words)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: codexd")


def test_a_reader_that_has_seen_enough(root: Root) -> None:
    root.behave(answer=BIG)
    with subprocess.Popen(
        root.command("ask", "x"), env=root.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(10) == BIG.encode()[:10]
        child.stdout.close()
        assert b"Traceback" not in child.stderr.read()
        assert child.wait(20) == 128 + signal.SIGPIPE


def test_whoever_presses_control_c_sees_no_traceback(root: Root, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def is_read() -> bool:
        try:
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    command = root.command("check", str(fifo), str(fifo))
    with subprocess.Popen(command, env=root.env, stderr=subprocess.PIPE, text=True) as child:
        until(is_read, "it reads")
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=20)[1] == ""
    assert child.returncode == 130


def test_an_answer_that_cannot_be_written(root: Root) -> None:
    env = {**root.env, "PYTHONUNBUFFERED": ""}
    for verb in (["ask", "x"], ["status"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                root.command(*verb), env=env, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 69
        told = done.stderr.splitlines()
        assert told[-1] == "codexd: standard output: No space left on device"


@pytest.mark.parametrize(
    ("verb", "status", "said"),
    [
        (["ask", "x"], 0, "fine\n"),
        (["ask", ""], 2, ""),
        (["task", "show", "nope"], 66, ""),
        (["task", "bogus"], 2, ""),
    ],
)
def test_words_that_nobody_hears_change_nothing(
    root: Root, verb: list[str], status: int, said: str
) -> None:
    """As in a log of cron's, on a disk that is full."""
    for env in (root.env, {**root.env, "PYTHONUNBUFFERED": "1"}):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                root.command(*verb), env=env, stdout=subprocess.PIPE, stderr=full, text=True
            )
        assert (done.returncode, done.stdout) == (status, said)


def test_help_that_cannot_be_written(root: Root) -> None:
    with open("/dev/full", "w") as full:
        command, env = root.command("status", "--help"), {**root.env, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    told = "codexd: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (69, told)


def test_a_locale_without_unicode(root: Root) -> None:
    root.submit("x", session="latin", title="日本")
    env = {**root.env, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        root.command("task", "list", "--session", "latin"), env=env, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u65e5\\u672c" in done.stdout


def test_a_name_that_is_not_utf8_is_json_for_everybody(tmp_path: Path) -> None:
    with Root(tmp_path / "root") as root:
        name = os.fsdecode(b"caf\xe9 \\ud800 \xf0\x9f\x98\x80.md")
        root.drop(name, "x")
        (task,) = until(lambda: [t for t in root.tasks() if t["state"] == "done"], "the task")
        done = root.run("task", "list", "--json")
        (told,) = json.loads(done.stdout)
        assert told["file"] == "caf? \\ud800 \U0001f600.md"
        assert json.loads(root.run("task", "show", str(task["id"]), "--json").stdout)["file"]
        queued = [e for e in map(json.loads, root.run("ledger", "export").stdout.splitlines())
                  if e["kind"] == "queued"]  # fmt: skip
        assert [e["facts"]["file"] for e in queued] == [told["file"]]


# --- a terminal ---------------------------------------------------------------------------------

NASTY = "red\x1b[31m \x1b]0;t\x07 \x9b2J \x90q\x9c \r\b\x7f \u202egpj.exe\u2066 \u2028 end\nbye"
DANGEROUS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


def on_terminal(root: Root, *args: str) -> tuple[int, str]:
    """Status, and what reached the terminal from stdout and stderr."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        root.command(*args), env=root.env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                seen.extend(data)
        except OSError:
            return  # the other end has closed

    reader = threading.Thread(target=read)
    reader.start()
    status = child.wait(60)
    reader.join(10)
    os.close(ours)
    return status, seen.decode().replace("\r\n", "\n")


def test_nothing_steers_a_terminal(root: Root) -> None:
    root.behave(answer=NASTY)
    status, seen = on_terminal(root, "ask", "-s", "nasty", "x")
    assert status == 0
    assert not DANGEROUS.search(seen), ascii(seen)
    assert "red\\x1b[31m \\x1b]0;t\\x07 \\x9b2J" in seen
    assert "\\u202egpj.exe\\u2066 \\u2028 end\nbye\n" in seen
    assert root.raw("ask", "x").stdout == NASTY.encode() + b"\n"  # into a pipe as it is

    root.drop("\x1b[2J\x9b\u202ename.md", "---\ntitle: t\n---\nx")
    root.drop("\x1b[2Jbad.md", "\0")
    until(lambda: list(root.dirs.rejected.glob("*bad.md.reason")), "the rejection")
    (task,) = until(lambda: [t for t in root.tasks() if "name.md" in str(t["file"])], "the task")
    for args in (["task", "list"], ["task", "show", task["id"]], ["status"], ["session", "list"]):
        status, seen = on_terminal(root, *args)
        assert status == 0
        assert not DANGEROUS.search(seen), ascii(seen)


def test_a_terminal_shows_letters_and_spaces_of_all_scripts(root: Root) -> None:
    answer = "naïve\u00a0café\u202f! 日本\u3000語 می\u200cخواهم 👩\u200d💻\tend"
    root.behave(answer=answer)
    assert answer in on_terminal(root, "ask", "x")[1]


# --- selftest -----------------------------------------------------------------------------------


def test_selftest_runs_the_real_codex(tmp_path: Path) -> None:
    root = Daemon(tmp_path / "root")
    done = root.run("selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert re.match(r"ok    codex \d+\.\d+\.\d+ at /", lines[0])
    assert lines[-1] == "ok    all is well: two turns, one thread, no account and no token used"
    assert not root.dirs.ledger.exists()  # nothing of the installation is touched


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_selftest_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    bin = tmp_path / "a: b # c"
    bin.mkdir()
    (bin / "codex").symlink_to(FAKE)
    root = Daemon(tmp_path / "root", config=f"codex:\n  bin: '{bin}/codex'\n")
    place = tmp_path / "tmp"
    place.mkdir()
    env = {**root.env, "TMPDIR": str(place), "CODEX_FAKE_MODE": "hang-turn"}
    command = [PYTHON, "-m", "codexd.cli", "--root", str(root.root), "selftest"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert any(line == "ok    codexd serve is ready\n" for line in child.stdout)
        child.send_signal(number)
        assert child.wait(30) == 128 + number
    assert list(place.iterdir()) == []
    assert not Daemon(place).processes()


def test_a_selftest_that_fails_says_where(tmp_path: Path) -> None:
    codex = tmp_path / "codex"
    codex.write_text(f'#!/bin/sh\nCODEX_FAKE_MODE=replay:e400 exec {FAKE} "$@"\n')
    codex.chmod(0o755)
    done = Daemon(tmp_path / "root", config=f"codex:\n  bin: {codex}\n").run("selftest")
    assert done.returncode == 1
    *_, ready, failed = done.stdout.partition(" started ")[0].splitlines()[:3]
    assert ready == "ok    codexd serve is ready"
    assert re.match(rf"fail  task {ID} is failed \(config\): Invalid request: bad", failed)


def test_selftest_without_codex(tmp_path: Path) -> None:
    root = Daemon(tmp_path / "root", config=f"codex:\n  bin: {tmp_path}/none\n")
    done = root.run("selftest")
    assert done.returncode == 1
    assert done.stdout.startswith(f"fail  {tmp_path}/none (codex.bin) is not an executable file; ")


def test_ask_on_the_real_codex(tmp_path: Path) -> None:
    with CaseModel() as model:
        root = Daemon(tmp_path / "root", model.environment())
        model.write_config(root.dirs.codex_home)
        with root:
            done = root.run("ask", "[[say One.\u2028Two. ☃]]")
            assert (done.returncode, done.stdout) == (0, "One.\u2028Two. ☃\n")
            done = root.run("ask", "-o", "attempts=1", "[[400]]")
            assert (done.returncode, done.stdout) == (1, "")
            assert "failed (config): Invalid value: 'parameter'." in done.stderr


def test_a_list_has_what_is_still_in_the_inbox(tmp_path: Path) -> None:
    one = Daemon(tmp_path / "root")
    one.dirs.inbox.mkdir()
    done = one.run("task", "submit", "-", stdin="Say hello.\n")
    id = done.stdout.strip()
    assert "not serving" in done.stderr
    (found,) = one.json("task", "list")
    assert (found["id"], found["state"]) == (id, "queued")
    assert one.json("task", "list", "--state", "done") == []
