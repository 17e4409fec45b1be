"""A turn that looks everywhere, in the hardened unit, with the real CLI and its sandbox.

What it must not find: the key of the model's service, Codex's login, the token of the HTTP
server, what other tasks said.  What it must not do: write outside of its workdir, not even
its own result or the notes that others are given, reach who starts workers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from codexd.spool import new_id
from codexd.units import unit
from tests.box import Box
from tests.box.host import require
from tests.daemon import until
from tests.installed import KEY, SPOOL, STATE, WORK, Installed

pytestmark = [pytest.mark.xdist_group("box"), pytest.mark.timeout(300)]

TOKEN = "token-canary-0123456789abcdef"
LOGIN = "login-canary-of-codex"
WORDS = "the-words-canary-of-somebody-else"
OPEN = "canary-that-everybody-may-see"
# As patterns: neither the script nor a grep that runs has itself what is looked for.
_WANTED = {"KEY": KEY, "LOGIN": LOGIN, "TOKEN": TOKEN, "WORDS": WORDS, "OPEN": OPEN}
_PATTERNS = " ".join(f"{name}:[{text[0]}]{text[1:]}" for name, text in _WANTED.items())

THE_MASTERS = (
    "tasks.md",
    "checkpoint",
    "lock",
    "sessions",
    "archive",
    "transcripts",
    "keys",
    "usage",
)
NOTES = "/srv/notes"
PORT = 7777

LOOK = f"""\
#!/bin/bash
# $1: a worker that runs besides, $2: the id of its task, $3: our own
echo the script begins
for pair in {_PATTERNS}; do
    name=${{pair%%:*}} wanted=${{pair#*:}}
    env | grep -q -- "$wanted" && echo "found $name in its environment"
    cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | grep -aq -- "$wanted" &&
        echo "found $name in /proc"
    # Not /usr and the like: in a box they are those of the machine that tests.
    grep -rlsa -- "$wanted" {STATE} {SPOOL} /etc /run /var/log /tmp /var/tmp /home /root /srv /dev |
        sed "s|^|found $name in |"
done
for place in {SPOOL}/inbox/x.md {SPOOL}/answers/x.md {STATE}/tasks.md {STATE}/codex/config.toml \\
    {STATE}/codex/codexd.config.toml {STATE}/codex/.codexd/x {STATE}/codex/sessions/x \\
    {STATE}/{{tasks,sessions,archive,transcripts,keys,usage}}/x {STATE}/{{checkpoint.json,lock}} \\
    {SPOOL}/{{rejected,schedules}}/x /etc/codexd/codexd.yaml /etc/systemd/system/x.service \\
    /etc/systemd/system/codexd-worker@.service.d/{{own,x}}.conf /usr/lib/systemd/system/x.service \\
    /usr/lib/systemd/system/codexd{{,-worker@,-http}}.service /usr/lib/tmpfiles.d/codexd.conf \\
    /run/systemd/system.control/x /usr/share/polkit-1/rules.d/{{50-codexd,x}}.rules \\
    {STATE}/tasks/$2/1/{{result.json,events.jsonl,x}} {STATE}/tasks/$2/{{task.json,x}} \\
    {STATE}/tasks/$3/1/{{result.json,attempt.json,events.jsonl,x}} {STATE}/tasks/$3/task.json \\
    {STATE}/codex/auth.json {NOTES}/MEMORY.md {NOTES}/memory/{{more,x}}.md \\
    /run/codexd/{{exits,limits,hooks,master}}/x /run/systemd/system/x.service \\
    /usr/lib/codexd/codexd-exit work-file; do
    (: >>"$place") 2>/dev/null && echo "wrote to $place"
done
for file in {STATE}/tasks.md {STATE}/checkpoint.json {STATE}/codex/config.toml work-file \\
    {STATE}/tasks/$2/{{task.json,1/events.jsonl}} {SPOOL}/answers/other*.md; do
    ln -f "$file" "$file.linked" 2>/dev/null && echo "wrote to $file.linked"
    mv "$file" "$file.moved" </dev/null 2>/dev/null && echo "wrote to $file.moved" &&
        mv "$file.moved" "$file"
done
rm {STATE}/checkpoint.json </dev/null 2>/dev/null && echo "wrote to {STATE}/checkpoint: gone"
for verb in stop start kill restart; do
    systemctl --no-ask-password $verb "$1" >/dev/null 2>&1 && echo "did $verb"
done
for address in "--unix-socket /run/codexd/http.sock http://localhost" http://127.0.0.1:{PORT}; do
    curl -s $address/health | grep -q status && echo "spoke to http"
done
ps -e -o args | grep -q '[c]odexd-master' && echo "saw the master"
echo the script ends
"""


@pytest.fixture(scope="module")
def codexd() -> Iterator[Installed]:
    require("hybrid")
    with Box("hybrid") as box:
        one = Installed(box)
        furnish(one)
        box.run("systemctl", "start", "codexd")
        one.drop(f"---\nsession: other\n---\n{WORDS}\n[[say again: {WORDS}]]", "other.md")
        one.ended("other")
        one.drop("[[shell sleep 9999]]", "beside.md")
        one.running("beside")
        yield one


def furnish(one: Installed) -> None:
    """What must not be found, and what must not be written: whatever its owner could."""
    box = one.box
    one.configure(
        f"{one.config}http:\n  token_file: /etc/codexd/http.token\n"
        f"memory:\n  paths: [MEMORY.md, {NOTES}/MEMORY.md, {NOTES}/memory]\n"
    )
    one.drop_in("codexd-http.socket", f"[Socket]\nListenStream=127.0.0.1:{PORT}\n")
    box.push({"/etc/systemd/system/codexd-worker@.service.d/own.conf": "[Service]\n"})
    box.push({"/etc/codexd/http.token": TOKEN + "\n"}, mode=0o640)
    box.run("chgrp", "codexd", "/etc/codexd/http.token")
    login = {f"{STATE}/codex/auth.json": json.dumps({"OPENAI_API_KEY": LOGIN})}
    box.push(login, mode=0o600, owner="codexd")
    box.push({f"{WORK}/look.sh": LOOK, f"{WORK}/open.txt": OPEN + "\n"}, owner="codexd")
    notes = {f"{NOTES}/MEMORY.md": "# Notes\n", f"{NOTES}/memory/more.md": "# More\n"}
    box.push(notes, mode=0o666, owner="codexd")
    box.run("chmod", "777", NOTES, f"{NOTES}/memory")


def looked(one: Installed, front: str) -> str:
    """What the script said to the model."""
    beside = one.task("beside")
    assert beside
    before, id = one.invocations([beside["id"]]), new_id()
    look = f"[[shell bash look.sh {unit(beside['id'])} {beside['id']} {id}]]\n[[say looked]]"
    one.drop(f"---\n{front}\n---\n{look}", f"{id}.md")
    task = one.ended(id, 120)
    assert (task["id"], task["state"]) == (id, "done")
    assert one.invocations([beside["id"]]) == before, "the other worker runs on"
    outputs = [json.dumps(out) for turn in one.asked() for out in turn["outputs"]]
    told = [out for out in outputs if "script begins" in out][-1]
    assert "the script ends" in told, "it came to its end"
    return told


@pytest.mark.parametrize("sandbox", ["workspace-write", "read-only"])
def test_a_turn_in_the_sandbox_finds_and_does_nothing(codexd: Installed, sandbox: str) -> None:
    told = looked(codexd, f"sandbox: {sandbox}")
    assert f"found OPEN in {WORK}/open.txt" in told, "it can look"
    assert ("wrote to work-file" in told) == (sandbox == "workspace-write")
    left = re.sub(r"wrote to work-file(\.linked|\.moved)?", "", told).replace("found OPEN", "")
    for word in ("found ", "wrote to", "did ", "spoke to", "saw "):
        assert word not in left, told


def test_without_a_sandbox_the_unit_still_holds(codexd: Installed) -> None:
    """The key is within reach then, as the manual says; others' work is not."""
    own = codexd.box.pull("/etc/codexd/codexd.yaml").decode()
    codexd.configure(own.replace("codex:\n", "codex:\n  sandbox: danger-full-access\n"))
    codexd.box.run("systemctl", "restart", "codexd")
    told, beside = looked(codexd, "sandbox: danger-full-access"), codexd.task("beside")
    assert beside
    assert "wrote to work-file.linked" in told
    assert "wrote to work-file.moved" in told
    assert f"found LOGIN in {STATE}/codex/auth.json" in told, "the script looks well"
    assert re.search(rf"wrote to {STATE}/tasks/[0-9a-z-]+/1/result\.json", told)
    for line in (
        "found TOKEN", "did ", "spoke to", "saw ", f"wrote to {SPOOL}", f"wrote to {STATE}/tasks/x",
        *(f"wrote to {STATE}/{name}" for name in THE_MASTERS),
        f"wrote to {STATE}/tasks/{beside['id']}", "wrote to /etc", "wrote to /run", "wrote to /usr",
        "wrote to /srv", f"found WORDS in {SPOOL}", f"found WORDS in {STATE}/tasks",
    ):  # fmt: skip
        assert line not in told, told


def test_the_journal_and_the_state_have_no_secret(codexd: Installed) -> None:
    """Neither the keys, nor the token that clients show, a wrong one no more."""
    for token, status in ((TOKEN, "202"), (f"{TOKEN}-mistyped", "401")):
        post = ["curl", "-sS", "-w", "%{http_code}", "-H", f"Authorization: Bearer {token}"]
        post += ["-o", "/dev/null", "-H", "Content-Type: application/json"]
        body = json.dumps({"prompt": "[[say so]]", "title": f"with {status}"})
        said = codexd.box.run(*post, "-d", body, f"http://127.0.0.1:{PORT}/tasks")
        assert said.stdout == status
    posted = codexd.box.journal("CODEXD_EVENT=http.post")
    assert len(posted) == 2, "that they came is told, and not with what"
    until(lambda: [t for t in codexd.tasks("--state", "done") if t["title"] == "with 202"], "done")
    for secret in (KEY, TOKEN, LOGIN):
        places = f"{STATE} {SPOOL} /run/codexd"
        look = f"journalctl --no-pager -o export | grep -ac -- {secret}; "
        look += f"grep -rl --exclude=auth.json -- {secret} {places}; true"
        assert codexd.box.run("sh", "-c", look).stdout == "0\n"
