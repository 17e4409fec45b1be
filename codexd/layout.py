"""Where the files of an installation lie, and what is in them.  Pure.

The sources, in systemd/, have a distribution's paths; here they get those of
the installation that is laid down.  What belongs to distributions
(/usr/lib/systemd) is never a target: the system's units go to /usr/local/lib,
a user's to ~/.local/share, so that in /etc and ~/.config the administrator's
own files and drop-ins stand above them.

Every file carries a seal, a line with a digest of the rest.  So a later
install, or uninstall, knows what is still as codexd wrote it: anything else is
somebody's work, and stays.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from codexd import dropin
from codexd.config import Config

_SEAL = re.compile(r"^(?:#|//) codexd install wrote this, ([0-9a-f]{16}); .*\n", re.MULTILINE)
_WORDS = "if you edit it, it is yours, and no install will touch it again."
_UNITS = (".service", ".socket", ".slice", ".timer")
_HEAD = "# What codexd.yaml asks for.  Your own drop-ins belong into files of other names.\n"


@dataclass(frozen=True, slots=True)
class File:
    text: str
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Target:
    """The directories of an installation."""

    units: Path
    dropins: Path
    scripts: Path
    etc: Path | None  # of sysusers.d, tmpfiles.d and polkit; None for a user's
    catalog: Path | None
    packaged: Path  # where a distribution has such units

    @classmethod
    def system(cls) -> Target:
        return cls(
            units=Path("/usr/local/lib/systemd/system"),
            dropins=Path("/etc/systemd/system"),
            scripts=Path("/usr/local/lib/codexd"),
            etc=Path("/etc"),
            catalog=Path("/usr/local/lib/systemd/catalog"),
            packaged=Path("/lib/systemd/system"),
        )

    @classmethod
    def user(cls, home: Path, env: Mapping[str, str]) -> Target:
        config = Path(env.get("XDG_CONFIG_HOME") or home / ".config")
        data = Path(env.get("XDG_DATA_HOME") or home / ".local/share")
        return cls(
            units=data / "systemd/user",
            dropins=config / "systemd/user",
            scripts=home / ".local/lib/codexd",
            etc=None,
            catalog=None,
            packaged=Path("/usr/lib/systemd/user"),
        )

    def below(self, prefix: Path) -> Target:
        """The same, moved below a directory."""

        def moved(path: Path) -> Path:
            return prefix / path.relative_to("/")

        return Target(
            moved(self.units),
            moved(self.dropins),
            moved(self.scripts),
            moved(self.etc) if self.etc else None,
            moved(self.catalog) if self.catalog else None,
            moved(self.packaged),
        )

    def ours(self) -> list[tuple[Path, str]]:
        """Where files of ours may be, as directory and pattern."""
        found = [(self.units, "codexd*"), (self.scripts, "codexd-*")]
        found.append((self.dropins, f"codexd*.d/{dropin.NAME}"))
        if self.etc:
            found += [(self.etc, "sysusers.d/codexd.conf"), (self.etc, "tmpfiles.d/codexd.conf")]
            found.append((self.etc, "polkit-1/rules.d/50-codexd.rules"))
        if self.catalog:
            found.append((self.catalog, "codexd.catalog"))
        return found


# --- the plan -------------------------------------------------------------------------


def derived(target: Target, dropins: Mapping[str, str]) -> dict[Path, File]:
    """The drop-ins, from `dropin.texts`."""
    return {
        target.dropins / f"{unit}.d" / dropin.NAME: File(sealed(_HEAD + text))
        for unit, text in dropins.items()
    }


def ageing(target: Target, config: Config, source: str) -> dict[Path, File]:
    """tmpfiles.d of a distribution with the ages of codexd.yaml, where they are others."""
    text = _aged(source, config)
    if target.etc is None or text == source:
        return {}
    return {target.etc / "tmpfiles.d/codexd.conf": File(sealed(text))}


def whole(
    target: Target,
    config: Config,
    dropins: Mapping[str, str],
    sources: Mapping[str, str],
    programs: Path,
    scripts: Path,
    python: str,
) -> dict[Path, File]:
    """Everything.

    `programs` and `scripts` are directories as they will be named in units,
    `python` is the interpreter that has codexd.
    """
    found = derived(target, dropins)
    for name, source in sources.items():
        text = source.replace("/usr/bin/codexd", f"{programs}/codexd")
        text = text.replace("/usr/lib/codexd/", f"{scripts}/")
        text = text.replace("#!/usr/bin/python3 ", f"#!{python} ")
        if not config.dirs.systemwide:
            text = _of_user(text, config.dirs.state)
        if name.endswith(_UNITS):
            found[target.units / name] = File(sealed(text))
        elif "." not in name:
            found[target.scripts / name] = File(sealed(text), 0o755)
        elif place := _elsewhere(target, name):
            found[place] = File(sealed(_aged(text, config)))
    return found


def _elsewhere(target: Target, name: str) -> Path | None:
    """The place of a file that is no unit; None where there is none."""
    if target.etc is None or target.catalog is None:
        return None
    return {
        "codexd.sysusers": target.etc / "sysusers.d/codexd.conf",
        "codexd.tmpfiles": target.etc / "tmpfiles.d/codexd.conf",
        "codexd.rules": target.etc / "polkit-1/rules.d/50-codexd.rules",
        "codexd.catalog": target.catalog / "codexd.catalog",
    }.get(name)


def _of_user(text: str, state: Path) -> str:
    """A user's unit with the user's XDG_STATE_HOME, which systemd need not know."""
    named = str(state).replace("%", "%%")
    text = text.replace("%h/.local/state/codexd", named)
    home = named.removesuffix("/codexd")
    return text.replace("[Service]\n", f"[Service]\nEnvironment=XDG_STATE_HOME={home}\n", 1)


def _aged(source: str, config: Config) -> str:
    """The ages of answers and rejected files in tmpfiles.d, as codexd.yaml has them."""
    kept = {"answers": config.retention.answers, "rejected": config.retention.rejected}

    def line(match: re.Match[str]) -> str:
        seconds = kept[match[2]]
        age = "-" if math.isinf(seconds) else match[3]
        same = seconds == 86400 * float(match[3].rstrip("d"))
        return match[1] + (age if math.isinf(seconds) or same else f"{int(seconds)}s")

    return re.sub(r"(?m)^(d \S+/(answers|rejected) .* )(\d+d)$", line, source)


# --- the seal -------------------------------------------------------------------------


def sealed(text: str) -> str:
    """The text with its seal, in the first line, or below a `#!`."""
    head, rest = "", text
    if text.startswith("#!"):
        head, rest = text[: text.index("\n") + 1], text[text.index("\n") + 1 :]
    sign = "//" if rest.startswith("//") else "#"
    return f"{head}{sign} codexd install wrote this, {_digest(text)}; {_WORDS}\n{rest}"


def is_intact(text: str) -> bool:
    """Whether some install of ours wrote this, and nobody changed it."""
    found = _SEAL.search(text)
    if not found:
        return False
    return _digest(text[: found.start()] + text[found.end() :]) == found[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


class Stand(StrEnum):
    """How a file on disk stands to what it should be."""

    ABSENT = "absent"
    SAME = "same"
    OLD = "old"  # as an install of ours wrote it
    EDITED = "edited"  # or somebody else's


def stand(found: str | None, wanted: str) -> Stand:
    """Of a file's text, None if there is none, and what an install would write."""
    if found is None:
        return Stand.ABSENT
    if found == wanted:
        return Stand.SAME
    return Stand.OLD if is_intact(found) else Stand.EDITED


def strays(there: Iterable[Path], plan: Mapping[Path, File]) -> list[Path]:
    """Files of ours that an install would not make any more."""
    return sorted(set(there) - set(plan))
