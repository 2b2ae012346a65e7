"""Which level the texts of a method were judged to be of, by the level that it aimed at.

    python -m experiments.exercise.confusion "learned moves, dense" --out runs/exercise

Reads the texts of the study `rivals` and judges them again: nothing is generated.
"""

import json

import pandas as pd

from experiments.exercise.task import Task, task_parser


def confusion(task: Task, method: str, t: str) -> pd.DataFrame:
    """Return the share of the texts of each target (rows) that were judged to be of each class."""
    rows = map(json.loads, (task.out / "results.jsonl").read_text().splitlines())
    of = {"study": "rivals", "method": method}
    (row,) = [row for row in rows if of.items() <= row["setting"].items()]
    cases = task.cases(t, "test", len(row[t]["texts"]))
    judged = task.judge([case.prompt for case in cases], row[t]["texts"])
    found = pd.crosstab(
        pd.Series([str(case.target) for case in cases], name="target"),
        pd.Series([str(guess) for guess in judged], name="judged"),
        normalize="index",
    )
    names = list(map(str, task.classes))
    return found.reindex(index=names, columns=names, fill_value=0.0)


if __name__ == "__main__":
    parser = task_parser(__doc__)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--task", default="open, trained wording")
    given = parser.parse_args()
    the_task = Task(given)
    for name in given.methods:
        print(f"\n{name}, {given.task}")
        print(confusion(the_task, name, given.task).to_string(float_format="{:.2f}".format))
