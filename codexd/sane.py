"""What a file may say and we can go on with: numbers of a size, values of a depth.

A file may hold a number of four thousand digits, a fraction for a count, or "not a
number": to reckon with one harms what it is added to.  What is nested a thousand levels
deep can be read and then not be written.  Pure and lean.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from enum import StrEnum
    from typing import TypeVar

    Word = TypeVar("Word", bound=StrEnum)
    Kinds = Mapping[str, type | tuple[type, ...]]

MOST = 1 << 53  # what every reader of JSON holds exactly
_TOTAL = 1 << 62  # what counts may add up to
DEEPEST = 50  # levels of a value; ours have five


def is_count(value: object) -> bool:
    """What one attempt may say that it used."""
    # bool is an int to isinstance; a count is neither true nor negative.
    return type(value) is int and 0 <= value <= MOST


def is_total(value: object) -> bool:
    """Many counts added up."""
    return type(value) is int and 0 <= value <= _TOTAL


def is_amount(value: object) -> bool:
    """As a count, with fractions; infinity and "not a number" are none."""
    return is_count(value) or (isinstance(value, float) and 0 <= value <= MOST)


def is_number(value: object) -> bool:
    """Any that can be reckoned with."""
    return isinstance(value, (int, float)) and -_TOTAL <= value <= _TOTAL


def is_shallow(value: object, levels: int = DEEPEST) -> bool:
    """Whether a value of JSON can be handled: it has not too many levels."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return True
    inner = (v for v in value if isinstance(v, (dict, list)))
    return levels > 0 and all(is_shallow(v, levels - 1) for v in inner)


def misfit(values: Mapping[str, object], kinds: Kinds, *, texts: bool = False) -> str:
    """The first value that is not of the kind that `kinds` has for its name; "" if none.

    None fits everywhere.  A list has texts; a table has numbers, and `texts` if told.
    """
    for name, value in values.items():
        if name in kinds and value is not None and not _fits(value, kinds[name], texts):
            return f"{name}: {type(value).__name__} is no type for it"
    return ""


def word(kind: type[Word], name: str, value: object) -> Word:
    """The member of `kind` that a file names.  Raises ValueError, which says which there are."""
    try:
        return kind(str(value))
    except ValueError:
        raise ValueError(f"{name}: {str(value)[:40]!r} is none of {', '.join(kind)}") from None


def _fits(value: object, kind: type | tuple[type, ...], texts: bool) -> bool:
    if not isinstance(value, kind):
        return False
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, str) for item in value)
    if isinstance(value, dict):
        found = (v for v in value.values() if v is not None)
        return all(is_number(v) or (texts and isinstance(v, str)) for v in found)
    return not isinstance(value, (int, float)) or is_number(value)


def count(text: str) -> int | None:
    """A count as it is written, in digits alone; None for what is none."""
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        return None
    found = int(text)
    return found if is_count(found) else None
