"""Files are whole and new, or as they were: whoever dies, whatever the disk says."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codexd import durable

ROOT = Path(__file__).resolve().parent.parent


def child(code: str, *args: str | Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


# --- writing ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "x" * 255, "ü" * 127, "🦊" * 63, "-n", "a b\n\x1b[0m"])
def test_every_name_a_file_can_have(tmp_path: Path, name: str) -> None:
    durable.write(tmp_path / name, b"one")
    durable.write(tmp_path / name, b"two", 0o600)
    assert (tmp_path / name).read_bytes() == b"two"
    assert os.listdir(tmp_path) == [name]


def test_the_mode_is_the_writer_s_choice(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        durable.write(tmp_path / "a", b"", 0o666)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)


def test_a_reader_never_sees_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    whole = {bytes([65 + n]) * (200_000 + n) for n in range(4)}
    durable.write(path, min(whole))
    seen, stop = set(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for data in whole:
            durable.write(path, data)
    stop.set()
    reader.join()
    assert seen <= whole
    assert len(seen) > 1, "the reader was never there while it was written"


def test_a_killed_writer_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    code = (
        "import sys; from codexd import durable\n"
        "print(flush=True)\n"
        "while True:\n"
        "    for c in b'ab': durable.write(sys.argv[1], bytes([c]) * 3000000)"
    )
    durable.write(tmp_path / "f", b"a" * 3_000_000)
    for _ in range(8):
        with child(code, tmp_path / "f") as writer:
            assert writer.stdout
            writer.stdout.readline()
            time.sleep(random.uniform(0, 0.02))
            writer.kill()
        assert (tmp_path / "f").read_bytes() in (b"a" * 3_000_000, b"b" * 3_000_000)
    durable.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["f"]


def test_no_room_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    durable.write(tmp_path / "f", b"old")
    code = (
        "import resource, sys; from codexd import durable\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: durable.write(sys.argv[1], b'x' * 5000)\n"
        "except OSError as error: print(error.errno)"
    )
    with child(code, tmp_path / "f") as writer:
        assert writer.stdout
        assert int(writer.stdout.read()) == errno.EFBIG
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.write(tmp_path / "no" / "f", b"")


def test_a_link_in_the_place_of_the_file_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "f").symlink_to("precious")
    durable.write(tmp_path / "f", b"new")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (tmp_path / "f").is_symlink()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["link", "fifo", "socket"])
def test_what_lies_in_the_place_of_the_file_aside_is_replaced(tmp_path: Path, what: str) -> None:
    """Its name can be guessed by whoever else writes there."""
    make(tmp_path / f".f.{os.getpid()}.tmp", what)
    durable.write(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert what != "link" or (tmp_path / "target").read_bytes() == b"{}"
    assert not list(tmp_path.glob(".f.*"))


# --- reading ----------------------------------------------------------------------


def test_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert durable.read(tmp_path / "f", 5) == b"12345"
    with pytest.raises(ValueError, match="5 bytes, more than 4"):
        durable.read(tmp_path / "f", 4)


def make(path: Path, what: str) -> None:
    if what == "link":
        path.with_name("target").write_bytes(b"{}")
        path.symlink_to("target")
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "socket":
        place = os.open(path.parent, os.O_PATH)
        with socket.socket(socket.AF_UNIX) as it:
            it.bind(f"/proc/self/fd/{place}/{path.name}")  # its own path has to be short
        os.close(place)


@pytest.mark.parametrize("what", ["link", "fifo", "directory", "socket", "nothing"])
def test_read_takes_regular_files_only_and_never_waits(tmp_path: Path, what: str) -> None:
    make(tmp_path / "f", what)
    wrong = FileNotFoundError if what == "nothing" else durable.NotAFile
    with pytest.raises(wrong, match="f") as raised:
        durable.read(tmp_path / "f", 100)
    assert what == "nothing" or isinstance(raised.value, ValueError)


@pytest.mark.parametrize("what", ["link", "fifo", "directory", "socket"])
def test_what_is_no_file_is_not_written_to(tmp_path: Path, what: str) -> None:
    make(tmp_path / "f", what)
    for flags in (os.O_WRONLY | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        with pytest.raises(durable.NotAFile) as raised:
            durable.opened(tmp_path / "f", flags)
        assert raised.value.filename == str(tmp_path / "f")


def test_a_link_is_followed_only_to_a_file(tmp_path: Path) -> None:
    make(tmp_path / "f", "link")
    assert durable.read(tmp_path / "f", 100, follow=True) == b"{}"
    (tmp_path / "g").symlink_to("/dev/zero")
    with pytest.raises(durable.NotAFile, match="not a regular file"):
        durable.read(tmp_path / "g", 100, follow=True)
    with pytest.raises((ValueError, OSError), match="f"):
        durable.read_json(tmp_path / "f")


def test_a_file_without_an_end_is_not_read_for_ever() -> None:
    with pytest.raises(ValueError, match="not a regular file"):
        durable.read("/dev/zero", 1 << 20)
    with pytest.raises(ValueError, match="grew over its limit"):  # its size is given as 0
        durable.read("/proc/self/status", 10)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b"\x00" * 9, b"[" * 100_000, b'{"a":}',
     b'{"a": 1}{', b'{"a":' * 50_000, b'{"a":' + b"[" * 200 + b"]" * 200 + b"}",
     b"{" + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_damaged_json_is_an_error_with_the_file_s_name_or_place(
    tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(ValueError, match=r"f: |line 1|decode|column"):
        durable.read_json(tmp_path / "f")


def test_damaged_json_is_an_error_where_json_was_never_imported(tmp_path: Path) -> None:
    """As in a worker: the scanner then fails without an error of its own."""
    (tmp_path / "f").write_bytes(b'{"a": "x')
    read = "import sys; sys.path.insert(0, sys.argv[1]); from codexd import durable\n"
    read += "try: durable.read_json(sys.argv[2])\nexcept ValueError as error: print(error)"
    package = Path(durable.__file__).parents[1]
    command = [sys.executable, "-I", "-S", "-c", read, package, tmp_path / "f"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "not JSON: Unterminated string" in done.stdout


ANY = st.text(st.characters(exclude_categories=()), max_size=20)


@given(st.dictionaries(ANY, st.none() | st.booleans() | st.integers() | ANY | st.lists(ANY)))
def test_json_survives_its_file(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "round.json"
    assert isinstance(value, dict)
    durable.write_json(path, value)
    assert durable.read_json(path) == value


def test_json_is_for_people_too(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "f", {"title": "Straße"})
    text = (tmp_path / "f").read_text()
    assert "Straße" in text
    assert text.count("\n") == 3
    assert json.loads(text) == {"title": "Straße"}


# --- sweeping, syncing ------------------------------------------------------------


def test_sweep_takes_what_dead_writers_left_and_nothing_else(tmp_path: Path) -> None:
    stay = ["a.tmp", ".notes.tmp", ".a.12x.tmp", "a.12.tmp", ".12.tmp.md", ".take-1"]
    gone = [".a.json.12.tmp", ".x.1.tmp"]
    for name in stay + gone:
        (tmp_path / name).touch()
    (tmp_path / ".dir.3.tmp").mkdir()
    (tmp_path / ".link.4.tmp").symlink_to("nowhere")
    durable.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, ".dir.3.tmp"])


def test_write_s_debris_is_what_sweep_takes(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from codexd import durable\n"
        "durable.os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "durable.write(sys.argv[1], b'x')"
    )
    with child(code, tmp_path / "f") as writer:
        assert writer.wait() == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    durable.sweep(tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_directory_that_may_not_be_read_can_still_be_written(tmp_path: Path) -> None:
    """An inbox for submitters: its owner syncs it when the file is taken."""
    tmp_path.chmod(0o733)
    code = (
        "import os, sys; from codexd import durable\n"
        "os.chdir(sys.argv[1]); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "durable.write('f', b'x')"
    )
    with child(code, tmp_path) as writer:
        assert writer.wait() == 0
    assert (tmp_path / "f").read_bytes() == b"x"


# --- what is on the disk before what ----------------------------------------------

ORDERS = {
    "durable.write('f', b'x')": """
        write .f.tmp
        fsync .f.tmp
        rename .f.tmp f
        fsync PLACE
    """,
    "transcript.append(Path('t.jsonl'), None, [{'task': 'a'}])": """
        write t.jsonl
        fsync t.jsonl
        fsync PLACE
    """,
    "place.begin_attempt(dirs, ID, 1, {})": """
        mkdir 1
        write attempt.json
        fsync ID
    """,
    # Empty as it is, it is there for good before anybody is told so.
    "spool.deliver_control(dirs.inbox, 'all.hold')": """
        fsync all.hold
        fsync inbox
    """,
    # The dropped name is known for good before the file has another one.
    "spool.claim(dirs, [(OTHER, 'a.md')])": """
        mkdir OTHER
        write .name.tmp
        fsync .name.tmp
        rename .name.tmp name
        fsync OTHER
        fsync tasks
        rename a.md .take-OTHER
        fsync inbox
    """,
    # The reason is there before the file, and the file before it is gone elsewhere.
    "spool.refuse(dirs, ID, 'b.md', 'why')": """
        write .b.md.reason.tmp
        fsync .b.md.reason.tmp
        rename .b.md.reason.tmp b.md.reason
        fsync rejected
        linkat .take-ID b.md
        unlink .take-ID
        fsync rejected
        unlink name
        unlink task.json
    """,
    # One write and one sync for the whole batch.
    "one.append([Event(AT, Kind.QUEUED, i, {'file': 'f'}) for i in (ID, OTHER)])": """
        write tasks.md
        fdatasync tasks.md
    """,
}
SETTING = """
import os, sys
from pathlib import Path
from codexd import durable, place, spool, transcript
from codexd.config import Directories
from codexd.ledger import Ledger
from codexd.model import Event, Kind
AT = "2026-11-23T07:20:11.123Z"
ID, OTHER = "20261123t072011-k3f9qa7x2m", "20261123t072011-k3f9qa7x2n"
os.chdir(sys.argv[1])
dirs = Directories.below(Path("."))
spool.prepare(dirs)
(dirs.inbox / "a.md").touch()
(dirs.inbox / (spool.TAKE + ID)).touch()
(dirs.tasks / ID).mkdir()
one = Ledger(dirs.ledger, dirs.checkpoint)
os.mkdir("begin")
"""


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace(1)")
@pytest.mark.parametrize("code", ORDERS)
def test_nothing_is_said_before_it_is_on_the_disk(tmp_path: Path, code: str) -> None:
    log = tmp_path / "strace.log"
    traced = "write,fsync,fdatasync,rename,renameat,linkat,unlink,mkdir"
    strace = ["strace", "-qq", "-y", "-e", f"trace={traced}", "-e", "signal=none", "-o", str(log)]
    program = SETTING + code + "\nos.mkdir('end')"
    command = [*strace, sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    said = log.read_text().partition('mkdir("begin"')[2].partition('mkdir("end"')[0]
    calls = [line for line in said.splitlines()[1:] if line]
    assert [_plain(call, tmp_path) for call in calls] == ORDERS[code].strip().split("\n        ")


def _plain(call: str, place: Path) -> str:
    """A line of strace as `call NAME…`, without directories and process numbers."""
    name, _, rest = call.partition("(")
    found = re.findall(r'<([^>]*)>|"([^"]*)"', rest)
    paths = [fd or text for fd, text in found]
    if name in ("write", "fsync", "fdatasync"):
        paths = paths[:1]
    elif name == "linkat":
        paths = paths[1::2]  # each comes after the directory it is seen from
    names = ["PLACE" if p == str(place) else os.path.basename(p) for p in paths]
    text = " ".join([name, *names])
    text = re.sub(r"\.[0-9]+\.tmp", ".tmp", text)
    text = text.replace("20261123t072011-k3f9qa7x2m", "ID")
    return text.replace("20261123t072011-k3f9qa7x2n", "OTHER")


# --- what is there ------------------------------------------------------------------------


def test_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("nothing")
    there = [durable.is_there(tmp_path / n) for n in ("", "file", "file/x", "loop", "nowhere", "x")]
    assert there == [True, True, False, False, False, False]
    assert durable.is_there(tmp_path / "nowhere", follow=False)
    assert durable.is_directory(tmp_path)
    assert not durable.is_directory(tmp_path / "file")


def test_what_nobody_can_say_is_no_no(tmp_path: Path) -> None:
    """As of a failing disk; the name is one that no file system has."""
    with pytest.raises(OSError, match="too long"):
        durable.is_there(tmp_path / ("x" * 300))
