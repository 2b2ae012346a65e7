"""Break folders of every kind at random, read them, and count what became of it.

    python -m benchmarks.fuzz --cases 6000 --seed 0

A case is a folder that this package wrote, with one or two of its files changed: bytes, values of
its JSON, the header or the tensors of a safetensors file, or the file itself for a link, a pipe, a
pickle. The mutations are those of tests/hostile_files.py. Every crash is printed with its case.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> None:
    from hostile_files import KINDS, outcome  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=3000, help="over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every case")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    counts: Counter[tuple[str, str]] = Counter()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as tmp:
        for number in range(args.cases):
            kind = list(KINDS)[number % len(KINDS)]
            how, why = outcome(kind, number, args.seed, Path(tmp))
            counts[kind, how] += 1
            if how == "crashed" or args.verbose:
                print(f"{kind} {number}: {how} {why[:300]}")
    print(f"{args.cases} cases, seed {args.seed}, {time.perf_counter() - start:.0f} s")
    print("kind      loaded  refused  crashed")
    for kind in KINDS:
        print(f"{kind:8}" + "".join(f"{counts[kind, how]:9}" for how in HOW))
    sys.exit(any(counts[kind, "crashed"] for kind in KINDS))


HOW = ("loaded", "refused", "crashed")

if __name__ == "__main__":
    main()
