"""Schemathesis over /openapi.json: whatever is sent, what comes back is what it says.

A whole daemon with its HTTP server on loopback; the requests are made from its own
document, valid and not.  No answer is a 5xx but the documented 503, and each has a
status, a type and a body that the document names.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.proof.level import Figures, chances, pick
from tests.test_bad_input import FAKE

pytestmark = [pytest.mark.xdist_group("schema"), pytest.mark.timeout(pick(200, 1800, 14400))]

TOKEN = "0123456789abcdef0123456789abcdef"
EXAMPLES = pick(120, 250, 4200)  # of each operation, of which some have fewer
CASES = pick(500, 2000, 20_000)  # what has to come of them
# The one that tries each bound of each value by itself, 450 requests, is not short.
PHASES = pick("fuzzing", "coverage,fuzzing", "coverage,fuzzing")
CONFIG = f"""\
codex:
  bin: {FAKE}
limits:
  queue: 1000000
  disk_free: 0
http:
  listen: 127.0.0.1:0
  token_file: token
"""
# What the answers are held against.  Not `positive_data_acceptance`: a schema cannot say all
# that makes a task valid, so a request that fits it may still be rejected.
CHECKS = ",".join([
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_schema_conformance", "response_headers_conformance", "negative_data_rejection",
    "unsupported_method",
])  # fmt: skip
SETTINGS = """\
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]
"""


def run(daemon: Daemon, where: Path, examples: int, seed: int, *more: str) -> None:
    """One run of the command."""
    address = daemon.ready.rpartition("http=")[2]
    (where / "schemathesis.toml").write_text(SETTINGS)
    command: list[str | Path] = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", where / "schemathesis.toml",
        "run", f"{address}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}",
        "--checks", CHECKS, "--max-examples", str(examples), "--seed", str(seed),
        "--request-timeout", "20", "--continue-on-failure", "--no-color", "--generation-database",
        "none", "--report", "ndjson", "--report-ndjson-path", where / "told.ndjson", *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=where)
    said = done.stdout + done.stderr
    print(said[-6000:])
    assert done.returncode == 0, f"schemathesis found something (--seed {seed})"


def test_every_answer_is_in_the_document(tmp_path: Path, figure: Figures) -> None:
    daemon = Daemon(tmp_path / "root", config=CONFIG)
    token = daemon.root / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    seed = chances("schema").randrange(1 << 30)
    with daemon:
        run(daemon, tmp_path, EXAMPLES, seed, "--phases", PHASES)
        log = daemon.log.read_text()
    assert "http.failed" not in log
    assert "Traceback" not in log
    found = statuses(tmp_path / "told.ndjson")
    figure("schema: answers", found.total())
    figure("schema: of each status", dict(sorted(found.items())))
    assert found.total() >= CASES
    assert not {status for status in found if status[0] == "5"} - {"503"}


def statuses(report: Path) -> Counter[str]:
    """How often each status was answered."""
    return Counter(re.findall(r'"status_code": ?(\d+)', report.read_text()))
