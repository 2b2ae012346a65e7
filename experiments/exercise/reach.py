"""How far a learned constant change of queries moves SmolLM2 at each layer alone, beside a control.

    python -m experiments.exercise.reach --out runs/exercise

Examples, topics and held-out topics are those of the studies. Layers are measured six at a time,
spread over the depth, and written to reach.jsonl; a stopped run goes on with the next six.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

import sae_query_steer as sqs
from sae_query_steer.compare.learned import SCOPE


def run(args: argparse.Namespace) -> None:
    """Measure the layers that are not in the file yet."""
    model = sqs.load_model(args.model)
    kept = json.loads((Path(args.out) / "train0.json").read_text())
    opened, requested = (
        [sqs.LabelledExample(prompt=p, response=r, label=label or k) for p, r, k in some]
        for some, label in zip(kept, ("open", None), strict=True)
    )
    examples, counterparts = (
        replace(sqs.tokenize_examples(model, some).with_responses_of(args.n_answer), span=SCOPE)
        for some in (opened, requested)
    )
    held_out = range(round(0.75 * len(examples)), len(examples))
    file = Path(args.out) / "reach.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    done = {json.loads(line)["layer"] for line in lines}
    missing = [site for site in sqs.query_sites(model) if site.layer not in done]
    n_parts = -(-len(missing) // 6)
    for sites in (missing[part::n_parts] for part in range(n_parts)):
        table = sqs.diagnostics.reach(
            model,
            sites,
            examples,
            counterparts=counterparts,
            budget=args.budget,
            n_updates=args.n_updates,
            control=True,
            held_out=held_out,
        )
        with file.open("a") as rows:
            rows.write(table.to_json(orient="records", lines=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--out", required=True, help="folder of experiments.exercise.run")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--n-answer", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--n-updates", type=int, default=12)
    torch.set_num_threads(1)
    run(parser.parse_args())
