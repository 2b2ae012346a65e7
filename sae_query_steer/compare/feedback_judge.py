"""The judge of the tutor's feedback: a classifier that was trained on other texts of the corpus."""

from dataclasses import replace

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.compare.classifier_judge import ClassifierJudge
from sae_query_steer.toy.corpus import TutorCorpus
from sae_query_steer.toy.judges import shuffled, verb_repeating

_BROKEN = {"shuffled": shuffled, "verb_repeating": verb_repeating}


def level_judge(*, n_per_level: int = 400, seed: int = 7) -> ClassifierJudge:
    """Return a judge of the level of the tutor's feedback, by its word bigrams and trigrams.

    It is trained on texts of the corpus's split "train". Half of them are no feedback (shuffled
    words, and verbs of a level repeated), so that a text that only contains a level's words has no
    class. Its `held_out` is `held_out_accuracy`.

    Args:
        n_per_level: feedbacks of each level to train on.
        seed: of the texts.

    Source: logistic regression of scikit-learn; the features are our choice.
    """
    texts, labels = _labelled("train", seed, n_per_level)
    broken = [text for kind in _BROKEN.values() for text in kind(texts, labels, seed)]
    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(2, 3), token_pattern=r"[A-Za-z]+|[^\sA-Za-z]"),
        LogisticRegression(C=10.0, max_iter=500),
    )
    pipeline.fit(texts + broken, labels + ["none"] * len(broken))
    judge = ClassifierJudge(pipeline=pipeline, classes=tuple(BloomLevel), held_out={})
    return replace(judge, held_out=held_out_accuracy(judge))


def held_out_accuracy(
    judge: ClassifierJudge, *, n_per_level: int = 100, seed: int = 0
) -> dict[str, float]:
    """Return the share of texts of the split "validation" that is classified correctly.

    Returns:
        "feedback": share of feedbacks given their level; "shuffled" and "verb_repeating": share of
        such texts given no level.
    """
    texts, labels = _labelled("validation", seed, n_per_level)
    found = judge(texts, texts)
    shares = {"feedback": sum(map(str.__eq__, labels, map(str, found))) / len(found)}
    for name, kind in _BROKEN.items():
        judged = judge(texts, kind(texts, labels, seed))
        shares[name] = judged.count(None) / len(judged)
    return shares


def _labelled(split: str, seed: int, n_per_level: int) -> tuple[list[str], list[str]]:
    examples = TutorCorpus(split, seed=seed).examples(6 * n_per_level, open_share=1.0)
    return [e.response.strip() for e in examples], [str(e.label) for e in examples]
