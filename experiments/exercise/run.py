"""What the SAE contributes to learned targets on a real instruct model, with rivals and controls.

    python -m experiments.exercise.run methods sparsity layers --out runs/exercise
    python -m experiments.exercise.run methods --out runs/exercise --worker 1/2

Targets of the six levels are learned from the model's own answers of the split "train"; texts are
scored on test topics. SAEs, targets and examples are made once and kept in the folder. A row of
results.jsonl is written as soon as it is measured; a stopped run goes on with the next. Several
workers share a folder: each takes its part of the rows.
"""

import json
import time
from collections.abc import Sequence

import torch

import sae_query_steer as sqs
from experiments.exercise.studies import STUDIES
from experiments.exercise.task import Forms, Openings, Task, task_parser
from sae_query_steer.compare.methods import Method


def run(task: Task, studies: Sequence[str], worker: str, only: Sequence[str] = ("",)) -> None:
    """Measure the jobs of some studies that are this worker's and not measured yet.

    Args:
        task: what is measured.
        studies: names.
        worker: which part of the jobs, such as "1/2".
        only: texts of which one must be in the setting of a job.
    """
    file = task.out / "results.jsonl"
    mine, of = map(int, worker.split("/"))
    jobs = [job for name in studies for job in STUDIES[name](task)]
    jobs = [job for job in jobs if any(text in json.dumps(job[0]) for text in only)]
    if task.args.tasks:
        jobs = [(setting | {"tasks": task.args.tasks}, make, k) for setting, make, k in jobs]
    jobs = [(setting | task.told, make, k) for setting, make, k in jobs]
    for setting, make, strength in jobs[mine::of]:
        lines = file.read_text().splitlines() if file.exists() else []
        if any(json.loads(line)["setting"] == setting for line in lines):
            continue
        begun = time.monotonic()
        made = make()
        learned_in = time.monotonic() - begun
        tasks = setting.get("tasks", task.tasks)
        if isinstance(made, Method):
            chosen = {t: (made, strength, []) for t in tasks}
        else:
            chosen = task.chosen(made, tasks)
        row = {}
        for t, (method, strength, curve) in chosen.items():
            split, n = setting.get("split", "test"), setting["n"]
            row[t] = task.scored(method, strength, split, n, t, tasks)
            if curve:
                told = {"strength": strength, "scope": method.scope, "layers": method.layers}
                row[t] |= told | {"validation": curve}
        method, strength, _ = chosen[tasks[0]]
        steerer = (
            None
            if method.steerer is None
            else method.steerer([task.cases(tasks[0], "test", 6)[0]], strength)
        )
        targets = getattr(steerer, "targets", None)
        if isinstance(targets, sqs.LearnedTargets):
            active = [(mean != 0).sum(-1).float() for mean in targets.means.values()]
            row |= {
                "kl_removed": sum(targets.share_removed.values()) / len(task.classes),
                "latents_a_head": float(torch.cat(active, dim=1).mean()),
                "latents_in_all": float(torch.cat(active, dim=1).sum(1).mean()),
            }
        row |= {"made_in": learned_in, "seconds": time.monotonic() - begun}
        with file.open("a") as rows:
            rows.write(json.dumps({"setting": setting, **row}) + "\n")
        shown = {
            t: [round(row[t][k], 3) for k in ("success", "rule", "perplexity_ratio", "change")]
            for t in tasks
        }
        print(
            json.dumps(setting),
            shown,
            {k: round(v, 3) for k, v in row.items() if k not in tasks},
            flush=True,
        )


if __name__ == "__main__":
    parser = task_parser(__doc__)
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    parser.add_argument("--task", choices=("exercise", "forms", "openings"), default="exercise")
    parser.add_argument("--worker", default="0/1", help="which part of the rows, such as 1/2")
    parser.add_argument("--only", nargs="+", default=[""], help="texts, one of them in the setting")
    parser.add_argument("--tasks", nargs="+", help="kinds of prompts; default: those of the study")
    parser.add_argument("--n-main", type=int, default=720, help="cases of each task, main table")
    parser.add_argument("--n-study", type=int, default=120, help="cases of each task, studies")
    parser.add_argument("--n-rivals", type=int, default=300, help="cases of each task, rivals")
    parser.add_argument("--n-validation", type=int, default=60, help="cases of each task, rivals")
    parser.add_argument("--n-attention", type=int, default=120, help="cases of each task")
    parser.add_argument("--texts", nargs="*", default=[], help="files of other texts, factors")
    given = parser.parse_args()
    torch.set_num_threads(1)
    the_task = {"exercise": Task, "forms": Forms, "openings": Openings}[given.task](given)
    print(json.dumps({"judge": the_task.judge.held_out}), flush=True)
    run(the_task, given.studies, given.worker, given.only)
