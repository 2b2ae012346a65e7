"""Features in the form of SAEDashboard's batches, from which Neuronpedia's exports are made."""

import json
from pathlib import Path
from typing import Any

from sae_query_steer.dashboards.site_data import SiteDashboard

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


def write_batches(dashboard: SiteDashboard, folder: Path) -> None:
    """Write a folder `head-H` of files `batch-N.json` for each head of a site.

    Each file is a `NeuronpediaDashboardBatch`, each of its features a
    `NeuronpediaDashboardFeature`, as sae-dashboard 0.8.0 defines them. Neuronpedia knows one source
    a hook point and layer, so the head goes to `sae_id_suffix`. The decoder row is left out: it
    would be offered for steering all heads at once. Silent latents are left out, as there.

    Args:
        dashboard: what is written.
        folder: the folder to make.

    Source: sae_dashboard/neuronpedia/neuronpedia_dashboard.py of sae-dashboard 0.8.0.
    """
    data = dashboard.data()
    for head in data["heads"]:
        own = folder / f"head-{head['head']}"
        own.mkdir(parents=True)
        alive = [latent for latent, fired in enumerate(head["fired"]) if fired]
        for number, start in enumerate(range(0, len(alive), FEATURES_A_FILE)):
            batch = {
                "model_id": data["model"],
                "layer": data["layer"],
                "sae_set": "queries",
                "sae_id_suffix": f"head-{head['head']}",
                "features": [
                    _feature(data, head, latent)
                    for latent in alive[start : start + FEATURES_A_FILE]
                ],
            }
            (own / f"batch-{number}.json").write_text(json.dumps(batch), encoding="utf-8")


def _feature(data: dict[str, Any], head: dict[str, Any], latent: int) -> dict[str, Any]:
    counts, largest = head["histogram"][latent], head["max"][latent]
    step = largest / len(counts)
    return {
        "feature_index": latent,
        **{name: [] for name in EMPTY},
        "frac_nonzero": head["fired"][latent] / max(1, data["n_tokens"]),
        "freq_hist_data_bar_values": [round((i + 0.5) * step, 3) for i in range(len(counts))],
        "freq_hist_data_bar_heights": counts,
        "n_prompts_total": data["n_texts"],
        "n_tokens_in_prompt": max((text[5] for text in head["texts"][latent]), default=0),
        "dataset": "",
        "activations": [_activation(data, text, largest) for text in head["texts"][latent]],
    }


def _activation(data: dict[str, Any], text: list[Any], largest: float) -> dict[str, Any]:
    _, _, _, start, at, length, *fires = text
    values = [0.0] * length
    for index, value in zip(fires[::2], fires[1::2], strict=True):
        values[index] = value
    return {
        # -1 and -1 say that the text is of the top activations, and of no interval.
        "bin_min": -1,
        "bin_max": largest,
        "bin_contains": -1,
        "tokens": [data["vocabulary"][i] for i in data["tokens"][start : start + length]],
        "values": values,
        "qualifying_token_index": at,
    }
