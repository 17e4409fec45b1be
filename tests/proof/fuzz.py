"""Coverage-guided input at every door: atheris looks for bytes that take a path not yet seen.

    python -m tests.proof.fuzz [--door NAME] [--runs N] [--seed N]

Whatever the bytes: they are taken, or refused as the door refuses, with a reason, soon and
in bounded memory.  Each door runs in a process of its own, which libFuzzer ends; what it finds
is kept beside the seeds that it began with, and named.
"""

from __future__ import annotations

import argparse
import mmap
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["codexd"]):  # what is imported before it stays unseen
    from codexd import config, ledger, taskfile
    from codexd.config import ConfigError, Directories
    from codexd.events import Reader
    from codexd.framing import BODY_LIMIT, Exchange, Problem
    from codexd.ledger import Follower, LedgerBroken
    from codexd.routes import admit
    from tests.proof.place import TOP, report, scratch, seed_of

Take = Callable[[bytes], object]
LONGEST = 8192  # bytes of an input
SLOW = 1.0  # seconds of processor time that an input may take
ROOM = 256 << 20  # bytes that it may need
# What ends the process, should one never come to its end: seconds by the clock, and MiB of all.
HANGS, FULL = 60, 600


def is_for_people(reason: str) -> None:
    assert 0 < len(reason) < 2000, reason


def taskfile_(_: Path) -> Take:
    def take(data: bytes) -> None:
        for name in ("t.md", "t.yaml", "t.json", "t.txt"):
            try:
                found = taskfile.parse(name, data)
            except taskfile.Refused as why:
                is_for_people(str(why))
            else:
                assert found.prompt.strip()
                assert taskfile.parse("t.json", taskfile.dump(found)) == found

    return take


def configuration(where: Path) -> Take:
    dirs = Directories.below(where)

    def take(data: bytes) -> None:
        dirs.config_file.write_bytes(data)
        try:
            config.load(dirs, explicit=True)
        except ConfigError as why:
            is_for_people(str(why).partition(str(dirs.config_file))[2])

    return take


def line(where: Path) -> Take:
    """A line with a seal that fits, whatever it says, between two good ones."""
    path = where / "tasks.md"

    def take(data: bytes) -> None:
        text = data.replace(b"\n", b" ").decode("utf-8", "replace")
        try:
            sealed = ledger.seal(text)
        except ValueError:
            return
        try:
            again = ledger.render(ledger.parse(sealed))
            assert ledger.parse(again) == ledger.parse(sealed)
        except ValueError:
            pass
        path.write_bytes(b"".join(map(ledger.seal, LEDGER[:2])) + sealed + ledger.seal(LEDGER[2]))
        reader = Follower(path)
        try:
            reader.refresh()
        except LedgerBroken:
            return
        finally:
            reader.close()
        assert len(reader.book.tasks) >= 1, "it harms only itself"

    return take


def events(_: Path) -> Take:
    def take(data: bytes) -> None:
        whole, parts = Reader(), Reader()
        whole.feed(data)
        for at in range(0, len(data), 100):
            parts.feed(data[at : at + 100])
        for one in (whole, parts):
            one.finish()
        assert whole.thread == parts.thread

    return take


def http(_: Path) -> Take:
    """A head, and after it a body as POST /tasks takes it."""

    def take(data: bytes) -> None:
        exchange, rest = Exchange(), data
        try:
            while not rest.startswith(b"\0") and rest:
                head, newline, rest = rest.partition(b"\n")
                if not newline or exchange.take(head + newline):
                    break
            if not exchange.command:
                return
            admit(exchange, b"token" if len(data) % 2 else None)
            assert 0 <= exchange.length <= BODY_LIMIT
            exchange.interim()
            taskfile.parse("body.json", rest[: exchange.length], max_bytes=BODY_LIMIT)
        except Problem as problem:
            said = exchange.render(problem.reply, keep=False)
            is_for_people(said.decode().removeprefix("HTTP/1.1 "))
        except taskfile.Refused as why:
            is_for_people(str(why))

    return take


# --- what they begin with -------------------------------------------------------------

AT, ID = "2026-11-23T07:20:11.123Z", "20261123t072011-k3f9qa7x2m"
LEDGER = [
    "# codexd ledger, format 1",
    f'- {AT} `{ID}` **queued** `file="1.md" session="web" priority=7`',
    f'- {AT} `20261123t072011-k3f9qa7x2n` **queued** `file="2.md"`',
]
HEAD = "HTTP/1.1\r\nHost: localhost\r\n"
BODY = '{"prompt": "x", "session": "web", "verify": {"command": "make", "rounds": 2}}'
JSON = f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n"
THREAD = '{"type":"thread.started","thread_id":"01a20000-0000-7000-8000-000000000000"}\n'
DOORS: dict[str, tuple[Callable[[Path], Take], list[str]]] = {
    "taskfile": (taskfile_, [
        "---\nsession: web\nworkdir: ~/src\ntimeout: 30m\npriority: 7\n---\nFix the links.\n",
        "---\nafter: [a, b]\nnot_before: 2h\nverify: {command: make, rounds: 2}\n---\nx",
        "prompt: |\n  Do this,\n  and that.\nimages: [a.png]\nlimits: {memory: 2G, cpu: 50%}\n",
        BODY,
    ]),
    "configuration": (configuration, [
        (TOP / "config" / "codexd.yaml").read_text(),
        "workers: 2\non: {done: [a, b]}\nretry: {base: 1s, cap: 10m}\nlimits: {file: 1M}\n",
        "codex:\n  bin: codex\n  sandbox: read-only\nhttp: {listen: 127.0.0.1:0, token_file: t}\n",
    ]),
    "line": (line, [
        *LEDGER,
        f"- {AT} `{ID}` **waiting** `reason=\"rate\" until=\"{AT}\"`",
        f"- {AT} `{ID}` **done** `outcome=\"done\" usage={{\"input_tokens\":1}}`",
        f'* {AT} **closed** `reason="quota" message="m"`',
        f'* {AT} **rotated** `from="tasks-20261123T072011Z.md" carried=3 ended=["{ID}"]`',
    ]),
    "events": (events, [
        THREAD + '{"type":"turn.started"}\n{"type":"turn.completed","usage":{"input_tokens":1}}\n',
        '{"type":"item.completed","item":{"id":"i","type":"agent_message","text":"x"}}\n',
        '{"type":"item.started","item":{"id":"i","type":"command_execution","command":"a"}}\n',
        '{"type":"turn.failed","error":{"message":"stream error: x; retrying 1"}}\n',
    ]),
    "http": (http, [
        f"GET /tasks?state=done&limit=5 {HEAD}\r\n",
        f"GET /tasks/{ID}?wait=5 {HEAD}Authorization: Bearer token\r\n\r\n",
        f"POST /tasks {HEAD}{JSON}Idempotency-Key: k\r\n\r\n{BODY}",
        f"POST /tasks/{ID}/cancel {HEAD}Expect: 100-continue\r\n\r\n",
    ]),
}  # fmt: skip


# --- the runs ---------------------------------------------------------------------------


def bounded(take: Take, count: Path) -> Take:
    """The same, but whatever takes too long or too much memory is found, too.

    `count` has how many it were: libFuzzer ends the process, and nothing else can tell.
    """
    count.write_bytes(bytes(8))
    with open(count, "r+b") as file:
        told = mmap.mmap(file.fileno(), 8)

    def taken(data: bytes) -> None:
        told[:] = (int.from_bytes(told[:], "little") + 1).to_bytes(8, "little")
        most, had, began = peak(), resident(), time.thread_time()
        take(data)
        assert time.thread_time() - began < SLOW, "it took too long"
        # Where this one did not need the most so far, one that was asked already did.
        assert peak() == most or peak() - had < ROOM, "it needs too much memory"

    return taken


def peak() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def resident() -> int:
    """What it has now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def enter(door: str, where: Path, runs: int, seed: int) -> None:
    """Be the process of one door; libFuzzer ends it."""
    make, good = DOORS[door]
    corpus, found = where / "corpus", where / "found"
    for path in (corpus, found, where / "root"):
        path.mkdir()
    for number, text in enumerate(good):
        (corpus / str(number)).write_text(text)
    take = bounded(make(where / "root"), where / "count")
    options = [f"-runs={runs}", f"-seed={seed}", f"-max_len={LONGEST}", f"-timeout={HANGS}",
               f"-rss_limit_mb={FULL}", f"-artifact_prefix={found}/", "-verbosity=0"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], take)
    atheris.Fuzz()


def one(door: str, runs: int, seed: str) -> tuple[list[str], int]:
    """Run a door in a process of its own; what is wrong with it, and how much it was given."""
    where = scratch(f"fuzz-{door}")
    number = random.Random(f"{seed} {door}").randrange(1, 1 << 31)
    command = [sys.executable, "-m", "tests.proof.fuzz", "--door", door, "--runs", str(runs),
               "--inside", str(where), "--seed", str(number)]  # fmt: skip
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, errors="replace")
    count = int.from_bytes((where / "count").read_bytes(), "little")
    kept = sorted((where / "found").glob("*")) if done.returncode else []
    problems = [f"{door}: {path}: {path.read_bytes()[:300]!r}" for path in kept]
    if done.returncode:
        print(done.stdout[-2000:] + done.stderr[-4000:], flush=True)
        return problems or [f"{door}: status {done.returncode}"], count
    shutil.rmtree(where)
    return [], count


def main() -> int:
    parser = argparse.ArgumentParser(description="coverage-guided input at each door")
    parser.add_argument("--door", action="append", choices=list(DOORS))
    parser.add_argument("--runs", type=int, default=100_000, help="of each door")
    parser.add_argument("--seed")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        enter(args.door[0], args.inside, args.runs, int(args.seed))
    seed, began = seed_of(args), time.monotonic()
    doors = args.door or list(DOORS)
    found = [one(door, args.runs, seed) for door in doors]
    problems = [problem for problems, _ in found for problem in problems]
    inputs = sum(count for _, count in found)
    return report("fuzz", problems, began, {"doors": len(doors), "inputs": inputs})


if __name__ == "__main__":
    sys.exit(main())
