"""codexd.yaml and the directories: defaults, every key, and every kind of mistake."""

from __future__ import annotations

import math
import os
import pwd
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from codexd import config, spool
from codexd.config import Config, ConfigError, Directories, Launcher, find, load
from codexd.delivery import Occasion
from codexd.document import parse_yaml
from codexd.master import Master
from codexd.model import Sandbox
from codexd.service import Service

EXAMPLE = Path(__file__).parent.parent / "config" / "codexd.yaml"


@pytest.fixture
def dirs(tmp_path: Path) -> Directories:
    """Those of a user, so that `launcher` is free; nothing in them exists."""
    return Directories.user({"HOME": str(tmp_path)})


def read(dirs: Directories, text: str | bytes) -> Config:
    dirs.config_file.parent.mkdir(parents=True, exist_ok=True)
    dirs.config_file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(dirs, explicit=True)


def mistake(dirs: Directories, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(dirs, text)
    return (
        str(caught.value).replace(str(dirs.config_file), "FILE").replace(str(dirs.state), "STATE")
    )


# --- defaults --------------------------------------------------------------------


def test_without_a_file_the_defaults_hold(dirs: Directories) -> None:
    found = load(dirs, explicit=False)
    assert found.workers == 4
    assert found.launcher is Launcher.AUTO
    assert found.workdir == dirs.state / "work"
    assert found.workdirs == (dirs.state / "work",)
    assert (found.timeout, found.idle_timeout, found.attempts) == (3600.0, 600.0, 3)
    assert (found.codex.bin, found.codex.home) == ("codex", dirs.state / "codex")
    assert (found.codex.model, found.codex.profile) == (None, None)
    assert found.codex.sandbox is Sandbox.WORKSPACE_WRITE
    assert found.memory.paths == ("MEMORY.md", "memory")
    assert (found.memory.hits, found.memory.chars) == (20, 4000)
    assert found.prompt.header == ""
    assert "one final message" in found.prompt.policy
    assert (found.http.listen, found.http.token_file) == (dirs.http_socket, None)
    assert (found.retry.base, found.retry.cap) == (10.0, 600.0)
    assert found.limits.file == 1024**2
    assert found.limits.queue == 10_000
    assert found.limits.disk_free == 64 * 1024**2
    assert (found.limits.task_tokens, found.limits.day_tokens) == (None, None)
    assert found.retention == config.RetentionConfig(*[90 * 86400.0] * 3)
    assert not dirs.state.exists(), "nothing is created"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "---\n",
        "codex:\nmemory: {}\nretry: null\n",
        "workers: null\ncodex: {model: null}\nworkdirs: null\n",
    ],
)
def test_a_file_without_values_is_the_defaults(dirs: Directories, text: str) -> None:
    defaults = load(dirs, explicit=False)
    assert read(dirs, text) == defaults


def test_a_named_file_must_be_there(dirs: Directories) -> None:
    with pytest.raises(ConfigError) as caught:
        load(dirs, explicit=True)
    assert str(caught.value) == f"{dirs.config_file}: cannot be read: No such file or directory"


def test_a_link_to_a_file_that_is_not_there_is_no_wish_for_the_defaults(dirs: Directories) -> None:
    """As where it lies on a disk that is not mounted."""
    dirs.config_file.parent.mkdir(parents=True, exist_ok=True)
    dirs.config_file.symlink_to(dirs.state / "elsewhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load(dirs, explicit=False)


# --- the example and the list of keys ----------------------------------------------


def uncommented() -> str:
    """The example with its commented defaults active."""
    return re.sub(r"^( *)#(?=[a-z_]+:)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)


def names(values: object, above: str = "") -> list[str]:
    if not isinstance(values, dict):
        return [above]
    return [
        name for key, value in values.items() for name in names(value, f"{above}.{key}".lstrip("."))
    ]


def test_the_example_is_the_defaults() -> None:
    system = replace(Directories.system(), config_file=EXAMPLE)
    defaults = load(replace(system, config_file=Path("/nonexistent/codexd.yaml")), explicit=False)
    assert replace(load(system, explicit=True), dirs=defaults.dirs) == defaults


def test_the_example_with_everything_active_is_the_defaults_of_the_system(tmp_path: Path) -> None:
    file = tmp_path / "codexd.yaml"
    file.write_text(uncommented())
    system = replace(Directories.system(), config_file=file)
    defaults = load(replace(system, config_file=Path("/nonexistent/codexd.yaml")), explicit=False)
    assert replace(load(system, explicit=True), dirs=defaults.dirs) == defaults


def test_the_example_has_every_key_and_no_other() -> None:
    assert names(parse_yaml(uncommented()).values) == config.keys()


def test_keys_are_the_fields_of_config(dirs: Directories) -> None:
    found = load(dirs, explicit=False)
    known = []
    for field in fields(found):
        value = getattr(found, field.name)
        if is_dataclass(value) and field.name != "dirs":
            known += [f"{field.name}.{inner.name}" for inner in fields(value)]
        elif field.name == "on":
            known += [f"on.{occasion}" for occasion in Occasion]
        elif field.name != "dirs":
            known.append(field.name)
    assert known == config.keys()


# --- values ------------------------------------------------------------------------


def test_every_key(dirs: Directories, tmp_path: Path) -> None:
    found = read(
        dirs,
        """\
workers: 64
launcher: process
workdir: src/website/
workdirs: [src, /srv/build, ~/code]
timeout: 90
idle_timeout: 1.5m
attempts: 20
codex:
  bin: /opt/codex
  home: ../codex-home
  model: openai/gpt-5.5:high
  profile: work
  sandbox: read-only
memory: {paths: [/srv/notes, notes/../MEMORY.md], hits: 1, chars: 100}
prompt:
  header: |
    Two
    lines
  policy: ""
http: {listen: '[::1]:8080', token_file: token}
retry: {base: 1s, cap: 1d}
limits: {file: 512K, queue: 1, disk_free: 2G, task_tokens: 1000, day_tokens: 50000}
retention: {answers: 1h, archive: never, rejected: 1d}
""",
    )
    state = dirs.state
    assert (found.workers, found.launcher) == (64, Launcher.PROCESS)
    assert found.workdir == state / "src/website"
    home = Path(os.path.expanduser("~"))
    assert found.workdirs == (state / "src", Path("/srv/build"), home / "code")
    assert (found.timeout, found.idle_timeout, found.attempts) == (90.0, 90.0, 20)
    assert (found.codex.bin, found.codex.home) == ("/opt/codex", state.parent / "codex-home")
    assert (found.codex.model, found.codex.profile) == ("openai/gpt-5.5:high", "work")
    assert found.codex.sandbox is Sandbox.READ_ONLY
    assert found.memory.paths == ("/srv/notes", "notes/../MEMORY.md"), "as written"
    assert (found.memory.hits, found.memory.chars) == (1, 100)
    assert (found.prompt.header, found.prompt.policy) == ("Two\nlines\n", "")
    assert (found.http.listen, found.http.token_file) == (("::1", 8080), state / "token")
    assert (found.retry.base, found.retry.cap) == (1.0, 86400.0)
    assert (found.limits.file, found.limits.queue) == (524288, 1)
    assert found.limits.disk_free == 2 * 1024**3
    assert (found.limits.task_tokens, found.limits.day_tokens) == (1000, 50_000)
    assert found.retention == config.RetentionConfig(3600.0, math.inf, 86400.0)


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("off", None),
        ("'off'", None),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
    ],
)
def test_listen(dirs: Directories, listen: str, address: tuple[str, int] | None) -> None:
    found = read(dirs, f"http:\n  listen: {listen}\n  token_file: /x\n")
    assert found.http.listen == address


def test_home_and_memory(dirs: Directories) -> None:
    found = read(dirs, "codex: {bin: ~/bin/codex, home: ~}\nmemory: {paths: []}\n")
    home = os.path.expanduser("~")
    assert (found.codex.bin, str(found.codex.home)) == (f"{home}/bin/codex", home)
    assert found.memory.paths == ()


def test_a_byte_order_mark_and_crlf_are_tolerated(dirs: Directories) -> None:
    assert read(dirs, b"\xef\xbb\xbfworkers: 2\r\n\r\nattempts: 5\r\n").workers == 2
    assert mistake(dirs, b"\xef\xbb\xbfworkers: 2\r\n\r\nattempts: x\r\n").startswith("FILE:3: ")


def test_root_means_child_processes(tmp_path: Path) -> None:
    dirs = Directories.below(tmp_path)
    assert load(dirs, explicit=False).launcher is Launcher.PROCESS
    assert read(dirs, "launcher: auto\n").launcher is Launcher.PROCESS


# --- mistakes ----------------------------------------------------------------------

TOP = (
    "workers, launcher, workdir, workdirs, workdir_sharing, timeout, idle_timeout, attempts, "
    "codex, memory, prompt, http, retry, limits, retention, on"
)
WHOLE = "a whole number from"
DURATION = "such as 90s, 30m or 2h"
LIST = "a list of at most 50, such as [a, b]"
NAME = "1 to 100 of A-Z a-z 0-9 . _ : / -, not beginning with -"
CODEX = "bin, home, model, profile, sandbox"
SANDBOX = "read-only, workspace-write, danger-full-access"
SIZE = "such as 512K, 64M or 1G"
YAML = "not valid YAML: mapping values are not allowed here; quote a value that contains ': '"
ADDRESS = "unix, off, 127.0.0.1:PORT or '[::1]:PORT'"
PATH = "a path: absolute, relative or ~/..., at most 4096 bytes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wokers: 4", f":1: wokers: unknown key (did you mean workers?); allowed: {TOP}"),
        (
            "\nretention: {answers: 90d, archive: 59m}",
            ":2: retention.archive: found '59m'; allowed: never, or a duration from 1h to 36500d, "
            f"{DURATION}",
        ),
        (
            "limits: {day_tokens: 0}",
            f":1: limits.day_tokens: found '0'; allowed: {WHOLE} 1 to 1{'0' * 15}",
        ),
        (
            "on: {done: mail}",
            ":1: on.done: found 'mail'; allowed: the absolute path of a program, and its "
            "arguments; no shell reads them",
        ),
        (
            "on: {ended: /bin/mail}",
            ":1: on.ended: unknown key (did you mean opened?); allowed: done, failed, cancelled, "
            "rejected, closed, opened",
        ),
        (
            "codex:\n  binary: x",
            f":2: codex.binary: unknown key (did you mean bin?); allowed: {CODEX}",
        ),
        ("workers: 4\nworkers: 5", ":2: workers: duplicate key, line 1 has it"),
        ("workers: 0", f":1: workers: found '0'; allowed: {WHOLE} 1 to 64"),
        ("workers: four", f":1: workers: found 'four'; allowed: {WHOLE} 1 to 64"),
        ("workers:", f":1: workers: found no value; allowed: {WHOLE} 1 to 64"),
        ("workers: [4]", f":1: workers: found a list; allowed: {WHOLE} 1 to 64"),
        ("launcher: docker", ":1: launcher: found 'docker'; allowed: auto, systemd, process"),
        (
            "timeout: 12:30:45",
            f":1: timeout: found '12:30:45'; allowed: a duration from 1s to 24h, {DURATION}",
        ),
        ("timeout: 2d", f":1: timeout: found '2d'; allowed: a duration from 1s to 24h, {DURATION}"),
        ("attempts: 21", f":1: attempts: found '21'; allowed: {WHOLE} 1 to 20"),
        ("codex: fast", f":1: codex: found 'fast'; allowed: a mapping of {CODEX}"),
        (
            "codex: {sandbox: full}",
            f":1: codex.sandbox: found 'full'; allowed: {SANDBOX}",
        ),
        ("codex: {model: a b}", f":1: codex.model: found 'a b'; allowed: {NAME}"),
        ("codex: {home: ~nobody/x}", f":1: codex.home: found '~nobody/x'; allowed: {PATH}"),
        ("memory: {paths: MEMORY.md}", f":1: memory.paths: found 'MEMORY.md'; allowed: {LIST}"),
        ("memory:\n  paths:\n  - a\n  - ''", f":4: memory.paths item 2: found ''; allowed: {PATH}"),
        ("memory: {hits: 201}", f":1: memory.hits: found '201'; allowed: {WHOLE} 1 to 200"),
        ("http: {listen: 0.0.0.0:80}", f":1: http.listen: found '0.0.0.0:80'; allowed: {ADDRESS}"),
        (
            "http: {listen: 127.0.0.1:65536}",
            f":1: http.listen: found '127.0.0.1:65536'; allowed: {ADDRESS}",
        ),
        (
            "http:\n  listen: 127.0.0.1:80",
            ":2: http.token_file: missing; allowed: a file with the token that TCP needs",
        ),
        (
            "retry: {base: 2h}",
            f":1: retry.base: found '2h'; allowed: a duration from 1s to 1h, {DURATION}",
        ),
        ("retry:\n  base: 30m", ":1: retry.cap: less than retry.base; allowed: from 1800s to 24h"),
        (
            "limits: {file: 1MB}",
            f":1: limits.file: found '1MB'; allowed: a size from 1K to 8M, {SIZE}",
        ),
        (
            "limits: {file: 9M}",
            f":1: limits.file: found '9M'; allowed: a size from 1K to 8M, {SIZE}",
        ),
        ("limits: {queue: 0}", f":1: limits.queue: found '0'; allowed: {WHOLE} 1 to 1000000"),
        ("workdir: /srv", ":1: workdir: found '/srv'; allowed: below workdirs, 'STATE/work'"),
        (
            "workdir: work/../../x",
            ":1: workdir: found 'STATE/../x'; allowed: below workdirs, 'STATE/work'",
        ),
        (
            "workers: 1\nworkdirs: [/srv/a, /srv/b]",
            ":2: workdir: found 'STATE/work'; allowed: below workdirs, '/srv/a' or '/srv/b'",
        ),
        (
            "workdirs: [work2]",
            ":1: workdir: found 'STATE/work'; allowed: below workdirs, 'STATE/work2'",
        ),
        (
            "workdirs: []",
            ":1: workdir: found 'STATE/work'; allowed: below workdirs, none: it is empty",
        ),
        ("- a", ":1: found a list; allowed: keys with their values"),
        ("workers: *x", ":1: aliases, anchors and tags are not allowed; quote *, & or !"),
        ("a: b: c", f":1: {YAML}"),
        (b"workers: 1\n# caf\xe9", ":2: not UTF-8; save the file as UTF-8"),
        (b"#" * (1 << 20) + b"\n", ": larger than 1048576 bytes"),
        (b"workers: 1\nx: \0", ":2: not valid YAML: character U+0000"),
    ],
)
def test_mistakes(dirs: Directories, text: str | bytes, message: str) -> None:
    message = message.replace("STATE/../x", str(dirs.state.parent / "x"))
    assert mistake(dirs, text) == f"FILE{message}"


def test_a_file_that_cannot_be_read(dirs: Directories) -> None:
    dirs.config_file.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"codexd\.yaml: cannot be read: Is a directory$"):
        load(dirs, explicit=False)


# --- directories -------------------------------------------------------------------


def test_below_a_root() -> None:
    dirs = Directories.below(Path("/srv/c"))
    assert {f.name: str(getattr(dirs, f.name)) for f in fields(dirs)} == {
        "config_file": "/srv/c/codexd.yaml",
        "state": "/srv/c",
        "run": "/srv/c/run",
        "inbox": "/srv/c/inbox",
        "rejected": "/srv/c/rejected",
        "answers": "/srv/c/answers",
        "schedules": "/srv/c/schedules",
        "ledger": "/srv/c/tasks.md",
        "checkpoint": "/srv/c/checkpoint.json",
        "lock": "/srv/c/lock",
        "tasks": "/srv/c/tasks",
        "archive": "/srv/c/archive",
        "sessions": "/srv/c/sessions",
        "transcripts": "/srv/c/transcripts",
        "keys": "/srv/c/keys",
        "usage": "/srv/c/usage",
        "work": "/srv/c/work",
        "codex_home": "/srv/c/codex",
        "http_socket": "/srv/c/run/http.sock",
        "exits": "/srv/c/run/exits",
        "limits": "/srv/c/run/limits",
        "hooks": "/srv/c/run/hooks",
        "heartbeat": "/srv/c/run/heartbeat",
        "rooted": "True",
        "systemwide": "False",
    }


def test_of_the_system() -> None:
    dirs = Directories.system()
    assert str(dirs.config_file) == "/etc/codexd/codexd.yaml"
    assert str(dirs.inbox) == "/var/spool/codexd/inbox"
    assert str(dirs.schedules) == "/var/spool/codexd/schedules"
    assert str(dirs.ledger) == "/var/lib/codexd/tasks.md"
    assert str(dirs.codex_home) == "/var/lib/codexd/codex"
    assert str(dirs.http_socket) == "/run/codexd/http.sock"
    assert str(dirs.exits) == "/run/codexd/exits"
    assert not dirs.rooted


@pytest.mark.parametrize(
    ("env", "config_file", "inbox", "socket"),
    [
        (
            {"HOME": "/h"},
            "/h/.config/codexd/codexd.yaml",
            "/h/.local/state/codexd/inbox",
            "/h/.local/state/codexd/run/http.sock",
        ),
        (
            {"HOME": "/h", "XDG_RUNTIME_DIR": "/run/user/7"},
            "/h/.config/codexd/codexd.yaml",
            "/h/.local/state/codexd/inbox",
            "/run/user/7/codexd/http.sock",
        ),
        (
            {"HOME": "/h", "XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "x"},
            "/c/codexd/codexd.yaml",
            "/s/codexd/inbox",
            "/s/codexd/run/http.sock",
        ),
    ],
)
def test_of_a_user(env: dict[str, str], config_file: str, inbox: str, socket: str) -> None:
    dirs = Directories.user(env)
    assert [str(dirs.config_file), str(dirs.inbox)] == [config_file, inbox]
    assert str(dirs.http_socket) == socket


def test_of_a_user_without_a_home() -> None:
    home = Path(pwd.getpwuid(os.geteuid()).pw_dir)
    assert Directories.user({}).config_file == home / ".config/codexd/codexd.yaml"
    assert Directories.user({"HOME": "relative"}).state == home / ".local/state/codexd"


def test_find() -> None:
    env = {"HOME": "/h"}
    nameless = 4_000_000_000
    assert find(None, None, env, 0) == Directories.system()
    assert find(None, None, env, nameless) == Directories.user(env)
    assert find(Path("/srv/c"), None, env, 0) == Directories.below(Path("/srv/c"))
    assert find(Path("c"), None, env, 0).state == Path.cwd() / "c"
    moved = find(Path("/srv/c"), Path("x/my.yaml"), env, 0)
    assert moved == replace(
        find(Path("/srv/c"), None, env, 0), config_file=Path.cwd() / "x/my.yaml"
    )


def test_an_ordinary_user_has_xdg_paths() -> None:
    uid = next(
        entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid and entry.pw_name != "codexd"
    )
    assert find(None, None, {"HOME": "/h"}, uid) == Directories.user({"HOME": "/h"})


# --- read again ---------------------------------------------------------------------------


def test_every_room_goes_by_what_was_read_again(tmp_path: Path) -> None:
    dirs = Directories.below(tmp_path)
    spool.prepare(dirs)
    dirs.config_file.write_text("http:\n  listen: off\n")
    first = config.load(dirs, explicit=False)
    master = Master(first, Service("test"), lambda: config.load(dirs, explicit=False), True)
    dirs.config_file.write_text("http:\n  listen: off\ncodex:\n  home: /elsewhere\n")
    assert master.reload()
    rooms = [master]
    for room in rooms:
        ours = [v for v in vars(room).values() if type(v).__module__.startswith("codexd.")]
        rooms += [v for v in ours if hasattr(v, "__dict__") and v not in rooms]
    found = {type(room).__name__: room.config for room in rooms if hasattr(room, "config")}
    assert {"Master", "Finish", "Evidence", "Keeper", "Orders", "Hooks"} <= found.keys()
    assert [name for name, used in found.items() if used is first] == []
    master.ledger.close()
