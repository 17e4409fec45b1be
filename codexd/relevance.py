"""Which parts of which notes a text is about: terms, sections, scores.  Pure.

A text becomes a `Query`: its words without the commonest ones, each as a stem
(six letters, light endings off) and, for less weight, as written; scripts
without spaces as pairs of characters.  A long text is cut into passages, of
which the first and the last count most words: the task stands there, what was
pasted stands between.

Notes are bytes.  What every scanner finds in them is a *run*: letters, digits,
`_` and all bytes above 127 in a row.  `Query.runs` says which terms a run
holds, so rg, grep and Python cannot count differently.  BM25 ranks files by
these counts first, then the sections of the best files.

Measured on 432 labelled questions in seven languages: as good as BM25 over a
full index of every section, within noise (bench/memory.py repeats it).
"""

from __future__ import annotations

import re
from math import log
from unicodedata import normalize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

# Only what stands in nearly every sentence; how rare a word is does the rest.
_STOP = frozenset(
    (
        "a i the and for are was not you your with this that from have has had can could will "
        "would should what when where which who why how does did doing its into than then they "
        "them their there here been being were but all any may might must our out over also "
        "about some such only other is it in on of to by or an as at be do if me my no so up us "
        "we he she his her am "
        "der die das und ist ein eine einen einem einer eines des dem den nicht mit von auf für "
        "sich als auch es im zu wie wird werden sind bei oder aus nach kann man ich sie wir ihr "
        "hat haben zum zur welche "
        "le la les un une du et est que qui dans pour sur pas par plus avec ce cette ces sont au "
        "aux ne il elle je nous vous se son sa ses comment quoi où quel quelle mon ma mes "
        "el los las una y en por con para como del al lo su sus qué cómo cuál "
        "и в не на что как по для это из от за или при так его но то же ли бы вы мы они она он "
        "я к с о у где какие какой можно мне есть если"
    ).split()
)

# Scripts written without spaces, and Hangul, whose words carry their particles.
_DENSE = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(r"[\w\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u064b-\u065f\u0900-\u0fff]+")
_PIECE = re.compile(f"[{_DENSE}]+|[^{_DENSE}]+")
_IS_DENSE = re.compile(f"[{_DENSE}]")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_ENDING = re.compile(r"(?<=\w{3})(?:ings?|ed|ies|es|s|y|e|ly|er|ers|ations?|en|ern)$")
_PARAGRAPH = re.compile(r"\n[ \t\r]*\n")
# A heading, or a fence inside which '#' is no heading.
_MARK = re.compile(rb"^(?: {0,3}(```|~~~)|#{1,6}[ \t])", re.MULTILINE)
_BREAK = re.compile(rb"\n(?=[ \t]*\r?\n|[-*+] |\d{1,3}[.)] )")
_RUN = re.compile(rb"[\w\x80-\xff]+")

STEM = 6  # characters
EXACT = "="  # first character of a term that is a word as written
W_STEM, W_EXACT, W_DENSE = 0.7, 0.3, 0.3

ONE_PASSAGE = 1000  # characters up to which a text is one passage
PASSAGE = 1500  # characters of the longest passage
WORDS, WORDS_EDGE, WORDS_MIDDLE = 80, 20, 2  # in all; of first and last; of the others

K1, B = 1.2, 0.75
AVERAGE, FLOOR = 700, 200  # a section's usual and least length, bytes
W_FILE, W_TOTAL, W_PATH = 0.25, 0.05, 0.3
TF_POWER = 0.7  # so many of a file's hits are estimated to be in sections of their own
SECTION = 6000  # bytes above which a section is cut at paragraphs or list items
PIECE_SIZE = 1500  # bytes such a piece has at least


def _pieces(text: str) -> Iterator[str]:
    """The words of `text` in NFC, common ones left out, split where the script changes."""
    if not text.isascii():
        text = normalize("NFC", text)
    for word in _WORD.findall(text):
        if word.lower() not in _STOP:
            yield from _PIECE.findall(word)


def _terms(piece: str) -> list[str]:
    if _IS_DENSE.match(piece):
        return [piece[i : i + 2] for i in range(max(1, len(piece) - 1))]
    parts = _PART.findall(piece) if piece.isascii() else [p for p in piece.split("_") if p]
    found = [EXACT + piece.lower().strip("_")] if len(parts) > 1 else []
    for part in parts:
        word = part.lower()
        if len(word) < 2 or word in _STOP:
            continue
        ending = _ENDING.search(word)
        found.append((word[: ending.start()] if ending else word)[:STEM])
        if len(parts) == 1:
            found.append(EXACT + word)
    return found


def terms(text: str) -> list[str]:
    """All terms of `text`, in its order, repeated where they repeat."""
    return [term for piece in _pieces(text) for term in _terms(piece)]


def _passages(text: str) -> list[str]:
    if len(text) <= ONE_PASSAGE:
        return [text]
    found = []
    for paragraph in _PARAGRAPH.split(text):
        found += [paragraph[i : i + PASSAGE] for i in range(0, len(paragraph), PASSAGE)]
    return found


def _words(passage: str) -> dict[str, list[str]]:
    """word → its terms; a pair of characters is a word of its own."""
    found: dict[str, list[str]] = {}
    for piece in _pieces(passage):
        made = _terms(piece)
        if _IS_DENSE.match(piece):
            found.update((pair, [pair]) for pair in made)
        elif made:
            found[piece] = made
    return found


class Runs(dict[bytes, tuple[str, ...]]):
    """run → those of a query's terms it holds, worked out once for each run."""

    def __init__(self, wanted: Mapping[str, object]) -> None:
        self._wanted = wanted

    def __missing__(self, run: bytes) -> tuple[str, ...]:
        text = run.decode("utf-8", "replace")
        found = tuple(t for t in terms(text) if t in self._wanted)
        self[run] = found
        return found

    def count(self, found: Iterable[bytes]) -> dict[str, int]:
        """How often each term is in these runs."""
        tally: dict[str, int] = {}
        for run in found:
            for term in self[run]:
                tally[term] = tally.get(term, 0) + 1
        return tally


class Query:
    """A text as what is looked for.

    `words` maps each term to the word it comes from; empty: nothing to look for.
    """

    __slots__ = ("passages", "runs", "words")

    def __init__(self, text: str) -> None:
        split = [found for found in map(_words, _passages(text)) if found]
        self.words: dict[str, str] = {}
        last = len(split) - 1
        for i in sorted(range(len(split)), key=lambda i: (0 < i < last, i)):
            room = WORDS_MIDDLE if 0 < i < last else WORDS if last == 0 else WORDS_EDGE
            self._choose(split[i], min(room, WORDS - len(set(self.words.values()))))
        # What was chosen in one passage counts in all that have it.
        self.passages = [{t for ts in p.values() for t in ts if t in self.words} for p in split]
        self.runs = Runs(self.words)

    def _choose(self, words: Mapping[str, Sequence[str]], room: int) -> None:
        """Long words first: they are rarer, and cheaper to look for."""
        for word in sorted(words, key=len, reverse=True):
            if room <= 0:
                return
            new = [t for t in words[word] if t not in self.words]
            room -= bool(new)
            self.words.update(dict.fromkeys(new, word))

    def literals(self) -> list[bytes]:
        """What a run that holds one of the terms must contain, ASCII letters in any case.

        As typed on different systems: composed and decomposed, in three cases.
        """
        plain = {term.removeprefix(EXACT) for term in self.words}
        short = [t for t in plain if not any(o in t for o in plain if o != t)]
        found = set()
        for term in short:
            cases = (term,) if term.isascii() else (term, term.capitalize(), term.upper())
            found.update(normalize(f, c).encode().lower() for c in cases for f in ("NFC", "NFD"))
        return sorted(found)


class Scorer:
    """BM25 for one query; how rare a term is comes from the counts in all matching files."""

    __slots__ = ("_full", "_where", "idf")

    def __init__(self, query: Query, tallies: Iterable[Mapping[str, int]], size: int) -> None:
        """`tallies`: term counts of each file with any; `size`: bytes of all files searched."""
        holders = dict.fromkeys(query.words, 0.0)
        for tally in tallies:
            for term, n in tally.items():
                holders[term] += _SPREAD[n] if n < len(_SPREAD) else n**TF_POWER
        sections = max(size / AVERAGE, 1.0)
        self.idf = {
            term: _weight(term) * log(1 + (max(sections - n, 0) + 0.5) / (n + 0.5))
            for term, n in holders.items()
        }
        several = len(query.passages) > 1
        self._full = [sum(self.idf[t] for t in p) or 1.0 for p in query.passages] if several else []
        self._where = {
            term: [i for i, passage in enumerate(query.passages) if term in passage]
            for term in query.words
        }

    def score(self, tally: Mapping[str, float], length: float = 1.0) -> float:
        """`length` is relative to the average."""
        idf, norm, total = self.idf, K1 * (1 - B + B * length), 0.0
        if not self._full:
            for term, n in tally.items():
                total += idf[term] * n / (n + norm)
            return total * (K1 + 1)
        sums, shares = [0.0] * len(self._full), [0.0] * len(self._full)
        for term, n in tally.items():
            weight = idf[term]
            gain = weight * n / (n + norm)
            total += gain
            for i in self._where[term]:
                sums[i] += gain
                shares[i] += weight
        best = max(a * b / full for a, b, full in zip(sums, shares, self._full, strict=True))
        return (best + W_TOTAL * total) * (K1 + 1)

    def section(self, tally: Mapping[str, int], head: Iterable[str], path: Iterable[str], size: int) -> float:
        """A section's score; a term of its heading or of the file's path counts more."""
        if not tally:
            return 0.0
        weighed: dict[str, float] = dict(tally)
        for term in head:
            weighed[term] += 1
        for term in path:
            if term in weighed:
                weighed[term] += W_PATH
        return self.score(weighed, max(size, FLOOR) / AVERAGE)


_SPREAD = [n**TF_POWER for n in range(64)]


def _weight(term: str) -> float:
    if term[0] == EXACT:
        return W_EXACT
    return W_DENSE if _IS_DENSE.match(term) else W_STEM


def sections(note: bytes) -> list[tuple[int, int, int, int]]:
    """(start, end, first line, last line) from heading to heading; long ones in pieces."""
    cuts, fenced = [0], False
    for mark in _MARK.finditer(note):
        if mark[1]:
            fenced = not fenced
        elif not fenced:
            cuts.append(mark.start())
    bounds = []
    for start, end in zip(cuts, [*cuts[1:], len(note)], strict=True):
        bounds += _split(note, start, end)
    found, line = [], 1
    for start, end in bounds:
        lines = note.count(b"\n", start, end)
        if end > start:
            found.append((start, end, line, line + max(0, lines - (note[end - 1 : end] == b"\n"))))
        line += lines
    return found


def _split(note: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """A list of a thousand items is not one section."""
    while end - start > SECTION:
        cut = _BREAK.search(note, start + PIECE_SIZE, end)
        if cut is None or cut.end() >= end:
            break
        yield start, cut.end()
        start = cut.end()
    yield start, end


def runs(note: bytes) -> list[bytes]:
    return _RUN.findall(note)
