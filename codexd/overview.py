"""`codexd status`: one screen that says whether all is well, and if not, why.

Pure output, like `report`, whose rules hold here: text that somebody else wrote
reaches no terminal raw.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from codexd import spend
from codexd.dispatch import Gate, of_one
from codexd.program import clean
from codexd.report import count_of, lines, sentence, what_of
from codexd.view import Json, View, is_held

_PATIENCE = 0.5  # seconds in which failures of long ago are looked for


def why(health: Json) -> str:
    """The reasons for which no task is started."""
    gate = _gate(health) if health["status"] != "down" else {}
    found = _told(gate, [reason for reason in gate if not of_one(reason)])
    return found or clean(health.get("message") or health.get("trouble") or health["status"])


def holds(health: Json, profile: str | None) -> str:
    """Why a task with this profile of its own has to wait; nothing if it need not."""
    usual = health.get("profile")
    gate = Gate(_gate(health), profile=usual if isinstance(usual, str) else None)
    return _told(gate.closed, gate.holding(profile)) or clean(health.get("trouble") or "")


def _gate(health: Json) -> Mapping[str, Mapping[str, object]]:
    gate = health.get("gate")
    return gate if isinstance(gate, dict) else {}


def _told(gate: Mapping[str, object], reasons: Collection[str]) -> str:
    return clean("; ".join(_reason(name, gate[name]) for name in gate if name in reasons))


def _reason(name: str, facts: object) -> str:
    if not isinstance(facts, dict):
        return name
    until = f" until {facts['until']}" if facts.get("until") else ""
    return f"{name}{until}: {facts.get('message')}"


def _hooks(told: object) -> None:
    """What hooks were not told yet, where one fails."""
    if isinstance(told, dict) and told.get("failing"):
        why = "; ".join(f"{name}: {text}" for name, text in told["failing"].items())
        print(clean(f"hooks: {count_of(told['owed'], 'event')} owed; {why}"))


def problems(health: Json) -> list[str]:
    """What has to be mended although work goes on, or besides the reason why it does not."""
    found = []
    if health["status"] != "down":
        if health.get("config_problem"):
            then = "what was in force stays in force"
            found.append(f"configuration: {health['config_problem']}; {then}")
        if damaged := health.get("damaged"):
            found.append(f"ledger: {count_of(damaged, 'damaged line')}; see codexd ledger verify")
        if health.get("full"):
            found.append("inbox: the queue is full (limits.queue); files wait until there is room")
        if health.get("sandbox"):
            found.append(f"sandbox: {health['sandbox']}")
        gate = _gate(health)
        if waits := _told(gate, [reason for reason in gate if of_one(reason)]):
            more = f"; and {health['gate_more']} more" if health.get("gate_more") else ""
            found.append(f"profiles: {waits}{more}")
    return [clean(line) for line in found]


def status(view: View, health: Json) -> None:
    """One screen: is all well, what goes on, what failed last, what today used."""
    tasks = view.short_list()
    wrong = problems(health)
    summary = "it works, but something has to be mended" if wrong else "all is well"
    print(f"codexd: {why(health) if is_held(health) else summary}")
    lines(wrong)
    if "version" in health:
        print(
            clean(
                f"version {health['version']}, codex {health['codex'] or 'none'}, "
                f"workers by {health['launcher']}, inbox by {health['watch']}"
            )
        )
        if health.get("launcher_why"):
            print(clean(f"workers: {health['launcher_why']}"))
        if health.get("watch_problem"):
            print(clean(f"inbox: {health['watch_problem']}"))
        _hooks(health.get("hooks"))
    for state in ("running", "waiting", "queued"):
        _section(state, [t for t in tasks if t["state"] == state])
    _section("failed last", view.last("failed", None, 5, _PATIENCE))
    _today(health.get("today") or _last_day(view))
    files = health["inbox"]
    inbox = "not for you to see" if files is None else count_of(files, "file")
    print(f"state: {view.dirs.state}   inbox: {view.dirs.inbox} ({inbox})")


def _section(name: str, tasks: Sequence[Json]) -> None:
    if not tasks:
        return
    print(f"\n{name}: {len(tasks)}")
    for task in tasks[:10]:
        ended = f"{str(task['ended'])[:19]}  " if task["ended"] else ""
        what = f"  {clean(what_of(task))}" if what_of(task) else ""
        print(f"  {ended}{sentence(task)}{what}")
    if len(tasks) > 10:
        print(f"  and {len(tasks) - 10} more: codexd task list")


def _today(used: object) -> None:
    if isinstance(used, dict):
        most = f" of {used['limit']}" if used.get("limit") else ""
        print(
            f"\n{used['day']}: {count_of(used['attempts'], 'attempt')}, "
            f"{used['tokens']} tokens{most} "
            f"({used['input_tokens']} in, {used['cached_input_tokens']} of them cached, "
            f"{used['output_tokens']} out)"
        )


def _last_day(view: View) -> Json | None:
    """While no daemon says what it takes for today: the last day with a file."""
    return next(({"day": d.day, **spend.whole(d.total)} for d in view.used(1)), None)
