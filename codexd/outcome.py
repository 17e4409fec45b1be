"""What an attempt came to: one closed set of names, used everywhere.

The same word stands in the result a worker writes, in the ledger, in the
answer's front matter, in JSON and in metrics.  The names are part of the
contract (codexd(7)); a new one is a new version of it.

This file is apart from `model` because the worker needs it and must not pay
for `model`'s imports (dataclasses alone doubles a worker's start-up time).
"""

from enum import StrEnum


class Outcome(StrEnum):
    """Each member says what evidence it rests on; see `codex.judge`."""

    DONE = "done"  # exit 0, turn.completed, the requested thread, an answer
    TIMEOUT = "timeout"  # the task's total time was used up
    STALL = "stall"  # no event from Codex for idle_timeout
    INTERRUPTED = "interrupted"  # stopped by the host or the daemon; resumes
    SIGNAL = "signal"  # Codex was killed by a signal codexd did not send
    OOM = "oom"  # the kernel killed it for memory
    AUTH = "auth"  # the login is missing, wrong or expired
    QUOTA = "quota"  # the plan's or the account's usage is spent
    RATE = "rate"  # too many requests just now
    TRANSIENT = "transient"  # the service or the network failed
    CONFIG = "config"  # the task or the configuration cannot work
    HOST = "host"  # this machine cannot run Codex: missing, broken, full
    THREAD_LOST = "thread-lost"  # Codex no longer has the thread
    THREAD_BUSY = "thread-busy"  # another process writes the thread
    CONTEXT_FULL = "context-full"  # the thread no longer fits the model
    NO_ANSWER = "no-answer"  # the turn ended without a message
    VERIFY = "verify"  # the task's own check kept failing
    BUDGET = "budget"  # a token limit was reached
    DEPENDENCY = "dependency"  # a task this one waits for failed
    CANCELLED = "cancelled"  # somebody asked for it
    UNKNOWN = "unknown"  # none of the above; the evidence is kept
