"""What `codexd doctor` looks at: units, what they were made from, and the master.

As in `checks`; these need what `install` knows.  Where systemd is not to start
workers here (--root, `launcher: process`, no systemd), only hooks and the master are
looked at.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
from collections.abc import Iterator
from pathlib import Path

from codexd import codex, dropin, install, layout, sockets
from codexd.checks import Finding, Findings, Host, become, fail, ok, said, warn
from codexd.layout import Stand
from codexd.program import Trouble
from codexd.view import View, is_held

_SHOWN = "LoadState,UnitFileState,ActiveState,NeedDaemonReload,Result,NRestarts"
_BOOTS = ("enabled", "static", "linked", "enabled-runtime", "indirect")  # indirect: by its Also=
_HOMES = ["/home", "/root", "/run/user"]  # what ProtectHome= means
_CGROUPS = Path("/sys/fs/cgroup")
_LINGER = Path("/var/lib/systemd/linger")
_POLKIT = ("/usr/lib/polkit-1/polkitd", "/usr/libexec/polkitd", "/usr/lib/polkitd")


def _again(host: Host) -> str:
    return "codexd install" if host.dirs.systemwide else "codexd install --user"


def _stands(host: Host) -> Iterator[tuple[Path, Stand]]:
    """Each file of the installation, and how it stands.  Raises Trouble."""
    scene = install.Scene(_target(host), host.config, not host.dirs.systemwide, None)
    planned = install.plan(scene)
    for path, file in sorted(planned.items()):
        yield path, layout.stand(install.text_of(path), file.text)
    for path in layout.strays(install.laid(scene.target), planned):
        yield path, Stand.OLD


def _target(host: Host) -> layout.Target:
    if host.dirs.systemwide:
        return layout.Target.system()
    return layout.Target.user(Path.home(), os.environ)


# --- hooks ----------------------------------------------------------------------------


def hooks(host: Host) -> Findings:
    """Whether what `on:` names can be run, by whom it will be."""
    if (user := host.user) is None:
        return
    bad = 0
    for occasion, (program, *_) in sorted(host.config.on.items()):
        for finding in _unusable(host, program, user):
            bad += 1
            yield fail(f"on.{occasion}: {program} {finding.what}", finding.mend or "")
    if host.config.on and not bad:
        yield ok(f"{user.pw_name} can run the hooks: {', '.join(sorted(host.config.on))}")


def _unusable(host: Host, program: str, user: pwd.struct_passwd) -> Findings:
    hidden = ["/tmp", "/var/tmp"] + (_HOMES if host.dirs.systemwide else [])
    if host.units and any(Path(program).is_relative_to(place) for place in hidden):
        yield fail("is hidden from codexd-hook@.service", "put it into /etc/codexd or /usr/local")
    elif not os.path.exists(program):
        yield fail("is not there", f"put it there, or change {host.dirs.config_file}")
    else:
        status, _ = said(["test", "-f", program, "-a", "-x", program], **become(user))
        if status:
            yield fail(f"cannot be run by {user.pw_name}", f"chmod a+rx {program}")


# --- files of the installation -----------------------------------------------------------


def files(host: Host) -> Findings:
    """Units, scripts and rules, compared with what an install would write."""
    if host.units:
        yield from _compared(host, "units", derived=False)


def drop_ins(host: Host) -> Findings:
    """What follows from codexd.yaml, compared with it."""
    if host.units and not host.problem:
        yield from _compared(host, "drop-ins", derived=True)


def _compared(host: Host, what: str, derived: bool) -> Findings:
    try:
        stands = [s for s in _stands(host) if (s[0].name == dropin.NAME) is derived]
    except Trouble as trouble:
        yield fail(str(trouble), "mend that, then: " + _again(host))
        return
    absent = [str(p) for p, stand in stands if stand is Stand.ABSENT]
    old = [str(p) for p, stand in stands if stand is Stand.OLD]
    edited = [str(p) for p, stand in stands if stand is Stand.EDITED]
    if absent:
        # For a user `codexd serve` is a way to have it without units.
        severe = fail if host.dirs.systemwide else warn
        yield severe(f"missing: {_some(absent)}", _again(host))
    if old:
        made = "codexd.yaml" if derived else "this version"
        yield warn(f"not as {made} wants them: {_some(old)}", _again(host))
    for path in edited:
        compare = "codexd install --prefix /tmp/x, and compare" + (
            "" if host.dirs.systemwide else " (with --user)"
        )
        yield warn(f"{path} was edited: no install changes it; better is a drop-in", compare)
    if not absent and not old and not edited:
        yield ok(f"the {what} are as this codexd and its codexd.yaml want them")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 3 else ""
    return ", ".join(names[:2] if more else names) + more


def places(host: Host) -> Findings:
    """The workdirs, and what else codexd.yaml binds into the units."""
    config, user = host.config, host.user
    for path in dict.fromkeys((*config.workdirs, config.workdir)):
        if not path.is_dir():
            if path != host.dirs.work:  # which codexd makes
                yield warn(f"the workdir {path} is no directory", f"mkdir -p {path}")
        elif user and not _writable(path, user.pw_uid, user.pw_gid, user.pw_name):
            mend = f"setfacl -Rm u:{user.pw_name}:rwX,d:u:{user.pw_name}:rwX {path}"
            yield warn(f"{user.pw_name} may not write to the workdir {path}", mend)
    for name in config.memory.paths:
        path = Path(os.path.expanduser(name))
        if path.is_absolute() and not path.exists():
            yield warn(f"there are no notes at {path} (memory.paths)", f"mkdir -p {path}")
    for path in dropin.unseen(config) if host.units else ():
        mend = f"move them elsewhere, name that in {host.dirs.config_file}, and {_again(host)}"
        yield warn(f"workers cannot see the notes at {path}: their unit hides them", mend)


def _writable(path: Path, uid: int, gid: int, name: str) -> bool:
    if os.geteuid() == uid:
        return os.access(path, os.W_OK | os.X_OK)
    found = path.stat()
    groups = {gid, *(g.gr_gid for g in grp.getgrall() if name in g.gr_mem)}
    # With an access list we cannot say more.
    own = 0o300 if found.st_uid == uid else 0o030 if found.st_gid in groups else 0o003
    return found.st_mode & own == own or "system.posix_acl_access" in os.listxattr(path)


def service_path(host: Host) -> Findings:
    """Whether units find the Codex that a person finds."""
    if not host.units:
        return
    try:
        codex.find(host.config.codex.bin, host.path)
    except codex.Missing:
        try:
            found = codex.find(host.config.codex.bin, os.environ.get("PATH"))
        except codex.Missing:
            return
        what = f"{found} is not on the PATH of units ({host.path})"
        yield fail(what, f"codex: {{bin: {found}}} in {host.dirs.config_file}; {_again(host)}")


# --- systemd ------------------------------------------------------------------------------


def units(host: Host) -> Findings:
    """Whether systemd has read the units, and starts them."""
    if not host.units:
        return
    control, listen = " ".join(host.manager), host.config.http.listen
    for unit in (dropin.MASTER, dropin.SOCKET, dropin.HTTP):
        status, text = said([*host.manager, "show", f"--property={_SHOWN}", "--", unit])
        if status:
            yield warn(f"systemd does not answer: {text}", f"{control} status")
            return
        told = dict(line.partition("=")[::2] for line in text.splitlines())
        if listen is not None or unit == dropin.MASTER:
            yield _state(host, unit, told)
        elif unit == dropin.SOCKET and told.get("ActiveState") == "active":
            what = f"HTTP is off, and {unit} starts {dropin.HTTP} for each request all the same"
            yield warn(what, f"{control} mask --now {unit}")
        if unit == dropin.SOCKET and told.get("ActiveState") == "active" and listen is not None:
            yield from _listening(listen, f"{control} restart {unit}")


def _state(host: Host, unit: str, told: dict[str, str]) -> Finding:
    """What there is to say of a unit; that of HTTP runs only when it was asked for something."""
    control, active = " ".join(host.manager), told.get("ActiveState")
    if told.get("LoadState") == "masked":
        return warn(f"{unit} is masked", f"{control} unmask {unit}; {control} start {unit}")
    if told.get("LoadState") != "loaded":
        return warn(f"systemd does not know {unit}", f"{_again(host)}; {control} daemon-reload")
    if told.get("NeedDaemonReload") == "yes":
        return warn(f"{unit} was changed on disk", f"{control} daemon-reload")
    if told.get("UnitFileState") not in _BOOTS:
        return warn(f"{unit} does not start at boot", f"{control} enable {unit}")
    again = told.get("NRestarts", "0")
    if told.get("Result") != "success" or (active == "activating" and again != "0"):
        what = f"{unit} fails ({told.get('Result')}), and was started again {again} times"
        return fail(what, f"journalctl {'' if host.dirs.systemwide else '--user '}-e -u {unit}")
    if active not in ("active", "reloading", "activating") and unit != dropin.HTTP:
        return fail(f"{unit} is {active}", f"{control} restart {unit}")
    return ok(f"{unit} is {told.get('UnitFileState')} and {active}")


def _listening(where: Path | tuple[str, int], mend: str) -> Findings:
    """systemd shows what the unit's file says, also while it listens where that said before."""
    any_port = isinstance(where, tuple) and where[1] == 0
    if not any_port and not sockets.listens(where):
        named = where if isinstance(where, Path) else ":".join(map(str, where))
        yield warn(f"nothing listens on {named}: {dropin.SOCKET} has it where it was", mend)


def polkit(host: Host) -> Findings:
    """Whether user codexd may start workers."""
    if not host.units or not host.dirs.systemwide:
        return
    rules = [Path(d, "polkit-1/rules.d/50-codexd.rules") for d in ("/etc", "/usr/share")]
    if not any(map(os.path.exists, (*_POLKIT, shutil.which("pkcheck") or ""))):
        yield fail("there is no polkit: user codexd cannot start workers", "apt install polkitd")
    elif not any(rule.exists() for rule in rules):
        yield fail("there is no rule that lets codexd start workers", _again(host))
    else:
        yield ok("polkit lets user codexd start workers, and nothing else")


def linger(host: Host) -> Findings:
    if not host.units or host.dirs.systemwide or host.user is None:
        return
    name = host.user.pw_name
    if (_LINGER / name).exists():
        yield ok(f"codexd goes on when {name} logs out")
    else:
        what = f"codexd and its tasks end when {name} logs out, and wait for the next login"
        yield warn(what, "loginctl enable-linger")


def group(host: Host) -> Findings:
    """Who may submit, read and cancel, of the system's codexd."""
    if host.dirs.rooted:
        return
    try:
        found = grp.getgrnam("codexd")
    except KeyError:
        if host.dirs.systemwide:
            yield fail("there is no group codexd", _again(host))
        return
    if not host.dirs.systemwide:
        yield from _caller(found)
        return
    people = sorted(set(found.gr_mem) - {"codexd", "codexd-http"})
    if people:
        yield ok(f"besides root may submit, read and cancel: {', '.join(people)}")
    else:
        yield warn("only root may submit tasks: the group is empty", "usermod -aG codexd NAME")


def _caller(group: grp.struct_group) -> Findings:
    """What the system's codexd is to somebody who has, or could have, one of their own."""
    name = pwd.getpwuid(os.geteuid()).pw_name
    if group.gr_gid in (os.getegid(), *os.getgroups()):
        yield ok(f"{name} may submit to the system's codexd, too: it is in the group codexd")
    elif name in group.gr_mem:
        yield warn(f"{name} is in the group codexd, but not in this session", "log in again")
    else:
        what = f"{name} may not submit to the system's codexd: it is not in the group codexd"
        yield warn(what, f"usermod -aG codexd {name}, as root")


def cgroup(host: Host) -> Findings:
    """Whether the limits of tasks are enforced."""
    if not host.units:
        return
    place = _CGROUPS
    if not host.dirs.systemwide:
        uid = os.geteuid()
        place /= f"user.slice/user-{uid}.slice/user@{uid}.service"
    unified = (_CGROUPS / "cgroup.controllers").exists()
    if unified:
        listed = place / "cgroup.controllers"
        has = set(listed.read_text().split()) if listed.exists() else set()
    else:
        has = {n for n in ("memory", "cpu", "pids") if (_CGROUPS / n).exists()}
        has = has if host.dirs.systemwide else set()  # v1 gives users no controllers
    lacks = sorted({"memory", "cpu", "pids"} - has)
    name = "cgroup v2" if unified else "cgroup v1"
    if lacks:
        what = f"{name} without {', '.join(lacks)} here: such limits of tasks are not enforced"
        mend = "boot with systemd.unified_cgroup_hierarchy=1"
        if unified and host.dirs.systemwide:
            mend = "boot without cgroup_disable= and without cgroup v1, see /proc/cmdline"
        elif unified:
            mend = "systemctl edit user@.service: [Service] Delegate=cpu memory pids"
        yield warn(what, mend)
    else:
        yield ok(f"{name}: limits of tasks are enforced")


# --- the master ---------------------------------------------------------------------------


def master(host: Host) -> Findings:
    """Whether it runs, and what it says of itself."""
    told = View(host.dirs).health()[1]
    if told["status"] == "down":
        start = " ".join([*host.manager, "restart", "codexd"]) if host.units else host.serve
        severe = fail if host.dirs.systemwide else warn
        yield severe(str(told["message"]), start)
        return
    launcher, why = told.get("launcher"), told.get("launcher_why")
    if why:
        yield warn(f"workers are child processes, which end with the daemon: {why}", _again(host))
    elif launcher == "systemd":
        yield ok("the master runs; workers are units of systemd")
    else:
        yield ok("the master runs; workers are its child processes")
    gate = told.get("gate")
    reasons = gate.items() if isinstance(gate, dict) else []
    told_why = "; ".join(f"{reason}: {facts.get('message')}" for reason, facts in reasons)
    if is_held(told):
        yield fail(f"no task starts: {told.get('trouble') or told_why}", "codexd status")
    elif told_why:
        yield warn(f"tasks of single profiles wait: {told_why}", "codexd status")
    if told.get("config_problem"):
        yield fail(f"the master refused codexd.yaml: {told['config_problem']}", "mend it, reload")


def sandbox(host: Host) -> Findings:
    """What a worker found of Codex's sandbox, when the master had it tried."""
    _, told = View(host.dirs).health()
    if "sandbox" not in told or told["status"] == "down":
        return
    found = told["sandbox"]
    if found is None:
        yield ok("Codex's sandbox works for workers, says the master")
    else:
        yield fail(f"Codex's sandbox does not work for workers: {found}", "codexd status")
