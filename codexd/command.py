"""How Codex is called: its command lines, its environment, its start.

Every option stands before the word `resume`, the only place where all versions
take them; a thread is continued by its id alone, since Codex starts a new one
for a name it does not know; the environment holds what is listed here and
nothing else of ours.

Part of the room `codex`, which is the door to it.  Leaner than lean: a worker
needs nothing but this to start Codex, and imports the rest while that starts.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

PROFILE = "codexd"  # the file codexd.config.toml in CODEX_HOME; see `profile`
PERMISSIONS = "codexd-"  # begins the names of the permission profiles in it

# SIGHUP, SIGINT, SIGPIPE, SIGTERM: the same on every Linux; `signal` costs 3 ms.
_DEFAULTED = (1, 2, 13, 15)
_GUIDES = ("AGENTS.override.md", "AGENTS.md")

_PASSED = frozenset([
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TERM", "TMPDIR",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "CODEX_API_KEY",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "all_proxy", "no_proxy",
])  # fmt: skip


def is_thread_id(text: str) -> bool:
    """Whether `text` is the id of a Codex thread: a UUID."""
    parts = text.split("-")
    digits = frozenset("0123456789abcdefABCDEF")
    return [len(part) for part in parts] == [8, 4, 4, 4, 12] and digits.issuperset("".join(parts))


def argv(
    binary: str,
    *,
    workdir: str,
    sandbox: str | None,
    model: str | None,
    profile: str | None,
    images: Sequence[str],
    add_dirs: Sequence[str],
    output_schema: str | None,
    last_message_file: str,
    thread: str | None,
    unguided: bool = False,
) -> list[str]:
    """The command line of one turn; the prompt goes to its standard input.

    Paths are absolute.  Sandbox and workdir are said again for a thread that is
    continued: Codex does not remember them.  `sandbox` is one of Codex's, or
    one of our permission profiles, which does not go with another `profile`.
    `unguided`: Codex need not look for an AGENTS.md.
    Raises ValueError for a `thread` that is no id and for an image with a comma
    in its path, which Codex takes for a separator and then silently drops.
    """
    if thread is not None and not is_thread_id(thread):
        raise ValueError(f"{thread!r} is not the id of a Codex thread")
    args = [binary, "exec", "--json", "--color", "never", "--skip-git-repo-check", "-C", workdir]
    ours = sandbox is not None and sandbox.startswith(PERMISSIONS)
    if ours:
        # Said here it beats a sandbox_mode in the admin's config.toml; in the file it would not.
        args += ["-p", PROFILE, "-c", f'default_permissions="{sandbox}"']
        args += ["-c", "project_doc_max_bytes=0"] if unguided else []
    for option, value in (("-s", None if ours else sandbox), ("-p", profile), ("-m", model)):
        args += [] if value is None else [option, value]
    for directory in add_dirs:
        args += ["--add-dir", directory]
    if output_schema is not None:
        args += ["--output-schema", output_schema]
    for image in images:
        if "," in image:
            raise ValueError(f"Codex cannot take an image with a comma in its path: {image}")
        args += ["-i", image]
    # -i takes every word up to the next option: -o must follow it, or it eats
    # `resume` and the turn runs in a new thread.
    args += ["-o", last_message_file]
    return [*args, *(["resume", thread] if thread else []), "-"]


def sandbox_verb(version: Sequence[int]) -> list[str]:
    """How a Codex of this version is told to run a command in its sandbox.

    Before 0.134 it wanted the system's name besides, and knew neither `-p` nor, with
    that, permission profiles (tried with 0.133).
    """
    return ["sandbox"] if has_profiles(version) else ["sandbox", "linux"]


def has_profiles(version: Sequence[int]) -> bool:
    return tuple(version) >= (0, 134)


def sandboxed(
    binary: str,
    verb: Sequence[str],
    *,
    sandbox: str,
    profile: str | None,
    command: Sequence[str],
    write: Sequence[str] = (),
) -> list[str]:
    """The command line that runs `command` as Codex runs those of its model.

    `verb` is `sandbox_verb`'s; `sandbox` and `profile` are those of `argv`; `write` are
    paths that one of our permission profiles is to open besides, even where it denies or
    only reads them.

    The sandbox is always said: without a word it is read-only, whatever config.toml
    says.  Of the environment only what Codex calls core is passed on, and what the
    configuration sets: not what Codex itself reads from CODEX_HOME/.env.
    """
    if sandbox.startswith(PERMISSIONS):
        args = ["-p", PROFILE, "-c", f'default_permissions="{sandbox}"']
        if write:
            rules = ", ".join(f'{quoted(path)} = "write"' for path in write)
            args += ["-c", f"permissions.{sandbox}.filesystem={{{rules}}}"]
    else:
        named = ["-p", profile] if profile and list(verb) == ["sandbox"] else []
        args = [*named, "-c", f'sandbox_mode="{sandbox}"']
    core = 'shell_environment_policy.inherit="core"'
    return [binary, *verb, *args, "-c", core, "--", *command]


def quoted(text: str) -> str:
    """A basic string of TOML."""
    import json  # costs a worker's start too much

    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def is_unguided(workdir: str, home: str) -> bool:
    """Whether there is no AGENTS.md for Codex to find from `workdir` up.

    With a permission profile it looks for them by a sandboxed process each, which
    takes longer than all the rest that Codex does.
    """
    try:
        # What is no file there is for Codex to complain of; not to be waited for.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(os.path.join(home, "config.toml"), flags), "rb") as file:
            if b"project_doc_fallback_filenames" in file.read(1 << 20):
                return False  # they may have other names
    except OSError:
        pass  # the usual names, then
    place, above = workdir, os.path.dirname(workdir)
    while not any(os.path.lexists(os.path.join(place, name)) for name in _GUIDES):
        if place == above:
            return True
        place, above = above, os.path.dirname(above)
    return False


def environment(base: Mapping[str, str], home: str, extra_names: Iterable[str]) -> dict[str, str]:
    """What Codex may know of the environment `base`; CODEX_HOME is `home`.

    `extra_names` are the variables that the admin's config.toml takes keys from.
    A TMPDIR that CODEX_HOME lies below is left out: Codex refuses to put its
    helpers there.
    """
    passed = _PASSED.union(extra_names)
    env = {k: v for k, v in base.items() if k in passed or k.startswith("LC_")}
    if "TMPDIR" in env:
        scratch = os.path.realpath(env["TMPDIR"]).rstrip("/") + "/"
        if (os.path.realpath(home) + "/").startswith(scratch):
            del env["TMPDIR"]
    env["CODEX_HOME"] = home
    return env


def ending(orders: Mapping[str, Any], argv: list[str]) -> list[str]:
    """`argv`, which ends with the worker if that is killed: it must not go on unseen."""
    setpriv = orders.get("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--", *argv] if setpriv else argv


def spawn(argv: list[str], env: Mapping[str, str], stdin: int) -> tuple[int, int, int]:
    """Start a process in a group of its own: its pid, and what to read its output and its
    errors from.  `stdin` is closed here.  Raises OSError."""
    out, child_out = os.pipe2(os.O_CLOEXEC)
    err, child_err = os.pipe2(os.O_CLOEXEC)
    pid = os.posix_spawn(
        argv[0],
        argv,
        env,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, stdin, 0),
            (os.POSIX_SPAWN_DUP2, child_out, 1),
            (os.POSIX_SPAWN_DUP2, child_err, 2),
        ],
        setpgroup=0,
        setsigdef=_DEFAULTED,
    )
    for fd in (stdin, child_out, child_err):
        os.close(fd)
    return pid, out, err
