"""The texts of the candidates: what the model writes, labelled, and in parts that share nothing."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import sae_query_steer as sqs
from experiments.stories.classes import (
    OPEN,
    PAIRED,
    WHEN,
    Candidate,
    Rule,
    before_names,
    completes,
    cut,
    girl_and_boy,
    paired,
    two_characters,
    which_first,
)
from sae_query_steer.compare import continuations
from sae_query_steer.data.tokenized import tokenize_example

SHARES = {"sites": 0.4, "confirm": 0.25, "validation": 0.15, "test": 0.2}
"""Parts: where sites are looked for, looked at again, strengths chosen, and the table."""


def written(model: Any, n: int, seed: int) -> dict[str, list[str]]:
    """Return what the model writes: stories, stories of two names, and prompts that begin a name.

    At temperature 0.8, where sentences hang together; row i of a kind draws by (seed, i).
    """

    def go_on(prompts: Sequence[str], n_tokens: int) -> list[str]:
        seeds = [seed * 1_000_003 + i for i in range(len(prompts))]
        found = continuations(
            model, prompts, max_new_tokens=n_tokens, temperature=0.8, seeds=seeds
        ).texts
        return [prompt + text for prompt, text in zip(prompts, found, strict=True)]

    draw = random.Random(seed)
    names = [girl_and_boy(draw, *draw.sample(["Lily", "Tim"], 2)) for _ in range(n)]
    alike = [
        f"{two_characters(draw, *draw.sample(['Sam', 'Sue'], 2))} {draw.choice(WHEN)} S"
        for _ in range(n // 2)
    ]
    return {
        "open": go_on(["Once upon a time"] * n, 110),
        "two names": go_on(names, 60),
        "begun alike": go_on(alike, 4),
        "begun alike, prompts": alike,
    }


def all_candidates(model: Any, texts: dict[str, list[str]], n: int, seed: int) -> list[Candidate]:
    """Return the candidates with their examples, in parts that share no story and no pair."""
    found = []

    def add(name: str, kind: str, groups: list[list[sqs.LabelledExample]], **rest: Any) -> None:
        start, parts = 0.0, {}
        for part, share in SHARES.items():
            stop = start + share * len(groups)
            parts[part] = [e for group in groups[round(start) : round(stop)] for e in group]
            start = stop
        found.append(Candidate(name=name, kind=kind, parts=parts, **rest))

    def single(pairs: Sequence[tuple[str, str]], rule: Rule) -> list[list[sqs.LabelledExample]]:
        labelled = ((p, r, rule(p, r.strip())) for p, r in dict(pairs).items())
        return [[e] for e in usable(model, labelled)]

    pairs = cut(texts["open"], seed)
    for name, (classes, rule) in OPEN.items():
        add(
            name,
            "open",
            single(pairs, rule),
            classes=classes,
            rule=rule,
            max_new_tokens=24,
            target="dialogue" if name == "dialogue follows" else None,
        )
    rule = which_first("Lily", "Tim")
    groups = single(before_names(texts["two names"], "Lily", "Tim", seed), rule)
    add("which of two names", "two names", groups, classes=("Lily", "Tim"), rule=rule,
        max_new_tokens=24)  # fmt: skip
    rule = completes("Sam", "Sue", 1)
    prompts = texts["begun alike, prompts"]
    rests = [t[len(p) :] for p, t in zip(prompts, texts["begun alike"], strict=True)]
    groups = single([(p, r[:2]) for p, r in zip(prompts, rests, strict=True)], rule)
    add("names begun alike", "two names", groups, classes=("Sam", "Sue"), rule=rule,
        max_new_tokens=24)  # fmt: skip
    for name, (_, rule) in PAIRED.items():
        made = paired(name, n // 2, seed)
        groups = [[sqs.LabelledExample(prompt=p, label=k) for k, p in one.items()] for one in made]
        partners: dict[str, str] = {}
        for first, second in (one.values() for one in made):
            partners |= {first: second, second: first}
        classes = tuple(sorted(made[0]))
        add(name, "paired", groups, classes=classes, rule=rule, max_new_tokens=16,
            partners=partners)  # fmt: skip
    return found


def usable(
    model: Any, labelled: Iterable[tuple[str, str, str | None]]
) -> list[sqs.LabelledExample]:
    """Return those examples that have a label, and an exact end of the prompt."""
    found = []
    for prompt, response, label in labelled:
        if label is None:
            continue
        example = sqs.LabelledExample(prompt=prompt, response=response, label=label)
        try:
            tokenize_example(model, example)
        except ValueError:  # a token spans the end of the prompt
            continue
        found.append(example)
    return found


def counted(candidates: Sequence[Candidate]) -> pd.DataFrame:
    """Return how many examples each class of each part has."""
    return pd.DataFrame(
        {"candidate": c.name, "kind": c.kind}
        | {
            part: ", ".join(f"{k} {n}" for k, n in sorted(Counter(e.label for e in es).items()))
            for part, es in c.parts.items()
        }
        for c in candidates
    )


def studies(data: Path) -> tuple[list[sqs.LabelledExample], list[sqs.LabelledExample]]:
    """Return teachers' turns with their move, and exam questions with their Bloom level.

    The turns carry no mark of their dialogue: a split has turns of one dialogue on both sides.
    """
    turns = pd.read_json(data / "feedback_mathdial" / "teacher_utterances_test.json")
    moves = [
        sqs.LabelledExample(prompt=text.strip(), label=move)
        for text, move in zip(turns["text"], turns["move"], strict=True)
        if text.strip() and len(text) < 500
    ]
    bloom = sqs.read_examples(
        data / "bloom_yahya2012" / "yahya-2012.csv",
        prompt="QUESTION",
        label="BT LEVEL",
        parse_label=sqs.BloomLevel.parse,
    )
    return moves, bloom
