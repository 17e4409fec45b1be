"""What HTTP does: tasks over a real socket, taken by a real master, read from its files."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from codexd import clock, lock, metrics, openapi, spool, taskfile
from codexd.api import WAITERS, Api
from codexd.config import Directories, load
from codexd.ledger import seal
from codexd.model import Task, is_id, to_json
from codexd.routes import QUERIES, ROUTES
from codexd.view import LATE, View
from tests.daemon import until
from tests.web import Said, Web, master

FAKE = Path(__file__).resolve().parent / "bin" / "codex"
WORKING = f"codex:\n  bin: {FAKE}\n"  # every task gets an answer at once
HELD = "codex:\n  bin: /nowhere/codex\n"  # the gate stays closed: tasks stay queued


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Web]:
    """A server whose master is down."""
    Directories.below(tmp_path).inbox.mkdir()
    with Web(tmp_path, HELD) as one:
        yield one


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with serving(tmp_path_factory.mktemp("h"), HELD) as one:
        yield one


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with serving(tmp_path_factory.mktemp("w"), WORKING) as one:
        yield one


@contextmanager
def serving(root: Path, config: str) -> Iterator[Web]:
    """A master and a server on one root."""
    (root / "codexd.yaml").write_text(config)
    with master(root):
        until(lambda: Directories.below(root).heartbeat.exists(), "the master's heartbeat")
        with Web(root, config) as web:
            yield web


def ended(web: Web, id: str) -> Said:
    said = web.ask("GET", f"/tasks/{id}?wait=15")
    assert said.json["ended"], said.body
    return said


# --- submitting --------------------------------------------------------------------


def test_a_task_from_submission_to_answer(working: Web) -> None:
    said = working.post("/tasks", {"prompt": "Say hello.", "session": "a/b", "timeout": "5m"})
    assert said.status == 202
    id = said.json["id"]
    assert is_id(id)
    assert said.json.keys() == {"id", "state"}
    assert said.headers["location"] == f"/tasks/{id}"
    task = ended(working, id).json
    assert (task["state"], task["outcome"], task["session"]) == ("done", "done", "a/b")
    assert task["answer"].startswith("answer 1 to ")
    answer = Path(task["answer_file"])
    assert answer == working.root / "answers" / f"{id}.md"
    assert answer.read_text().endswith(f"\n---\n{task['answer']}\n")


def test_http_and_command_show_the_same(working: Web) -> None:
    id = working.post("/tasks", {"prompt": "x", "title": "Grüße"}).json["id"]
    shown = ended(working, id).json
    view = View(Directories.below(working.root))
    assert shown == view.task(id)
    view.close()
    listed = {task["id"]: task for task in working.ask("GET", "/tasks").json["tasks"]}
    assert {**listed[id], "answer": shown["answer"]} == shown


def test_a_name_that_is_not_utf8_is_json_for_everybody(held: Web) -> None:
    name = os.fsencode(Directories.below(held.root).inbox) + b"/caf\xe9.md"
    with open(name, "w") as file:
        file.write("---\nsession: latin\n---\nx")
    said = until(
        lambda: [s for s in [held.ask("GET", "/tasks?session=latin")] if s.json["tasks"]],
        "the task",
    )[0]
    assert b"\\ud" not in said.body
    assert said.json["tasks"][0]["file"] == "caf?.md"


WRITTEN = {
    "timeout": ["1d", "1440m", "86400s", "1.5h", "90", "0.5m", "24h"],
    "memory": ["on", "off", "yes", "No", "TRUE", "false"],
}


@pytest.mark.parametrize(("key", "text"), [(k, t) for k, ts in WRITTEN.items() for t in ts])
def test_the_document_allows_what_the_server_takes(key: str, text: str) -> None:
    taskfile.parse("x.json", json.dumps({"prompt": "x", key: text}).encode())
    schema = openapi.REQUEST["properties"][key]["anyOf"][0]  # type: ignore[index]
    patterns = [one["pattern"] for one in schema["anyOf"] if "pattern" in one]
    assert any(re.fullmatch(pattern, text) for pattern in patterns)


@pytest.mark.parametrize("path", ["~", "~/a", "a~", " ", "a\nb", "\x85", "\x1f", "", "~x", "a\0"])
def test_the_document_knows_which_paths_the_server_takes(path: str) -> None:
    schema = openapi.REQUEST["properties"]["workdir"]["anyOf"][0]  # type: ignore[index]
    allowed = re.search(schema["pattern"], path) is not None
    try:
        taskfile.parse("x.json", json.dumps({"prompt": "x", "workdir": path}).encode())
    except taskfile.Refused:
        assert not allowed
    else:
        assert allowed


def test_a_key_makes_a_repeat_harmless(held: Web) -> None:
    body = {"prompt": "once", "priority": 3}
    first = held.post("/tasks", body, Idempotency_Key="k 1")
    assert first.status == 202
    for again in (
        held.post("/tasks", body, Idempotency_Key="k 1"),
        held.post("/tasks", {"priority": 3, "key": "k 1", "prompt": "once"}),
        held.post("/tasks", {**body, "key": "k 1"}, Idempotency_Key="k 1"),
    ):
        assert (again.status, again.json["id"]) == (202, first.json["id"])
        assert again.headers["location"] == first.headers["location"]
    other = held.post("/tasks", {"prompt": "twice", "priority": 3}, Idempotency_Key="k 1")
    assert (other.status, other.code) == (409, "key-conflict")
    assert first.json["id"] in other.json["error"]["message"]


def test_a_key_in_utf_8_is_the_same_in_header_and_body(held: Web) -> None:
    with held.connect() as client:
        body = json.dumps({"prompt": "x", "key": "Schlüssel"}).encode()
        client.send(
            "POST /tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Idempotency-Key: Schlüssel\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        said = client.read()
    assert said.status == 202
    assert held.ask("GET", said.headers["location"]).json["key"] == "Schlüssel"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "empty"),
        (b"[]", "found a list"),
        (b'{"prompt": ""}', "prompt"),
        (b'{"prompt": " \\n"}', "prompt"),
        (b'{"session": "x"}', "prompt"),
        (b'{"prompt": 5}', "prompt"),
        (b'{"prompt": "x", "prompt": "y"}', "prompt"),
        (b'{"prompt": "x", "promt": "y"}', "promt"),
        (b'{"prompt": "x",\n "priority": 11}', "line 2: priority"),
        (b'{"prompt": "x", "priority": NaN}', "NaN"),
        (b'{"prompt": "x", "after": "y"}', "a list of at most 50"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "\\ud800"}', ""),
        (b'{"prompt": "x", "images": ' + b"[" * 100_000, ""),
        (b'{"prompt": "x", "key": "a"}', "Idempotency-Key"),
    ],
)
def test_what_no_task_file_may_say_is_refused_before_delivery(
    alone: Web, body: bytes, why: str
) -> None:
    said = alone.ask("POST", "/tasks", body, Idempotency_Key="b")
    assert (said.status, said.code) == (400, "invalid")
    assert why in said.json["error"]["message"]
    assert not list((alone.root / "inbox").iterdir())


@pytest.mark.parametrize(
    ("key", "why"), [(b"", "Idempotency-Key: found ''"), (b"\xff", "is not UTF-8")]
)
def test_what_no_key_is(alone: Web, key: bytes, why: str) -> None:
    head = b"POST /tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with alone.connect() as client:
        client.send(head + b"Content-Length: 15\r\nIdempotency-Key: " + key)
        client.send(b'\r\n\r\n{"prompt": "x"}')
        said = client.read()
    assert (said.status, said.code) == (400, "invalid")
    assert why in said.json["error"]["message"]


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ({"workdir": "/etc"}, "workdir /etc is not below a configured root"),
        ({"sandbox": "danger-full-access"}, "sandbox danger-full-access is wider"),
    ],
)
def test_what_the_master_rejects_is_told_at_once(held: Web, task: dict[str, str], why: str) -> None:
    said = held.post("/tasks", {"prompt": "x", **task})
    assert (said.status, said.code) == (400, "rejected")
    assert why in said.json["error"]["message"]


def test_a_rejected_file_is_no_task_but_its_reason_is_told(held: Web) -> None:
    id = "20261123t072011-rejected00"
    (held.root / "inbox" / f"{id}.json").write_text("{")
    until(lambda: (held.root / "rejected" / f"{id}.json").exists(), "the rejection")
    said = held.ask("GET", f"/tasks/{id}")
    assert (said.status, said.code) == (404, "rejected")
    assert "this file did not become a task: " in said.json["error"]["message"]


def test_a_large_prompt_arrives_whole(held: Web) -> None:
    prompt = "Ωmega " * 85_000  # nearly a MiB, in three ways of counting
    body = json.dumps({"prompt": prompt}, ensure_ascii=False).encode()
    said = held.ask("POST", "/tasks", body)
    assert said.status == 202
    stored = json.loads((held.root / "tasks" / said.json["id"] / "task.json").read_text())
    assert stored["request"]["prompt"] == prompt


def test_without_a_master_a_task_is_queued_and_can_be_asked_for(alone: Web) -> None:
    said = alone.post("/tasks", {"prompt": "x", "title": "later"})
    assert (said.status, said.json["state"]) == (202, "queued")
    task = alone.ask("GET", said.headers["location"]).json
    assert (task["id"], task["state"], task["title"]) == (said.json["id"], "queued", "later")
    assert [p.name for p in (alone.root / "inbox").iterdir()] == [f"{task['id']}.json"]


def test_without_a_master_a_key_is_not_confirmed_and_safe_to_repeat(alone: Web) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(
            pool.map(lambda _: alone.post("/tasks", {"prompt": "x"}, Idempotency_Key="k"), range(2))
        )
    for said in both:
        assert (said.status, said.code) == (503, "unconfirmed")
        assert said.headers["retry-after"] == "5"
        assert alone.ask("GET", said.headers["location"]).json["state"] == "queued"
    with master(alone.root):
        said = alone.post("/tasks", {"prompt": "x"}, Idempotency_Key="k")
        assert said.status == 202
        tasks = alone.ask("GET", "/tasks").json["tasks"]
    assert [task["id"] for task in tasks] == [said.json["id"]]


def test_a_queue_that_is_full_takes_no_more(tmp_path: Path) -> None:
    Directories.below(tmp_path).inbox.mkdir()
    with Web(tmp_path, "limits:\n  queue: 2\n") as web:
        assert [web.post("/tasks", {"prompt": "x"}).status for _ in range(2)] == [202, 202]
        said = web.post("/tasks", {"prompt": "x"})
    assert (said.status, said.code, said.headers["retry-after"]) == (503, "full", "5")


def test_an_inbox_that_is_missing_is_told(tmp_path: Path) -> None:
    with Web(tmp_path) as web:
        said = web.post("/tasks", {"prompt": "x"})
        assert (said.status, said.code) == (503, "inbox")
        assert "No such file or directory" in said.json["error"]["message"]
        assert str(tmp_path) not in said.body.decode()


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    """The inbox on a file system of 64 KiB, in a mount namespace of the server's own."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this host gives no user namespaces")
    inbox = Directories.below(tmp_path).inbox
    inbox.mkdir()
    mount = f'mount -t tmpfs -o size=64k none "{inbox}" && exec "$@"'
    with Web(tmp_path, within=[*unshare, "sh", "-c", mount, "sh"]) as web:
        seen = Path(f"/proc/{web.child.pid}/root{inbox}")
        said = web.post("/tasks", {"prompt": "x" * 200_000})
        assert (said.status, said.code, said.headers["retry-after"]) == (503, "disk", "5")
        assert list(seen.iterdir()) == []
        id = web.post("/tasks", {"prompt": "small"}).json["id"]
        (seen / ".filler.tmp").write_bytes(b"x" * 4096)
        with pytest.raises(OSError, match="No space left"):
            (seen / ".filler.tmp").write_bytes(b"x" * 65536)
        assert web.post(f"/tasks/{id}/cancel").status == 202


# --- asking, waiting, cancelling -----------------------------------------------------


def test_waiting_ends_with_the_task(held: Web) -> None:
    id = held.post("/tasks", {"prompt": "x"}).json["id"]
    assert held.ask("GET", f"/tasks/{id}?wait=0.3").json["state"] == "queued"
    with held.connect() as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.ask, "GET", f"/tasks/{id}?wait=60")
        said = held.post(f"/tasks/{id}/cancel")
        assert (said.status, said.json) == (202, {"id": id, "state": "queued"})
        assert waiting.result().json["state"] == "cancelled"
    assert held.post(f"/tasks/{id}/cancel").json == {"id": id, "state": "cancelled"}
    assert held.ask("POST", f"/tasks/{id}/cancel").status == 202  # needs no body
    said = held.post(f"/tasks/{id}/cancel", {"why": "because"})
    assert (said.status, said.code) == (400, "invalid")


def test_who_waits_is_answered_when_the_server_ends(tmp_path: Path) -> None:
    Directories.below(tmp_path).inbox.mkdir()
    with Web(tmp_path) as web, web.connect() as client:
        id = client.ask("POST", "/tasks", b'{"prompt": "x"}').json["id"]
        client.send(f"GET /tasks/{id}?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert web.ask("GET", "/tasks").status == 200  # it has read what came before
        web.child.terminate()
        said = client.read()
        assert (said.json["state"], said.headers["connection"]) == ("queued", "close")
        assert web.ended()[0] == 0


def test_those_who_wait_leave_room_for_others(alone: Web) -> None:
    id = alone.post("/tasks", {"prompt": "x"}).json["id"]
    waiting = [alone.connect() for _ in range(WAITERS)]
    for client in waiting:
        client.send(f"GET /tasks/{id}?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    said = until(lambda: _refused(alone, id), "a refusal to wait")
    assert said
    assert (said.code, said.headers["retry-after"]) == ("busy", "5")
    assert alone.ask("GET", f"/tasks/{id}").status == 200
    for client in waiting:
        client.__exit__(None, None, None)


def _refused(web: Web, id: str) -> Said | None:
    said = web.ask("GET", f"/tasks/{id}?wait=0.01")
    return said if said.status == 503 else None


def test_what_cannot_be_read_is_left_out_of_what_is_seen(tmp_path: Path) -> None:
    """Who looks is not the one to mend it; the master names it."""
    dirs = Directories.below(tmp_path)
    spool.prepare(dirs)
    one, bad = spool.new_id(), spool.new_id()
    (dirs.inbox / f"{one}.md").write_text("---\nsession: s\n---\nx")
    (dirs.inbox / f"{bad}.md").write_text("---\nsesion: s\n---\nx")
    (dirs.sessions / "s.json").write_text("{")
    view = View(dirs)
    assert [(t["id"], t["session"], t["state"]) for t in view.short_list()] == [
        (one, "s", "queued"), (bad, bad, "queued"),
    ]  # fmt: skip
    assert view.sessions() == []
    assert view.session("s") is None
    dirs.inbox.rename(tmp_path / "elsewhere")
    assert view.short_list() == []
    view.close()


def test_where_no_master_ever_was_there_are_no_sessions(alone: Web) -> None:
    assert alone.ask("GET", "/sessions").json == {"sessions": []}
    left = Directories.below(alone.root).sessions / "s.json"  # and the ledger is lost
    left.parent.mkdir()
    left.write_text('{"name": "s"}')
    assert alone.ask("GET", "/sessions").json == {"sessions": []}


def test_a_session_is_listed_as_soon_as_it_is_shown(held: Web) -> None:
    """By a task that waits, before any has run."""
    held.post("/tasks", {"prompt": "x", "session": "to come"})
    until(lambda: held.ask("GET", "/sessions/to%20come").status == 200, "it is known")
    shown = held.ask("GET", "/sessions/to%20come").json
    assert shown in held.ask("GET", "/sessions").json["sessions"]
    assert held.ask("GET", "/sessions").json["sessions"].count(shown) == 1


def test_without_an_inbox_nothing_can_be_cancelled(tmp_path: Path) -> None:
    """It is said; the task is as it was."""
    with serving(tmp_path, HELD) as web:
        id = web.post("/tasks", {"prompt": "x"}).json["id"]
        ledger = Directories.below(tmp_path).ledger
        until(lambda: ledger.exists() and id in ledger.read_text(), "it is in the ledger")
        inbox = Directories.below(tmp_path).inbox
        inbox.rename(tmp_path / "elsewhere")
        inbox.touch()
        said = web.post(f"/tasks/{id}/cancel")
        assert (said.status, said.code) == (503, "inbox")
        assert web.ask("GET", f"/tasks/{id}").json["state"] == "queued"


def test_no_task_is_larger_than_a_file_may_be(tmp_path: Path) -> None:
    Directories.below(tmp_path).inbox.mkdir()
    with Web(tmp_path, "limits:\n  file: 4K\n") as web:
        assert web.post("/tasks", {"prompt": "x" * 4000}).status == 202
        said = web.post("/tasks", {"prompt": "x" * 4096})
        assert (said.status, said.code) == (413, "too-large")
        assert said.json["error"]["message"] == "the task is larger than 4096 bytes (limits.file)"


def test_a_master_that_says_nothing_is_down(tmp_path: Path) -> None:
    """Though it holds its lock: it hangs, or stands still."""
    dirs = Directories.below(tmp_path)
    spool.prepare(dirs)
    held, view = lock.hold(dirs.lock, 1.0), View(dirs)
    for ago, status in ((LATE - 5, "ok"), (LATE + 5, "down"), (-60, "down")):
        dirs.heartbeat.write_text(json.dumps({"beat": clock.steady() - ago, "running": 1}))
        well, told = view.health()
        assert (well, told["status"]) == (status == "ok", status)
    assert str(told["message"]).startswith("no sign of life of the master for ")
    os.close(held)
    view.close()


def test_pages(tmp_path: Path) -> None:
    with serving(tmp_path, HELD) as web:
        ids = [
            web.post("/tasks", {"prompt": "x", "session": f"s {n % 2}"}).json["id"]
            for n in range(7)
        ]
        for id in ids[:2]:
            web.post(f"/tasks/{id}/cancel")
            ended(web, id)
        newest = sorted(ids, reverse=True)
        assert listed(web, "") == (newest, None)
        first, after = listed(web, "limit=3")
        assert (first, after) == (newest[:3], newest[2])
        assert listed(web, f"limit=500&cursor={after}") == (newest[3:], None)
        assert set(listed(web, "state=cancelled")[0]) == set(ids[:2])
        assert set(listed(web, "session=s%201")[0]) == set(ids[1::2])
        assert listed(web, "session=s+1&state=cancelled") == ([ids[1]], None)
        assert listed(web, "session=none") == ([], None)
        assert listed(web, "session=") == ([], None)
        assert walk(web, "state=queued&limit=2") == [id for id in newest if id in ids[2:]]
        task = web.ask("GET", "/tasks?limit=1").json["tasks"][0]
        assert task.keys() == openapi.LISTED.keys()
    view = View(Directories.below(tmp_path))
    walked, cursor = view.page(None, None, 50, None, 0.0)
    while cursor:
        more, cursor = view.page(None, None, 50, cursor, 0.0)
        assert len(more) <= 1  # there was no time for two
        walked += more
    assert [task["id"] for task in walked] == newest
    (tmp_path / "archive" / "9999-12").mkdir()  # a month after that of the cursor
    assert [task["id"] for task in view.page(None, None, 50, newest[0])[0]] == newest[1:]
    (tmp_path / "archive").rename(tmp_path / "archive.old")
    (tmp_path / "archive").touch()
    assert len(view.page("queued", None, 50, None)[0]) == 5  # needs no look at what has ended
    with pytest.raises(NotADirectoryError):
        view.page("cancelled", None, 50, None)
    view.close()


def listed(web: Web, query: str) -> tuple[list[str], str | None]:
    said = web.ask("GET", f"/tasks?{query}").json
    return [task["id"] for task in said["tasks"]], said["next"]


def walk(web: Web, query: str) -> list[str]:
    """Page by page, to the end."""
    found, cursor = listed(web, query)
    while cursor:
        more, cursor = listed(web, f"{query}&cursor={cursor}")
        found += more
    return found


# --- sessions, health, metrics ---------------------------------------------------------


def test_sessions(working: Web) -> None:
    name = "Straße/ö & 100%"
    id = working.post("/tasks", {"prompt": "x", "session": name}).json["id"]
    ended(working, id)
    said = working.ask("GET", f"/sessions/{quote(name, safe='')}").json
    assert (said["name"], said["live"]) == (name, [])
    assert said["thread"]
    assert said.keys() == openapi.SESSION["properties"].keys()  # type: ignore[attr-defined]
    assert said in working.ask("GET", "/sessions").json["sessions"]
    assert working.ask("GET", "/sessions/none").code == "not-found"
    assert working.ask("GET", "/sessions/a/b").code == "not-found"  # a slash must be encoded


def test_health(working: Web, held: Web, alone: Web) -> None:
    said = until(lambda: _well(working), "a healthy daemon")
    assert said
    assert said["watch"] in ("inotify", "polling")
    assert said["inbox"] == 0
    assert {"queued", "running", "waiting", "heartbeat_age"} <= said.keys()
    closed = held.ask("GET", "/health")
    assert (closed.status, closed.json["status"]) == (503, "codex")
    assert closed.headers["retry-after"] == "5"
    down = alone.ask("GET", "/health")
    assert (down.status, down.json["status"], down.json["inbox"]) == (503, "down", 0)


def _well(web: Web) -> dict[str, Any] | None:
    said = web.ask("GET", "/health")
    return said.json if said.status == 200 else None


SAMPLE = re.compile(r'(codexd_[a-z_]+)(?:\{[a-z]+="(?:[^"\\\n]|\\[\\"n])*"\})? -?[0-9.]+')


def test_metrics(held: Web) -> None:
    assert held.ask("GET", "/tasks").status == 200
    said = held.ask("GET", "/metrics")
    assert said.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = said.body.decode().splitlines()
    families = [line.split()[2] for line in lines if line.startswith("# HELP ")]
    types = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE ")}
    assert len(set(families)) == len(families)
    assert list(types) == families
    for line in lines:
        if not line.startswith("#"):
            found = SAMPLE.fullmatch(line)
            assert found, line
            assert found[1] in types
            assert (types[found[1]] == "counter") == found[1].endswith("_total")
    assert "codexd_up 1" in lines
    assert 'codexd_gate_closed{reason="codex"} 1' in lines
    for reason in ("quota", "transient", "rate", "drain", "host"):
        assert f'codexd_gate_closed{{reason="{reason}"}} 0' in lines
    assert "codexd_tokens_today 0" in lines
    assert "codexd_hooks_owed 0" in lines
    queued = next(line for line in lines if line.startswith('codexd_tasks{state="queued"}'))
    assert int(queued.split()[1]) == held.ask("GET", "/health").json["queued"]
    assert any(line.startswith('codexd_http_replies_total{code="200"} ') for line in lines)


def test_metrics_of_what_ended_and_of_the_end_that_is_known(working: Web) -> None:
    def counted(outcome: str) -> int:
        lines = working.ask("GET", "/metrics").body.decode().splitlines()
        name = f'codexd_tasks_ended_total{{outcome="{outcome}"}} '
        return next(int(line.removeprefix(name)) for line in lines if line.startswith(name))

    until(lambda: "codexd_up 1" in working.ask("GET", "/metrics").body.decode(), "its heartbeat")
    done, failed = counted("done"), counted("config")
    assert counted("oom") == 0
    id = working.post("/tasks", {"prompt": "x"}).json["id"]
    ended(working, id)
    never = {"prompt": "x", "session": "none yet", "resume": "always"}
    ended(working, working.post("/tasks", never).json["id"])
    until(lambda: counted("done") == done + 1, "one more that is done")
    until(lambda: counted("config") == failed + 1, "one more that has failed")
    gate = {"quota:w": {"until": "1970-01-01T01:00:00.500Z"}, "auth": {}, "host": None}
    lines = metrics.render({"status": "quota", "gate": gate}, {}, {}).splitlines()
    told = [line for line in lines if line.startswith("codexd_gate_until_timestamp_seconds")]
    assert told == ['codexd_gate_until_timestamp_seconds{reason="quota:w"} 3600.5']
    assert not [line for line in lines if line.startswith("codexd_tasks_ended_total")]


def test_a_ledger_of_a_newer_version_is_told(tmp_path: Path) -> None:
    (tmp_path / "tasks.md").write_bytes(seal("# codexd ledger, format 9"))
    with Web(tmp_path) as web:
        said = web.ask("GET", "/tasks")
        assert (said.status, said.code) == (503, "ledger")
        assert web.ask("GET", "/health").json["status"] == "down"


# --- the document ------------------------------------------------------------------------


def test_the_document_has_every_route_and_no_other() -> None:
    told: dict[str, dict[str, str]] = {}
    queries: dict[str, tuple[str, ...]] = {}
    for path, item in openapi.DOCUMENT["paths"].items():  # type: ignore[attr-defined]
        for method, operation in item.items():
            told.setdefault(path, {})[method.upper()] = operation["operationId"]
            has = operation.get("parameters", [])
            names = tuple(p["name"] for p in has if p["in"] == "query")
            queries |= {operation["operationId"]: names} if names else {}
            assert {p["name"] for p in has if p["in"] == "path"} == set(
                re.findall(r"{(\w+)}", path)
            )
    assert told == ROUTES
    assert queries == QUERIES


def test_the_document_has_every_field_and_no_other() -> None:
    schemas = openapi.DOCUMENT["components"]["schemas"]  # type: ignore[index]
    assert list(schemas["Request"]["properties"]) == sorted(
        taskfile.KEYS, key=list(schemas["Request"]["properties"]).index
    )
    assert schemas["Task"]["properties"].keys() == to_json(Task("x"), None, None).keys()
    assert not set(_references(openapi.DOCUMENT)) - {f"#/components/schemas/{s}" for s in schemas}


def _references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            yield from _references(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _references(inner)


def test_the_manual_has_every_route_and_every_status() -> None:
    page = (Path(__file__).parent.parent / "man" / "codexd-http.8").read_text()
    requests = page.partition(".Ss Requests")[2].partition(".Ss Errors")[0]
    told = re.findall(
        r"(?<=[ ])/[A-Za-z/.]+", "\n".join(re.findall(r"^\.It Li .*", requests, re.M))
    )
    routes = {route.replace("{id}", "ID").replace("{name}", "NAME") for route in ROUTES}
    assert set(told) == routes
    errors = page.partition(".Ss Errors")[2].partition(".Ss Limits")[0]
    operations = [o for p in openapi.DOCUMENT["paths"].values() for o in p.values()]  # type: ignore[attr-defined]
    said = {status for o in operations for status in o["responses"]} - {"200", "202"}
    assert set(re.findall(r"^\.It ([0-9]{3})$", errors, re.M)) == said


def test_every_operation_is_done(tmp_path: Path) -> None:
    api = Api(load(Directories.below(tmp_path), explicit=False))
    assert api.operations == {name for verbs in ROUTES.values() for name in verbs.values()}
    api.close()
