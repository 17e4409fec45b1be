"""Just enough of mdoc(7) to compare a manual page with the program it describes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

MAN = Path(__file__).resolve().parent.parent / "man"
_PUNCTUATION = frozenset({",", ".", ";", ":", "(", ")", "|"})
_TEXT = re.compile(r"^\.(?:[A-Z][a-z0-9] )+")

Item = tuple[list[str], list[str]]  # the words of an .It line, and the lines below it


def pages() -> list[str]:
    return sorted(path.name for path in MAN.glob("*.[1-9]"))


def lines(page: str) -> list[str]:
    return (MAN / page).read_text().splitlines()


def part(found: list[str], macro: str, title: str) -> list[str]:
    """The lines of a section (Sh) or subsection (Ss).  Raises ValueError if there is none."""
    begin = found.index(f".{macro} {title}") + 1
    ends = (".Sh ",) if macro == "Sh" else (".Sh ", ".Ss ")
    end = next((i for i in range(begin, len(found)) if found[i].startswith(ends)), len(found))
    return found[begin:end]


def titles(found: list[str], macro: str) -> list[str]:
    return [line[4:] for line in found if line.startswith(f".{macro} ")]


def words(line: str) -> list[str]:
    """The arguments of a macro line, without those that are punctuation."""
    split = shlex.split(line.replace("\\", "\\\\").replace("'", "\\'"))
    return [word for word in split[1:] if word not in _PUNCTUATION]


def items(found: list[str]) -> list[Item]:
    """All list items, each with what follows up to the next or the list's end."""
    result: list[Item] = []
    for line in found:
        if line.startswith((".It", ".Bl", ".El")):
            result.append((words(line) if line.startswith(".It") else [], []))
        elif result:
            result[-1][1].append(line)
    return [item for item in result if item[0]]


def named(found: list[str], macro: str = "Cm") -> list[str]:
    """What the items of a list define: every word of an `.It Cm …` line."""
    return [w for head, _ in items(found) if head[0] == macro for w in head if w != macro]


def options(found: list[str]) -> dict[frozenset[str], str | None]:
    """The options that `.It Fl …` lines define, by their names, and their argument."""
    result: dict[frozenset[str], str | None] = {}
    for head, _ in items(found):
        if head[0] == "Fl":
            pairs = list(zip(head[::2], head[1::2], strict=True))
            names = frozenset("-" + word for macro, word in pairs if macro == "Fl")
            result[names] = next((word for macro, word in pairs if macro == "Ar"), None)
    return result


def flat(found: list[str]) -> str:
    """The text, roughly as a reader sees it, on one line."""
    return " ".join(_TEXT.sub("", line) for line in found if line != ".Pp")
