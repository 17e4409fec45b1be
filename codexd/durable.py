"""Files that survive a power cut: whole and new, or as they were.

The one way every room writes a file that somebody else reads: write aside,
fsync, rename, fsync the directory.  A reader never sees half of it.  A name
`.NAME.PID.tmp` is debris of a writer that died; each directory is swept by the
process that alone writes there, or of what is old.

May fail with OSError (full disk, lost permission); then the old file stands.
Lean: the worker uses it.
"""

from __future__ import annotations

import os
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


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


def write(path: str | os.PathLike[str], data: bytes, mode: int = 0o640) -> None:
    """Replace the file at `path` by `data`, durably and at once."""
    directory, name = os.path.split(os.fspath(path))
    # A name has at most 255 bytes, and a character up to four.
    aside = os.path.join(directory, f".{name[:60]}.{os.getpid()}.tmp")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(aside, path)
    except OSError:
        os.unlink(aside)
        raise
    sync_directory(directory or ".")


def write_json(path: str | os.PathLike[str], value: Mapping[str, object]) -> None:
    """`write` for a JSON object, indented for the person who reads it."""
    import json

    text = json.dumps(value, indent=1, ensure_ascii=False)
    write(path, text.encode("utf-8", "surrogatepass") + b"\n")


def read(path: str | os.PathLike[str], limit: int) -> bytes:
    """The whole file, never following a link.

    Raises OSError; ValueError when it is larger than `limit` bytes or not a
    regular file.
    """
    return b"".join(pieces(path, limit))


def pieces(path: str | os.PathLike[str], limit: int) -> Iterator[bytes]:
    """As `read`, a megabyte at a time."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{os.fspath(path)}: not a regular file")
        if found.st_size > limit:
            raise ValueError(f"{os.fspath(path)}: {found.st_size} bytes, more than {limit}")
        while part := os.read(fd, 1 << 20):
            limit -= len(part)
            if limit < 0:
                raise ValueError(f"{os.fspath(path)}: grew over its limit while being read")
            yield part
    finally:
        os.close(fd)


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


def read_json(path: str | os.PathLike[str], limit: int = 64 << 20) -> dict[str, object]:
    """A JSON object.  Raises OSError; ValueError when it is damaged."""
    data = read(path, limit)
    try:
        value = _decode(data.decode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{os.fspath(path)}: nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)}: not a JSON object")
    return value


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
