"""What an attempt came to, from evidence only: the outcome and one sentence.

The evidence is, in this order: how the turn ended in the event stream, why
codexd itself stopped Codex, the exit status, and the first lines of standard
error while no turn had begun (later ones may be a tool's output).  What a tool
or the model said is never looked at: it would let a task forge its own outcome.

The wording is Codex's and changes between versions; what matches no rule is
`unknown`, with its evidence in the sentence, and never success.  No I/O.  Part
of the room `codex`, which is the door to it.  Lean: the worker uses it.
"""

from __future__ import annotations

import json
import re
import signal

from codexd.events import Reader, plain
from codexd.outcome import Outcome

SENTENCE = 2000  # characters

_PANIC = 101  # Rust's exit status for a panic
_USAGE = 2  # clap's for an argument it does not know
_NOT_RUN = (126, 127)  # a shell's for a program that it cannot run
_UNSAVED = "Failed to save the conversation"

# Patterns are text, not compiled here: `re` compiles and keeps them when they are
# used, and the worker's start does not pay for it.

_STATUS = r"(?:unexpected status|last status:|\(status) (\d{3})\b"
_QUOTA = (
    r"hit your usage limit|^Quota exceeded|upgrade to Plus|out of credits|hit your spend cap"
    r"|insufficient_quota|exceeded your current quota"
)
_WRAPPED = r"(?s)Re-?connecting\.\.\. [^(]*\((.*)\)\s*"

# How a turn failed.  The first rule that matches stands; an HTTP status, where
# the message tells one, comes between the first rule and the others.
_FAILURES = (
    (
        Outcome.CONTEXT_FULL,
        r"ran out of room in the model's context|context_length_exceeded"
        r"|exceeds the context window",
    ),
    (Outcome.CONFIG, r"invalid_request_error|does not exist|model_not_found"),
    (Outcome.QUOTA, _QUOTA),
    (
        Outcome.AUTH,
        r"^Missing environment variable|access token could not be refreshed"
        r"|sign in again|log in again|invalid_api_key|^Not logged in",
    ),
    (Outcome.RATE, r"429 Too Many|[Rr]ate limit (?:exceeded|reached)|rate_limit_exceeded"),
    (
        Outcome.TRANSIENT,
        r"high demand|at capacity|[Cc]apacity unavailable|stream disconnected"
        r"|Connection failed|error sending request|Error while reading the server response"
        r"|request timed out|^Incomplete response|agent loop died|server_error",
    ),
    (Outcome.HOST, r"\(os error (?:5|23|24|28|30|122)\)|codex-linux-sandbox was required"),
)

# Why no turn began: lines of standard error, each from its beginning.
_STARTUP = (
    (
        Outcome.CONFIG,
        r"error: |Error loading config|Error parsing|Not inside a trusted|No prompt provided"
        r"|Failed to read|Error: No such file or directory|Error: .*required MCP servers failed"
        r"|Error: invalid --profile",
    ),
    (
        Outcome.HOST,
        r"Error: .*\(os error (?:5|13|23|24|28|30|122)\)|Error finding codex home"
        r"|Error: .*(?:unable to open database|is malformed|file is not a database)"
        r"|(?:Error: )?(?:Codex cannot access session files|Session storage )"
        r"|thread '.*' .*panicked at",
    ),
    (
        # Two Codex that start at once on one CODEX_HOME race for its databases.
        Outcome.TRANSIENT,
        r"(?:Error|ERROR): .*(?:database is locked|migrat(?:e|ion)"
        r"|failed to initialize (?:sqlite|state))",
    ),
    (
        Outcome.HOST,
        r"Error: .*(?:list_turns is not supported yet"
        r"|failed to initialize in-process app-server client)",
    ),
    (Outcome.THREAD_BUSY, r"Error: .*already has an active writer"),
    (
        Outcome.THREAD_LOST,
        r"Error: .*(?:no rollout found|does not start with session metadata"
        r"|failed to read session metadata|failed to read thread|is archived"
        r"|no thread with id)",
    ),
    (Outcome.AUTH, r"Not logged in|(?:Error: )?Missing environment variable"),
)
# What of these means that the databases in CODEX_HOME are damaged.
_CORRUPT = r"list_turns is not supported yet|disk image is malformed|file is not a database"
# What tells that no other task could be run either: Codex is not there, or cannot keep what
# it writes.  Not among it is what may come of a task itself, or of its directory: a panic, and
# a guide there that cannot be read.
_GENERAL = (
    r"cannot start Codex: |^Codex ended with status 12[67]\b|^Failed to save the conversation"
    r"|^(?!.*AGENTS\.md).*\(os error (?:5|23|24|28|30|122)\)"
    r"|^Error finding codex home|^Error: .*unable to open|codex-linux-sandbox was required"
    r"|failed to initialize (?:in-process app-server client|sqlite state runtime)"
    r"|^(?:Error: )?(?:Codex cannot access session files|Session storage )"
)
_LOG_LINE = r"\d{4}-\d\d-\d\dT\S+\s+[A-Z]+ |WARNING: |Reading .* from stdin\.\.\."

_STOPPED = {
    "timeout": (Outcome.TIMEOUT, "The task's time was used up"),
    "stall": (Outcome.STALL, "Codex was silent for too long"),
    "interrupted": (Outcome.INTERRUPTED, "codexd had to stop Codex in the middle of its turn"),
    "budget": (Outcome.BUDGET, "The task's tokens (limits.task_tokens) were used up"),
}

# A host that goes down takes its network along: what then failed is no fault of the service.
_OF_A_SHUTDOWN = frozenset({Outcome.TRANSIENT, Outcome.RATE})

_SECRET = r"\b((?:sk-|sess-|eyJ)[\w.-]{4})[\w.-]{12,}"


def judge(
    reader: Reader,
    *,
    exit_status: int,
    stderr_head: str,
    requested_thread: str | None,
    stop_reason: str | None,
    answer: str | None,
) -> tuple[Outcome, str]:
    """The outcome of one run of Codex, and a sentence that tells why ("" for done).

    exit_status       as of `os.waitstatus_to_exitcode`: negative for a signal
    stderr_head       the beginning of standard error
    requested_thread  the thread that was to be continued, if one was
    stop_reason       why codexd stopped Codex: "timeout", "stall", "interrupted",
                      "budget", or "grace" for one that did not exit after its turn;
                      None if it ended by itself
    answer            the last message, from wherever it was found
    """
    outcome, why = _found(reader, exit_status, stderr_head, requested_thread, stop_reason, answer)
    return outcome, plain(why, SENTENCE)


def _found(
    reader: Reader,
    status: int,
    stderr: str,
    requested: str | None,
    stop_reason: str | None,
    answer: str | None,
) -> tuple[Outcome, str]:
    for warning in reader.item_errors:
        if warning.startswith(_UNSAVED):
            return Outcome.HOST, sentence(warning)
    if reader.completed and (status == 0 or stop_reason is not None):
        # The turn is whole; how its process then ended is our doing.
        return _completed(reader, requested, answer)
    if reader.failed_message is not None:
        return _failed(reader.failed_message, stop_reason)
    if stop_reason in _STOPPED:
        return _stopped(reader, stop_reason)
    return _ended(reader, status, stderr)


def _completed(reader: Reader, requested: str | None, answer: str | None) -> tuple[Outcome, str]:
    if requested is not None and (reader.thread or "").lower() != requested.lower():
        was = f"continued thread {reader.thread}" if reader.thread else "named no thread"
        return Outcome.THREAD_LOST, f"Codex {was} instead of {plain(requested, 100)}."
    if answer is None or not answer.strip():
        return Outcome.NO_ANSWER, "Codex completed the turn without a message."
    return Outcome.DONE, ""


def _failed(message: str, stop_reason: str | None) -> tuple[Outcome, str]:
    """turn.failed: its message decides, and our own stop what it leaves open."""
    outcome = classify(message)
    if outcome is Outcome.UNKNOWN and stop_reason in _STOPPED:
        outcome = _STOPPED[stop_reason][0]
    if outcome in _OF_A_SHUTDOWN and stop_reason == "interrupted":
        outcome = Outcome.INTERRUPTED
    return outcome, sentence(message) or "The turn failed, and Codex gave no reason."


def _stopped(reader: Reader, reason: str) -> tuple[Outcome, str]:
    """codexd ended the run.  A clock that struck while Codex was stuck on an
    error says less than the error does."""
    outcome, text = _STOPPED[reason]
    trouble = reader.reconnecting or reader.last_error
    if trouble and reason in ("stall", "timeout"):
        cause = classify(trouble)
        # A retry may still succeed: only a rate limit explains a whole timeout.
        if reader.last_error or reason == "stall" or cause is Outcome.RATE:
            outcome = cause if cause is not Outcome.UNKNOWN else outcome
    last = f"its last words: {sentence(trouble)}" if trouble else f"last seen: {reader.activity}"
    return outcome, f"{text}; {last}"


def _ended(reader: Reader, status: int, stderr: str) -> tuple[Outcome, str]:
    """Codex ended by itself, or by a stranger's hand, and the turn did not complete."""
    lines = _telling(stderr)
    if status < 0:
        return Outcome.SIGNAL, f"Codex was killed by {_signal(-status)}{_evidence(reader, lines)}"
    if status == _PANIC or status in _NOT_RUN:
        return Outcome.HOST, f"Codex ended with status {status}{_evidence(reader, lines)}"
    if not reader.turn_started:
        for line in lines:
            for outcome, pattern in _STARTUP:
                if re.match(pattern, line):
                    return outcome, sentence(line)
        for line in lines:
            if line.startswith("Error") and (cause := classify(line)) is not Outcome.UNKNOWN:
                return cause, sentence(line)
        if status == _USAGE:
            return Outcome.CONFIG, f"Codex ended with status 2{_evidence(reader, lines)}"
    if reader.errors and not reader.completed:
        cause = classify(reader.errors[-1])
        if cause is not Outcome.UNKNOWN:
            return cause, sentence(reader.errors[-1])
    how = "after the turn completed" if reader.completed else "without completing a turn"
    return Outcome.UNKNOWN, f"Codex ended with status {status} {how}{_evidence(reader, lines)}"


def _signal(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _evidence(reader: Reader, lines: list[str]) -> str:
    last = reader.reconnecting or (reader.errors[-1] if reader.errors else "")
    words = sentence(last or (lines[0] if lines else ""))
    return f": {words}" if words else "."


def _telling(stderr: str) -> list[str]:
    """The lines of standard error that are not log noise.

    A line that only announces the next ("Error loading config.toml:") is joined
    with it.
    """
    lines = [line for line in stderr[:65536].splitlines() if line.strip()]
    told: list[str] = []
    for line in lines:
        if told and (told[-1].endswith(":") or re.search(r"panicked at \S+$", told[-1])):
            told[-1] += " " + line
        elif not re.match(_LOG_LINE, line):
            told.append(line.rstrip())
    return told


def classify(message: str) -> Outcome:
    """What kind of failure a message of Codex's own means; UNKNOWN if none fits.

    Only for messages of `error` and `turn.failed` events.
    """
    text = message.replace("’", "'").strip()
    if wrapped := re.fullmatch(_WRAPPED, text):
        text = wrapped[1]
    first, *others = _FAILURES
    if re.search(first[1], text):
        return first[0]
    if status := re.search(_STATUS, text):
        return _by_status(int(status[1]), text)
    for outcome, pattern in others:
        if re.search(pattern, text):
            return outcome
    return Outcome.UNKNOWN


def is_corrupt(outcome: Outcome, message: str) -> bool:
    """Whether it came to that because Codex's databases are damaged; it can do without."""
    return outcome is Outcome.HOST and bool(re.match(rf"Error: .*(?:{_CORRUPT})", message))


def is_general(outcome: Outcome, message: str) -> bool:
    """Whether it came to that because of what every task would meet here."""
    general = outcome is Outcome.HOST and bool(re.search(_GENERAL, message))
    return general or is_corrupt(outcome, message)


def _by_status(status: int, text: str) -> Outcome:
    if status == 402 or (status == 429 and re.search(_QUOTA, text)):
        return Outcome.QUOTA
    if status in (401, 403):
        return Outcome.AUTH
    if status == 429:
        return Outcome.RATE
    if status in (408, 409, 425) or status >= 500:
        return Outcome.TRANSIENT
    return Outcome.CONFIG


def sentence(message: str) -> str:
    """A message for a person: the text within a JSON body, on one line, bounded,
    without control characters and without what looks like a key."""
    start = message.find("{")
    if start >= 0:
        try:
            body, end = json.JSONDecoder().raw_decode(message, start)
        except (ValueError, RecursionError):
            body, end = None, start
        if inner := _inner(body):
            message = message[:start] + inner + message[end:]
    return re.sub(_SECRET, r"\1…", plain(message, SENTENCE))


def _inner(body: object) -> str:
    """The human part of an error body of OpenAI's API, or of something like it."""
    for _ in range(4):
        if isinstance(body, str):
            return body
        if not isinstance(body, dict):
            return ""
        found = (body.get(key) for key in ("error", "message", "detail"))
        body = next((value for value in found if isinstance(value, (str, dict))), None)
    return ""
