"""JSON for other programs.  Pure."""

from __future__ import annotations

import json
import re

# A backslash and what belongs to it, in JSON of ASCII; first of all two halves of one character.
_ESCAPE = re.compile(r"\\ud[89ab]..\\ud[c-f]..|\\ud[89a-f]..|\\.")


def json_text(value: object, indent: int | None = None) -> str:
    """`value` in ASCII.

    A name that is not UTF-8 has half a character for each of its bytes, at which
    strict readers stop: a question mark stands for it, as for hooks.
    """
    text = json.dumps(value, indent=indent)
    return _ESCAPE.sub(_whole, text) if "\\ud" in text else text


def _whole(found: re.Match[str]) -> str:
    return "?" if len(found[0]) == 6 else found[0]
