"""What the control group of a unit has used, as the kernel counted it.

Reads the files of cgroup v2, and those of v1 where a controller is there; what
the host does not count is left out, never guessed.  The same files come from a
worker itself and, of one that was killed, from its exit record.

Lean: the worker uses it.
"""

from __future__ import annotations

from codexd import sane

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# `codexd-exit` reads the same ones.
FILES = (
    "cpu.stat", "cpuacct.usage", "memory.peak", "memory.max_usage_in_bytes", "memory.events",
    "memory.oom_control", "io.stat", "blkio.throttle.io_service_bytes", "pids.peak",
)  # fmt: skip
COST = ("cpu_seconds", "memory_peak_bytes", "io_read_bytes", "io_write_bytes", "tasks_peak")


def is_of(name: str) -> bool:
    """Whether this process is in the control group of the unit."""
    return any(_ours(name))


def of_unit(name: str) -> dict[str, str]:
    """The files of the control group that this process is in, if it is the unit's own."""
    found: dict[str, str] = {}
    for directory in _ours(name):
        found |= _read(directory)
    return found


def _ours(name: str) -> Iterator[str]:
    """The directories of the unit's control group, if this process is in it."""
    with open("/proc/self/cgroup") as listed:
        for line in listed:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if path.rpartition("/")[2] == name:
                yield f"/sys/fs/cgroup/{controllers}{path}"


def _read(directory: str) -> dict[str, str]:
    found = {}
    for name in FILES:
        try:
            with open(f"{directory}/{name}") as file:
                found[name] = file.read()
        except OSError:
            continue  # another controller's, or older than the kernel's count
    return found


def cost(files: Mapping[str, str]) -> dict[str, float]:
    """What was used, by the names of `COST`; only what was counted."""
    used: dict[str, float | None] = {
        "cpu_seconds": _cpu(files),
        "memory_peak_bytes": _number(files, "memory.peak", "memory.max_usage_in_bytes"),
        "tasks_peak": _number(files, "pids.peak"),
        **_io(files),
    }
    return {name: value for name, value in used.items() if value is not None}


def oom_kills(files: Mapping[str, str]) -> int:
    """How many processes were killed for want of memory."""
    text = files.get("memory.events") or files.get("memory.oom_control") or ""
    return _pairs(text).get("oom_kill", 0)


def _cpu(files: Mapping[str, str]) -> float | None:
    micro = _pairs(files.get("cpu.stat", "")).get("usage_usec")  # v1 has none in its cpu.stat
    if micro is not None:
        return round(micro / 1e6, 3)
    nano = _number(files, "cpuacct.usage")
    return None if nano is None else round(nano / 1e9, 3)


def _io(files: Mapping[str, str]) -> dict[str, float | None]:
    """Bytes of block devices: what the page cache had, or has not yet written, is not in them."""
    if "io.stat" in files:
        words = files["io.stat"].split()
        return {
            "io_read_bytes": _total(w.removeprefix("rbytes=") for w in words if w[:2] == "rb"),
            "io_write_bytes": _total(w.removeprefix("wbytes=") for w in words if w[:2] == "wb"),
        }
    lines = [line.split() for line in files.get("blkio.throttle.io_service_bytes", "").split("\n")]
    counted = [line for line in lines if len(line) == 3]
    if not counted:
        return {}  # "Total 0" alone: newer kernels count only where something throttles
    return {
        "io_read_bytes": _total(line[2] for line in counted if line[1] == "Read"),
        "io_write_bytes": _total(line[2] for line in counted if line[1] == "Write"),
    }


def _total(numbers: Iterable[str]) -> int:
    return sum(filter(None, map(sane.count, numbers)))


def _number(files: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        found = sane.count(files.get(name, "").strip())
        if found is not None:
            return found
    return None


def _pairs(text: str) -> dict[str, int]:
    """`name number` lines."""
    lines = [line.split() for line in text.split("\n")]
    pairs = {line[0]: sane.count(line[1]) for line in lines if len(line) == 2}
    return {name: number for name, number in pairs.items() if number is not None}
