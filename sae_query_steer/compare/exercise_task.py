"""The exercise task for an instruct model: cases and examples.

    Write one short exercise about volcanoes for students. They should compare two things.

Without the second sentence the prompt is open. The splits in exercise.json share no topic, template
or action; "judge" is the split of the judge's own training texts.
"""

import json
import random
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeAlias, get_args

from sae_query_steer.arguments import check_number
from sae_query_steer.bloom import BloomLevel
from sae_query_steer.compare.generation import continuations
from sae_query_steer.compare.methods import SteeringCase
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.prompts import chat_prompt, tokenizer_of

BEGUN = "Students should"
"""The begun answer of every other prompt of a class."""

MAX_NEW_TOKENS = 24
"""Of an exercise: a sentence or two."""

ExerciseTask: TypeAlias = Literal["open", "redirected", "listed", "listed redirected"]
TASKS: tuple[ExerciseTask, ...] = get_args(ExerciseTask)

ExerciseSplit: TypeAlias = Literal["train", "validation", "test", "judge"]
SPLITS: tuple[ExerciseSplit, ...] = get_args(ExerciseSplit)

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

    listed: str | None
    """The list of all actions in the prompt; None if it has none."""

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
    wording: ExerciseSplit | None = None,
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
        wording: whose templates and actions; None means those of the split.

    Raises:
        ValueError: a task, split or wording of another name, too many cases or topics, or a model
            without chat template.
    """
    wording = split if wording is None else wording
    checked = (("task", task, TASKS), ("split", split, SPLITS), ("wording", wording, SPLITS))
    for name, value, known in checked:
        if value not in known:
            raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
    data = _data()[wording]
    topics = [topic for field in _data()[split]["topics"].values() for topic in field]
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
        asked, listed = [start], None
        if task.startswith("listed"):
            *first, last = (named[level.order - 1] for level in order)
            listed = f"{', '.join(first)}, or {last}"
            asked.append(request.format(action=listed))
        if task.endswith("redirected"):
            again = request.format(action=other[source.order - 1])
            asked.append(f"This time, {again[0].lower()}{again[1:]}" if listed else again)
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
                listed=listed,
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

    The two lists are aligned: example i of each has the same topic, label and response. They come
    in rounds of the six levels.

    Args:
        model: a HookedTransformer or a TransformerBridge with a chat template.
        n_topics: topics, each with an example of every level.
        seed: as for `exercise_cases`.
        split: whose topics, templates and actions.
        max_new_tokens: most tokens of an answer, which is greedy.
    """
    cases = exercise_cases(model, "open", split, 6 * n_topics, seed=seed, n_topics=n_topics)
    opened, requesting = [case.prompt for case in cases], [str(case.requesting) for case in cases]
    texts = continuations(model, requesting, max_new_tokens=max_new_tokens, batch_size=60).texts

    def answered(prompts: list[str]) -> list[LabelledExample]:
        return [
            LabelledExample(prompt=prompt, response=text, label=case.target)
            for prompt, text, case in zip(prompts, texts, cases, strict=True)
        ]

    return answered(opened), answered(requesting)


@cache
def _data() -> dict[str, Any]:
    text = files("sae_query_steer.compare").joinpath("exercise.json").read_text(encoding="utf-8")
    return json.loads(text)
