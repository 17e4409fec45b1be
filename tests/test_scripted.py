"""The scripted model against the real Codex CLI: each behaviour makes it say what it should.

These tests hold the fake at the edge to the real thing: when a new codex reads
an answer in another way, it is seen here and not in a test of codexd.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from http.client import HTTPConnection
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from codexd.replies import Turn, call_shell, echo, hang, history, patch, say
from codexd.scripted import KEY, ScriptedModel
from tests.scripted_cases import CaseModel, Codex, directives, finish, payload


@pytest.fixture(scope="module")
def model() -> Iterator[CaseModel]:
    with CaseModel() as model:
        yield model


@pytest.fixture(scope="module")
def codex(tmp_path_factory: pytest.TempPathFactory, model: CaseModel) -> Codex:
    place = tmp_path_factory.mktemp("codex")
    return Codex(place, model, request_max_retries=0, stream_idle_timeout_ms=500)


# --- every way of failing --------------------------------------------------------------

FAILURES = {
    "[[http 401]]": r"unexpected status 401 Unauthorized: Incorrect API key provided.*, url: ",
    "[[http 403]]": r"unexpected status 403 Forbidden: ",
    "[[http 500]]": r"We[’']re currently experiencing high demand",
    "[[400]]": r"invalid_request_error",
    "[[404]]": r"The model `gpt-scripted` does not exist",
    "[[429 retry-after 1]]": r"exceeded retry limit, last status: 429 Too Many Requests",
    "[[quota]]": r"You[’']ve hit your usage limit\..* try again at ",
    "[[usage-not-included]]": r"upgrade to Plus",
    "[[insufficient]]": r"Quota exceeded\. Check your plan and billing details\.",
    "[[rate-stream]]": r"rate limit exceeded: Rate limit reached for gpt\.",
    "[[overloaded]]": r"Selected model is at capacity\.",
    "[[context]]": r"ran out of room in the model[’']s context window",
    "[[incomplete]]": r"Incomplete response returned, reason: max_output_tokens",
    "[[cut]]": r"stream disconnected before completion: .*error decoding response body",
    "[[cutclean]]": r"stream disconnected before completion: stream closed before response",
    "[[html]]": r"stream disconnected before completion: ",
    "[[hangsse]]": r"stream disconnected before completion: idle timeout",
}


@pytest.mark.parametrize("directive", FAILURES)
def test_codex_fails_as_the_directive_says(codex: Codex, directive: str) -> None:
    run = codex.run(directive)
    kind, text = run.terminal
    assert run.status == 1
    assert kind == "turn.failed"
    assert re.search(FAILURES[directive], text), text


# --- every way of succeeding ------------------------------------------------------------


def test_say_answers_the_text(codex: Codex) -> None:
    run = codex.run("Please answer.\n\n[[say two words]]\n")
    assert (run.status, run.answer, run.terminal[0]) == (0, "two words", "turn.completed")


def test_usage_is_counted_over_the_thread(codex: Codex) -> None:
    first = codex.run("[[say one]]")
    second = codex.run("[[say two]]", resume=first.thread)
    counted = [run.events[-1]["usage"] for run in (first, second)]
    assert [usage["input_tokens"] for usage in counted if isinstance(usage, dict)] == [100, 200]
    assert second.thread == first.thread


def test_shell_runs_the_command_and_goes_on(codex: Codex) -> None:
    run = codex.run("[[shell echo to-stdout; exit 3]]\n[[say done]]")
    (command,) = run.items("command_execution")
    assert (command["aggregated_output"], command["exit_code"]) == ("to-stdout\n", 3)
    assert run.answer == "done"


def test_patch_changes_the_file(codex: Codex) -> None:
    run = codex.run("[[patch made.txt some text]]\n[[shell cat made.txt]]\n[[say done]]")
    assert (codex.work / "made.txt").read_text() == "some text\n"
    assert run.items("file_change")[0]["status"] == "completed"
    assert run.items("command_execution")[0]["aggregated_output"] == "some text\n"


def test_bytes_answers_megabytes(codex: Codex) -> None:
    run = codex.run("[[bytes 4000000]]")
    assert run.answer == payload(4_000_000)
    assert len(payload(4_000_000)) == 4_000_000


def test_empty_completes_without_a_message(codex: Codex) -> None:
    run = codex.run("[[empty]]")
    assert (run.status, run.terminal[0]) == (0, "turn.completed")
    assert run.items("agent_message") == []


def test_a_cut_once_is_survived_by_codex(codex: Codex, model: CaseModel) -> None:
    run = codex.run("[[cutonce]] [[say after the cut]]")
    assert (run.status, run.answer) == (0, "after the cut")
    assert len(model.asked("[[cutonce]]")) == 2


def test_first_n_fails_as_often_as_it_says(codex: Codex) -> None:
    prompt = "[[first 2 insufficient]] [[say at last]]"
    assert [codex.run(prompt).status for _ in range(3)] == [1, 1, 0]


# --- waiting, killing, resuming -----------------------------------------------------------


def test_hold_waits_for_release(codex: Codex, model: CaseModel) -> None:
    process = codex.start("[[hold door]] [[say opened]]")
    turn = model.wait_held("door")
    assert model.spans(turn.thread_id)[0][1] == float("inf")
    model.release("door")
    assert finish(process).answer == "opened"


def test_an_answer_ends_when_codex_is_killed_and_the_thread_resumes(
    codex: Codex, model: CaseModel
) -> None:
    process = codex.start("[[hang]] nonce-1")
    thread = model.wait_for(lambda turn: "nonce-1" in turn.prompt).thread_id
    process.send_signal(signal.SIGINT)
    killed = finish(process)
    assert (killed.status, killed.terminal[0]) == (1, "turn.started")
    run = codex.run("[[say back]] nonce-2", resume=thread)
    assert run.thread == thread
    (_, hung), (_, answered) = model.spans(thread)
    assert hung < answered < float("inf")
    assert model.prompts(thread) == ["[[hang]] nonce-1", "[[say back]] nonce-2"]
    assert model.overlaps() == []


def test_overlapping_requests_of_one_thread_are_found() -> None:
    headers = Message()
    headers["thread-id"] = "t"
    with CaseModel() as model:
        first = model.begin(headers, b'{"input": []}')
        second = model.begin(headers, b'{"input": []}')
        model.end(first)
        model.end(second)
        assert model.overlaps() == [(first, second)]


# --- the demo's script ------------------------------------------------------------------------


def test_echo_shows_that_the_thread_was_resumed(tmp_path: Path) -> None:
    with ScriptedModel() as model:
        codex = Codex(tmp_path, model)
        first = codex.run("# Header\n\n---\n\nPlease remember the word PELICAN.\n")
        second = codex.run("# Header\n\n---\n\nWhich word was it?\n", resume=first.thread)
        stranger = codex.run("# Header\n\n---\n\nWhich word was it?\n")
    assert first.answer == "I will remember the word PELICAN."
    assert second.answer == "PELICAN"
    assert "PELICAN" not in str(stranger.answer)


def turn(*inputs: str, tools: tuple[str, ...] = ()) -> Turn:
    return Turn(1, 1, "t", list(inputs), [], tools, b"", 0.0)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Say: X", "X"),
        ("notes\n> Say: quoted\n\n---\n\nSay: X y.\n", "X y."),
        ("Say: old\n\n---\n\nSay: new", "new"),
        ("hello", "Hello from the scripted model. I have 1 of your messages in this thread."),
    ],
)
def test_echo_answers_from_the_prompt(prompt: str, answer: str) -> None:
    assert echo(turn(prompt)) == say(answer)


@pytest.mark.parametrize("tool", ["exec_command", "shell_command", "shell"])
def test_the_shell_tool_is_one_that_codex_offers(tool: str) -> None:
    given = turn("", tools=("view_image", tool))
    for call, _ in (call_shell(given, "true"), patch(given, "*** Begin Patch")):
        assert isinstance(call, bytes)
        assert f'"name": "{tool}"'.encode() in call


def test_without_a_shell_tool_the_error_names_what_there_is() -> None:
    with pytest.raises(LookupError, match="no tool that runs a command: view_image"):
        call_shell(turn("", tools=("view_image",)), "true")


@pytest.mark.parametrize(
    "output",
    ["one\ntwo", {"content": "one\ntwo", "success": True}, [{"text": "one"}, {"text": "two"}]],
)
def test_what_a_tool_said_is_read_in_every_form(output: object) -> None:
    asked = {"role": "user", "content": [{"type": "input_text", "text": "go"}]}
    told = {"type": "function_call_output", "output": output}
    assert history([asked, told]) == (["go"], ["one\ntwo"])


def test_directives_in_quoted_lines_do_not_count() -> None:
    assert directives("> [[say old]]\n[[sleep 1]] [[say new]]\nor [[say this]]") == [
        ("sleep", "1"),
        ("say", "new"),
    ]


# --- the server itself ---------------------------------------------------------------------------


WHOLE_HEAD = b'POST /v1/responses HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"input"'


def post(model: ScriptedModel, path: str = "/responses") -> bytes:
    request = Request(model.url + path, b'{"input": []}')
    with urlopen(request, timeout=10) as response:
        return bytes(response.read())


def test_another_path_is_404() -> None:
    with ScriptedModel() as model, pytest.raises(HTTPError) as caught:
        post(model, "/models")
    assert caught.value.code == 404
    caught.value.close()


@pytest.mark.parametrize("sent", [b"PO", b"POST /v1/responses HTTP/1.1\r\nContent-Le", WHOLE_HEAD])
def test_a_client_killed_while_it_asks_is_no_error(sent: bytes) -> None:
    with ScriptedModel() as model:
        with socket.create_connection(("127.0.0.1", model.port)) as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            client.settimeout(10)
            while client.recv(4096):
                pass
        assert model.turns == []
        assert post(model)


@pytest.mark.parametrize("before_headers", [True, False])
def test_closing_ends_hanging_answers_at_once(before_headers: bool) -> None:
    with ScriptedModel(lambda turn: hang(before_headers=before_headers)) as model:
        client = HTTPConnection("127.0.0.1", model.port, timeout=10)
        client.request("POST", "/v1/responses", b'{"input": []}')
        model.wait_for(lambda turn: True)
        answering = [t for t in threading.enumerate() if "process_request" in t.name]
        began = time.monotonic()
    for thread in answering:
        thread.join(timeout=1)
    assert time.monotonic() - began < 1
    assert answering
    assert not any(thread.is_alive() for thread in answering)
    client.close()


def test_a_request_that_does_not_come_is_told() -> None:
    with ScriptedModel() as model:
        post(model)
        with pytest.raises(TimeoutError, match=r"no such request within 0 s, 1 others"):
            model.wait_for(lambda turn: turn.number == 2, timeout=0)


def test_without_a_record_it_answers_as_well() -> None:
    with ScriptedModel(record=False) as model:
        assert post(model)
        assert model.turns == []


def test_a_failing_script_is_told_at_the_end() -> None:
    def broken(turn: Turn) -> list[bytes | float]:
        raise LookupError("no such word")

    with pytest.raises(RuntimeError, match="script of the scripted model failed"):
        ask_broken(broken)


def ask_broken(script: Callable[[Turn], list[bytes | float]]) -> None:
    with ScriptedModel(script) as model, pytest.raises(ConnectionError):
        post(model)


def test_write_config_keeps_a_config_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('model = "mine"\n')
    with ScriptedModel() as model, pytest.raises(FileExistsError, match="not ours"):
        model.write_config(tmp_path)
    assert (tmp_path / "config.toml").read_text() == 'model = "mine"\n'


def test_the_program_keeps_a_config_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('model = "mine"\n')
    command = [sys.executable, "-m", "codexd.scripted", "--home", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (78, "")
    assert "config.toml is not ours: name a directory of its own" in done.stderr


@pytest.mark.parametrize("named", [True, False])
def test_the_program_serves_until_sigterm(tmp_path: Path, named: bool) -> None:
    port = tmp_path / "port"
    arguments = ["--home", str(tmp_path / "home"), *(["--port-file", str(port)] if named else [])]
    with subprocess.Popen(
        [sys.executable, "-m", "codexd.scripted", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert f"127.0.0.1:{port.read_text().strip() if named else ''}" in line
        assert f"{KEY}=scripted" in line
        assert (tmp_path / "home" / "config.toml").exists()
        process.terminate()
        began = time.monotonic()
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - began < 2
