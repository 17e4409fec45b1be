"""A control file's name as what it asks for.

Pure: a control file has no content, so its name is all there is to read.  That it
is empty is for the caller to check, which has the size at hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import unquote

from codexd.document import Form, Scalar, shown
from codexd.model import is_id
from codexd.taskfile import LABEL, Refused

ALL = "all"  # the target of what is about no single task
EMPTY = "a control file (here .{}) must be empty"
_BROKEN_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


class Verb(StrEnum):
    """What a control file asks for."""

    CANCEL = "cancel"
    HOLD = "hold"
    RELEASE = "release"
    RETRY = "retry"
    RESET = "reset"
    DRAIN = "drain"
    COMPACT = "compact"


@dataclass(frozen=True, slots=True)
class Control:
    """A control file's meaning; `target` is a task's id, ALL, or a session's name."""

    verb: Verb
    target: str

    @property
    def name(self) -> str:
        """The file name that `control` reads back."""
        stem = self.target
        if self.verb is Verb.RESET:
            # Only what a file name cannot hold, and the dot that would hide it.
            stem = re.sub(r"[%/]|^\.", lambda found: f"%{ord(found[0]):02X}", stem)
        return f"{stem}.{self.verb}"


_FORMS = {
    Verb.HOLD: ("ID", ALL),
    Verb.RELEASE: ("ID", ALL),
    Verb.DRAIN: (ALL,),
    Verb.COMPACT: (ALL,),
}


def control(name: str) -> Control | None:
    """What a control file of this name asks for, None if it is no such name.

    Raises Refused for a name that ends in a verb but has no target for it: it is
    more likely a slip than a task.
    """
    stem, _, ending = name.rpartition(".")
    if not stem or ending not in list(Verb):
        return None
    verb = Verb(ending)
    if verb is Verb.RESET:
        return Control(verb, _session(stem))
    forms = _FORMS.get(verb, ("ID",))
    if forms == (ALL,) and stem != ALL:
        return None
    if (stem == ALL and ALL in forms) or (is_id(stem) and "ID" in forms):
        return Control(verb, stem)
    named = " or ".join(f"{form}.{verb}" for form in forms)
    raise Refused(f"{shown(name)} ends like a control file ({named}); rename it to end otherwise")


def _session(stem: str) -> str:
    try:
        session = unquote(stem, errors="strict")
    except UnicodeDecodeError as err:
        raise Refused(f"{shown(stem)} is not percent-encoded UTF-8") from err
    if broken := _BROKEN_PERCENT.search(stem):
        found = shown(stem[broken.start() : broken.start() + 3])
        raise Refused(f"{shown(stem)}: {found} is no percent-encoding; write % as %25")
    if LABEL.read(Scalar(session, Form.TEXT)) is None:
        raise Refused(f"{shown(session)} is no session's name; allowed: {LABEL.allowed}")
    return session
