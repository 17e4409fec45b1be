"""Notes on disk: which files hold which terms, and their bytes.  Reads only.

`scan` asks rg, else grep, else looks itself; all three search the same bytes
of the same files for the same runs, so they count the same.  The text is never
on a command line, no configuration of rg's is read, nothing is inherited but
a directory.  `read` gives a note as UTF-8 and opens nothing but a regular file
that is where it seems to be: a link planted below a root leads nowhere.

Roots come from `roots`: real paths, none outside what was asked for.  What
cannot be searched or read is appended to `problems`, in words for a person.
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import stat
import sys
from itertools import groupby, islice
from operator import itemgetter
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from codexd.relevance import Query

LARGEST = 2 << 20  # bytes; a larger file is not a note
OUTPUT = 64 << 20  # bytes a scanner may print
COMPLAINTS = 100  # pieces of a scanner's stderr that are kept, each up to 64 KiB
BATCH = 256  # names in one command, each up to 4 KiB
RUNS = 10_000  # counted between two looks at the clock
_SEARCHED = re.compile(rb"\n(\d+) files searched\n(?:.*\n)*?(\d+) bytes searched\n")
BOMS = (b"\xff\xfe", b"\xfe\xff")  # how a file in UTF-16 begins


class ScanError(Exception):
    """A scanner cannot be run, or says something else than expected."""


class Scan:
    """Term counts of each matching file by its real path; files and bytes searched."""

    __slots__ = ("files", "size", "tallies")

    def __init__(self) -> None:
        self.tallies: dict[str, Mapping[str, int]] = {}
        self.files = self.size = 0

    def add(self, query: Query, path: str, runs: Iterable[bytes], until: float) -> None:
        """Count a file's terms from its runs.  Raises TimeoutError."""
        tally: dict[str, int] = {}
        rest = iter(runs)
        while some := list(islice(rest, RUNS)):
            if monotonic() > until:
                raise TimeoutError
            for term, n in query.runs.count(some).items():
                tally[term] = tally.get(term, 0) + n
        if tally:
            self.tallies[path] = tally


def roots(paths: Sequence[str], base: str, problems: list[str]) -> list[str]:
    """The real paths of what there is to search, none below another.

    A relative path must lead to somewhere below `base`, a real path: what
    stands there is not the administrator's, and may be a link.
    """
    found = set()
    for path in paths:
        real = os.path.realpath(absolute(path, base))
        try:
            status = os.stat(real)
        except FileNotFoundError:
            continue
        except OSError as err:
            problems.append(f"{path}: {err.strerror}")
            continue
        if not path.startswith(("/", "~")) and not below(real, base):
            problems.append(f"{path} leads out of {base}: give its absolute path")
        elif stat.S_ISREG(status.st_mode) and status.st_size > LARGEST:
            problems.append(f"{path} is larger than {LARGEST >> 20} MiB: split it")
        elif stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            found.add(real)
    return sorted(r for r in found if not any(below(r, o) for o in found if o != r))


def absolute(path: str, base: str) -> str:
    return os.path.join(base, os.path.expanduser(path))


def below(path: str, base: str) -> bool:
    return path == base or path.startswith(base.rstrip("/") + "/")


def scan(
    query: Query, where: list[str], until: float, tool: str, rg: str | None, problems: list[str]
) -> tuple[str, Scan]:
    """The first tool that works and its counts; "none" if there is none.

    Raises TimeoutError at `until`, by the monotonic clock.
    """
    tools: dict[str, Callable[[], Scan]] = {
        "rg": lambda: _rg(query, where, until, rg, problems),
        "grep": lambda: _grep(query, where, until, problems),
        "python": lambda: _python(query, where, until, problems),
    }
    for name in tools if tool == "auto" else (tool,):
        try:
            return name, tools[name]()
        except ScanError as err:
            if tool != "auto":
                problems.append(str(err))
    return "none", Scan()


def _rg(query: Query, where: list[str], until: float, rg: str | None, problems: list[str]) -> Scan:
    # -uuu: also what .gitignore and a leading dot hide.  rg itself reads UTF-16.
    # fmt: off
    argv = [
        rg or _program("rg"), "--no-config", "-uuu", "-g", "*.md", "--max-filesize", str(LARGEST),
        "-a", "-o", "-N", "-H", "--heading", "--null", "--stats", "--color", "never",
        "-f", "-", "--", *where,
    ]
    # fmt: on
    literals = "|".join(map(_escaped, query.literals))
    pattern = f"(?i-u)(?:{literals})[\\w\\x80-\\xff]*"
    out, said = _child(argv, pattern.encode(), until)
    found = Scan()
    # PATH NUL run LF run LF LF PATH NUL …: no run is empty, so any name can be told from them.
    name, *chunks = out.split(b"\0")
    for chunk in chunks:
        runs, _, rest = chunk.partition(b"\n\n")
        found.add(query, os.fsdecode(name), runs.split(b"\n"), until)
        name = rest
    searched = _SEARCHED.search(b"\n" + name)
    if searched is None:
        raise ScanError(f"{argv[0]}: {_first(said) or 'no statistics in its output'}")
    found.files, found.size = int(searched[1]), int(searched[2])
    if said:
        problems.append(_first(said))
    return found


def _escaped(literal: bytes) -> str:
    return "".join(chr(b) if b < 128 else f"\\x{b:02x}" for b in literal)


def _grep(query: Query, where: list[str], until: float, problems: list[str]) -> Scan:
    # In the C locale a byte is a character, and -i means ASCII letters.
    pattern = b"(" + b"|".join((*query.literals, *BOMS)) + b")[[:alnum:]_\x80-\xff]*\n"
    argv = [_program("grep"), "-aioEHZ", "-D", "skip", "-d", "skip", "-f", "-", "--"]
    found = Scan()
    names = list(_walk(where, found, until, problems))
    for i in range(0, len(names), BATCH):
        out, said = _child([*argv, *names[i : i + BATCH]], pattern, until)
        if said:
            problems.append(_first(said))
        for name, lines in groupby(_printed(out), itemgetter(0)):
            held = [run for _, run in lines]
            path = os.fsdecode(name)
            if held[0].startswith(BOMS):
                _look(query, path, found, until, problems)
            else:
                found.add(query, path, held, until)
    return found


def _printed(out: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and runs of grep's output: PATH NUL run LF PATH NUL run LF …"""
    name, *chunks = out.split(b"\0")
    for chunk in chunks:
        run, _, rest = chunk.partition(b"\n")
        yield name, run
        name = rest


def _python(query: Query, where: list[str], until: float, problems: list[str]) -> Scan:
    found = Scan()
    for path in _walk(where, found, until, problems):
        _look(query, path, found, until, problems)
    return found


def _look(query: Query, path: str, found: Scan, until: float, problems: list[str]) -> None:
    """Count a file's terms without a scanner.  Raises TimeoutError."""
    try:
        found.add(query, path, query.tails(_transcoded(_bytes(path))), until)
    except FileNotFoundError:
        pass  # gone since it was listed
    except TimeoutError:  # an OSError, too
        raise
    except OSError as err:
        problems.append(_why(err))


def _walk(where: list[str], found: Scan, until: float, problems: list[str]) -> Iterator[str]:
    """Every note, counted in `found`; links are not followed.  Raises TimeoutError."""
    waiting = list(where)
    while waiting:
        path = waiting.pop()
        try:
            directories, notes = _listed(path) if os.path.isdir(path) else ([], [path])
        except OSError as err:
            problems.append(_why(err))
            continue
        waiting += directories
        for note in notes:
            if monotonic() > until:
                raise TimeoutError
            try:
                size = os.lstat(note).st_size
            except FileNotFoundError:
                continue
            except OSError as err:
                problems.append(_why(err))
                continue
            if size <= LARGEST:
                found.files += 1
                found.size += size
                yield note


def _listed(directory: str) -> tuple[list[str], list[str]]:
    directories, notes = [], []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.path)
            elif entry.name.endswith(".md") and entry.is_file(follow_symlinks=False):
                notes.append(entry.path)
    return directories, notes


def _program(name: str) -> str:
    """Where a program is: on PATH; rg also where the codex wheel brings it.

    Raises ScanError.
    """
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if name == "rg":
        places += [os.path.join(place, "codex_cli_bin", "codex-path") for place in sys.path]
    for place in places:
        path = os.path.join(place, name)
        if os.path.isabs(path) and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise ScanError(f"{name}: not found")


def _child(argv: list[str], given: bytes, until: float) -> tuple[bytes, bytes]:
    """What a program prints on stdout and stderr, given `given` on stdin.

    Its exit status tells nothing more: 1 is no match, 2 an error beside useful
    output.  Raises TimeoutError, ScanError if it cannot start.
    """
    opened: list[int] = []
    try:
        # Files in memory, as a pipe would wake us for each note it writes about.
        opened += (os.memfd_create("pattern"), os.memfd_create("matches"))
        opened += os.pipe()
        stdin, out, err, err_there = opened
        os.write(stdin, given)
        os.lseek(stdin, 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, fd, n) for n, fd in enumerate((stdin, out, err_there))]
        pid = os.posix_spawn(
            argv[0], argv, {"LC_ALL": "C"}, file_actions=actions, setsigdef=[signal.SIGPIPE]
        )
    except OSError as why:
        _close(opened)
        raise ScanError(f"{argv[0]}: {why.strerror}") from why
    _close((stdin, err_there))
    try:
        said = _drained(err, out, until)
        return os.pread(out, os.fstat(out).st_size, 0), said
    finally:
        _close((out, err))
        os.kill(pid, signal.SIGKILL)  # it has said all there is, or had its time
        os.waitpid(pid, 0)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _drained(err: int, out: int, until: float) -> bytes:
    """What comes from `err` until its writer ends, while the file `out` does not grow too big.

    Raises TimeoutError.
    """
    said: list[bytes] = []
    waiting = select.poll()
    waiting.register(err, select.POLLIN)
    while True:
        left = until - monotonic()
        if left <= 0:
            raise TimeoutError
        if os.fstat(out).st_size > OUTPUT:
            raise TimeoutError(f"more than {OUTPUT >> 20} MiB of matches")
        if not waiting.poll(min(left, 0.1) * 1000):
            continue
        data = os.read(err, 1 << 16)
        if not data:
            return b"".join(said)
        if len(said) < COMPLAINTS:
            said.append(data)


def read(path: str) -> bytes:
    """A note as UTF-8, whatever it is in; empty if it is no text.  Raises OSError."""
    note = _transcoded(_bytes(path))
    if b"\0" in note:
        return b""
    return note.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").encode()


def _transcoded(note: bytes) -> bytes:
    if note.startswith(BOMS):
        return note.decode("utf-16", "replace").encode("utf-8", "replace")
    return note


def _bytes(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        # A directory on the way may have become a link since it was searched.
        there = os.readlink(f"/proc/self/fd/{fd}")
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST or there != path:
            raise OSError(errno.EINVAL, "not a note any more", path)
        return os.read(fd, status.st_size)
    finally:
        os.close(fd)


def _why(err: OSError) -> str:
    return f"{err.filename}: {err.strerror}"


def _first(said: bytes) -> str:
    """The first of a program's complaints, and how many there are."""
    lines = said.decode("utf-8", "replace").splitlines() or [""]
    return lines[0] + (f" (and {len(lines) - 1} more)" if lines[1:] else "")
