"""Import all of the package, steer the tutor, and write the texts: the same with TransformerLens 4.

Usage: python tl4_check.py FILE, with TransformerLens 4 first on PYTHONPATH or without.
"""

import json
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import walk_packages

if version("transformer-lens").startswith("4"):
    import_module("tl4_shim")  # before SAELens is imported

import sae_query_steer as sqs

GREEDY = {"max_new_tokens": 24, "do_sample": False, "verbose": False}


def main() -> None:
    """Write texts of the tutor: unsteered, and steered by an SAE, densely and by attention."""
    for module in walk_packages(sqs.__path__, "sae_query_steer."):
        import_module(module.name)
    model = sqs.load_tutor()
    corpus = sqs.toy.TutorCorpus("train", seed=0).examples(240)
    sites = sqs.query_sites(model, [1])
    sae = sqs.sae.TopK(d_sae_per_head=64, k=8)
    config = sqs.TrainingConfig(training_tokens=100_000, sae=sae)
    saes = sqs.train_query_saes(model, [e.prompt + e.response for e in corpus], sites, config)
    dense = sqs.sae.identity_encoders(sites)
    examples = sqs.tokenize_examples(model, corpus, span=sqs.LastPromptToken())
    settings = {"objective": sqs.SquaredDistance(), "n_steps": 10, "step_size": 0.3}
    steerers = {
        name: sqs.LatentGradientSteerer(
            encoders,
            sqs.CentroidTargetBuilder(model, encoders).fit(examples),
            target="create",
            **settings,
        )
        for name, encoders in {"SAE": saes, "dense": dense}.items()
    }
    cases = [sqs.toy.TutorCorpus("test", seed=n).prompt("analyze") for n in range(3)]
    prompts = [case.text for case in cases]
    texts = {"unsteered": [model.generate(prompt, **GREEDY) for prompt in prompts]}
    for name, steerer in steerers.items():
        with steerer.apply(model, record=True):
            texts[name] = [model.generate(prompt, **GREEDY) for prompt in prompts]
            once = model.generate(prompts[0], use_past_kv_cache=False, **GREEDY)
        assert once == texts[name][0]
    look = sqs.steering.LookAt(str(cases[0].notes[sqs.BloomLevel.CREATE]))
    with sqs.steering.AttentionSteerer(dense, look).apply(model):
        texts["attention"] = [model.generate(prompts[0], **GREEDY)]
    batch = sqs.compare.continuations(model, prompts, steerer=steerers["SAE"], max_new_tokens=24)
    texts["batch"] = batch.texts
    for name in ("SAE", "dense", "attention"):
        assert texts[name][0] != texts["unsteered"][0], name
    Path(sys.argv[1]).write_text(json.dumps(texts, indent=1), encoding="utf-8")
    sys.stdout.write(
        f"{len(texts)} ways to steer with TransformerLens {version('transformer-lens')}\n"
    )


if __name__ == "__main__":
    main()
