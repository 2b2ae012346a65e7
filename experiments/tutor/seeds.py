"""The demo on several tutors, and on the null: does the result hold for other seeds?

    python -m experiments.tutor.seeds --out DIR [--seeds 0 1 2]

A tutor is trained for each seed, and the null for the first (a tutor that already lies in --out is
not trained again). Each demo's report goes to --out; a table of success for every row and tutor is
printed as Markdown.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

import sae_query_steer as sqs
from experiments.tutor.training import TutorTraining, train_tutor
from sae_query_steer.compare import run_demo, write_comparison
from sae_query_steer.compare.report import row_names
from sae_query_steer.storage.records import read_json


def main() -> None:
    """Train, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for tutors and reports")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="tutors to train")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    settings = {f"seed {seed}": TutorTraining(seed=seed) for seed in args.seeds}
    settings["null"] = TutorTraining(seed=args.seeds[0], notes=False)
    tutors = {name: args.out / f"tutor-{name.replace(' ', '-')}" for name in settings}
    for name, folder in tutors.items():
        if not folder.exists():
            train_tutor(folder, settings[name])
    rows = {}
    for name, folder in tutors.items():
        card = read_json(folder / "tutor.json")
        report = args.out / f"demo-{name.replace(' ', '-')}"
        if not report.exists():
            notes = bool(card["settings"]["notes"])
            model = sqs.load_model(str(folder), device="cpu")
            write_comparison(run_demo(model, notes=notes), report)
        table = pd.read_csv(report / "table.csv", keep_default_na=False, na_values=[""])
        table["layers"] = table["layers"].fillna("").astype(str)
        results = read_json(report / "comparison.json")
        print(f"\n{name}: obeyed {card['obeyed']:.3f}, right note {card['right_note']}")
        print(f"layers {results['settings']['layers']}, judge {results['judge']}")
        print(pd.read_csv(report / "sites.csv").round(3).to_string(index=False))
        for method, row in zip(row_names(table, table), table.to_dict("records"), strict=True):
            where = f"{row['success']:.2f} [{row['success_low']:.2f}, {row['success_high']:.2f}]"
            rows.setdefault((row["task"], method), {})[name] = (
                f"{where} {row['perplexity_ratio']:.2f}"
            )
    print("\nsuccess [95 %] and perplexity ratio\n")
    print("| task | method | " + " | ".join(tutors) + " |\n|" + "---|" * (len(tutors) + 2))
    for (task, method), found in rows.items():
        print(f"| {task} | {method} | " + " | ".join(found.get(t, "") for t in tutors) + " |")


if __name__ == "__main__":
    main()
