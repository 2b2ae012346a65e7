"""Judges of the exercises that a model writes, and how much of a success single words make."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pandas as pd

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.compare.exercise_task import BEGUN, MAX_NEW_TOKENS, exercise_examples
from sae_query_steer.compare.held_out import accuracy_by_class, held_out_scores
from sae_query_steer.compare.judges import ClassifierJudge, RuleJudge
from sae_query_steer.data.examples import LabelledExample

_LEVELS = list(BloomLevel)


def verb_judge() -> RuleJudge:
    """Return the rule by the first verb of a text that is a verb of some level.

    A constant on the logits of these verbs satisfies it: report it beside `exercise_judge`.
    """
    level_of = _levels_of_forms()

    def rule(prompt: str, text: str) -> str | None:
        del prompt
        return next((level_of[word] for word in _words(text) if word in level_of), None)

    return RuleJudge(rule, _LEVELS)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExerciseJudge(ClassifierJudge):
    """A judge of whole exercises, without their first words and the verbs of all levels."""

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        """Return the level of each exercise; a begun answer of its prompt belongs to it."""
        return super().__call__(prompts, list(map(_masked, prompts, texts)))


def exercise_judge(
    model: Any, n_topics: int = 40, *, n_held_out: int = 10, seed: int
) -> ExerciseJudge:
    """Return a judge of exercises, from what the model writes.

    It is trained on the model's own answers to requests of the split "judge". Its `held_out` is of
    answers to requests of the split "validation", and has the accuracy of each level by its name.
    An answer counts as of the level that was requested, even where the model did not obey.

    Args:
        model: as for `exercise_examples`.
        n_topics: topics of training, each with two answers for every level.
        n_held_out: topics of validation.
        seed: as for `exercise_cases`.
    """
    answers = partial(exercise_examples, model, max_new_tokens=MAX_NEW_TOKENS)
    train: list[LabelledExample] = []
    for draw in range(2):  # with other templates and actions
        train += answers(n_topics, seed=seed + draw, split="judge")[1]
    return fit_exercise_judge(train, answers(n_held_out, seed=seed, split="validation")[1])


def fit_exercise_judge(
    train: Sequence[LabelledExample], held_out: Sequence[LabelledExample]
) -> ExerciseJudge:
    """Return the judge of `exercise_judge` from labelled answers.

    Args:
        train: four or more different answers of each level.
        held_out: other answers, on which it is measured.
    """
    fitted = ClassifierJudge.fit(
        [replace(e, response=_masked(e.prompt, e.response)) for e in train]
    )
    judge = ExerciseJudge(pipeline=fitted.pipeline, classes=fitted.classes, held_out={})
    labels = [e.label for e in held_out]
    found = judge([e.prompt for e in held_out], [e.response for e in held_out])
    scores = held_out_scores(found, labels, judge.classes)
    return replace(judge, held_out=scores | accuracy_by_class(found, labels))


def _masked(prompt: str, text: str) -> str:
    return without_verbs(BEGUN * prompt.endswith(BEGUN) + text)


def without_verbs(text: str) -> str:
    """Return a text without its first four words and without the verbs of all levels.

    A text of which nothing is left gives ".".
    """
    rest = re.sub(r"^\s*(\S+\s*){1,4}", "", text)
    verbs = _levels_of_forms()
    kept = re.sub(r"[A-Za-z]+", lambda w: "" if w[0].lower() in verbs else w[0], rest)
    return kept.strip() or "."


def verb_choice(texts: pd.DataFrame, trained: Iterable[LabelledExample]) -> pd.DataFrame:
    """Return by target how success depends on single words.

    Args:
        texts: rows with "target", "text" and "success", such as those of one method and task in
            `Comparison.texts`.
        trained: the examples, with requests, from which targets were learned.

    Returns:
        By target: n; success; n_untrained and success_untrained, of the texts that use no verb of
        the target that is in a trained example of it (NaN if there is none); first_word, the
        commonest, in lower case; first_word_share.
    """
    seen: dict[str, set[str]] = {level: set() for level in _LEVELS}
    for example in trained:
        seen[example.label].update(_words(example.prompt + example.response))
    known: dict[str, set[str]] = {}
    for level in _LEVELS:
        forms = map(_inflected, _verbs(level))
        known[level] = set().union(*(some for some in forms if seen[level] & some))
    rows = []
    for target, own in texts.groupby("target", sort=False):
        words = own["text"].map(_words)
        untrained = own["success"][[not known[str(target)] & set(some) for some in words]]
        ((first, count),) = Counter(next(iter(some), "") for some in words).most_common(1)
        rows.append(
            {
                "target": target,
                "n": len(own),
                "success": own["success"].mean(),
                "n_untrained": len(untrained),
                "success_untrained": untrained.mean(),
                "first_word": first,
                "first_word_share": count / len(own),
            }
        )
    return pd.DataFrame(rows)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _verbs(level: BloomLevel) -> tuple[str, ...]:
    return (level.value, *level.verbs)


def _inflected(verb: str) -> set[str]:
    """Return the forms of a verb, and some that are no words."""
    stem, last = verb.removesuffix("e"), verb[-1]
    ends = [stem, verb, verb + last, *([verb[:-1] + "i"] if last == "y" else [])]
    forms = {end + suffix for end in ends for suffix in ("ed", "es", "ing")} | {verb, verb + "s"}
    return forms | ({"understood"} if verb == "understand" else set())


@cache
def _levels_of_forms() -> dict[str, BloomLevel]:
    """Return the level of every form of a verb."""
    return {f: level for level in _LEVELS for verb in _verbs(level) for f in _inflected(verb)}
