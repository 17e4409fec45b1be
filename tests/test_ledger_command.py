"""codexd ledger: verify tells exactly what is wrong, export every event, compact begins anew.

And the repair that codexd(7) describes, command by command as it stands there.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from codexd import audit, config, rotate, spool
from codexd.directories import Directories
from codexd.ledger import SEALED, Ledger, render, seal
from codexd.model import Kind
from codexd.retention import Retention
from tests import mdoc
from tests.daemon import PYTHON, Daemon, until
from tests.history import AT, HEAD, TEN, closed, ident, lines, move, queued, read

pytestmark = pytest.mark.xdist_group("ledger-command")

ROOT = Path(__file__).resolve().parent.parent
FAKE = Path(__file__).parent / "bin" / "codex"
POWERLESS = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
CONFIG = f"codex:\n  bin: {FAKE}\nhttp:\n  listen: off\n"


class Root:
    """A state directory without a daemon, and the command on it."""

    def __init__(self, place: Path) -> None:
        self.dirs = Directories.below(place)
        spool.prepare(self.dirs)
        self.ledger = self.dirs.ledger
        self.wrapper: list[str] = []

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        codexd = [*self.wrapper, PYTHON, "-m", "codexd.cli", "--root", str(self.dirs.state)]
        command = [*codexd, "ledger", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    def verified(self, *args: str) -> tuple[int, list[str]]:
        """Status and lines of `verify`, without the directory."""
        done = self.run("verify", *args)
        assert not done.stderr
        return done.returncode, done.stdout.replace(f"{self.dirs.state}/", "").splitlines()

    def write(self, made: list[bytes], *, directories: bool = True) -> None:
        """A ledger, and a directory for each task that is alive in it."""
        self.ledger.write_bytes(b"".join(made))
        for id in read(self.ledger).tasks if directories else ():
            (self.dirs.tasks / id).mkdir()
            (self.dirs.tasks / id / "task.json").write_text("{}")


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


# --- verify: lines ----------------------------------------------------------------------


def test_a_sound_ledger(root: Root) -> None:
    root.write(lines(TEN))
    size = root.ledger.stat().st_size
    assert root.verified() == (0, [f"tasks.md: format 1, 11 lines, {size} bytes, 2 live tasks"])
    assert json.loads(root.run("verify", "--json").stdout) == {
        "files": [
            {"file": str(root.ledger), "format": 1, "lines": 11, "bytes": size, "tasks": 2},
        ],
        "problems": [],
    }


def test_there_is_none(root: Root) -> None:
    for args in (["verify"], ["export"], ["verify", "/nowhere"]):
        done = root.run(*args)
        assert (done.returncode, done.stdout) == (69, "")
        assert done.stderr.endswith(": there is none\n")
    copy = root.dirs.state / "copy.md"
    copy.write_bytes(b"".join(lines(TEN)))
    assert root.verified(str(copy))[0] == 0, "a file alone needs no state"
    root.ledger.touch()  # begun, and killed before its first line
    assert root.verified() == (0, ["tasks.md: format unknown, 0 lines, 0 bytes, 0 live tasks"])


BROKEN: dict[str, tuple[bytes, str, str]] = {
    "changed": (render(queued(7)).replace(b"7.md", b"8.md"), "seal", "the seal is broken"),
    "written by hand": (b"- [ ] a task\n", "seal", "the seal is broken"),
    "zeroes": (b"\0" * 512 + b"\n", "seal", "the seal is broken"),
    "a line of nothing": (b"\n", "seal", "the seal is broken"),
    "sealed, but none": (
        seal("- nonsense"), "grammar", "not a ledger line of this format",
    ),
    "an unknown kind": (
        seal(f"* {AT} **eaten**"), "grammar", "'eaten' is not a valid Note",
    ),
    "no fact": (
        seal(f"* {AT} **stopped** `x`"), "grammar", "no fact at column 0: 'x'",
    ),
    "of no task": (
        render(move(8, Kind.RUNNING)), "event", f"{ident(8)}: running does not follow no task",
    ),
    "of another type": (
        render(queued(8, session=7)), "event", "session: int is no type for it",
    ),
    "no time": (
        render(queued(8, not_before="soon")), "grammar",
        "time data 'soon' does not match format '%Y-%m-%dT%H:%M:%S.%fZ'",
    ),
    "that cannot follow": (
        render(move(3, Kind.RUNNING)), "event", f"{ident(3)}: running does not follow running",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_line_is_named_exactly(root: Root, what: str) -> None:
    line, kind, text = BROKEN[what]
    made = lines(TEN)
    root.write([*made, line, render(queued(60))])
    number, byte = len(made) + 1, sum(map(len, made))
    status, (told, summary) = root.verified()
    assert status == 1
    assert told == f"tasks.md:{number}: byte {byte}: {text}"
    assert summary.startswith("tasks.md: format 1, 13 lines, ")
    problems = json.loads(root.run("verify", "--json").stdout)["problems"]
    assert [(p["line"], p["byte"], p["kind"], p["what"]) for p in problems] == [
        (number, byte, kind, text)
    ]
    # The place is that of the line itself.
    with open(root.ledger, "rb") as file:
        file.seek(byte)
        assert file.readline() == line


def test_every_damaged_line_is_told_and_what_follows_from_it(root: Root) -> None:
    made = lines([*TEN, move(3, Kind.DONE, outcome="done")])
    for number in (2, 10):  # the first line of task 2, and the last start of task 3
        made[number] = made[number].replace(b"2026", b"2025", 1)
    root.write(made)
    status, told = root.verified()
    assert status == 1
    assert [line.partition(": byte ")[0] for line in told[:-1]] == [
        "tasks.md:3", "tasks.md:7", "tasks.md:11", "tasks.md:12",
    ]  # fmt: skip
    assert told[1].endswith(f"{ident(2)}: waiting does not follow no task")
    assert told[3].endswith(f"{ident(3)}: done does not follow queued")
    assert told[-1].endswith(", 0 live tasks"), "an end is an end"


def test_no_flipped_bit_escapes(tmp_path: Path, root: Root) -> None:
    """Of every byte one bit: each is found in its line, or it is the end of the last."""
    data = b"".join(lines(TEN))
    from codexd import audit

    for at in range(len(data)):
        path = tmp_path / "flipped.md"
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 7]) + data[at + 1 :])
        with open(path, "rb") as file:
            found = list(audit.check(file, audit.Checked("f"), written=False))
        assert found[0].line == data.count(b"\n", 0, at) + 1, at
        assert found[0].kind == ("torn" if at == len(data) - 1 else "seal")


def test_the_first_line(root: Root) -> None:
    rest = lines(TEN)[1:]
    broken = HEAD.replace(b"1", b"2", 1)
    for first, text in (
        (broken, "the seal is broken: the line that names the format"),
        (b"", "the first line names no format"),
    ):
        root.write([first, *rest], directories=False)
        status, told = root.verified(str(root.ledger))
        assert (status, told[0]) == (1, f"tasks.md:1: byte 0: {text}")
        assert len(told) == 2
    root.write([seal("# codexd ledger, format 2"), b"whatever\n"], directories=False)
    status, told = root.verified()
    assert status == 1
    assert told[0].startswith("tasks.md:1: byte 0: the ledger begins with '# codexd ledger, form")
    assert told[1].startswith("tasks.md: format 2, ")
    assert len(told) == 2, "what a newer version wrote is not judged"


def test_a_torn_tail(root: Root) -> None:
    made = lines(TEN)
    root.write([*made, b"- half"])
    size = sum(map(len, made))
    text = f"tasks.md:12: byte {size}: 6 bytes without an end; the next start cuts them off"
    assert root.verified()[1][0] == text
    # A daemon may be writing it just now.
    program = (
        "import sys; from pathlib import Path; from codexd import lock\n"
        "fd = lock.hold(Path(sys.argv[1]), 5.0); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(root.dirs.lock)]
    holder = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    holder.stdout.readline()
    assert root.verified() == (0, [f"tasks.md: format 1, 11 lines, {size} bytes, 2 live tasks"])
    assert root.verified(str(root.ledger))[0] == 0
    copy = root.ledger.with_name("copy.md")
    shutil.copy(root.ledger, copy)
    assert root.verified(str(copy))[0] == 1, "nobody writes a copy"
    holder.communicate("")
    assert root.verified()[0] == 1, "and nobody writes this one any more"
    # Whose daemon it is, is not for everybody to see.
    root.dirs.lock.chmod(0)
    root.wrapper = POWERLESS
    assert root.verified()[0] == 0


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_of_eight_gigabytes(root: Root, end: bytes) -> None:
    """As a sparse file has it; verify, and a follower, in little memory."""
    made = b"".join(lines(TEN))
    root.ledger.write_bytes(made)
    os.truncate(root.ledger, 8 << 30)
    with open(root.ledger, "ab") as file:
        file.write(end + (render(queued(8)) if end else b""))
    for code in (
        "from codexd.cli import main; main()",
        "from codexd.ledger import Follower; from pathlib import Path\n"
        "one = Follower(Path(sys.argv[2]) / 'tasks.md', None); one.refresh()\n"
        f"assert len(one.book.tasks) == {2 + bool(end)}; assert one.book.lost == {int(bool(end))}",
    ):
        limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))\n"
        args = ["--root", str(root.dirs.state), "ledger", "verify"]
        done = subprocess.run(
            [PYTHON, "-c", limit + code, *args], cwd=ROOT, capture_output=True, text=True
        )
        assert not done.stderr
        if done.stdout:
            what = "the seal is broken" if end else f"{(8 << 30) - len(made)} bytes without an end"
            assert f"tasks.md:{len(TEN) + 2}: byte {len(made)}: {what}" in done.stdout


def everything(place: Path) -> dict[Path, tuple[int, int, bytes]]:
    """What lies there: mode, when it was changed, content."""
    found = {}
    for path in (place, *place.rglob("*")):
        is_, data = path.lstat(), path.read_bytes() if path.is_file() else b""
        found[path] = (is_.st_mode, is_.st_mtime_ns, data)
    return found


def test_verify_changes_nothing(root: Root) -> None:
    """Not even what a start would cut, begin anew or clear away."""
    whole = lines(TEN)
    (root.dirs.state / "tasks-20261122T072011Z.md").write_bytes(b"".join(whole))
    root.write([*whole[:3], b"- damaged\n", *whole[3:], render(queued(7))[:-20]])
    root.dirs.checkpoint.write_bytes(b"damaged")
    (root.dirs.tasks / ident(9)).mkdir()
    (root.dirs.state / ".tasks.md.12.tmp").touch()
    before = everything(root.dirs.state)
    for args in ([], ["--json"], [str(root.ledger)]):
        assert root.run("verify", *args).returncode == 1
    assert everything(root.dirs.state) == before


def test_old_files_are_looked_at_first(root: Root) -> None:
    one = Ledger(root.ledger, root.dirs.checkpoint)
    one.append([queued(1), move(1, Kind.CANCELLED)])
    one.rotate(AT)
    one.append([queued(2), move(2, Kind.CANCELLED)])
    one.rotate(AT)
    one.close()
    old = rotate.kept(root.ledger)
    with open(old[0], "ab") as file:
        file.write(b"noise\n")
    status, told = root.verified()
    assert status == 1
    names = [line.partition(":")[0] for line in told]
    assert names == [f"archive/{old[0].name}"] * 2 + [f"archive/{old[1].name}", "tasks.md"]
    assert root.verified(str(root.ledger))[0] == 0


# --- verify: directories ------------------------------------------------------------------


def test_tasks_and_directories(root: Root) -> None:
    root.write(lines([queued(n) for n in range(1, 6)]))
    tasks, archive = root.dirs.tasks, root.dirs.archive / "2026-11"
    archive.mkdir()
    shutil.rmtree(tasks / ident(2))
    (tasks / ident(3)).rename(archive / ident(3))
    for name in (ident(70), ident(71), ident(72), ident(73), "notes"):
        (tasks / name).mkdir()
    for n in (70, 71, 72):
        (tasks / ident(n) / "task.json").write_text("{}")
    (tasks / ident(71) / "status.json").write_text('{"state": "done"}')  # to be moved
    (root.dirs.inbox / f".take-{ident(72)}").touch()  # to be accepted
    status, told = root.verified()
    assert status == 1
    assert [re.sub(r"tasks/|20261123t072011-0+", "", line) for line in told[1:]] == [
        f"2: a task of the ledger without its directory: codexd task cancel {ident(2)}".replace(
            "20261123t072011-000000000", ""
        ),
        "3: it has ended and is archived, but its last line is lost: restart the daemon",
        "70: the ledger does not know this task, so it is not run; see codexd(7)",
        "notes: no task's directory; move it away",
    ]


# --- export ---------------------------------------------------------------------------------


def test_every_event_of_all_files_once_the_oldest_first(root: Root) -> None:
    one = Ledger(root.ledger, root.dirs.checkpoint)
    for event in TEN:
        one.append([event])
        one.rotate(AT)
    one.append([queued(20)])
    one.close()
    done = root.run("export")
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(e["at"], e["kind"], e["id"] or "", e["facts"]) for e in found if
            e["kind"] != "rotated"] == [
        (e.at, e.kind, e.id, dict(e.facts)) for e in [*TEN, queued(20)]
    ]  # fmt: skip
    assert sum(e["kind"] == "rotated" for e in found) == len(TEN)
    # Without the first files, what the oldest one carried over is all that is known.
    for old in rotate.kept(root.ledger):
        old.unlink()
    rest = [json.loads(line) for line in root.run("export", "--json").stdout.splitlines()]
    assert {e["id"] for e in rest if e["id"]} == {ident(n) for n in (2, 3, 20)}


def test_csv(root: Root) -> None:
    events = [
        queued(1, title='=HYPERLINK("x")', session="a,b", limit=3),
        queued(2, title="\x1b[31mred\nand ü"),
        move(2, Kind.FAILED, outcome="auth", message="-1", usage={"input_tokens": 7}),
        closed("hold"),
    ]
    root.write(lines(events))
    done = root.run("export", "--format", "csv")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    head, *rows = csv.reader(io.StringIO(done.stdout))
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert head[:3] == ["at", "kind", "id"]
    assert [(r["kind"], r["id"]) for r in found] == [(e.kind, e.id) for e in events]
    assert found[0]["title"] == '\'=HYPERLINK("x")'
    assert found[0]["session"] == "a,b"
    assert json.loads(found[0]["facts"]) == {"limit": 3}
    assert found[1]["title"] == "\\x1b[31mred\\nand ü"
    assert (found[2]["outcome"], found[2]["message"]) == ("auth", "'-1")
    assert json.loads(found[2]["facts"]) == {"usage": {"input_tokens": 7}}
    assert (found[3]["id"], found[3]["reason"], found[3]["facts"]) == ("", "hold", "")


def test_damaged_lines_are_told_and_left_out(root: Root) -> None:
    made = lines(TEN)
    root.write([*made[:4], b"no\x1b[2Jise\n", *made[4:], b"- torn"])
    done = root.run("export")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == len(TEN)
    byte = sum(map(len, made[:4]))
    assert done.stderr == f"codexd: {root.ledger}: byte {byte}: the seal is broken; left out\n"


MEASURED = """
import re, sys
from codexd.cli import main
try:
    main()
finally:  # not getrusage(), which counts the memory of the process before exec as well
    print(re.search("VmHWM:.* ([0-9]+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""


@pytest.mark.parametrize("verb", ["verify", "export"])
def test_memory_does_not_grow_with_the_history(root: Root, verb: str) -> None:
    def peak(tasks: int) -> int:
        made = [HEAD]
        for n in range(tasks):
            made += [render(queued(n, title="x" * 100)), render(move(n, Kind.CANCELLED))]
        root.ledger.write_bytes(b"".join(made))
        command = [PYTHON, "-c", MEASURED, "--root", str(root.dirs.state), "ledger", verb]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return int(done.stderr.split()[-1])

    peak(10)
    small, large = peak(100), peak(20_000)
    assert large - small < 2500, "kilobytes; the ledger has 6 MB"


def test_whoever_has_seen_enough(root: Root) -> None:
    root.write(lines([queued(n) for n in range(5000)]), directories=False)
    command = f"{PYTHON} -m codexd.cli --root {root.dirs.state} ledger export | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout)["id"] == ident(0)
    assert not done.stderr


def test_a_rotation_that_a_crash_broke_off_tells_nothing_twice(root: Root) -> None:
    """The ledger has a second name then, until the next start."""
    one = Ledger(root.ledger, root.dirs.checkpoint)
    one.append([queued(1)])
    one.rotate(AT)
    one.append([queued(2)])
    one.close()
    (old,) = rotate.kept(root.ledger)
    os.link(root.ledger, old.with_name("tasks-20991231T235959Z.md"))
    assert len(rotate.kept(root.ledger)) == 2
    found = [json.loads(line) for line in root.run("export").stdout.splitlines()]
    assert [e["id"] for e in found if e["kind"] == "queued"] == [ident(1), ident(2)]


def test_an_old_file_that_is_removed_meanwhile_is_left_out(root: Root) -> None:
    one = Ledger(root.ledger, root.dirs.checkpoint)
    for _ in range(3):
        one.rotate(AT)
    one.close()
    first, second, third = rotate.kept(root.ledger)
    looked = audit.files(root.dirs)
    names = [next(looked).name]
    second.unlink()
    names += [file.name for file in looked]
    assert [*map(str, names)] == [*map(str, (first, third, root.ledger))]


# --- how long they are kept -----------------------------------------------------------------


def test_old_files_go_when_they_are_old(root: Root) -> None:
    one = Ledger(root.ledger, root.dirs.checkpoint)
    for _ in range(3):
        one.rotate(AT)
    one.close()
    first, second, _third = rotate.kept(root.ledger)
    now = time.time()
    for path, days in ((first, 100), (second, 91)):
        os.utime(path, (now - days * 86400,) * 2)
    (root.dirs.archive / "tasks-mine.md").touch()
    os.utime(root.dirs.archive / "tasks-mine.md", (1, 1))
    looked = Retention(config.load(root.dirs, explicit=False), dict, now)
    found = [(old.kind, old.paths) for old in looked.found() if old]
    assert found == [("ledger", (first,)), ("ledger", (second,))]


# --- with a daemon ----------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    return Daemon(tmp_path / "root", config=CONFIG)


def starts(daemon: Daemon) -> list[str]:
    """The prompts of all starts of Codex, by the hash that the fake notes."""
    path = daemon.root / "effects"
    return [line.split()[-1] for line in path.read_text().splitlines()] if path.exists() else []


def behave(daemon: Daemon) -> None:
    settings = {"answer": "fine", "effects": str(daemon.root / "effects")}
    (daemon.dirs.codex_home / "fake.json").write_text(json.dumps(settings))


def in_ledger(daemon: Daemon, file: str) -> str:
    """The id of the task that the ledger has for a dropped file."""

    def look() -> list[str]:
        return [t["id"] for t in daemon.tasks() if t["file"] == file and t["created"]]

    return until(look, f"{file} in the ledger")[0]


def test_compact_beside_a_daemon(daemon: Daemon) -> None:
    behave(daemon)
    with daemon:
        daemon.drop("first.md", "one")
        daemon.answer("first")
        daemon.run("hold")
        daemon.drop("second.md", "two")
        second = in_ledger(daemon, "second.md")
        size = daemon.dirs.ledger.stat().st_size
        assert daemon.run("ledger", "compact").returncode == 0
        old = until(lambda: rotate.kept(daemon.dirs.ledger), "an old ledger")
        until(lambda: not (daemon.dirs.inbox / "all.compact").exists(), "the control file gone")
        assert old[0].stat().st_size >= size
        until(lambda: "ledger.rotated" in daemon.log.read_text(), "the log of it")
        assert [t["id"] for t in daemon.json("task", "list", "--state", "queued")] == [second]
        done = daemon.run("ledger", "verify")
        assert (done.returncode, done.stderr) == (0, "")
        daemon.kill()
        daemon.start()
        assert "hold" in daemon.json("status")["gate"]
        daemon.run("release")
        assert daemon.answer("second")[0]["state"] == "done"
        assert len(starts(daemon)) == len(set(starts(daemon))) == 2
        kinds = [json.loads(e)["kind"] for e in daemon.run("ledger", "export").stdout.splitlines()]
        assert kinds.count("rotated") == 1
        assert kinds.count("queued") == 2
        assert kinds.count("done") == 2
        assert len(daemon.tasks()) == 2


@pytest.mark.timeout(300)
def test_verify_and_export_while_a_daemon_works_and_rotates(daemon: Daemon) -> None:
    """No false alarm, whatever is on its way from one place to the next."""
    behave(daemon)
    with daemon:
        for n in range(12):
            for m in range(4):
                daemon.drop(f"t{n}-{m}.md", f"do {n} {m}")
            if n % 4 == 1:
                daemon.run("ledger", "compact")
            found = daemon.json("ledger", "verify")
            assert not found["problems"]
            assert daemon.run("ledger", "export").returncode == 0
        until(lambda: len(list(daemon.dirs.answers.iterdir())) == 48, "all answers", 90)
        told = [json.loads(e) for e in daemon.run("ledger", "export").stdout.splitlines()]
        for kind in ("queued", "running", "done"):
            ids = [e["id"] for e in told if e["kind"] == kind]
            assert len(ids) == len(set(ids)) == 48, kind
        assert sum(e["kind"] == "rotated" for e in told) == 3


# --- repair by hand -----------------------------------------------------------------------------


def commands() -> list[str]:
    """The commands of the manual's section on repair, in its order."""
    text = mdoc.part(mdoc.part(mdoc.lines("codexd.7"), "Sh", "THE LEDGER"), "Ss",
                     "Repairing the ledger")  # fmt: skip
    return [m[1] for line in text if (m := re.match(r"(?:\.Dl )?\$ (.*)", line))]


class Person:
    """Somebody who follows the manual to the letter, in the state directory."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.left = commands()

    def does(self, begin: str, **values: str) -> subprocess.CompletedProcess[str]:
        """The next command of the page, which begins so, with what it stands for filled in."""
        command = self.left.pop(0)
        assert command.startswith(begin), command
        for name, value in values.items():
            assert name.strip("_") in command, name
            command = command.replace(name.strip("_"), value)
        program = f'codexd() {{ {PYTHON} -m codexd.cli --root {self.daemon.root} "$@"; }}; '
        return subprocess.run(
            ["bash", "-c", program + command],
            cwd=self.daemon.root,
            env={**self.daemon.env, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )


def spoilt(path: Path, id: str, kind: str) -> int:
    """Spoil a byte in the line of a task's event; the line's number."""
    made = path.read_bytes().splitlines(keepends=True)
    number = next(
        n for n, line in enumerate(made) if id.encode() in line and f"**{kind}**".encode() in line
    )
    made[number] = made[number][:40] + b"#" + made[number][41:]
    path.write_bytes(b"".join(made))
    return number + 1


def empty(daemon: Daemon) -> None:
    """Everything in the inbox was taken, and let go of."""
    until(lambda: not os.listdir(daemon.dirs.inbox), "an empty inbox")


def reaches(daemon: Daemon, id: str, state: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        task = daemon.json("task", "show", id)
        return task if task["state"] == state else None

    return until(look, f"{id} {state}")


def repairable(daemon: Daemon) -> dict[str, str]:
    """A ledger with a damaged line of each case that the manual has; their tasks.

    One is in the checkpoint, the others came after it: of one there is a COPY, of one the
    answer, and of one nothing.
    """
    behave(daemon)
    id = {}
    with daemon:
        daemon.run("hold")
        daemon.drop("marked.md", "the checkpoint knows it")
        id["marked"] = in_ledger(daemon, "marked.md")
        daemon.run("task", "hold", id["marked"])
        until(lambda: daemon.json("task", "show", id["marked"])["reason"] == "hold", "held")
        empty(daemon)
        daemon.stop()
        daemon.start()
        daemon.drop("kept.md", "there is a copy of its line")
        id["kept"] = in_ledger(daemon, "kept.md")
        daemon.run("task", "hold", id["kept"])
        until(lambda: daemon.json("task", "show", id["kept"])["reason"] == "hold", "held")
        shutil.copy(daemon.dirs.ledger, daemon.root / "COPY")
        daemon.run("release")
        daemon.drop("ended.md", "it ended, and its end is lost")
        id["ended"] = in_ledger(daemon, "ended.md")
        daemon.answer("ended")
        reaches(daemon, id["ended"], "done")
        daemon.run("hold")
        for name, text in (
            ("lost", "---\nkey: k2\n---\na task that is lost"),
            ("child", "---\nafter: [k2]\n---\na task that follows it"),
            ("sound", "a task that is sound"),
        ):
            daemon.drop(f"{name}.md", text)
            id[name] = in_ledger(daemon, f"{name}.md")
        until(lambda: daemon.json("task", "show", id["child"])["reason"] == "after", "it waits")
        empty(daemon)
        until(lambda: not list(daemon.dirs.tasks.glob(id["ended"])), "its place in the archive")
        assert len(starts(daemon)) == 1
        daemon.kill()  # told to end, it would write a checkpoint that knows all
    for name, kind in (
        ("marked", "queued"), ("kept", "queued"), ("ended", "done"), ("lost", "queued"),
    ):  # fmt: skip
        id[f"line of {name}"] = str(spoilt(daemon.dirs.ledger, id[name], kind))
    return id


def named(told: str, id: str) -> str:
    """What `verify` says of a task."""
    return "".join(x.partition(f"tasks/{id}: ")[2] for x in told.splitlines())


def test_the_repair_that_the_manual_describes(daemon: Daemon) -> None:
    id = repairable(daemon)
    line = id["line of kept"]
    person = Person(daemon)
    found = person.does("codexd ledger verify")
    assert found.returncode == 1
    for name in ("marked", "kept", "ended", "lost"):
        assert f"tasks.md:{id[f'line of {name}']}: byte" in found.stdout
    assert "checkpoint.json alone knows it" in named(found.stdout, id["marked"])
    for name in ("kept", "lost"):
        assert named(found.stdout, id[name]).startswith("the ledger does not know this task")
    assert "its last line is lost" in named(found.stdout, id["ended"])
    assert not named(found.stdout, id["sound"])
    assert person.does("cp -p").returncode == 0
    assert person.does("sed -n", **{"7": line}).returncode == 0
    assert person.does("sed -e", **{"7": line}).returncode == 0
    assert person.does("cp mended").returncode == 0
    found = person.does("codexd ledger verify")
    assert f"tasks.md:{line}:" not in found.stdout, "the copy's line is the right one"
    assert found.stdout.count("the seal is broken") == 3
    assert not named(found.stdout, id["kept"])
    with daemon:
        waits = daemon.json("task", "show", id["child"])
        assert (waits["state"], waits["reason"]) == ("waiting", "after")
        assert waits["message"].startswith(f"the ledger has lost task {id['lost']}")
        daemon.drop("same.md", "---\nkey: k2\n---\na task that is lost")
        assert daemon.reason("same.md").startswith("key 'k2': the ledger has lost task ")
        assert daemon.run("task", "show", id["lost"]).returncode == 66
        early = daemon.run("task", "retry", id["lost"])
        assert early.returncode == 1
        assert "see Repairing the ledger in codexd(7)" in early.stderr
        month = f"{id['lost'][:4]}-{id['lost'][4:6]}"
        assert person.does("mkdir", **{"2026-11": month}).returncode == 0
        assert person.does("mv", **{"2026-11": month, "ID": id["lost"]}).returncode == 0
        made = person.does("codexd task retry", ID=id["lost"])
        assert (made.returncode, made.stderr) == (0, "")
        again = made.stdout.strip()
        assert daemon.json("task", "show", again)["retry_of"] == id["lost"]
        failed = reaches(daemon, id["child"], "failed")
        assert failed["outcome"] == "dependency"
        assert f"task {again} has taken its place" in failed["message"]
        empty(daemon)
        daemon.drop("same.md", "---\nkey: k2\n---\na task that is lost")
        until(lambda: f'key="k2" first="{again}"' in daemon.dirs.ledger.read_text(), "repeated")
        assert person.does("codexd ledger compact").returncode == 0
        until(lambda: rotate.kept(daemon.dirs.ledger), "the old ledger")
        empty(daemon)
        last = person.does("codexd ledger verify")
        (old,) = rotate.kept(daemon.dirs.ledger)
        wrong = [x for x in last.stdout.splitlines() if ": format 1, " not in x]
        assert all(x.startswith(f"{old}:") for x in wrong), wrong
        assert not person.left, "every command of the page was done"
        daemon.run("release")
        daemon.run("task", "release", id["kept"], id["marked"])
        for one in (id["ended"], id["kept"], id["marked"], id["sound"], again):
            reaches(daemon, one, "done")
        assert len(starts(daemon)) == len(set(starts(daemon))) == 5, "none twice"


def one_after_the_other(daemon: Daemon) -> tuple[str, str]:
    """A task with the key k2 and one that follows it, while all is held."""
    daemon.run("hold")
    daemon.drop("b.md", "---\nkey: k2\n---\nfirst")
    daemon.drop("c.md", "---\nafter: [k2]\n---\nthen")
    found = in_ledger(daemon, "b.md"), in_ledger(daemon, "c.md")
    empty(daemon)
    return found


def test_what_the_checkpoint_knows_needs_no_copy(daemon: Daemon) -> None:
    """The manual's way where all that is damaged came before it: look, start, begin anew."""
    behave(daemon)
    with daemon:
        b, c = one_after_the_other(daemon)
        daemon.stop()
    spoilt(daemon.dirs.ledger, b, "queued")
    assert "checkpoint.json alone knows it" in named(daemon.run("ledger", "verify").stdout, b)
    with daemon:
        daemon.run("release")
        assert reaches(daemon, b, "done")["attempts"] == 1
        assert reaches(daemon, c, "done")["attempts"] == 1
        daemon.run("ledger", "compact")
        until(lambda: rotate.kept(daemon.dirs.ledger), "the old ledger")
        assert daemon.run("ledger", "verify", str(daemon.dirs.ledger)).returncode == 0


def test_a_task_after_one_that_is_lost_waits_and_says_for_what(daemon: Daemon) -> None:
    behave(daemon)
    with daemon:
        b, c = one_after_the_other(daemon)
    daemon.dirs.checkpoint.unlink(missing_ok=True)
    number = spoilt(daemon.dirs.ledger, b, "queued")
    made = daemon.dirs.ledger.read_bytes().splitlines(keepends=True)
    with daemon:
        daemon.drop("d.md", f"---\nafter: [{b}]\n---\nso does one that comes now")
        for id in (c, in_ledger(daemon, "d.md")):
            told = reaches(daemon, id, "waiting")
            assert told["message"].startswith(f"the ledger has lost task {b}, so it is not run")
        daemon.run("release")
        daemon.drop("e.md", "another goes on")
        daemon.answer("e")
        assert reaches(daemon, c, "waiting")
        daemon.run("task", "release", c)
        reaches(daemon, c, "done")
        daemon.stop()
    # Its line is put back after all.
    text = daemon.dirs.ledger.read_bytes().splitlines(keepends=True)
    line = text[number - 1]
    assert line == made[number - 1]
    text[number - 1] = line[:40] + line_byte(line) + line[41:]
    daemon.dirs.ledger.write_bytes(b"".join(text))
    with daemon:
        daemon.answer("b")
        assert daemon.answer("d")[0]["state"] == "done"


def line_byte(line: bytes) -> bytes:
    """The byte that the seal says stood where `spoilt` has been."""
    return next(
        bytes([n]) for n in range(256) if crc32(line[:40] + bytes([n]) + line[41:]) == SEALED
    )


@pytest.mark.parametrize("copy", ["an old one", "none"])
def test_a_ledger_that_is_lost_as_a_whole(daemon: Daemon, copy: str) -> None:
    """An older copy, or nothing, in its place: what has ended since is not run again."""
    behave(daemon)
    ledger = daemon.dirs.ledger
    with daemon:
        daemon.run("hold")
        for name in ("one", "two"):
            daemon.drop(f"{name}.md", name)
            in_ledger(daemon, f"{name}.md")
        daemon.run("ledger", "compact")
        until(lambda: rotate.kept(ledger), "an old ledger")
        daemon.run("release")
        for name in ("one", "two"):
            daemon.answer(name)
        daemon.run("hold")
        daemon.drop("three.md", "three")
        three = in_ledger(daemon, "three.md")
        until(lambda: not any(t["state"] == "running" for t in daemon.tasks()), "rest")
        daemon.stop()
    ledger.unlink()
    if copy == "an old one":
        rotate.kept(ledger)[-1].rename(ledger)
    with daemon:
        daemon.run("release")
        found = daemon.json("ledger", "verify")
        unknown = [p["file"] for p in found["problems"]]
        assert unknown == [str(daemon.dirs.tasks / three)]
        daemon.drop("four.md", "four")
        daemon.answer("four")
        assert len(starts(daemon)) == 3
        until(lambda: {t["state"] for t in daemon.tasks()} == {"done"}, "all done")
