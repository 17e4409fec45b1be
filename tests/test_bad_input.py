"""Bad input, bad configuration, a bad host: each is told in full, and nothing else is harmed.

The daemon of most tests has no privileges, even where the tests run as root: root's
power over files would hide what a user meets.  Codex is the fake one; no turn matters.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from codexd import ledger, place, spool
from codexd.intake import BATCH
from codexd.ledger import seal
from codexd.model import Event, Kind, Note
from codexd.view import View
from tests.daemon import PYTHON, Daemon, read_answer, until
from tests.history import AT, ident, move, queued

FAKE = Path(__file__).parent / "bin" / "codex"
ROOT = os.geteuid() == 0
POWERLESS = ["setpriv", "--bounding-set=-all"] if ROOT else []
if ROOT and subprocess.run([*POWERLESS, "true"]).returncode:
    pytest.skip("root that cannot give up its powers", allow_module_level=True)
pytestmark = pytest.mark.xdist_group("bad-input")
CONFIG = """\
workers: 8
codex:
  bin: {bin}
limits:
  file: 64K
  disk_free: {free}
http:
  listen: off
"""
USED = "20990102t030405-used000000"
NOBODY = "20260102t030405-nobody0000"
AGAIN = (
    f"the id {USED} is used already, or so old that it may have been (retention.archive); "
    "drop it under another name"
)

needs_mount = pytest.mark.skipif(not ROOT, reason="needs root, to mount a file system")


class Mortal(Daemon):
    """A daemon on the fake Codex, without root's power over files."""

    def __init__(self, root: Path, *, bin: Path = FAKE, free: str = "0") -> None:
        super().__init__(root, config=CONFIG.format(bin=bin, free=free))
        self.view = View(self.dirs)
        self.behave()

    def __exit__(self, *told: Any) -> None:
        super().__exit__(*told)
        self.view.close()

    def behave(self, **settings: object) -> None:
        """What the fake Codex does from now on."""
        path = self.dirs.codex_home / "fake.json"
        path.write_text(json.dumps({"answer": "fine", **settings}))

    def start(self) -> None:
        command = [*POWERLESS, PYTHON, "-m", "codexd.cli", "--root", str(self.root), "serve"]
        with open(self.log, "a") as log:
            self.child = subprocess.Popen(
                command, env=self.env, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.child.stdout is not None
        self.ready = self.child.stdout.readline().strip()
        assert self.ready.startswith("ready "), self.log.read_text()[-4000:]

    def health(self) -> dict[str, Any]:
        """What `codexd status` shows."""
        return dict(self.view.health()[1])

    def rejections(self) -> list[dict[str, Any]]:
        lines = self.dirs.ledger.read_bytes().splitlines(keepends=True)
        events = [ledger.parse(line) for line in lines if not line.startswith(b"#")]
        return [dict(e.facts) for e in events if e.kind is Note.REJECTED]


def refused(root: Path, *options: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Status and log of a `codexd serve` that cannot begin."""
    done = subprocess.run(
        [*POWERLESS, PYTHON, "-m", "codexd.cli", "--root", str(root), *options, "serve"],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert not done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.returncode, done.stderr.partition(" error ")[2].rstrip("\n")


# --- files that are no tasks ----------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1"
KEYS = (
    "session, workdir, model, profile, sandbox, resume, timeout, idle_timeout, priority, "
    "after, not_before, attempts, key, title, images, add_dirs, output_schema, memory, "
    "verify, limits"
)
LINE = "allowed: 1 to 200 printable characters on one line"
WHEN = "a time such as 2026-11-24T02:00 or 2026-11-24T02:00:00Z, or a delay of 1s to 366d"
PLAIN = "aliases, anchors and tags are not allowed; quote *, & or !"
BELOW = "is not below a configured root (ROOT/work); see workdirs in ROOT/codexd.yaml"


def front(matter: str) -> str:
    """A Markdown task with this front matter, which begins at line 2."""
    return f"---\n{matter}\n---\nDo this."


# name: the content, and the whole reason (ROOT stands for the daemon's, ABOVE for its parent)
FILES: dict[str, tuple[str | bytes, str]] = {
    "empty.md": ("", "the file is empty"),
    "blank.md": (" \n\t\n", "the file is blank"),
    "picture.md": (PNG, "line 3: a NUL byte; a task file is UTF-8 text"),
    "nul.md": (b"Do\nthis\0", "line 2: a NUL byte; a task file is UTF-8 text"),
    "large.md": ("x" * 70_000, "70000 bytes; the limit is 65536 (limits.file)"),
    "latin1.md": (b"The\ncaf\xe9\n", "line 2: not UTF-8 (byte 0xe9); save the file as UTF-8"),
    "utf16.md": ("Do this".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
    "utf16be.txt": (b"\xfe\xff\0D\0o", "the file is UTF-16; save it as UTF-8"),
    "utf32.md": ("Do this".encode("utf-32"), "the file is UTF-32; save it as UTF-8"),
    # front matter, YAML, JSON
    "malformed.md": (
        front("session: [a"),
        "line 2: not valid YAML: expected ',' or ']', but got '<stream end>'",
    ),
    "colon.md": (
        front("title: a: b"),
        "line 2: not valid YAML: mapping values are not allowed here; "
        "quote a value that contains ': '",
    ),
    "tab.yaml": (
        "prompt: x\n\tsession: y\n",
        "line 2: not valid YAML: found character '\\t' that cannot start any token",
    ),
    "comma.json": (
        '{"prompt": "x"\n "session": "y"}', "line 2: not valid JSON: Expecting ',' delimiter",
    ),
    "cut.json": ('{"prompt": "x', "line 1: not valid JSON: Unterminated string starting at"),
    "list.json": ('["x"]', "line 1: found a list; allowed: keys with their values"),
    "nan.json": ('{"prompt": "x", "priority": NaN}', "line 1: not valid JSON: NaN"),
    "two.yaml": (
        "prompt: x\n---\nprompt: y\n",
        "line 3: a second document begins here; only one is allowed",
    ),
    "tag.yaml": ("prompt: !!python/object/apply:os.system [id]\n", f"line 1: {PLAIN}"),
    "bomb.md": (front("a: &a [x, x]\nb: &b [*a, *a]\nsession: *b"), f"line 2: {PLAIN}"),
    "many.yaml": (f"images: [{'a, ' * 2000}a]\nprompt: x", "line 1: more than 1000 values"),
    "deep.yaml": ("prompt: x\nimages: " + "[" * 5000, "line 2: nested deeper than 20 levels"),
    "deep.md": (front("images: " + "[" * 30 + "]" * 30), "line 2: nested deeper than 20 levels"),
    "deep.json": (
        '{"images":\n' + "[" * 500 + "]" * 500 + "}", "line 2: nested deeper than 20 levels",
    ),
    "twice.md": (
        front("session: a\nsession: b"), "line 3: session: duplicate key, line 2 has it",
    ),
    "twice.json": (
        '{"prompt": "x",\n "prompt": "y"}', "line 2: prompt: duplicate key, line 1 has it",
    ),
    "unknown.md": (
        front("sesion: a"),
        f"line 2: sesion: unknown key (did you mean session?); allowed: {KEYS}",
    ),
    "unknown.json": (
        '{"prompt": "x", "color": "red"}',
        f"line 1: color: unknown key; allowed: {KEYS}, prompt",
    ),
    "open.md": (
        "---\nsession: a\n\nDo this.",
        "line 1: a first line --- begins front matter, which needs a line --- after it",
    ),
    "bare.md": ("---\nsession: a\n---\n\n", "no prompt: nothing follows the front matter"),
    "prompt.md": (
        front("prompt: x"),
        "line 2: prompt: not in front matter; the text below it is the prompt",
    ),
    "prompt.yaml": ("session: a\n", "prompt: missing; allowed: a text in UTF-8 that is not blank"),
    # values
    "priority.md": (
        front("priority: high"),
        "line 2: priority: found 'high'; allowed: a whole number from 0 to 9",
    ),
    "ten.md": (
        front("priority: 10"), "line 2: priority: found '10'; allowed: a whole number from 0 to 9",
    ),
    "number.json": (
        '{"prompt": 5}',
        "line 1: prompt: found the number 5; allowed: a text in UTF-8 that is not blank",
    ),
    "timeout.md": (
        front("timeout: soon"),
        "line 2: timeout: found 'soon'; allowed: a duration from 1s to 24h, "
        "such as 90s, 30m or 2h",
    ),
    "images.md": (
        front("images: a.png"),
        "line 2: images: found 'a.png'; allowed: a list of at most 20, such as [a, b]",
    ),
    "memory.md": (
        front("memory: maybe"),
        "line 2: memory: found 'maybe'; allowed: on or off (or true, false, yes, no)",
    ),
    "resume.md": (
        front("resume: often"), "line 2: resume: found 'often'; allowed: auto, always, never",
    ),
    "attempts.md": (
        front("attempts: 0"), "line 2: attempts: found '0'; allowed: a whole number from 1 to 20",
    ),
    "sandbox.md": (
        front("sandbox: none"),
        "line 2: sandbox: found 'none'; allowed: read-only, workspace-write, danger-full-access",
    ),
    "wider.md": (
        front("sandbox: danger-full-access"),
        "sandbox danger-full-access is wider than the configured workspace-write; "
        "a task can only lower it (codex.sandbox)",
    ),
    "model.md": (
        front("model: --yolo"),
        "line 2: model: found '--yolo'; allowed: 1 to 100 of A-Z a-z 0-9 . _ : / -, "
        "not beginning with -",
    ),
    "outside.md": (front("workdir: /etc"), f"workdir /etc {BELOW}"),
    "dots.md": (front("workdir: a/../../.."), f"workdir ABOVE {BELOW}"),
    "escape.md": (front('workdir: "/\\e]0;you\\a"'), f"workdir /\\x1b]0;you\\x07 {BELOW}"),
    "after.md": (
        front("after: [1.md]"),
        "after: there is no task with the id or key '1.md', and none in the inbox that could be "
        "taken before this one",
    ),
    "not_before.json": (
        '{"prompt": "x", "not_before": "9am"}',
        f"line 1: not_before: found '9am'; allowed: {WHEN}",
    ),
    "verify.md": (
        front("verify:\n  rounds: 2"),
        "line 2: verify.command: missing; allowed: 1 to 1000 printable characters on one line",
    ),
    "limits.yaml": (
        "prompt: x\nlimits: {memory: 1G}\n",
        "limits: only where workers are systemd units can a task have limits of its own; "
        "leave them out, or start codexd as a service",
    ),
    # names of sessions
    "blank-name.md": (front('session: " "'), f"line 2: session: found ' '; {LINE}"),
    "break.md": (front('session: "a\\nb"'), f"line 2: session: found 'a\\nb'; {LINE}"),
    "red.md": (front('session: "\\e[31mred"'), f"line 2: session: found '\\x1b[31mred'; {LINE}"),
    "bidi.md": (front('session: "a\\u202eb"'), f"line 2: session: found 'a\\u202eb'; {LINE}"),
    "long.md": (
        front("session: " + "s" * 201), f"line 2: session: found '{'s' * 57}'…; {LINE}",
    ),
    "names.md": (front("session: [a, b]"), f"line 2: session: found a list; {LINE}"),
    "half.json": (
        '{"prompt": "x", "session": "\\ud800"}',
        "line 1: a text holds half a character (a lone surrogate)",
    ),
    # names of files
    f"{USED}.md": ("x", AGAIN),
    f"{USED}.json": ("{}", AGAIN),
    "new\nline.md": ("\0", "line 1: a NUL byte; a task file is UTF-8 text"),
    "\x1b[31mred.md": ("\0", "line 1: a NUL byte; a task file is UTF-8 text"),
    "caf\udce9.md": ("\0", "line 1: a NUL byte; a task file is UTF-8 text"),
    # control files
    f"{USED}.cancel": ("please", "a control file (here .cancel) must be empty"),
    "all.hold": ("now\n", "a control file (here .hold) must be empty"),
    f"{NOBODY}.cancel": ("", f"there is no task {NOBODY} to cancel"),
    f"{NOBODY}.hold": ("", f"there is no task {NOBODY} to hold"),
    f"{NOBODY}.release": ("", f"there is no task {NOBODY} to release"),
    f"{NOBODY}.retry": ("", f"there is no task {NOBODY}"),
    "web.cancel": (
        "", "'web.cancel' ends like a control file (ID.cancel); rename it to end otherwise",
    ),
    "web.hold": (
        "",
        "'web.hold' ends like a control file (ID.hold or all.hold); rename it to end otherwise",
    ),
    "all.cancel": (
        "", "'all.cancel' ends like a control file (ID.cancel); rename it to end otherwise",
    ),
    "nobody.reset": ("", "there is no session nobody to reset"),
    "a%zz.reset": ("", "'a%zz': '%zz' is no percent-encoding; write % as %25"),
    "%ff.reset": ("", "'%ff' is not percent-encoded UTF-8"),
    "%0A.reset": ("", f"'\\n' is no session's name; {LINE}"),
}  # fmt: skip


# --- what is no file at all -----------------------------------------------------------------


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def hard_link(path: Path) -> None:
    secret = path.parent.parent / "secret"
    secret.write_text("only for its owner")
    os.link(secret, path)


def directory(path: Path) -> None:
    path.mkdir()
    (path / "task.md").write_text("a good task in a bad place")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(path))  # a socket's name has at most 107 bytes


def device(path: Path) -> None:
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # zero: without an end


def unreadable(path: Path) -> None:
    path.touch(0)


def nothing_for_long(path: Path) -> None:
    path.touch()
    os.truncate(path, 8 << 30)


def anothers(path: Path) -> None:
    path.write_text("a good task that only its owner may read")
    path.chmod(0o600)
    os.chown(path, 65534, 65534)


def anothers_directory(path: Path) -> None:
    directory(path)
    os.chown(path, 65534, 65534)


LINK = "it is a symbolic link: drop the file itself"
CLOSED = "codexd may not read it: chmod g+r (or 644) it and drop it again"
# name: how it is made, and the whole reason
THINGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "link.md": (link_to("../codexd.yaml"), LINK),
    "dangling.md": (link_to("nowhere"), LINK),
    "endless.md": (link_to("/dev/zero"), LINK),
    "itself.md": (link_to("itself.md"), LINK),
    f"{USED}.hold": (link_to("/dev/null"), LINK),
    "hard.md": (hard_link, "it has another name (a hard link): drop a copy of it"),
    "directory.md": (directory, "it is a directory"),
    f"{NOBODY}.md": (directory, "it is a directory"),
    f"{NOBODY[:-1]}1.cancel": (directory, "it is a directory"),
    "fifo.md": (os.mkfifo, "it is a FIFO"),
    f"{NOBODY[:-1]}2.cancel": (os.mkfifo, "it is a FIFO"),
    "socket.md": (listening, "it is a socket"),
    "unreadable.md": (unreadable, CLOSED),
    "sparse.md": (nothing_for_long, f"{8 << 30} bytes; the limit is 65536 (limits.file)"),
}
ROOTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "device.md": (device, "it is a device"),
    "anothers.md": (anothers, CLOSED),
    "anothers-directory.md": (anothers_directory, "it is a directory"),
}


def make_if_allowed(make: Callable[[Path], None], path: Path) -> None:
    try:
        make(path)
    except PermissionError:
        FORBIDDEN.add(path.name)


FORBIDDEN: set[str] = set()  # those of ROOTS that only root can make, and maybe not even root


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortal]:
    """A daemon that was given all of it, with a good file beside each bad one."""
    with Mortal(tmp_path_factory.mktemp("bad") / "root") as one:
        one.drop(f"{USED}.md", "a good task with an id of its own")
        until(lambda: (one.dirs.answers / f"{USED}.md").exists(), "the first answer")
        makers = {name: make for name, (make, _) in (THINGS | ROOTS).items()}
        for number, name in enumerate([*FILES, *makers]):
            if name in makers:
                make_if_allowed(makers[name], one.dirs.inbox / name)
            else:
                one.drop(name, FILES[name][0])
            one.drop(f"beside-{number}.md", f"beside {name!r}")
        yield one


def told(daemon: Mortal, reason: str) -> str:
    root = str(daemon.root)
    return reason.replace("ROOT", root).replace("ABOVE", os.path.dirname(root))


def check_rejected(daemon: Mortal, name: str, reason: str) -> None:
    """The reason beside the file, in the ledger and nothing else; the file itself is kept."""
    reason = told(daemon, reason)
    assert daemon.reason(name) == f"{reason}\n"
    assert [f["reason"] for f in daemon.rejections() if f["file"] == name] == [reason]
    assert not os.path.lexists(daemon.dirs.inbox / name)


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_kept_with_the_reason(daemon: Mortal, name: str) -> None:
    content, reason = FILES[name]
    check_rejected(daemon, name, reason)
    data = content.encode() if isinstance(content, str) else content
    path = daemon.dirs.rejected / name
    until(path.exists, f"{name!r} beside its reason")
    assert path.read_bytes() == data


@pytest.mark.parametrize("name", THINGS)
def test_what_is_no_file_of_its_own_is_kept_with_the_reason(daemon: Mortal, name: str) -> None:
    check_rejected(daemon, name, THINGS[name][1])
    until(lambda: os.path.lexists(daemon.dirs.rejected / name), f"{name} beside its reason")


@pytest.mark.parametrize("name", ROOTS)
def test_what_others_dropped_is_kept_with_the_reason(daemon: Mortal, name: str) -> None:
    if name in FORBIDDEN:
        pytest.skip("needs root, to make devices and files of others")
    _, reason = ROOTS[name]
    if name != "anothers-directory.md":
        check_rejected(daemon, name, reason)
        assert os.path.lexists(daemon.dirs.rejected / name)
        return
    # Only its owner can give a directory a new place.
    said, where = daemon.reason(name).splitlines()
    assert said == reason
    hidden = Path(where.removeprefix("It lies in "))
    assert (hidden / "task.md").read_text() == "a good task in a bad place"
    assert hidden.parent == daemon.dirs.inbox


def test_every_good_file_beside_a_bad_one_is_answered(daemon: Mortal) -> None:
    for number in range(len(FILES) + len(THINGS) + len(ROOTS)):
        front_matter, text = daemon.answer(f"beside-{number}")
        assert (front_matter["state"], text) == ("done", "fine\n")
    # Nothing else became a task, and nothing hangs about.
    bad = {*FILES, *THINGS, *ROOTS} - {f"{USED}.md"}
    assert not bad & {t["file"] for t in daemon.tasks()}
    until(lambda: not list(daemon.dirs.tasks.iterdir()), "all tasks in the archive")
    hidden = [p for p in daemon.dirs.inbox.iterdir() if not p.name.startswith(".rejected-")]
    assert not hidden


# --- names, and files that are not complete -----------------------------------------------------


def drop_raw(daemon: Daemon, name: str, text: str) -> None:
    """As `cp` does, for names that leave no room for a longer one."""
    (daemon.dirs.inbox / name).write_text(text)


def by_file(daemon: Daemon, name: str) -> dict[str, Any]:
    """The task that a dropped file became, once it has ended."""

    def ended() -> dict[str, Any] | None:
        return next((t for t in daemon.tasks() if t["file"] == name and t["ended"]), None)

    return until(ended, f"the end of {name!r}")  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("two\nlines.md", "two_lines"),
        ("\x1b]0;title\x07.md", "__0_title_"),
        ("caf\udce9.txt", "caf_"),
        ("été.md", "__t__"),
        ("a b;$(id)`.md", "a_b___id__"),
        ("-rf.md", "-rf"),
        ("**bold** `code` <!-- x -->.md", "__bold____code____--_x_--_"),
        ("n" * 252 + ".md", "n" * 100),
        ("é" * 126 + ".md", "_" * 100),
    ],
)
def test_any_name_will_do(daemon: Mortal, name: str, stem: str) -> None:
    drop_raw(daemon, name, "whatever the name")
    task = by_file(daemon, name)
    assert task["state"] == "done"
    assert os.path.basename(task["answer_file"]) == f"{stem}.{task['id']}.md"
    assert Path(task["answer_file"]).read_text().endswith("\n---\nfine\n")
    # The ledger is one line of ASCII for each event, whatever people name their files.
    assert daemon.dirs.ledger.read_bytes().isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", daemon.log.read_text())


def test_a_long_name_is_rejected_under_a_shorter_one(daemon: Mortal) -> None:
    name = "long" * 62 + "xxxx.md"
    drop_raw(daemon, name, "\0")
    (found,) = until(lambda: list(daemon.dirs.rejected.glob("longlong*.reason")), "the reason")
    (facts,) = [f for f in daemon.rejections() if f["file"] == name]
    assert found.name == f"{name[:40]}.{facts['id']}.reason"
    assert found.read_text() == facts["reason"] + "\n"
    assert found.with_suffix("").read_bytes() == b"\0"


def test_a_second_bad_file_of_a_name_does_not_replace_the_first(daemon: Mortal) -> None:
    for content in ("\0first", "\0second"):
        daemon.drop("same.md", content)
        until(lambda c=content: c in kept(daemon, "same.md*"), content)  # type: ignore[misc]
    assert sorted(kept(daemon, "same.md*")) == ["\0first", "\0second"]


def kept(daemon: Daemon, pattern: str) -> list[str]:
    found = [p for p in daemon.dirs.rejected.glob(pattern) if p.suffix != ".reason"]
    return [p.read_text() for p in found]


def test_a_file_is_not_taken_before_its_writer_closes_it(daemon: Mortal) -> None:
    path = daemon.dirs.inbox / "slow.md"
    with open(path, "w") as file:
        file.write("---\nsession: slow\n")
        file.flush()
        time.sleep(2.0)  # longer than it takes for a file without a writer to be settled
        assert path.exists()
        file.write("---\nnow it is whole")
    assert daemon.answer("slow")[0]["session"] == "slow"
    assert not any("slow" in facts["file"] for facts in daemon.rejections())


def test_a_file_that_is_linked_in_and_then_loses_its_other_name_is_taken(daemon: Mortal) -> None:
    aside = daemon.root / "aside"
    aside.write_text("delivered as a mail would be")
    os.link(aside, daemon.dirs.inbox / "delivered.md")
    aside.unlink()
    assert daemon.answer("delivered")[1] == "fine\n"


def test_a_key_stands_for_its_first_content(daemon: Mortal) -> None:
    text = "---\nkey: k1\n---\nonce"
    daemon.drop("once.md", text)
    first = daemon.answer("once")[0]["id"]
    daemon.drop("again.md", text)
    daemon.drop("other.md", text + " more")
    assert daemon.reason("other.md") == f"key 'k1' was used by task {first} with other content\n"
    events = until(lambda: [e for e in daemon.events() if "**repeated**" in e], "the repeat")
    assert len(events) == 1
    assert f'first="{first}"' in events[0]
    assert not list(daemon.dirs.answers.glob("again.*"))


def test_a_key_does_not_ask_by_which_door_or_name_its_content_comes(daemon: Mortal) -> None:
    """A script with a temporary file tries once more; so does somebody who copies it there."""
    text = "---\nkey: door\n---\nonce"
    daemon.drop("first.md", text)
    first = daemon.answer("first")[0]["id"]
    for name in ("tmp.a8x", "tmp.b3q"):
        (daemon.root / f"{name}.md").write_text(text)
        done = daemon.run("task", "submit", str(daemon.root / f"{name}.md"))
        assert (done.returncode, done.stdout) == (0, f"{first}\n"), done.stderr
    daemon.drop("by-hand.yaml", "key: door\nprompt: |\n  once\ntitle: another\n")
    until(lambda: not (daemon.dirs.inbox / "by-hand.yaml").exists(), "it is taken")
    until(
        lambda: sum("**repeated**" in e and first in e for e in daemon.events()) == 3, "all three"
    )


def test_who_waits_for_a_file_that_became_no_task_hears_so_after_a_restart(
    tmp_path: Path,
) -> None:
    text = "---\nkey: k1\n---\nonce"
    again, other = NOBODY.replace("2026", "2098"), NOBODY.replace("2026", "2099")
    with Mortal(tmp_path / "root") as daemon:
        daemon.drop(f"{USED}.md", text)
        until((daemon.dirs.answers / f"{USED}.md").exists, "the answer")
        daemon.drop(f"{again}.md", text)
        daemon.drop(f"{other}.md", f"{text} more")
        daemon.reason(f"{other}.md")
        until(lambda: any("**repeated**" in e for e in daemon.events()), "the repeat")
        daemon.stop()
        daemon.start()
        done = daemon.run("task", "wait", other)
        assert done.returncode == 1
        assert done.stderr == (
            f"codexd: {other} was rejected: key 'k1' was used by task {USED} with other content\n"
        )
        assert [t["id"] for t in daemon.json("task", "wait", again)] == [USED]
        done = daemon.run("task", "retry", again)
        assert done.returncode == 0
        until(lambda: USED in [t["retry_of"] for t in daemon.tasks()], "the retry of the first")


def test_a_damaged_record_of_a_key_harms_only_its_own_tasks(daemon: Mortal) -> None:
    daemon.drop("good.md", "---\nkey: k2\n---\nonce")
    daemon.answer("good")
    (record,) = [p for p in daemon.dirs.keys.iterdir() if json.loads(p.read_text())["key"] == "k2"]
    record.write_text("{")
    daemon.drop("bad.md", "---\nkey: k2\n---\nonce")
    reason = daemon.reason("bad.md")
    assert reason.startswith("the record of key 'k2' is damaged: ")
    assert reason.endswith("; move it away\n")
    daemon.drop("behind.md", "---\nafter: [k2]\n---\nonce")
    assert daemon.reason("behind.md") == f"after: {reason}"


def test_a_key_whose_file_became_no_task_is_free(daemon: Mortal) -> None:
    """As of a power cut that took the file, and not its key."""
    place.remember_key(daemon.dirs, "k3", place.Keyed(NOBODY, "0"))
    daemon.drop("free.md", "---\nkey: k3\n---\nonce")
    assert daemon.answer("free")[0]["state"] == "done"


MISTYPED: list[tuple[dict[str, object], str]] = [
    ({"session": 7}, f"session: found the number 7; {LINE}"),
    (
        {"workdir": 5},
        "workdir: found the number 5; allowed: a path: absolute, relative or ~/..., "
        "at most 4096 bytes",
    ),
]


def test_a_damaged_record_of_an_ended_task_cannot_be_retried(daemon: Mortal) -> None:
    daemon.drop("ended.md", "x")
    id = daemon.answer("ended")[0]["id"]
    (home,) = until(lambda: list(daemon.dirs.archive.glob(f"*/{id}")), "the archive")
    record = json.loads((home / "task.json").read_text())
    kept = daemon.dirs.rejected / f"{id}.retry"
    for values, why in MISTYPED:
        request = {**record["request"], **values}
        (home / "task.json").write_text(json.dumps({**record, "request": request}))
        (daemon.dirs.inbox / f"{id}.retry").touch()
        until(kept.exists, f"the rejection of {request}")
        assert daemon.reason(kept.name) == f"the record of task {id} is damaged: {why}\n"
        kept.unlink()
        kept.with_name(f"{kept.name}.reason").unlink()
    done = daemon.run("task", "retry", id)
    assert (done.returncode, done.stdout) == (1, "")
    why = f"rejected: the record of task {id} is damaged: {MISTYPED[-1][1]}"
    assert done.stderr == f"codexd: {id}.retry: {why}\n"
    kept.unlink()
    kept.with_name(f"{kept.name}.reason").unlink()
    (home / "task.json").write_text("{")
    (daemon.dirs.inbox / f"{id}.retry").touch()
    until(kept.exists, "the rejection of half a record")
    assert daemon.reason(kept.name).startswith(f"the record of task {id} is damaged: {home}/task")
    told = json.loads((home / "status.json").read_text())
    for damage, why in {
        "": "not JSON: Expecting val",
        "{}": "it is no task of this id that has ended",
        json.dumps({**told, "id": []}): "it is no task of this id that has ended",
        json.dumps({**told, "state": "over"}): "state: 'over' is none of queued, running, waiting,",
        json.dumps({**told, "title": ["a"]}): "title: list is no type for it",
        json.dumps({**told, "usage": {"input_tokens": "1"}}): "usage: dict is no type for it",
    }.items():
        (home / "status.json").write_text(damage)
        message = str((daemon.view.task(id) or {})["message"])
        assert message.startswith(f"its record is damaged: {home}/status.json: {why}")
        assert message.endswith("; the ledger tells what it came to")
        assert daemon.run("task", "list").returncode == 0
    shown = daemon.run("task", "show", id)
    assert shown.returncode == 0
    assert message in shown.stdout


def test_a_rejection_that_a_crash_broke_off_is_told_once(tmp_path: Path) -> None:
    with Mortal(tmp_path / "root") as daemon:
        for name in ("bad.md", f"{USED}.md"):
            daemon.drop(name, "\0")
            until((daemon.dirs.rejected / name).exists, "the rejected file")
        daemon.kill()
        before = daemon.rejections()
        for facts in before:  # its line is written, and nothing was moved yet
            taken = daemon.dirs.inbox / f".take-{facts['id']}"
            home = daemon.dirs.tasks / facts["id"]
            (daemon.dirs.rejected / facts["file"]).rename(taken)
            (daemon.dirs.rejected / f"{facts['file']}.reason").unlink()
            home.mkdir(exist_ok=True)
            (home / "name").write_text(facts["file"])
        daemon.start()
        for facts in before:
            until((daemon.dirs.rejected / facts["file"]).exists, "the rejected file again")
        assert daemon.rejections() == before
        # Its id was not used up by that.
        daemon.drop(f"{USED}.md", "corrected")
        until((daemon.dirs.answers / f"{USED}.md").exists, "the answer")
        assert daemon.rejections() == before


def test_an_id_whose_line_is_lost_is_not_given_again(tmp_path: Path) -> None:
    with Mortal(tmp_path / "root") as daemon:
        daemon.run("hold")
        daemon.drop(f"{USED}.md", "what was asked for first")
        until(lambda: daemon.tasks() and not os.listdir(daemon.dirs.inbox), "the task, taken")
        daemon.kill()
        made = daemon.dirs.ledger.read_bytes().splitlines(keepends=True)
        daemon.dirs.ledger.write_bytes(b"".join(x for x in made if USED.encode() not in x))
        daemon.start()
        assert f"task.unknown task={USED}" in daemon.log.read_text()
        assert "see codexd(7)" in daemon.log.read_text()
        daemon.drop(f"{USED}.md", "something else")
        assert daemon.reason(f"{USED}.md") == f"{AGAIN}\n"
        assert "asked for first" in (daemon.dirs.tasks / USED / "task.json").read_text()
        # Nor where its attempts alone are left.
        (daemon.dirs.tasks / USED / "1").mkdir()
        (daemon.dirs.tasks / USED / "task.json").unlink()
        daemon.drop(f"{USED}.json", '{"prompt": "something else"}')
        assert daemon.reason(f"{USED}.json") == f"{AGAIN}\n"
        assert not daemon.tasks()


def test_files_that_take_long_to_read_do_not_hold_up_others(tmp_path: Path) -> None:
    slow = "prompt: |\n  x\n" + "# comment\n" * 50_000  # for the YAML parser alone
    with Mortal(tmp_path / "root") as daemon:
        daemon.stop()
        config = CONFIG.format(bin=FAKE, free="0").replace("file: 64K", "file: 1M")
        (daemon.root / "codexd.yaml").write_text(config)
        for number in range(16):
            daemon.drop(f"slow-{number:02}.yaml", slow)
        (daemon.dirs.inbox / "all.hold").touch()
        daemon.start()
        first = until(lambda: len(daemon.tasks()), "the first tasks")
        assert first < 16, "those that were read are tasks before the others are read"
        until(lambda: len(daemon.tasks()) > first, "more of them")


def test_nobody_can_plant_a_name_of_ours(daemon: Mortal) -> None:
    planted = daemon.dirs.inbox / f".take-{USED}"
    planted.mkdir()
    (planted / "x").touch()
    (daemon.dirs.inbox / f".take-{NOBODY}").write_text("taken under a name of ours")
    (daemon.dirs.inbox / ".take-nonsense").write_text("ignored")
    daemon.drop("after.txt", "and still it serves")
    assert daemon.answer("after")[1] == "fine\n"
    until(lambda: not planted.exists(), "the planted directory to be put aside")
    until(lambda: (daemon.dirs.answers / f"{NOBODY}.md").exists(), "the answer to what was taken")
    assert (daemon.dirs.inbox / ".take-nonsense").exists()


def test_a_workdir_that_is_missing_fails_its_task_alone(daemon: Mortal) -> None:
    daemon.drop("missing.md", "---\nworkdir: nowhere\n---\nx")
    front_matter, text = daemon.answer("missing")
    assert (front_matter["state"], front_matter["outcome"], text) == ("failed", "config", "")
    assert front_matter["message"] == f"workdir {daemon.dirs.work}/nowhere does not exist"


def test_after_all_that_the_daemon_is_well(daemon: Mortal) -> None:
    assert daemon.child is not None
    assert daemon.child.poll() is None
    assert daemon.health()["status"] == "ok"
    assert daemon.stop() == 0
    daemon.start()
    assert daemon.health()["damaged"] == 0


# --- Codex is missing, or too old ---------------------------------------------------------------

INSTALL = (
    "install it with `pip install openai-codex-cli-bin` or `npm install -g @openai/codex`,"
    " or set codex.bin in codexd.yaml to its path"
)


def states(daemon: Daemon) -> set[tuple[str, int]]:
    return {(t["state"], t["attempts"]) for t in daemon.tasks()}


def closed(daemon: Mortal, reason: str) -> dict[str, Any]:
    """What closes the gate, once it does."""
    return until(lambda: daemon.health().get("gate", {}).get(reason), f"the gate: {reason}")  # type: ignore[no-any-return]


def gate_events(daemon: Daemon) -> list[str]:
    """`closed REASON` and `opened REASON`, as the ledger tells it."""
    found = (re.search(r'\*\*(closed|opened)\*\* `reason="(\w+)"', e) for e in daemon.events())
    return [f"{m[1]} {m[2]}" for m in found if m]


def test_without_codex_tasks_wait_until_it_is_installed(tmp_path: Path) -> None:
    binary = tmp_path / "bin" / "codex"
    with Mortal(tmp_path / "root", bin=binary) as daemon:
        for name in ("a", "b", "c"):
            daemon.drop(f"{name}.md", "x")
        until(lambda: len(daemon.tasks()) == 3, "three tasks")
        message = f"{binary} (codex.bin) is not an executable file; {INSTALL}"
        assert closed(daemon, "codex")["message"] == message
        assert daemon.health()["status"] == "codex"
        status = daemon.run("status")
        assert status.returncode == 69
        assert status.stdout.startswith(f"codexd: codex: {message}\n")
        id = daemon.tasks()[0]["id"]
        (daemon.dirs.inbox / f"{id}.retry").touch()
        said = daemon.reason(f"{id}.retry")
        assert said == f"task {id} has not ended; cancel it first, or wait\n"
        assert states(daemon) == {("queued", 0)}

        binary.parent.mkdir()
        binary.write_text("not yet")  # an installation that is under way
        binary.chmod(0o755)
        until(lambda: "cannot be run" in closed(daemon, "codex")["message"], "the new reason")
        shutil.copy(FAKE, binary)
        for name in ("a", "b", "c"):
            assert daemon.answer(name)[1] == "fine\n"
        until(lambda: states(daemon) == {("done", 1)}, "the end of all three")
        assert daemon.run("status").returncode == 0
        assert gate_events(daemon) == ["closed codex", "closed codex", "opened codex"]


def test_an_old_codex_is_not_used_until_it_is_upgraded(tmp_path: Path) -> None:
    binary = tmp_path / "codex"
    shutil.copy(FAKE, binary)
    daemon = Mortal(tmp_path / "root", bin=binary)
    daemon.behave(version="0.129.0")
    with daemon:
        daemon.drop("a.md", "x")
        text = f"{binary} is Codex 0.129.0, older than 0.130.0; upgrade it: {INSTALL}"
        assert closed(daemon, "codex")["message"] == text
        assert text in daemon.run("status").stdout
        until(lambda: states(daemon) == {("queued", 0)}, "the task, waiting")
        daemon.behave(version="0.130.0")
        shutil.copy(FAKE, tmp_path / "new")
        (tmp_path / "new").rename(binary)
        assert daemon.answer("a")[1] == "fine\n"
        assert daemon.health()["codex"] == "0.130.0"


# --- a daemon that cannot begin -----------------------------------------------------------------


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = Mortal(tmp_path / "root")
        (tmp_path / "root" / "token").write_text("t" * 32)
        (tmp_path / "root" / "token").chmod(0o600)
        config = CONFIG.format(bin=FAKE, free="0").replace("off", f"127.0.0.1:{port}")
        (tmp_path / "root" / "codexd.yaml").write_text(config + "  token_file: token\n")
        done = daemon.run("serve")
    assert done.returncode == 69
    assert not done.stdout
    why = f"port {port} of 127.0.0.1 is in use; name another in http.listen"
    assert f'error cannot.listen why="{why}"' in done.stderr
    assert not daemon.processes()


def test_a_second_daemon_leaves_the_first_alone(tmp_path: Path) -> None:
    daemon = Mortal(tmp_path / "root")
    daemon.behave(delay=6)
    with daemon:
        daemon.drop("a.md", "x")
        until(lambda: states(daemon) == {("running", 1)}, "the task to run")
        before = daemon.health()["pid"]
        text = f"another codexd serves {daemon.root}; stop that one, or serve another --root"
        assert refused(daemon.root) == (69, f'already.served why="{text}"')
        assert daemon.health()["pid"] == before
        assert daemon.answer("a")[0]["attempts"] == 1
        assert sum("**started**" in e for e in daemon.events()) == 1


def newer(daemon: Mortal) -> None:
    daemon.dirs.ledger.write_bytes(seal("# codexd ledger, format 2"))


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Mortal], None]:
    def damage(daemon: Mortal) -> None:
        path = daemon.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return damage


def shut(name: str, mode: int = 0o555) -> Callable[[Mortal], None]:
    return lambda daemon: (daemon.root / name).chmod(mode)


OWNER = "give it to the user that codexd runs as"
UNUSABLE: dict[str, tuple[Callable[[Mortal], None], int, str]] = {
    "a newer ledger": (
        newer, 69,
        "cannot.go.on why=\"ROOT/tasks.md: the ledger begins with '# codexd ledger, format 2': "
        'this codexd reads format 1 only; use the newer one that wrote it"',
    ),
    "the ledger is a directory": (
        instead("tasks.md", Path.mkdir), 69,
        'cannot.go.on why="ROOT/tasks.md: Is a directory; move it away"',
    ),
    "the ledger is a FIFO": (
        instead("tasks.md", os.mkfifo), 69,
        'cannot.go.on why="ROOT/tasks.md: not a regular file; move it away"',
    ),
    "the ledger is a link to what has no end": (
        instead("tasks.md", link_to("/dev/zero")), 69,
        'cannot.go.on why="ROOT/tasks.md: not a regular file; move it away"',
    ),
    "the configuration is a FIFO": (
        instead("codexd.yaml", os.mkfifo), 78,
        'configuration why="ROOT/codexd.yaml: cannot be read: not a regular file"',
    ),
    "the ledger may not be read": (
        shut("tasks.md", 0), 77,
        f'no.permission why="ROOT/tasks.md: Permission denied; {OWNER}"',
    ),
    "tasks is a file": (
        instead("tasks", Path.touch), 69,
        'cannot.go.on why="ROOT/tasks: it must be a directory; move it away"',
    ),
    "the lock is a directory": (
        instead("lock", Path.mkdir), 69,
        'cannot.go.on why="ROOT/lock: Is a directory; move it away"',
    ),
    "the inbox may not be written": (
        shut("inbox"), 77,
        f'no.permission why="ROOT/inbox: codexd may not write here; {OWNER}"',
    ),
    "answers may not be written": (
        shut("answers"), 77,
        f'no.permission why="ROOT/answers: codexd may not write here; {OWNER}"',
    ),
    "the root may not be written": (
        shut(""), 77,
        f'no.permission why="ROOT: codexd may not write here; {OWNER}"',
    ),
    "the root is a file": (
        lambda daemon: (shutil.rmtree(daemon.root), daemon.root.touch()), 78,
        'configuration why="--root ROOT: it must be a directory, or a name to make one"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_state_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    damage, status, text = UNUSABLE[case]
    with Mortal(tmp_path / "root") as daemon:
        daemon.stop()
    damage(daemon)
    assert refused(daemon.root) == (status, told(daemon, text))


def test_readers_of_a_newer_ledger_say_so(tmp_path: Path) -> None:
    with Mortal(tmp_path / "root") as daemon:
        daemon.stop()
    newer(daemon)
    for verb in ("status", "task list", f"task show {USED}"):
        done = daemon.run(*verb.split())
        assert (done.returncode, done.stdout) == (69, "")
        assert done.stderr == (
            "codexd: the ledger begins with '# codexd ledger, format 2': "
            "this codexd reads format 1 only; use the newer one that wrote it\n"
        )


@needs_mount
def test_a_root_on_a_file_system_that_is_read_only(tmp_path: Path) -> None:
    with Mortal(tmp_path / "root") as daemon:
        daemon.stop()
    with mounted(daemon.root, "--bind", str(daemon.root)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(daemon.root)], check=True)
        text = f'cannot.go.on why="{daemon.root}/lock: Read-only file system; mount it writable"'
        assert refused(daemon.root) == (69, text)


def sparse(path: Path, end: bytes) -> None:
    """8 GiB of nothing after what is there, and then `end`."""
    os.truncate(path, 8 << 30)
    with open(path, "ab") as file:
        file.write(end)


MISTOLD = [
    queued(1, session=7),
    queued(2, workdir=["a"], limit="3"),
    queued(3, not_before="tomorrow"),
    queued(4, after=[5]),
    queued(5),
    move(5, Kind.WAITING, reason="hold", until="2026-02-30T00:00:00.000Z"),
    move(5, Kind.RUNNING, launches="1"),
    move(5, Kind.WAITING, usage={"input_tokens": "many"}, cost=3),
    move(5, Kind.WAITING, usage={"input_tokens": 10**400}),
    move(5, Kind.WAITING, cost={"cpu_seconds": math.nan}),
    queued(7, priority=10**400),
    Event(AT, Note.CLOSED, facts={"reason": 5, "message": "m"}),
    Event(AT, Note.CLOSED, facts={"reason": "quota", "message": "m", "until": 5}),
    Event(AT, Note.REJECTED, facts={"id": 5, "reason": ["r"]}),
    Event(AT, Note.OWED, facts={"event": 5}),
    Event(AT, Note.ROTATED, facts={"ended": 5, "carried": "x"}),
    move(5, Kind.CANCELLED, outcome=5),
]
DAMAGED: dict[str, Callable[[Mortal], object]] = {
    "the checkpoint is no JSON": lambda d: d.dirs.checkpoint.write_text("{"),
    "the checkpoint is a directory": lambda d: (
        d.dirs.checkpoint.unlink(missing_ok=True), d.dirs.checkpoint.mkdir(),
    ),
    "the heartbeat is garbage": lambda d: d.dirs.heartbeat.write_bytes(b"\xff" * 100_000),
    "a session is garbage": lambda d: (d.dirs.sessions / "web.json").write_bytes(b"\0" * 99),
    "the transcript is garbage": lambda d: (d.dirs.transcripts / "web.jsonl").write_bytes(b"\0"),
    "things in tasks": lambda d: (
        (d.dirs.tasks / "README").touch(), (d.dirs.tasks / "lost+found").mkdir(),
        (d.dirs.tasks / NOBODY).mkdir(), (d.dirs.tasks / USED).touch(),
    ),
    "things in the archive": lambda d: (
        (d.dirs.archive / "README").touch(), (d.dirs.archive / "2026-01").mkdir(),
        (d.dirs.archive / "2026-01" / USED).mkdir(),
    ),
    "facts of the wrong types": lambda d: d.dirs.ledger.write_bytes(
        d.dirs.ledger.read_bytes() + b"".join(map(ledger.render, MISTOLD))
    ),
    "the ledger is torn": lambda d: os.truncate(d.dirs.ledger, d.dirs.ledger.stat().st_size - 9),
    "facts that are nested deep": lambda d: d.dirs.ledger.write_bytes(
        d.dirs.ledger.read_bytes() + b"".join(
            seal(f'- {AT} `{ident(6)}` **queued** `file="6.md" title={"[" * n}{"]" * n}`')
            for n in (400, 100_000)
        )
    ),
    "a hole in the ledger": lambda d: sparse(d.dirs.ledger, b"\n"),
    "a hole at the end of the ledger": lambda d: sparse(d.dirs.ledger, b""),
    "the ledger is garbage": lambda d: d.dirs.ledger.write_bytes(os.urandom(5000)),
    "the ledger is empty": lambda d: d.dirs.ledger.write_bytes(b""),
    "directories are missing": lambda d: [
        shutil.rmtree(d.root / name)
        for name in ("inbox", "answers", "archive", "sessions", "transcripts", "keys", "run")
    ],
}  # fmt: skip


def test_a_damaged_state_that_can_be_served(tmp_path: Path) -> None:
    """Each on top of the ones before."""
    with Mortal(tmp_path / "root") as daemon:
        for number, damage in enumerate(DAMAGED.values()):
            assert daemon.stop() == 0
            damage(daemon)
            daemon.start()
            daemon.drop(f"t{number}.md", "---\nsession: web\n---\nx")
            front_matter, text = daemon.answer(f"t{number}")
            assert (front_matter["state"], text) == ("done", "fine\n")
            assert daemon.view.short_list()
            assert "web" in [s["name"] for s in daemon.view.sessions()]
            assert daemon.view.health()[0]
        assert (daemon.dirs.tasks / "README").exists()


def test_a_task_whose_records_nobody_understands_ends_alone(tmp_path: Path) -> None:
    """Its session's name is half a character: sealed, but no daemon has written it."""
    with Mortal(tmp_path / "root") as daemon:
        assert daemon.stop() == 0
        running = (Kind.RUNNING, {"launches": 1, "attempts": 1})
        result = {"outcome": "done", "exit_status": 0, "answer": "fine", "usage": {}}
        for number, (moves, left) in enumerate((([], {}), ([running], result))):
            accepted = (Kind.QUEUED, {"session": f"\ud800{number}"})
            daemon.left(f"{NOBODY[:-1]}{number}", accepted, *moves, at=AT, **left)
        daemon.start()
        daemon.drop("other.md", "x")
        assert daemon.answer("other")[0]["state"] == "done"
        for number in range(2):
            path = daemon.dirs.answers / f"{NOBODY[:-1]}{number}.md"
            until(path.exists, "its answer")
            front_matter, _ = read_answer(path)
            assert (front_matter["state"], front_matter["outcome"]) == ("failed", "unknown")
            assert "its records cannot be understood, and are kept" in front_matter["message"]


def test_a_task_whose_record_has_no_request_fails(tmp_path: Path) -> None:
    daemon = Mortal(tmp_path / "root")
    daemon.left(NOBODY, at=AT)
    (daemon.dirs.tasks / NOBODY / "task.json").write_text(json.dumps({"id": NOBODY}))
    with daemon:
        path = daemon.dirs.answers / f"{NOBODY}.md"
        until(path.exists, "its answer")
        told = f"its record tasks/{NOBODY}/task.json is damaged: request: it is not an object"
        assert told in read_answer(path)[0]["message"]


def test_of_many_damaged_lines_some_are_told_and_all_are_counted(tmp_path: Path) -> None:
    with Mortal(tmp_path / "root") as daemon:
        daemon.stop()
        with open(daemon.dirs.ledger, "ab") as file:
            file.write(b"noise\n" * 5000)
        for _ in range(2):
            before = daemon.log.read_text().count("ledger.damaged")
            daemon.start()
            told = [x for x in daemon.log.read_text().splitlines() if "ledger.damaged" in x]
            assert len(told) == before + 21
            assert told[-1].endswith('where="4980 more lines; `codexd ledger verify` names each"')
            assert daemon.health()["damaged"] == 5000
            daemon.stop()


def test_a_ledger_that_is_edited_under_a_daemon_ends_it(tmp_path: Path) -> None:
    with Mortal(tmp_path / "root") as daemon:
        daemon.drop("before.md", "x")
        daemon.answer("before")
        subprocess.run(["sed", "-i", "s/nothing/nothing/", daemon.dirs.ledger], check=True)
        daemon.drop("after.md", "x")
        assert daemon.child is not None
        assert daemon.child.wait(20) == 69
        assert "another file lies in its place" in daemon.log.read_text()
        daemon.kill()  # what it left
        daemon.start()
        assert daemon.answer("after")[1] == "fine\n"
        assert {t["file"] for t in daemon.tasks()} == {"before.md", "after.md"}
        assert daemon.health()["damaged"] == 0


BROKEN: dict[str, tuple[str, str]] = {
    "key": ("worker: 4\n", ":1: worker: unknown key (did you mean workers?); allowed: workers, "),
    "type": ("# many\nworkers: many\n", ":2: workers: found 'many'; allowed: a whole number fr"),
    "range": ("workers: 0\n", ":1: workers: found '0'; allowed: a whole number from 1 to 64"),
    "section": (
        "codex:\n  bin: codex\n  sandbx: read-only\n",
        ":3: codex.sandbx: unknown key (did you mean sandbox?); allowed: bin, home, model, ",
    ),
    "list": ("codex: codex\n", ":1: codex: found 'codex'; allowed: a mapping of bin, home, mo"),
    "duration": ("timeout: 10 minutes\n", ":1: timeout: found '10 minutes'; allowed: a durati"),
    "size": ("limits:\n  file: 1T\n", ":2: limits.file: found '1T'; allowed: a size from 1K to"),
    "open": (
        "http:\n  listen: 0.0.0.0:80\n",
        ":2: http.listen: found '0.0.0.0:80'; allowed: unix, off, 127.0.0.1:PORT or '[::1]:PORT'",
    ),
    "token": (
        "http:\n  listen: 127.0.0.1:8080\n",
        ":2: http.token_file: missing; allowed: a file with the token that TCP needs",
    ),
    "workdir": ("workdir: /srv\n", ":1: workdir: found '/srv'; allowed: below workdirs, 'ROOT/w"),
    "yaml": ("workers: [4\n", ":1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    "later": ("webhooks:\n  done: x\n", ":1: webhooks: unknown key; allowed: workers, "),
    "hook": ("on:\n  done: mail\n", ":2: on.done: found 'mail'; allowed: the absolute path of"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_configuration_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    text, told = BROKEN[case]
    file = tmp_path / "codexd.yaml"
    file.write_text(text)
    status, said = refused(tmp_path)
    assert status == 78
    assert said.startswith(f'configuration why="{file}{told.replace("ROOT", str(tmp_path))}'), said
    assert [p.name for p in tmp_path.iterdir()] == ["codexd.yaml"]  # nothing was begun


def test_the_master_alone_refuses_it_in_the_same_words(tmp_path: Path) -> None:
    (tmp_path / "codexd.yaml").write_text("workers: 0\n")
    argv = [PYTHON, "-m", "codexd.master", "--root", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.partition(" error ")[2].rstrip() == refused(tmp_path)[1]


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = f'configuration why="{file}: cannot be read: '
    assert refused(tmp_path, "--config", str(file)) == (78, text + 'No such file or directory"')
    file.touch(0)
    assert refused(tmp_path, "--config", str(file)) == (77, text + 'Permission denied"')


def test_a_month_of_the_archive_that_cannot_be_read(tmp_path: Path) -> None:
    """Live tasks of that month run.  One that lies there, because the line of its end was
    damaged, does not, and keeps its answer."""
    daemon = Mortal(tmp_path / "root")
    lost = f"{NOBODY[:-1]}1"
    month = daemon.dirs.archive / "2026-01"
    for id in (NOBODY, lost):
        daemon.left(id, at=AT)
    month.mkdir()
    told = {"id": lost, "state": "done", "outcome": "done"}
    (daemon.dirs.tasks / lost / "status.json").write_text(json.dumps(told))
    (daemon.dirs.tasks / lost).rename(month / lost)
    answer = daemon.dirs.answers / f"{lost}.md"
    answer.write_text("what it said")
    month.chmod(0)
    with daemon:
        until((daemon.dirs.answers / f"{NOBODY}.md").exists, "the answer of the live one")
        until(lambda: f"task={lost} what=" in daemon.log.read_text(), "the other to be told")
        month.chmod(0o750)
        until((month / NOBODY / "status.json").exists, "it is moved")
        daemon.stop()
        daemon.start()
        assert {t["state"] for t in daemon.tasks()} == {"done"}
        assert answer.read_text() == "what it said"
        until(lambda: daemon.health()["status"] == "ok", "the end of trouble")


# --- a host that refuses while we serve -----------------------------------------------------------


def test_what_lies_in_the_way_of_one_task_holds_up_no_other(tmp_path: Path) -> None:
    with Mortal(tmp_path / "root") as daemon:
        id = spool.new_id()
        blocked = daemon.dirs.answers / f"{id}.md"
        blocked.mkdir()
        daemon.drop(f"{id}.md", "x")
        daemon.drop("other.md", "x")
        assert daemon.answer("other")[1] == "fine\n"
        trouble = until(lambda: daemon.health().get("trouble"), "trouble")
        assert trouble == f"{blocked}: Is a directory; move it away"
        until(lambda: states(daemon) == {("running", 1), ("done", 1)}, "the end of the other")
        blocked.rmdir()
        until(blocked.is_file, "the answer")
        assert "attempts: 1\n" in blocked.read_text()
        until(lambda: daemon.health()["status"] == "ok", "the end of trouble")


def test_orders_that_cannot_be_written_hold_up_no_other(tmp_path: Path) -> None:
    with Mortal(tmp_path / "root") as daemon:
        id = spool.new_id()
        (daemon.dirs.inbox / f"{id}.hold").touch()
        daemon.drop(f"{id}.md", "x")
        until(lambda: states(daemon) == {("waiting", 0)}, "the task, held")
        blocked = daemon.dirs.tasks / id / "1"
        blocked.touch()
        (daemon.dirs.inbox / f"{id}.release").touch()
        daemon.drop("other.md", "x")
        assert daemon.answer("other")[1] == "fine\n"
        trouble = until(lambda: daemon.health().get("trouble"), "trouble")
        assert str(trouble).startswith(f"{blocked}")
        blocked.unlink()
        until((daemon.dirs.answers / f"{id}.md").is_file, "the answer")
        until(lambda: daemon.health()["status"] == "ok", "the end of trouble")


@pytest.mark.parametrize("shut", ["its attempt", "its task"])
def test_what_an_attempt_left_and_nobody_can_read_holds_up_no_other(
    tmp_path: Path, shut: str
) -> None:
    """As of a task without a sandbox that shut its own directory."""
    daemon = Mortal(tmp_path / "root")
    running = (Kind.RUNNING, {"launches": 1, "attempts": 1})
    result = {"outcome": "done", "exit_status": 0, "answer": "fine", "usage": {}}
    one, other = NOBODY, f"{NOBODY[:-1]}1"
    for id in (one, other):
        daemon.left(id, (Kind.QUEUED, {}), running, at=AT, **result)
        attempt = daemon.dirs.tasks / id / "1"
        (attempt / "attempt.json").write_text('{"sandbox": "workspace-write"}')
        (attempt / "events.jsonl").write_text('{"item": {"type": "command_execution"}}')
    path = daemon.dirs.tasks / one / ("1" if shut == "its attempt" else "")
    path.chmod(0)
    try:
        with daemon:
            until((daemon.dirs.answers / f"{other}.md").exists, "the answer of the other")
            said = read_answer(daemon.dirs.answers / f"{other}.md")[0]
            assert said["state"] == "done"
            assert said["message"].startswith(f"task {one} worked in {daemon.dirs.work}")
            daemon.drop("third.md", "x")
            assert daemon.answer("third")[1] == "fine\n"
            trouble = until(lambda: daemon.health().get("trouble"), "trouble")
            assert str(trouble).startswith(f"{path}")
            assert f"task={one} what=" in daemon.log.read_text()
            path.chmod(0o750)
            until((daemon.dirs.answers / f"{one}.md").exists, "its answer")
            until(lambda: daemon.health()["status"] == "ok", "the end of trouble")
    finally:
        if path.exists():
            path.chmod(0o750)


def test_one_that_tries_the_gate_and_cannot_be_read_holds_up_no_other(tmp_path: Path) -> None:
    daemon = Mortal(tmp_path / "root")
    daemon.behave(mode="replay:e429usage,hang-turn")
    with daemon:
        daemon.drop("one.md", "x")
        assert closed(daemon, "quota")
        id = daemon.tasks()[0]["id"]
        daemon.run("release")
        attempt = daemon.dirs.tasks / id / "2"
        said = attempt / "events.jsonl"
        until(lambda: said.exists() and said.stat().st_size, "it tries the gate")
        attempt.chmod(0)
        daemon.behave()
        daemon.drop("other.md", "---\nprofile: work\n---\nx")
        assert daemon.answer("other")[1] == "fine\n"
        assert str(daemon.health()["trouble"]).startswith(f"{attempt}")
        attempt.chmod(0o750)


def test_answers_that_may_not_be_written_for_a_while(tmp_path: Path) -> None:
    daemon = Mortal(tmp_path / "root")
    daemon.behave(effects=str(tmp_path / "effects"))
    with daemon:
        daemon.dirs.answers.chmod(0o555)
        daemon.drop("a.md", "x")
        trouble = until(lambda: daemon.health().get("trouble"), "trouble")
        assert re.fullmatch(
            rf"{daemon.dirs.answers}/\.a\.\S+\.tmp: Permission denied; {OWNER}", str(trouble)
        )
        assert str(trouble) in daemon.run("status").stdout
        assert daemon.run("status").returncode == 69
        daemon.dirs.answers.chmod(0o750)
        assert daemon.answer("a")[1] == "fine\n"
        until(lambda: daemon.health()["status"] == "ok", "the end of trouble")
        assert daemon.log.read_text().count("host.refuses") == 1
    assert len((tmp_path / "effects").read_text().splitlines()) == 1  # it was not run again


def test_an_archive_that_cannot_be_used_for_a_while(tmp_path: Path) -> None:
    """What was cancelled has ended all the same: it can be tried again, and is moved later."""
    with Mortal(tmp_path / "root") as daemon:
        daemon.run("hold")
        daemon.drop(f"{USED}.md", "x")
        until(lambda: daemon.view.task(USED), "a task")
        month = daemon.dirs.archive / "2099-01"
        month.mkdir(mode=0o555)
        assert daemon.run("task", "cancel", USED).returncode == 0
        until(lambda: daemon.health().get("trouble"), "trouble")
        assert (daemon.view.task(USED) or {})["state"] == "cancelled"
        assert daemon.run("task", "retry", USED).returncode == 0
        until(lambda: [t for t in daemon.tasks() if t["retry_of"] == USED], "the retry")
        month.chmod(0o750)
        until(lambda: (month / USED / "status.json").exists(), "it is moved")
        assert not (daemon.dirs.tasks / USED).exists()
        until(lambda: daemon.health()["status"] == "hold", "the end of trouble")


class mounted:
    """A mount on an existing directory, for a while."""

    def __init__(self, place: Path, *options: str) -> None:
        self.place = place
        self.command = ["mount", *options, str(place)]

    def __enter__(self) -> None:
        done = subprocess.run(self.command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"may not mount: {done.stderr}")

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.place)], check=True)


@needs_mount
@pytest.mark.parametrize("content", ["a good task", "\0"])
def test_a_file_that_cannot_be_moved_holds_up_no_other(tmp_path: Path, content: str) -> None:
    held = tmp_path / "held"
    held.write_text(content)
    with Mortal(tmp_path / "root") as daemon:
        daemon.stop()
        dropped, taken = daemon.dirs.inbox / "held.md", daemon.dirs.inbox / f".take-{NOBODY}"
        for path in (dropped, taken):
            path.write_text("what lies below the mount")
        with mounted(dropped, "--bind", str(held)), mounted(taken, "--bind", str(held)):
            daemon.start()
            for n in range(2):
                daemon.drop(f"beside-{n}.txt", "a task beside them")
                daemon.answer(f"beside-{n}")
            until(lambda: daemon.health()["status"] == "trouble", "trouble")
            for path in (dropped, taken):
                assert f"{path}: Device or resource busy" in daemon.log.read_text()
        daemon.answer("held")
        until(lambda: not taken.exists(), "the taken file to go")
        until(lambda: daemon.health()["status"] == "ok", "the end of trouble")
        if content == "\0":
            assert [f["file"] for f in daemon.rejections()] == [f"{NOBODY}.md"], "told once"
        else:
            assert sum(t["id"] == NOBODY for t in daemon.tasks()) == 1


@needs_mount
def test_more_of_them_than_are_taken_in_a_round_hold_up_none(tmp_path: Path) -> None:
    """First in the order of names, so that all were always tried again, and no other."""
    held = tmp_path / "held"
    held.write_text("a task")
    with Mortal(tmp_path / "root") as daemon, ExitStack() as mounts:
        daemon.stop()
        for n in range(BATCH + 6):
            path = daemon.dirs.inbox / f"{n:03}.md"
            path.touch()
            mounts.enter_context(mounted(path, "--bind", str(held)))
        daemon.start()
        daemon.drop("zz.md", "a task behind them")
        daemon.answer("zz")


@needs_mount
def test_a_full_disk_holds_all_and_loses_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with mounted(root, "-t", "tmpfs", "-o", "size=4M", "tmpfs"):
        daemon = Mortal(root, free="512K")
        daemon.behave(delay=1.5, effects=str(tmp_path / "effects"))
        with daemon:
            for name in ("a", "b"):
                daemon.drop(f"{name}.md", "x")
            until(lambda: states(daemon) == {("running", 1)}, "tasks that run")
            started = tmp_path / "effects"
            until(lambda: started.exists() and started.read_text().count("\n") == 2, "two starts")
            fill(root)
            message = closed(daemon, "disk")["message"]
            assert message == (
                f"less than 512K free below {root}; make room, work goes on by itself "
                "(limits.disk_free)"
            )
            done = daemon.run("status")
            assert done.returncode == 69
            assert done.stdout.startswith(f"codexd: disk: {message}")
            drop_raw(daemon, "c.md", "")  # dropped without room for its content
            (daemon.dirs.inbox / "all.hold").touch()
            assert closed(daemon, "hold")["message"] == (
                "held by hand; `codexd release` lets work go on"
            )
            daemon.kill()
            daemon.start()  # also with a disk that is full
            assert {"disk", "hold"} <= daemon.health()["gate"].keys()
            assert (daemon.dirs.inbox / "c.md").exists()

            (root / "ballast").unlink()
            until(lambda: "disk" not in daemon.health()["gate"], "the disk to be seen")
            assert daemon.health()["status"] == "hold"
            until(lambda: not (daemon.dirs.inbox / "all.hold").exists(), "the hold, written down")
            daemon.kill()
            daemon.start()
            assert daemon.health()["status"] == "hold"  # by the ledger alone
            daemon.drop("d.md", "x")
            assert daemon.run("release").returncode == 0
            for name in ("a", "b", "d"):
                assert daemon.answer(name)[1] == "fine\n"
            assert daemon.reason("c.md") == "the file is empty\n"
            assert daemon.health()["status"] == "ok"
            assert daemon.health()["damaged"] == 0
            assert daemon.stop() == 0


def fill(root: Path) -> None:
    """Take all the room there is."""
    with open(root / "ballast", "wb", buffering=0) as file:
        for size in (1 << 16, 4096, 512, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """As where the log lies on the very disk that is full."""
    one = Mortal(tmp_path / "root")
    one.log = Path("/dev/full")
    try:
        one.start()
        one.drop("logless.md", "all the same")
        assert by_file(one, "logless.md")["state"] == "done"
    finally:
        one.stop()
