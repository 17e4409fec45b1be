"""The Codex CLI: where it is and how it is called.

This room is all that knows the CLI.  Its door is this file; behind it are
`command` (how it is called), `events` (what it prints), `rollout` (what it
leaves in CODEX_HOME), `verdict` (what that comes to) and `quota` (when to try
again).  It starts nothing itself but `codex --version`.

May fail with `Missing` or `TooOld` when there is no Codex to call, and with
ValueError for an argument that Codex could only misunderstand.
Lean: the worker uses it.
"""

from __future__ import annotations

import os
import re

from codexd import durable
from codexd.command import argv, environment, is_thread_id
from codexd.events import Reader
from codexd.quota import retry_at
from codexd.rollout import (
    Meter,
    all_rollouts,
    rollout_message,
    rollouts,
    spent,
    tokens,
)
from codexd.verdict import classify, is_corrupt, is_general, judge, sentence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = [
    "MINIMUM",
    "Meter",
    "Missing",
    "Reader",
    "TooOld",
    "all_rollouts",
    "argv",
    "classify",
    "env_keys",
    "environment",
    "find",
    "is_corrupt",
    "is_general",
    "is_thread_id",
    "judge",
    "retry_at",
    "rollout_message",
    "rollouts",
    "sentence",
    "spent",
    "tokens",
    "version",
]

MINIMUM = (0, 130, 0)  # older ones exit 0 on failure or lose threads silently
_INSTALL = (
    "install it with `pip install openai-codex-cli-bin` or `npm install -g @openai/codex`,"
    " or set codex.bin in codexd.yaml to its path"
)

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"


class Missing(Exception):
    """There is no Codex that can be run; the text tells a person what to do."""


class TooOld(Missing):
    """There is one, and it is older than MINIMUM."""


# --- finding it ---------------------------------------------------------------


def find(configured: str, path: str | None) -> str:
    """The absolute path of the Codex binary.

    `configured` is codex.bin: a path, or a name that is looked up on `path`
    (the value of PATH; None: the usual directories).  A plain "codex" that is
    not there is taken from the installed package `codex_cli_bin`.
    Raises Missing.
    """
    if "/" in configured:
        found = os.path.abspath(os.path.expanduser(configured))
        if not _runs(found):
            raise Missing(f"{found} (codex.bin) is not an executable file; {_INSTALL}")
        return _native(found)
    for directory in (path or os.defpath).split(os.pathsep):
        # An empty or relative entry would run what lies in a task's workdir.
        found = os.path.join(directory, configured)
        if os.path.isabs(directory) and _runs(found):
            return _native(found)
    if configured == "codex" and (packaged := _packaged()):
        return packaged
    raise Missing(f"Codex is not installed: no {configured!r} on PATH; {_INSTALL}")


def _runs(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def _packaged() -> str | None:
    from importlib.util import find_spec

    spec = find_spec("codex_cli_bin")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        found = os.path.join(place, "bin", "codex")
        if _runs(found):
            return os.path.abspath(found)
    return None


def _native(found: str) -> str:
    """The native binary that an npm wrapper would start, else `found` itself.

    The wrapper costs a node process, and a SIGKILL of it leaves Codex running.
    """
    wrapper = os.path.realpath(found)
    if not wrapper.endswith(".js"):
        return found
    package = os.path.dirname(os.path.dirname(wrapper))  # node_modules/@openai/codex
    machine = os.uname().machine
    for scope in (os.path.join(package, "node_modules/@openai"), os.path.dirname(package)):
        for name in [*_names(scope, "codex-linux-"), os.path.basename(package)]:
            vendor = os.path.join(scope, name, "vendor")
            for triple in _names(vendor, machine + "-"):
                for tail in ("bin/codex", "codex/codex"):
                    if _runs(native := os.path.join(vendor, triple, tail)):
                        return native
    return found


def _names(directory: str, prefix: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if name.startswith(prefix))
    except OSError:
        return []  # not this layout


def version(
    binary: str, env: Mapping[str, str], wait: float = 10, **become: Any
) -> tuple[int, int, int]:
    """The version of `binary`, asked from it within `wait` seconds.

    `become` is for subprocess: whom it is run as, where that is not us.
    Raises Missing or TooOld.
    """
    import subprocess

    try:
        ran = subprocess.run(
            [binary, "--version"],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=wait,
            **become,
        )
    except subprocess.TimeoutExpired:
        text = f"{binary} --version did not answer within {wait:g} s"
        raise Missing(f"{text}; {_INSTALL}") from None
    except OSError as error:
        raise Missing(f"{binary} cannot be run: {error.strerror}; {_INSTALL}") from error
    said = sentence(ran.stdout[:4096].decode("utf-8", "replace"))
    number = re.search(r"\b(\d{1,6})\.(\d{1,6})\.(\d{1,6})", said)
    if ran.returncode != 0 or number is None:
        raise Missing(f"{binary} is no Codex: --version said {said[:200]!r}; {_INSTALL}")
    found = (int(number[1]), int(number[2]), int(number[3]))
    if found < MINIMUM:
        raise TooOld(
            f"{binary} is Codex {number[0]}, older than {'.'.join(map(str, MINIMUM))};"
            f" upgrade it: {_INSTALL}"
        )
    return found


# --- its configuration ---------------------------------------------------------


def configuration(home: str | os.PathLike[str]) -> str:
    """The text of config.toml in CODEX_HOME.  Raises OSError, ValueError."""
    try:
        return durable.read(os.path.join(home, "config.toml"), 1 << 20, follow=True).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start}: not UTF-8") from error


def env_keys(config_toml_text: str) -> list[str]:
    """The variables that the model providers of a config.toml take secrets from.

    Raises ValueError, with the place, for a text that is not TOML.
    """
    import tomllib

    try:
        config = tomllib.loads(config_toml_text)
    except RecursionError:
        raise ValueError("the file is nested too deeply") from None
    providers = config.get("model_providers")
    names: list[Any] = []
    for provider in providers.values() if isinstance(providers, dict) else ():
        if isinstance(provider, dict):
            names.append(provider.get("env_key"))
            headers = provider.get("env_http_headers")
            names += headers.values() if isinstance(headers, dict) else ()
    return sorted({n for n in names if isinstance(n, str) and re.fullmatch(_NAME, n)})
