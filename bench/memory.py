"""Memory search over one `rg -c` of a word, and, for a labelled corpus, how good it is.

`python -m bench memory` makes trees of 1,000, 2,700 and 10,000 notes of 6 KB and
times short and long prompts against one `rg -c` of one word.

`python -m bench.memory CORPUS QUERIES [STEP]` scores a corpus instead: QUERIES
is JSON, a list of {fam, text, gold: [[path, first line, last line], …]}; every
STEP-th is asked.  Families that begin with "long" are long prompts.  Printed are
nDCG@10, the same by BM25 over all sections with the same terms, and whether any
gold line, and how much of the gold text, is in the excerpts of 4,000 characters.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from math import log, log2
from pathlib import Path
from statistics import mean

from bench.measure import Ratio, compare, timed
from codexd import memory
from codexd.relevance import K1, B, terms

SIZES = (1000, 2700, 10_000)
NOTE = 6000  # characters
ROUNDS = 21
SHORT, LONG = 4.0, 12.0  # the goals
RG = ("rg", "--no-config", "-uuu", "-g", "*.md", "-c")
_SENTENCE = re.compile(r'^ +"""([A-Z][^"\n]*\.)(?:"""|\n)', re.MULTILINE)


# --- time ----------------------------------------------------------------------------


class Texts:
    """Real words in their real numbers: Python's own library, cut into notes."""

    def __init__(self) -> None:
        top = Path(json.__file__).parent.parent
        files = [p for p in sorted(top.rglob("*.py")) if not {"test", "site-packages"} & {*p.parts}]
        whole = [path.read_text(errors="replace") for path in files]
        self.notes = [text[i : i + NOTE] for text in whole for i in range(0, len(text), NOTE)]
        random.Random(1).shuffle(self.notes)
        asked = [line for text in whole for line in _SENTENCE.findall(text)]
        self.prompts = sorted({line for line in asked if 6 <= len(line.split()) <= 20})
        random.Random(2).shuffle(self.prompts)

    def write(self, place: Path, count: int) -> None:
        for i in range(count):
            directory = place / f"{i % 40}"
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{i}.md").write_text(self.notes[i % len(self.notes)])

    def short(self) -> list[str]:
        return self.prompts[:ROUNDS]

    def long(self) -> list[str]:
        pasted = zip(self.prompts[ROUNDS:], self.notes[-ROUNDS:], strict=False)
        return [f"{prompt}\n\n{note[:3000]}" for prompt, note in pasted]


def _searching(place: Path, prompts: Sequence[str]) -> Callable[[], float]:
    turn = cycle(prompts)
    return lambda: timed(
        lambda: memory.search([str(place)], str(place), next(turn), deadline=60, tool="rg")
    )


def _counting(place: Path) -> Callable[[], float]:
    return lambda: timed(
        lambda: subprocess.run(
            [*RG, "return", str(place)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False,
        )
    )  # fmt: skip


def run() -> Iterator[Ratio]:
    texts = Texts()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as top:
        for size in SIZES:
            place = Path(top) / str(size)
            texts.write(place, size)
            for kind, goal, made in (("short", SHORT, texts.short), ("long", LONG, texts.long)):
                yield compare(
                    f"memory search, {kind} prompt, {size} notes / one rg -c of a word", goal,
                    _searching(place, made()), _counting(place), ROUNDS,
                )  # fmt: skip


# --- quality -------------------------------------------------------------------------

Span = tuple[str, int, int]  # path, first line, last line


class Index:
    """The reference: BM25 over every section of a corpus."""

    def __init__(self, corpus: Path) -> None:
        self.spans: list[Span] = []
        self.sizes: list[int] = []
        self.holders: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for path in sorted(corpus.rglob("*.md")):
            for line, text in memory.sections(path.read_bytes()):
                tally = Counter(terms(text.decode("utf-8", "replace")))
                for term, n in tally.items():
                    self.holders[term].append((len(self.spans), n))
                self.sizes.append(tally.total())
                name = str(path.relative_to(corpus))
                self.spans.append((name, line, line + text.count(b"\n")))

    def search(self, text: str) -> list[Span]:
        scores: dict[int, float] = defaultdict(float)
        usual = mean(self.sizes)
        for term in set(terms(text)):
            held = self.holders[term]
            weight = log(1 + (len(self.spans) - len(held) + 0.5) / (len(held) + 0.5))
            for i, n in held:
                norm = K1 * (1 - B + B * self.sizes[i] / usual)
                scores[i] += weight * n * (K1 + 1) / (n + norm)
        return [self.spans[i] for i in sorted(scores, key=lambda i: (-scores[i], i))[:20]]


def ndcg(ranked: Sequence[Span], gold: Sequence[Span]) -> float:
    """At 10; a gold span is found once, by the first result that touches it."""
    left, gain = list(gold), 0.0
    for rank, (path, first, last) in enumerate(ranked[:10]):
        for span in left:
            if span[0] == path and first <= span[2] and last >= span[1]:
                left.remove(span)
                gain += 1 / log2(rank + 2)
                break
    return gain / sum(1 / log2(rank + 2) for rank in range(min(10, len(gold))))


def shown(corpus: Path, hits: Sequence[memory.Hit], gold: Sequence[Span]) -> tuple[float, float]:
    """Whether an excerpt begins in a gold span, and how much of the best span is there."""
    begun, best = 0.0, 0.0
    for path, first, last in gold:
        mine = [hit for hit in hits if hit.path == path and hit.line <= last]
        begun = max(begun, float(any(hit.line >= first for hit in mine)))
        lines = (corpus / path).read_text(errors="replace").split("\n")[first - 1 : last]
        wanted = {line.strip() for line in lines} - {""}
        there = wanted & {line.strip() for hit in mine for line in hit.text.split("\n")}
        best = max(best, sum(map(len, there)) / max(1, min(1000, sum(map(len, wanted)))))
    return begun, min(best, 1.0)


def score(corpus: Path, queries: Path, step: int) -> None:
    index = Index(corpus)
    columns: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for query in json.loads(queries.read_text())[::step]:
        gold = [(path, first, last) for path, first, last in query["gold"]]
        hits = memory.search([str(corpus)], str(corpus), query["text"], deadline=60).hits
        family = columns["long" if query["fam"].startswith("long") else query["fam"]]
        family["nDCG@10"].append(ndcg([(h.path, h.line, h.end) for h in hits], gold))
        family["full BM25"].append(ndcg(index.search(query["text"]), gold))
        for name, value in zip(("any line", "share"), shown(corpus, hits, gold), strict=True):
            family[name].append(value)
    for name in ("nDCG@10", "full BM25", "any line", "share"):
        means = {family: mean(values[name]) for family, values in sorted(columns.items())}
        short = mean(value for family, value in means.items() if family != "long")
        each = "  ".join(f"{family} {value:.2f}" for family, value in means.items())
        print(f"{name}: all {mean(means.values()):.3f}, short {short:.3f}\n    {each}", flush=True)


if __name__ == "__main__":
    score(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), int((*sys.argv, "1")[3]))
