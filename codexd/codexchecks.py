"""What `codexd doctor` looks at: Codex, its login, its sandbox.

As in `checks`.  Whatever is run runs as the user of the service: that user may have
written it.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import tempfile
from pathlib import Path

from codexd import codex, command, profile
from codexd.checks import Findings, Host, become, fail, ok, said, warn
from codexd.config import Config

_ALWAYS = "CODEX_API_KEY"
_SYSCTL = Path("/proc/sys")
# What keeps a user from making namespaces: the kernel's setting, what it is then, and must be.
_NAMESPACES = {
    "kernel.apparmor_restrict_unprivileged_userns": ("1", "0"),
    "kernel.unprivileged_userns_clone": ("0", "1"),
    "user.max_user_namespaces": ("0", "10000"),
}


def cli(host: Host) -> Findings:
    """Codex itself."""
    try:
        found = host.codex
        if host.user is None:
            yield ok(f"Codex: {found}; its version is asked as user codexd")
            return
        version = _version(found, host.user)
    except codex.Missing as missing:
        yield fail(str(missing), "npm install -g @openai/codex, or codex.bin in codexd.yaml")
        return
    yield ok(f"Codex {'.'.join(map(str, version))}: {found}")


def _version(binary: str, user: pwd.struct_passwd) -> tuple[int, ...]:
    """Raises codex.Missing."""
    env = {**codex.environment(os.environ, "/nonexistent", []), "HOME": user.pw_dir}
    return codex.version(binary, env, cwd="/", **become(user))


def rg(host: Host) -> Findings:
    try:
        package = Path(os.path.realpath(host.codex)).parent.parent
    except codex.Missing:
        package = Path("/nonexistent")
    found = shutil.which("rg", path=host.path) or shutil.which("rg", path=package / "codex-path")
    if found:
        yield ok(f"notes are searched by {found}")
    else:
        yield warn("there is no rg: notes are searched by slower means", "apt install ripgrep")


def login(host: Host) -> Findings:
    """Whether Codex has a login, or a key where workers get it from."""
    home = host.config.codex.home
    try:
        wanted = codex.env_keys(codex.configuration(home))
    except FileNotFoundError:
        wanted = []
    except ValueError as error:
        yield fail(f"{home}/config.toml: {error}", "mend that line")
        return
    names = {_ALWAYS, *wanted}
    there = _keys(host.keys_file) & names if host.units else names & os.environ.keys()
    where = host.keys_file if host.units else "the environment of codexd serve"
    if (home / "auth.json").is_file():
        yield ok(f"Codex is logged in ({home}/auth.json)")
    elif there:
        yield ok(f"{', '.join(sorted(there))} is set in {where}")
    else:
        what = f"neither a login in {home} nor {' or '.join(sorted(names))} in {where}"
        yield fail(what, log_in(host.config, host.path))


def log_in(config: Config, path: str) -> str:
    """The command for it.  Codex need not be on PATH: not where pip has put it."""
    try:
        program = codex.find(config.codex.bin, path)
    except codex.Missing:
        program = "codex"
    prefix = "runuser -u codexd -- env " if config.dirs.systemwide else ""
    return f"{prefix}CODEX_HOME={shlex.quote(str(config.codex.home))} {shlex.quote(program)} login"


def _keys(file: Path) -> set[str]:
    """The variables that an EnvironmentFile= sets.  Raises OSError when it is not for us."""
    try:
        lines = file.read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return set()
    split = (line.partition("=") for line in lines if not line.lstrip().startswith(("#", ";")))
    return {name.strip() for name, _, value in split if value.strip()}


def sandbox(host: Host) -> Findings:
    """Codex's sandbox, tried now; a broken one is not told by a turn."""
    if (user := host.user) is None:
        return
    try:
        found = host.codex
        verb = command.sandbox_verb(_version(found, user))
    except codex.Missing:
        return
    with tempfile.TemporaryDirectory(prefix="codexd-doctor-") as place:
        options = become(user)
        if options:
            os.chown(place, user.pw_uid, user.pw_gid)
        env = {**codex.environment(os.environ, place, []), "HOME": place}
        status, text = said([found, *verb, "--", "true"], env=env, cwd=place, **options)
    if status == 0:
        yield ok(f"Codex's sandbox works for {user.pw_name}")
    else:
        why = " ".join(text.split())[:300]
        yield fail(f"Codex's sandbox does not work for {user.pw_name}: {why}", namespaces(_SYSCTL))


def namespaces(settings: Path) -> str:
    """What lets users make namespaces, by the kernel's settings."""
    orders = []
    for name, (bad, good) in _NAMESPACES.items():
        file = settings / name.replace(".", "/")
        if file.exists() and file.read_text().strip() == bad:
            orders.append(f"sysctl -w {name}={good}")
    text = "; ".join(orders) or "let users make namespaces"
    lasting = ", and the same in /etc/sysctl.d" if orders else ""
    if any("apparmor" in order for order in orders):
        lasting += "; or give Codex an AppArmor profile"
    return f"{text}{lasting}: see CAVEATS in codexd(7)"


def secrets(host: Host) -> Findings:
    """Whether commands of the model are kept from what they must not read."""
    why = profile.why_not(host.config)
    if why is None and host.user:
        try:
            why = profile.too_old(_version(host.codex, host.user))
        except codex.Missing:
            return
    if why:
        mend = "see SECURITY CONSIDERATIONS in codexd(7)"
        yield warn(f"commands of the model can read secrets: {why}", mend)
    else:
        yield ok("secrets are kept from commands of the model by a permission profile")
