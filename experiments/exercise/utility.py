"""What steers do to tasks that have nothing to do with their targets, by lm-evaluation-harness.

    python -m experiments.exercise.utility --out runs/exercise --text FILE

Two tasks are made from a text, and kept with the runs: "next_sentence", which of four sentences
follows a passage, and "passages", the perplexity of passages by word. Each steer of
`experiments.exercise.mechanism`, or those that `--steers` names, is evaluated towards the first and
the last class. Rows go to utility.jsonl; a stopped run continues with the next.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from experiments.exercise.mechanism import STEERS, steers
from experiments.exercise.task import Task, task_parser
from sae_query_steer.integrations import SteeredLM

evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its parameters from pyright
TASKS = {"next_sentence": "acc,none", "passages": "word_perplexity,none"}


def write_tasks(folder: Path, text: str, n: int, seed: int = 0) -> None:
    """Write the two tasks of n passages each, as the harness reads them."""
    paragraphs = [re.split(r"(?<=[.!?]) ", one) for one in text.split("\n") if len(one) > 400]
    paragraphs = [one for one in paragraphs if len(one) >= 4]
    draw = random.Random(seed)
    chosen = draw.sample(paragraphs, n)
    docs = []
    for one in chosen:
        others = draw.sample([p[3] for p in paragraphs if p is not one], 3)
        gold = draw.randrange(4)
        choices = [*others[:gold], one[3], *others[gold:]]
        docs.append({"context": " ".join(one[:3]), "choices": choices, "gold": gold})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "docs.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
    }
    own = {
        "next_sentence": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "target_delimiter": " ",
            "metric_list": [{"metric": "acc"}],
        },
        "passages": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{context}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, settings in own.items():
        file = folder / f"{name}.yaml"  # JSON is YAML
        file.write_text(json.dumps({"task": name, **common, **settings}), encoding="utf-8")


def run(task: Task, text: Path, n: int, chosen: Sequence[str] | None = None) -> None:
    """Measure the steers, or some of them, that are not measured yet."""
    folder, file = task.out / "utility", task.out / "utility.jsonl"
    write_tasks(folder, text.read_text(encoding="utf-8"), n)
    manager = TaskManager(include_path=folder, include_defaults=False)
    made: dict[str, Callable[[], Any]] = {"unsteered": lambda: None}
    learned = steers(task)
    if missing := set(chosen or ()) - learned.keys():
        raise ValueError(f"targets must be learned first, by the study rivals: {sorted(missing)}")
    for name, make in learned.items():
        if chosen is not None and name not in chosen:
            continue
        for target in (task.classes[0], task.classes[-1]):
            made[f"{name}, {target}"] = lambda make=make, target=target: make(target)
    lines = file.read_text().splitlines() if file.exists() else []
    done = {json.loads(line)["steer"] for line in lines}
    for name in [name for name in made if name not in done]:
        model = SteeredLM(task.model, made[name](), batch_size=16)
        found = evaluate(model=model, tasks=[*TASKS], task_manager=manager)
        row: dict[str, Any] = {"steer": name, "n": n, **task.told}
        for one, metric in TASKS.items():
            row[one] = found["results"][one][metric]
        row["acc_stderr"] = found["results"]["next_sentence"]["acc_stderr,none"]
        with file.open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = task_parser(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a textbook, paragraphs by line")
    parser.add_argument("--n", type=int, default=120, help="passages")
    parser.add_argument("--steers", nargs="+", choices=STEERS, help="default: all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    run(Task(given), given.text, given.n, given.steers)
