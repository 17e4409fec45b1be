"""Which parts of which notes a text is about: terms and scores.  Pure.

A text becomes a `Query`: its words without the commonest ones, each as a stem
(six letters, light endings off) and, for less weight, as written; scripts
without spaces as pairs of characters.  A long text is cut into passages, of
which the first and the last may look for most words: the task stands there,
and what was pasted stands between.

Notes are bytes.  What every scanner looks for is a *run*: one of the query's
literals and what follows it without a break, letters, digits, `_` and all
bytes above 127.  `Query.runs` says which terms a run holds, so rg, grep and
Python cannot count differently.  BM25 ranks the files by these counts, then
the sections of the best files; bench/memory.py says how well.
"""

from __future__ import annotations

import re
from collections import Counter
from math import log
from unicodedata import normalize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

# Only what stands in nearly every sentence; how rare a word is does the rest.
_STOP = frozenset(
    re.findall(
        r"\w+",
        """
        the and for are was not you your with this that from have has had can could will would
        should what when where which who why how does did doing its into than then they them
        their there here been being were but all any may might must our out over also about some
        such only other is it in on of to by or an as at be do if me my no so up us we he she
        his her am der die das und ist ein eine einen einem einer eines des dem den nicht mit
        von auf für sich als auch es im zu wie wird werden sind bei oder aus nach kann man ich
        sie wir ihr hat haben zum zur welche le la les un une du et est que qui dans pour sur
        pas par plus avec ce cette ces sont au aux ne il elle je nous vous se son sa ses comment
        quoi où quel quelle mon ma mes el los las una en por con para como del al lo su sus qué
        cómo cuál и в не на что как по для это из от за или при так его но то же ли бы вы мы они
        она он я к с о у где какие какой можно мне есть если
        """,
    )
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
# A byte that cannot be in a run becomes a space.
SPLIT = bytes(b if b > 127 or b == 95 or chr(b).isalnum() else 32 for b in range(256))

STEM = 6  # characters
EXACT = "="  # first character of a term that is a word as written
KNOWN = 50_000  # words and runs that are remembered: notes may have any number of them
LONGEST_WORD = 64  # characters; beyond it, keys and hashes
W_STEM, W_EXACT, W_DENSE = 0.7, 0.3, 0.3

TEXT = 32_000  # characters of a text that are looked at: its first and last half of that
ONE_PASSAGE = 1000  # characters up to which a text is one passage
PASSAGE = 1500  # characters of the longest passage
WORDS, WORDS_EDGE, WORDS_MIDDLE = 80, 20, 2  # in all; of first and last; of the others

K1, B = 1.5, 0.75
AVERAGE = 700  # a section's usual length, bytes
W_EDGE = 1.25  # the first and the last passage against the others
ELSEWHERE = 100  # sections without any term there might be, so that one short note has rare words
SPREAD = 0.5  # n hits in a file stand in about n**SPREAD sections


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
    if len(piece) > LONGEST_WORD:
        return []
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
    if len(text) > TEXT:
        text = f"{text[: TEXT // 2]}\n\n{text[-TEXT // 2 :]}"
    if len(text) <= ONE_PASSAGE:
        return [text]
    return [
        paragraph[i : i + PASSAGE]
        for paragraph in _PARAGRAPH.split(text)
        for i in range(0, len(paragraph), PASSAGE)
    ]


def _words(passage: str) -> dict[str, list[str]]:
    """word → its terms; a pair of dense characters is a word of its own."""
    found: dict[str, list[str]] = {}
    for piece in _pieces(passage):
        made = _terms(piece)
        if _IS_DENSE.match(piece):
            found.update((pair, [pair]) for pair in made)
        elif made:
            found[piece] = made
    return found


class Runs(dict[bytes, tuple[str, ...]]):
    """run → those of a query's terms it holds, worked out once for each run of late."""

    def __init__(self, wanted: Mapping[str, object], pattern: re.Pattern[bytes]) -> None:
        self._wanted, self._pattern = wanted, pattern

    def __missing__(self, run: bytes) -> tuple[str, ...]:
        found: tuple[str, ...] = ()
        if self._pattern.search(run):
            text = run.decode("utf-8", "replace")
            found = tuple(t for t in terms(text) if t in self._wanted)
        if len(self) >= KNOWN:
            self.clear()
        self[run] = found
        return found

    def count(self, runs: Iterable[bytes]) -> dict[str, int]:
        """How often each term is in these."""
        tally: dict[str, int] = {}
        for held, n in Counter(filter(None, map(self.__getitem__, runs))).items():
            for term in held:
                tally[term] = tally.get(term, 0) + n
        return tally


class _Tails(dict[bytes, bytes]):
    """word → the run in it, empty if there is none, of words of late."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self._pattern = pattern

    def __missing__(self, word: bytes) -> bytes:
        at = self._pattern.search(word)
        if len(self) >= KNOWN:
            self.clear()
        self[word] = tail = word[at.start() :] if at else b""
        return tail


class Query:
    """A text as what is looked for.

    `words`: term → the word it comes from; empty if there is nothing to look
    for.  `passages`: the terms of each.  `literals`: a run that holds a term
    contains one of these, ASCII letters in any case; `pattern` matches them.
    """

    __slots__ = ("_tails", "literals", "passages", "pattern", "runs", "words")

    def __init__(self, text: str) -> None:
        split = [found for found in map(_words, _passages(text)) if found]
        self.words: dict[str, str] = {}
        last = len(split) - 1
        room = WORDS
        for i in sorted(range(len(split)), key=lambda i: (0 < i < last, i)):
            share = WORDS_MIDDLE if 0 < i < last else WORDS_EDGE if last else WORDS
            room -= self._choose(split[i], min(room, share))
        # What was chosen in one passage counts in all that have it.
        self.passages = [{t for ts in p.values() for t in ts if t in self.words} for p in split]
        self.literals = _literals({term.removeprefix(EXACT) for term in self.words})
        self.pattern = re.compile(b"|".join(self.literals), re.IGNORECASE)
        self.runs = Runs(self.words, self.pattern)
        self._tails = _Tails(self.pattern)

    def count(self, note: bytes) -> dict[str, int]:
        """How often each term is in a note, or a piece of one."""
        return self.runs.count(note.translate(SPLIT).split())

    def tails(self, note: bytes) -> Iterator[bytes]:
        """What rg would print of a note: its words, each from its first literal on."""
        return filter(None, map(self._tails.__getitem__, note.translate(SPLIT).split()))

    def _choose(self, words: Mapping[str, Sequence[str]], room: int) -> int:
        """Take up to `room` words, long ones first: they are rarer.  How many were new."""
        taken = 0
        for word in sorted(words, key=len, reverse=True):
            if taken == room:
                break
            new = [t for t in words[word] if t not in self.words]
            taken += bool(new)
            self.words.update(dict.fromkeys(new, word))
        return taken


def _literals(plain: set[str]) -> list[bytes]:
    """Each term as different systems write it: composed, decomposed, in three cases."""
    found: set[bytes] = set()
    for term in plain:
        if any(other in term for other in plain if other != term):
            continue  # whoever finds the other finds this
        cases = (term,) if term.isascii() else (term, term.capitalize(), term.upper())
        found.update(normalize(f, c).encode().lower() for c in cases for f in ("NFC", "NFD"))
    return sorted(found)


class Scorer:
    """BM25 for one query.  How rare a term is comes from the counts in all matching files."""

    __slots__ = ("_passages", "_query", "_where", "idf")

    def __init__(self, query: Query, tallies: Iterable[Mapping[str, int]], size: int) -> None:
        """`tallies`: the counts of each matching file; `size`: bytes of all files searched."""
        holders = dict.fromkeys(query.words, 0.0)
        for tally in tallies:
            for term, n in tally.items():
                holders[term] += n**SPREAD
        sections = size / AVERAGE + ELSEWHERE
        self.idf = {
            term: _weight(term) * log(1 + max(sections - n, 0.5) / (n + 0.5))
            for term, n in holders.items()
        }
        self._query = query
        self._passages = [sum(self.idf[t] for t in p) or 1.0 for p in query.passages]
        self._where = {
            term: [i for i, passage in enumerate(query.passages) if term in passage]
            for term in query.words
        }

    def score(self, tally: Mapping[str, float], length: float) -> float:
        """`length` is relative to the average.

        Of several passages the best one counts, by how much of it is there: a
        note that answers the question beats one with a word from everywhere.
        """
        idf, norm = self.idf, K1 * (1 - B + B * length)
        if len(self._passages) == 1:
            return sum(idf[term] * n / (n + norm) for term, n in tally.items())
        sums, shares = [0.0] * len(self._passages), [0.0] * len(self._passages)
        for term, n in tally.items():
            gain = idf[term] * n / (n + norm)
            for i in self._where[term]:
                sums[i] += gain
                shares[i] += idf[term]
        best = [a * b / c for a, b, c in zip(sums, shares, self._passages, strict=True)]
        return max(W_EDGE * best[0], W_EDGE * best[-1], *best)

    def share(self, held: set[str]) -> float:
        """How much of the query, of 1, these terms are; of several passages, of the best."""
        return max(
            sum(self.idf[term] for term in held & passage) / whole
            for passage, whole in zip(self._query.passages, self._passages, strict=True)
        )


def _weight(term: str) -> float:
    if term[0] == EXACT:
        return W_EXACT
    return W_DENSE if _IS_DENSE.match(term) else W_STEM
