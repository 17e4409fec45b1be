"""Text that people and programs write, as a checked mapping that knows its lines.

The only importer of PyYAML.  Both readers give the same `Document`: nested
dicts, lists and `Scalar`s.  A scalar is the text as written; what it means is
for the schema to say, through the typed readers of `Fields`, so a session
named `no` or a timeout of `12:30:45` is never guessed at by YAML.

YAML is read from PyYAML's events, never through its constructors: no tags,
anchors, aliases or merge keys, no duplicate keys, one document, a mapping at
the top, bounded depth and number of values.  JSON has the same bounds, and no
NaN, no Infinity and no lone surrogates.  Whatever the text, the readers return
a Document or raise DocumentError, whose quoted parts are escaped and short.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar

import yaml

MAX_DEPTH = 20
MAX_NODES = 1000

# Control characters, line separators, bidirectional overrides, lone surrogates.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BARE = re.compile(r"[A-Za-z0-9_.-]{1,60}", re.ASCII)
_INTEGER = re.compile(r"-?[0-9]{1,15}", re.ASCII)
BOOLEANS = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False}
# Enough for a text that json.loads has already found to be JSON.
_JSON_TOKEN = re.compile(r'[{}\[\]]|"(?:[^"\\]|\\.)*+"|[^\s{}\[\],:"]+')

Where = tuple[str | int, ...]
D = TypeVar("D")
V = TypeVar("V")
E = TypeVar("E", bound=StrEnum)


class DocumentError(ValueError):
    """Why a text is no document or a value not allowed: one line, for a person."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason, line)
        self.reason = reason
        self.line = line

    def __str__(self) -> str:
        return self.reason if self.line is None else f"line {self.line}: {self.reason}"


class Form(StrEnum):
    """How a scalar was written."""

    PLAIN = "plain"  # YAML without quotes: the schema decides
    TEXT = "text"  # quoted, a YAML block, or a JSON string
    NUMBER = "number"  # JSON
    BOOLEAN = "boolean"  # JSON
    NULL = "null"  # JSON


class Scalar(str):
    """The text of one value, and the form it was written in."""

    __slots__ = ("form",)
    form: Form

    def __new__(cls, text: str, form: Form) -> Scalar:
        self = super().__new__(cls, text)
        self.form = form
        return self


@dataclass(frozen=True, slots=True)
class Document:
    """A mapping of dicts, lists and Scalars.  Lines are counted for errors alone: it is slow."""

    values: dict[str, object]
    places: Mapping[Where, int] = field(default_factory=dict)
    line_at: Callable[[int], int] = field(default=int, compare=False, repr=False)

    def line(self, where: Where) -> int | None:
        """The line of the key or item at `where`, else of the nearest thing around it."""
        while where and where not in self.places:
            where = where[:-1]
        return self.line_at(self.places[where]) if where else None


def parse_yaml(
    text: str, *, first_line: int = 1, max_depth: int = MAX_DEPTH, max_nodes: int = MAX_NODES
) -> Document:
    """Read one YAML mapping, whose text begins at line `first_line` of its file."""
    tree = _Tree(text, first_line, max_depth, max_nodes)
    return tree.document(_yaml_events(text, tree))


def parse_json(text: str, *, max_depth: int = MAX_DEPTH, max_nodes: int = MAX_NODES) -> Document:
    """Read one JSON object."""
    tree = _Tree(text, 1, max_depth, max_nodes)
    return tree.document(_json_events(text, tree))


class _Event(NamedTuple):
    at: int
    what: str  # a scalar's form, `{`, `[`, or the end of either: `}`
    text: str = ""


class _Tree:
    """Builds the document from either reader's events, within the limits."""

    def __init__(self, text: str, first_line: int, max_depth: int, max_nodes: int) -> None:
        self._all, self._first_line = text, first_line
        self._max_depth, self._max_nodes, self._nodes = max_depth, max_nodes, 0
        self._places: dict[Where, int] = {}
        self._events: Iterator[_Event] = iter(())

    def document(self, events: Iterator[_Event]) -> Document:
        self._events = events
        first = next(events, _Event(0, Form.PLAIN))
        value = self._value(first, ())
        for more in events:
            raise self.error(more.at, "a second document begins here; only one is allowed")
        if _is_blank(value):  # nothing but comments
            return Document({})
        if not isinstance(value, dict):
            raise self.error(first.at, f"found {_found(value)}; allowed: keys with their values")
        return Document(value, self._places, self._line)

    def error(self, index: int, reason: str) -> DocumentError:
        return DocumentError(reason, self._line(index))

    def _line(self, index: int) -> int:
        return self._first_line + self._all.count("\n", 0, min(index, len(self._all.rstrip())))

    def _value(self, event: _Event, where: Where) -> object:
        self._nodes += 1
        if self._nodes > self._max_nodes:
            raise self.error(event.at, f"more than {self._max_nodes} values")
        if event.what not in ("{", "["):
            return Scalar(self._text(event), Form(event.what))
        if len(where) >= self._max_depth:
            raise self.error(event.at, f"nested deeper than {self._max_depth} levels")
        return self._mapping(where) if event.what == "{" else self._list(where)

    def _mapping(self, where: Where) -> dict[str, object]:
        found: dict[str, object] = {}
        while (event := next(self._events)).what != "}":
            if event.what in ("{", "["):
                raise self.error(event.at, "a key must be a text, not a list or a mapping")
            place = (*where, self._text(event))
            if event.text in found:
                first = self._line(self._places[place])
                raise self.error(event.at, f"{_name(place)}: duplicate key, line {first} has it")
            if event.text == "<<" and event.what == Form.PLAIN:
                raise self.error(event.at, "merge keys (<<) are not allowed")
            self._places[place] = event.at
            found[event.text] = self._value(next(self._events), place)
        return found

    def _list(self, where: Where) -> list[object]:
        found: list[object] = []
        while (event := next(self._events)).what != "}":
            place = (*where, len(found))
            self._places[place] = event.at
            found.append(self._value(event, place))
        return found

    def _text(self, event: _Event) -> str:
        if _SURROGATE.search(event.text):
            raise self.error(event.at, "a text holds half a character (a lone surrogate)")
        return event.text


def _yaml_events(text: str, tree: _Tree) -> Iterator[_Event]:
    for event in _parser_events(text, tree):
        index = event.start_mark.index
        if isinstance(event, yaml.NodeEvent) and (event.anchor or getattr(event, "tag", None)):
            raise tree.error(index, "aliases, anchors and tags are not allowed; quote *, & or !")
        if isinstance(event, yaml.ScalarEvent):
            yield _Event(index, Form.TEXT if event.style else Form.PLAIN, event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            yield _Event(index, "{" if isinstance(event, yaml.MappingStartEvent) else "[")
        elif isinstance(event, yaml.CollectionEndEvent):
            yield _Event(index, "}")


def _parser_events(text: str, tree: _Tree) -> Iterator[Any]:
    try:
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as err:
        # Where the mistake is; for what is never closed, where it was opened.
        marks = [mark.index for mark in (err.problem_mark, err.context_mark) if mark]
        index = next((at for at in marks if at < len(text.rstrip())), len(text))
        problem = UNPRINTABLE.sub("?", str(err.problem or err.context))[:200]
        hint = "; quote a value that contains ': '" if problem.startswith("mapping values") else ""
        raise tree.error(index, f"not valid YAML: {problem}{hint}") from err
    except yaml.reader.ReaderError as err:
        raise tree.error(err.position, f"not valid YAML: character U+{err.character:04X}") from err
    except Exception as err:
        # PyYAML lets others through (an escape too large is an OverflowError).
        # Only its parser runs inside this try, so no fault of ours is hidden.
        raise DocumentError(f"not valid YAML: {type(err).__name__}") from err


def _json_events(text: str, tree: _Tree) -> Iterator[_Event]:
    try:
        json.loads(text, parse_int=str)  # str: no limit on digits
    except json.JSONDecodeError as err:
        raise tree.error(err.pos, f"not valid JSON: {err.msg}") from err
    except RecursionError as err:
        raise DocumentError("not valid JSON: nested too deep") from err
    words = {"{": "{", "[": "[", "}": "}", "]": "}"}
    words |= {"true": Form.BOOLEAN, "false": Form.BOOLEAN, "null": Form.NULL}
    for found in _JSON_TOKEN.finditer(text):
        index, token = found.start(), found.group()
        if token in words:
            yield _Event(index, words[token], token)
        elif token[0] == '"':
            yield _Event(index, Form.TEXT, json.loads(token))
        elif token.endswith(("NaN", "Infinity")):
            raise tree.error(index, f"not valid JSON: {token}")
        else:
            yield _Event(index, Form.NUMBER, token)


def shown(text: str) -> str:
    """`text` in quotes for a message: escaped, and cut at 60 characters."""
    return repr(str(text)) if len(text) <= 60 else repr(str(text[:57])) + "…"


def _name(where: Where) -> str:
    """A place in the document as people write it: `codex.bin`, `images item 2`."""
    name = ""
    for part in where:
        if isinstance(part, int):
            name += f" item {part + 1}"
        else:
            name += ("." if name else "") + (part if _BARE.fullmatch(part) else shown(part))
    return name


def _found(value: object) -> str:
    if not isinstance(value, Scalar):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value.form in (Form.PLAIN, Form.TEXT):
        return "no value" if _is_blank(value) else shown(value)
    return f"the number {value[:60]}" if value.form is Form.NUMBER else str(value)


def _is_blank(value: object) -> bool:
    """Whether nothing was written where YAML expects a value."""
    return isinstance(value, Scalar) and value.form is Form.PLAIN and not value


def _is_null(value: object) -> bool:
    """Whether it is an unquoted `null`: the same as a key that is not there."""
    if not isinstance(value, Scalar):
        return value is None
    return value.form is Form.NULL or (value.form is Form.PLAIN and value.lower() == "null")


class Rule(NamedTuple, Generic[V]):
    """What a value may be: `read` gives it, or None where `allowed` does not hold."""

    read: Callable[[Scalar], V | None]
    allowed: str


BOOLEAN = Rule(lambda found: BOOLEANS.get(found.lower()), "on or off (or true, false, yes, no)")


def string(check: Callable[[str], object], allowed: str) -> Rule[str]:
    """A text, quoted or not, for which `check` holds."""

    def read(found: Scalar) -> str | None:
        usable = found.form in (Form.PLAIN, Form.TEXT) and not _SURROGATE.search(found)
        return str(found) if usable and check(found) else None

    return Rule(read, allowed)


def integer(low: int, high: int) -> Rule[int]:
    def read(found: Scalar) -> int | None:
        whole = found.form is not Form.TEXT and _INTEGER.fullmatch(found)
        return int(found) if whole and low <= int(found) <= high else None

    return Rule(read, f"a whole number from {low} to {high}")


def choice(kind: type[E]) -> Rule[E]:
    names = {str(member): member for member in kind}
    return Rule(lambda found: names.get(found), ", ".join(names))


class Fields:
    """One mapping of a document, read key by key.

    A key that is absent or `null` gives the default.  What breaks its rule raises
    DocumentError: the line, the key, what was found and what is allowed.
    """

    def __init__(self, document: Document, known: Collection[str], section: str = "") -> None:
        """The document's top, or its mapping `section`; its keys must be `known`."""
        self._document = document
        self._where: Where = ()
        found = document.values.get(section) if section else document.values
        self.given = not _is_null(found)  # be it blank
        found = found if self.given and not _is_blank(found) else {}
        if not isinstance(found, dict):
            raise self.error(section, f"found {_found(found)}", f"a mapping of {', '.join(known)}")
        self._where = (section,) if section else ()
        self._values = found
        for key in found:
            if key not in known:
                near = get_close_matches(key[:60].lower(), known, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise self.error(key, f"unknown key{hint}", ", ".join(known))

    def value(self, key: str, default: D, rule: Rule[V]) -> V | D:
        found = self._values.get(key)
        return default if _is_null(found) else self._read(rule, found, key)

    def values(self, key: str, default: D, rule: Rule[V], most: int) -> tuple[V, ...] | D:
        """A list of at most `most` values, each under the rule."""
        found = self._values.get(key)
        if _is_null(found):
            return default
        if not isinstance(found, list) or len(found) > most:
            what = f"{len(found)} items" if isinstance(found, list) else _found(found)
            raise self.error(key, f"found {what}", f"a list of at most {most}, such as [a, b]")
        return tuple(self._read(rule, item, key, i) for i, item in enumerate(found))

    def error(self, key: str, what: str, allowed: str, *items: int) -> DocumentError:
        """The error for `key`, or for an item in it: `KEY: what; allowed: ...`."""
        place = (*self._where, key, *items)
        reason = f"{_name(place)}: {what}; allowed: {allowed}"
        return DocumentError(reason, self._document.line(place))

    def _read(self, rule: Rule[V], found: object, key: str, *items: int) -> V:
        value = rule.read(found) if isinstance(found, Scalar) and not _is_blank(found) else None
        if value is None:
            raise self.error(key, f"found {_found(found)}", rule.allowed, *items)
        return value
