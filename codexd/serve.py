"""codexd serve: master and HTTP in the foreground, workers as child processes.

The embedded form, for a machine without systemd units or a person at a
terminal.  HTTP runs in a process of its own, so that no client can slow the
master; it ends with it, and is started again when it dies.

Prints one line on stdout when everything is there: `ready inbox=… http=…`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from codexd import master
from codexd.config import ConfigError
from codexd.program import Exit, load, refusal, where
from codexd.service import Level, Service

_AGAIN = 5.0  # seconds before a server that died is started again


class Http:
    """The HTTP server's process."""

    def __init__(self, args: argparse.Namespace, service: Service) -> None:
        self._command = [sys.executable, "-m", "codexd.http", *where(args)]
        self._service = service
        self._alive, self._ours = os.pipe2(os.O_CLOEXEC)
        self._child: subprocess.Popen[str] | None = None
        self._not_before = 0.0
        self.address = "off"

    def start(self) -> None:
        """Start it and wait until it says where it listens.  Raises HttpFailed."""
        child = self._spawn()
        assert child.stdout is not None
        said, _, address = child.stdout.readline().rstrip("\n").partition(" ")
        if said != "listening":
            status = child.wait()
            if status <= 0:  # killed: it could not say why
                self._service.log(Level.ERROR, "http.died", status=status)
            raise HttpFailed(status if status > 0 else Exit.UNAVAILABLE)
        self.address = address

    def _spawn(self) -> subprocess.Popen[str]:
        self._not_before = time.monotonic() + _AGAIN
        self._child = subprocess.Popen(
            self._command, stdin=self._alive, stdout=subprocess.PIPE, text=True
        )
        return self._child

    def tend(self) -> None:
        """Start it again if it died."""
        child = self._child
        if child is None or child.poll() is None or child.returncode == Exit.DONE:
            return
        if time.monotonic() >= self._not_before:
            self._service.log(Level.ERROR, "http.died", status=child.returncode)
            self._spawn()  # without a wait for it: nothing may hold the master up

    def stop(self) -> None:
        os.close(self._ours)
        if self._child:
            self._child.terminate()
            self._child.wait()


def serve(args: argparse.Namespace) -> int:
    """Serve until told to stop; the exit status."""
    service = Service("codexd")
    try:
        config = load(args)
    except ConfigError as error:
        service.log(Level.ERROR, "configuration", why=str(error))
        return refusal(error)
    http = Http(args, service) if config.http.listen is not None else None

    def begin(one: master.Master) -> None:
        address = "off"
        if http:
            http.start()
            one.beside = http.tend
            address = http.address
        service.ready()
        print(f"ready inbox={config.dirs.inbox} http={address}", flush=True)

    try:
        return master.serve(service, lambda: load(args), begin, embedded=True)
    except HttpFailed as failed:
        return failed.status
    finally:
        if http:
            http.stop()


class HttpFailed(Exception):
    """The HTTP server could not begin; it has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status
