"""Files that survive a power cut: whole and new, or as they were.

The one way every room writes a file that somebody else reads: write aside,
fsync, rename, fsync the directory.  A reader never sees half of it.  A name
`.NAME.PID.tmp` is debris of a writer that died; each directory is swept by the
process that alone writes there, or of what is old.

Files are opened in one way as well: never waiting, and regular ones only.  Anything
may lie in the place of a file: a FIFO without a writer, a device without an end.

May fail with OSError (full disk, lost permission); then the old file stands.
Lean: the worker uses it.
"""

from __future__ import annotations

import errno
import os
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})  # nothing lies there


class NotAFile(OSError, ValueError):
    """Something else lies in the place of a file of ours.

    For who writes there it is the host that refuses, for who reads it is damage.
    """

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def opened(
    path: str | os.PathLike[str],
    flags: int = os.O_RDONLY,
    mode: int = 0o640,
    *,
    follow: bool = False,
) -> int:
    """A descriptor of a regular file; `follow`: a link to one will do.

    Raises NotAFile, other OSErrors.
    """
    more = os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags | more, mode)
    except OSError as error:
        if error.errno not in _OTHERS:
            raise
        number, what = _OTHERS[error.errno]
    else:
        kind = os.fstat(fd).st_mode
        if stat.S_ISREG(kind):
            return fd
        os.close(fd)
        number, what = _OTHERS[errno.EISDIR if stat.S_ISDIR(kind) else errno.ENXIO]
    raise NotAFile(number, what, os.fspath(path))


_OTHERS = {
    errno.ELOOP: (errno.EEXIST, "a symbolic link"),
    errno.ENXIO: (errno.EEXIST, "not a regular file"),  # a socket, or a FIFO that nobody reads
    errno.EISDIR: (errno.EISDIR, "Is a directory"),
    errno.ENOTDIR: (errno.ENOTDIR, "Not a directory"),  # where it should lie
}


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable.

    A directory that we may write but not read (an inbox for submitters) cannot
    be opened for fsync; its owner syncs it when it takes the file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write every byte; a short write goes on where it stopped."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def is_there(path: str | os.PathLike[str], *, follow: bool = True) -> bool:
    """Whether something lies at `path`.

    Raises OSError when nobody can say.  os.path, and since Python 3.14 pathlib, take what a
    failing disk says for a "no": whoever starts, keeps or removes a task by the answer asks here.
    """
    return _kind(path, follow) is not None


def is_directory(path: str | os.PathLike[str]) -> bool:
    """As `is_there`, for a directory."""
    kind = _kind(path, follow=True)
    return kind is not None and stat.S_ISDIR(kind)


def _kind(path: str | os.PathLike[str], follow: bool) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        return None


def write(path: str | os.PathLike[str], data: bytes, mode: int = 0o640) -> None:
    """Replace the file at `path` by `data`, durably and at once."""
    directory, name = os.path.split(os.fspath(path))
    # A name has at most 255 bytes, and a character up to four.
    aside = os.path.join(directory, f".{name[:60]}.{os.getpid()}.tmp")
    fd = _made(aside, mode)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(aside, path)
    except OSError as problem:
        os.unlink(aside)
        if problem.filename2:  # what is in the way has to be named, not what was to go there
            problem.filename, problem.filename2 = problem.filename2, None
        raise
    sync_directory(directory or ".")


def _made(path: str, mode: int) -> int:
    """A new file to write, whatever lies in its place: debris, or what others put there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, mode)
    except FileExistsError:
        os.unlink(path)
        return os.open(path, flags, mode)


def write_json(path: str | os.PathLike[str], value: Mapping[str, object]) -> None:
    """`write` for a JSON object, indented for the person who reads it."""
    import json

    text = json.dumps(value, indent=1, ensure_ascii=False)
    write(path, text.encode("utf-8", "surrogatepass") + b"\n")


def read(path: str | os.PathLike[str], limit: int, *, follow: bool = False) -> bytes:
    """The whole file, following a link only if told to.

    Raises OSError; ValueError when it is larger than `limit` bytes or not a
    regular file.
    """
    return b"".join(pieces(path, limit, follow=follow))


def head(path: str | os.PathLike[str], most: int) -> bytes:
    """As `read`, of a file of any size the first `most` bytes."""
    fd = opened(path)
    try:
        return os.read(fd, most)
    finally:
        os.close(fd)


def pieces(path: str | os.PathLike[str], limit: int, *, follow: bool = False) -> Iterator[bytes]:
    """As `read`, a megabyte at a time."""
    fd = opened(path, follow=follow)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ValueError(f"{os.fspath(path)}: {size} bytes, more than {limit}")
        while part := os.read(fd, 1 << 20):
            limit -= len(part)
            if limit < 0:
                raise ValueError(f"{os.fspath(path)}: grew over its limit while being read")
            yield part
    finally:
        os.close(fd)


def past_hole(fd: int, at: int) -> int:
    """Where there is data again at or after `at`: a sparse file may be of any size."""
    here = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError:
        return os.fstat(fd).st_size  # there is none
    finally:
        os.lseek(fd, here, os.SEEK_SET)  # whoever reads on has not moved


_FEW = 50  # brackets of a file whose levels need not be counted


class _Plain:
    """What the scanner of the module json asks of its decoder: nothing special."""

    strict = True
    object_hook = object_pairs_hook = parse_constant = None
    parse_float, parse_int = float, int


def _decode(text: str) -> object:
    """json.loads() without its module, which is half of what a worker imports.

    The scanner that json itself uses, in C, as it is used there; whatever it
    does not like is left to json, whose errors tell the place.
    """
    try:
        from _json import make_scanner

        value, end = make_scanner(_Plain)(  # type: ignore[arg-type]
            text.strip(" \t\n\r"), 0
        )
    except (ImportError, AttributeError, TypeError, StopIteration, ValueError, SystemError):
        end = -1  # SystemError: its errors are json's, which is not there
    if end != len(text.strip(" \t\n\r")):
        import json

        return json.loads(text)
    return value


def _is_shallow(value: object) -> bool:
    from codexd import sane  # a worker's files are too small to need it

    return sane.is_shallow(value)


def read_json(path: str | os.PathLike[str], limit: int = 64 << 20) -> dict[str, object]:
    """A JSON object.  Raises OSError; ValueError when it is damaged."""
    data = read(path, limit)
    try:
        value = _decode(data.decode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{os.fspath(path)}: nested too deeply") from error
    if data.count(b"[") + data.count(b"{") > _FEW and not _is_shallow(value):
        raise ValueError(f"{os.fspath(path)}: nested too deeply")
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)}: not a JSON object")
    return value


def set_aside(path: Path) -> Path:
    """Move what is damaged out of the way; where it is now.  The one before it goes."""
    kept = path.with_suffix(".damaged")
    os.replace(path, kept)
    return kept


def sweep(directory: str | os.PathLike[str]) -> None:
    """Remove what a dead writer left.  Only for a directory with one writer."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if _is_aside(entry.name) and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)


def sweep_old(directory: str | os.PathLike[str], age: float) -> None:
    """Remove files that writers left `age` seconds ago, where others write as well."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if not _is_aside(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            try:
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > age:
                    os.unlink(entry.path)
            except FileNotFoundError:
                continue  # its writer lives, and is done with it


def _is_aside(name: str) -> bool:
    """Whether `write` makes such names; an editor's `.notes.tmp` is not ours."""
    parts = name.rsplit(".", 2)
    return (
        len(parts) == 3
        and 1 < len(parts[0]) <= 61
        and name.startswith(".")
        and parts[1].isascii()
        and parts[1].isdigit()
        and parts[2] == "tmp"
    )
