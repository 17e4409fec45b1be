"""Workers as units that cannot be started: the host's fault, and told as such.

What is asked is a stand-in for systemctl; units themselves are in tests/test_systemd.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from codexd import spool
from codexd.config import Directories
from codexd.units import BATCH, Units
from tests.daemon import until

IDS = [f"20261123t0720{n:02}-k3f9qa7x2m" for n in range(2 * BATCH)]
SYSTEMCTL = """\
#!/bin/sh
case "$*" in
*--property=LoadState*) echo loaded ;;
*list-units*) echo '[]' ;;
*) echo "$*" >> {asked} ;;
esac
"""


class Asked:
    """Units, and what systemctl was asked for."""

    def __init__(self, root: Path) -> None:
        self.dirs = Directories.below(root)
        spool.prepare(self.dirs)
        self.tool, self._asked = root / "bin" / "systemctl", root / "asked"
        self.tool.parent.mkdir()
        self.tool.write_text(SYSTEMCTL.format(asked=self._asked))
        self.tool.chmod(0o755)
        self._asked.touch()

    def open(self) -> Units:
        return Units(self.dirs, lambda _bell: None)

    def started(self, units: Units) -> int:
        """How many workers it was asked to start, once it has answered all."""

        def over() -> bool:
            units.active()  # looks at what has ended
            return not units._calls

        until(over, "systemctl has answered")
        return self._asked.read_text().count("codexd-worker@")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    one = Asked(tmp_path)
    monkeypatch.setenv("PATH", str(one.tool.parent))  # and no other systemctl
    return one


def test_without_a_process_for_systemctl_all_of_them_are_refused(asked: Asked) -> None:
    units = asked.open()
    aside = asked.tool.rename(asked.tool.with_name("aside"))
    units.start(IDS, {})
    assert not units.active()
    assert all("No such file" in str(units.refusal(id)) for id in IDS)
    assert units.refusal(IDS[0]) is None, "it is said once"
    aside.rename(asked.tool)
    units.start(IDS, {})
    assert asked.started(units) == len(IDS)
    assert not any(map(units.refusal, IDS))


def test_limits_that_cannot_be_written_are_the_trouble_of_one_task(asked: Asked) -> None:
    units = asked.open()
    (asked.dirs.limits / IDS[1]).mkdir()
    units.start(IDS, {id: {"tasks": 9} for id in IDS})
    assert "Is a directory" in str(units.refusal(IDS[1]))
    assert IDS[1] not in units.active()
    assert asked.started(units) == len(IDS) - 1
    assert not any(map(units.refusal, IDS))
