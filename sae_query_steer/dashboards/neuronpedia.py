"""Features in the form of SAEDashboard's batches, from which Neuronpedia's exports are made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FEATURES_A_FILE = 128
"""As SAEDashboard writes them."""

EMPTY = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist"),
)
"""What has no meaning for a query's latent, which writes no logits; the format wants it there."""


def write_batches(data: Mapping[str, Any], folder: Path) -> None:
    """Write a folder `head-H` of files `batch-N.json` for each head of a site.

    Each file is a `NeuronpediaDashboardBatch`, each of its features a
    `NeuronpediaDashboardFeature`, as sae-dashboard 0.8.0 defines them. Neuronpedia knows one source
    a hook point and layer, so the head goes to `sae_id_suffix`. The decoder row is left out: it
    would be offered for steering all heads at once. Silent latents are left out, as there.

    Args:
        data: of `site_data`.
        folder: the folder to make.

    Source: sae_dashboard/neuronpedia/neuronpedia_dashboard.py of sae-dashboard 0.8.0.
    """
    for head in data["heads"]:
        suffix = f"head-{head['head']}"
        (folder / suffix).mkdir(parents=True)
        alive = [_feature(data, head, i) for i, fired in enumerate(head["fired"]) if fired]
        for number, start in enumerate(range(0, len(alive), FEATURES_A_FILE)):
            batch = {"model_id": data["model"], "layer": data["layer"], "sae_set": "queries"}
            batch |= {"sae_id_suffix": suffix, "features": alive[start : start + FEATURES_A_FILE]}
            file = folder / suffix / f"batch-{number}.json"
            file.write_text(json.dumps(batch), encoding="utf-8")


def _feature(data: Mapping[str, Any], head: Mapping[str, Any], latent: int) -> dict[str, Any]:
    counts, largest = head["histogram"][latent], head["max"][latent]
    activations = []
    for _, row, position, start, length, *fires in head["texts"][latent]:
        values = dict(zip(fires[::2], fires[1::2], strict=True))
        tokens = data["texts"][row][start : start + length]
        activations.append(
            {
                # -1 and -1 say that the text is of the top activations, and of no interval.
                **{"bin_min": -1, "bin_max": largest, "bin_contains": -1},
                "tokens": [data["vocabulary"][token] for token in tokens],
                "values": [values.get(i, 0.0) for i in range(length)],
                "qualifying_token_index": position - start,
            }
        )
    return {
        "feature_index": latent,
        **{name: [] for name in EMPTY},
        "frac_nonzero": head["fired"][latent] / max(1, data["n_tokens"]),
        "freq_hist_data_bar_values": [
            round((i + 0.5) * (largest / len(counts)), 3) for i in range(len(counts))
        ],
        "freq_hist_data_bar_heights": counts,
        "n_prompts_total": data["n_texts"],
        "n_tokens_in_prompt": max((len(a["tokens"]) for a in activations), default=0),
        "dataset": "",
        "activations": activations,
    }
