"""The keeper of one box: the process that holds a box's state and boots its systemd.

Started by `tests.box.Box` with a plan (JSON) as its argument, as root.  It has a mount
namespace of its own, where an overlay of `/` lies over a tmpfs: what the box writes is
there for as long as the keeper lives, through any number of boots, and the host sees
nothing of it.

Orders come on stdin, a line each: "boot", "poweroff" (systemd's own way), "kill".  On
stdout it says "booted PID" and, once that PID 1 and everything below it has ended, "gone".
The end of stdin is the end of the box; after "keep" the box goes on until somebody ends it.

Promises: whoever dies, nothing goes on.  The death of the test process is the end of
stdin; the death of the keeper kills PID 1 (PDEATHSIG), which ends the PID namespace, and
with the last mount namespace the tmpfs goes.  Only the directory of the box and its
cgroups can be left then: `tests.box.host.sweep` removes them at the next start.

May fail: OSError with the step that failed, on stderr, which is the box's console.log.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from tests.box import kernel
from tests.box.cgroups import Cgroups
from tests.box.host import forget, hold
from tests.box.kernel import NEWCGROUP, NEWIPC, NEWNET, NEWNS, NEWPID, NEWUTS
from tests.box.root import Root, in_child

# What would reach the kernel that the box shares with its host: sys_module sys_rawio
# sys_pacct sys_time mac_override mac_admin syslog wake_alarm block_suspend
DROPPED = (16, 17, 20, 25, 32, 33, 34, 35, 36)


def become_systemd(plan: dict[str, Any], root: Root) -> None:
    """The first process of the new namespaces, up to its exec."""
    kernel.die_with_parent()
    os.setsid()
    root.mount_all()
    kernel.loopback_up()
    socket.sethostname(plan["name"])
    root.enter()
    for capability in DROPPED:
        kernel.drop_capability(capability)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec keeps that
    env = {"container": "codexd-box", "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    os.execve(plan["systemd"][0], plan["systemd"], env)


def hold_namespaces(plan: dict[str, Any], root: Root, cgroups: Cgroups, tell: int) -> None:
    """The parent of one PID 1: a PID namespace lasts no longer than its first process."""
    kernel.die_with_parent()
    cgroups.join()
    kernel.unshare(NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWPID | NEWNET)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # the pipes to the test process are the keeper's alone
    pid = in_child(lambda: become_systemd(plan, root))
    os.write(tell, str(pid).encode())
    os.close(tell)
    os.waitpid(pid, 0)


class Keeper:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.root = Root(plan)
        self.cgroups = Cgroups(plan["cgroups"])
        self.orders = open(0, "rb", buffering=0)  # noqa: SIM115 (for life; unbuffered for poll)
        self.parent = 0  # of the box's PID 1; 0: the box is off
        self.init = 0

    def run(self) -> None:
        last = ""
        self.root.lay()
        while order := self._next():
            if order == "boot":
                self._boot()
            elif order == "poweroff":
                self._signal(self.init, signal.SIGRTMIN + 4)
            elif order == "kill":
                self._signal(self.parent, signal.SIGKILL)  # PID 1 dies with it
            last = order
        if last != "keep":
            self._signal(self.parent, signal.SIGKILL)
        self._reap()
        self.root.drop()
        forget(Path(self.plan["place"]))

    def _next(self) -> str:
        """The next order, "" at the end; an end of the box is told when it comes."""
        while True:
            poll = select.poll()
            poll.register(self.orders, select.POLLIN)
            if self.parent:
                end = os.pidfd_open(self.parent)
                poll.register(end, select.POLLIN)
                ready = [fd for fd, _ in poll.poll()]
                os.close(end)
                if end in ready:
                    self._reap()
                    self._tell("gone")
                    continue
            return self.orders.readline().decode().strip()

    def _boot(self) -> None:
        self.cgroups.make()
        reader, writer = os.pipe()
        self.parent = in_child(lambda: hold_namespaces(self.plan, self.root, self.cgroups, writer))
        os.close(writer)
        with open(reader, encoding="ascii") as told:
            self.init = int(told.read() or 0)
        self._tell(f"booted {self.init}")

    def _signal(self, pid: int, number: int) -> None:
        if self.parent and pid:  # 0 would be our own process group
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # it has just ended: `_next` sees it

    def _reap(self) -> None:
        if self.parent:
            os.waitpid(self.parent, 0)
            self.parent = self.init = 0
            self.cgroups.remove()

    def _tell(self, text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            pass  # the test process is dead: the end of stdin comes next


def main() -> None:
    plan = json.loads(sys.argv[1])
    hold(Path(plan["place"]))
    os.umask(0o022)
    kernel.unshare(NEWNS)
    Keeper(plan).run()


if __name__ == "__main__":
    main()
