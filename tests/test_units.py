"""The unit files, as systemd itself reads them: no mistake, and as little exposed as promised."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mdoc import MAN

UNITS = Path(__file__).resolve().parent.parent / "systemd"
FILES = sorted(
    p for p in UNITS.rglob("codexd*") if p.suffix[1:] in ("service", "socket", "slice", "timer")
)
ID = "20260101t000000-aaaaaaaaaa"
# What "systemd-analyze security" may say at most, in tenths; see the comments in the units.
EXPOSURE = {"codexd.service": 5, "codexd-http.service": 5, "codexd-worker@.service": 22}


def analyze(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    return subprocess.run(
        ["systemd-analyze", *argv],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=60,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(cwd), "HOME": str(cwd)},
    )  # fmt: skip


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """The units beside each other, their programs replaced by some that are there."""
    for path in FILES:
        ours = r"(/usr/bin/codexd\S*|/usr/lib/codexd/\S+|/etc/\S+|%E/\S+)"
        text = re.sub(rf"(?m)^(Exec\w+=[-+!@:]*){ours}", r"\1/bin/true", path.read_text())
        if "\nOnCalendar=" not in text:  # the admin's to say
            text = text.replace("\n[Timer]\n", "\n[Timer]\nOnCalendar=daily\n")
        (tmp_path / path.relative_to(UNITS)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(UNITS)).write_text(text)
    return tmp_path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(UNITS)))
def test_systemd_finds_nothing_wrong(copies: Path, path: Path) -> None:
    """It exits with 0 for an unknown key, and only says so."""
    name = path.name.replace("@.", f"@{ID}.")
    for template in (copies / path.relative_to(UNITS)).parent.glob("*@.*"):
        template.rename(template.with_name(template.name.replace("@.", f"@{ID}.")))
    user = ["--user"] if path.parent.name == "user" else []
    place = copies / path.relative_to(UNITS).parent
    done = analyze("verify", "--man=no", *user, f"./{name}", cwd=place)
    ours = [line for line in done.stderr.splitlines() if "codexd" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


@pytest.mark.parametrize("name", EXPOSURE)
def test_exposure(copies: Path, name: str) -> None:
    options = ("--offline=yes", f"--threshold={EXPOSURE[name]}")
    done = analyze("security", *options, f"./{name}", cwd=copies)
    assert done.returncode == 0, done.stdout[-300:]


def test_a_laxer_unit_would_be_noticed(copies: Path) -> None:
    text = (copies / "codexd.service").read_text().replace("PrivateUsers=yes\n", "")
    (copies / "codexd.service").write_text(text.replace("ProtectHome=yes\n", ""))
    options = ("--offline=yes", f"--threshold={EXPOSURE['codexd.service']}")
    assert analyze("security", *options, "./codexd.service", cwd=copies).returncode == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(UNITS)))
def test_the_manual_of_each_unit_is_there(path: Path) -> None:
    for page in re.findall(r"man:(\S+)\((\d)\)", path.read_text()):
        assert (MAN / ".".join(page)).exists(), page


def test_nothing_is_written_with_a_path_of_another_machine() -> None:
    for path in FILES:
        for program in re.findall(r"(?m)^Exec\w+=[-+!@:]*(\S+)", path.read_text()):
            ours = ("/usr/bin/", "/usr/lib/codexd/", "/bin/", "/etc/codexd/", "%E/codexd/")
            assert program.startswith(ours), path
