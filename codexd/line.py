"""One line of the ledger: an event as text that a person reads and nothing can forge.

    - 2026-11-23T07:20:11.123Z `20261123t072011-k3f9qa7x2m` **queued** `session="web"`  <!-- … -->

Lines that begin with `-` tell of a task, those with `*` of the daemon.  Facts
are name=JSON inside one code span, so that nothing a user wrote is Markdown.

The seal: nine letters that make the CRC-32 of the whole line, newline
included, zero.  Then it is zero for any run of lines as well: one crc32() over
a block checks thousands of lines at once, and a person checks a line with any
CRC-32 tool.

Part of the room `ledger`, which is the door to it.  No I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from zlib import crc32

from codexd import clock, sane
from codexd.model import Event, Kind, Note

FORMAT = 1
SEALED = 0  # CRC-32 of every good line, and so of any run of them
HEAD = f"# codexd ledger, format {FORMAT}"
_TAIL = b" -->\n"
_BLANK = b"@@@@@@@@@"  # 0x40: four free bits each; eight letters reach only 30 of 32
_LINE = re.compile(
    rb"[-*] (?P<at>\S{24}) (?:`(?P<id>[0-9a-z-]{26})` )?\*\*(?P<kind>[a-z]+)\*\*"
    rb"(?: `(?P<facts>[^`]*)`)?  <!-- [@-O]{9} -->\n"
)
_NAME = re.compile(r"[a-z_]+")
_FACT = re.compile(rf"({_NAME.pattern})=")
_TIMES = ("until", "not_before")  # facts that somebody waits for


def _solve() -> list[tuple[int, int]]:
    """How to reach any CRC by the free bits of the seal.

    CRC-32 is linear: flipping a bit of the seal flips a fixed pattern of the
    sum, wherever the line began.  Gauss-Jordan over those patterns gives,
    for each bit of the sum, the bits of the seal that flip it alone.
    """
    rows = []
    zero = crc32(_BLANK + _TAIL)
    for bit in range(4 * len(_BLANK)):
        letters = bytearray(_BLANK)
        letters[bit // 4] ^= 1 << (bit % 4)
        rows.append((crc32(bytes(letters) + _TAIL) ^ zero, 1 << bit))
    for bit in range(32):
        mask = 1 << bit
        pivot = next(i for i in range(bit, len(rows)) if rows[i][0] & mask)
        rows[bit], rows[pivot] = rows[pivot], rows[bit]
        effect, flips = rows[bit]
        for i in range(len(rows)):
            if i != bit and rows[i][0] & mask:
                rows[i] = (rows[i][0] ^ effect, rows[i][1] ^ flips)
    return rows[:32]


_FLIPS = [flips for _, flips in _solve()]


def seal(text: str) -> bytes:
    """`text` as a sealed ledger line.  ASCII without a newline."""
    head = text.encode("ascii") + b"  <!-- "
    wrong = crc32(head + _BLANK + _TAIL) ^ SEALED
    flips = 0
    for bit in range(32):
        if wrong >> bit & 1:
            flips ^= _FLIPS[bit]
    letters = bytes(0x40 | flips >> 4 * i & 15 for i in range(len(_BLANK)))
    return head + letters + _TAIL


def _fact(value: object) -> str:
    # json.dumps leaves printable ASCII alone; a backtick would end the code span.
    # It can only stand inside a JSON string.
    return json.dumps(value, separators=(",", ":")).replace("`", "\\u0060")


def render(event: Event) -> bytes:
    """The ledger line of an event.  Raises ValueError for one that none could read back."""
    facts = " ".join(f"{k}={_fact(v)}" for k, v in event.facts.items() if v is not None)
    where = f"`{event.id}` " if isinstance(event.kind, Kind) else ""
    mark = "-" if isinstance(event.kind, Kind) else "*"
    line = seal(f"{mark} {event.at} {where}**{event.kind}**" + (f" `{facts}`" if facts else ""))
    if not _LINE.fullmatch(line) or not all(map(_NAME.fullmatch, event.facts)):
        raise ValueError(f"no ledger line: {event}")
    return line


def parse(line: bytes) -> Event:
    """The event of a line.  Raises ValueError when the line is damaged."""
    if crc32(line) != SEALED:
        raise ValueError("the seal is broken")
    found = _LINE.fullmatch(line)
    if not found:
        raise ValueError("not a ledger line of this format")
    kind = found["kind"].decode()
    facts = dict(_facts((found["facts"] or b"").decode()))
    for name in _TIMES:
        if facts.get(name) is not None:
            clock.epoch(str(facts[name]))
    return Event(
        at=found["at"].decode(),
        kind=Kind(kind) if found["id"] else Note(kind),
        id=(found["id"] or b"").decode(),
        facts=facts,
    )


def _facts(text: str) -> Iterator[tuple[str, object]]:
    decoder, at = json.JSONDecoder(), 0
    while found := _FACT.match(text, at):
        try:
            value, at = decoder.raw_decode(text, found.end())
        except RecursionError as error:
            raise ValueError(f"{found[1]}: nested too deeply") from error
        if not sane.is_shallow(value):
            raise ValueError(f"{found[1]}: nested too deeply")
        yield found[1], value
        at += 1  # the blank between two facts
    if at < len(text):
        raise ValueError(f"no fact at column {at}: {text[at : at + 20]!r}")
