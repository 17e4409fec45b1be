"""The cgroups of a box: one private cgroup in every hierarchy that the host has."""

from __future__ import annotations

import os
import time
from pathlib import Path


def hierarchies() -> dict[str, Path]:
    """Controllers of each mounted cgroup hierarchy ("" for v2) → this process' own cgroup."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = {names: path for _, names, path in lines}
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        root, point = line.split()[3:5]
        kind, _, options = line.partition(" - ")[2].split(" ", 2)
        for names in own:
            v1 = kind == "cgroup" and names and set(names.split(",")) <= set(options.split(","))
            v2 = kind == "cgroup2" and not names
            if v1 or v2:
                below = own[names].removeprefix(root.rstrip("/"))
                found.setdefault(names, Path(point) / below.lstrip("/"))
    return found


class Cgroups:
    def __init__(self, places: list[str]) -> None:
        self.places = [Path(place) for place in places]

    def make(self) -> None:
        for place in self.places:
            place.mkdir()
            for name in ("cpuset.cpus", "cpuset.mems"):  # v1 starts them empty: nothing may run
                above = place.parent / name
                if above.exists() and (value := above.read_text().strip()):
                    (place / name).write_text(value)

    def join(self) -> None:
        for place in self.places:
            (place / "cgroup.procs").write_text("0")

    def remove(self) -> None:
        """Once nothing runs in them; the kernel may still be at work on the last of it."""
        end = time.monotonic() + 10
        for folder in self.folders():
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.01)

    def folders(self) -> list[Path]:
        """All that are there, the deepest first."""
        return [Path(folder) for place in self.places for folder, _, _ in os.walk(place, False)]
