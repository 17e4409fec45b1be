"""The project's measures, each a ratio of two things timed side by side in one run.

    python -m bench [NAME…]

Absolute times say nothing across machines, and on a shared one not even across
minutes.  Every benchmark interleaves what it compares, and gives the median of
each divided by the other.  Nothing here is a test: a stopwatch never fails one.
"""

from __future__ import annotations

import sys

from bench import drop, memory, replay, start

BENCHES = {"drop": drop.run, "replay": replay.run, "start": start.run, "memory": memory.run}


def main() -> int:
    names = sys.argv[1:] or list(BENCHES)
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        print(f"bench: no {', '.join(unknown)}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    for name in names:
        for ratio in BENCHES[name]():
            print(ratio, flush=True)
    return 0


sys.exit(main())
