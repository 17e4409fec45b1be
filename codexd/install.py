"""codexd install: units for this installation, laid down; `uninstall` takes them away.

`codexd install` writes what `layout` and `dropin` plan, where it is not there
yet, and tells of each file what it did.  It can be repeated: after an upgrade,
and after each change of codexd.yaml that `codexd doctor` finds missing in the
units; it says what to restart for it, and restarts nothing.  What somebody edited
is never written over and never removed; drop-ins of other names are not even
looked at.  Where a distribution's package has the units, only what follows from
codexd.yaml is written.

With --prefix everything goes below that directory and nothing is run.

Raises Trouble for what has to be mended first, OSError.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import site
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from codexd import codex, config, dropin, durable, layout, spool
from codexd.codexchecks import log_in
from codexd.config import Config, Directories
from codexd.layout import File, Stand, Target
from codexd.program import Exit, Trouble

PROGRAMS = ("codexd", "codexd-master", "codexd-worker", "codexd-http")
SERVICE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # systemd's own
BOOTED = Path("/run/systemd/system")
_WAIT = 60  # seconds for a tool
_TMPFILES = Path("/usr/lib/tmpfiles.d/codexd.conf")  # of a package
_SYSTEM_STATE, _USER_STATE = Directories.system().state, ".local/state/codexd"
_CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Scene:
    """What is installed, and where to."""

    target: Target
    config: Config
    user: bool
    prefix: Path | None

    @property
    def manager(self) -> list[str]:
        """systemctl, for the right systemd."""
        return ["systemctl", *(["--user"] if self.user else [])]

    @property
    def packaged(self) -> bool:
        """Whether a distribution's package has the units."""
        return self.prefix is None and (self.target.packaged / dropin.MASTER).exists()


# --- what there is ----------------------------------------------------------------------


def system_home() -> None:
    """Let `~` in codexd.yaml be the home of the user that the units run as."""
    try:
        os.environ["HOME"] = pwd.getpwnam("codexd").pw_dir
    except KeyError:  # not there yet; this is what sysusers.d will make
        os.environ["HOME"] = str(Directories.system().state)


def scene(user: bool, prefix: Path | None = None) -> Scene:
    """The installation for the system, or for the user who runs this.

    Raises config.ConfigError.
    """
    if user:
        runtime()
        dirs = Directories.user(os.environ)
        target = Target.user(Path.home(), os.environ)
    else:
        system_home()
        dirs, target = Directories.system(), Target.system()
    if prefix:
        target = target.below(prefix)
        dirs = replace(dirs, config_file=prefix / dirs.config_file.relative_to("/"))
    return Scene(target, config.load(dirs, explicit=False), user, prefix)


def runtime() -> None:
    """`su` and `sudo` leave it out; the user's systemd has it all the same."""
    there = f"/run/user/{os.geteuid()}"
    if not os.environ.get("XDG_RUNTIME_DIR") and os.path.isdir(there):
        os.environ["XDG_RUNTIME_DIR"] = there


def programs() -> Path:
    """The directory of the programs that belong to the Python that runs this.

    Raises Trouble.
    """
    called = os.path.dirname(os.path.abspath(shutil.which(sys.argv[0]) or sys.argv[0]))
    beside = [os.path.dirname(os.path.realpath(sys.argv[0])), os.path.dirname(sys.executable)]
    for place in (*beside, called):
        if all(os.access(os.path.join(place, name), os.X_OK) for name in PROGRAMS):
            return Path(os.path.abspath(place))
    text = f"the programs {', '.join(PROGRAMS)} are not in {' or '.join(beside)}"
    raise Trouble(Exit.FAILED, f"{text}; install codexd with pip, pipx or its package first")


def data() -> Path:
    """The directory of the sources.  Raises Trouble."""
    places = [Path(sys.prefix), Path(site.getuserbase()), Path("/usr/local"), Path("/usr")]
    candidates = [_CHECKOUT / "systemd", *(p / "share/codexd/systemd" for p in places)]
    for place in candidates:
        if (place / dropin.MASTER).is_file():
            return place
    looked = ", ".join(map(str, candidates))
    raise Trouble(Exit.FAILED, f"the unit files of codexd are in none of {looked}; reinstall it")


def sources(place: Path, user: bool) -> dict[str, str]:
    """The files by name; for a user the units of systemd/user, and the same scripts."""
    found = {p.name: p.read_text() for p in sorted(place.glob("codexd*")) if p.is_file()}
    if not user:
        return found
    scripts = {name: text for name, text in found.items() if "." not in name}
    return scripts | {p.name: p.read_text() for p in sorted((place / "user").glob("codexd*"))}


def own_places(programs: Path) -> list[Path]:
    """What of the disk our programs need: themselves, the package, its Python."""
    python = Path(os.path.realpath(sys.executable))
    package = Path(__file__).resolve().parent.parent
    return sorted({programs, Path(sys.prefix), Path(sys.base_prefix), python.parent, package})


def plan(scene: Scene) -> dict[Path, File]:
    """Every file of the installation.  Raises Trouble."""
    place, target = programs(), scene.target
    if scene.packaged and scene.config.dirs.state not in (_SYSTEM_STATE, Path.home() / _USER_STATE):
        why = "the units of a package know only ~/.local/state: unset XDG_STATE_HOME"
        raise Trouble(Exit.CONFIGURATION, why)
    dropins = _dropins(scene, place)
    if scene.packaged:
        ages = {} if scene.user else layout.ageing(target, scene.config, _TMPFILES.read_text())
        return layout.derived(target, dropins) | ages
    named = target.scripts
    if scene.prefix:
        named = Path("/", named.relative_to(scene.prefix))
    for one in (place, named, *([scene.config.dirs.state] if scene.user else [])):
        if any(c in "%\"'\\$" or c.isspace() for c in str(one)):
            raise Trouble(Exit.FAILED, f"{one}: a unit cannot name such a path; install elsewhere")
    found = sources(data(), scene.user)
    return layout.whole(target, scene.config, dropins, found, place, named, sys.executable)


def _dropins(scene: Scene, place: Path) -> dict[str, str]:
    """For a package that is being made nothing of this host counts.  Raises Trouble."""
    units = scene.target.packaged if scene.packaged else data() / "user"
    worker = (units / dropin.WORKER).read_text() if scene.user else ""
    own = [] if scene.prefix else own_places(place)
    try:
        found = None if scene.prefix else codex.find(scene.config.codex.bin, SERVICE_PATH)
    except codex.Missing:
        found = None
    try:
        return dropin.texts(scene.config, own, found, worker)
    except dropin.Unfit as why:
        raise Trouble(Exit.CONFIGURATION, str(why)) from why


def laid(target: Target) -> Iterator[Path]:
    """Files of ours that are there."""
    for directory, pattern in target.ours():
        yield from sorted(p for p in directory.glob(pattern) if p.is_file())


def text_of(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None


# --- install ------------------------------------------------------------------------------


def install(args: argparse.Namespace) -> int:
    """The verb."""
    os.umask(0o022)  # everybody may read what is laid down, and user codexd has to
    one = asked(args, "lays down units for the whole system")
    planned = plan(one)
    if not one.user and not one.prefix:
        _reachable(own_places(programs()))
    changed = lay(planned, one.target)
    if one.prefix:
        return Exit.DONE
    _directories(one)
    _run_tools(one)
    for line in (*_next(one), *_restarts(one, changed)):
        print(line)
    return Exit.DONE


def asked(args: argparse.Namespace, what: str) -> Scene:
    """Raises Trouble, config.ConfigError."""
    if hasattr(args, "root") or hasattr(args, "config"):
        why = "--root and --config are not for units: they use the paths of the system or the user"
        raise Trouble(Exit.USAGE, why)
    prefix = Path(args.prefix).absolute() if args.prefix else None
    if not prefix and not args.user and os.geteuid() != 0:
        verb = f"codexd {args.verb}"
        raise Trouble(
            Exit.PERMISSION,
            f"{verb} {what} and needs root; try: sudo {verb}, or {verb} --user",
        )
    if not prefix and args.user and os.geteuid() == 0:
        raise Trouble(Exit.USAGE, f"codexd {args.verb} --user is for other users than root")
    return scene(args.user, prefix)


def lay(planned: Mapping[Path, File], target: Target) -> list[Path]:
    """Make the files what they should be, as far as they are ours; those that changed."""
    changed = []
    for path, file in sorted(planned.items()):
        stand = layout.stand(text_of(path), file.text)
        if stand is Stand.EDITED:
            print(f"kept      {path}: it is not as codexd wrote it; to get codexd's: move it away")
            continue
        if stand is not Stand.SAME:
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.write(path, file.text.encode(), file.mode)
            changed.append(path)
        if stat.S_IMODE(path.stat().st_mode) != file.mode:
            path.chmod(file.mode)  # a umask took some away
        print(f"{'found' if stand is Stand.SAME else 'wrote':9} {path}")
    return changed + remove(layout.strays(laid(target), planned))


def remove(paths: list[Path]) -> list[Path]:
    """Take away what some install wrote; keep what somebody changed."""
    removed = []
    for path in paths:
        if not layout.is_intact(text_of(path) or ""):
            print(f"kept      {path}: it is not as codexd wrote it")
            continue
        path.unlink()
        removed.append(path)
        print(f"removed   {path}")
        # A unit's drop-ins; polkit, for one, would not look into a rules.d that comes again.
        home = path.parent
        if home.name.startswith("codexd") and home.suffix == ".d" and not any(home.iterdir()):
            home.rmdir()
    return removed


def _reachable(places: list[Path]) -> None:
    """User codexd has to get at the programs.  Raises Trouble."""
    for place in places:
        for one in (place, *place.parents):
            if not one.stat().st_mode & stat.S_IXOTH:
                why = f"user codexd cannot run programs in {place}: {one} is closed to it"
                mend = "python3 -m venv /opt/codexd && /opt/codexd/bin/pip install codexd"
                raise Trouble(Exit.FAILED, f"{why}; install codexd elsewhere, such as: {mend}")


def _directories(one: Scene) -> None:
    """A user's own; those of the system are tmpfiles.d's."""
    if one.user:
        spool.prepare(one.config.dirs)
        one.config.dirs.schedules.mkdir(mode=0o750, exist_ok=True)
        print(f"found     {one.config.dirs.state}: the directories are there")


def _run_tools(one: Scene) -> None:
    """What makes the files take effect.  Raises Trouble."""
    if not one.user:
        run("systemd-sysusers", "codexd.conf")
        run("systemd-tmpfiles", "--create", "codexd.conf")
        run("journalctl", "--update-catalog")
    if BOOTED.is_dir():
        # Who came by su or sudo may have no systemd running.
        run(*one.manager, "daemon-reload", need=not one.user)
    else:
        print("skipped   systemctl daemon-reload: systemd does not run here")


def run(*command: str, need: bool = True) -> bool:
    """Run a tool, where it is there.  Raises Trouble where it must work and does not."""
    told = " ".join(command)
    if not shutil.which(command[0]):
        print(f"skipped   {told}: there is no {command[0]}")
        return False
    status, why = _ended(command)
    if status and need:
        raise Trouble(Exit.FAILED, f"{told}: status {status}: {why}")
    print(f"failed    {told}: {why}" if status else f"ran       {told}")
    return status == 0


def _ended(command: Sequence[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_WAIT, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return -1, f"not done after {_WAIT} s"
    return done.returncode, " ".join((done.stderr or done.stdout).split())[:300]


def _next(one: Scene) -> Iterator[str]:
    """What there is to do now."""
    file = one.config.dirs.config_file
    key = file.parent / "api.env"
    yield ""
    yield f"Configure it in {file}, then run codexd install again."
    if one.user:
        yield "Start it:        systemctl --user enable --now codexd"
        yield "Without a login: loginctl enable-linger"
        path = os.environ.get("PATH", os.defpath)
    else:
        yield "Start it:        systemctl enable --now codexd"
        yield "Who may use it:  usermod -aG codexd NAME"
        path = SERVICE_PATH
    yield f"Log in to Codex: {log_in(one.config, path)}"
    yield f"or put a key:    (umask 077; echo CODEX_API_KEY=... > {key})"
    for notes in dropin.unseen(one.config):
        yield f"Not seen:        {notes} (memory.paths), which is hidden from workers; move it"
    if one.config.http.listen is None:
        option = "--user " if one.user else ""
        yield f"HTTP is off:     systemctl {option}mask --now codexd-http.socket"
    yield "See how it is:   codexd doctor" + ("" if one.user else ", as root")


def _restarts(one: Scene, changed: Iterable[Path]) -> Iterator[str]:
    """What runs as its files were before."""
    names = {name for path in changed for name in (path.name, path.parent.name[:-2])}
    if not BOOTED.is_dir():
        return
    for unit in (dropin.MASTER, dropin.SOCKET, dropin.HTTP):
        if unit in names and not _ended((*one.manager, "is-active", "--quiet", unit))[0]:
            yield f"It has changed:  {' '.join(one.manager)} restart {unit}"
