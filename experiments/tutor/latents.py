"""Which latents steer the tutor, what they fire on, where they look, and what is left without them.

    python -m experiments.tutor.latents

The shipped tutor, layer 1, an SAE of 64 latents a head trained as in its demo. Validation prompts
that ask for another level tell, for each of the six targets, which latents the steer moves most;
validation texts, what these latents fire on; and one latent at a time, the attention that it alone
moves to the target's note. Then, on test prompts, the steer with the m most moved latents of each
head held, with m random others held, with random others held that make as much of the change, and
with the top m alone. Prints Markdown; shares have 95 % Wilson intervals.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

import sae_query_steer as sqs
from experiments.tutor.latent_ablation import LatentAblation, Way, latent_ablations
from experiments.tutor.rowwise import rowwise
from sae_query_steer.compare import Method, TextScorer, level_judge
from sae_query_steer.compare.tutor_task import MAX_NEW_TOKENS, TASKS, note_judge, tutor_cases
from sae_query_steer.diagnostics.metrics import wilson_interval
from sae_query_steer.storage.markdown import markdown_table
from sae_query_steer.toy import TutorCorpus

NAME = "blocks.1.attn.hook_q"
MS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "squared distance": {"objective": sqs.SquaredDistance(), "n_steps": 1, "step_size": 1.0},
    "prototype": {"objective": sqs.PrototypeLogLikelihood(), "n_steps": 20, "step_size": 3.0},
}
"""Strengths as in the README's example and tutorial 01."""

LEVELS = tuple(sqs.BloomLevel)
EVERY = {NAME: {head: list(range(64)) for head in range(4)}}
"""All latents of the layer's heads."""


def main() -> None:
    """Train, look and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=120, help="test cases of each task")
    parser.add_argument("--n-moved", type=int, default=60, help="prompts that tell what moves")
    parser.add_argument("--shown", type=int, default=2, help="latents shown of each head and level")
    parser.add_argument("--n-attention", type=int, default=24, help="of them for the attention")
    parser.add_argument(
        "--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="to compare"
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="SAE training tokens")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = sqs.load_tutor()
    examples = TutorCorpus("train", seed=args.seed).examples(300)
    saes = sqs.train_query_saes(
        model,
        [example.prompt + example.response for example in examples],
        sqs.query_sites(model, [1]),
        sqs.TrainingConfig(
            sae=sqs.sae.TopK(d_sae_per_head=64, k=8),
            training_tokens=args.tokens,
            seed=args.seed,
        ),
    )
    targets = sqs.CentroidTargetBuilder(model, saes).fit(sqs.tokenize_examples(model, examples))
    told = TutorCorpus("validation", seed=args.seed)
    texts = told.examples(240)
    tops = sqs.diagnostics.top_tokens(model, saes, [e.prompt + e.response for e in texts], k=10)
    cases = {task: tutor_cases(task, "test", args.n, seed=args.seed + 2) for task in TASKS}
    scorer = TextScorer(
        model,
        cases,
        level_judge(),
        max_new_tokens=MAX_NEW_TOKENS,
        split="test",
        batch_size=120,
        grounding=note_judge([case for some in cases.values() for case in some]),
    )
    prompts = {
        level: [told.prompt(LEVELS[(i + 1 + j % 5) % 6]) for j in range(args.n_moved)]
        for i, level in enumerate(LEVELS)
    }
    few = {level: own[: args.n_attention] for level, own in prompts.items()}
    for name in args.objectives:
        settings = OBJECTIVES[name]
        steerers = {
            level: sqs.LatentGradientSteerer(saes, targets, target=level, **settings)
            for level in LEVELS
        }
        moved = pd.concat(
            [moved_on(model, steerers[level], prompts[level]) for level in LEVELS],
            ignore_index=True,
        )
        print(f"\n## {name}: the latents that move most\n")
        table = shown(model, steerers, moved, few, tops, texts, args.shown)
        print(markdown_table(table, digits=2), flush=True)
        print(f"\n## {name}: attention to the target's note, mean over heads and prompts\n")
        print(markdown_table(attention(model, steerers, moved, few), digits=2), flush=True)
        compare(name, steerers, moved, scorer)


def moved_on(model: Any, steerer: sqs.LatentGradientSteerer, prompts: Sequence[Any]) -> Any:
    """Return what a steerer moves on prompts."""
    with steerer.apply(model, record=True) as trace:
        write_nothing(model, prompts)
    return sqs.diagnostics.moved_latents(steerer, trace)


def write_nothing(model: Any, prompts: Sequence[Any]) -> None:
    """Have a model read prompts."""
    model.generate([p.text for p in prompts], max_new_tokens=1, do_sample=False, verbose=False)


def shown(
    model: Any,
    steerers: Mapping[Any, sqs.LatentGradientSteerer],
    moved: pd.DataFrame,
    prompts: Mapping[Any, Sequence[Any]],
    tops: sqs.diagnostics.TopTokens,
    texts: Sequence[sqs.LabelledExample],
    n: int,
) -> pd.DataFrame:
    """Return the n top latents of each target and head, with what each fires on and looks at."""
    rows = []
    for level, steerer in steerers.items():
        for rank in range(1, n + 1):
            there = (moved["target"] == str(level)) & (moved["rank"] == rank)
            own: list[dict[str, Any]] = moved.loc[there].to_dict("records")  # pyright: ignore
            alone = {NAME: {r["head"]: [r["latent"]] for r in own}}
            given = (model, steerer, level, prompts[level])
            gained = at_note(*given, alone, "change")
            lost = at_note(*given, alone, without=True) - at_note(*given, EVERY)
            for row in own:
                head, latent = row["head"], row["latent"]
                top = tops.table(NAME, head, [latent], context=4)
                levels = Counter(str(texts[r].label) for r in top["row"])
                spots = Counter(top["text"].str.strip())
                rows.append(
                    {
                        "target": str(level),
                        "head": head,
                        "latent": latent,
                        "share": f"{row['share']:.2f}",
                        "projection": f"{row['projection']:.2f}",
                        "before": f"{row['before']:.2f}",
                        "after": f"{row['after']:.2f}",
                        "attention to the note: alone": f"{gained[head]:+.2f}",
                        "... without it": f"{lost[head]:+.2f}",
                        "levels asked for in its top 10": counted(levels),
                        "top tokens": counted(spots),
                        "top text": context(top.iloc[0]),
                    }
                )
    return pd.DataFrame(rows)


def counted(counts: Counter[str], n: int = 3) -> str:
    """Return the most common of some names with their counts."""
    return ", ".join(f"{name} {count}" for name, count in counts.most_common(n))


def context(row: Any) -> str:
    """Return a token in its text, on one line."""
    return f"{row['left']}**{row['text'].strip()}**{row['right']}".replace("\n", " / ")


def at_note(
    model: Any,
    steerer: sqs.LatentGradientSteerer,
    level: str,
    prompts: Sequence[Any],
    latents: Mapping[str, Mapping[int, Sequence[int]]],
    column: str = "attention_after",
    *,
    without: bool = False,
) -> Any:
    """Return by head the attention at the target's note, if only some latents move or all but."""
    texts = [prompt.text for prompt in prompts]
    table = sqs.diagnostics.latent_attention(model, steerer, texts, latents, without=without)
    spans = [note_tokens(model, prompt, level) for prompt in prompts]
    rows, positions = table["row"], table["source_position"]
    there = [p in spans[r] for r, p in zip(rows, positions, strict=True)]
    summed: Any = table[there].groupby("head")[column].sum()
    return summed / len(prompts)


def note_tokens(model: Any, prompt: Any, level: Any) -> range:
    """Return the positions of a level's note in a prompt."""
    start = prompt.text.index(str(prompt.notes[level]))
    end = start + len(str(prompt.notes[level]))
    spans = model.tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [i for i, (a, b) in enumerate(spans["offset_mapping"]) if a < end and b > start]
    return range(inside[0] + 1, inside[-1] + 2)  # BOS stands before them


def attention(
    model: Any,
    steerers: Mapping[Any, sqs.LatentGradientSteerer],
    moved: pd.DataFrame,
    prompts: Mapping[Any, Sequence[Any]],
) -> pd.DataFrame:
    """Return the attention at the target's note: unsteered, steered, and by some latents alone."""
    ablations = latent_ablations(
        steerers, moved, ms=(1, 4, 16), seeds=(0,), ways=("only",), others=("as many others",)
    )
    rows = []
    for level, steerer in steerers.items():
        given = (model, steerer, level, prompts[level])
        row = {
            "target": str(level),
            "unsteered": at_note(*given, EVERY, "attention_before").mean(),
            "steered": at_note(*given, EVERY).mean(),
        }
        for without in (False, True):
            for ablation in ablations:
                name = f"{'without' if without else 'only'} {ablation.which}, m={ablation.m}"
                row[name] = at_note(*given, ablation.latents[level], without=without).mean()
        rows.append(row)
    table = pd.DataFrame(rows).set_index("target")
    table.loc["mean"] = table.mean()
    return table.T.reset_index(names="attention to the target's note")


def compare(
    name: str,
    steerers: Mapping[Any, sqs.LatentGradientSteerer],
    moved: pd.DataFrame,
    scorer: TextScorer,
) -> None:
    """Print success against m."""
    whole = Method(
        name="whole", steerer=lambda cases, _: rowwise([steerers[c.target] for c in cases])
    )
    tasks = tuple(scorer.cases)
    print(f"\n## {name}: success without some latents\n")
    for method, label in ((Method(name="unsteered"), "unsteered"), (whole, "whole steer")):
        found = scorer.score(method, 0.0, tasks)
        said = ", ".join(f"{task} {share(found[task].success)}" for task in tasks)
        print(f"- {label}: {said}")
    ways: dict[Way, tuple[Any, ...]] = {
        "held": ("as many others", "as much of others"),
        "taken out": (),
        "only": (),
    }
    if name == "squared distance":
        del ways["taken out"]  # is the same as held, there
    else:
        ways["held"] = ("as many others",)
    ablations = [
        ablation
        for way, others in ways.items()
        for ablation in latent_ablations(
            steerers, moved, ms=MS, seeds=SEEDS, ways=(way,), others=others
        )
    ]
    found = [(a, scorer.score(a.method, 0.0, tasks)) for a in tqdm(ablations, desc="Ablations")]
    cells: dict[str, Callable[[LatentAblation, Mapping[str, Any]], str]] = {
        f"{name}, share of the change": lambda a, _: f"{a.share:.2f}",
        **{
            f"{name}, {task}: success": lambda _, o, task=task: share(o[task].success)
            for task in tasks
        },
    }
    for title, cell in cells.items():
        rows: dict[str, dict[str, str]] = {}
        for ablation, outcome in found:
            seed = "" if ablation.seed is None else f" (seed {ablation.seed})"
            label = f"{ablation.which} {ablation.way}{seed}"
            rows.setdefault(label, {})[f"m={ablation.m}"] = cell(ablation, outcome)
        table = pd.DataFrame.from_dict(rows, orient="index")
        print(f"\n{markdown_table(table.reset_index(names=title), digits=2)}")


def share(success: Sequence[bool]) -> str:
    """Return a share with its interval."""
    low, high = wilson_interval(sum(success), len(success))
    return f"{sum(success) / len(success):.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
