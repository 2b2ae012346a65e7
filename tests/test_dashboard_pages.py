"""The pages of dashboards: whole, harmless, small, and seen in a browser."""

import copy
import dataclasses
import json
import re
import shutil
import subprocess
from typing import get_type_hints

import pytest
from command_line import invoke
from pydantic import TypeAdapter

import sae_query_steer as sqs
from sae_query_steer.dashboards.attention_effect import attention_effect
from sae_query_steer.dashboards.neuronpedia import write_batches
from sae_query_steer.dashboards.site_data import _rounded, site_data
from sae_query_steer.dashboards.statistics import read_again
from sae_query_steer.dashboards.writing import PAGES, write_dashboards

NAME = "blocks.2.attn.hook_q"
HOSTILE = "</script><script>document.title='broken'</script><!-- <img src=x onerror=alert(1)> & \""


KEYS = """
// A user who presses / and searches for nothing, goes to the list, one down and one up again.
const found = [], press = (where, key) =>
  where.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
press(document.body, "/");
found.push(document.activeElement.id);
const before = [location.hash, at("search").value];
at("search").value = "";
for (const key of ["Enter", "ArrowDown", "ArrowUp"]) {
  press(document.activeElement, key);
  found.push(location.hash);
}
document.documentElement.dataset.byKeys = found.join(" ");
history.replaceState(null, "", before[0]);
at("search").value = before[1];
update();
choose(fromHash());
"""


class HostileTokenizer:
    """A tokenizer whose every token is an attack."""

    bos_token_id = 1

    def decode(self, ids, **_):
        return "".join(f" {i}{HOSTILE}" for i in ids)


@pytest.fixture(scope="module")
def texts(examples) -> list[str]:
    return [example.prompt + example.response for example in examples[:20]]


def page_data(page: str):
    return json.loads(re.search('id="data">(.*?)</script>', page)[1])


def dashboard_html(dashboard) -> str:
    return PAGES.get_template("page.html").render(data=site_data(**dashboard))


@pytest.fixture(scope="module")
def dashboard(tiny_models, saes, targets, texts):
    """What `site_data` makes a page of."""
    model, site = tiny_models["hooked"], sqs.query_sites(tiny_models["hooked"], [2])[0]
    tops = sqs.diagnostics.top_tokens(model, {NAME: saes[NAME]}, texts, k=4, heads=[3, 1])
    statistics, _ = read_again(model, {NAME: saes[NAME]}, tops, context=2, keys=False)
    return {
        "site": site,
        "model_name": "tiny",
        "tops": tops,
        "statistics": statistics[NAME],
        "attention": attention_effect(model, site, saes[NAME], tops, n_tokens=2),
        "targets": targets,
    }


def test_the_page_shows_the_line_of_code_that_sets_a_latent(dashboard):
    page = dashboard_html(dashboard)
    assert "sqs.steering.edit_latents(saes, ${where}, scope=sqs.scopes.EveryPosition())" in page
    assert page_data(page)["site"] == NAME


def test_a_page_holds_every_latent_and_its_texts_as_they_stand(
    model, saes, targets, texts, tmp_path
):
    pages = write_dashboards(model, saes, texts, tmp_path / "d", targets=targets, context=3, k=4)
    assert list(pages) == list(saes)
    assert {p.name for p in (tmp_path / "d").iterdir()} == {
        *(f"{name}.html" for name in saes),
        "index.html",
        "dashboards.json",
    }
    assert all(
        f'href="{name}.html"' in (tmp_path / "d" / "index.html").read_text() for name in saes
    )
    data = page_data(pages[NAME].read_text(encoding="utf-8"))
    tops = sqs.diagnostics.top_tokens(model, saes, texts, k=4)
    assert [head["head"] for head in data["heads"]] == [0, 1, 2, 3]
    assert data["n_tokens"] == tops.n_tokens
    table = tops.table(NAME, 1, context=3)
    head, seen = data["heads"][1], 0
    columns = {"fired", "max", "mean", "histogram", "texts", "moved", "attention", "keys", "share"}
    for column in columns | {"class", "class_means"}:
        assert len(head[column]) == 16, column
    assert head["fired"] == tops.n_fired[NAME][1].tolist()
    for latent, found in enumerate(head["texts"]):
        own = table[table["latent"] == latent]
        assert len(found) == len(own)
        assert len(head["attention"][latent]) == min(2, len(own))
        for (value, row, position, start, length, *fires), line in zip(
            found, own.itertuples(), strict=True
        ):
            assert (row, position) == (line.row, line.position)
            assert value == pytest.approx(line.activation, rel=0.01)
            at, window = position - start, data["texts"][row][start : start + length]
            words = [data["vocabulary"][str(i)] for i in window]
            assert "".join(words).strip() == (line.left + line.text + line.right).strip()
            assert words[at].strip() == line.text.strip()
            active = dict(zip(fires[::2], fires[1::2], strict=True))
            assert active[at] == pytest.approx(value, rel=0.01)
            assert set(active) <= set(range(length))
            seen += 1
    assert seen > 20


def test_numbers_keep_three_digits():
    import torch

    assert _rounded(torch.tensor([0.0, 1234.56, -0.00123456, 9.999])) == [
        0.0,
        1230.0,
        -0.00123,
        10.0,
    ]


def test_hostile_texts_and_classes_can_t_break_out(dashboard):
    hostile = dashboard | {
        "tops": dataclasses.replace(dashboard["tops"], tokenizer=HostileTokenizer()),
        "model_name": HOSTILE,
        "targets": dataclasses.replace(dashboard["targets"], classes=(HOSTILE, "b", "c")),
    }
    page = dashboard_html(hostile)
    assert page.count("</script>") == 2, "the data's and the page's own"
    assert page.count("<!--") == 0
    data = page_data(page)
    assert data["classes"][0] == data["model"] == HOSTILE
    assert all(HOSTILE in word for word in data["vocabulary"].values())


def test_a_page_asks_for_nothing_from_elsewhere(dashboard):
    page = dashboard_html(dashboard)
    shell = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]+\.[a-z]|\bsrc=|<link|@import|innerHTML|\beval\(", shell)
    assert "default-src 'none'" in page


def test_neuronpedia_s_batches_have_the_fields_that_sae_dashboard_names(dashboard, tmp_path):
    # The arguments of the three classes of sae-dashboard 0.8.0, neuronpedia_dashboard.py.
    of_batch = {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    of_feature = {
        *("feature_index", "neuron_alignment_indices", "neuron_alignment_values"),
        *("neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_l1"),
        *("correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1"),
        *("correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values"),
        *("frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
        *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total"),
        *("n_tokens_in_prompt", "dataset", "activations", "decoder_weights_dist"),
    }
    of_activation = {"bin_min", "bin_max", "bin_contains", "tokens", "values"}
    write_batches(site_data(**dashboard), tmp_path / "np")
    assert [p.name for p in sorted((tmp_path / "np").iterdir())] == ["head-1", "head-3"]
    batch = json.loads((tmp_path / "np" / "head-3" / "batch-0.json").read_text())
    assert set(batch) == of_batch
    assert (batch["layer"], batch["sae_id_suffix"]) == (2, "head-3")
    fired = dashboard["tops"].n_fired[NAME][0]
    assert [f["feature_index"] for f in batch["features"]] == fired.nonzero()[:, 0].tolist()
    for feature in batch["features"]:
        assert set(feature) == of_feature
        own = int(fired[feature["feature_index"]])
        assert feature["frac_nonzero"] == own / dashboard["tops"].n_tokens
        assert sum(feature["freq_hist_data_bar_heights"]) == own
        for activation in feature["activations"]:
            assert set(activation) == of_activation | {"qualifying_token_index"}
            assert len(activation["tokens"]) == len(activation["values"])
            top = activation["values"][activation["qualifying_token_index"]]
            assert top > 0
        best = feature["activations"][0]
        assert max(best["values"]) == best["bin_max"]


def test_sae_dashboard_s_own_classes_take_neuronpedia_s_batches(dashboard, tmp_path):
    theirs = pytest.importorskip(
        "sae_dashboard.neuronpedia.neuronpedia_dashboard",
        reason="needs the code alone: pip install --no-deps sae-dashboard==0.8.0",
    )

    def check(kind, values):
        hints = get_type_hints(kind.__init__)
        for name, value in values.items():
            TypeAdapter(hints[name]).validate_python(value, strict=True)

    write_batches(site_data(**dashboard), tmp_path / "np")
    files = list((tmp_path / "np").rglob("batch-*.json"))
    assert len(files) == 2
    for file in files:
        batch = json.loads(file.read_text())
        check(theirs.NeuronpediaDashboardBatch, batch)
        for feature in batch["features"]:
            check(theirs.NeuronpediaDashboardFeature, feature)
            for activation in feature["activations"]:
                check(theirs.NeuronpediaDashboardActivation, activation)
        again = theirs.NeuronpediaDashboardBatch(**batch).to_dict()
        assert [feature.pop("vector") for feature in again["features"]] == [[]] * len(
            batch["features"]
        )
        assert again == batch


def test_what_can_t_be_shown_is_refused_before_work_starts(
    tiny_models, saes, targets, texts, tmp_path, monkeypatch
):
    model = tiny_models["bridge"]
    others = sqs.sae.identity_encoders(sqs.query_sites(model, [0, 2]))

    def no_work(*_, **__):
        raise AssertionError("the texts were read")

    monkeypatch.setattr("sae_query_steer.dashboards.writing.top_tokens", no_work)
    for settings, text in (
        ({"n_keys": -1}, "n_keys must be a whole number >= 0, got -1"),
        ({"heads": [7]}, "no head 7 at layer 0"),
        ({"layers": [1]}, "no site at layer 1: there are some at"),
        ({"saes": others, "targets": targets}, "another SAE|centroids"),
    ):
        given = {"saes": saes} | settings
        with pytest.raises(ValueError, match=text):
            write_dashboards(model, given.pop("saes"), texts, tmp_path / "no", **given)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="has no dashboards.json"):
        write_dashboards(model, saes, texts, tmp_path / "other", overwrite=True)
    for part, remedy in (("hook_k", "n_keys=0"), ("hook_pattern", "n_attention=0")):
        less = {n: p for n, p in model.hook_dict.items() if n != f"blocks.0.attn.{part}"}
        hidden = Hidden(model, less)
        with pytest.raises(ValueError, match=remedy):
            write_dashboards(hidden, saes, texts, tmp_path / "no")
    assert not (tmp_path / "no").exists()


class Hidden:
    """A model that does not show some of its hook points."""

    def __init__(self, model, hook_dict):
        self._model, self.hook_dict = model, hook_dict

    def __getattr__(self, name):
        return getattr(self._model, name)


def test_parts_that_are_not_asked_for_are_not_there(tiny_models, saes, texts, tmp_path):
    pages = write_dashboards(
        tiny_models["bridge"],
        saes,
        texts,
        tmp_path / "d",
        n_attention=0,
        n_keys=0,
        layers=[2],
        heads=[1],
        neuronpedia=True,
        n_tokens=60,
    )
    assert list(pages) == [NAME]
    data = page_data(pages[NAME].read_text())
    assert (data["has_attention"], data["has_keys"], data["classes"]) == (False, False, None)
    assert set(data["heads"][0]) == {"head", "fired", "max", "mean", "histogram", "texts"}
    assert (tmp_path / "d" / "neuronpedia" / NAME / "head-1" / "batch-0.json").is_file()


def test_a_site_whose_latents_are_all_silent_has_a_page(tiny_models, saes, texts, tmp_path):
    silent = copy.deepcopy(saes[NAME])
    for weights in silent.parameters():
        weights.data.zero_()
    pages = write_dashboards(tiny_models["bridge"], {NAME: silent}, texts[:3], tmp_path / "d")
    head = page_data(pages[NAME].read_text())["heads"][0]
    assert head["fired"] == head["max"] == head["moved"] == [0] * 16
    assert head["texts"] == head["attention"] == [[]] * 16


def test_the_command_writes_pages(tiny_folder, saes, targets, texts, tmp_path):
    saes.save(tmp_path / "saes")
    targets.save(tmp_path / "targets")
    (tmp_path / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    start = ["dashboard", "--model", str(tiny_folder), "--saes", str(tmp_path / "saes")]
    start += ["--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "pages")]
    done = invoke([*start, "--targets", tmp_path / "targets", "--layers", "2", "--heads", "0-2"])
    assert done.exit_code == 0, done.output
    assert re.search(r"wrote .*blocks\.2\.attn\.hook_q\.html \(0\.\d MB\)", done.output)
    data = page_data((tmp_path / "pages" / f"{NAME}.html").read_text())
    assert [head["head"] for head in data["heads"]] == [0, 1, 2]
    assert set(data["classes"]) == {"remember", "apply", "create"}
    done = invoke([*start, "--overwrite", "--n-tokens", "40"], catch=False)
    assert done.exit_code == 0, done.output
    data = page_data((tmp_path / "pages" / f"{NAME}.html").read_text())
    assert 0 < data["n_texts"] < len(texts)
    for more, text in (
        ([], "exists: give another folder, or overwrite"),
        (["--overwrite", "--context-size", "4"], "more than context_size=4: give a larger"),
        (["--overwrite", "--heads", "x"], "got 'x'"),
        (["--overwrite", "--texts", "none.csv"], "no file"),
    ):
        assert text in f"{invoke([*start, *more]).exception}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_shows_the_page_searches_it_and_runs_nothing_of_the_texts(dashboard, tmp_path):
    tops = dataclasses.replace(dashboard["tops"], tokenizer=HostileTokenizer())
    hostile = dashboard | {"tops": tops, "model_name": HOSTILE}
    page = dashboard_html(hostile) + f"<script>{KEYS}</script>"
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    live = int(dashboard["tops"].n_fired[NAME][0].argmax())
    file = f"file://{tmp_path}/page.html?q={live}&in=latent&head=3#3-{live}"
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--virtual-time-budget=4000"),
        *(f"--user-data-dir={tmp_path}/profile", "--window-size=1280,800", "--dump-dom", file),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "data-load-ms" in dom
    assert "<title>blocks.2.attn.hook_q: latents</title>" in dom, "no script of the texts ran"
    detail = dom[dom.index('<article id="detail"') :]
    assert f"<h2>Head 3, latent {live}</h2>" in detail
    assert "1 of 32 latents" in dom
    assert dom.count('role="option"') == 1
    assert "&lt;/script&gt;&lt;script&gt;" in detail
    (by_keys,) = re.findall(r'data-by-keys="([^"]*)"', dom)
    focused, first, second, again = by_keys.split()
    assert focused == "search"
    assert first != second
    assert again == first
    assert "<img" not in dom[: dom.index('id="data"')] + detail.partition("</article>")[0]
