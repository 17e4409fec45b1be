"""Generated input at every door: each is taken or refused with a reason, soon, in little room.

Task files of each form, codexd.yaml, what Codex prints, and each file of the state. What
the tests of the rooms do with a hundred examples each is done here with as many as the
level asks for, half of them changed from files that are good.
"""

from __future__ import annotations

import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from codexd import codex, config, durable, exits, session, spend, taskfile, transcript
from codexd.config import ConfigError, Directories
from codexd.events import Reader
from codexd.ledger import Follower, LedgerBroken
from codexd.view import View
from tests.daemon import Daemon
from tests.proof.level import Figures, chances, pick
from tests.recordings import RECORDINGS
from tests.test_bad_input import FAKE, FILES

pytestmark = [pytest.mark.xdist_group("generated"), pytest.mark.timeout(pick(120, 3600, 6 * 3600))]

EACH = pick(1000, 10_000, 100_000)  # of each of the five doors
STARTS = pick(5, 40, 400)  # whole daemons on a state that was changed at random
SLOW = 1.0  # seconds
ROOM = 256 << 20  # bytes that the process may have grown by

_WORDS = [
    b"---\n", b"\n---\n", b": ", b"- ", b"[", b"]", b"{", b"}", b"&a", b"*a", b"!!python/x",
    b'"', b"'", b"|", b">", b"#", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc2\x85", b"\xe2\x80\xa8",
    b"\x1b[2J", b"null", b"NaN", b"1e999", b"-1", b"9" * 400, b"<<: ", b"%TAG", b"\\ud800",
    b"prompt", b"session", b"timeout", b"verify", b"after", b"not_before", b"on", b"limits",
    b"\r\n", b"\t", b" " * 300, b"[" * 2000, b'{"a":' * 300, b"turn.completed", b"thread_id",
]  # fmt: skip


def changed(data: bytes, chance: random.Random) -> bytes:
    """Something near to `data`, or far from it."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randint(0, len(found))
        how = chance.randrange(6)
        if how == 0 and found:
            found[min(at, len(found) - 1)] ^= 1 << chance.randrange(8)
        elif how == 1:
            del found[at : at + chance.choice((1, 3, 50))]
        elif how == 2:
            del found[at:]
        elif how == 3:
            found[at:at] = bytes(found[chance.randint(0, at) : at][:200])
        elif how == 4:
            found[at:at] = chance.randbytes(chance.choice((1, 8, 100)))
        else:
            found[at:at] = chance.choice(_WORDS)
    return bytes(found)


def generated(good: list[bytes], chance: random.Random, count: int) -> Iterator[bytes]:
    for number in range(count):
        if number % 2:
            yield b"".join(chance.choices(_WORDS, k=chance.randint(0, 30)))
        else:
            yield changed(chance.choice(good), chance)


class Door:
    """One way in: fed, timed, and asked what it made of each."""

    def __init__(self, name: str, good: list[bytes], take: Callable[[bytes], str | None]) -> None:
        """`take` gives the reason of a refusal, None if it was taken."""
        self.name, self.good, self.take = name, good, take

    def run(self, figure: Figures) -> None:
        chance = chances(self.name)
        worst, refused = 0.0, 0
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for data in generated(self.good, chance, EACH):
            began = time.perf_counter()
            try:
                reason = self.take(data)
            except BaseException:
                print(f"{self.name}: {data!r}")
                raise
            worst = max(worst, time.perf_counter() - began)
            refused += reason is not None
            assert reason is None or reason.strip(), data
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        figure(f"generated: {self.name}: inputs, refused", (EACH, refused))
        figure(f"generated: {self.name}: worst ms, grown MiB",
               (round(1000 * worst, 1), grown >> 20))  # fmt: skip
        assert worst < SLOW * pick(5, 1, 1), "one took too long"
        assert grown < ROOM


# --- the doors --------------------------------------------------------------------------

GOOD_TASKS = [
    b"---\nsession: web\nworkdir: ~/src\ntimeout: 30m\npriority: 7\n---\nFix the links.\n",
    b"---\nafter: [a, b]\nnot_before: 2026-11-24T02:00\nverify: {command: make, rounds: 2}\n---\nx",
    b"prompt: |\n  Do this,\n  and that.\nimages: [a.png]\nlimits: {memory: 2G, cpu: 50%}\n",
    b'{"prompt": "x", "key": "k", "resume": "never", "attempts": 3, "memory": false}',
    *(text.encode() if isinstance(text, str) else text for text, _ in FILES.values()),
]


def task_file(data: bytes) -> str | None:
    for name in ("t.md", "t.yaml", "t.json", "t.txt"):
        try:
            found = taskfile.parse(name, data)
        except taskfile.Refused as why:
            reason = str(why)
            assert len(reason) < 2000, "a reason is for people"
        else:
            assert found.prompt.strip()
            assert taskfile.parse("t.json", taskfile.dump(replace(found))) == found
            return None
    return reason


def configuration(where: Path) -> Callable[[bytes], str | None]:
    dirs = Directories.below(where)

    def take(data: bytes) -> str | None:
        dirs.config_file.write_bytes(data)
        try:
            config.load(dirs, explicit=True)
        except ConfigError as why:
            place, _, reason = str(why).partition(str(dirs.config_file))
            return reason if not place else ""
        return None

    return take


def stream(data: bytes) -> str | None:
    reader = Reader()
    reader.feed(data)
    reader.finish()
    return None


def state_file(where: Path) -> Callable[[bytes], str | None]:
    """Each file that a room reads, by that room."""
    dirs = Directories.below(where)
    for place in (dirs.sessions, dirs.transcripts, dirs.usage, dirs.run):
        place.mkdir(parents=True, exist_ok=True)
    path = where / "it"
    readers: list[Callable[[], object]] = [
        lambda: durable.read_json(path),
        lambda: session.load(dirs.sessions, "web"),
        lambda: list(transcript.threads(path)),
        lambda: transcript.began(path),
        lambda: exits.read(path),
        lambda: View(dirs).health(),
        lambda: list(View(dirs).used(9)),
        lambda: codex.env_keys(path.read_text("utf-8", "replace")),
    ]

    def take(data: bytes) -> str | None:
        path.write_bytes(data)
        (dirs.sessions / "web.json").write_bytes(data)
        dirs.heartbeat.write_bytes(data)
        spend.path_of(dirs.usage, "2026-11-23").write_bytes(data)
        reason = None
        for read in readers:
            try:
                read()
            except ValueError as why:
                reason = str(why)
        return reason

    return take


def ledgers(where: Path) -> Callable[[bytes], str | None]:
    path, mark = where / "tasks.md", where / "checkpoint"

    def take(data: bytes) -> str | None:
        path.write_bytes(data)
        mark.write_bytes(data)
        reader = Follower(path, mark)
        try:
            reader.refresh()
        except LedgerBroken as why:
            return str(why)
        finally:
            reader.close()
        return "; ".join(reader.book.damaged) or None

    return take


def test_task_files(figure: Figures) -> None:
    Door("task file", GOOD_TASKS, task_file).run(figure)


def test_configuration(tmp_path: Path, figure: Figures) -> None:
    shipped = Path(__file__).resolve().parents[2] / "config" / "codexd.yaml"
    bare = b"\n".join(line.removeprefix(b"# ") for line in shipped.read_bytes().splitlines())
    good = [shipped.read_bytes(), bare, b"workers: 2\non: {done: [a, b]}\nretry: {base: 1s}\n"]
    Door("codexd.yaml", good, configuration(tmp_path)).run(figure)


def test_what_codex_prints(figure: Figures) -> None:
    Door("event stream", [r.stdout[:20_000] for r in RECORDINGS.values()], stream).run(figure)


def test_ledger_and_state_files(tmp_path: Path, figure: Figures) -> None:
    root = lived(tmp_path)
    whole = [p.read_bytes()[:20_000] for p in root.rglob("*.json") if p.is_file()]
    lines = (root / "tasks.md").read_bytes()
    (tmp_path / "a").mkdir()
    Door("state files", whole, state_file(tmp_path / "a")).run(figure)
    Door("ledger", [lines, lines[:900]], ledgers(tmp_path)).run(figure)


# --- whole daemons ------------------------------------------------------------------------


def lived(where: Path) -> Path:
    """The root of a daemon that has done some work, and holds some more."""
    daemon = Daemon(where / "root", config=f"codex:\n  bin: {FAKE}\nhttp:\n  listen: off\n")
    with daemon:
        for number in range(3):
            daemon.drop(f"t{number}.md", f"---\nsession: web\nkey: k{number}\n---\nx")
        daemon.drop("later.md", "---\nnot_before: 1d\n---\nx")
        for number in range(3):
            daemon.answer(f"t{number}")
        assert daemon.stop() == 0
    return daemon.root


def test_a_daemon_starts_on_any_state(tmp_path: Path, figure: Figures) -> None:
    """Each file of the state changed at random, one or several at once."""
    root, chance = lived(tmp_path), chances("starts")
    kept = tmp_path / "kept"
    shutil.copytree(root, kept, symlinks=True)
    worst, names = 0.0, set()
    for _ in range(STARTS):
        shutil.rmtree(root)
        shutil.copytree(kept, root, symlinks=True)
        files = [p for p in root.rglob("*") if p.is_file() and p.name not in _OURS]
        for path in chance.sample(files, chance.choice((1, 1, 3, len(files)))):
            names.add(str(path.relative_to(root)))
            path.write_bytes(changed(path.read_bytes(), chance))
        told = f"codex:\n  bin: {FAKE}\nhttp:\n  listen: off\n"
        began = time.monotonic()
        with Daemon(root, config=told) as daemon:
            worst = max(worst, time.monotonic() - began)
            daemon.drop("after.md", "x")
            assert daemon.answer("after", 60)[0]["state"] == "done"
            assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()
    figure("generated: starts on a damaged state", STARTS)
    figure("generated: files damaged", len(names))
    figure("generated: slowest start, s", round(worst, 2))


_OURS = ("codexd.yaml", "fake.json", "serve.log")
