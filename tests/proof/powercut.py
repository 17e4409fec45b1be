"""The power cut: a file system that is shut down in mid-load, mounted again, and judged.

    python -m tests.proof.powercut [--cuts N] [--fs ext4 --fs xfs] [--seed N]

The root lies on a loop-mounted image.  `xfs_io -x -c shutdown` stops the file system at
once, without writing its log: what was not made durable by fsync is gone, as without power.
What counts is what was acknowledged before: in the shutdown itself XFS lets the fsync of a
directory succeed, and has forgotten the rename afterwards (15 of 43,840 in 60 cuts, with the
system calls alone); without power there would be nobody left to be told.
Then everything is killed, the image is mounted again (which replays its journal), a new
daemon does what is left, and the oracle is asked for all that was acknowledged before.

Needs root, a free loop device, mkfs.ext4, mkfs.xfs and xfs_io.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from codexd.model import Kind
from tests.box import kernel
from tests.daemon import until
from tests.proof import oracle
from tests.proof.load import Load
from tests.proof.place import Place, report, scratch, seed_of

KINDS = ("ext4", "xfs")
TOOLS = ("mkfs.ext4", "mkfs.xfs", "xfs_io", "mount", "umount", "losetup")
_SIZE = 320 << 20  # mkfs.xfs makes none of less than 300 MB
T = TypeVar("T")


def missing() -> str | None:
    """Why no power can be cut here."""
    if os.geteuid():
        return "not root: file systems cannot be mounted"
    if gone := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"missing: {', '.join(gone)} (packages xfsprogs, e2fsprogs, mount)"
    if subprocess.run(["losetup", "--find"], capture_output=True).returncode:
        return "no free loop device"
    return None


def run(*command: object) -> None:
    """A command that has to succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")


class Disk:
    """A file system of its own, whose power can be cut."""

    def __init__(self, home: Path, kind: str) -> None:
        self.image, self.top, self.kind = home / "image", home / "disk", kind
        self.top.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(_SIZE)
        run(f"mkfs.{kind}", "-q", *(["-F"] if kind == "ext4" else []), self.image)

    def mount(self) -> None:
        run("mount", "-o", "loop,errors=remount-ro" if self.kind == "ext4" else "loop",
            self.image, self.top)  # fmt: skip

    def fail(self) -> None:
        """As after an error of the disk: ext4 takes no more writes until it is mounted anew."""
        device = subprocess.check_output(["findmnt", "-no", "SOURCE", self.top], text=True)
        Path("/sys/fs/ext4", Path(device.strip()).name, "trigger_fs_error").write_text("1")

    def unmount(self) -> None:
        """Once nothing uses it any more."""
        until(lambda: not subprocess.call(["umount", self.top], stderr=-3), "umount", 20)

    def cut(self) -> None:
        run("xfs_io", "-x", "-c", "shutdown", self.top)

    def discard(self) -> None:
        if os.path.ismount(self.top):
            subprocess.run(["umount", "--lazy", self.top], check=True)


def cut(home: Path, kind: str, chance: random.Random, figures: Counter[str]) -> list[str]:
    """One cut in mid-load, on a fresh file system; what the oracle says."""
    disk = Disk(home, kind)
    disk.mount()
    place = None
    try:
        place = Place(home, disk.top / "root", http=True)
        place.work(0.0, 0.4)
        os.sync()
        place.launch()
        load = under_load(place, chance)
        told, by_http = list(load.acknowledged), load.sent.get("202", 0)
        disk.cut()
        stop(load)
        place.kill()
        disk.unmount()
        disk.mount()
        figures["acknowledged"] += len(told)
        figures["of_them_by_http"] += by_http
        return judge(place, load, told, figures)
    finally:
        if place:
            place.kill()
        disk.discard()


def under_load(place: Place, chance: random.Random) -> Load:
    """A daemon in the midst of work."""
    until(lambda: place.is_ready() or not place.up(), "the daemon", 30)
    load = Load(place, chance, 15.0, http=True)
    load.begin()
    time.sleep(chance.uniform(0.3, 2.5))
    return load


def stop(load: Load) -> None:
    try:
        load.end()
    except OSError:
        pass  # the disk is gone; what was acknowledged before stands


def judge(place: Place, load: Load, acknowledged: list[str], figures: Counter[str]) -> list[str]:
    """What a new daemon makes of what the disk has kept."""
    before = len(place.starts())
    place.launch()
    try:
        load.drain()
    except TimeoutError as error:
        return [f"{error}: {place.log.read_text()[-2000:]}"]
    place.stop()
    told = oracle.story(place, [])
    figures["cuts"] += 1
    figures["tasks"] += len(told.accepted)
    figures["done"] += told.kinds[Kind.DONE]
    figures["started_before"] += before
    figures["started_after"] += len(place.starts()) - before
    return oracle.check(place, acknowledged, resumes=False)


def unseen(act: Callable[[], T]) -> T:
    """Do it in a thread that mounts what nobody else sees, and so nobody keeps mounted.

    Each mount namespace that is made meanwhile (a box, a sandbox) has a copy of what is
    mounted; a failed file system that is still held somewhere is what the next mount finds.
    """

    def apart() -> T:
        kernel.unshare(kernel.NEWNS)
        kernel.mount("", Path("/"), flags=kernel.REC | kernel.SLAVE)
        return act()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(apart).result()


def main() -> int:
    parser = argparse.ArgumentParser(description="cut the power in mid-load")
    parser.add_argument("--cuts", type=int, default=10, help="of each file system")
    parser.add_argument("--fs", action="append", choices=KINDS)
    parser.add_argument("--seed")
    args = parser.parse_args()
    if why := missing():
        print(f"powercut: skipped: {why}")
        return 77
    return unseen(lambda: cuts(args.fs or KINDS, args.cuts, seed_of(args)))


def cuts(kinds: Sequence[str], count: int, seed: str) -> int:
    status, began = 0, time.monotonic()
    for kind in kinds:
        figures: Counter[str] = Counter()
        problems: list[str] = []
        for number in range(count):
            home = scratch(f"powercut-{kind}-{number}")
            found = cut(home, kind, random.Random(f"{seed} {kind} {number}"), figures)
            problems += [f"{kind} cut {number}: {problem}; see {home}" for problem in found]
            if not found:
                shutil.rmtree(home)
        status |= report(f"powercut-{kind}", problems, began, dict(figures))
        began = time.monotonic()
    return status


if __name__ == "__main__":
    sys.exit(main())
