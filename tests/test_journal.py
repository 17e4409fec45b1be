"""The log in the journal: its protocol, its fields, and that nobody can forge any of it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codexd import journal, messages
from codexd.journal import Journal
from codexd.service import plain, shown
from tests.box import PYTHON, Box
from tests.box.host import require
from tests.daemon import Daemon, until
from tests.web import Client

ID = "20261123t072011-k3f9qa7x2m"
# What somebody may have written into a name, a prompt or a message.
HOSTILE = [
    "a\nMESSAGE=forged\nPRIORITY=0",
    "<0>the kernel is on fire",
    "a\r<0>forged\x0b<0>b\x0c<0>c\x85<0>d\u2028<0>e\u2029<0>f",
    'a" task="20261123t072011-aaaaaaaaaa" b="',
    'ends with \\" task=20261123t072011-aaaaaaaaaa b=\\',
    "\x1b[2J\x1b]0;owned\x07",
    "\x9b31m\x90q\x9c",
    "\u202egnp.exe\u2066\u200f\ufeff",
    "\udcff\ud800",
    "a\x00b",
    "",
    " ",
    "é😀 " * 3000,
    "\x1b" * 100_000,
    "<0>x" * 30_000,
    "\U0001f600" * 100_000,
]


def decode(record: bytes) -> list[tuple[str, bytes]]:
    """A record's fields, as journald reads them."""
    fields = []
    while record:
        line, _, rest = record.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", rest[:8])
            value, end, rest = rest[8 : 8 + size], rest[8 + size : 9 + size], rest[9 + size :]
            assert end == b"\n"
        fields.append((name.decode(), value))
        record = rest
    return fields


# --- the protocol -------------------------------------------------------------------------


def test_a_record_as_the_protocol_has_it() -> None:
    found = journal.encode({"MESSAGE": "one\ntwo", "PRIORITY": "6"})
    assert found == b"MESSAGE\n\x07\0\0\0\0\0\0\0one\ntwo\nPRIORITY=6\n"


@given(st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,63}", fullmatch=True), st.text()))
def test_every_value_comes_out_as_it_went_in(fields: dict[str, str]) -> None:
    wanted = [(k, v.encode("utf-8", "backslashreplace")) for k, v in fields.items()]
    assert decode(journal.encode(fields)) == wanted


@pytest.mark.parametrize("name", ["", "_PID", "1A", "a", "A B", "A=", "A\n", "É", "A" * 65])
def test_names_that_journald_would_drop_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a field"):
        journal.encode({name: "x"})


class Listener:
    """A datagram socket where journald's would be."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(10)

    def next(self) -> dict[str, str]:
        """One record; every field of it is there once, and is text."""
        fields = decode(self.socket.recv(1 << 20))
        assert len(dict(fields)) == len(fields)
        return {name: value.decode() for name, value in fields}

    def close(self) -> None:
        self.socket.close()
        Path(self.path).unlink(missing_ok=True)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    found = Listener(tmp_path / "socket")
    yield found
    found.close()


@pytest.fixture
def sender(tmp_path: Path) -> Iterator[Journal]:
    found = Journal(str(tmp_path / "socket"))
    yield found
    found.close()
    found.close()  # there need be nothing to close


def test_a_record_is_one_datagram(listener: Listener, sender: Journal) -> None:
    sender.send({"MESSAGE": "one"})
    sender.send({"MESSAGE": "two", "PRIORITY": "3"})
    assert listener.next() == {"MESSAGE": "one"}
    assert listener.next() == {"MESSAGE": "two", "PRIORITY": "3"}


def test_what_is_too_large_goes_as_memory_that_nobody_can_change(
    listener: Listener, sender: Journal
) -> None:
    sender.send({"MESSAGE": "x" * (8 << 20)})
    data, fds, _, _ = socket.recv_fds(listener.socket, 100, 1)
    assert data == b""
    with open(fds[0], "rb") as file:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_WRITE
        assert seals & fcntl.F_SEAL_SHRINK
        file.seek(0)
        assert decode(file.read()) == [("MESSAGE", b"x" * (8 << 20))]
    assert not [f for f in os.listdir("/proc/self/fd") if "codexd-journal" in _target(f)]


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""  # that of the listing itself


def test_a_journal_that_comes_back_is_found_again(tmp_path: Path, sender: Journal) -> None:
    with pytest.raises(FileNotFoundError):
        sender.send({"MESSAGE": "x"})
    for text in ("one", "two"):
        found = Listener(tmp_path / "socket")
        sender.send({"MESSAGE": text})
        assert found.next() == {"MESSAGE": text}
        found.socket.close()
        with pytest.raises(ConnectionRefusedError):
            sender.send({"MESSAGE": "x"})
        Path(found.path).unlink()


def test_a_journal_that_hangs_holds_nobody_up(listener: Listener, sender: Journal) -> None:
    def flood() -> None:
        for _ in range(10_000):
            sender.send({"MESSAGE": "x"})

    begun = time.monotonic()
    with pytest.raises(BlockingIOError):
        flood()
    assert time.monotonic() - begun < 10 * journal.PATIENCE
    assert listener.next() == {"MESSAGE": "x"}  # what was taken is whole


# --- the log ------------------------------------------------------------------------------

# Logs what it reads: lines of JSON, each with a level, an event and its fields.
LOGGER = """
import json, sys
from codexd.service import Level, Service
service = Service("codexd-test", *sys.argv[1:])
for line in sys.stdin:
    level, event, fields = json.loads(line)
    service.log(Level[level], event, **fields)
"""


def log(
    tmp_path: Path, *lines: tuple[str, str, dict[str, object]], stream: str = "", env: str = ""
) -> list[str]:
    """What a program writes to standard error, which is said to be the journal's; its lines.

    `stream` is the real file, `env` another JOURNAL_STREAM.
    """
    with open(tmp_path / "stderr", "w+b") as stderr:
        about = os.fstat(stderr.fileno())
        subprocess.run(
            [sys.executable, "-c", LOGGER, str(tmp_path / "socket")],
            input="".join(json.dumps(line) + "\n" for line in lines),
            env={**os.environ, "JOURNAL_STREAM": env or f"{about.st_dev}:{about.st_ino}"},
            stderr=stderr,
            text=True,
            check=True,
            timeout=60,
        )
        stderr.seek(0)
        return stderr.read().decode().split("\n")[:-1]


def test_an_event_is_a_record_with_fields(tmp_path: Path, listener: Listener) -> None:
    fields: dict[str, object] = {"task": ID, "session": "my site", "reason": None, "launches": 2}
    assert log(tmp_path, ("INFO", "task.running", fields), ("ERROR", "no.such", {})) == []
    assert listener.next() == {
        "MESSAGE": f'task.running task={ID} session="my site" launches=2',
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "codexd-test",
        "CODEXD_EVENT": "task.running",
        "MESSAGE_ID": messages.IDS["task.running"],
        "CODEXD_TASK": ID,
        "CODEXD_SESSION": "my site",
    }
    rest = {"PRIORITY": "3", "SYSLOG_IDENTIFIER": "codexd-test", "CODEXD_EVENT": "no.such"}
    assert listener.next() == {"MESSAGE": "no.such", **rest}


def test_without_the_socket_a_line_goes_to_standard_error(tmp_path: Path) -> None:
    found = log(tmp_path, ("INFO", "started", {"pid": 1}), ("WARNING", "rejected", {"file": "a b"}))
    why = '"[Errno 2] No such file or directory"'
    wanted = [f"<4>journal.lost why={why}", "<6>started pid=1", '<4>rejected file="a b"']
    assert found == wanted


@pytest.mark.parametrize("env", ["0:0", "8:1", "x"])
def test_a_variable_alone_is_no_journal(tmp_path: Path, listener: Listener, env: str) -> None:
    (line,) = log(tmp_path, ("NOTICE", "gate.opened", {"reason": "disk"}), env=env)
    time_of_it, _, rest = line.partition(" ")
    assert time_of_it.endswith("Z")
    assert rest == "notice gate.opened reason=disk"
    listener.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.next()


def test_closed_standard_error_is_no_journal() -> None:
    ask = "import os, sys; os.close(2); from codexd import journal"
    ask += "; print(journal.is_stderr('0:0'), journal.is_stderr(None))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert done.stdout == "False False\n"


def hostile() -> list[tuple[str, str, dict[str, object]]]:
    return [("INFO", "task.failed", {"task": ID, "session": v, "message": v}) for v in HOSTILE]


def test_nothing_in_a_value_can_forge_a_record(tmp_path: Path, listener: Listener) -> None:
    for value, event in zip(HOSTILE, hostile(), strict=True):
        assert log(tmp_path, event) == []
        found = listener.next()
        assert set(found) == {
            "MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "CODEXD_EVENT", "MESSAGE_ID",
            "CODEXD_TASK", "CODEXD_SESSION",
        }  # fmt: skip
        assert (found["PRIORITY"], found["CODEXD_TASK"]) == ("6", ID)
        assert all(text.isprintable() for text in found.values())
        assert found["MESSAGE"] == line(value)


def line(value: str) -> str:
    return f"task.failed task={ID} session={plain(value)} message={plain(value)}"


def test_nothing_in_a_value_can_forge_a_line(tmp_path: Path) -> None:
    _, *found = log(tmp_path, *hostile())
    assert found == [f"<6>{line(value)}" for value in HOSTILE]
    assert all(text.isprintable() and len(text.encode()) < 48 << 10 for text in found)


def test_a_line_is_never_split_by_journald(tmp_path: Path) -> None:
    """The rest of a split line would be a line of its own, and <0> a priority."""
    many: dict[str, object] = {f"name{n}": "😀" * 5000 for n in range(20)}
    _, found = log(tmp_path, ("INFO", "rejected", many))
    assert found.endswith("…")
    assert len(found.encode()) < 48 << 10


def test_a_log_tells_the_whole_story_of_a_task(tmp_path: Path) -> None:
    """Every line about a task says which, and from the queue on of which session."""
    with Daemon(tmp_path / "root", config="http:\n  listen: unix\n") as daemon:
        daemon.run("hold")
        with Client(daemon.ready.rpartition("http=")[2]) as client:
            body = json.dumps({"prompt": "x", "session": "my site"}).encode()
            id = client.ask("POST", "/tasks", body).json["id"]
            until(lambda: daemon.dirs.tasks.joinpath(id).exists(), "the task")
            assert client.ask("POST", f"/tasks/{id}/cancel").status == 202
        until(daemon.dirs.answers.joinpath(f"{id}.md").exists, "the answer")
        daemon.drop(f"{ID}.md", "---\nunknown: key\n---\nx")
        assert "unknown" in daemon.reason(f"{ID}.md")
        assert daemon.stop() == 0
        lines = [line.split(" ", 2)[2] for line in daemon.log.read_text().splitlines()]
    story = [line for line in lines if f" task={id} " in line]
    assert sum(line.startswith("http.post ") for line in story) == 2
    told = [line.split()[0] for line in story if ' session="my site" ' in line]
    assert told == ["task.queued", "task.cancelled"]
    assert [line.split()[0] for line in lines if f" task={ID} " in line] == ["rejected"]


# --- values -------------------------------------------------------------------------------


@given(st.lists(st.text() | st.sampled_from(HOSTILE)))
def test_a_line_can_be_read_back(values: list[str]) -> None:
    """Where a value begins and ends is never in doubt."""
    text = " ".join(f"name={plain(value)}" for value in values)
    found = []
    while text:
        assert text.startswith("name=")
        value, text = _first(text.removeprefix("name="))
        found.append(value)
    assert found == [shown(value) for value in values]


def _first(text: str) -> tuple[str, str]:
    """A value, and what follows it."""
    if not text.startswith('"'):
        value, _, rest = text.partition(" ")
        return value, rest
    at = 1
    while text[at] != '"':
        at += 2 if text[at] == "\\" else 1
    return text[1:at].replace('\\"', '"'), text[at + 2 :]


@given(st.text())
def test_shown_values_are_printable_and_bounded(text: str) -> None:
    found = shown(text)
    assert found.isprintable()
    assert len(found) <= 4001
    if len(found) < 4000:  # nothing is cut, and nothing is lost
        assert found.replace(r"\\", "\0").count("\\") == sum(not c.isprintable() for c in text)


def test_what_is_cut_says_so() -> None:
    assert shown("x" * 4000) == "x" * 4000
    assert shown("x" * 4001) == "x" * 4000 + "…"
    assert shown("\n" * 4000) == "\\n" * 2000 + "…"
    assert plain("a\\b") == "a\\\\b"
    assert plain('say "a"\n') == r'"say \"a\"\n"'


# --- in a booted systemd ------------------------------------------------------------------

UNIT = f"""
[Service]
Type=oneshot
StandardInput=file:/srv/lines
ExecStart={PYTHON} /srv/logger.py
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    require("hybrid")
    with Box("hybrid") as box:
        box.push({"/srv/logger.py": LOGGER})
        yield box


def run_logger(box: Box, name: str, lines: list[Any], properties: str = "") -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    box.push({"/srv/lines": text, f"/run/systemd/system/{name}.service": UNIT + properties})
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "start", name)


@pytest.mark.xdist_group("box")
def test_the_journal_finds_a_task_by_its_id(box: Box) -> None:
    id = "20261123t072011-normal0000"
    lines = [
        ("INFO", "task.queued", {"task": id, "session": "my site"}),
        ("INFO", "task.queued", {"task": "20261123t072011-other00000", "session": "my site"}),
        ("WARNING", "task.failed", {"task": id, "session": "my site", "outcome": "oom"}),
    ]
    run_logger(box, "normal", lines)
    queued, failed = box.journal(f"CODEXD_TASK={id}")
    assert queued["MESSAGE"] == f'task.queued task={id} session="my site"'
    assert [e["PRIORITY"] for e in (queued, failed)] == ["6", "4"]
    assert failed["CODEXD_EVENT"] == "task.failed"
    assert failed["MESSAGE_ID"] == messages.IDS["task.failed"]
    assert failed["SYSLOG_IDENTIFIER"] == "codexd-test"
    assert failed["_SYSTEMD_UNIT"] == "normal.service"
    assert failed["CODEXD_TASK"] == id
    assert len(box.journal("CODEXD_SESSION=my site", "MESSAGE_ID=" + queued["MESSAGE_ID"])) == 2


@pytest.mark.xdist_group("box")
def test_a_unit_that_names_its_task_does_not_name_it_twice(box: Box) -> None:
    """LogExtraFields= of the worker's unit is for what other programs in it write."""
    id = "20261123t072011-extra00000"
    extra = f"LogExtraFields=CODEXD_TASK={id}\nExecStart=echo from somebody else\n"
    run_logger(box, "extra", [("INFO", "task.done", {"task": id})], extra)
    entries = box.journal(f"CODEXD_TASK={id}")
    texts = [e["MESSAGE"] for e in entries]
    assert texts == [f"task.done task={id}", "from somebody else"]
    assert [e["CODEXD_TASK"] for e in entries] == [id, id]


@pytest.mark.xdist_group("box")
@pytest.mark.parametrize("socket", ["there", "hidden"])
def test_hostile_values_are_one_record_each(box: Box, socket: str) -> None:
    id = f"20261123t072011-hostile{len(socket):03}"
    lines = [("NOTICE", "task.failed", {"task": id, "message": value}) for value in HOSTILE]
    hidden = "InaccessiblePaths=/run/systemd/journal/socket\n" if socket == "hidden" else ""
    run_logger(box, socket, lines, hidden)
    found = box.journal(f"_SYSTEMD_UNIT={socket}.service")
    texts = [f"task.failed task={id} message={plain(value)}" for value in HOSTILE]
    if hidden:
        lost = found.pop(0)
        assert lost["MESSAGE"].startswith("journal.lost why=")
        assert lost["PRIORITY"] == "4"
        assert {e["_TRANSPORT"] for e in found} == {"stdout"}
    else:
        assert found == box.journal(f"CODEXD_TASK={id}")
    assert [e["MESSAGE"] for e in found] == texts
    assert {e["PRIORITY"] for e in found} == {"5"}


LARGE = """
from codexd.journal import Journal
Journal().send({"MESSAGE": "large", "CODEXD_TASK": "large", "CODEXD_TEXT": "x" * (1 << 20)})
"""


@pytest.mark.xdist_group("box")
def test_journald_takes_a_record_of_a_megabyte(box: Box) -> None:
    box.run(PYTHON, "-c", LARGE)
    (entry,) = box.journal("CODEXD_TASK=large")
    assert entry["CODEXD_TEXT"] == "x" * (1 << 20)
