"""Draw mutants with a fixed seed and count those that the tests detect.

    python mutants.py draw old TREE OUT.jsonl [--n 200] [--seed 0]
    python mutants.py run TREE DRAWN.jsonl LOG.jsonl [--first 60]
    python mutants.py report LOG.jsonl

`draw` needs cosmic-ray 8.7, whose operators make the mutants: first a place in the code is drawn
(file, position, kind of operator), then one of its replacements. Annotations are left out, for
tests cannot depend on them. `run` goes on where its log ends. It imports the libraries once and
forks for every mutant, so that a mutant costs only its tests.
"""

import argparse
import ast
import contextlib
import difflib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent / "mutant_tests.json").read_text()
)
"""By side: patterns of files to the names of their tests, the quickest first."""

CPU_SECONDS = 240
"""A mutant whose tests take longer counts as detected."""


def tests_of(side: str, file: str) -> list[str] | None:
    """Return the tests of a file, or None if the file is not mutated."""
    for pattern, names in TESTS[side].items():
        if re.fullmatch(pattern, file):
            return [f"tests/test_{name}.py" for name in names.split()]
    return None


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return where annotations begin and end, as (line, column)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            part = getattr(node, name, None)
            if isinstance(part, ast.expr):
                end = (part.end_lineno or 0, part.end_col_offset or 0)
                found.append(((part.lineno, part.col_offset), end))
    return found


def draw(side: str, tree: Path, out: Path, n: int, seed: int) -> None:
    """Write n mutants."""
    from cosmic_ray.ast import get_ast, get_ast_from_path  # noqa: F401
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    provider, places = OperatorProvider(), {}
    names = [name for name in provider if not name.startswith("Variable")]
    sources = {}
    for path in sorted((tree / "sae_query_steer").rglob("*.py")):
        file = path.relative_to(tree / "sae_query_steer").as_posix()
        if tests_of(side, file) is None:
            continue
        source = sources[file] = path.read_text()
        spans, root = annotations(source), get_ast(source)
        for name in names:
            occurrence = 0
            for node in _nodes(root):
                for start, _ in provider[name]().mutation_positions(node):
                    inside = any(begin <= tuple(start) < end for begin, end in spans)
                    if not inside:
                        kind = re.sub(r"_[A-Z].*", "", name)
                        key = (file, tuple(start), kind)
                        places.setdefault(key, []).append((name, occurrence))
                    occurrence += 1
    random_ = random.Random(seed)
    drawn = random_.sample(sorted(places), len(places))
    lines = []
    for file, start, _ in drawn:
        name, occurrence = random_.choice(places[(file, start, _)])
        changed = mutate_code(sources[file], provider[name](), occurrence)
        try:
            ast.parse(changed or "(")
        except SyntaxError:
            continue
        diff = difflib.unified_diff(
            sources[file].splitlines(), changed.splitlines(), n=0, lineterm=""
        )
        found = {"side": side, "file": file, "line": start[0], "operator": name}
        lines.append(json.dumps({**found, "occurrence": occurrence, "diff": list(diff)[3:]}))
        if len(lines) == n:
            break
    out.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} of {len(places)} places in {len(sources)} files")


def _nodes(root: Any) -> Iterator[Any]:
    yield root
    for child in getattr(root, "children", ()):
        yield from _nodes(child)


def applied(source: str, mutant: dict[str, Any]) -> str:
    """Return the source with a mutant's change at its line."""
    lines = source.splitlines()
    gone = [line[1:] for line in mutant["diff"] if line.startswith("-")]
    come = [line[1:] for line in mutant["diff"] if line.startswith("+")]
    places = [i for i in range(len(lines)) if lines[i : i + len(gone)] == gone]
    place = min(places, key=lambda i: abs(i + 1 - mutant["line"]))
    return "\n".join([*lines[:place], *come, *lines[place + len(gone) :]]) + "\n"


def run(tree: Path, drawn: Path, log: Path, first: int | None) -> None:
    """Run the tests of every mutant that is not in the log, and append the outcome."""
    import_libraries()
    mutants = [json.loads(line) for line in drawn.read_text().splitlines()][:first]
    known = set()
    if log.exists():
        for line in log.read_text().splitlines():
            known.add(_key(json.loads(line)))
    with tempfile.TemporaryDirectory() as temporary:
        copy = copied(tree, Path(temporary))
        checked: set[str] = set()
        for number, mutant in enumerate(mutants):
            if _key(mutant) in known:
                continue
            tests = tests_of(mutant["side"], mutant["file"]) or []
            if " ".join(tests) not in checked:
                outcome, seconds, last = tested(copy, tests)
                print(f"unchanged: {outcome}, {seconds:.0f} s, {tests}", flush=True)
                if outcome != "survived":
                    sys.exit(f"the tests fail without a mutant: {last}")
                checked.add(" ".join(tests))
            path = copy / "sae_query_steer" / mutant["file"]
            source = path.read_text()
            put(path, applied(source, mutant), 2 * number + 1)
            outcome, seconds, last = tested(copy, tests)
            put(path, source, 2 * number + 2)
            result = {**mutant, "outcome": outcome, "seconds": round(seconds, 1), "by": last}
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{number} {outcome} {seconds:.0f} s {mutant['file']}:{mutant['line']}", flush=True
            )


def copied(tree: Path, temporary: Path) -> Path:
    """Copy a tree, without what its tests do not need, and return the folder."""
    copy = temporary / "tree"
    for name in ("sae_query_steer", "tests", "benchmarks", "experiments"):
        if (tree / name).is_dir():
            shutil.copytree(tree / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(tree / name, copy / name)
    shared = Path(__file__).parents[3] / "shared"
    if shared.exists():
        (temporary / "shared").symlink_to(shared.resolve())
    return copy


def put(path: Path, source: str, number: int) -> None:
    """Write a file with a modification time of its own, so that no other compiled file fits."""
    path.write_text(source)
    os.utime(path, (number + 1, number + 1))


def _key(mutant: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(mutant[name] for name in ("file", "line", "operator", "occurrence"))


def import_libraries() -> None:
    """Import what every test needs, so that forks do not."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import beartype  # noqa: F401
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import jaxtyping  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401

    torch.set_num_threads(1)
    import sae_lens  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import transformer_lens.model_bridge  # noqa: F401
    import transformers
    import transformers.models.llama  # noqa: F401

    _ = transformers.AutoModelForCausalLM


def tested(copy: Path, tests: list[str]) -> tuple[str, float, str]:
    """Run tests in a fork; return the outcome, CPU seconds and the test that failed."""
    output = copy.parent / "output.txt"
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        code = 3
        with output.open("w") as file:
            try:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                os.chdir(copy)
                sys.path.insert(0, str(copy))
                import pytest

                # Plugins that the fork has inherited can't be rewritten; it does not matter here.
                quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
                # All tests, under runtime type checks: what CI does in its two runs.
                checks = ["-m", "", "--jaxtyping-packages=sae_query_steer,beartype.beartype"]
                options = ["-x", "-q", "-p", "no:cacheprovider", *quiet, *checks]
                code = int(pytest.main([*options, *tests]))
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    deadline = time.monotonic() + 20 * CPU_SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime
    text = output.read_text(errors="replace")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    last = failed[-1] if failed else text[-200:]
    if os.WIFSIGNALED(status):
        return "timeout", seconds, last[:200]
    code = os.WEXITSTATUS(status)
    return ("survived" if code == 0 else "killed"), seconds, last[:200]


def report(log: Path) -> None:
    """Print the share detected and list the survivors."""
    results = [json.loads(line) for line in log.read_text().splitlines()]
    by_area: dict[str, Counter[str]] = {}
    for result in results:
        area = result["file"].split("/")[0]
        by_area.setdefault(area, Counter())[result["outcome"]] += 1
    for area, counts in sorted(by_area.items()):
        print(f"{area:20} {dict(counts)}")
    survived = [r for r in results if r["outcome"] == "survived"]
    print(f"detected {len(results) - len(survived)} of {len(results)}")
    for result in survived:
        change = " ".join(line for line in result["diff"] if not line.startswith("@@"))
        print(f"{result['file']}:{result['line']}  {change}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("draw")
    one.add_argument("side", choices=list(TESTS))
    one.add_argument("tree", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--n", type=int, default=200)
    one.add_argument("--seed", type=int, default=0)
    two = commands.add_parser("run")
    two.add_argument("tree", type=Path)
    two.add_argument("drawn", type=Path)
    two.add_argument("log", type=Path)
    two.add_argument("--first", type=int)
    three = commands.add_parser("report")
    three.add_argument("log", type=Path)
    given = vars(parser.parse_args())
    {"draw": draw, "run": run, "report": report}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
