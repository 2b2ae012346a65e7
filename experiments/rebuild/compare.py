"""Compare the numbers of the old code with those of the working tree, setting by setting.

    python experiments/rebuild/compare.py --out DIR [--only PATTERN] [--commit cac4d35]

Old and new code run in two processes with one thread each. The old side's results are kept in DIR.
Equal means bitwise equal; within 1e-6 (absolute, or relative above 1) is accepted where
`exceptions.md` lists the setting with the rule that replaces the old one, as are differences.
Exits with 1 if a setting differs, fails, or is missing although `settings.json` records it.
"""

import argparse
import fnmatch
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from settings import every_setting

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOLERANCE = 1e-6


def file_of(name: str) -> str:
    """Return the name of a setting's files, without the ending."""
    return f"{re.sub(r'[^0-9A-Za-z]+', '-', name).strip('-')[:80]}-{zlib.crc32(name.encode()):08x}"


def run_side(tree: Path, args: list[str]) -> None:
    """Run a script of this folder with the package of a tree."""
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["TQDM_DISABLE"] = "1"
    subprocess.run([sys.executable, *args], env=env, cwd=HERE, check=True)


def exceptions() -> list[tuple[str, str]]:
    """Return patterns of settings and the rule that replaces the old one, from exceptions.md."""
    found = []
    for line in (HERE / "exceptions.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) >= 4:
            found += [(pattern, cells[2]) for pattern in re.findall(r"`([^`]+)`", cells[0])]
    return found


def ran_well(report: Path) -> bool:
    """Return whether the results of a setting are there."""
    return report.exists() and not json.loads(report.read_text())["error"]


def difference(old: Any, new: Any) -> float:
    """Return 0 for equal values, else the largest difference; infinite where no number fits."""
    if isinstance(old, np.ndarray):
        if new is None or old.shape != new.shape or old.dtype != new.dtype:
            return math.inf
        if old.tobytes() == new.tobytes():
            return 0.0
        if old.dtype.kind != "f":
            return math.inf
        with np.errstate(invalid="ignore"):
            apart = np.abs(old - new) / np.maximum(1, np.abs(old))
        apart[(old == new) | (np.isnan(old) & np.isnan(new))] = 0
        return float(np.nan_to_num(apart, nan=math.inf).max())
    if isinstance(old, dict):
        if not isinstance(new, dict) or set(old) - set(new):
            return math.inf  # columns may be added, not lost
        return max((difference(old[key], new[key]) for key in old), default=0.0)
    if isinstance(old, list):
        if not isinstance(new, list) or len(old) != len(new):
            return math.inf
        return max(map(difference, old, new), default=0.0)
    if isinstance(old, float) and isinstance(new, (int, float)) and not isinstance(new, bool):
        if old == new or (math.isnan(old) and math.isnan(new)):
            return 0.0
        apart = abs(old - new) / max(1.0, abs(old))
        return math.inf if math.isnan(apart) else apart
    return 0.0 if old == new else math.inf


def verdict(old: Path, new: Path, name: str, listed: list[tuple[str, str]]) -> tuple[str, str]:
    """Return "bitwise", "close", "exception", "DIFFERENT" or "FAILED", and a note."""
    stem = file_of(name)
    reports = [json.loads((side / f"{stem}.json").read_text()) for side in (old, new)]
    errors = [report["error"] for report in reports]
    if any(errors):
        return "FAILED", " / ".join(
            error.splitlines()[0][:200] if error else "ok" for error in errors
        )
    tensors = [load_file(side / f"{stem}.safetensors") for side in (old, new)]
    parts = {key: difference(tensors[0][key], tensors[1].get(key)) for key in tensors[0]}
    for key, value in reports[0]["values"].items():
        parts[key] = difference(value, reports[1]["values"].get(key))
    if not parts:
        return "FAILED", "nothing was compared"
    worst = max(parts, key=lambda key: parts[key])
    if parts[worst] == 0:
        return "bitwise", ""
    note = f"{worst}: {parts[worst]:.1e}"
    rules = [rule for pattern, rule in listed if fnmatch.fnmatchcase(name, pattern)]
    if parts[worst] <= TOLERANCE:
        return "close", note
    return ("exception", f"{note}; {rules[0]}") if rules else ("DIFFERENT", note)


def main() -> int:
    """Run both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="inputs and results")
    parser.add_argument("--only", default="*", help="settings whose name matches this pattern")
    parser.add_argument("--commit", default="cac4d35", help="the old code")
    parser.add_argument("--new", type=Path, default=ROOT, help="tree of the new code")
    parser.add_argument("--stories", type=Path, default=ROOT.parent / "shared/data/stories260K")
    parser.add_argument("--record", action="store_true", help="write settings.json")
    given = parser.parse_args()
    out = given.out.resolve()
    old, new, inputs = out / "old", out / "new", out / "inputs"
    for folder in (old, new, inputs):
        folder.mkdir(parents=True, exist_ok=True)
    names = [setting.name for setting in every_setting()]
    assert len(names) == len(set(names))
    record = HERE / "settings.json"
    missing = []
    if record.exists() and not given.record:
        missing = sorted(set(json.loads(record.read_text())) - set(names))
    wanted = [name for name in names if fnmatch.fnmatchcase(name, given.only)]
    todo = [name for name in wanted if not ran_well(old / f"{file_of(name)}.json")]
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "old"
        if todo or not (inputs / "models.json").exists():
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "-q", "--detach", str(tree), given.commit], check=True)
            try:
                if not (inputs / "models.json").exists():
                    tutor = out / "tutor"
                    if not tutor.exists():
                        source = tree / "sae_query_steer/tasks/tutor/bloom_tutor"
                        subprocess.run(["cp", "-r", str(source), str(tutor)], check=True)
                    script = ["inputs.py", str(inputs), str(tutor), str(given.stories.resolve())]
                    run_side(tree, script)
                if todo:
                    run_settings("old", tree, inputs, old, todo)
            finally:
                subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    for name in wanted:
        (new / f"{file_of(name)}.json").unlink(missing_ok=True)
    run_settings("new", given.new.resolve(), inputs, new, wanted)
    counts: Counter[str] = Counter()
    for name in wanted:
        kind, note = verdict(old, new, name, exceptions())
        counts[kind] += 1
        print(f"{kind:10} {name}" + (f"  [{note}]" if note else ""))
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())), "of", len(wanted))
    for name in missing:
        print(f"MISSING    {name}")
    if given.record:
        record.write_text(json.dumps(names, indent=1, ensure_ascii=False) + "\n")
    return int(bool(missing) or counts["DIFFERENT"] > 0 or counts["FAILED"] > 0)


def run_settings(side: str, tree: Path, inputs: Path, out: Path, names: list[str]) -> None:
    """Run settings with the code of a tree; results lie in files of `out`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as wanted:
        json.dump(names, wanted)
        wanted.flush()
        run_side(tree, ["runner.py", side, str(inputs), str(out), wanted.name])


if __name__ == "__main__":
    sys.exit(main())
