"""The exercise task for an instruct model: cases, examples, and judges of what it writes.

    Write one short exercise about volcanoes for students. They should compare two things.

Without the second sentence the prompt is open. The splits in exercise.json share no topic, template
or action; "judge" is the split of the judge's own training texts.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeAlias

import pandas as pd
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from sae_query_steer.arguments import check_number
from sae_query_steer.bloom import BloomLevel
from sae_query_steer.compare.generation import continuations
from sae_query_steer.compare.held_out import accuracy_by_class
from sae_query_steer.compare.judges import ClassifierJudge, RuleJudge
from sae_query_steer.compare.methods import SteeringCase
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.prompts import chat_prompt, tokenizer_of

BEGUN = "Students should"
"""The begun answer of every other prompt of a class."""

MAX_NEW_TOKENS = 24
"""Of an exercise: a sentence or two."""

ExerciseTask: TypeAlias = Literal["open", "redirected", "listed", "listed redirected"]
TASKS: tuple[ExerciseTask, ...] = ("open", "redirected", "listed", "listed redirected")

ExerciseSplit: TypeAlias = Literal["train", "validation", "test", "judge"]
SPLITS: tuple[ExerciseSplit, ...] = ("train", "validation", "test", "judge")

_LEVELS = list(BloomLevel)


@dataclass(frozen=True, kw_only=True)
class ExerciseCase(SteeringCase):
    """A case of the exercise task; its prompts are in the chat template, BOS included."""

    topic: str
    template: str
    """The first sentence of the prompts, with {topic}."""

    phrase: str
    """What the prompt calls the target's action, in a prompt that lists all six. In others, what
    the requesting prompt calls it."""

    begun: bool
    """Whether the prompts end with `BEGUN`, after the template."""


def exercise_cases(
    model: Any,
    task: ExerciseTask,
    split: ExerciseSplit,
    n: int,
    *,
    seed: int,
    n_topics: int | None = None,
) -> list[ExerciseCase]:
    """Return n cases with the six levels as targets in turn, each topic once for a level.

    Args:
        model: gives the chat template.
        task: "open" prompts request no level, "redirected" ones another level than the target.
            "listed" prompts name the actions of all six levels in random order, and "listed
            redirected" ones then request another level, in other words than those of the list.
        split: whose topics, templates and actions.
        n: number of cases, up to 6 for each topic.
        seed: of the order of topics and of templates and actions; topics, templates and requests
            for the target are the same in all tasks.
        n_topics: use this many topics only; None means all of the split.

    Raises:
        ValueError: a task or split of another name, too many cases or topics, or a model without
            chat template.
    """
    for name, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
    data = _data()[split]
    topics = [topic for field in data["topics"].values() for topic in field]
    n_topics = len(topics) if n_topics is None else n_topics
    check_number("n_topics", n_topics, whole=True, least=1, most=len(topics))
    check_number("n cases", n, whole=True, least=1, most=6 * n_topics)
    tokenizer = tokenizer_of(model)
    draw = random.Random(f"{split} {seed}")
    topics = draw.sample(topics, n_topics)
    cases = []
    for i in range(n):
        lap, place = divmod(i, 6)
        target, source = _LEVELS[place], _LEVELS[(place + 1 + lap % 5) % 6]
        topic = topics[(lap + place * n_topics // 6) % n_topics]
        template, request = draw.choice(data["templates"])
        order = draw.sample(_LEVELS, 6)
        # Two actions of each level: one for the list, another for a request beside it.
        named, other = zip(
            *(draw.sample(data["actions"][level], 2) for level in _LEVELS), strict=True
        )
        start, phrase = template.format(topic=topic), named[place]
        asked = [start]
        if task.startswith("listed"):
            *first, last = (named[level.order - 1] for level in order)
            asked.append(request.format(action=f"{', '.join(first)}, or {last}"))
        if task == "redirected":
            asked.append(request.format(action=other[source.order - 1]))
        if task == "listed redirected":
            again = request.format(action=other[source.order - 1])
            asked.append(f"This time, {again[0].lower()}{again[1:]}")
        begun = lap % 2 == 0
        prompt, requesting = (
            chat_prompt(" ".join(sentences), tokenizer) + BEGUN * begun
            for sentences in (asked, [start, request.format(action=phrase)])
        )
        cases.append(
            ExerciseCase(
                prompt=prompt,
                target=target,
                source=source if task.endswith("redirected") else None,
                requesting=requesting,
                topic=topic,
                template=template,
                phrase=phrase,
                begun=begun,
            )
        )
    return cases


def exercise_examples(
    model: Any,
    n_topics: int = 20,
    *,
    seed: int,
    split: ExerciseSplit = "train",
    max_new_tokens: int = 16,
) -> tuple[list[LabelledExample], list[LabelledExample]]:
    """Return open and requesting prompts, both with the model's own answer to the request.

    The two lists are aligned: example i of each has the same topic, label and response.

    Args:
        model: a HookedTransformer or a TransformerBridge with a chat template.
        n_topics: topics, each with an example of every level.
        seed: as for `exercise_cases`.
        split: whose topics, templates and actions.
        max_new_tokens: most tokens of an answer, which is greedy.
    """
    cases = exercise_cases(model, "open", split, 6 * n_topics, seed=seed, n_topics=n_topics)
    asked = [str(case.requesting) for case in cases]
    texts = continuations(model, asked, max_new_tokens=max_new_tokens, batch_size=60).texts
    opened, requested = (
        [
            LabelledExample(prompt=prompt, response=text, label=case.target)
            for prompt, text, case in zip(prompts, texts, cases, strict=True)
        ]
        for prompts in ([case.prompt for case in cases], asked)
    )
    return opened, requested


def verb_judge() -> RuleJudge:
    """Return the rule by the first verb of a text that is a verb of some level.

    A constant on the logits of these verbs satisfies it: report it beside `exercise_judge`.
    """
    level_of = {form: level for level in _LEVELS for form in _forms(level)}

    def rule(prompt: str, text: str) -> str | None:
        del prompt
        return next((level_of[word] for word in _words(text) if word in level_of), None)

    return RuleJudge(rule, _LEVELS)


def exercise_judge(
    model: Any, n_topics: int = 40, *, n_held_out: int = 10, seed: int
) -> ClassifierJudge:
    """Return a judge of whole exercises, without their first words and the verbs of all levels.

    It is trained on the model's own answers to requests of the split "judge". Its `held_out` is of
    answers to requests of the split "validation", and has the accuracy of each level by its name.
    An answer counts as of the level that was requested, even where the model did not obey.

    Args:
        model: as for `exercise_examples`.
        n_topics: topics of training, each with an answer for every level.
        n_held_out: topics of validation.
        seed: as for `exercise_cases`.
    """
    _, train = exercise_examples(
        model, n_topics, seed=seed, split="judge", max_new_tokens=MAX_NEW_TOKENS
    )
    _, held_out = exercise_examples(
        model, n_held_out, seed=seed, split="validation", max_new_tokens=MAX_NEW_TOKENS
    )
    return fit_exercise_judge(train, held_out)


def fit_exercise_judge(
    train: Sequence[LabelledExample], held_out: Sequence[LabelledExample]
) -> ClassifierJudge:
    """Return the judge of `exercise_judge` from labelled answers.

    Args:
        train: four or more different answers of each level.
        held_out: other answers, on which it is measured.
    """
    judge = ClassifierJudge.fit([replace(e, response=without_verbs(e.response)) for e in train])
    masking = FunctionTransformer(lambda texts: list(map(without_verbs, texts)))
    pipeline = Pipeline([("masked", masking), *judge.pipeline.steps])
    judge = replace(judge, pipeline=pipeline).measured(held_out)
    found = judge([e.prompt for e in held_out], [e.response for e in held_out])
    shares = accuracy_by_class(found, [e.label for e in held_out])
    return replace(judge, held_out={**judge.held_out, **shares})


def without_verbs(text: str) -> str:
    """Return a text without its first four words and without the verbs of all levels.

    A text of which nothing is left gives ".".
    """
    rest = re.sub(r"^\s*(\S+\s*){1,4}", "", text)
    kept = re.sub(
        r"[A-Za-z]+", lambda word: "" if word[0].lower() in _all_forms() else word[0], rest
    )
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
    known = {
        level: {
            form
            for verb in _verbs(level)
            if seen[level] & _inflected(verb)
            for form in _inflected(verb)
        }
        for level in _LEVELS
    }
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


@cache
def _data() -> dict[str, Any]:
    text = files("sae_query_steer.compare").joinpath("exercise.json").read_text(encoding="utf-8")
    return json.loads(text)


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
def _forms(level: BloomLevel) -> frozenset[str]:
    return frozenset(form for verb in _verbs(level) for form in _inflected(verb))


@cache
def _all_forms() -> frozenset[str]:
    return frozenset().union(*map(_forms, _LEVELS))
