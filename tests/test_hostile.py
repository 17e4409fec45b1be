"""A turn that looks everywhere, in the hardened unit, with the real CLI and its sandbox.

What it must not find: the key of the model's service, the token of the HTTP server, what other
tasks said.  What it must not do: write outside of its workdir, reach who starts workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from codexd.units import unit
from tests.box import Box
from tests.box.host import require
from tests.installed import KEY, SPOOL, STATE, WORK, Installed

pytestmark = [pytest.mark.xdist_group("box"), pytest.mark.timeout(300)]

TOKEN = "token-canary-0123456789abcdef"
WORDS = "the-words-canary-of-somebody-else"
OPEN = "canary-that-everybody-may-see"
# As patterns: neither the script nor a grep that runs has itself what is looked for.
_WANTED = {"KEY": KEY, "TOKEN": TOKEN, "WORDS": WORDS, "OPEN": OPEN}
_PATTERNS = " ".join(f"{name}:[{text[0]}]{text[1:]}" for name, text in _WANTED.items())

LOOK = f"""\
#!/bin/bash
# $1: a worker that runs besides
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
    {STATE}/tasks/x {STATE}/sessions/x /etc/codexd/codexd.yaml /etc/systemd/system/x.service \\
    /run/codexd/exits/x /run/systemd/system/x.service /usr/lib/codexd/codexd-exit work-file; do
    (: >>"$place") 2>/dev/null && echo "wrote to $place"
done
for verb in stop start kill restart; do
    systemctl --no-ask-password $verb "$1" >/dev/null 2>&1 && echo "did $verb"
done
curl -s --unix-socket /run/codexd/http.sock http://localhost/health | grep -q status &&
    echo "spoke to http"
ps -e -o args | grep -q '[c]odexd-master' && echo "saw the master"
echo the script ends
"""


@pytest.fixture(scope="module")
def codexd() -> Iterator[Installed]:
    require("hybrid")
    with Box("hybrid") as box:
        one = Installed(box)
        box.push({"/etc/codexd/http.token": TOKEN + "\n"}, mode=0o640)
        box.run("chgrp", "codexd", "/etc/codexd/http.token")
        one.configure(one.config + "http:\n  listen: unix\n  token_file: /etc/codexd/http.token\n")
        box.push({f"{WORK}/look.sh": LOOK, f"{WORK}/open.txt": OPEN + "\n"}, owner="codexd")
        box.run("systemctl", "start", "codexd")
        one.drop(f"---\nsession: other\n---\n{WORDS}\n[[say again: {WORDS}]]", "other.md")
        one.ended("other")
        one.drop("[[shell sleep 9999]]", "beside.md")
        one.running("beside")
        yield one


def looked(one: Installed, name: str, front: str) -> str:
    """What the script said to the model."""
    beside = one.task("beside")
    assert beside
    before = one.invocations([beside["id"]])
    look = f"[[shell bash look.sh {unit(beside['id'])}]]\n[[say looked]]"
    one.drop(f"---\n{front}\n---\n{look}", f"{name}.md")
    assert one.ended(name, 120)["state"] == "done"
    assert one.invocations([beside["id"]]) == before, "the other worker runs on"
    outputs = [json.dumps(out) for turn in one.asked() for out in turn["outputs"]]
    told = [out for out in outputs if "script begins" in out][-1]
    assert "the script ends" in told, "it came to its end"
    return told


@pytest.mark.parametrize("sandbox", ["workspace-write", "read-only"])
def test_a_turn_in_the_sandbox_finds_and_does_nothing(codexd: Installed, sandbox: str) -> None:
    told = looked(codexd, f"in-{sandbox}", f"sandbox: {sandbox}")
    assert f"found OPEN in {WORK}/open.txt" in told, "it can look"
    assert ("wrote to work-file" in told) == (sandbox == "workspace-write")
    left = told.replace("wrote to work-file", "").replace("found OPEN", "")
    for word in ("found ", "wrote to", "did ", "spoke to", "saw "):
        assert word not in left, told


def test_without_a_sandbox_the_unit_still_holds(codexd: Installed) -> None:
    """The key is within reach then, as the manual says; others' work is not."""
    codexd.configure(codexd.config + "  sandbox: danger-full-access\n")
    codexd.box.run("systemctl", "restart", "codexd")
    told = looked(codexd, "danger", "sandbox: danger-full-access")
    assert "wrote to work-file" in told
    for line in (
        "found TOKEN", "did ", "spoke to", "saw ", f"wrote to {SPOOL}", f"wrote to {STATE}/tasks",
        "wrote to /etc", "wrote to /run/systemd", "wrote to /usr",
        f"found WORDS in {SPOOL}", f"found WORDS in {STATE}/tasks",
    ):  # fmt: skip
        assert line not in told, told


def test_the_journal_and_the_state_have_no_key(codexd: Installed) -> None:
    ask = ("sh", "-c", f"journalctl --no-pager -o export | grep -ac -- {KEY}; "
           f"grep -rl -- {KEY} {STATE} {SPOOL} /run/codexd; true")  # fmt: skip
    assert codexd.box.run(*ask).stdout == "0\n"
