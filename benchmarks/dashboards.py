"""How long the dashboard of a site takes to write and to open, and how large it is.

    python -m benchmarks.dashboards [--quick] [--d-sae N] [--k N] [--texts N]
                                    [--training-tokens N] [--out DIR]

The tutor's layer 1, 4 heads, TopK SAEs of `--d-sae` latents a head of which `--k` fire, hardly
trained. (How long a page takes depends on how many latents fire, not on what they mean.) Where
chromium is installed the page is opened in it, headless, with and without a search; the page itself
takes the times: to be ready, and to answer the first search of all texts, index included.
"""

import argparse
import json
import re
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import pandas as pd

import sae_query_steer as sqs
from sae_query_steer.dashboards.writing import write_dashboards
from sae_query_steer.toy import TutorCorpus


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="128 latents, 8 fire, 60 texts")
    parser.add_argument("--d-sae", type=int, help="latents of each head, default 4096")
    parser.add_argument("--k", type=int, help="latents that may fire, default 256")
    parser.add_argument("--texts", type=int, help="texts to read, default 180")
    parser.add_argument("--training-tokens", type=int, default=600, help="to train the SAEs on")
    parser.add_argument("--out", type=Path, default=None, help="keep the pages here")
    given = parser.parse_args()
    sizes = (128, 8, 60) if given.quick else (4096, 256, 180)
    named = (given.d_sae, given.k, given.texts)
    d_sae, k, n_texts = (own or size for own, size in zip(named, sizes, strict=True))
    model = sqs.load_tutor()
    examples = TutorCorpus("train", seed=0).examples(n_texts)
    texts = [example.prompt + example.response for example in examples]
    saes = sqs.train_query_saes(
        model,
        texts,
        sqs.query_sites(model, [1]),
        sqs.TrainingConfig(
            sae=sqs.sae.TopK(d_sae_per_head=d_sae, k=k),
            training_tokens=given.training_tokens,
        ),
    )
    targets = sqs.CentroidTargetBuilder(model, saes).fit(sqs.tokenize_examples(model, examples))
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder) / "pages"
        began = time.perf_counter()
        (page,) = write_dashboards(model, saes, texts, out, targets=targets).values()
        row: dict[str, object] = {"write_s": round(time.perf_counter() - began)}
        (held,) = re.findall(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
        data = json.loads(held)
        fired = [n for head in data["heads"] for n in head["fired"]]
        row |= {
            "latents": len(fired),
            "that_fire": sum(n > 0 for n in fired),
            "tokens": data["n_tokens"],
            "page_MB": round(page.stat().st_size / 1e6, 1),
            "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        if shutil.which("chromium") is not None:
            row["ready_ms"] = _opened(page, "", "load")
            row["search_ms"] = _opened(page, "?q=categorize", "search")
    print(pd.DataFrame([row]).to_string(index=False))


def _opened(page: Path, query: str, what: str, rounds: int = 3) -> float:
    """Return the median of a time, in milliseconds, that the page took of itself."""
    times = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as profile:
            command = [
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", f"--user-data-dir={profile}"),
                *("--virtual-time-budget=4000", "--dump-dom", f"{page.resolve().as_uri()}{query}"),
            ]
            dom = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
        (found,) = re.findall(rf'data-{what}-ms="([^"]*)"', dom)
        times.append(float(found))
    return statistics.median(times)


if __name__ == "__main__":
    main()
