"""codexd as a person has it: installed in a box, with a model that is scripted.

`Installed(box)` lays down the units of this tree, starts the model, and does what users do:
members of the group drop files and read answers; root starts, stops and looks.  `ALICE` is in
the group, `MALLORY` is not.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from codex_cli_bin import bundled_codex_path

from codexd.units import unit
from tests.box import BIN, PYTHON, SITE, TREE, Box
from tests.daemon import until

ROOT = Path(__file__).resolve().parent.parent
UNITS = ROOT / "systemd"
CODEX = f"{SITE}/{Path(bundled_codex_path()).relative_to(sysconfig.get_path('purelib'))}"
FAKE = f"{TREE}/tests/bin/codex"
ALICE, MALLORY = "alice", "mallory"
SPOOL, STATE = "/var/spool/codexd", "/var/lib/codexd"
WORK = f"{STATE}/work"
KEY = "sk-the-canary-of-the-key"
PLACE = "/var/model"

_MODEL = f"""\
[Unit]
Before=codexd.service
[Install]
WantedBy=multi-user.target
[Service]
Type=notify
ExecStart={PYTHON} -m tests.box_model {STATE}/codex {PLACE}
WorkingDirectory={TREE}
Environment=PYTHONDONTWRITEBYTECODE=1
"""


def installed_files() -> dict[str, str]:
    """Where a distribution would put what is in systemd/; programs are the box's."""
    units = "/usr/lib/systemd/system"
    found = {
        f"{units}/{path.name}": path.read_text().replace("/usr/bin/codexd", f"{BIN}/codexd")
        for path in UNITS.glob("codexd*")
        if path.suffix in (".service", ".socket", ".slice", ".timer")
    }
    return found | {
        "/usr/lib/sysusers.d/codexd.conf": (UNITS / "codexd.sysusers").read_text(),
        "/usr/lib/tmpfiles.d/codexd.conf": (UNITS / "codexd.tmpfiles").read_text(),
        "/usr/share/polkit-1/rules.d/50-codexd.rules": (UNITS / "codexd.rules").read_text(),
    }


def scripts() -> dict[str, str]:
    """The programs of /usr/lib/codexd, for the Python of the box."""
    names = ("codexd-exit", "codexd-hook", "codexd-limits", "codexd-schedule")
    found = {f"/usr/lib/codexd/{name}": (UNITS / name).read_text() for name in names}
    return {path: text.replace("#!/usr/bin/python3", f"#!{PYTHON}") for path, text in found.items()}


class Installed:
    """An installation in a box."""

    program = f"{BIN}/codexd"

    def __init__(self, box: Box, codex: str = CODEX) -> None:
        self.box = box
        self.lay_down()
        self.config = f"codex:\n  bin: {codex}\n"
        self.configure(self.config)
        self.furnish()

    def lay_down(self) -> None:
        """What an installer does."""
        self.box.push(installed_files())
        self.box.push(scripts(), mode=0o755)
        self.box.run("systemd-sysusers")
        self.box.run("systemd-tmpfiles", "--create", "codexd.conf")

    def furnish(self) -> None:
        """The model, its key, and people."""
        box = self.box
        box.push({"/etc/codexd/api.env": f"CODEXD_SCRIPTED_KEY={KEY}\n"}, mode=0o600)
        box.push({"/etc/systemd/system/model.service": _MODEL})
        box.run("useradd", "--create-home", "--groups", "codexd", ALICE)
        box.run("useradd", "--create-home", MALLORY)
        self.drop_in("codexd.service", "[Service]\nRestartSec=50ms\n")
        box.run("systemctl", "start", "model")

    def configure(self, text: str) -> None:
        self.box.push({"/etc/codexd/codexd.yaml": text})

    def drop_in(self, name: str, text: str) -> None:
        self.box.push({f"/etc/systemd/system/{name}.d/test.conf": text})
        self.box.run("systemctl", "daemon-reload")

    # --- what users do ----------------------------------------------------------------

    def drop(self, text: str, name: str = "task.md", user: str = ALICE) -> str:
        """Drop a file as a member of the group does; its name without the ending."""
        path = f"{SPOOL}/inbox/{name}"
        write = ("sh", "-c", f"cat > {path}.tmp && mv {path}.tmp {path}")
        self.box.run(*write, input=text, user=user)
        return name.rpartition(".")[0]

    def tasks(self, *options: str) -> list[dict[str, Any]]:
        """What `codexd task list` tells."""
        return self._json("task", "list", *options)  # type: ignore[no-any-return]

    def task(self, name: str) -> dict[str, Any] | None:
        """The task that was dropped under this name."""
        found = [t for t in self.tasks() if t["file"] and t["file"].startswith(f"{name}.")]
        return found[-1] if found else None

    def _json(self, *argv: str) -> Any:
        return json.loads(self.box.run(self.program, "--json", *argv).stdout)

    def running(self, name: str) -> str:
        """Wait until Codex works on it; its id."""

        def look() -> str | None:
            task = self.task(name)
            return task["id"] if task and task["state"] == "running" else None

        id = until(look, f"{name} runs")
        begun = ("test", "-s", f"{STATE}/tasks/{id}/{self._attempt(id)}/events.jsonl")
        until(lambda: not self.box.run(*begun, check=False).returncode, "Codex says something")
        return id

    def _attempt(self, id: str) -> str:
        names = self.box.run("ls", f"{STATE}/tasks/{id}").stdout.split()
        return max((n for n in names if n.isdigit()), key=int)

    def ended(self, name: str, seconds: float = 60) -> dict[str, Any]:
        """Wait until it has ended; the task."""

        def look() -> dict[str, Any] | None:
            task = self.task(name)
            return task if task and task["state"] in ("done", "failed", "cancelled") else None

        try:
            return until(look, f"{name} has ended", seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.story()}") from error

    def answer(self, name: str, user: str = ALICE) -> tuple[dict[str, str], str]:
        """The answer's front matter and text, as a member of the group reads them."""
        read = ("sh", "-c", f"cat {SPOOL}/answers/{name}.*.md")
        head, text = self.box.run(*read, user=user).stdout.removeprefix("---\n").split("---\n", 1)
        return dict(line.split(": ", 1) for line in head.splitlines()), text

    def story(self) -> str:
        """The end of the journal, for a test that failed."""
        return self.box.run("journalctl", "-n", "60", "--no-pager").stdout

    # --- the model ----------------------------------------------------------------------

    def release(self, name: str) -> None:
        self.box.run("sh", "-c", f"echo release {name} > {PLACE}/orders")

    def asked(self) -> list[dict[str, Any]]:
        """Every request to the model so far."""
        self.box.run("rm", "-f", f"{PLACE}/told")
        self.box.run("sh", "-c", f"echo tell {PLACE}/told > {PLACE}/orders")
        there = ("test", "-e", f"{PLACE}/told")
        until(lambda: not self.box.run(*there, check=False).returncode, "the model tells")
        return json.loads(self.box.pull(f"{PLACE}/told"))  # type: ignore[no-any-return]

    # --- units ----------------------------------------------------------------------------

    def invocations(self, ids: Iterable[str]) -> dict[str, str]:
        """The InvocationID of each task's unit; one that is gone has none."""
        return {id: self.box.show(unit(id), "InvocationID").get("InvocationID", "") for id in ids}

    def units(self) -> list[str]:
        """Every instance that systemd knows."""
        ask = ("systemctl", "list-units", "--all", "--plain", "--no-legend", "codexd-worker@*")
        return re.findall(r"codexd-worker@\S+", self.box.run(*ask).stdout)

    def command_lines(self) -> str:
        """Those of every process in the box."""
        return self.box.run("ps", "-e", "-o", "args").stdout

    def wait_gone(self) -> None:
        until(lambda: not self.units(), "every worker is gone")
