"""The permission profile that keeps secrets from the commands that the model runs.

Codex's sandbox lets commands read everything, its own login and other threads
included; a permission profile of its configuration can deny files.  This room
owns CODEX_HOME/codexd.config.toml, which has one such profile for each sandbox.

Promises: the file is whole or as it was; what a task needs (workdirs, notes,
writable roots of Codex's own configuration) is never denied.  Whether Codex
heeds it is another question: see `canary`.

May fail with OSError, and with ValueError for a config.toml that is not TOML,
or a path that cannot be put into a profile.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from codexd import canary, command, durable
from codexd.command import PERMISSIONS, PROFILE
from codexd.config import Config
from codexd.model import Sandbox

# Of the host: other units' secrets, and who would run commands outside the sandbox.
_HOST = (
    "/etc/codexd",
    "/run/credentials",
    "/run/dbus",
    "/run/systemd/private",
    "/run/user/{uid}/bus",
    "/run/user/{uid}/systemd",
)
_OPEN_DIRECTORIES = frozenset({"state", "work", "codex_home"})
# What commands may need of CODEX_HOME; other directories hold what was said, or secrets.
_OPEN_IN_HOME = frozenset(
    ["tmp", ".tmp", "skills", "plugins", "prompts", "rules", "packages", "bin"]
)
_FILES_IN_HOME = (".json", ".jsonl", ".toml", ".log")
# What Codex may make in the midst of a turn; where it runs without our profile, the snapshots
# of its shell have its whole environment.
_EXPECTED_IN_HOME = (
    "auth.json", ".credentials.json", ".env", "history.jsonl", "log", "shell_snapshots"
)  # fmt: skip
_PATTERN = frozenset("*?[]{}")  # in a path Codex takes them for a pattern
_KEYS = ("CODEX_API_KEY", "OPENAI_API_KEY")
# A snapshot has Codex's whole environment, keys included; commands read it as they begin.
# Without it they are run by a login shell, and find what its start-up files set.
_NO_SNAPSHOT = "[features]\nshell_snapshot = false"
_HEAD = """\
# Written by codexd, and again before each task: changes here are lost.
# Keeps secrets from the commands that the model runs; see codexd(7).
"""


# --- what is hidden -------------------------------------------------------------------


def hidden(config: Config) -> list[str]:
    """Absolute paths that commands must not read, links resolved, none below another."""
    admin = _admin(config)
    needed = _needed(config, admin)
    found = {os.path.realpath(path) for path in _secret(config, admin)}
    return _topmost(path for path in found if not any(_below(need, path) for need in needed))


def exposed(config: Config) -> list[str]:
    """What cannot be hidden, because a workdir, a note or a writable root lies in it."""
    admin = _admin(config)
    needed = _needed(config, admin)
    found = {os.path.realpath(path) for path in _secret(config, admin)}
    return _topmost(path for path in found if any(_below(need, path) for need in needed))


def _secret(config: Config, admin: Mapping[str, Any]) -> Iterator[str]:
    for path in _HOST:
        yield path.format(uid=os.geteuid())
    yield from _of_daemon(config)
    home = str(config.codex.home)
    yield os.path.join(home, f"{PROFILE}.config.toml")
    yield os.path.join(home, "sessions")
    names = [name for name in _names(home) if _is_secret(os.path.join(home, name), name)]
    if not _is_writable(config, admin):
        names += _EXPECTED_IN_HOME
    yield from (os.path.join(home, name) for name in [*names, *_databases(config, admin)])


def _databases(config: Config, admin: Mapping[str, Any]) -> list[str]:
    """Codex's databases by name, with what is there only while one is open.

    Empty if they have to be searched for, which costs each command some time:
    they are not made yet, or it would not do to name what is missing.
    """
    found = [name for name in _names(config.codex.home) if name.endswith(".sqlite")]
    if _is_writable(config, admin):
        return []
    return [name + more for name in found for more in ("", "-wal", "-shm")]


def _is_writable(config: Config, admin: Mapping[str, Any]) -> bool:
    """Whether commands may write into CODEX_HOME.

    In such a place Codex makes a file for a path that is denied and missing, as
    long as a command runs: it would take that file for its own.
    """
    home = os.path.realpath(config.codex.home)
    places = [*_roots(config, admin), "/tmp", os.path.realpath(os.environ.get("TMPDIR", "/tmp"))]
    return any(_below(home, place) for place in places)


def _of_daemon(config: Config) -> Iterator[str]:
    dirs = config.dirs
    for field in dirs.__dataclass_fields__:
        path = getattr(dirs, field)
        secret = field not in _OPEN_DIRECTORIES and isinstance(path, os.PathLike)
        if secret and os.path.lexists(path):
            yield os.fspath(path)
    for name in _names(dirs.ledger.parent):  # those that were rotated away
        if name.startswith(dirs.ledger.name) and os.path.isfile(dirs.ledger.parent / name):
            yield str(dirs.ledger.parent / name)
    # api.env is where the units take keys from.
    for file in (config.http.token_file, dirs.config_file.with_name("api.env")):
        if file and os.path.lexists(file):
            yield str(file)


def _is_secret(path: str, name: str) -> bool:
    if os.path.isdir(path):
        return name not in _OPEN_IN_HOME
    return name.endswith(_FILES_IN_HOME) or name.startswith(".env")


def _roots(config: Config, admin: Mapping[str, Any]) -> list[str]:
    """Where commands may write, besides temporary directories."""
    own = _table(admin, "sandbox_workspace_write").get("writable_roots")
    more = [path for path in own if isinstance(path, str)] if isinstance(own, list) else []
    listed = [*map(str, config.workdirs), str(config.workdir), *map(os.path.expanduser, more)]
    return [os.path.realpath(path) for path in listed if os.path.isabs(path)]


def _needed(config: Config, admin: Mapping[str, Any]) -> list[str]:
    notes = (os.path.expanduser(path) for path in config.memory.paths)
    return [*_roots(config, admin), *(os.path.realpath(p) for p in notes if os.path.isabs(p))]


def _below(path: str, directory: str) -> bool:
    """Whether `path` is `directory` or lies in it."""
    return f"{path}/".startswith(f"{directory.rstrip('/')}/")


def _topmost(paths: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for path in sorted(paths):
        if not any(_below(path, one) for one in kept):
            kept.append(path)
    return kept


def _names(directory: str | os.PathLike[str]) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


# --- the file -------------------------------------------------------------------------


def text(config: Config, env_keys: Iterable[str]) -> str:
    """codexd.config.toml; `env_keys` are the variables that hold keys."""
    admin = _admin(config)
    home = os.path.realpath(config.codex.home)
    denied = hidden(config)
    for path in (home, *denied):
        if _PATTERN.intersection(path):
            raise ValueError(f"{path}: Codex takes * ? [ ] {{ }} in it for a pattern")
    rules = [(path, "deny") for path in denied]
    scan: list[str] = []
    if not _databases(config, admin):
        scan = ["glob_scan_max_depth = 1"]
        rules.append((f"{home}/*.sqlite*", "deny"))
    write = [*rules, *_writable(admin)]
    parts = [
        f'{_HEAD}default_permissions = "{PERMISSIONS}workspace-write"',
        *_tables("read-only", ":read-only", scan, rules),
        *_tables("workspace-write", ":workspace", scan, write),
    ]
    if _table(admin, "sandbox_workspace_write").get("network_access") is True:
        parts.append(f"[permissions.{PERMISSIONS}workspace-write.network]\nenabled = true")
    parts.append("\n".join(["[shell_environment_policy]", *_environment(admin, env_keys)]))
    parts.append(_NO_SNAPSHOT)
    return "\n\n".join(parts) + "\n"


def _tables(
    sandbox: str, parent: str, scan: list[str], rules: list[tuple[str, str]]
) -> tuple[str, str]:
    name = f"permissions.{PERMISSIONS}{sandbox}"
    lines = [f"{_quoted(path)} = {_quoted(access)}" for path, access in rules]
    head = f'[{name}]\nextends = "{parent}"'
    return head, "\n".join([f"[{name}.filesystem]", *scan, *lines])


def _writable(admin: Mapping[str, Any]) -> list[tuple[str, str]]:
    """[sandbox_workspace_write] of config.toml, which does not count with a profile."""
    own = _table(admin, "sandbox_workspace_write")
    roots = own.get("writable_roots")
    rules = [(path, "write") for path in roots] if isinstance(roots, list) else []
    for key, place in (("exclude_slash_tmp", ":slash_tmp"), ("exclude_tmpdir_env_var", ":tmpdir")):
        if own.get(key) is True:
            rules.append((place, "read"))
    return [rule for rule in rules if isinstance(rule[0], str)]


def _environment(admin: Mapping[str, Any], env_keys: Iterable[str]) -> list[str]:
    """Lines of [shell_environment_policy]: the administrator's, and no key in any case.

    A list here takes the place of that in config.toml, a key that is not here
    leaves that of config.toml; `filters` there cannot be mixed with a list.
    """
    own = _table(admin, "shell_environment_policy")
    exclude = own.get("exclude")
    theirs = exclude if isinstance(exclude, list) else []
    names = {*env_keys, *_KEYS, *(name for name in theirs if isinstance(name, str))}
    lines = ["exclude = [" + ", ".join(map(_quoted, sorted(names))) + "]"]
    return ['inherit = "core"', *lines] if not own or "filters" in own else lines


def _quoted(value: str) -> str:
    """A basic string of TOML.  Raises ValueError for what is not UTF-8."""
    value.encode()
    return command.quoted(value)


def _admin(config: Config) -> dict[str, Any]:
    """The administrator's config.toml.  Raises OSError, ValueError."""
    try:
        found = durable.read(os.path.realpath(config.codex.home / "config.toml"), 1 << 20)
    except FileNotFoundError:
        return {}
    try:
        return tomllib.loads(found.decode())
    except RecursionError:
        raise ValueError("config.toml: too deeply nested") from None


def _table(admin: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = admin.get(name)
    return found if isinstance(found, dict) else {}


def write(config: Config, env_keys: Iterable[str]) -> None:
    """Make codexd.config.toml what it must be now.  Raises OSError, ValueError."""
    # Codex makes it too late for its first look into a sandbox.
    os.makedirs(config.codex.home / "sessions", 0o700, exist_ok=True)
    wanted = text(config, env_keys).encode()
    path = config.codex.home / f"{PROFILE}.config.toml"
    try:
        if durable.read(path, len(wanted)) == wanted:
            return
    except (FileNotFoundError, ValueError):
        pass  # it is missing, or longer
    durable.write(path, wanted, 0o600)


# --- whether it can be used ------------------------------------------------------------


def name(sandbox: Sandbox) -> str:
    """The permission profile that takes the place of a sandbox."""
    return PERMISSIONS + sandbox.value


def unused(named: str | None, sandbox: Sandbox) -> str | None:
    """Why a task with a profile of its own or in this sandbox does without ours."""
    if sandbox.value not in canary.SANDBOXES:
        return f"in the sandbox {sandbox.value} commands can read everything"
    if named is not None:
        return f"the profile {named} is used instead of codexd's own, and hides what it hides"
    return None


def too_old(version: Sequence[int]) -> str | None:
    """Why a Codex of this version cannot be told a profile."""
    if command.has_profiles(version):
        return None
    return f"Codex {'.'.join(map(str, version))} has no permission profiles; 0.134 has"


def why_not(config: Config) -> str | None:
    """Why secrets are not hidden from the commands of a task that asks for nothing else.

    None if they are, as far as it is known: the first task tries it.
    """
    why = unused(config.codex.profile, config.codex.sandbox)
    if why is None:
        try:
            open_to_all = exposed(config)
            why = canary.verdict(str(config.codex.home))
        except (OSError, ValueError) as problem:
            return str(problem)
        if why is None and open_to_all:
            listed = ", ".join(open_to_all)
            return (
                f"{listed}: a workdir, a note or a writable root lies there, commands can read it"
            )
    return why
