"""Drop-ins for our units: what codexd.yaml asks for and a hardened unit would not have.

A worker may write only to what is bound into its unit: the workdirs and
CODEX_HOME.  Of what the units hide (homes, temporary directories, the rest of
the state) it sees the notes, Codex and codexd itself where they lie there.
`texts` gives the drop-ins; `codexd install` writes them, `codexd doctor`
compares them.  Nothing is written here, links are resolved.

A path that is missing must not keep a unit from starting, so all have the `-`
of systemd.exec(5).  Raises Unfit for a path that a unit file cannot name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from codexd.config import Config, Directories

NAME = "50-codexd.conf"
WORKER, MASTER = "codexd-worker@.service", "codexd.service"
HTTP, SOCKET = "codexd-http.service", "codexd-http.socket"
HOOK = "codexd-hook@.service"
_HOMES = ("/home", "/root", "/run/user")  # ProtectHome=
_SCRATCH = ("/tmp", "/var/tmp")  # PrivateTmp=
_ODD = re.compile(r"""["'\\:$\x00-\x1f]""")


class Unfit(ValueError):
    """A path that no unit file can name."""


def texts(
    config: Config, own: Iterable[Path], codex: str | None, worker: str = ""
) -> dict[str, str]:
    """Drop-ins by the name of their unit; none for a unit that needs none.

    `own` are directories that codexd's programs need, `codex` is the Codex
    binary as it is called, where there is one; `worker` is the text of a user's unit for
    workers, of which something may have to be taken back.
    """
    ours = list(own)
    programs = [*ours, *(_of_codex(codex) if codex else ())]
    roots = [*config.workdirs, config.workdir]
    home = config.codex.home
    token = config.http.token_file
    found = {
        WORKER: _service(config, [*roots, home], [*_notes(config), *programs])
        + _personal(config, worker),
        MASTER: _service(config, [home], programs),
        HTTP: _service(config, [], [*ours, *([token] if token else [])]),
        HOOK: _service(config, [], [*ours, *(Path(words[0]) for words in config.on.values())]),
        SOCKET: _listen(config),
    }
    return {unit: "\n".join(lines) + "\n" for unit, lines in found.items() if lines}


def _service(config: Config, write: Iterable[Path], read: Iterable[Path]) -> list[str]:
    """The lines for a unit that has to write there, and to read there."""
    dirs = config.dirs
    there = (dirs.work, dirs.codex_home)  # bound by the units themselves
    writable = _topmost(p for p in write if not any(p.is_relative_to(own) for own in there))
    known = [*there, *writable]
    hidden = [p for p in read if _below(p, _hidden(config))]
    readable = _topmost(p for p in hidden if not any(p.is_relative_to(one) for one in known))
    lines = [f"BindPaths={_bound(path)}" for path in writable]
    lines += [f"BindReadOnlyPaths={_bound(path)}" for path in readable]
    if not lines:
        return []
    if dirs.systemwide and any(_below(p, _HOMES) for p in (*writable, *readable)):
        lines.insert(0, "ProtectHome=tmpfs")
    return ["[Service]", *lines]


def unseen(config: Config) -> list[Path]:
    """Notes that no worker can see: they lie where its unit hides codexd's own secrets."""
    system = Directories.system() if config.dirs.systemwide else config.dirs
    return [path for path in _notes(config) if _below(path, [str(system.config_file.parent)])]


def _notes(config: Config) -> list[Path]:
    found = map(os.path.expanduser, config.memory.paths)
    return [Path(path) for path in found if os.path.isabs(path)]


def _personal(config: Config, worker: str) -> list[str]:
    """A user's own CODEX_HOME, with a login: hidden where codexd has another.

    Where it is codexd's, the unit's own list would hide it from a worker, whatever binds it:
    so that is given again without it.
    """
    own = Path.home() / ".codex"
    if config.dirs.systemwide:
        return []
    if not config.codex.home.is_relative_to(own):
        return ["[Service]", f"InaccessiblePaths={_quoted(f'-{_named(own)}')}"]
    lists = re.findall(r"(?m)^InaccessiblePaths=(.*)$", worker)
    others = [word for words in lists for word in words.split() if word != "-%h/.codex"]
    return ["[Service]", *(f"InaccessiblePaths={word}" for word in ("", *others))]


def _listen(config: Config) -> list[str]:
    listen = config.http.listen
    if not isinstance(listen, tuple):
        return []
    host, port = listen
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return ["[Socket]", "ListenStream=", f"ListenStream={address}"]


def _hidden(config: Config) -> tuple[str, ...]:
    state = (str(config.dirs.state), str(config.dirs.inbox.parent))
    return (*_SCRATCH, *state, *(_HOMES if config.dirs.systemwide else ("/run/user",)))


def _of_codex(binary: str) -> Iterator[Path]:
    """What of the disk Codex needs: its binary, and what lies around it in its package."""
    yield Path(binary)
    real = Path(os.path.realpath(binary))
    package = real.parent.parent
    # Of a package the directory above bin, which has its rg; never a whole home.
    if real.parent.name == "bin" and len(package.parts) > 4:
        yield package
    elif str(real) != binary:
        yield real


def _topmost(paths: Iterable[Path]) -> list[Path]:
    kept: list[Path] = []
    for path in sorted(set(paths)):
        if not any(path.is_relative_to(one) for one in kept):
            kept.append(path)
    return kept


def _below(path: Path, places: Iterable[str]) -> bool:
    real = os.path.realpath(path)
    return any(path.is_relative_to(place) or Path(real).is_relative_to(place) for place in places)


def _bound(path: Path) -> str:
    """A bind that shows `path` under its own name, wherever a link in it leads."""
    real = os.path.realpath(path)
    told = f"-{_named(path)}" if real == str(path) else f"-{_named(real)}:{_named(path)}"
    return _quoted(told)


def _quoted(word: str) -> str:
    return f'"{word}"' if " " in word else word


def _named(path: str | Path) -> str:
    text = os.fspath(path)
    if _ODD.search(text) or not text.isprintable():
        raise Unfit(f"{text!r} has characters that a unit file cannot name; choose another path")
    return text.replace("%", "%%")
