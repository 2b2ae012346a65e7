"""Scores of a judge on held-out texts, and whether they differ from guessing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from operator import eq

from sklearn.metrics import recall_score

from sae_query_steer.diagnostics.metrics import wilson_interval


def held_out_scores(
    found: Sequence[str | None], labels: Sequence[str], classes: Sequence[str]
) -> dict[str, float]:
    """Return `Judge.held_out` of found and true classes."""
    present = sorted(set(labels))
    guesses = ["" if guess is None else guess for guess in found]
    return {
        "accuracy": sum(map(eq, found, labels)) / len(labels),
        "balanced_accuracy": float(recall_score(labels, guesses, labels=present, average="macro")),
        "answered": (len(found) - found.count(None)) / len(found),
        "n": float(len(found)),
        "chance": 1 / len(classes),
        "majority": max(map(labels.count, present)) / len(labels),
    }


def accuracy_by_class(found: Sequence[str | None], labels: Sequence[str]) -> dict[str, float]:
    """Return the share of each class's texts that were found to be of it."""
    right = Counter(label for guess, label in zip(found, labels, strict=True) if guess == label)
    return {str(name): right[name] / n for name, n in Counter(labels).items()}


def may_guess(held_out: Mapping[str, float]) -> bool:
    """Return whether 95 % of a judge's accuracy (Wilson) reach down to guessing; False if unknown.

    Guessing: the accuracy of always naming the most frequent class, 1 / classes or more.
    """
    if not {"accuracy", "n", "chance"} <= held_out.keys():
        return False
    return _interval(held_out)[0] <= _guessing(held_out)


def judge_accuracy(held_out: Mapping[str, float]) -> str:
    """Return a judge's accuracy with its interval, n and chance in a few words."""
    if not {"accuracy", "n", "chance"} <= held_out.keys():
        return "accuracy unknown"
    low, high = _interval(held_out)
    return (
        f"accuracy {held_out['accuracy']:.2f} [{low:.2f}, {high:.2f}], n = "
        f"{held_out['n']:.0f}, chance {_guessing(held_out):.2f}"
    )


def judge_sentence(held_out: Mapping[str, float]) -> str:
    """Return what is known of a judge in a sentence, with a remedy if it may be guessing."""
    if not {"accuracy", "n", "chance"} <= held_out.keys():
        return "Judge: accuracy unknown; measure it with `judge.measured(examples)`."
    known = f"Judge: {judge_accuracy(held_out)}."
    if may_guess(held_out):
        known += (
            " No verdict: the judge's interval is not above chance, so its target rates mean "
            "nothing. Give it more labelled texts, or use another judge."
        )
    return known


def _guessing(held_out: Mapping[str, float]) -> float:
    return max(held_out["chance"], held_out.get("majority", 0.0))


def _interval(held_out: Mapping[str, float]) -> tuple[float, float]:
    n = round(held_out["n"])
    return wilson_interval(round(held_out["accuracy"] * n), n)
