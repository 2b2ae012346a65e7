"""Does a look at the sites foretell where a steer works, better than separability or the layer?

    python -m experiments.prediction.run --tutors DIR... [--gridworlds DIR...] --out DIR

For every layer, with all heads and with each head alone, it measures what `interchange_effect`,
`separability` and the labels' share of the query's variance say beforehand, then steers held-out
prompts that request another class (squared distance over an SAE's latents, one step, at fixed
strengths, so that nothing is chosen after the fact) and counts the texts that reach the target. It
prints rank correlations with the change of that rate over all sites, and what `site_verdicts` had
said, and writes the table and a figure. A model whose JSON is in --out is not measured again.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import sae_query_steer as sqs
from experiments import gridworld as grid
from experiments.gridworld.cases import other_than
from experiments.gridworld.training import MAX_NEW_TOKENS
from experiments.prediction.report import STRENGTHS, report
from sae_query_steer.bloom import BloomLevel
from sae_query_steer.compare.judges import RuleJudge
from sae_query_steer.compare.methods import Descent, SteeringCase, descent_methods, prompt_methods
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.diagnostics.interchange import achieved_effect
from sae_query_steer.diagnostics.verdicts import site_verdicts
from sae_query_steer.sites import ALL_HEADS
from sae_query_steer.storage.folders import lock_for
from sae_query_steer.storage.records import read_json, write_json
from sae_query_steer.toy import TutorCorpus, restated_level, verb_level


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What a model is measured on."""

    training: Sequence[sqs.LabelledExample]
    """For SAEs and centroids."""

    looked_at: Sequence[sqs.LabelledExample]
    """For what is known beforehand."""

    counterparts: Sequence[sqs.LabelledExample]
    cases: Sequence[SteeringCase]
    judge: RuleJudge
    max_new_tokens: int


def tutor_task(folder: Path, n: int) -> Task:
    """Return the task of a tutor; its texts begin with what a note says."""
    notes = bool(read_json(folder / "tutor.json")["settings"]["notes"])
    levels, known = list(BloomLevel), {}

    def both(corpus: TutorCorpus, i: int) -> tuple[Any, Any, str, str]:
        source, target = levels[i % 6], levels[other_than(i % 6, i, 6)]
        prompt = corpus.prompt(source)
        known[prompt.text] = prompt
        return prompt, prompt.with_request(target, *corpus.request(target)), source, target

    def rule(prompt: str, text: str) -> str | None:
        return restated_level(text, known[prompt]) if notes else verb_level(text)

    return task_of(
        TutorCorpus("train", seed=11, notes=notes).examples(240),
        _all(both, TutorCorpus("validation", seed=12, notes=notes), 120),
        _all(both, TutorCorpus("test", seed=13, notes=notes), n),
        RuleJudge(rule, levels),
        10,
    )


def gridworld_task(folder: Path, n: int) -> Task:
    """Return the task of a gridworld model; its texts are walks."""
    del folder
    aims, known = list(grid.Aim), {}

    def both(corpus: Any, i: int) -> tuple[Any, Any, str, str]:
        source, target = aims[i % len(aims)], aims[other_than(i % len(aims), i, len(aims))]
        prompt = corpus.prompt(source)
        known[prompt.text] = prompt
        asking = prompt.with_request(None).with_request(target, corpus.request(target))
        return prompt, asking, source, target

    return task_of(
        grid.GridCorpus("train", seed=11).examples(240),
        _all(both, grid.GridCorpus("validation", seed=12), 120),
        _all(both, grid.GridCorpus("test", seed=13), n),
        RuleJudge(lambda prompt, text: grid.walk_class(known[prompt], text), aims),
        MAX_NEW_TOKENS,
    )


def _all(both: Any, corpus: Any, n: int) -> list[tuple[Any, Any, str, str]]:
    return [both(corpus, i) for i in range(n)]


def task_of(training: Any, looked_at: Any, test: Any, judge: RuleJudge, tokens: int) -> Task:
    """Return a task from prompts, the same prompts asking for another class, and both classes."""
    return Task(
        training=training,
        looked_at=[sqs.LabelledExample(prompt=p.text, label=s) for p, _, s, _ in looked_at],
        counterparts=[sqs.LabelledExample(prompt=q.text, label=t) for _, q, _, t in looked_at],
        cases=[
            SteeringCase(prompt=p.text, requesting=q.text, source=s, target=t)
            for p, q, s, t in test
        ],
        judge=judge,
        max_new_tokens=tokens,
    )


def measured(model: Any, task: Task, pairs: int) -> list[dict[str, Any]]:
    """Return what is known of each site beforehand, and what a steer does there."""
    sites = sqs.query_sites(model)
    saes = sqs.train_query_saes(
        model,
        [e.prompt + e.response for e in task.training],
        sites,
        sqs.TrainingConfig(
            sae=sqs.sae.TopK(d_sae_per_head=64, k=8),
            training_tokens=60_000,
        ),
    )
    training, looked_at, counterparts = (
        sqs.tokenize_examples(model, some)
        for some in (task.training, task.looked_at, task.counterparts)
    )
    centroids = sqs.CentroidTargetBuilder(model, saes).fit(training)
    queries = sqs.CentroidTargetBuilder(model, sqs.sae.identity_encoders(sites)).fit(training)
    steerer = sqs.LatentGradientSteerer(
        saes,
        centroids,
        target=centroids.classes[0],
        objective=sqs.SquaredDistance(),
        n_steps=1,
        step_size=1.0,
    )
    given: dict[str, Any] = {"n_pairs": pairs}
    # Paired prompts hold the content still, so a third of the pairs tells as much.
    paired = {"n_pairs": math.ceil(pairs / 3), "counterparts": counterparts}
    key = ["layer", "head"]
    table = sqs.diagnostics.interchange_effect(model, sites, looked_at, **given)
    table = site_verdicts(table.merge(sqs.diagnostics.separability(model, saes, looked_at), on=key))
    for name, found in (
        ("paired", sqs.diagnostics.interchange_effect(model, sites, looked_at, **paired)),
        ("achieved", achieved_effect(model, steerer, looked_at, **paired)),
    ):
        columns = ["class_effect", "class_effect_se", "class_share", "moved", "moved_control"]
        renamed = pd.DataFrame(found[[*key, *columns]]).rename(
            columns={c: f"{name}_{c}" for c in columns}
        )
        table = table.merge(renamed, on=key)
    scorer = TextScorer(
        model,
        {"redirect": task.cases},
        task.judge,
        max_new_tokens=task.max_new_tokens,
        split="test",
    )
    unsteered, instruction, *_ = prompt_methods([], shots=())
    bare, asked = (scorer.score(m, 0.0, ["redirect"])["redirect"] for m in (unsteered, instruction))
    descent = Descent(
        name="squared distance", objective=sqs.SquaredDistance(), n_steps=1, step_sizes=STRENGTHS
    )
    rows = []
    for site in table.to_dict("records"):
        row: dict[str, Any] = {str(name): value for name, value in site.items()}
        layer, head = int(row["layer"]), row["head"]
        heads = None if head == ALL_HEADS else [int(head)]
        method = descent_methods(
            "SAE descent", saes, {"main": centroids}, [descent], layers=[[layer]], heads=[heads]
        )[0]
        row["head"] = str(head)
        row["moved_beyond"] = row["moved"] - row["moved_control"]
        row["label_share"] = queries.class_share_of_variance(
            sites[layer].hook_name, head=None if heads is None else heads[0]
        )
        row |= {"unsteered": bare.target_rate, "instruction": asked.target_rate}
        for strength in STRENGTHS:
            outcome = scorer.score(method, strength, ["redirect"])["redirect"]
            row[f"change_{strength:g}"] = outcome.target_rate - bare.target_rate
            row[f"ratio_{strength:g}"] = outcome.perplexity_ratio
            row[f"relative_change_{strength:g}"] = outcome.delta_q_ratio
        rows.append(row)
    return rows


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tutors", type=Path, nargs="*", default=[], help="folders of tutors")
    parser.add_argument(
        "--gridworlds", type=Path, nargs="*", default=[], help="of gridworld models"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and figure")
    parser.add_argument("--cases", type=int, default=48, help="prompts steered at each site")
    parser.add_argument("--pairs", type=int, default=96, help="pairs of the interchange effect")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lock_for(args, args.out)
    args.out.mkdir(exist_ok=True)
    parts = []
    jobs = [(f, tutor_task) for f in args.tutors] + [(f, gridworld_task) for f in args.gridworlds]
    for folder, task in jobs:
        file = args.out / f"{folder.name}.json"
        if not file.exists():
            model = sqs.load_model(str(folder), device="cpu")
            rows = measured(model, task(folder, args.cases), args.pairs)
            settings = {"cases": args.cases, "pairs": args.pairs}
            # By way of pandas: numpy's numbers, and missing ones, as JSON knows them.
            plain = json.loads(pd.DataFrame(rows).to_json(orient="records") or "[]")
            write_json(file, {"settings": settings, "rows": plain})
        table = pd.DataFrame(read_json(file)["rows"]).replace({None: math.nan})
        parts.append(table.assign(model=folder.name))
    report(pd.concat(parts, ignore_index=True), args.out)


if __name__ == "__main__":
    main()
