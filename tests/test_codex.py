"""Calling Codex: finding it, its command line, its environment, what it leaves.

The command line is given to the real CLI here; how it behaves when it answers is
tests/test_worker.py's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import codex_cli_bin
import pytest

from codexd import codex
from codexd import rollout as rollouts
from codexd.outcome import Outcome
from tests.daemon import uncovered
from tests.recordings import SAMPLES

THREAD = "01a20764-f8e0-7b00-88dd-8abdee9d7bb9"
OTHER = "01a20764-f8e0-7b00-88dd-8abdee9d7bba"
REAL = codex_cli_bin.bundled_codex_path()
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c02"
    "0000000b4944415478da6364f80f00010501012718e3660000000049454e44ae426082"
)


def program(path: Path, text: str = "#!/bin/sh\necho codex-cli 0.163.0\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


# --- finding it ---------------------------------------------------------------


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    there = program(tmp_path / "my codex")
    assert codex.find(there, None) == there
    assert codex.find(os.path.relpath(there), None) == there


def test_a_name_is_looked_up_on_path_in_order(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "codex").write_text("not executable")
    (tmp_path / "b" / "codex").mkdir(parents=True)
    first = program(tmp_path / "c" / "codex")
    program(tmp_path / "d" / "codex")
    path = ":".join(str(tmp_path / name) for name in "abcd")
    assert codex.find("codex", path) == first


def test_the_working_directory_is_never_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "evil")
    program(tmp_path / "bin" / "evil")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(codex.Missing):
        codex.find("evil", "::.:bin")


def test_the_installed_package_comes_last(tmp_path: Path) -> None:
    assert codex.find("codex", str(tmp_path)) == str(REAL)
    assert "codex_cli_bin" not in _imported_by("from codexd.codex import find; find('codex', '')")
    with pytest.raises(codex.Missing, match="no 'codx' on PATH"):
        codex.find("codx", str(tmp_path))


def _imported_by(code: str) -> set[str]:
    told = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        cwd=Path(codex.__file__).parent.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return set(told.stdout.split())


def test_missing_says_how_to_install(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nothing"), str(tmp_path), "nothing-of-this-name"):
        with pytest.raises(codex.Missing) as missing:
            codex.find(name, str(tmp_path))
        for words in (name, "pip install openai-codex-cli-bin", "npm install", "codex.bin"):
            assert words in str(missing.value)


@pytest.mark.parametrize("package", [False, True])
def test_a_package_that_is_missing_or_has_no_binary(tmp_path: Path, package: bool) -> None:
    """As where nothing is installed, and as after a `pip` that was killed."""
    if package:
        (tmp_path / "codex_cli_bin").mkdir()
        (tmp_path / "codex_cli_bin" / "__init__.py").touch()
    find = "import sys; sys.path += sys.argv[1:]; from codexd import codex\n"
    find += "try: codex.find('codex', '')\nexcept codex.Missing as why: print(why)"
    places = [str(Path(codex.__file__).parents[1]), str(tmp_path)]
    command = [sys.executable, "-I", "-S", "-c", find, *places]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Codex is not installed: no 'codex' on PATH; ")


@pytest.mark.parametrize(
    "native",
    [
        "@openai/codex-linux-ARCH/vendor/MACHINE-unknown-linux-musl/bin/codex",
        "@openai/codex/node_modules/@openai/codex-linux-ARCH/vendor/MACHINE-unknown/bin/codex",
        "@openai/codex/vendor/MACHINE-unknown-linux-musl/codex/codex",
    ],
)
def test_npms_wrapper_is_passed_by(tmp_path: Path, native: str) -> None:
    modules = tmp_path / "lib" / "node_modules"
    wrapper = program(modules / "@openai/codex/bin/codex.js", "#!/usr/bin/env node\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "codex").symlink_to(wrapper)
    link = str(tmp_path / "bin" / "codex")
    assert codex.find("codex", str(tmp_path / "bin")) == link
    program(modules / native.replace("MACHINE", "vax").replace("ARCH", "vax"))
    machine = os.uname().machine
    (modules / f"@openai/codex/vendor/{machine}-removed").mkdir(parents=True)
    assert codex.find(link, None) == link
    there = program(modules / native.replace("MACHINE", machine).replace("ARCH", "x"))
    assert codex.find("codex", str(tmp_path / "bin")) == there
    assert codex.find(link, None) == there


# --- its version --------------------------------------------------------------


def test_the_real_one_tells_its_version() -> None:
    assert codex.version(str(REAL), {"PATH": os.environ["PATH"]}) >= codex.MINIMUM


@pytest.mark.parametrize(
    ("said", "found"),
    [("codex-cli 0.130.0", (0, 130, 0)), ("codex-cli 1.2.3-alpha.4", (1, 2, 3))],
)
def test_versions(tmp_path: Path, said: str, found: tuple[int, int, int]) -> None:
    assert codex.version(program(tmp_path / "c", f"#!/bin/sh\necho {said}\n"), {}) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#!/bin/sh\necho codex-cli 0.129.9\n", "is Codex 0.129.9, older than 0.130.0"),
        ("#!/bin/sh\necho codex-cli 0.130.0; exit 3\n", "is no Codex"),
        ("#!/bin/sh\nprintf 'usage\\n\\033[31m'\n", "--version said 'usage [31m'"),
        ("#!/no/such/interpreter\n", "cannot be run: No such file"),
        ("\x7fELF", "cannot be run: Exec format error"),
    ],
)
def test_what_is_no_usable_codex_says_so(tmp_path: Path, text: str, words: str) -> None:
    binary = program(tmp_path / "c", text)
    with pytest.raises(codex.Missing) as missing:
        codex.version(binary, {})
    for part in (binary, words, "pip install openai-codex-cli-bin"):
        assert part in str(missing.value)
    assert isinstance(missing.value, codex.TooOld) == ("older" in words)


def test_a_version_that_never_comes_is_not_waited_for(tmp_path: Path) -> None:
    binary = program(tmp_path / "c", "#!/bin/sh\nexec sleep 60\n")
    began = time.monotonic()
    with pytest.raises(codex.Missing, match=r"--version did not answer within 0\.2 s"):
        codex.version(binary, {"PATH": os.environ["PATH"]}, wait=0.2)
    assert time.monotonic() - began < 10


# --- its command line ---------------------------------------------------------


def line(tmp_path: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "workdir": str(tmp_path),
        "sandbox": "read-only",
        "model": None,
        "profile": None,
        "images": [],
        "add_dirs": [],
        "output_schema": None,
        "last_message_file": str(tmp_path / "last"),
        "thread": None,
    }
    return codex.argv(str(REAL), **{**settings, **changes})  # type: ignore[arg-type]


def test_the_recommended_command_lines(tmp_path: Path) -> None:
    new = f"exec --json --color never --skip-git-repo-check -C {tmp_path} -s workspace-write -m M"
    out = f"-o {tmp_path}/last"
    asked = {"sandbox": "workspace-write", "model": "M"}
    assert line(tmp_path, **asked)[1:] == f"{new} {out} -".split()
    assert line(tmp_path, **asked, thread=THREAD)[1:] == f"{new} {out} resume {THREAD} -".split()


def test_every_option_stands_before_resume(tmp_path: Path) -> None:
    args = line(
        tmp_path,
        model="M",
        profile="P",
        images=["/a.png", "/b.png"],
        add_dirs=["/x", "/y"],
        output_schema="/s.json",
        thread=THREAD,
    )
    assert args[-3:] == ["resume", THREAD, "-"]
    assert (
        " ".join(args[8:-3])
        == (
            f"{tmp_path} -s read-only -p P -m M --add-dir /x --add-dir /y --output-schema /s.json"
            f" -i /a.png -i /b.png -o {tmp_path}/last"
        ).removeprefix(f"{tmp_path} ")
        or args[7] == "-C"
    )


@pytest.mark.parametrize("thread", ["--last", "a name", "", THREAD[:-1], THREAD + "\n"])
def test_only_an_id_is_resumed(tmp_path: Path, thread: str) -> None:
    assert not codex.is_thread_id(thread)
    with pytest.raises(ValueError, match="is not the id of a Codex thread"):
        line(tmp_path, thread=thread)


def test_an_image_with_a_comma_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"comma in its path: /a,b\.png"):
        line(tmp_path, images=["/a,b.png"])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A CODEX_HOME whose model is a closed port on loopback, without retries."""
    found = tmp_path / "home"
    found.mkdir()
    (found / "config.toml").write_text(
        """
        model = "gpt-5.5"
        model_provider = "closed"
        check_for_update_on_startup = false
        analytics = { enabled = false }
        features = { plugins = false, apps = false, unbounded_connection_retries = false }
        [model_providers.closed]
        name = "closed"
        base_url = "http://127.0.0.1:9/v1"
        wire_api = "responses"
        env_key = "CLOSED_KEY"
        request_max_retries = 0
        stream_max_retries = 0
        """
    )
    return found


def call(home: Path, args: list[str]) -> tuple[codex.Reader, Outcome, str]:
    """Run the real CLI as codexd does, and judge."""
    base = {"PATH": os.environ["PATH"], "CLOSED_KEY": "k", "TMPDIR": str(home.parent)}
    ran = subprocess.run(
        args,
        input=b"hello",
        capture_output=True,
        env=codex.environment(base, str(home), ["CLOSED_KEY"]),
        timeout=60,
    )
    reader = codex.Reader()
    reader.feed(ran.stdout)
    reader.finish()
    outcome, why = codex.judge(
        reader,
        exit_status=ran.returncode,
        stderr_head=ran.stderr.decode(),
        requested_thread=None,
        stop_reason=None,
        answer=reader.message,
    )
    return reader, outcome, why


def test_the_real_parser_takes_every_option(tmp_path: Path, home: Path) -> None:
    (tmp_path / "-a b.png").write_bytes(PNG)
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    (home / "mine.config.toml").write_text("")
    everything = {
        "model": "gpt-5.5",
        "profile": "mine",
        "images": [str(tmp_path / "-a b.png")] * 2,
        "add_dirs": [str(tmp_path), str(home)],
        "output_schema": str(tmp_path / "schema.json"),
    }
    reader, outcome, why = call(home, line(tmp_path, **everything))
    assert (outcome, why) == (Outcome.TRANSIENT, "Connection failed: error sending request")
    assert reader.thread is not None
    # The same thread, and never a new one: the words after -i were not eaten.
    again, outcome, _ = call(home, line(tmp_path, **everything, thread=reader.thread))
    assert (again.thread, outcome) == (reader.thread, Outcome.TRANSIENT)
    lost, outcome, why = call(home, line(tmp_path, **everything, thread=OTHER))
    assert (lost.thread, outcome) == (None, Outcome.THREAD_LOST)
    assert f"no rollout found for thread id {OTHER}" in why


def test_a_model_cannot_be_an_option(tmp_path: Path, home: Path) -> None:
    args = line(tmp_path, model="--dangerously-bypass-approvals-and-sandbox")
    _, outcome, why = call(home, args)
    assert outcome is Outcome.CONFIG
    assert why.startswith("error: a value is required for '--model")


def test_a_missing_key_is_auth(tmp_path: Path, home: Path) -> None:
    config = (home / "config.toml").read_text().replace("CLOSED_KEY", "NOT_SET")
    (home / "config.toml").write_text(config)
    _, outcome, why = call(home, line(tmp_path))
    assert (outcome, why) == (Outcome.AUTH, "Missing environment variable: `NOT_SET`.")


def test_a_damaged_config_is_config(tmp_path: Path, home: Path) -> None:
    (home / "config.toml").write_text("model = = 1\n")
    _, outcome, why = call(home, line(tmp_path))
    assert outcome is Outcome.CONFIG
    assert why.startswith("Error loading config.toml: ")
    assert "config.toml:1:9" in why


# --- its environment ----------------------------------------------------------


def test_only_what_is_listed_is_passed_on(tmp_path: Path) -> None:
    names = [
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_TIME", "TZ", "TERM",
        "SSL_CERT_FILE", "SSL_CERT_DIR", "CODEX_API_KEY", "MY_KEY",
        "HTTP_PROXY", "https_proxy", "ALL_PROXY", "no_proxy",
    ]  # fmt: skip
    passed = dict.fromkeys(names, "value")
    secret = dict.fromkeys(
        ["AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "LD_PRELOAD", "NOTIFY_SOCKET", "my_key"], "x"
    )
    env = codex.environment(
        {**passed, **secret, "CODEX_HOME": "/theirs"}, str(tmp_path), ["MY_KEY", "UNSET"]
    )
    assert env == {**passed, "CODEX_HOME": str(tmp_path)}


def test_tmpdir_is_dropped_when_codex_home_lies_below_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for scratch, kept in [
        (tmp_path, False),
        (tmp_path / "link", False),
        (tmp_path / "home", False),
        (tmp_path / "ho", True),
        (tmp_path / "home" / "tmp", True),
    ]:
        env = codex.environment({"TMPDIR": str(scratch)}, str(tmp_path / "home"), [])
        assert ("TMPDIR" in env) == kept


def test_env_keys() -> None:
    text = """
    [model_providers]
    z = "no table"
    [model_providers.a]
    env_key = "A_KEY"
    env_http_headers = { "X-Org" = "A_ORG" }
    [model_providers.b]
    env_key = "A=B"
    [model_providers.c]
    env_key = 7
    """
    assert codex.env_keys(text) == ["A_KEY", "A_ORG"]
    assert codex.env_keys("") == codex.env_keys("model_providers = 3") == []


@pytest.mark.parametrize("text", ["a = = b", "x = " + "[" * 10_000])
def test_a_damaged_config_toml_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"line 1|nested"):
        codex.env_keys(text)


def test_a_config_toml_that_is_no_text_is_a_value_error(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"a = 1\n# caf\xe9\n")
    with pytest.raises(ValueError, match="byte 11: not UTF-8"):
        codex.configuration(tmp_path)


# --- what it leaves -----------------------------------------------------------


def rollout(home: Path, thread: str, text: str | bytes, day: str = "2026/11/23") -> Path:
    path = home / "sessions" / day / f"rollout-2026-11-23T07-53-07-{thread}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def turn(kind: str, **fields: object) -> str:
    return json.dumps({"type": "event_msg", "payload": {"type": kind, **fields}}) + "\n"


def ended(message: str | None) -> str:
    return turn("task_complete", last_agent_message=message)


RECORDED = (SAMPLES / "rollout" / "rollout.trimmed.jsonl").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECORDED, "n_user=2 last_len=3 head='one'"),
        (RECORDED + turn("task_started") + ended("two"), "two"),
        (RECORDED + turn("task_started"), None),
        (RECORDED + ended(None), None),
        (ended("kept") + '{"type":"event_msg","payload":{"type":"task_comp', "kept"),
        (ended("kept") + '{"type":"event_msg","payload":{"type":"task_complete"', "kept"),
        (ended("kept") + "x" * 300_000 + "\n", "kept"),
        (ended("kept") + '{"type":"response_item","text":"\\"task_complete\\""}\n', "kept"),
        (
            ended("kept") + '["task_complete"]\n{"type":"event_msg","payload":"task_started"}\n',
            "kept",
        ),
        ("", None),
    ],
)
def test_the_last_message_of_a_rollout(tmp_path: Path, text: str, message: str | None) -> None:
    rollout(tmp_path, OTHER, ended("another thread's"), day="2026/12/24")
    rollout(tmp_path, THREAD, text)
    assert codex.rollout_message(str(tmp_path), THREAD) == message


def test_no_rollout_is_no_message(tmp_path: Path) -> None:
    assert codex.rollout_message(str(tmp_path), THREAD) is None
    rollout(tmp_path, OTHER, ended("x"))
    (tmp_path / "sessions" / f"rollout-1-{THREAD}.jsonl").symlink_to("/etc/passwd")
    assert codex.rollout_message(str(tmp_path), THREAD) is None


def test_of_a_huge_rollout_the_end_alone_is_read(tmp_path: Path) -> None:
    os.truncate(rollout(tmp_path, THREAD, ended("of long ago")), 33 << 20)
    assert codex.rollout_message(str(tmp_path), THREAD) is None


def test_what_is_looked_at_of_rollouts_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "_ROLLOUTS", 5)  # a number, not what it is about
    for n in range(5):
        rollout(tmp_path, f"{THREAD[:-1]}{n}", "")
    assert len(list(codex.all_rollouts(str(tmp_path)))) == 2, "and three directories above them"


def test_a_thread_whose_id_has_no_time_is_searched_for(tmp_path: Path) -> None:
    thread = "0dc9d3b1-5d0b-4b00-88dd-8abdee9d7bb9"
    rollout(tmp_path, thread, ended("found"))
    assert codex.rollout_message(str(tmp_path), thread) == "found"


def test_what_was_used_is_unknown_where_rollouts_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "sessions").symlink_to("sessions")
    assert codex.spent(str(tmp_path), THREAD) == ({}, None)
    assert codex.Meter(str(tmp_path), THREAD).look(THREAD) == 0


@pytest.mark.timeout(60)
def test_what_has_taken_the_place_of_a_rollout_is_not_waited_for(tmp_path: Path) -> None:
    path = rollout(tmp_path, THREAD, ended("x"))
    meter = codex.Meter(str(tmp_path), THREAD)
    meter.look(THREAD)
    path.unlink()
    os.mkfifo(path)
    assert meter.look(THREAD) == 0


# --- the worker must start fast -----------------------------------------------


def test_what_is_imported_is_little() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import codexd.codex; print(*sys.modules)"
    told = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(Path(codex.__file__).parent.parent)],
        env=uncovered(),
        check=True,
        capture_output=True,
        text=True,
    )
    modules = set(told.stdout.split())
    assert {"codexd.codex", "codexd.events", "codexd.verdict", "codexd.quota"} <= modules
    assert not modules & {"dataclasses", "typing", "subprocess", "pathlib", "logging", "argparse"}
    assert not modules & {"tempfile", "shutil", "glob", "hashlib", "tomllib", "importlib.util"}
