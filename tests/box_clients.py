"""Clients of the HTTP server in a box, who submit one task after another, side by side.

    python -m tests.box_clients SOCKET NAME STOP

Each has a connection for each submission, and a key, which begins with NAME, and repeats
with it what was not accepted.  When there is a file STOP they end; then it is told, as
JSON: {KEY: [what came of each try, the last a task's id]}, where a try that was not accepted
is a status, or "lost" for a connection that ended without a reply.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException

CLIENTS = 3
PATIENCE = 30.0
PACE = 0.05  # seconds between submissions of a client: many of them prove no more


class Connection(HTTPConnection):
    """Over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self.path)


def submit(path: str, key: str) -> str | int:
    link = Connection(path)
    head = {"Content-Type": "application/json", "Idempotency-Key": key}
    try:
        link.request("POST", "/tasks", json.dumps({"prompt": key, "not_before": "1h"}), head)
        said = link.getresponse()
        body = json.loads(said.read())
        return str(body["id"]) if said.status == 202 else said.status
    except (OSError, HTTPException):
        return "lost"
    finally:
        link.close()


def main() -> None:
    path, name, stop = sys.argv[1:]
    told: dict[str, list[str | int]] = {}

    def work(client: int) -> None:
        turn = 0
        while not os.path.exists(stop):
            turn += 1
            tries = told.setdefault(f"{name}-{client}-{turn}", [])
            while not tries or tries[-1] in (503, "lost"):
                tries.append(submit(path, f"{name}-{client}-{turn}"))
            time.sleep(PACE)

    clients = [threading.Thread(target=work, args=(client,)) for client in range(CLIENTS)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
