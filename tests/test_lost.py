"""Lost tasks: what a retry takes over from one, whatever is left of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from codexd import lost, place, spool
from codexd.config import Directories
from codexd.place import Keyed

ID, NEW, OTHER = (f"20261123t072011-k3f9qa7x2{c}" for c in "mno")


@pytest.fixture
def dirs(tmp_path: Path) -> Directories:
    """The archive has the record of a task without an end, as the repair leaves it."""
    found = Directories.below(tmp_path)
    spool.prepare(found)
    home = place.archived(found, ID)
    home.mkdir(parents=True)
    (home / "task.json").write_text(json.dumps({"id": ID, "request": {"key": "k"}}))
    place.remember_key(found, "k", Keyed(ID, "0"))
    return found


def test_a_retry_takes_its_place_and_its_key_once(dirs: Directories) -> None:
    assert lost.is_lost(dirs, ID)
    for new in (NEW, NEW, OTHER):
        lost.inherit(dirs, ID, new)
        assert (lost.heir(dirs, ID), place.keyed(dirs, "k")) == (NEW, Keyed(NEW, "0"))
    assert lost.why(dirs, ID).endswith(f"task {NEW} has taken its place")


@pytest.mark.parametrize("left", ["", "{", '{"request": []}', '{"request": {}}', None])
def test_without_a_record_that_can_be_read_there_is_no_key(
    dirs: Directories, left: str | None
) -> None:
    record = place.archived(dirs, ID) / "task.json"
    record.write_text(left or "") if left is not None else record.unlink()
    lost.inherit(dirs, ID, NEW)
    assert lost.heir(dirs, ID) == (None if left is None else NEW)
    assert place.keyed(dirs, "k") == Keyed(ID, "0")


def test_a_key_that_is_another_s_by_now_stays_that(dirs: Directories) -> None:
    place.remember_key(dirs, "k", Keyed(OTHER, "1"))
    lost.inherit(dirs, ID, NEW)
    assert (lost.heir(dirs, ID), place.keyed(dirs, "k")) == (NEW, Keyed(OTHER, "1"))


def test_a_damaged_key_is_left_for_whoever_uses_it(dirs: Directories) -> None:
    (record,) = dirs.keys.iterdir()
    record.write_text("{")
    lost.inherit(dirs, ID, NEW)
    assert (lost.heir(dirs, ID), record.read_text()) == (NEW, "{")
