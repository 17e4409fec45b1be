"""Task files and control files: what is accepted, and the exact reason why not."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codexd import taskfile
from codexd.controlfile import Control, Verb, control
from codexd.document import Document, Form, Scalar, parse_json
from codexd.model import Request, Resume, Sandbox
from codexd.taskfile import Refused, dump, ignored, parse

ID = "20261123t072011-k3f9qa7x2m"
EVERYTHING = """\
session: website
workdir: ~/src/website
model: gpt-5.5
profile: fast
sandbox: read-only
resume: never
timeout: 30m
idle_timeout: 90
priority: 0
after: [links-1, 20261123t072011-k3f9qa7x2m]
not_before: 2026-11-24 02:00
attempts: 20
key: nightly/2026-11-23
title: 'Links: the pricing page'
images: [a.png, /tmp/b.png]
add_dirs:
  - ../other docs
output_schema: schema.json
memory: off
"""
ASKED = Request(
    prompt="Fix the links.",
    session="website",
    workdir="~/src/website",
    model="gpt-5.5",
    profile="fast",
    sandbox=Sandbox.READ_ONLY,
    resume=Resume.NEVER,
    timeout=1800.0,
    idle_timeout=90.0,
    priority=0,
    after=("links-1", ID),
    not_before="2026-11-24 02:00",
    attempts=20,
    key="nightly/2026-11-23",
    title="Links: the pricing page",
    images=("a.png", "/tmp/b.png"),
    add_dirs=("../other docs",),
    output_schema="schema.json",
    memory=False,
)


def refusal(name: str, data: bytes | str) -> str:
    data = data if isinstance(data, bytes) else data.encode()
    with pytest.raises(Refused) as caught:
        parse(name, data)
    return str(caught.value)


def test_keys_are_the_fields_of_a_request() -> None:
    assert sorted(taskfile.KEYS) == sorted(field.name for field in fields(Request))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.md", f"---\n{EVERYTHING}---\nFix the links.\n"),
        ("t.MarkDown", f"---  \n{EVERYTHING}--- \t\n\n \t\nFix the links. \n\n"),
        ("t.md", f"\ufeff---\n{EVERYTHING}---\nFix the links.".replace("\n", "\r\n")),
        ("t.yaml", EVERYTHING + "prompt: Fix the links.\n"),
        ("t.YML", "---\nprompt: >-\n  Fix\n  the links.\n" + EVERYTHING),
        (
            "t.json",
            '{"prompt": "Fix the links.", "session": "website", "workdir": "~/src/website",'
            '"model": "gpt-5.5", "profile": "fast", "sandbox": "read-only", "resume": "never",'
            '"after": ["links-1", "20261123t072011-k3f9qa7x2m"], "not_before": "2026-11-24 02:00",'
            '"timeout": "30m", "idle_timeout": 90, "priority": 0, "attempts": 20,'
            '"key": "nightly/2026-11-23", "title": "Links: the pricing page",'
            '"images": ["a.png", "/tmp/b.png"], "add_dirs": ["../other docs"],'
            '"output_schema": "schema.json", "memory": "off"}',
        ),
    ],
)
def test_every_key_in_every_kind_of_file(name: str, text: str) -> None:
    assert parse(name, text.encode()) == ASKED


@pytest.mark.parametrize(
    ("name", "text", "prompt"),
    [
        ("t.txt", "do it\n", "do it"),
        ("t", "\n\n  \n    indented\n\ttoo\n\n", "    indented\n\ttoo"),
        ("t.txt", "---\nsession: x\n---\ntext\n", "---\nsession: x\n---\ntext"),
        ("t.md", "# Title\n\n---\n\nrule above\n", "# Title\n\n---\n\nrule above"),
        ("t.md", "\n---\nnot front matter\n", "---\nnot front matter"),
        ("t.md", "---\n---\nbody\n---\nrule\n", "body\n---\nrule"),
        ("t.md", "---\n# a comment\n---\nbody", "body"),
        ("t.md", "----\nfour\n", "----\nfour"),
        ("t.md", "-- help\n", "-- help"),
        ("t.md", "a\r\nb\r\n", "a\r\nb"),
        ("json", "{not json}", "{not json}"),
        ("md", "---\nx", "---\nx"),
        ("t.json.txt", "{}", "{}"),
        ("näme.md", "Grüße 🙂\n", "Grüße 🙂"),
        ("t.json", '{"prompt": "\\n as it is \\n"}', "\n as it is \n"),
        ("t.yaml", "prompt: |\n  a\n  b\n", "a\nb\n"),
    ],
)
def test_prompts(name: str, text: str, prompt: str) -> None:
    assert parse(name, text.encode()) == Request(prompt=prompt)


def test_defaults_where_a_key_is_null() -> None:
    assert parse("t.json", b'{"prompt": "x", "session": null, "priority": null}') == Request("x")
    assert parse("t.md", b"---\nresume: null\nimages: null\n---\nx") == Request("x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b" \r\n\t\n", "the file is blank"),
        (b"---\nsession: a\n---\n \n", "no prompt: nothing follows the front matter"),
        (b"ok\ncaf\xe9\n", "line 2: not UTF-8 (byte 0xe9); save the file as UTF-8"),
        (b"ok\n\xed\xa0\x80", "line 2: not UTF-8 (byte 0xed); save the file as UTF-8"),
        (b"a\nb\0c", "line 2: a NUL byte; a task file is UTF-8 text"),
        ("hi".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        ("\ufeffhi".encode("utf-16-be"), "the file is UTF-16; save it as UTF-8"),
        ("hi".encode("utf-32"), "the file is UTF-32; save it as UTF-8"),
        (
            b"x" * (1 << 20) + b"y",
            "larger than 1048576 bytes, the limit for a task file (limits.file)",
        ),
        (
            b"---\nsession: a\n\nFix it\n",
            "line 1: a first line --- begins front matter, which needs a line --- after it",
        ),
        (b"---", "line 1: a first line --- begins front matter, which needs a line --- after it"),
        (
            b"---\ntitle: " + b"x" * 17000 + b"\n---\nx",
            "line 1: front matter of more than 16 KiB",
        ),
        (
            b"---\nA rule, not front matter\n---\nx",
            "line 2: found 'A rule, not front matter'; allowed: keys with their values",
        ),
        (
            b"---\nprompt: x\n---\ny",
            "line 2: prompt: not in front matter; the text below it is the prompt",
        ),
    ],
)
def test_files_that_are_refused(data: bytes, message: str) -> None:
    assert refusal("t.md", data) == message


def test_max_bytes() -> None:
    assert parse("t.txt", b"12345", max_bytes=5) == Request("12345")
    with pytest.raises(Refused, match="larger than 4 bytes"):
        parse("t.txt", b"12345", max_bytes=4)


LINE = "1 to 200 printable characters on one line"
WHEN = "a time such as 2026-11-24T02:00 or 2026-11-24T02:00:00Z, or a delay of 1s to 366d"
NAME = "1 to 100 of A-Z a-z 0-9 . _ : / -, not beginning with -"
COMMAND = "1 to 1000 printable characters on one line"
PATH = "a path: absolute, relative or ~/..., at most 4096 bytes"
TIME = "a duration from 1s to 24h, such as 90s, 30m or 2h"
LONG = "x" * 57
TEXT = "a text in UTF-8 that is not blank"
RENAME = "rename it to end otherwise"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("session:", f"session: found no value; allowed: {LINE}"),
        ("session: ' '", f"session: found ' '; allowed: {LINE}"),
        ("session: " + "x" * 201, f"session: found '{LONG}'…; allowed: {LINE}"),
        ('session: "a\\nb"', rf"session: found 'a\nb'; allowed: {LINE}"),
        ('session: "\\e[31m"', rf"session: found '\x1b[31m'; allowed: {LINE}"),
        ("session: [a]", f"session: found a list; allowed: {LINE}"),
        ("title: |\n  two\n  lines", rf"title: found 'two\nlines\n'; allowed: {LINE}"),
        ("key: {a: b}", f"key: found a mapping; allowed: {LINE}"),
        ("model: -m", f"model: found '-m'; allowed: {NAME}"),
        ("profile: a b", f"profile: found 'a b'; allowed: {NAME}"),
        ("model: " + "m" * 101, f"model: found '{'m' * 57}'…; allowed: {NAME}"),
        ("workdir: ~root/x", f"workdir: found '~root/x'; allowed: {PATH}"),
        ('workdir: "a\\0b"', rf"workdir: found 'a\x00b'; allowed: {PATH}"),
        ("output_schema: " + "é" * 2049, f"output_schema: found '{'é' * 57}'…; allowed: {PATH}"),
        (
            "sandbox: none",
            "sandbox: found 'none'; allowed: read-only, workspace-write, danger-full-access",
        ),
        ("resume: yes", "resume: found 'yes'; allowed: auto, always, never"),
        ("timeout: 12:30:45", f"timeout: found '12:30:45'; allowed: {TIME}"),
        ("timeout: 0.5", f"timeout: found '0.5'; allowed: {TIME}"),
        ("timeout: 25h", f"timeout: found '25h'; allowed: {TIME}"),
        ("timeout: 1h30m", f"timeout: found '1h30m'; allowed: {TIME}"),
        ("idle_timeout: -1s", f"idle_timeout: found '-1s'; allowed: {TIME}"),
        ("priority: 10", "priority: found '10'; allowed: a whole number from 0 to 9"),
        ("priority: high", "priority: found 'high'; allowed: a whole number from 0 to 9"),
        ("attempts: 0", "attempts: found '0'; allowed: a whole number from 1 to 20"),
        ("memory: maybe", "memory: found 'maybe'; allowed: on or off (or true, false, yes, no)"),
        ("images: a.png", "images: found 'a.png'; allowed: a list of at most 20, such as [a, b]"),
        (
            "images: [" + "a," * 21 + "]",
            "images: found 21 items; allowed: a list of at most 20, such as [a, b]",
        ),
        ("add_dirs: [a, [b]]", f"add_dirs item 2: found a list; allowed: {PATH}"),
        ("add_dirs: [a, '']", f"add_dirs item 2: found ''; allowed: {PATH}"),
        ("after: x", "after: found 'x'; allowed: a list of at most 50, such as [a, b]"),
        ("after: [a, '']", f"after item 2: found ''; allowed: {LINE}"),
        ("not_before: 2026-11-23", f"not_before: found '2026-11-23'; allowed: {WHEN}"),
        ("not_before: 2026-02-30T02:00", f"not_before: found '2026-02-30T02:00'; allowed: {WHEN}"),
        ("not_before: 02:00", f"not_before: found '02:00'; allowed: {WHEN}"),
        ("not_before: 367d", f"not_before: found '367d'; allowed: {WHEN}"),
        ("not_before: tomorrow", f"not_before: found 'tomorrow'; allowed: {WHEN}"),
        ("verify: make test", "verify: found 'make test'; allowed: a mapping of command, rounds"),
        ("verify: {rounds: 2}", f"verify.command: missing; allowed: {COMMAND}"),
        ("verify: {}", f"verify.command: missing; allowed: {COMMAND}"),
        ("verify:", f"verify.command: missing; allowed: {COMMAND}"),
        ("verify: {command: null}", f"verify.command: missing; allowed: {COMMAND}"),
        ("verify: {command: ''}", f"verify.command: found ''; allowed: {COMMAND}"),
        (
            "verify: {command: x, rounds: 11}",
            "verify.rounds: found '11'; allowed: a whole number from 1 to 10",
        ),
        (
            "limits: {memory: 65535K}",
            "limits.memory: found '65535K'; "
            "allowed: a size from 64M to 1048576G, such as 512K, 64M or 1G",
        ),
        (
            "limits: {tasks: 63}",
            "limits.tasks: found '63'; allowed: a whole number from 64 to 1000000",
        ),
        ("limits: {cpu: much}", "limits.cpu: found 'much'; allowed: from 1% to 100000% of one CPU"),
        ("limits: {disk: 1G}", "limits.disk: unknown key; allowed: memory, cpu, tasks"),
        ("limits: 1G", "limits: found '1G'; allowed: a mapping of memory, cpu, tasks"),
        ("session: *a", "aliases, anchors and tags are not allowed; quote *, & or !"),
        ("session: b", "session: duplicate key, line 2 has it"),
    ],
)
def test_values_that_are_refused(text: str, message: str) -> None:
    first = "session: a\n" if message.endswith("line 2 has it") else "# a comment\n"
    assert refusal("t.md", f"---\n{first}{text}\n---\nx") == f"line 3: {message}"


KEYS = (
    "session, workdir, model, profile, sandbox, resume, timeout, idle_timeout, priority, "
    "after, not_before, attempts, key, title, images, add_dirs, output_schema, memory, "
    "verify, limits"
)


def test_unknown_keys_with_the_nearest_known() -> None:
    assert refusal("t.md", "---\nworkdir: x\nsesion: a\n---\nx") == (
        f"line 3: sesion: unknown key (did you mean session?); allowed: {KEYS}"
    )
    assert refusal("t.json", '{"prompt": "x",\n\n"zzz": 1}') == (
        f"line 3: zzz: unknown key; allowed: {KEYS}, prompt"
    )
    assert refusal("t.yaml", "promt: x\n") == (
        f"line 1: promt: unknown key (did you mean prompt?); allowed: {KEYS}, prompt"
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.yaml", "session: a\n", f"prompt: missing; allowed: {TEXT}"),
        ("t.json", "{}", f"prompt: missing; allowed: {TEXT}"),
        ("t.json", '{"prompt": " "}', f"line 1: prompt: found ' '; allowed: {TEXT}"),
        ("t.json", '{"prompt": "a\\u0000"}', rf"line 1: prompt: found 'a\x00'; allowed: {TEXT}"),
        ("t.json", '{"prompt": 5}', f"line 1: prompt: found the number 5; allowed: {TEXT}"),
        (
            "t.json",
            '{"prompt": "x",\n"session": 5}',
            f"line 2: session: found the number 5; allowed: {LINE}",
        ),
        (
            "t.json",
            '{"prompt": "x", "priority": "5"}',
            "line 1: priority: found '5'; allowed: a whole number from 0 to 9",
        ),
        (
            "t.json",
            '{"prompt": "x", "timeout": true}',
            f"line 1: timeout: found true; allowed: {TIME}",
        ),
        ("t.json", '["prompt"]', "line 1: found a list; allowed: keys with their values"),
    ],
)
def test_documents_that_are_refused(name: str, text: str, message: str) -> None:
    assert refusal(name, text) == message


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "{a: " * 5000,
        "a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
        "- " * 5000,
        "session: !!python/name:os.system x\n",
        '"\\UFFFFFFFF": x',
    ],
)
def test_hostile_documents_are_refused(text: str) -> None:
    for name, data in [("t.md", f"---\n{text}\n---\nx"), ("t.yaml", text), ("t.json", text)]:
        assert refusal(name, data)


def test_the_schema_reads_yaml_not_yaml_itself() -> None:
    text = b"---\nsession: no\ntitle: 2026-11-23\nkey: 0x10\nmodel: 1e3\n---\nx"
    asked = Request("x", session="no", title="2026-11-23", key="0x10", model="1e3")
    assert parse("t.md", text) == asked
    assert (
        parse("t.md", "---\nsession: 'پروژه\u200cها'\n---\nx".encode()).session == "پروژه\u200cها"
    )


def test_from_mapping() -> None:
    assert taskfile.from_mapping(parse_json('{"prompt": "x", "priority": 9}')) == Request(
        "x", priority=9
    )
    with pytest.raises(Refused, match=r"^line 1: priority: found the number 99; allowed"):
        taskfile.from_mapping(parse_json('{"prompt": "x", "priority": 99}'))


@pytest.mark.parametrize("key", ["prompt", "session", "workdir", "images", "model"])
def test_a_mapping_made_by_hand_may_not_hold_half_characters(key: str) -> None:
    half = Scalar("a\udcff", Form.TEXT)  # as sys.argv has it for bytes that are not UTF-8
    values = {"prompt": Scalar("x", Form.TEXT), key: [half] if key == "images" else half}
    with pytest.raises(Refused, match=rf"^{key}.*: found 'a\\udcff'; allowed: "):
        taskfile.from_mapping(Document(values))


# --- dump and arbitrary input ---------------------------------------------------

PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), min_size=1)
LINES = PRINTABLE.map(lambda text: text[:200]).filter(str.strip)
PATHS = PRINTABLE.map(lambda text: text[:1000]).filter(lambda text: not text.startswith("~"))
NAMES = st.from_regex(r"[A-Za-z0-9._:/][A-Za-z0-9._:/-]{0,99}", fullmatch=True)
TIMES = st.floats(1, 86400)
REQUESTS = st.builds(
    Request,
    prompt=st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(str.strip),
    session=st.none() | LINES,
    workdir=st.none() | PATHS | st.just("~") | PATHS.map(lambda path: f"~/{path}"),
    model=st.none() | NAMES,
    profile=st.none() | NAMES,
    sandbox=st.none() | st.sampled_from(Sandbox),
    resume=st.sampled_from(Resume),
    timeout=st.none() | TIMES,
    idle_timeout=st.none() | TIMES,
    priority=st.integers(0, 9),
    attempts=st.none() | st.integers(1, 20),
    key=st.none() | LINES,
    title=st.none() | LINES,
    images=st.lists(PATHS, max_size=20).map(tuple),
    add_dirs=st.lists(PATHS, max_size=3).map(tuple),
    output_schema=st.none() | PATHS,
    memory=st.booleans(),
    verify=st.none() | st.fixed_dictionaries({"command": LINES, "rounds": st.integers(1, 10)}),
)


@given(REQUESTS)
def test_parse_reads_what_dump_writes(request: Request) -> None:
    assert parse(f"{ID}.json", dump(request)) == request


def test_dump_writes_what_a_person_can_read() -> None:
    assert dump(Request("Grüße\n", session="a", memory=False)).decode() == (
        '{\n  "session": "a",\n  "memory": false,\n  "prompt": "Grüße\\n"\n}\n'
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "prompt: found ' '"),
        ({"prompt": "a\udc80"}, "not UTF-8"),
        ({"session": "a\nb"}, r"session: found 'a\nb'"),
        ({"timeout": float("inf")}, "not valid JSON: Infinity"),
    ],
)
def test_what_dump_lets_through_parse_refuses(change: dict[str, object], message: str) -> None:
    request = replace(Request("x"), **change)  # type: ignore[arg-type]
    assert message in refusal("t.json", dump(request))


@given(REQUESTS)
def test_a_record_gives_the_request_again(request: Request) -> None:
    """As another task may have it: without what only the first one had."""
    record = json.loads(json.dumps(request.to_json()))
    waited = {"after": ["a"], "not_before": "1h", "of_a_newer_version": 1}
    assert taskfile.again({**record, **waited}) == replace(request, key=None)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (7, "it has no request"),
        ({}, "prompt: missing"),
        ({"prompt": 5}, "prompt: found the number 5"),
        ({"prompt": "x", "session": 7}, "session: found the number 7"),
        ({"prompt": "x", "priority": True}, "priority: found true"),
        ({"prompt": "x", "images": "a.png"}, "images: found 'a.png'; allowed: a list"),
        ({"prompt": "x", "limits": [1]}, "limits: found a list; allowed: a mapping"),
        ({"prompt": "x", "verify": {"rounds": 2}}, "verify.command: missing"),
        ({"prompt": "x", "title": [[[]]] * 999}, "more than 1000 values"),
    ],
)
def test_a_record_is_checked_as_a_file_is(record: object, why: str) -> None:
    with pytest.raises(Refused) as caught:
        taskfile.again(record)
    assert caught.value.reason.startswith(why)


NASTY = st.one_of(
    st.binary(),
    st.text().map(str.encode),
    st.text(st.sampled_from("---\n: {}[]\"'*&!|>session promt\\u\ud800")).map(
        lambda text: f"---\n{text}\n---\nx".encode("utf-8", "surrogatepass")
    ),
)


@given(st.sampled_from(["t.md", "t.yaml", "t.json", "t", "t.\udcff"]), NASTY)
def test_any_bytes_are_a_request_or_refused(name: str, data: bytes) -> None:
    try:
        request = parse(name, data)
    except Refused as err:
        said = str(err)
    else:
        assert request.prompt.strip()
        assert parse("x.json", dump(request)) == request
        return
    assert said.isprintable(), "one line, nothing raw"
    assert len(said) < 600


# --- names ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        ".hidden",
        ".take-x",
        "a.tmp",
        "a.part",
        "a.md~",
        ".a.md.swp",
        "a.swp",
        "a.filepart",
        "a.crdownload",
        "A.TMP",
    ],
)
def test_ignored(name: str) -> None:
    assert ignored(name)


@pytest.mark.parametrize("name", ["a.md", "a", "tmp", "part", "a.tmp.md", "a.partial", "\udcff"])
def test_not_ignored(name: str) -> None:
    assert not ignored(name)


@pytest.mark.parametrize(
    ("name", "verb", "target"),
    [
        (f"{ID}.cancel", Verb.CANCEL, ID),
        (f"{ID}.hold", Verb.HOLD, ID),
        (f"{ID}.release", Verb.RELEASE, ID),
        (f"{ID}.retry", Verb.RETRY, ID),
        ("all.hold", Verb.HOLD, "all"),
        ("all.release", Verb.RELEASE, "all"),
        ("all.drain", Verb.DRAIN, "all"),
        ("all.compact", Verb.COMPACT, "all"),
        ("website.reset", Verb.RESET, "website"),
        ("all.reset", Verb.RESET, "all"),
        ("a%2Fb.reset", Verb.RESET, "a/b"),
        ("a%2fb%25.c.reset", Verb.RESET, "a/b%.c"),
        ("%2Ehidden.reset", Verb.RESET, ".hidden"),
        ("Gr%C3%BC%C3%9Fe 🙂.reset", Verb.RESET, "Grüße 🙂"),
    ],
)
def test_control_files(name: str, verb: Verb, target: str) -> None:
    assert control(name) == Control(verb, target)


@pytest.mark.parametrize(
    "name",
    [
        "fix.md",
        "cancel",
        "hold",
        ".cancel",
        f"{ID}.md",
        f"{ID}.later",
        f"{ID}.CANCEL",
        ID,
        "notes.drain",
        "notes.compact",
        "all.md",
        "x.reset.md",
    ],
)
def test_other_names_are_no_control_files(name: str) -> None:
    assert control(name) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("all.cancel", f"'all.cancel' ends like a control file (ID.cancel); {RENAME}"),
        ("fix.hold", f"'fix.hold' ends like a control file (ID.hold or all.hold); {RENAME}"),
        ("\x1b.retry", rf"'\x1b.retry' ends like a control file (ID.retry); {RENAME}"),
        ("100%.reset", "'100%': '%' is no percent-encoding; write % as %25"),
        ("a%zzb.reset", "'a%zzb': '%zz' is no percent-encoding; write % as %25"),
        ("%ff.reset", "'%ff' is not percent-encoded UTF-8"),
        ("a%0Ab.reset", r"'a\nb' is no session's name; allowed: " + LINE),
        (" .reset", f"' ' is no session's name; allowed: {LINE}"),
        ("\udcff.reset", rf"'\udcff' is no session's name; allowed: {LINE}"),
        ("x" * 201 + ".reset", f"'{LONG}'… is no session's name; allowed: {LINE}"),
    ],
)
def test_control_files_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(Refused) as caught:
        control(name)
    assert str(caught.value) == message


@given(LINES)
def test_a_reset_names_any_session(session: str) -> None:
    wanted = Control(Verb.RESET, session)
    assert control(wanted.name) == wanted
    assert "/" not in wanted.name
    assert not ignored(wanted.name)


@given(st.text())
def test_any_name_is_answered(name: str) -> None:
    try:
        found = control(name)
    except Refused as err:
        said = str(err)
    else:
        assert found is None or found.target
        return
    assert said.isprintable()
