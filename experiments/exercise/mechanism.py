"""How learned targets act on SmolLM2, and what else they change.

    python -m experiments.exercise.mechanism --out runs/exercise --text FILE

The effect is the gain of the mean log-likelihood of a token of the answer that the model gives to
the request, written after the open prompt, as a share of what the request itself gains. It is
measured as it is, with attention patterns held at those of the unsteered model, and with nothing
but the changed patterns. Heads are ranked one by one on the first half of the cases, and those of
the highest effect are steered on the other half. The change of next tokens of a textbook tells what
the steer does to unrelated text, and "sources" to which kinds of tokens the heads turn. The cost is
how much longer greedy answers of 24 tokens take in a batch of 12, both sides alternating. Targets
are those that `experiments.exercise.run rivals` and `wide` learned. Rows go to mechanism.jsonl; a
stopped run continues with the next.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sae_query_steer as sqs
from benchmarks.rounds import seconds_of
from experiments.exercise.studies import residual_site
from experiments.exercise.task import Task, task_parser
from sae_query_steer.compare.exercise_task import MAX_NEW_TOKENS
from sae_query_steer.compare.generation import continuations
from sae_query_steer.compare.learned import MOVE, SCOPE
from sae_query_steer.data.batches import TokenBatch, example_batches
from sae_query_steer.data.prompts import chat_prompt
from sae_query_steer.progress import progress_bar

EVERY = sqs.scopes.EveryPosition()
STEERS = {
    "moves, dense": ("wide-dense", "dense", EVERY, 0.5),
    "moves, trained SAE": ("wide-trained-l1", "trained", EVERY, 0.5),
    "moves, random rows": ("wide-random-l1", "random", EVERY, 0.5),
    "moves, trained SAE, 8 a head": ("wide-trained-8-a-head", "trained", EVERY, 0.5),
    "moves, dense, 120 updates": ("wide-dense-120-updates", "dense", EVERY, 0.5),
    "moves, trained SAE, 120 updates": ("wide-trained-120-updates", "trained", EVERY, 0.5),
    "moves, random rows, 120 updates": ("wide-random-120-updates", "random", EVERY, 0.5),
    "offset of the residual stream": ("residual-20", "residual", SCOPE, 0.25),
    "offset of the residual stream, every token": ("residual-20-every", "residual", EVERY, 0.25),
    "offset of the residual stream, every token, 120 updates": (
        "residual-20-every-120-updates",
        "residual",
        EVERY,
        0.25,
    ),
}
"""Folder of the targets, encoders, scope and budget."""

Make = Callable[..., sqs.LatentGradientSteerer]


def steers(task: Task) -> dict[str, Make]:
    """Return what makes the steerer of some targets, for those that were learned."""

    def make(folder: str, kind: str, scope: Any, budget: float) -> Make:
        encoders = residual_site(task) if kind == "residual" else task.dictionary(kind, task.wide)
        targets = sqs.LearnedTargets.load(task.out / "targets" / folder)
        return lambda target, **chosen: sqs.LatentGradientSteerer(
            encoders,
            targets,
            target=target,
            objective=MOVE.objective,
            n_steps=1,
            step_size=1.0,
            max_relative_change=budget,
            scope=scope,
            **chosen,
        )

    there = {k: v for k, v in STEERS.items() if (task.out / "targets" / v[0]).exists()}
    return {name: make(*one) for name, one in there.items()}


def answered(task: Task, n: int) -> list[list[TokenBatch]]:
    """Return batches of open prompts, and of requesting ones, with the answers to the request."""
    cases = task.cases("open, trained wording", "test", n)
    asking = [str(case.requesting) for case in cases]
    made = continuations(task.model, asking, max_new_tokens=MAX_NEW_TOKENS, batch_size=60).texts
    found = []
    for prompts in ([case.prompt for case in cases], asking):
        some = [
            sqs.LabelledExample(prompt=prompt, response=text, label=case.target)
            for prompt, text, case in zip(prompts, made, cases, strict=True)
        ]
        examples = sqs.tokenize_examples(task.model, some)
        halves = (range(n // 2), range(n // 2, n))
        found.append([next(example_batches(examples.subset(half), n)) for half in halves])
    return found


def loss(task: Task, batch: TokenBatch, *steps: AbstractContextManager[Any]) -> float:
    """Return the mean -log p, in nats, of a token of the answers, in some contexts."""
    index = batch.positions.index
    own = (index >= batch.prompt_lengths[:, None]) & (index < batch.lengths[:, None])
    with torch.no_grad(), ExitStack() as stack:
        for step in steps:
            stack.enter_context(step)
        logits = task.model(batch.tokens)
    row, position = own.nonzero(as_tuple=True)
    found = torch.log_softmax(logits[row, position - 1].float(), -1)
    each = found.gather(1, batch.tokens[row, position][:, None])[:, 0]
    by_row = torch.zeros(len(own)).index_add_(0, row, each) / own.sum(1)
    return -float(by_row.mean())


def shares(task: Task, make: Make, plain: Sequence[Sequence[float]], batches: Any) -> Any:
    """Return the effect as it is, with frozen attention, and of changed patterns alone."""
    found: dict[str, list[float]] = {"whole": [], "frozen": [], "patterns": []}
    hold = partial(sqs.steering.freeze_attention, task.model)
    for batch, before, asked in zip(batches[0], *plain, strict=True):
        steerer, lengths = make(list(batch.labels)), batch.prompt_lengths.tolist()
        steered = partial(steerer.apply, task.model, prompt_lengths=lengths)
        losses = {
            "whole": loss(task, batch, steered()),
            "frozen": loss(task, batch, hold(batch.tokens), steered()),
            "patterns": loss(task, batch, hold(batch.tokens, of=steerer, prompt_lengths=lengths)),
        }
        for name, after in losses.items():
            found[name].append((before - after) / (before - asked))
    return {name: sum(parts) / len(parts) for name, parts in found.items()}


def heads(task: Task, make: Make, plain: Sequence[Sequence[float]], batches: Any) -> Any:
    """Return the effect of the best heads, ranked one by one on other cases, by their number."""
    (first, second), (before, after) = batches[0], plain[0]
    target = plain[1][1]
    n_heads = int(task.model.cfg.n_heads)

    def gain(batch: TokenBatch, start: float, chosen: Sequence[tuple[int, int]]) -> float:
        by_layer: dict[int, list[int]] = {}
        for layer, head in chosen:
            by_layer.setdefault(layer, []).append(head)
        steerer = make(list(batch.labels), layers=sorted(by_layer), heads=by_layer)
        lengths = batch.prompt_lengths.tolist()
        return start - loss(task, batch, steerer.apply(task.model, prompt_lengths=lengths))

    every = [(layer, head) for layer in task.wide for head in range(n_heads)]
    bar = progress_bar(every, desc="Ranking heads", unit="head")
    alone = {one: gain(first, before, [one]) for one in bar}
    ranked = sorted(every, key=lambda one: -alone[one])
    sizes = [1, 3, 5, 10, 20, 40, 60, 80, 100, len(every)]
    found = {n: gain(second, after, ranked[:n]) / (after - target) for n in sizes}
    return {"effect_by_number": found, "ranked": ranked, "alone": [alone[one] for one in ranked]}


def drift(task: Task, make: Make, passages: Tensor) -> dict[str, Any]:
    """Return how the next tokens of unrelated text change, in nats, mean over its tokens."""
    labels = [task.classes[i % len(task.classes)] for i in range(len(passages))]
    found: dict[str, list[float]] = {"kl": [], "jensen_shannon": []}
    for first in range(0, len(passages), 10):
        rows = passages[first : first + 10]
        steerer = make(labels[first : first + 10])
        with torch.no_grad():
            plain = task.model(rows).float().log_softmax(-1)
            with steerer.apply(task.model, prompt_lengths=[rows.shape[1] // 2] * len(rows)):
                changed = task.model(rows).float().log_softmax(-1)
        middle = torch.logaddexp(plain, changed) - math.log(2)

        def mean_kl(p: Tensor, q: Tensor) -> float:
            return float((p.exp() * (p - q)).sum(-1).mean())

        found["kl"].append(mean_kl(plain, changed))
        found["jensen_shannon"].append((mean_kl(plain, middle) + mean_kl(changed, middle)) / 2)
    means = {name: sum(parts) / len(parts) for name, parts in found.items()}
    return {"n": len(passages), **means}


def sources(task: Task, make: Make, batch: TokenBatch) -> dict[str, Any]:
    """Return where the attention of all heads of the layers goes, unsteered and steered.

    Mean over cases, heads and the tokens that the answer is written from: the share on each kind of
    token, and the total variation between the two.
    """
    kinds, groups = token_kinds(task, batch)
    n = len(batch.labels)
    index = batch.positions.index
    own = (index >= batch.prompt_lengths[:, None] - 1) & (index < batch.lengths[:, None] - 1)
    steerer, lengths = make(list(batch.labels)), batch.prompt_lengths.tolist()
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in task.wide]
    with torch.no_grad():
        _, plain = task.model.run_with_cache(batch.tokens, names_filter=names)
        with steerer.apply(task.model, prompt_lengths=lengths):
            _, steered = task.model.run_with_cache(batch.tokens, names_filter=names)
    weight = own / own.sum(1, keepdim=True) / len(own) / len(names)
    masses, moved = torch.zeros(2, len(kinds)), torch.zeros(())
    for name in names:
        patterns = torch.stack([plain[name], steered[name]]).float()
        by_kind = torch.einsum("srhqk,rkg,rq->sg", patterns, groups, weight)
        masses += by_kind / patterns.shape[2]
        varied = (patterns[0] - patterns[1]).abs().sum(-1).mean(1) / 2
        moved += (varied * weight).sum()
    return {
        "n": n,
        "total_variation": float(moved),
        **{kind: [round(float(m), 4) for m in masses[:, i]] for i, kind in enumerate(kinds)},
    }


def token_kinds(task: Task, batch: TokenBatch) -> tuple[list[str], Tensor]:
    """Return the kinds of tokens, and which kind each token of a batch is [row, pos, kind]."""
    kinds = ["first token", "chat template", "wording of the prompt", "topic", "answer"]
    cases: Any = task.cases("open, trained wording", "test", len(batch.labels))
    topics = sorted({str(case.topic) for case in cases}, key=len, reverse=True)
    tokenizer = task.model.tokenizer
    before, after = chat_prompt("@", tokenizer).split("@")
    found = torch.zeros(*batch.tokens.shape, len(kinds))
    for row, length in enumerate(batch.prompt_lengths.tolist()):
        text = tokenizer.decode(batch.tokens[row, :length])
        (topic,) = [name for name in topics if name in text][:1]
        start = text.index(topic)
        end = text.index(after, len(before))
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert read["input_ids"] == batch.tokens[row, :length].tolist()
        for place, (first, last) in enumerate(read["offset_mapping"]):
            kind = 1 if first < len(before) or end <= first < end + len(after) else 2
            kind = 4 if first >= end + len(after) else kind
            kind = 3 if first < start + len(topic) and start < last and kind == 2 else kind
            found[row, place, kind if place else 0] = 1
        found[row, length:, 4] = 1
    return kinds, found


def cost(task: Task, make: Make, rounds: int = 5) -> dict[str, Any]:
    """Return how many times as long generation takes, and what a target holds.

    "time" is the median over rounds, in pairs with unsteered generation, beside its range;
    "latents" is the mean number of values of a class that are not 0.
    """
    cases = task.cases("open, trained wording", "test", 12)
    prompts, steerer = [case.prompt for case in cases], make([case.target for case in cases])
    written = partial(
        continuations, task.model, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=len(prompts)
    )
    seconds = seconds_of(partial(written, steerer=steerer), written, rounds)
    ratios = sorted(ours / plain for ours, plain in seconds)
    held = sum(int((mean != 0).sum()) for mean in steerer.targets.means.values())
    return {
        "n": len(prompts),
        "time": statistics.median(ratios),
        "range": [ratios[0], ratios[-1]],
        "latents": held / len(task.classes),
    }


def run(task: Task, n: int, text: Path, head_steer: str) -> None:
    """Measure what is not in the file yet."""
    file = task.out / "mechanism.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    done = {(row["steer"], row["measure"]) for row in map(json.loads, lines)}
    batches = answered(task, n)
    plain = [[loss(task, batch) for batch in some] for some in batches]
    print(json.dumps({"loss": plain[0], "loss after the request": plain[1]}), flush=True)
    ids = task.model.tokenizer(text.read_text()[20_000:60_000])["input_ids"][: 30 * 64]
    passages = torch.tensor(ids).reshape(30, 64)
    for name, make in steers(task).items():
        measures = {
            "effect": lambda make=make: shares(task, make, plain, batches),
            "drift": lambda make=make: drift(task, make, passages),
            "sources": lambda make=make: sources(task, make, batches[0][0]),
            "cost": lambda make=make: cost(task, make),
        }
        if name == head_steer:
            measures["heads"] = lambda make=make: heads(task, make, plain, batches)
        for measure, measured in measures.items():
            if (name, measure) not in done:
                row = {"steer": name, "measure": measure, "n": n, **task.told, **measured()}
                with file.open("a") as rows:
                    rows.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = task_parser(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a file of unrelated text")
    parser.add_argument("--n", type=int, default=60, help="cases")
    parser.add_argument("--heads-of", default="moves, dense", help="whose heads are ranked")
    torch.set_num_threads(1)
    given = parser.parse_args()
    run(Task(given), given.n, given.text, given.heads_of)
