"""Reading YAML and JSON: what is accepted, what is refused, and on which line."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from enum import StrEnum

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from codexd.document import (
    BOOLEAN,
    Document,
    DocumentError,
    Fields,
    Form,
    Scalar,
    choice,
    integer,
    parse_json,
    parse_yaml,
    shown,
    string,
)


def test_yaml_values_stay_text() -> None:
    text = "session: no\ntimeout: 12:30:45\nn: 0o17\nd: 2026-11-23\nf: 1e3\nx: ~\n'y': null\n"
    assert parse_yaml(text).values == {
        "session": "no",
        "timeout": "12:30:45",
        "n": "0o17",
        "d": "2026-11-23",
        "f": "1e3",
        "x": "~",
        "y": "null",
    }


def test_yaml_forms_and_nesting() -> None:
    document = parse_yaml("a: 5\nb: '5'\nc: |\n  x\n  y\nd: [1, {e: f}]\n")
    values = document.values
    assert values == {"a": "5", "b": "5", "c": "x\ny\n", "d": ["1", {"e": "f"}]}
    forms = {key: value.form for key, value in values.items() if isinstance(value, Scalar)}
    assert forms == {"a": Form.PLAIN, "b": Form.TEXT, "c": Form.TEXT}


def test_json_forms() -> None:
    values = parse_json(
        '{"a": "5", "b": 5, "c": 2.50, "d": true, "e": null, "f": "\\u00e9"}'
    ).values
    assert values == {"a": "5", "b": "5", "c": "2.50", "d": "true", "e": "null", "f": "é"}
    forms = [value.form for value in values.values() if isinstance(value, Scalar)]
    assert forms == [Form.TEXT, Form.NUMBER, Form.NUMBER, Form.BOOLEAN, Form.NULL, Form.TEXT]


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "\ufeff", "{}"])
def test_yaml_without_values_is_empty(text: str) -> None:
    assert parse_yaml(text) == Document({})


def test_lines_count_from_the_first_line_given() -> None:
    document = parse_yaml("# c\r\na: 1\r\n\r\nb:\r\n  - x\r\n  - y\r\n", first_line=2)
    assert document.line(("a",)) == 3
    assert document.line(("b",)) == 5
    assert document.line(("b", 1)) == 7
    assert document.line(("b", 9)) == 5, "the nearest thing around it"
    assert document.line(("nothing",)) is None


def test_lines_of_json() -> None:
    document = parse_json('{\n"a": [1,\n2],\n\n"b": "x\\ny"}')
    assert [document.line(w) for w in [("a",), ("a", 0), ("a", 1), ("b",)]] == [2, 2, 3, 5]


NOT_ALLOWED = "aliases, anchors and tags are not allowed; quote *, & or !"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: *x\n", f"line 2: {NOT_ALLOWED}"),
        ("a: &x 1\n", f"line 1: {NOT_ALLOWED}"),
        ("a: &x [1]\n", f"line 1: {NOT_ALLOWED}"),
        ("&x a: 1\n", f"line 1: {NOT_ALLOWED}"),
        ("*x : 1\n", f"line 1: {NOT_ALLOWED}"),
        ("a: !!python/object/apply:os.system [id]\n", f"line 1: {NOT_ALLOWED}"),
        ("a: ! x\n", f"line 1: {NOT_ALLOWED}"),
        ("a: {x: 1}\n<<: {y: 2}\n", "line 2: merge keys (<<) are not allowed"),
        ("a: 1\nb: 2\n'a': 3\n", "line 3: a: duplicate key, line 1 has it"),
        ("a:\n  b: 1\n  b: 2\n", "line 3: a.b: duplicate key, line 2 has it"),
        ("a: 1\n---\nb: 2\n", "line 3: a second document begins here; only one is allowed"),
        ("- a\n", "line 1: found a list; allowed: keys with their values"),
        ("\njust words\n", "line 2: found 'just words'; allowed: keys with their values"),
        ("? [a]\n: b\n", "line 1: a key must be a text, not a list or a mapping"),
        (
            "title: fix: it\n",
            "line 1: not valid YAML: mapping values are not allowed here; "
            "quote a value that contains ': '",
        ),
        ("a: 1\nb: 'x\n\n\n", "line 2: not valid YAML: found unexpected end of stream"),
        ("a: 1\nb: [x\n", "line 2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "a:\n\tb: c\n",
            r"line 2: not valid YAML: found character '\t' that cannot start any token",
        ),
        ("a: 1\nb: \x1b[0m\n", "line 2: not valid YAML: character U+001B"),
        ('a: "\\ud800"\n', "line 1: a text holds half a character (a lone surrogate)"),
        ('"\\ud800": 1\n', "line 1: a text holds half a character (a lone surrogate)"),
        ("a: 1\nb: \ud800\n", "line 2: not valid YAML: character U+D800"),
        ('a: "\\UFFFFFFFF"\n', "not valid YAML: OverflowError"),
        (f"%YAML 1.{'9' * 5000}\n---\na: b\n", "not valid YAML: ValueError"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_yaml(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: not valid JSON: Expecting value"),
        ("[]", "line 1: found a list; allowed: keys with their values"),
        ("null", "line 1: found null; allowed: keys with their values"),
        ("5", "line 1: found the number 5; allowed: keys with their values"),
        ('{"a": 1,\n"a": 2}', "line 2: a: duplicate key, line 1 has it"),
        ('{"a":\n{"b": 1, "\\u0062": 2}}', "line 2: a.b: duplicate key, line 2 has it"),
        ('{"a":\nNaN}', "line 2: not valid JSON: NaN"),
        ('{"a": -Infinity}', "line 1: not valid JSON: -Infinity"),
        ('{"a": "\\ud800"}', "line 1: a text holds half a character (a lone surrogate)"),
        ('{"\\udc00": 1}', "line 1: a text holds half a character (a lone surrogate)"),
        ('{"a": 1,}', "line 1: not valid JSON: "),  # the rest is Python's
        ("{'a': 1}", "line 1: not valid JSON: Expecting property name enclosed in double quotes"),
        ('{"a":\n"x\ny"}', "line 2: not valid JSON: Invalid control character at"),
        ('{"a": 1} {"b": 2}', "line 1: not valid JSON: Extra data"),
        ('{"a": 01}', "line 1: not valid JSON: Expecting ',' delimiter"),
    ],
)
def test_json_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_json(text)
    assert str(caught.value).startswith(message)


def test_long_and_strange_text_is_cut_and_escaped() -> None:
    with pytest.raises(DocumentError) as caught:
        parse_yaml("\u202e" + "x" * 500)
    assert str(caught.value) == (
        "line 1: found '\\u202e" + "x" * 56 + "'…; allowed: keys with their values"
    )
    assert shown("\x1b]0;\u2028") == r"'\x1b]0;\u2028'"


def test_limits() -> None:
    assert parse_yaml("{a: " * 20 + "1" + "}" * 20).values
    assert parse_yaml("a: [" + "1," * 998 + "]").values
    assert parse_json('{"a":' * 20 + "1" + "}" * 20).values
    for parse in (parse_yaml, parse_json):
        with pytest.raises(DocumentError, match=r"^line 1: nested deeper than 20 levels$"):
            parse('{"a": ' * 21 + "1" + "}" * 21)
        with pytest.raises(DocumentError, match=r"^line 2: more than 1000 values$"):
            parse('{"a": [\n' + ",".join("1" * 1000) + "]}")
        with pytest.raises(DocumentError, match=r"^line 1: nested deeper than 2 levels$"):
            parse('{"a": {"b": {}}}', max_depth=2)
        with pytest.raises(DocumentError, match=r"^line 1: more than 3 values$"):
            parse('{"a": [1, 2, 3]}', max_nodes=3)


BOMB = "a: &a [x]\n" + "\n".join(f"k{i}: &k{i} [*a, *a, *a, *a, *a, *a, *a, *a]" for i in range(9))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "{a: " * 5000,
        "- " * 5000,
        "? " * 5000,
        '{"a":' * 5000,
        "[" * 1_000_000,
        '{"a": ' + "[" * 1_000_000,
        "- &x [*x]\n",
        BOMB,
        "a: [" + "," * 1_000_000,
        "a: " + "1" * 1_000_000 + "\n- ",
        '{"a": ' + "9" * 1_000_000 + "]",
        '{"a": "' + "\\n" * 400_000,
    ],
    ids=lambda text: f"{text[:12]}-{len(text)}",
)
def test_hostile_texts_are_refused_quickly(text: str) -> None:
    most = 1 if sys.gettrace() is None else 5  # seconds; coverage counts each line that is run
    for parse in (parse_yaml, parse_json):
        began = time.thread_time()
        with pytest.raises(DocumentError):
            parse(text)
        assert time.thread_time() - began < most, parse


def test_a_large_json_string_is_read_quickly() -> None:
    began = time.thread_time()
    text = 'a\n"\\é' * 150_000
    assert parse_json(json.dumps({"prompt": text})).values == {"prompt": text}
    assert time.thread_time() - began < 1


PIECES = ["---", "...", "<<", ": ", "- ", "\\u", "\\ud800", "\\UFFFFFFFF", "true", "null", "NaN"]
PIECES += ['{"a":', "\r\n", "%YAML 1.1", "%TAG ! x", "!<", "!!int", "1e999", "key: "]
PIECES += "{}[]:,-?&*!|>'\"%@`#\\\n\t ~0aeñ\ud800\x00\x85\u2028\ufeff"
SNIPPETS = st.lists(st.sampled_from(PIECES)).map("".join)


@given(st.one_of(st.text(), SNIPPETS))
def test_any_text_is_a_document_or_a_document_error(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        try:
            assert isinstance(parse(text).values, dict)
        except DocumentError as err:
            said = str(err)
        else:
            continue
        assert said.isprintable(), "one line, nothing raw"
        assert len(said) < 400


TREES = st.recursive(
    st.one_of(st.text(), st.integers(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=20,
)


def _as_scalars(value: object) -> object:
    if isinstance(value, dict):
        return {key: _as_scalars(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_scalars(item) for item in value]
    return value if isinstance(value, str) else json.dumps(value)


@given(st.dictionaries(st.text(), TREES), st.sampled_from([None, 1]), st.booleans())
def test_json_reads_what_json_writes(
    tree: dict[str, object], indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(tree, indent=indent, ensure_ascii=ascii_only)
    assert parse_json(text).values == _as_scalars(tree)


@given(st.dictionaries(st.text(st.characters(codec="ascii"), min_size=1), st.text()))
def test_yaml_reads_what_yaml_writes(tree: dict[str, str]) -> None:
    text = yaml.safe_dump(tree, default_style='"', width=10**6, allow_unicode=False)
    assert parse_yaml(text).values == tree


# --- Fields ------------------------------------------------------------------


class Colour(StrEnum):
    RED = "red"
    DARK_RED = "dark-red"


SHORT = string(lambda found: len(found) <= 5, "up to 5 characters")


def read(text: str, rule: object) -> object:
    parse = parse_json if text.startswith("{") else parse_yaml
    return Fields(parse(text), ["a"]).value("a", "default", rule)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "rule", "value"),
    [
        ("", SHORT, "default"),
        ("a: null", SHORT, "default"),
        ('{"a": null}', SHORT, "default"),
        ("a: 'null'", SHORT, "null"),
        ("a: no", SHORT, "no"),
        ("a: 5", SHORT, "5"),
        ('a: ""', SHORT, ""),
        ("a: 07", integer(0, 9), 7),
        ("a: -3", integer(-5, 9), -3),
        ('{"a": 9}', integer(0, 9), 9),
        ("a: On", BOOLEAN, True),
        ("a: 'off'", BOOLEAN, False),
        ("a: no", BOOLEAN, False),
        ("a: TRUE", BOOLEAN, True),
        ('{"a": false}', BOOLEAN, False),
        ("a: dark-red", choice(Colour), Colour.DARK_RED),
    ],
)
def test_rules(text: str, rule: object, value: object) -> None:
    found = read(text, rule)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "rule", "message"),
    [
        ("a: too long", SHORT, "line 1: a: found 'too long'; allowed: up to 5 characters"),
        ("a:", SHORT, "line 1: a: found no value; allowed: up to 5 characters"),
        ("a: [x]", SHORT, "line 1: a: found a list; allowed: up to 5 characters"),
        ("a: {b: c}", SHORT, "line 1: a: found a mapping; allowed: up to 5 characters"),
        ('{\n"a": 5}', SHORT, "line 2: a: found the number 5; allowed: up to 5 characters"),
        ('{"a": true}', SHORT, "line 1: a: found true; allowed: up to 5 characters"),
        ("a: 10", integer(0, 9), "line 1: a: found '10'; allowed: a whole number from 0 to 9"),
        ("a: '5'", integer(0, 9), "line 1: a: found '5'; allowed: a whole number from 0 to 9"),
        ("a: 5.0", integer(0, 9), "line 1: a: found '5.0'; allowed: a whole number from 0 to 9"),
        ("a: ٣", integer(0, 9), "line 1: a: found '٣'; allowed: a whole number from 0 to 9"),
        ("a: 1", BOOLEAN, "line 1: a: found '1'; allowed: on or off (or true, false, yes, no)"),
        ("a: Red", choice(Colour), "line 1: a: found 'Red'; allowed: red, dark-red"),
    ],
)
def test_rules_that_are_broken(text: str, rule: object, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read(text, rule)
    assert str(caught.value) == message


def test_lists() -> None:
    fields = Fields(parse_yaml("a:\n- x\n- longer\nb: x\nc: [1, 2, 3]\nd: []\n"), "abcde")
    assert fields.values("c", (), integer(0, 9), 3) == (1, 2, 3)
    assert fields.values("d", None, SHORT, 3) == ()
    assert fields.values("e", None, SHORT, 3) is None
    for key, message in {
        "a": "line 3: a item 2: found 'longer'; allowed: up to 5 characters",
        "b": "line 4: b: found 'x'; allowed: a list of at most 2, such as [a, b]",
        "c": "line 5: c: found 3 items; allowed: a list of at most 2, such as [a, b]",
    }.items():
        with pytest.raises(DocumentError) as caught:
            fields.values(key, (), SHORT, 2)
        assert str(caught.value) == message


def test_sections() -> None:
    document = parse_yaml("a:\n  b: 12\nempty:\nnull: {}\nlist: []\n")
    assert Fields(document, ["b"], "a").value("b", 0, integer(0, 99)) == 12
    assert Fields(document, ["b"], "empty").value("b", 0, integer(0, 99)) == 0
    assert Fields(document, ["b"], "absent").value("b", 0, integer(0, 99)) == 0
    with pytest.raises(DocumentError, match=r"^line 2: a\.b: found '12'; allowed: a whole number"):
        Fields(document, ["b"], "a").value("b", 0, integer(0, 9))
    with pytest.raises(
        DocumentError, match=r"^line 5: list: found a list; allowed: a mapping of b$"
    ):
        Fields(document, ["b"], "list")


def test_lines_are_counted_only_for_an_error() -> None:
    text = '{"a": [1,\n 2], "b":\n 3}' + "\n" * 1_000_000
    tracemalloc.start()
    document = parse_json(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(text)
    assert [document.line(where) for where in (("a",), ("a", 1), ("b",), ("c",))] == [1, 2, 2, None]


def test_unknown_keys() -> None:
    known = ["session", "timeout", "idle_timeout"]
    for text, message in {
        "a: 1\n": "line 1: a: unknown key; allowed: session, timeout, idle_timeout",
        "\nsesion: 1\n": "line 2: sesion: unknown key (did you mean session?); "
        "allowed: session, timeout, idle_timeout",
        "TIMEOUT: 1\n": "line 1: TIMEOUT: unknown key (did you mean timeout?); "
        "allowed: session, timeout, idle_timeout",
        '"\\e[1m": 1\n': r"line 1: '\x1b[1m': unknown key; allowed: session, timeout, idle_timeout",
    }.items():
        with pytest.raises(DocumentError) as caught:
            Fields(parse_yaml(text), known)
        assert str(caught.value) == message
