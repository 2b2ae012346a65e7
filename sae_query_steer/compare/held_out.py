"""Scores of a judge on held-out texts, and whether they differ from guessing."""

from collections.abc import Mapping, Sequence

from sklearn.metrics import recall_score

from sae_query_steer.diagnostics.metrics import wilson_interval


def held_out_scores(
    found: Sequence[str | None], labels: Sequence[str], classes: Sequence[str]
) -> dict[str, float]:
    """Return `Judge.held_out` of found and true classes."""
    right = [guess == label for guess, label in zip(found, labels, strict=True)]
    present = sorted(set(labels))
    guesses = ["" if guess is None else guess for guess in found]
    return {
        "accuracy": sum(right) / len(right),
        "balanced_accuracy": float(recall_score(labels, guesses, labels=present, average="macro")),
        "answered": sum(guess is not None for guess in found) / len(found),
        "n": float(len(found)),
        "chance": 1 / len(classes),
        "majority": max(labels.count(name) for name in present) / len(labels),
    }


def accuracy_by_class(found: Sequence[str | None], labels: Sequence[str]) -> dict[str, float]:
    """Return the share of each class's texts that were found to be of it."""
    own = {
        name: [g for g, label in zip(found, labels, strict=True) if label == name]
        for name in dict.fromkeys(labels)
    }
    return {str(name): some.count(name) / len(some) for name, some in own.items()}


def may_guess(held_out: Mapping[str, float]) -> bool:
    """Return whether 95 % of a judge's accuracy (Wilson) reach down to guessing; False if unknown.

    Guessing: the accuracy of always naming the most frequent class, 1 / classes or more.
    """
    return _is_measured(held_out) and _interval(held_out)[0] <= _guessing(held_out)


def judge_sentence(held_out: Mapping[str, float]) -> str:
    """Return what is known of a judge in a sentence, with a remedy if it may be guessing."""
    if not _is_measured(held_out):
        return "Judge: accuracy unknown; measure it with `judge.measured(examples)`."
    low, high = _interval(held_out)
    known = (
        f"Judge: accuracy {held_out['accuracy']:.2f} [{low:.2f}, {high:.2f}], n = "
        f"{held_out['n']:.0f}, chance {_guessing(held_out):.2f}."
    )
    if not may_guess(held_out):
        return known
    return (
        f"{known} No verdict: the judge's interval is not above chance, so its target rates "
        "mean nothing. Give it more labelled texts, or use another judge."
    )


def _is_measured(held_out: Mapping[str, float]) -> bool:
    return {"accuracy", "n", "chance"} <= held_out.keys()


def _guessing(held_out: Mapping[str, float]) -> float:
    return max(held_out["chance"], held_out.get("majority", 0.0))


def _interval(held_out: Mapping[str, float]) -> tuple[float, float]:
    n = round(held_out["n"])
    return wilson_interval(round(held_out["accuracy"] * n), n)
