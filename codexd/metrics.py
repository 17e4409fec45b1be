"""Health as Prometheus text, format 0.0.4.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from codexd import __version__, clock
from codexd.model import State
from codexd.outcome import Outcome

TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Always there, for alerts.
REASONS = frozenset(
    {"auth", "budget", "codex", "disk", "drain", "hold", "host", "quota", "rate", "transient"}
)

Sample = tuple[str, str, object]  # the label, its value, and the sample's


def render(
    health: Mapping[str, object], states: Mapping[str, int], replies: Mapping[int, int]
) -> str:
    """`health` as View tells it, live tasks by state, HTTP replies by status."""
    gate = health.get("gate")
    closed = frozenset(gate) if isinstance(gate, dict) else frozenset()
    today, hooks = health.get("today"), health.get("hooks")
    told = health.get("ended")
    ended = told if isinstance(told, Mapping) else None
    live = [state.value for state in State if not state.ended]
    return "".join(
        (
            _gauge("build_info", "The version that runs.", [("version", __version__, 1)]),
            _single("up", "Whether the master's heartbeat is fresh.", health["status"] != "down"),
            _single(
                "heartbeat_age_seconds",
                "Seconds since the master's last heartbeat.",
                health.get("heartbeat_age"),
            ),
            _single("inbox_files", "Files in the inbox, no tasks yet.", health.get("inbox")),
            _gauge("tasks", "Live tasks by state.", [("state", s, states.get(s, 0)) for s in live]),
            _gauge(
                "gate_closed",
                "Whether dispatch is held, by reason.",
                [("reason", r, r in closed) for r in sorted(REASONS | closed)],
            ),
            _gauge(
                "gate_until_timestamp_seconds",
                "When dispatch goes on, by reason, where that is known.",
                [("reason", r, at) for r, at in sorted(_untils(gate))],
            ),
            _family(
                "tasks_ended_total",
                "counter",
                "Tasks that have ended since the master was started, by outcome.",
                [("outcome", o, ended.get(o, 0)) for o in Outcome] if ended is not None else [],
            ),
            _single(
                "tokens_today",
                "Tokens used since local midnight, as limits.day_tokens counts them.",
                today.get("tokens") if isinstance(today, dict) else None,
            ),
            _single(
                "hooks_owed",
                "Events that a hook was not told yet.",
                hooks.get("owed") if isinstance(hooks, dict) else None,
            ),
            _family(
                "http_replies_total",
                "counter",
                "HTTP replies by status.",
                [("code", str(code), replies[code]) for code in sorted(replies)],
            ),
        )
    )


def _untils(gate: object) -> Iterator[tuple[str, float]]:
    for reason, facts in gate.items() if isinstance(gate, Mapping) else ():
        try:
            yield reason, clock.epoch(str(facts["until"]))
        except (KeyError, TypeError, ValueError):
            continue  # nobody knows


def _single(name: str, help: str, value: object) -> str:
    """A gauge without labels; left out while its value is unknown."""
    return _gauge(name, help, [("", "", value)] if value is not None else [])


def _gauge(name: str, help: str, samples: Iterable[Sample]) -> str:
    return _family(name, "gauge", help, samples)


def _family(name: str, type: str, help: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP codexd_{name} {help}", f"# TYPE codexd_{name} {type}"]
    for label, text, value in samples:
        labels = f'{{{label}="{_escaped(text)}"}}' if label else ""
        number = int(value) if isinstance(value, bool) else value
        lines.append(f"codexd_{name}{labels} {number}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
