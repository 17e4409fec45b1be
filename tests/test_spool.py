"""The hand-over: nothing dropped is lost, nothing half-written is taken, no name does harm."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from codexd import durable, spool
from codexd.config import Directories
from codexd.model import is_id
from codexd.spool import SETTLE, TAKE, Settled, Unreadable, Watch
from tests.proof.level import Figures, pick

ROOT = Path(__file__).resolve().parent.parent
ID, OTHER = "20261123t072011-k3f9qa7x2m", "20261123t072011-k3f9qa7x2n"
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
BECOME_NOBODY = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"


@pytest.fixture
def dirs(tmp_path: Path) -> Directories:
    found = Directories.below(tmp_path)
    spool.prepare(found)
    return found


HEAD = """
import os, sys
from dataclasses import fields, replace
from pathlib import Path
from codexd import config, durable, spool

def directories():
    # From inside: who is nobody may not come here from the root.
    os.chdir(sys.argv[1])
    found = config.Directories.below(Path("."))
    paths = {f.name: getattr(found, f.name) for f in fields(found) if f.type == "Path"}
    return replace(found, **{k: Path(os.path.relpath(v)) for k, v in paths.items()})
"""


def run(
    code: str, *args: str | Path, within: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """A program of its own, with the package imported, whose last word is on stdout.

    `within` is a command that starts another.
    """
    command = [*within, sys.executable, "-c", HEAD + code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path), key=os.fsencode)


# --- the directories --------------------------------------------------------------


def test_prepare_makes_what_is_missing_and_no_more(tmp_path: Path) -> None:
    dirs = Directories.below(tmp_path)
    dirs.answers.mkdir(mode=0o700)
    spool.prepare(dirs)
    spool.prepare(dirs)
    modes = {
        dirs.inbox: 0o3770, dirs.tasks: 0o750, dirs.rejected: 0o750, dirs.codex_home: 0o700,
        dirs.run: 0o750, dirs.answers: 0o700,
    }  # fmt: skip
    assert {p: p.stat().st_mode & 0o7777 for p in modes} == modes


def test_prepare_sweeps_only_where_the_master_alone_writes(dirs: Directories) -> None:
    debris = [dirs.sessions / ".web.json.12.tmp", dirs.tasks.parent / ".tasks.md.9.tmp"]
    others = [dirs.inbox / ".a.md.12.tmp", dirs.tasks.parent / ".notes.tmp"]
    for path in debris + others:
        path.touch()
    spool.prepare(dirs)
    assert [p.exists() for p in debris] == [False, False]
    assert [p.exists() for p in others] == [True, True]


def test_what_dead_producers_left_is_swept_after_an_hour(dirs: Directories) -> None:
    old = [".x.json.12.tmp", ".notes.tmp", ".x.md.tmp", ".take-1", "x.12.tmp", ".x.²3.tmp"]
    for name in old:
        (dirs.inbox / name).touch()
        os.utime(dirs.inbox / name, (0, time.time() - 3700))
    (dirs.inbox / ".y.json.12.tmp").touch()
    (dirs.inbox / ".link.12.tmp").symlink_to("nowhere")
    os.utime(dirs.inbox / ".link.12.tmp", (0, 0), follow_symlinks=False)
    (dirs.inbox / ".dir.12.tmp").mkdir()
    os.utime(dirs.inbox / ".dir.12.tmp", (0, 0))
    spool.prepare(dirs)
    assert set(names(dirs.inbox)) == {*old[1:], ".y.json.12.tmp", ".link.12.tmp", ".dir.12.tmp"}


def test_a_file_in_the_place_of_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "inbox").touch()
    with pytest.raises(OSError, match="inbox"):
        spool.prepare(Directories.below(tmp_path))


@NEEDS_ROOT
def test_a_directory_that_may_not_be_written_is_named(dirs: Directories) -> None:
    dirs.tasks.parent.chmod(0o777)
    dirs.inbox.chmod(0o755)
    code = (
        "found = config.Directories.below(Path('.'))\n"
        f"os.chdir(sys.argv[1]); {BECOME_NOBODY}\n"
        "try: spool._make(Path('inbox'), 0o3770)\n"
        "except PermissionError as error: print(error.filename, error.strerror)"
    )
    assert run(code, dirs.inbox.parent).stdout == "inbox codexd may not write here\n"


def test_new_ids_are_well_formed_and_all_different() -> None:
    ids = [spool.new_id() for _ in range(2000)]
    assert len(set(ids)) == 2000
    assert all(map(is_id, ids))
    assert ids == sorted(ids), "the inbox is taken in this order"


# --- delivering -------------------------------------------------------------------


def test_deliver_is_whole_and_leaves_nothing_aside(dirs: Directories) -> None:
    spool.deliver(dirs.inbox, "a.md", b"one")
    spool.deliver(dirs.inbox, "a.md", b"two")
    assert (dirs.inbox / "a.md").read_bytes() == b"two"
    assert names(dirs.inbox) == ["a.md"]


def test_a_control_file_is_empty_and_may_be_there_already(dirs: Directories) -> None:
    for _ in range(2):
        spool.deliver_control(dirs.inbox, "all.hold")
    assert (dirs.inbox / "all.hold").read_bytes() == b""


def test_a_control_file_that_is_given_again_is_the_last(dirs: Directories) -> None:
    spool.deliver_control(dirs.inbox, "all.hold")
    os.utime(dirs.inbox / "all.hold", (1, 1))
    before = time.time()
    spool.deliver_control(dirs.inbox, "all.hold")
    assert (dirs.inbox / "all.hold").stat().st_mtime > before - 1


@NEEDS_ROOT
def test_a_control_file_of_another_user_counts(dirs: Directories) -> None:
    """With fs.protected_regular nobody opens it, whatever its mode."""
    dirs.inbox.chmod(0o3777)
    for name, text in (("all.hold", ""), ("all.drain", "not empty")):
        (dirs.inbox / name).write_text(text)
        (dirs.inbox / name).chmod(0o600)
    code = (
        f"os.chdir(sys.argv[1]); {BECOME_NOBODY}\n"
        "for name in ('all.hold', 'all.release', 'all.drain'):\n"
        "    spool.deliver_control(Path(), name); print(name)"
    )
    said = run(code, dirs.inbox)
    assert said.stdout.split() == ["all.hold", "all.release"]
    assert "PermissionError" in said.stderr


def test_of_a_file_that_is_gone_nobody_knows_when_it_came(dirs: Directories) -> None:
    spool.deliver_control(dirs.inbox, "all.hold")
    assert spool.delivered(dirs.inbox / "all.hold") == (dirs.inbox / "all.hold").stat().st_ctime
    assert spool.delivered(dirs.inbox / "all.release") is None


def test_a_fifo_in_its_place_does_not_hold_up_whoever_delivers(dirs: Directories) -> None:
    os.mkfifo(dirs.inbox / "all.hold")
    with pytest.raises(OSError, match=r"all\.hold") as caught:
        spool.deliver_control(dirs.inbox, "all.hold")
    assert caught.value.errno == errno.ENXIO


# --- looking ----------------------------------------------------------------------


def test_scan_tells_dropped_from_taken_in_byte_order(dirs: Directories) -> None:
    dropped = [
        b"-rf",
        b"B.md",
        b"a b.md",
        b"a.md",
        b"a\nb.md",
        b"x.tmp.md",
        "ü".encode(),
        "🦊".encode(),
        b"\xff\x1b",
    ]
    for name in (
        *dropped,
        b".hidden",
        b"a.tmp",
        b"b~",
        b"c.part",
        b".take-1",
        b".take-" + b"x" * 26,
    ):
        (Path(os.fsdecode(bytes(dirs.inbox) + b"/" + name))).touch()
    for id in (OTHER, ID):
        (dirs.inbox / (TAKE + id)).touch()
    found, taken = spool.scan(dirs.inbox)
    assert [os.fsencode(name) for name in found] == sorted(dropped)
    assert taken == [ID, OTHER]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (f"{ID}.md", ID),
        (f"{ID}.json", ID),
        (f"{ID}.yaml", None),
        (f"{ID}.md.md", None),
        (ID, None),
        (f"x{ID}.md", None),
        ("a.md", None),
        (f"{ID}\n.md", None),
    ],
)
def test_a_producer_may_choose_the_id(name: str, wanted: str | None) -> None:
    assert spool.wanted_id(name) == wanted


@pytest.mark.parametrize("name", [f"{ID}.md", f"{ID}.json", TAKE + ID, None, f"{ID}.cancel"])
def test_in_inbox(dirs: Directories, name: str | None) -> None:
    if name:
        (dirs.inbox / name).touch()
    assert spool.in_inbox(dirs, ID) is (name is not None and not name.endswith("cancel"))


# --- settled ----------------------------------------------------------------------


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


def test_a_file_nobody_writes_is_settled_at_once(dirs: Directories) -> None:
    (dirs.inbox / "a.md").write_text("a")
    assert Settled()(dirs.inbox, "a.md", 100.0)


def test_an_empty_file_may_be_about_to_be_written(dirs: Directories) -> None:
    settled, path = Settled(), dirs.inbox / "a.md"
    path.touch()
    assert not settled(dirs.inbox, "a.md", 100.0)
    assert settled.pending(100.5)
    assert not settled(dirs.inbox, "a.md", 100.9)
    os.utime(path, (1, 1))
    assert not settled(dirs.inbox, "a.md", 101.5), "it changed meanwhile"
    assert not settled(dirs.inbox, "a.md", 102.4)
    assert settled(dirs.inbox, "a.md", 102.5)
    assert not settled.pending(110.0)


def test_a_second_name_may_be_about_to_go(dirs: Directories) -> None:
    """As Maildir does: link(2) to the place, and then remove the name it was written under."""
    settled, path = Settled(), dirs.inbox / "a.md"
    (dirs.inbox / ".aside").write_text("a")
    path.hardlink_to(dirs.inbox / ".aside")
    assert not settled(dirs.inbox, "a.md", 100.0)
    (dirs.inbox / ".aside").unlink()
    assert settled(dirs.inbox, "a.md", 100.1)


@pytest.mark.parametrize("seconds", [0.0, 3600.0, -3600.0, 50 * 365 * 86400.0])
def test_the_wall_clock_decides_nothing(dirs: Directories, seconds: float) -> None:
    settled, path = Settled(), dirs.inbox / "a.md"
    path.touch()
    age(path, seconds)
    assert not settled(dirs.inbox, "a.md", 100.0)
    assert settled(dirs.inbox, "a.md", 100.0 + SETTLE)


def test_what_somebody_still_writes_is_not_settled(dirs: Directories) -> None:
    settled, path = Settled(), dirs.inbox / "a.md"
    with open(path, "w") as writer:
        writer.write("half")
        writer.flush()
        age(path, 60)
        assert not settled(dirs.inbox, "a.md", 100.0)
        assert not settled(dirs.inbox, "a.md", 200.0), "however long it takes"
    assert settled(dirs.inbox, "a.md", 200.1)
    with open(path):
        assert settled(dirs.inbox, "a.md", 200.2), "a reader is no writer"


def link(path: Path) -> None:
    path.symlink_to("nowhere")


def unix_socket(path: Path) -> None:
    place = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as it:
        it.bind(f"/proc/self/fd/{place}/{path.name}")  # a socket's own path has to be short
    os.close(place)


KINDS: dict[str, Callable[[Path], object]] = {
    "a directory": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a symbolic link": link,
    "a socket": unix_socket,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_needs_no_waiting(dirs: Directories, kind: str) -> None:
    KINDS[kind](dirs.inbox / "a.md")
    assert Settled()(dirs.inbox, "a.md", 100.0)


def test_what_vanished_is_not_settled(dirs: Directories) -> None:
    assert not Settled()(dirs.inbox, "gone.md", 100.0)


def test_what_came_and_went_is_forgotten(dirs: Directories) -> None:
    settled = Settled()
    for n in range(5):
        (dirs.inbox / f"{n}.md").touch()
        settled(dirs.inbox, f"{n}.md", 100.0)
        settled.told.add(f"{n}.md")
    settled.prune(["3.md"])
    assert settled.told == {"3.md"}
    assert settled.pending(100.0)
    settled.forget("3.md")
    assert not settled.told
    assert not settled.pending(100.0)


@NEEDS_ROOT
def test_of_others_files_only_waiting_tells(dirs: Directories) -> None:
    """Nobody but the owner may ask who writes a file; and the clock may have jumped."""
    (dirs.inbox / "a.md").write_text("half of it")
    age(dirs.inbox / "a.md", 3600)
    dirs.inbox.chmod(0o777)
    code = (
        f"os.chdir(sys.argv[1]); {BECOME_NOBODY}\n"
        "settled = spool.Settled()\n"
        "print([settled(Path('.'), 'a.md', now) for now in (100.0, 100.9, 101.1)])"
    )
    assert run(code, dirs.inbox).stdout == "[False, False, True]\n"


def test_asking_for_a_writer_does_no_harm_to_who_asks(dirs: Directories) -> None:
    """A lease that is broken sends a signal, which by default would end the daemon."""
    (dirs.inbox / "a.md").write_text("x")
    opener = (
        "import os, sys\n"
        "while True: os.close(os.open(sys.argv[1], os.O_WRONLY))"
    )  # fmt: skip
    busy = subprocess.Popen([sys.executable, "-c", opener, dirs.inbox / "a.md"])
    code = (
        "import time; from codexd import settled; end = time.monotonic() + 1\n"
        "while time.monotonic() < end: settled._being_written(Path(sys.argv[1]))\n"
        "print('alive')"
    )
    asked = run(code, dirs.inbox / "a.md")
    busy.kill()
    busy.wait()
    assert (asked.returncode, asked.stdout) == (0, "alive\n")


# --- watching ---------------------------------------------------------------------


class Bell:
    """What a watch tells, to wait for."""

    def __init__(self, inbox: Path) -> None:
        self.settled = Settled()
        self.rung = threading.Event()
        self.watch = Watch(inbox, self.settled, self.rung.set)

    def rings(self, seconds: float = 5.0) -> bool:
        found = self.rung.wait(seconds)
        self.rung.clear()
        return found

    def tells(self, name: str) -> bool:
        end = time.monotonic() + 5
        while name not in self.settled.told and time.monotonic() < end:
            self.rings(0.1)
        return name in self.settled.told


@pytest.fixture
def bell(dirs: Directories) -> Iterator[Bell]:
    one = Bell(dirs.inbox)
    one.watch.tend()
    assert one.watch.kind == "inotify", one.watch.problem
    yield one
    one.watch.stop()


def drop_deliver(inbox: Path) -> None:
    spool.deliver(inbox, "a.md", b"x")


def drop_copy(inbox: Path) -> None:
    source = inbox.parent / "source.md"
    source.write_text("x")
    subprocess.run(["cp", source, inbox / "a.md"], check=True)


def drop_touch(inbox: Path) -> None:
    subprocess.run(["touch", inbox / "a.md"], check=True)


def drop_aside(inbox: Path) -> None:
    (inbox / "a.md.part").write_text("x")
    (inbox / "a.md.part").rename(inbox / "a.md")


@pytest.mark.parametrize("drop", [drop_deliver, drop_copy, drop_touch, drop_aside])
def test_a_finished_file_is_told_at_once(
    dirs: Directories, bell: Bell, drop: Callable[[Path], None]
) -> None:
    drop(dirs.inbox)
    assert bell.tells("a.md")
    assert bell.settled(dirs.inbox, "a.md", 100.0)
    assert bell.settled.told == {"a.md"}, "nothing of a file that is not finished"


def test_a_file_moved_in_from_elsewhere_rings(dirs: Directories, bell: Bell) -> None:
    source = dirs.inbox.parent / "old.md"
    source.write_text("x")
    age(source, 60)
    subprocess.run(["mv", source, dirs.inbox / "a.md"], check=True)
    assert bell.rings()
    assert bell.settled(dirs.inbox, "a.md", 100.0)


def test_a_slow_writer_is_told_only_at_its_end(dirs: Directories, bell: Bell) -> None:
    with open(dirs.inbox / "a.md", "w") as file:
        assert bell.rings(), "somebody has begun"
        file.write("half")
        file.flush()
        bell.rings(0.2)
        assert not bell.settled.told
        assert not bell.settled(dirs.inbox, "a.md", 100.0)
    assert bell.tells("a.md")


def test_our_own_doings_do_not_ring(dirs: Directories, bell: Bell) -> None:
    spool.deliver(dirs.inbox, "a.md", b"x")
    assert bell.tells("a.md")
    while bell.rings(0.3):
        pass
    spool.claim(dirs, [(ID, "a.md")])
    spool.drop(dirs, ID)
    (dirs.inbox / ".hidden.tmp").write_text("x")
    assert not bell.rings(0.5)


def test_hints_may_be_missing_the_scan_is_the_truth(dirs: Directories, bell: Bell) -> None:
    bell.watch.stop()
    expected = [f"{n:04}.md" for n in range(2000)]
    for name in reversed(expected):
        (dirs.inbox / name).touch()
    assert spool.scan(dirs.inbox) == (expected, [])
    assert not bell.settled.told
    bell.watch.tend()
    drop_touch(dirs.inbox)
    assert bell.tells("a.md")


def rename_aside(inbox: Path) -> None:
    inbox.rename(inbox.with_name("old"))


@pytest.mark.parametrize("remove", [rename_aside, os.rmdir], ids=["moved", "removed"])
def test_a_replaced_inbox_is_watched_again(
    dirs: Directories, bell: Bell, remove: Callable[[Path], None]
) -> None:
    for _ in range(3):  # the number of the old directory may be given to the new one
        remove(dirs.inbox)
        dirs.inbox.mkdir()
        end = time.monotonic() + 5
        while not bell.settled.told and time.monotonic() < end:
            bell.watch.tend()
            spool.deliver(dirs.inbox, "a.md", b"x")
            bell.rings(0.2)
        assert bell.settled.told == {"a.md"}
        assert bell.watch.kind == "inotify"
        (dirs.inbox / "a.md").unlink()
        bell.settled.forget("a.md")
        for old in dirs.inbox.parent.glob("old*"):
            old.rmdir()


def test_without_inotify_it_polls_and_says_so(dirs: Directories) -> None:
    code = """
import resource, threading
settled = spool.Settled()
rung = threading.Event()
watch = spool.Watch(Path(sys.argv[1]), settled, rung.set)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1, hard))
for _ in range(5):
    watch.tend()
assert watch.kind == 'polling', watch.kind
assert 'no inotify' in watch.problem, watch.problem
assert threading.active_count() == 1, threading.enumerate()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
watch.tend()
assert (watch.kind, watch.problem) == ('inotify', None)
spool.deliver(Path(sys.argv[1]), 'a.md', b'x')
assert rung.wait(5)
watch.stop()
print('fine')
"""
    done = run(code, dirs.inbox)
    assert done.stdout == "fine\n", done.stderr


def test_without_a_watch_left_it_polls_and_keeps_no_thread(dirs: Directories) -> None:
    """There is an instance of inotify, and the host's limit of watches is reached."""
    none = 'echo 0 >/proc/sys/user/max_inotify_watches && exec "$@"'
    within = ["unshare", "--user", "--map-root-user", "sh", "-c", none, "sh"]
    if subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("this host gives no user namespaces")
    code = """
import threading
watch = spool.Watch(Path(sys.argv[1]), spool.Settled(), print)
for _ in range(5):
    watch.tend()
for thread in threading.enumerate()[1:]:
    thread.join(5)
print(watch.kind, threading.active_count(), watch.problem)
"""
    done = run(code, dirs.inbox, within=within)
    assert done.stdout.startswith("polling 1 no inotify ("), done


# --- claiming ---------------------------------------------------------------------

HOSTILE = {
    "plain": b"fix-links.md",
    "a newline": b"a\nb.md",
    "escapes": b"\x1b]0;pwned\x07.md",
    "no UTF-8": b"\xff\xfe\x80.md",
    "an option": b"-rf",
    "as long as can be": b"x" * 252 + b".md",
    "as long in UTF-8": "ü".encode() * 126 + b".md",
    "dots": b"a..md",
    "quotes": b"'\"`$(reboot)`.md",
    "blanks": b" . md ",
    "one byte": b"a",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_name_is_data(dirs: Directories, kind: str) -> None:
    name = os.fsdecode(HOSTILE[kind])
    (dirs.inbox / name).write_bytes(b"body")
    assert spool.claim(dirs, [(ID, name)]) == [ID]
    assert names(dirs.inbox) == [TAKE + ID]
    assert spool.scan(dirs.inbox) == ([], [ID])
    assert spool.dropped_name(dirs, ID) == name
    assert spool.contents(dirs, ID, 100) == b"body"
    kept = spool.refuse(dirs, ID, name, "because: ü\x1b")
    assert (dirs.rejected / kept).read_bytes() == b"body"
    assert (dirs.rejected / f"{kept}.reason").read_text() == "because: ü\x1b\n"
    assert names(dirs.inbox) == names(dirs.tasks) == []
    assert len(names(dirs.rejected)) == 2


def test_a_vanished_file_is_left_out(dirs: Directories) -> None:
    spool.deliver(dirs.inbox, "b.md", b"b")
    assert spool.claim(dirs, [(ID, "gone.md"), (OTHER, "b.md")]) == [OTHER]
    assert names(dirs.tasks) == [OTHER]


def crash_before_anything(dirs: Directories) -> None:
    spool.deliver(dirs.inbox, "a.md", b"body")


def crash_with_a_directory(dirs: Directories) -> None:
    crash_before_anything(dirs)
    (dirs.tasks / ID).mkdir()


def crash_in_the_name(dirs: Directories) -> None:
    crash_with_a_directory(dirs)
    (dirs.tasks / ID / ".name.77.tmp").write_bytes(b"a.")


def crash_after_the_name(dirs: Directories) -> None:
    crash_with_a_directory(dirs)
    (dirs.tasks / ID / "name").write_bytes(b"a.md")


CRASHES = [crash_before_anything, crash_with_a_directory, crash_in_the_name, crash_after_the_name]


@pytest.mark.parametrize("crash", CRASHES)
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_claiming_can_be_repeated_after_a_crash(
    dirs: Directories, crash: Callable[[Directories], None], repeats: int
) -> None:
    crash(dirs)
    taken = [spool.claim(dirs, [(ID, "a.md")]) for _ in range(repeats)]
    assert taken == [[ID], [], []][:repeats], "once"
    assert spool.dropped_name(dirs, ID) == "a.md"
    assert spool.contents(dirs, ID, 100) == b"body"
    assert spool.scan(dirs.inbox) == ([], [ID])


@pytest.mark.parametrize("crash", CRASHES[1:])
def test_a_claim_that_was_given_up_leaves_nothing(
    dirs: Directories, crash: Callable[[Directories], None]
) -> None:
    crash(dirs)
    for _ in range(2):
        spool.discard(dirs, ID)
    assert names(dirs.tasks) == []
    assert names(dirs.inbox) == ["a.md"]


def test_a_claim_that_the_host_refuses_leaves_nothing(dirs: Directories) -> None:
    """The last of three: on a full disk every round would leave two more directories."""
    ids = [f"{ID[:-1]}{n}" for n in range(3)]
    for id in ids:
        spool.deliver(dirs.inbox, f"{id}.md", b"body")
    (dirs.tasks / ids[2]).touch()  # in the way
    for _ in range(2):
        with pytest.raises(FileExistsError):
            spool.claim(dirs, [(id, f"{id}.md") for id in ids])
    assert names(dirs.tasks) == ids[2:]
    assert names(dirs.inbox) == [f"{id}.md" for id in ids]


def test_two_files_of_one_id_are_both_kept(dirs: Directories) -> None:
    spool.deliver(dirs.inbox, f"{ID}.json", b"json")
    spool.deliver(dirs.inbox, f"{ID}.md", b"md")
    pairs = [(ID, f"{ID}.json"), (ID, f"{ID}.md")]
    assert spool.claim(dirs, pairs) == [ID]
    assert spool.dropped_name(dirs, ID) == f"{ID}.json"
    assert spool.contents(dirs, ID, 100) == b"json"
    assert spool.scan(dirs.inbox) == ([f"{ID}.md"], [ID])


def test_a_file_does_not_take_the_place_of_one_that_is_being_taken(dirs: Directories) -> None:
    spool.deliver(dirs.inbox, f"{ID}.md", b"first")
    spool.claim(dirs, [(ID, f"{ID}.md")])
    spool.deliver(dirs.inbox, f"{ID}.md", b"second")
    assert spool.claim(dirs, [(ID, f"{ID}.md")]) == []
    assert spool.contents(dirs, ID, 100) == b"first"
    assert (dirs.inbox / f"{ID}.md").read_bytes() == b"second"


@pytest.mark.parametrize("record", [None, b"x" * 5000], ids=["missing", "too long"])
def test_a_taken_file_without_its_record_is_still_somebody_s_task(
    dirs: Directories, record: bytes | None
) -> None:
    """Anybody who may drop files can make such a name."""
    (dirs.inbox / (TAKE + ID)).write_bytes(b"body")
    if record:
        (dirs.tasks / ID).mkdir()
        (dirs.tasks / ID / "name").write_bytes(record)
    for _ in range(2):
        assert spool.dropped_name(dirs, ID) == f"{ID}.md"
    assert spool.contents(dirs, ID, 100) == b"body"
    spool.refuse(dirs, ID, f"{ID}.md", "no")
    assert names(dirs.tasks) == []


def test_killed_while_claiming_nothing_is_lost(dirs: Directories) -> None:
    code = (
        "dirs = directories()\n"
        "print(flush=True)\n"
        "while True:\n"
        "    found = spool.scan(dirs.inbox)[0][:3]\n"
        "    spool.claim(dirs, [(spool.new_id(), n) for n in found])"
    )
    dropped = {f"{n}.md" for n in range(600)}
    for name in dropped:
        (dirs.inbox / name).write_text(name)
    left, kills, cut = sorted(dropped), 0, 0
    while left and (kills < 5 or not cut):
        command = [sys.executable, "-c", HEAD + code, str(dirs.inbox.parent)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as daemon:
            assert daemon.stdout
            daemon.stdout.readline()
            time.sleep(random.uniform(0.005, 0.05))
            daemon.send_signal(signal.SIGKILL)
        kills += 1
        left, taken = spool.scan(dirs.inbox)
        cut = len(taken)
        known = {spool.dropped_name(dirs, id): id for id in taken}
        assert set(left) | known.keys() == dropped
        assert len(left) + len(taken) == len(dropped)
        for name, id in known.items():
            assert spool.contents(dirs, id, 100) == name.encode()


# --- reading ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 99, 100])
def test_contents_up_to_the_limit(dirs: Directories, size: int) -> None:
    (dirs.inbox / (TAKE + ID)).write_bytes(b"x" * size)
    assert spool.contents(dirs, ID, 100) == b"x" * size


def two_names(path: Path) -> None:
    path.touch()
    path.with_name(".other").hardlink_to(path)


def too_large(path: Path) -> None:
    path.write_bytes(b"x" * 101)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def device(path: Path) -> None:
    os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero


def nothing(_path: Path) -> None:
    pass


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    **{kind: (make, kind) for kind, make in KINDS.items()},
    "too large": (too_large, "101 bytes; the limit is 100"),
    "sparse": (sparse, "the limit is 100"),
    "two names": (two_names, "another name"),
    "a device": (device, "a device"),
    "gone": (nothing, "vanished"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_harms_only_itself(dirs: Directories, kind: str) -> None:
    make, reason = BAD[kind]
    if kind == "a device" and os.geteuid():
        pytest.skip("only root can make one")
    (dirs.tasks / ID).mkdir()
    make(dirs.inbox / (TAKE + ID))
    with pytest.raises(Unreadable, match=reason):
        spool.contents(dirs, ID, 100)
    kept = spool.refuse(dirs, ID, "a.md", reason)
    assert (dirs.rejected / f"{kept}.reason").read_text() == f"{reason}\n"
    assert set(names(dirs.inbox)) <= {".other"}
    assert names(dirs.tasks) == []
    assert os.path.lexists(dirs.rejected / kept) is (kind != "gone")


@NEEDS_ROOT
def test_an_unreadable_file_s_reason_says_what_to_do(dirs: Directories) -> None:
    (dirs.inbox / (TAKE + ID)).touch(0o600)
    for place in (dirs.inbox.parent, dirs.inbox):
        place.chmod(0o755)
    code = (
        f"dirs = directories(); {BECOME_NOBODY}\n"
        "try: spool.contents(dirs, sys.argv[2], 100)\n"
        "except spool.Unreadable as error: print(error)"
    )
    told = run(code, dirs.inbox.parent, ID)
    assert "chmod g+r" in told.stdout, told.stderr


def test_what_is_no_fault_of_the_file_is_no_reason_to_reject_it(dirs: Directories) -> None:
    (dirs.inbox / (TAKE + ID)).write_text("fine")
    code = (
        "import resource; dirs = directories()\n"
        "count = len(os.listdir('/proc/self/fd')) - 1\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))\n"
        "try: spool.contents(dirs, sys.argv[2], 100)\n"
        "except OSError as error: print(error.errno)"
    )
    assert run(code, dirs.inbox.parent, ID).stdout == f"{errno.EMFILE}\n"


SWAPS = pick(1, 2000, 10_000)  # at least, and at least for a second


@pytest.mark.timeout(pick(120, 3600, 3600))
def test_a_file_swapped_while_it_is_read_is_one_thing_or_the_other(
    dirs: Directories, figure: Figures
) -> None:
    """A racer exchanges the file for a link to a secret, all the time."""
    secret = dirs.inbox.parent / "secret"
    secret.write_text("secret")
    take, stop, swaps = dirs.inbox / (TAKE + ID), threading.Event(), 0

    def race() -> None:
        nonlocal swaps
        while not stop.is_set():
            durable.write(take, b"fine")
            (dirs.inbox / ".l").symlink_to(secret)
            (dirs.inbox / ".l").rename(take)
            swaps += 1

    take.write_text("fine")
    racer = threading.Thread(target=race)
    racer.start()
    seen, reads = set(), 0
    end = time.monotonic() + 1
    try:
        while time.monotonic() < end or swaps < SWAPS:
            assert racer.is_alive()
            reads += 1
            try:
                seen.add(spool.contents(dirs, ID, 100))
            except Unreadable as reason:
                seen.add(str(reason).encode())
    finally:
        stop.set()
        racer.join()
    figure("swaps: file and link exchanged, times it was read", (swaps, reads))
    assert b"secret" not in seen
    assert b"fine" in seen
    assert any(b"symbolic link" in told for told in seen)


# --- rejecting --------------------------------------------------------------------


def rejected(dirs: Directories, id: str, name: str, body: bytes) -> str:
    spool.deliver(dirs.inbox, name, body)
    spool.claim(dirs, [(id, name)])
    return spool.refuse(dirs, id, name, f"why {id}")


def test_two_of_one_name_are_both_kept(dirs: Directories) -> None:
    first = rejected(dirs, ID, "a.md", b"one")
    second = rejected(dirs, OTHER, "a.md", b"two")
    assert (first, second) == ("a.md", f"a.md.{OTHER}")
    assert [(dirs.rejected / n).read_bytes() for n in (first, second)] == [b"one", b"two"]
    assert (dirs.rejected / f"{first}.reason").read_text() == f"why {ID}\n"
    assert (dirs.rejected / f"{second}.reason").read_text() == f"why {OTHER}\n"


def test_a_file_named_like_a_reason_does_not_take_its_place(dirs: Directories) -> None:
    rejected(dirs, ID, "a.md.reason", b"one")
    second = rejected(dirs, OTHER, "a.md", b"two")
    assert (dirs.rejected / "a.md.reason").read_bytes() == b"one"
    assert (dirs.rejected / second).read_bytes() == b"two"


def test_rejecting_can_be_repeated_after_a_crash(dirs: Directories) -> None:
    spool.deliver(dirs.inbox, "a.md", b"body")
    spool.claim(dirs, [(ID, "a.md")])
    durable.write(dirs.rejected / "a.md.reason", b"why\n")  # and then it died
    kept = spool.refuse(dirs, ID, "a.md", "why")
    assert (dirs.rejected / kept).read_bytes() == b"body"
    spool.drop(dirs, ID)
    spool.drop(dirs, ID)
    assert names(dirs.inbox) == names(dirs.tasks) == []


@NEEDS_ROOT
def test_somebody_else_s_directory_harms_only_itself(tmp_path: Path) -> None:
    """It may get another name, but only its owner may move it elsewhere."""
    tmp_path.chmod(0o777)
    code = """
dirs = directories()
os.umask(0)
dirs.inbox.mkdir(0o777)
(dirs.inbox / 'd.md').mkdir(0o755)
os.chown(dirs.inbox, 65534, 65534)
BECOME
spool.prepare(dirs)
assert spool.claim(dirs, [(sys.argv[2], 'd.md')]) == [sys.argv[2]]
print(spool.refuse(dirs, sys.argv[2], 'd.md', 'it is a directory'))
print(spool.scan(dirs.inbox), os.listdir(dirs.tasks))
print((dirs.rejected / 'd.md.reason').read_text(), end='')
""".replace("BECOME", BECOME_NOBODY)
    done = run(code, tmp_path, ID)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["d.md", "([], []) []", "it is a directory"], done.stderr
    assert lines[3].startswith("It lies in ")
    assert (tmp_path / lines[3].removeprefix("It lies in ")).is_dir()


def test_discard_leaves_what_is_not_codexd_s(dirs: Directories) -> None:
    place = dirs.tasks / ID
    place.mkdir()
    (place / "name").touch()
    (place / "notes.txt").write_text("mine")
    (place / "1").mkdir()
    (dirs.tasks / "README").write_text("mine")
    for id in (ID, "README", "missing"):
        spool.discard(dirs, id)
    assert names(place) == ["1", "notes.txt"]
    assert names(dirs.tasks) == [ID, "README"]


def test_free_bytes_are_those_we_may_use(dirs: Directories) -> None:
    found = os.statvfs(dirs.inbox)
    assert 0 < spool.free_bytes(dirs.inbox) <= found.f_blocks * found.f_frsize
