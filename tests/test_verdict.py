"""What a run came to: every recording, and what nobody may forge."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codexd.events import Reader
from codexd.outcome import Outcome
from codexd.verdict import SENTENCE, classify, is_corrupt, judge, sentence
from tests.recordings import OUTCOMES, RECORDINGS

# A machine under load is no failure.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
THREAD = "01a20751-31fa-7ab0-be5f-e03bb0b3ba42"
OTHER = "01a20751-31fa-7ab0-be5f-e03bb0b3ba43"
ALONE = {
    name: outcome
    for group in ("alone", "before 0.130")
    for outcome, names in OUTCOMES[group].items()
    for name in names
}
STOPPED = [
    (name, reason, outcome)
    for name, reasons in OUTCOMES["stopped"].items()
    for reason, outcome in reasons.items()
]


def judged(name: str, stop_reason: str | None = None) -> tuple[Outcome, str]:
    run = RECORDINGS[name]
    reader = run.reader()
    return judge(
        reader,
        exit_status=run.status,
        stderr_head=run.stderr[:8192],
        requested_thread=run.requested,
        stop_reason=stop_reason,
        answer=reader.message,
    )


def run(
    *told: dict[str, Any],
    status: int = 0,
    stderr: str = "",
    requested: str | None = None,
    stop: str | None = None,
    answer: str | None = None,
) -> tuple[Outcome, str]:
    reader = Reader()
    for event in told:
        reader.feed(json.dumps(event).encode() + b"\n")
    return judge(
        reader,
        exit_status=status,
        stderr_head=stderr,
        requested_thread=requested,
        stop_reason=stop,
        answer=answer if answer is not None else reader.message,
    )


STARTED = {"type": "thread.started", "thread_id": THREAD}
TURN = {"type": "turn.started"}
COMPLETED = {"type": "turn.completed", "usage": {}}


def said(text: str) -> dict[str, Any]:
    return {"type": "item.completed", "item": {"id": "i", "type": "agent_message", "text": text}}


def failed(message: str) -> dict[str, Any]:
    return {"type": "turn.failed", "error": {"message": message}}


def error(message: str) -> dict[str, Any]:
    return {"type": "error", "message": message}


# --- the recordings -----------------------------------------------------------


def test_every_recording_has_its_expected_outcome_once() -> None:
    names = [
        name
        for group in ("alone", "before 0.130")
        for names in OUTCOMES[group].values()
        for name in names
    ]
    assert sorted(names) == sorted(RECORDINGS)


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recording_comes_to(name: str) -> None:
    outcome, text = judged(name)
    assert outcome.value == ALONE[name]
    assert (text == "") == (outcome is Outcome.DONE)
    assert len(text) <= SENTENCE
    assert text.isprintable()


@pytest.mark.parametrize(("name", "reason", "outcome"), STOPPED)
def test_a_recording_that_codexd_stopped_comes_to(name: str, reason: str, outcome: str) -> None:
    assert judged(name, reason)[0].value == outcome


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("e401", "unexpected status 401 Unauthorized: Incorrect API key provided: sk-mock."),
        ("e429usage", "You’ve hit your usage limit. Upgrade to Pro"),
        ("v0.130.0/e429usage", "You've hit your usage limit. Upgrade to Pro"),
        ("cut", "stream disconnected before completion: Transport error"),
        ("e400", "Invalid request: bad parameter foo."),
        ("config_broken_toml", "Error loading config.toml: /tmp/w/home/config.toml:1:6: key with"),
        ("full_auto", "error: unexpected argument '--full-auto' found"),
        ("resume_nonexistent_uuid", "Error: thread/resume: thread/resume failed: no rollout found"),
        ("resume_nonexistent_name", "Codex continued thread 01a20755-16cf-7280-8619-7bae9a9a5e1f"),
        ("stdout_dev_full", "thread 'codex-main' (30078) panicked at"),
        ("sigkill_model_wait", "Codex was killed by signal 9 (SIGKILL)."),
        ("home_disk_full_200k", "Failed to save the conversation transcript; Codex will continue"),
        ("sigint_model_wait", "Codex ended with status 1 without completing a turn."),
        ("login_with_api_key_empty", "Codex ended with status 1 without completing a turn: No API"),
    ],
)
def test_the_sentence_is_codexs_own(name: str, words: str) -> None:
    assert judged(name)[1].startswith(words)


@pytest.mark.parametrize(
    ("name", "reason", "text"),
    [
        ("hang_default", "stall", "Codex was silent for too long; last seen: thinking"),
        (
            "sigterm_shell_sandboxed",
            "timeout",
            "The task's time was used up; last seen: running: echo start; sleep 47; echo end",
        ),
        (
            "long_refused",
            "stall",
            "Codex was silent for too long; its last words: Reconnecting... waiting for network"
            " (Connection failed: error sending request)",
        ),
    ],
)
def test_a_stop_says_what_was_seen_last(name: str, reason: str, text: str) -> None:
    assert judged(name, reason)[1] == text


# --- done needs everything ----------------------------------------------------


def test_done_needs_exit_0_the_turn_the_thread_and_an_answer() -> None:
    whole = (STARTED, TURN, said("yes"), COMPLETED)
    assert run(*whole, requested=THREAD.upper()) == (Outcome.DONE, "")
    assert run(*whole, status=1)[0] is Outcome.UNKNOWN
    assert run(STARTED, TURN, error("at capacity"), *whole[2:], status=1)[0] is Outcome.UNKNOWN
    assert run(*whole, status=-9)[0] is Outcome.SIGNAL
    assert run(*whole, status=101)[0] is Outcome.HOST
    assert run(*whole, requested=OTHER)[0] is Outcome.THREAD_LOST
    assert run(*whole[1:], requested=THREAD)[0] is Outcome.THREAD_LOST
    assert run(*whole[:3])[0] is Outcome.UNKNOWN
    assert run(*whole, answer=" \n")[0] is Outcome.NO_ANSWER
    assert run(STARTED, TURN, COMPLETED)[0] is Outcome.NO_ANSWER
    assert run(STARTED, TURN, COMPLETED, answer="from the file")[0] is Outcome.DONE
    assert run()[0] is Outcome.UNKNOWN


@pytest.mark.parametrize("reason", ["grace", "timeout", "stall", "interrupted"])
def test_a_whole_turn_stands_when_codexd_had_to_end_the_process(reason: str) -> None:
    assert run(STARTED, TURN, said("yes"), COMPLETED, status=-9, stop=reason)[0] is Outcome.DONE


def test_a_signal_that_codexd_did_not_send() -> None:
    assert run(STARTED, TURN, status=-15)[0] is Outcome.SIGNAL


def test_a_failed_turn_of_unknown_kind_is_explained_by_our_stop() -> None:
    turn = (STARTED, TURN, failed("turn aborted"))
    assert run(*turn, status=1)[0] is Outcome.UNKNOWN
    assert run(*turn, status=1, stop="interrupted") == (Outcome.INTERRUPTED, "turn aborted")
    assert run(*turn, status=1, stop="timeout")[0] is Outcome.TIMEOUT
    assert run(STARTED, TURN, failed(""), status=1)[1].startswith("The turn failed")


@pytest.mark.parametrize("message", ["Connection failed: x", "last status: 429 Too Many Requests"])
def test_a_connection_that_breaks_as_all_is_stopped_is_no_fault_of_the_service(
    message: str,
) -> None:
    turn = (STARTED, TURN, failed(message))
    assert run(*turn, status=1, stop="interrupted") == (Outcome.INTERRUPTED, message)
    assert run(*turn, status=1, stop="stall")[0] is classify(message)
    quota = failed("Quota exceeded. Check your plan and billing details.")
    assert run(STARTED, TURN, quota, status=1, stop="interrupted")[0] is Outcome.QUOTA


@pytest.mark.parametrize("reason", ["stall", "timeout"])
def test_an_error_that_never_ended_the_turn_is_what_it_was(reason: str) -> None:
    turn = (STARTED, TURN, error("Quota exceeded. Check your plan and billing details."))
    assert run(*turn, status=1, stop=reason)[0] is Outcome.QUOTA
    assert run(*turn, status=1)[0] is Outcome.QUOTA
    assert run(*turn, said("go on"), status=1, stop=reason)[0].value == reason


# --- nothing can be forged ----------------------------------------------------

WORDS = "You've hit your usage limit. 401 Unauthorized. no rollout found. Failed to save the"


def test_words_of_the_model_and_of_tools_decide_nothing() -> None:
    tool = {"id": "t", "type": "command_execution", "command": WORDS, "aggregated_output": WORDS}
    turn = (STARTED, TURN, {"type": "item.completed", "item": tool}, said(WORDS))
    assert run(*turn, COMPLETED, stderr=WORDS)[0] is Outcome.DONE
    assert run(*turn, status=-15, stop="stall", stderr=WORDS)[0] is Outcome.STALL
    assert run(*turn, status=1, stderr=f"Error: {WORDS}")[0] is Outcome.UNKNOWN


@pytest.mark.parametrize(
    "text",
    [
        "Error: no rollout found for thread id x",
        "Error loading config.toml: x",
        "Failed to read a file",
        "error: nothing",
        "thread 'main' panicked at x",
    ],
)
def test_standard_error_is_believed_only_before_a_turn(text: str) -> None:
    assert run(STARTED, status=1, stderr=text)[0] is not Outcome.UNKNOWN
    outcome, why = run(STARTED, TURN, status=1, stderr=text)
    assert (outcome, text in why) == (Outcome.UNKNOWN, True)


def test_log_lines_decide_nothing() -> None:
    log = "2026-11-23T07:41:39.47Z ERROR codex_core: Error: thread x already has an active writer\n"
    assert run(status=1, stderr=log)[0] is Outcome.UNKNOWN
    assert run(status=1, stderr=log + "Not inside a trusted directory")[0] is Outcome.CONFIG


# --- messages -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "outcome"),
    [
        ("You’ve hit your usage limit for gpt-9. Switch to another model now,", "quota"),
        ("You've hit your usage limit. Try again later.", "quota"),
        ("To use Codex with your ChatGPT plan, upgrade to Plus: https://x.", "quota"),
        ("Your workspace is out of credits. Add credits to continue.", "quota"),
        ("You hit your spend cap set in your workspace. Increase your spend cap", "quota"),
        ("unexpected status 402 Payment Required: deactivated", "quota"),
        ("unexpected status 429 Too Many Requests: You exceeded your current quota,", "quota"),
        ("unexpected status 429 Too Many Requests: slow down, url: http://x", "rate"),
        ("exceeded retry limit, last status: 429 Too Many Requests", "rate"),
        ("Rate limit reached for gpt-5. Please try again in 1.5s.", "rate"),
        ("exceeded retry limit, last status: 401 Unauthorized", "auth"),
        ("exceeded retry limit, last status: 503 Service Unavailable", "transient"),
        ("unexpected status 502 Bad Gateway: <html>", "transient"),
        ("unexpected status 408 Request Timeout: x", "transient"),
        ("Access blocked by Cloudflare. This usually (status 403 Forbidden), url: x", "auth"),
        ("Missing environment variable: `X`.", "auth"),
        ("Your access token could not be refreshed. Please log out and sign in again.", "auth"),
        ("unexpected status 401 Unauthorized: invalid_request_error", "auth"),
        ("unexpected status 404 Not Found: x", "config"),
        ("The model `gpt-x` does not exist or you do not have access to it.", "config"),
        (
            '{"error": {"type": "invalid_request_error", "message": "hit your usage limit"}}',
            "config",
        ),
        ('{"error": {"code": "context_length_exceeded", "message": "x"}}', "context-full"),
        ("Codex ran out of room in the model’s context window. Start a", "context-full"),
        ("Codex ran out of room in the model's context window. Start a", "context-full"),
        ("Your input exceeds the context window of this model.", "context-full"),
        ("We're currently experiencing high demand, which may", "transient"),
        ("Flex capacity unavailable.", "transient"),
        ("Incomplete response returned, reason: max_output_tokens", "transient"),
        ("Reconnecting... 2/5 (unexpected status 401 Unauthorized: x)", "auth"),
        ("Reconnecting... 2/5 (Quota exceeded. Check your plan)", "quota"),
        ("Fatal error: No space left on device (os error 28)", "host"),
        ("Disk quota exceeded (os error 122)", "host"),
        ("something new", "unknown"),
        ("", "unknown"),
    ],
)
def test_classify(message: str, outcome: str) -> None:
    assert classify(message).value == outcome
    assert run(STARTED, TURN, failed(message), status=1)[0].value == outcome


@pytest.mark.parametrize(
    ("stderr", "outcome"),
    [
        ("Error: failed to initialize sqlite state runtime under /h: x", "transient"),
        ("Error: failed to open log DB: (code: 5) database is locked", "transient"),
        (
            "Error: failed to initialize in-process app-server client: database is locked",
            "transient",
        ),
        ("Error: failed to migrate state DB: while executing migration 53: x", "transient"),
        ("Error: (code: 11) database disk image is malformed", "host"),
        (
            "Error: failed to initialize sqlite state runtime: Permission denied (os error 13)",
            "host",
        ),
        ("Error: thread/start failed: unexpected status 401 Unauthorized", "auth"),
        (
            "WARNING: proceeding\nError: session x is archived. Run `codex unarchive x`",
            "thread-lost",
        ),
        ("Error: failed to read thread: Too many open files (os error 24)", "host"),
        ("setpriv: failed to execute codex", "unknown"),
    ],
)
def test_why_no_turn_began(stderr: str, outcome: str) -> None:
    assert run(status=1, stderr=stderr)[0].value == outcome


@pytest.mark.parametrize(
    ("stderr", "corrupt"),
    [
        ("Error: thread/resume failed: list_turns is not supported yet (code -32601)", True),
        ("Error: failed to open thread history DB: (code: 11) database disk image is malf", False),
        ("Error: failed to open x: (code: 11) database disk image is malformed (code -1)", True),
        ("Error: failed to open x: (code: 26) file is not a database", True),
        ("Error: failed to open log DB: (code: 5) database is locked", False),
        ("Error: failed to initialize in-process app-server client: x", False),
    ],
)
def test_damaged_databases(stderr: str, corrupt: bool) -> None:
    assert is_corrupt(*run(status=1, stderr=stderr)) is corrupt
    assert not is_corrupt(*run(STARTED, TURN, status=1, stderr=stderr))
    assert not is_corrupt(*run(STARTED, TURN, failed(stderr), status=1))


def test_exit_statuses_without_words() -> None:
    assert run(status=2)[0] is Outcome.CONFIG
    assert run(STARTED, TURN, status=2)[0] is Outcome.UNKNOWN
    assert run(status=127)[0] is Outcome.HOST
    assert run(status=-64) == (Outcome.SIGNAL, "Codex was killed by signal 64 (SIGRTMAX).")
    assert run(status=-60) == (Outcome.SIGNAL, "Codex was killed by signal 60.")


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ('{"error": {"message": "Bad\\nfoo.", "type": "x"}}', "Bad foo."),
        ('unexpected status 400: {"detail": "No."}, url: x', "unexpected status 400: No., url: x"),
        ('{"error": "plain"}', "plain"),
        ('{"error": true, "message": "m"}', "m"),
        ('{"code": 7}', '{"code": 7}'),
        ('{"error":' * 5 + '"deep"' + "}" * 5, '{"error":' * 5 + '"deep"' + "}" * 5),
        ("a {broken", "a {broken"),
        ("\x1b[31mred\x07\r\nline", "[31mred line"),
        ("key sk-proj-abcdefghijklmnopqrstuv was wrong", "key sk-proj… was wrong"),
        ("see task-list-of-all-the-things", "see task-list-of-all-the-things"),
    ],
)
def test_sentence(message: str, text: str) -> None:
    assert sentence(message) == text


def test_a_sentence_is_bounded() -> None:
    assert len(sentence("x" * 1_000_000)) == SENTENCE
    assert len(run(STARTED, TURN, failed("{" * 1_000_000), status=1)[1]) == SENTENCE


@PATIENT
@given(
    st.text(max_size=300),
    st.text(max_size=300),
    st.integers(-70, 255),
    st.sampled_from([None, "timeout", "stall", "interrupted", "grace"]),
)
def test_nothing_raises_and_nothing_is_done_by_words(
    message: str, stderr: str, status: int, stop: str | None
) -> None:
    for told in ([], [STARTED, error(message)], [STARTED, TURN, failed(message)]):
        outcome, text = run(*told, status=status, stderr=stderr, stop=stop, answer="x")
        assert outcome is not Outcome.DONE
        assert text
        assert text.isprintable()
        assert len(text) <= SENTENCE
