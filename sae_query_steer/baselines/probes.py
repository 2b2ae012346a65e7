"""Inference-time intervention: mean differences at the head outputs that tell the classes apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.baselines.directions import above_others, added, class_means
from sae_query_steer.data.examples import check_classes
from sae_query_steer.data.tokenized import TokenizedExamples, check_tokenized
from sae_query_steer.models.activations import read_at_span
from sae_query_steer.scopes.positions import Scope
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.targets.centroids import CentroidTargets


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbedHeads:
    """How well each head's output tells classes apart, and how it differs between them."""

    means: CentroidTargets
    """Mean head outputs of the classes, at `blocks.L.attn.hook_z`."""

    directions: Mapping[str, Float[Tensor, "class head d_head"]]
    """Mean of the class minus the mean of the others' means, as long as the standard deviation of
    all head outputs along it, by hook name."""

    accuracies: Mapping[str, Float[Tensor, " head"]]
    """Balanced accuracy of a linear probe on held-out examples, by hook name."""

    def best(self, n: int) -> dict[int, list[int]]:
        """Return the n heads of the highest accuracies, by layer, or raise ValueError."""
        heads = [(a, k, h) for k, row in self.accuracies.items() for h, a in enumerate(row)]
        check_number("n_heads", n, whole=True, least=1, most=len(heads))
        found: dict[int, list[int]] = {}
        for _, name, head in sorted(heads, key=lambda one: -float(one[0]))[:n]:
            found.setdefault(int(name.split(".")[1]), []).append(head)
        return {layer: sorted(found[layer]) for layer in sorted(found)}


def probe_heads(
    model: Any, examples: TokenizedExamples, layers: Sequence[int], *, seed: int = 0
) -> ProbedHeads:
    """Return linear probes of the classes on each head's output, in some layers.

    A probe is a logistic regression on standardised outputs of one half of each class; its accuracy
    is of the other half. One probe tells all classes apart, so the heads are the same for each.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        examples: tokenised labelled texts, four or more of each class.
        layers: which layers.
        seed: of the halves.

    Raises:
        ValueError: a class with fewer than four examples, or what `class_means` refuses.
    """
    check_tokenized(examples)
    labels, found = list(examples.labels), []
    check_classes(labels, at_least=4)
    means = class_means(model, examples, layers, at="attn.hook_z")
    train, _ = train_test_split(
        range(len(labels)), test_size=0.5, stratify=labels, random_state=seed
    )
    for batch in read_at_span(model, examples, list(means.means)):
        found.append((batch.row, {n: x.float().cpu() for n, x in batch.activations.items()}))
    rows = torch.cat([row for row, _ in found])
    truth, seen = [labels[row] for row in rows.tolist()], torch.isin(rows, torch.tensor(train))
    directions, accuracies = {}, {}
    for name, mean in means.means.items():
        outputs = torch.cat([values[name] for _, values in found])
        unit = torch.nn.functional.normalize(above_others(mean), dim=-1)
        along = torch.einsum("thd,chd->tch", outputs, unit.to(outputs))
        directions[name] = along.std(0, correction=0)[..., None] * unit
        accuracies[name] = torch.tensor([_accuracy(one, truth, seen) for one in outputs.unbind(1)])
    return ProbedHeads(means=means, directions=directions, accuracies=accuracies)


def _accuracy(outputs: Tensor, truth: Sequence[str], seen: Tensor) -> float:
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    halves = [[t for t, s in zip(truth, part, strict=True) if s] for part in (seen, ~seen)]
    probe.fit(outputs[seen].numpy(), halves[0])
    return float(balanced_accuracy_score(halves[1], probe.predict(outputs[~seen].numpy())))


def inference_time_intervention(
    probed: ProbedHeads,
    *,
    target: str | Sequence[str],
    strength: float | Sequence[float],
    n_heads: int,
    scope: Scope | None = None,
) -> Steerer:
    """Return a steerer that adds strength * sigma * u to the outputs of the best probed heads.

    To `blocks.L.attn.hook_z` of a head, at scoped tokens. u is the direction of length 1 from the
    mean of the other classes' means to that of the target class, and sigma the standard deviation
    of all examples' outputs along it.

    Args:
        probed: from `probe_heads`.
        target: the class to steer towards; a list has one for each row of the batch.
        strength: in standard deviations, 0 or more; a list likewise.
        n_heads: how many heads, those of the highest accuracies.
        scope: which tokens; None means the last prompt token.

    Raises:
        ValueError: a class, strength or number of heads that is not allowed.

    Source: ITI (arXiv 2306.03341) by its code, `get_interventions_dict` with `use_center_of_mass`
    in likenneth/honest_llama. There the classes are two, the probes see outputs as they are, and
    the last token and each that is written are changed: `LastPromptToken() | ResponseTokens()`.
    """
    method = "inference-time intervention"
    chosen: dict[str, Any] = {"target": target, "strength": strength, "method": method}
    heads = probed.best(n_heads)
    return added(probed.means, probed.directions, **chosen, scope=scope, layers=None, heads=heads)
