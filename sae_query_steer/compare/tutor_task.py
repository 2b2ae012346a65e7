"""The tutor as a task: cases, labelled examples, and the judges of its feedback."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.compare.generation import continuations
from sae_query_steer.compare.held_out import held_out_scores
from sae_query_steer.compare.judges import ClassifierJudge, RuleJudge
from sae_query_steer.compare.methods import SteeringCase
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.toy.corpus import Split, TutorCorpus, TutorPrompt
from sae_query_steer.toy.judges import restated_level, shuffled, verb_repeating

MAX_NEW_TOKENS = 32
"""Longer than any feedback of the corpus."""

Task: TypeAlias = Literal["open", "redirect"]
TASKS: tuple[Task, ...] = ("open", "redirect")

_BROKEN = {"shuffled": shuffled, "verb_repeating": verb_repeating}


@dataclass(frozen=True, kw_only=True)
class TutorCase(SteeringCase):
    """A case of the tutor: an open prompt, or one with a request for another level."""

    asked: TutorPrompt
    """The prompt in its parts."""


def tutor_cases(
    task: Task, split: Split, n: int, *, seed: int, notes: bool = True
) -> list[TutorCase]:
    """Return n cases with the targets, and the other levels as sources, in turn.

    Args:
        task: "open" prompts request no level, "redirect" prompts request another level.
        split: whose lessons, notes and phrasings.
        n: number of cases.
        seed: of the prompts.
        notes: whether the prompts hold notes.
    """
    corpus = TutorCorpus(split, seed=seed, notes=notes)
    levels = list(BloomLevel)
    cases = []
    for i in range(n):
        target = levels[i % 6]
        source = None if task == "open" else levels[(i + 1 + i // 6 % 5) % 6]
        asked = corpus.prompt(source)
        requesting = asked.with_request(target, *corpus.request(target)).text
        prompts = {"prompt": asked.text, "requesting": requesting}
        cases.append(TutorCase(target=target, source=source, asked=asked, **prompts))
    return cases


def training_examples(
    model: Any, n: int, *, seed: int, notes: bool = True
) -> tuple[list[LabelledExample], list[LabelledExample]]:
    """Return labelled examples two ways: as requested, and as the tutor chose on open prompts.

    The label of an open prompt is the level of the note that the tutor restated. Without notes a
    greedy tutor writes the same level on most open prompts, so they have the corpus's feedback.

    Args:
        model: a tutor on either backend.
        n: prompts of each kind.
        seed: of the prompts.
        notes: whether the prompts hold notes.

    Raises:
        ValueError: the tutor restated fewer than two notes of a level.
    """
    corpus = TutorCorpus("train", seed=seed, notes=notes)
    requested = corpus.examples(n)
    if not notes:
        return requested, corpus.examples(n, open_share=1.0)
    prompts = [corpus.prompt(None) for _ in range(n)]
    asked = [prompt.text for prompt in prompts]
    texts = continuations(model, asked, max_new_tokens=MAX_NEW_TOKENS).texts
    opened, counts = [], dict.fromkeys(map(str, BloomLevel), 0)
    for prompt, text in zip(prompts, texts, strict=True):
        if (label := restated_level(text, prompt)) is not None:
            opened.append(LabelledExample(prompt=prompt.text, response=text, label=label))
            counts[label] += 1
    if min(counts.values()) < 2:
        raise ValueError(
            f"the tutor must restate two notes or more of each level on open prompts, got {counts}:"
            " use a tutor that was trained longer, or more prompts"
        )
    return requested, opened


def note_judge(cases: Sequence[TutorCase]) -> RuleJudge | None:
    """Return the rule that finds whose note a text restates; None if prompts hold no notes."""
    asked = {case.prompt: case.asked for case in cases}
    if not all(prompt.notes for prompt in asked.values()):
        return None
    return RuleJudge(lambda prompt, text: restated_level(text, asked[prompt]), list(BloomLevel))


def level_judge(*, n_per_level: int = 400) -> ClassifierJudge:
    """Return a judge of the level of the tutor's feedback, by its word bigrams and trigrams.

    It is trained on texts of the corpus's split "train". Half of them are no feedback (shuffled
    words, and verbs of a level repeated), so that a text that only contains a level's words has no
    class. Its `held_out` is of the feedbacks of the split "validation", with two entries more:
    "shuffled" and "verb_repeating", the share of such texts given no level.

    Args:
        n_per_level: feedbacks of each level to train on.

    Source: logistic regression of scikit-learn; the features are our choice.
    """
    texts, labels = _labelled("train", 7, n_per_level)
    broken = [text for kind in _BROKEN.values() for text in kind(texts, labels, 7)]
    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(2, 3), token_pattern=r"[A-Za-z]+|[^\sA-Za-z]"),
        LogisticRegression(C=10.0, max_iter=500),
    )
    pipeline.fit(texts + broken, labels + ["none"] * len(broken))
    judge = ClassifierJudge(pipeline=pipeline, classes=tuple(BloomLevel), held_out={})
    texts, labels = _labelled("validation", 0, 100)
    shares = held_out_scores(judge(texts, texts), labels, judge.classes)
    for name, kind in _BROKEN.items():
        judged = judge(texts, kind(texts, labels, 0))
        shares[name] = judged.count(None) / len(judged)
    return replace(judge, held_out=shares)


def _labelled(split: Split, seed: int, n_per_level: int) -> tuple[list[str], list[str]]:
    examples = TutorCorpus(split, seed=seed).examples(6 * n_per_level, open_share=1.0)
    return [e.response.strip() for e in examples], [str(e.label) for e in examples]
