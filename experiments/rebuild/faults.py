"""Put the faults of `faults.json` into a copy of the tree, one at a time; their tests must fail.

    python faults.py TREE [--only PATTERN]

Each fault is an edit of one file: `search` occurs exactly once there and becomes `replace`.
Exits with 1 if a fault is not detected, or if its edit no longer fits the code.
"""

import argparse
import fnmatch
import json
import sys
import tempfile
from pathlib import Path

from mutants import copied, import_libraries, put, tested


def main() -> int:
    """Apply the faults and print which tests detect them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tree", type=Path)
    parser.add_argument("--only", default="*")
    given = parser.parse_args()
    faults = json.loads((Path(__file__).parent / "faults.json").read_text())
    wanted = [fault for fault in faults if fnmatch.fnmatchcase(fault["id"], given.only)]
    import_libraries()
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        copy = copied(given.tree, Path(temporary))
        for number, fault in enumerate(wanted):
            path = copy / "sae_query_steer" / fault["file"]
            source = path.read_text()
            if source.count(fault["search"]) != 1:
                print(f"STALE     {fault['id']}: the text to replace is not there once")
                missed += 1
                continue
            tests = [f"tests/test_{name}.py" for name in fault["tests"].split()]
            put(path, source.replace(fault["search"], fault["replace"]), number)
            outcome, seconds, last = tested(copy, tests)
            put(path, source, len(wanted) + number)
            missed += outcome == "survived"
            word = "MISSED" if outcome == "survived" else "detected"
            print(f"{word:9} {fault['id']}: {seconds:.0f} s, {last}", flush=True)
    print(f"{len(wanted) - missed} of {len(wanted)} detected")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
