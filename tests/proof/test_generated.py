"""Generated input at every door: each is taken or refused with a reason, soon, in little room.

Task files of each form, codexd.yaml, what Codex prints, and each file of the state. What
the tests of the rooms do with a hundred examples each is done here with as many as the
level asks for, half of them changed from files that are good.

What a door refuses is malformed, and counted.  What Codex prints, and the records of
READ_ANYWAY, nobody refuses, by design: there an input is damaged because it was changed
until it is none of the good ones, and its reader makes of it what it can.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from codexd import codex, config, exits, place, session, spend, taskfile, transcript
from codexd.config import ConfigError, Directories
from codexd.events import Reader
from codexd.evidence import Evidence
from codexd.ledger import Follower, LedgerBroken
from codexd.model import Request, State, Task
from codexd.view import View
from tests.daemon import Daemon
from tests.proof.level import Figures, chances, pick
from tests.proof.states import CONFIG, QUEUED, RUNNING, SESSIONS, ident, lived, task
from tests.recordings import RECORDINGS
from tests.test_bad_input import FILES

pytestmark = [pytest.mark.xdist_group("generated"), pytest.mark.timeout(pick(120, 3600, 6 * 3600))]

EACH = pick(1200, 10_000, 180_000)  # inputs of task files, codexd.yaml, events, states, ledgers
REFUSED = pick(2500, 25_000, 500_000)  # malformed ones in all, at least, that a door refused
STARTS = pick(5, 40, 400)  # whole daemons on a state that was changed at random
LONGEST = 3000  # characters of a reason; a ledger has many
SLOW = 1.0  # seconds of processor time
ROOM = 256 << 20  # bytes that a door may need

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


def generated(
    good: list[bytes], chance: random.Random, count: int, opening: bytes
) -> Iterator[bytes]:
    for number in range(count):
        if number % 2:
            yield opening + b"".join(chance.choices(_WORDS, k=chance.randint(0, 30)))
        else:
            yield changed(chance.choice(good), chance)


# What a reason must name: a place, a size, a key with what is wrong, or the whole file.
_KEYS = "|".join(map(re.escape, {*taskfile.KEYS, *config.keys()}))
_NAMES = re.compile(
    r"\b(?:line|byte|char|column) \d|end of document|^:\d+: |\d+ bytes|^the file is|"
    rf"^no prompt|^not valid JSON: nested too deep$|^(?:{_KEYS}): |\.(?:json|toml|yaml): |"
    r"^session good: "
)


@dataclass
class Count:
    """Of a door: its inputs, those that it refused, and those that are none of its good ones."""

    inputs: int = 0
    refused: int = 0
    damaged: int = 0


class Door:
    """One way in: fed, timed, and asked what it made of each."""

    def __init__(
        self,
        name: str,
        good: list[bytes],
        take: Callable[[bytes], str | None],
        *,
        opening: bytes = b"",
        least: float = 0.5,
    ) -> None:
        """`take` gives the reason of a refusal, None if it was taken.  `opening` is what it
        needs to look at what follows; `least` is the part that it has to refuse."""
        self.name, self.good, self.take = name, good, take
        self.opening, self.least = opening, least

    def run(self, figure: Figures, count: int) -> Count:
        chance, found = chances(self.name), Count(count)
        worst = 0.0
        before = reset_peak()
        for data in generated(self.good, chance, count, self.opening):
            began = time.thread_time()
            try:
                reason = self.take(data)
            except BaseException:
                print(f"{self.name}: {data!r}")
                raise
            # What others do meanwhile on the machine is no time of ours.
            worst = max(worst, time.thread_time() - began)
            found.refused += reason is not None
            found.damaged += data not in self.good
            if reason is not None:
                assert _NAMES.search(reason), (data, reason)
                assert len(reason) < LONGEST, "a reason is for people"
        grown = peak() - before
        figure(f"generated: {self.name}: inputs, refused", (count, found.refused))
        figure(f"generated: {self.name}: worst CPU ms, grown MiB",
               (round(1000 * worst, 1), grown >> 20))  # fmt: skip
        assert worst < SLOW, "one took too long"
        assert grown < ROOM
        assert found.refused >= self.least * count, "too many are good"
        return found


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def reset_peak() -> int:
    """Forget the most memory that this process ever had; what it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


# --- the doors --------------------------------------------------------------------------

GOOD_TASKS = {
    "md": [
        b"---\nsession: web\nworkdir: ~/src\ntimeout: 30m\npriority: 7\n---\nFix the links.\n",
        b"---\nafter: [a, b]\nnot_before: 2026-11-24T02:00\nverify: {command: make}\n---\nx",
    ],
    "yaml": [
        b"prompt: |\n  Do this,\n  and that.\nimages: [a.png]\nlimits: {memory: 2G, cpu: 50%}\n",
    ],
    "json": [b'{"prompt": "x", "key": "k", "resume": "never", "attempts": 3, "memory": false}'],
    "txt": [b"Fix the links.\n"],
}
_ALIKE = 10  # the bad ones, of which there are more, are not to be all that is changed
GOOD_TASKS = {form: good * _ALIKE for form, good in GOOD_TASKS.items()}
for _name, (_text, _) in FILES.items():
    if (_form := _name.rpartition(".")[2]) in GOOD_TASKS:
        GOOD_TASKS[_form].append(_text.encode() if isinstance(_text, str) else _text)


def task_file(form: str) -> Callable[[bytes], str | None]:
    def take(data: bytes) -> str | None:
        try:
            found = taskfile.parse(f"t.{form}", data)
        except taskfile.Refused as why:
            return str(why)
        assert found.prompt.strip()
        assert taskfile.parse("t.json", taskfile.dump(found)) == found
        return None

    return take


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


# Those that their readers take, whatever is in them.
READ_ANYWAY = ("result.json", "events.jsonl", "exit record", "transcript", "heartbeat")


def state_files(dirs: Directories) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Each kind of file that is read back: where it lies, and who reads it.

    A ValueError is a file that its reader sets aside, or says to be damaged; where nobody
    could, it is a fault.
    """
    ran = Task(ident("result"), State.RUNNING, launches=1, attempts=1)
    killed = replace(ran, id=ident("events"))
    config_ = config.load(dirs, explicit=True)
    evidence = Evidence(config_)
    home, said = dirs.tasks / ident(QUEUED), dirs.transcripts / "good.jsonl"
    day = next(iter(spend.days(dirs.usage, 1)))

    def transcripts() -> None:
        transcript.began(said), list(transcript.threads(said)), transcript.last(said, 20)
        transcript.append(said, None, [{"ts": None, "task": ran.id, "attempt": 1, "text": "x"}])

    def exit_record() -> None:
        found = exits.read(dirs.exits / ran.id)
        assert found
        exits.outcome(found, exits.boot())

    return {
        "task.json": (home / "task.json", lambda: Request.from_json(asked(dirs))),
        "result.json": (
            place.attempt(dirs, ran.id, 1) / "result.json", never(lambda: evidence.result(ran)),
        ),
        "events.jsonl": (
            place.attempt(dirs, killed.id, 1) / "events.jsonl",
            never(lambda: (evidence.result(killed), evidence.answered(killed))),
        ),
        "exit record": (dirs.exits / ran.id, never(exit_record)),
        "session": (
            dirs.sessions / "good.json", lambda: session.load(dirs.sessions, "good"),
        ),
        "transcript": (said, never(transcripts)),
        "day of use": (spend.path_of(dirs.usage, day), lambda: spend.load(dirs.usage, day)),
        "heartbeat": (dirs.heartbeat, never(lambda: View(dirs).health())),
        "config.toml": (
            dirs.codex_home / "config.toml",
            lambda: codex.env_keys(codex.configuration(dirs.codex_home)),
        ),
    }  # fmt: skip


def asked(dirs: Directories) -> dict[str, object]:
    found = place.load(dirs, ident(QUEUED)).get("request")
    if not isinstance(found, dict):
        raise ValueError("task.json: no request")
    return found


def never(read: Callable[[], object]) -> Callable[[], object]:
    """A reader that takes whatever there is."""

    def reader() -> None:
        try:
            read()
        except ValueError as error:
            raise AssertionError("it must take anything") from error

    return reader


def state_file(path: Path, read: Callable[[], object]) -> Callable[[bytes], str | None]:
    def take(data: bytes) -> str | None:
        path.write_bytes(data)
        try:
            read()
        except ValueError as why:
            return str(why)
        return None

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


def task_files() -> Iterator[tuple[Door, int]]:
    """A door for each form: what one takes, the others need not."""
    for form, good in GOOD_TASKS.items():
        # In Markdown without front matter, as in plain text, nothing but bytes can be wrong.
        opening, least = b"---\n" if form == "md" else b"", 0.0 if form == "txt" else 0.5
        door = Door(f"task file, {form}", good, task_file(form), opening=opening, least=least)
        yield door, EACH // 16 if form == "txt" else 5 * EACH // 16


def configurations(where: Path) -> Iterator[tuple[Door, int]]:
    shipped = Path(__file__).resolve().parents[2] / "config" / "codexd.yaml"
    bare = b"\n".join(line.removeprefix(b"# ") for line in shipped.read_bytes().splitlines())
    good = [shipped.read_bytes(), bare, b"workers: 2\non: {done: [a, b]}\nretry: {base: 1s}\n"]
    yield Door("codexd.yaml", good, configuration(where)), EACH


def states(dirs: Directories) -> Iterator[tuple[Door, int]]:
    dirs.exits.mkdir(exist_ok=True)
    (dirs.exits / ident("result")).write_text(EXIT)
    (dirs.codex_home / "config.toml").write_text('[model_providers.a]\nenv_key = "A_KEY"\n')
    found = state_files(dirs)
    for name, (path, read) in found.items():
        least = 0.0 if name in READ_ANYWAY else 0.5
        good = path.read_bytes()[:20_000]
        yield Door(name, [good], state_file(path, read), least=least), EACH // len(found)


def test_every_door(tmp_path: Path, figure: Figures) -> None:
    dirs = lived(tmp_path / "root").dirs
    lines = dirs.ledger.read_bytes()
    printed = [recording.stdout[:20_000] for recording in RECORDINGS.values()]
    doors = [
        *task_files(),
        *configurations(tmp_path),
        (Door("event stream", printed, stream, least=0.0), EACH),
        *states(dirs),
        (Door("ledger", [lines, lines[:900]], ledgers(tmp_path)), EACH),
    ]
    counts = [(door, door.run(figure, count)) for door, count in doors]
    refused = sum(count.refused for _, count in counts)
    anyway = sum(c.damaged for d, c in counts if d.name in (*READ_ANYWAY, "event stream"))
    figure("generated: malformed: refused with a reason, in all", refused)
    figure("generated: damaged: read for all that, in all", anyway)
    assert refused >= REFUSED


EXIT = """\
result=exit-code
code=exited
status=1
[cpu.stat]
usage_usec 1500000
[memory.peak]
1048576
[io.stat]
8:0 rbytes=4096 wbytes=8192
"""


# --- whole daemons ------------------------------------------------------------------------


def test_a_daemon_starts_on_any_state(tmp_path: Path, figure: Figures) -> None:
    """Each file of the state changed at random, one or several at once; then every session
    is used again."""
    root, chance = tmp_path / "root", chances("starts")
    kept = lived(root).root.rename(tmp_path / "kept")
    worst, names = 0.0, set()
    for _ in range(STARTS):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(kept, root, symlinks=True)
        files = sorted(p for p in root.rglob("*") if p.is_file() and p.name not in _OURS)
        for path in chance.sample(files, chance.choice((1, 1, 3, len(files)))):
            names.add(str(path.relative_to(root)))
            path.write_bytes(changed(path.read_bytes(), chance))
        began = time.monotonic()
        with Daemon(root, config=CONFIG) as daemon:
            worst = max(worst, time.monotonic() - began)
            daemon.drop("after.md", "x")
            for name in (*SESSIONS, QUEUED, *RUNNING):
                daemon.drop(f"{name}.md", task(name))
            assert daemon.answer("after", 60)[0]["state"] == "done"
            for name in (*SESSIONS, QUEUED, *RUNNING):
                assert daemon.answer(name, 60)[0]["state"] in ("done", "failed"), name
            assert daemon.stop() == 0
        assert "\nTraceback" not in daemon.log.read_text()
    figure("generated: starts on a damaged state", STARTS)
    figure("generated: files damaged", len(names))
    figure("generated: slowest start, s", round(worst, 2))


_OURS = ("codexd.yaml", "fake.json", "serve.log")
