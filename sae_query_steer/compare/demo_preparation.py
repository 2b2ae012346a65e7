"""What the demo does before anything is steered: labelled texts, and a look at the sites."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.compare.demo_cases import MAX_NEW_TOKENS
from sae_query_steer.compare.demo_settings import DemoSettings
from sae_query_steer.compare.generation import continuations
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.tokenized import tokenize_examples
from sae_query_steer.diagnostics.interchange import interchange_effect
from sae_query_steer.diagnostics.separability import separability
from sae_query_steer.diagnostics.site_verdicts import site_verdicts
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sae.encoders import identity_encoders
from sae_query_steer.sites import ALL_HEADS, QuerySite
from sae_query_steer.targets.builder import CentroidTargetBuilder
from sae_query_steer.toy.corpus import TutorCorpus
from sae_query_steer.toy.judges import restated_level


def training_examples(
    model: Any, notes: bool, settings: DemoSettings
) -> tuple[list[LabelledExample], list[LabelledExample]]:
    """Return labelled examples two ways: as requested, and as the tutor chose on open prompts.

    The label of an open prompt is the level of the note that the tutor restated. Where there are
    no notes the tutor, greedy as it is here, writes one and the same level on most open prompts; so
    there open prompts have the feedback of the corpus.
    """
    corpus = TutorCorpus("train", seed=settings.seed, notes=notes)
    requested = corpus.examples(settings.n_train)
    if not notes:
        return requested, corpus.examples(settings.n_train, open_share=1.0)
    prompts = [corpus.prompt(None) for _ in range(settings.n_train)]
    texts = continuations(model, [p.text for p in prompts], max_new_tokens=MAX_NEW_TOKENS).texts
    labels = [restated_level(text, p) for text, p in zip(texts, prompts, strict=True)]
    opened = [
        LabelledExample(prompt=prompt.text, response=text, label=label)
        for prompt, text, label in zip(prompts, texts, labels, strict=True)
        if label is not None
    ]
    counts = {level: sum(e.label == level for e in opened) for level in BloomLevel}
    if min(counts.values()) < 2:
        said = ", ".join(f"{level} {n}" for level, n in counts.items())
        raise ValueError(
            f"on open prompts the tutor restated the notes of {said} times: two or more of each "
            "are needed for centroids; train it longer, or give more prompts (n_train)"
        )
    return requested, opened


def site_table(
    model: Any,
    saes: QuerySAEs,
    sites: Sequence[QuerySite],
    requested: Sequence[LabelledExample],
    notes: bool,
    settings: DemoSettings,
) -> pd.DataFrame:
    """Return what is known of each layer before anything is steered.

    Interchange effect and separability are measured on validation prompts that request a level,
    at the last prompt token; the label's share of the query's variance on the training prompts.
    """
    texts = TutorCorpus("validation", seed=settings.seed, notes=notes).examples(240)
    validation = tokenize_examples(model, texts)
    moved = interchange_effect(
        model, sites, validation, n_pairs=settings.n_pairs, per_head=False, seed=settings.seed
    )
    apart = separability(model, saes, validation, seed=settings.seed)
    queries = CentroidTargetBuilder(model, identity_encoders(sites)).fit(
        tokenize_examples(model, requested)
    )
    shares = {site.layer: queries.class_share_of_variance(site.hook_name) for site in sites}
    table = moved.merge(apart[apart["head"] == ALL_HEADS], on=["layer", "head"])
    return table.assign(label_share=[shares[int(layer)] for layer in table["layer"]]).drop(
        columns="head"
    )


def chosen_layers(table: pd.DataFrame) -> tuple[int, ...]:
    """Return the layers to steer: those of which `site_verdicts` says so.

    Where there is none, the one at which real queries move most is returned, so that the null can
    be seen.
    """
    chosen = site_verdicts(table)["steer_here"]
    if not bool(chosen.any()):
        shift = table["moved"] - table["moved_control"]
        chosen = shift == shift.max()
    return tuple(int(layer) for layer in table.loc[chosen, "layer"])
