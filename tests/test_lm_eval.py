"""lm-evaluation-harness: scores and texts against its own model, and against one request a time."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from command_line import invoke
from conftest import HOSTS, on_both_hosts
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import processors
from transformers import AutoModelForCausalLM
from wheel_check import WORDS, make_model, word_tokenizer

import sae_query_steer as sqs
from sae_query_steer.baselines import LogitBias, random_direction
from sae_query_steer.integrations.lm_eval import SteeredLM
from sae_query_steer.scopes import AtPositions, EveryPosition, ResponseTokens, RowMask
from sae_query_steer.steering import JoinedSteerers

BOS, N_CTX = 1, 64
LONG = " ".join(WORDS[(7 * i) % 48] for i in range(90))  # longer than the context
PAIRS = [
    ("w1 w20 w33", " w2 w9"),
    ("w1 w20 w33", " w2 w8"),
    ("w5", " w7"),
    ("w40 w41 w2 w17 w9 w3", " w44 w1 w30 w12"),
    ("w13 ", "w30 w31"),
    ("", "w3 w4"),
    (LONG, " w2 w9 w11"),
    ("w6 w7", " " + " ".join(WORDS[:40])),
    ("w1 w20", " w33 w2 w9"),
]
TEXTS = ["w1 w2 w3 w9", "w40", LONG, " ".join(WORDS + WORDS[::-1] + WORDS[5:30])]
GREEDY = {"until": ["w7", "w30 "], "max_gen_toks": 12}
CONTEXTS = [
    ("w1 w20 w33", GREEDY),
    ("w5", {"until": [], "do_sample": False, "max_gen_toks": 5}),
    ("w40 w41 w2 w17", GREEDY),
    (LONG, GREEDY),
    ("w9", GREEDY | {"until": "w1"}),
    ("w13 w14 w15 w16 w17", {"max_gen_toks": 9, "temperature": 0.0, "top_p": 0.9}),
]


def requests(kind: str, rows) -> list[Instance]:
    return [Instance(kind, {}, row, i) for i, row in enumerate(rows)]


def scored(lm) -> dict:
    """What a model of the harness makes of all kinds of requests; some begin with BOS, as chats."""
    return {
        "pairs": lm.loglikelihood(requests("loglikelihood", [*PAIRS, ("<s> w1 w2", " w3 w4")])),
        "texts": lm.loglikelihood_rolling(
            requests("loglikelihood_rolling", [(text,) for text in TEXTS])
        ),
        "written": lm.generate_until(
            requests("generate_until", [*CONTEXTS, ("<s> w1 w2", GREEDY)])
        ),
    }


def assert_same(found: dict, expected: dict, atol: float = 1e-4) -> None:
    for (score, greedy), (own, own_greedy) in zip(found["pairs"], expected["pairs"], strict=True):
        assert score == pytest.approx(own, abs=atol)
        assert greedy == own_greedy
    assert found["texts"] == pytest.approx(expected["texts"], abs=10 * atol)  # of 100 tokens
    assert found["written"] == expected["written"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model, with a tokenizer that writes BOS by itself and with one that does not."""
    made = {}
    for name in ("bos", "plain"):
        made[name] = folder = tmp_path_factory.mktemp(name) / "model"
        with torch.random.fork_rng():
            make_model(folder, n_layers=3, seed=7)
        tokenizer = word_tokenizer()
        if name == "bos":
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", BOS)]
            )
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ 'w0 ' + m['content'] + ' ' }}{% endfor %}"
        )
        tokenizer.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def expected(folders):
    """What the harness' own model makes of the requests."""
    found = {name: scored(HFLM(**plain(folder), batch_size=1)) for name, folder in folders.items()}
    # In rolling texts it scores BOS a second time if the tokenizer writes it.
    once = HFLM(**plain(folders["bos"]), batch_size=1, add_bos_token=False)
    found["bos"]["texts"] = scored(once)["texts"]
    return found


def plain(folder: Path) -> dict:
    return {
        "pretrained": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "tokenizer": str(folder),
        # lm-eval 0.4.13 mixes up "a b" + " c" and "a" + " b c", whose tokens are the same.
        "logits_cache": False,
    }


@pytest.fixture(scope="module")
def models(folders):
    return {name: on_both_hosts(folder) for name, folder in folders.items()}


@pytest.fixture
def make(saes, targets):
    """Make a steerer that visibly changes the tiny model, with some settings changed."""

    def make(**changes) -> sqs.LatentGradientSteerer:
        settings = {"objective": sqs.SquaredDistance(), "n_steps": 4, "step_size": 0.5}
        return sqs.LatentGradientSteerer(
            saes, targets, **{"target": "create", **settings, **changes}
        )

    return make


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ["bos", "plain"])
def test_an_unsteered_model_scores_and_writes_what_the_harness_does(
    models, expected, name, host, batch_size, monkeypatch
):
    model = models[name][host]
    monkeypatch.setattr(model.cfg, "default_prepend_bos", name == "bos")
    assert_same(scored(SteeredLM(model, batch_size=batch_size)), expected[name])
    assert len({text for text in expected[name]["written"] if text}) >= 4


def tokens_of(model, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a request in the model's context; the last one is not read."""
    n = max(1, len(context.split()) + 1)  # BOS
    words = (context + continuation).split()
    ids = [BOS, *(4 + WORDS.index(word) for word in words)]
    cut = max(0, len(ids) - N_CTX - 1)
    return ids[cut:n], ids[n:]


@torch.no_grad()
def alone(model, steerer, context: str, continuation: str) -> tuple[float, bool]:
    """The log-likelihood of one request in a pass of its own."""
    before, own = tokens_of(model, context, continuation)
    with steerer.apply(model, prompt_lengths=[len(before)]):
        logits = model(torch.tensor([before + own[:-1]]), prepend_bos=False)[0]
    log_probs = logits[len(before) - 1 :].log_softmax(-1)
    score = log_probs.gather(1, torch.tensor(own)[:, None]).sum()
    return float(score), log_probs.argmax(-1).tolist() == own


SCOPES = [sqs.LastPromptToken(), ResponseTokens(), EveryPosition()]


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("scope", SCOPES, ids=repr)
def test_log_likelihoods_under_a_steerer_are_those_of_each_request_alone(
    model, make, scope, batch_size
):
    steerer = make(scope=scope)
    rows = requests("loglikelihood", PAIRS)
    found = SteeredLM(model, steerer, batch_size=batch_size).loglikelihood(rows)
    bare = SteeredLM(model, batch_size=batch_size).loglikelihood(rows)
    for pair, (score, greedy), (before, _) in zip(PAIRS, found, bare, strict=True):
        own, own_greedy = alone(model, steerer, *pair)
        assert score == pytest.approx(own, abs=1e-4)
        assert greedy == own_greedy
        # A continuation of one token is not read; and BOS looks at nothing but itself.
        acts = len(pair[1].split()) > 1 if scope == ResponseTokens() else pair[0] != ""
        acts |= scope == EveryPosition()
        assert (abs(score - before) > 1e-3) == acts


def test_scores_without_strength_are_those_of_the_plain_model(model, make):
    found = scored(SteeredLM(model, make(step_size=0.0, scope=EveryPosition())))
    assert found == scored(SteeredLM(model))


def test_a_rolling_text_is_the_response_to_the_prefix_token(model, make):
    lm = SteeredLM(model, make(scope=ResponseTokens()), batch_size=3)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in TEXTS]))
    first = " ".join(LONG.split()[:N_CTX])
    rest = [4 + WORDS.index(word) for word in LONG.split()]
    expected = [alone(model, lm._steerer, "", " " + text)[0] for text in (*TEXTS[:2], first)]
    # The second window has as much before it as fits; its prompt is what the first has scored.
    n = len(rest) - N_CTX
    window = rest[-N_CTX - 1 :]
    with torch.no_grad(), lm._steerer.apply(model, prompt_lengths=[len(window) - n]):
        logits = model(torch.tensor([window[:-1]]), prepend_bos=False)[0, -n:]
    own = logits.log_softmax(-1).gather(1, torch.tensor(window[-n:])[:, None]).sum()
    expected[2] += float(own)
    assert found[:3] == pytest.approx(expected, abs=1e-3)
    bare = SteeredLM(model).loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    )
    moved = [abs(a - b) > 0.01 for a, b in zip(found, bare, strict=True)]
    assert moved == [True, False, True, True], "a text of one token has no token that is read"


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("scope", SCOPES[:2], ids=repr)
def test_a_text_under_a_steerer_is_what_generate_writes_after_that_context(
    model, make, scope, batch_size
):
    steerer = make(scope=scope, step_size=1.0)
    rows = requests("generate_until", CONTEXTS)
    found = SteeredLM(model, steerer, batch_size=batch_size).generate_until(rows)
    for (context, options), text in zip(CONTEXTS, found, strict=True):
        most, until = options["max_gen_toks"], options.get("until", [])
        cut = len(context.split()) > N_CTX - most
        context = " ".join(context.split()[-(N_CTX - most) :])
        with steerer.apply(model):
            ids = model.generate(
                context,
                prepend_bos=not cut,  # BOS is the first to go
                max_new_tokens=most,
                do_sample=False,
                verbose=False,
                return_type="tokens",
            )
        written = ids[0, len(context.split()) + (not cut) :]
        whole = model.tokenizer.decode(written, skip_special_tokens=True)
        for stop in [until] if isinstance(until, str) else until:
            whole = whole.split(stop)[0]
        assert text == whole
    assert found != SteeredLM(model).generate_until(rows)


def test_a_batch_ends_when_every_text_holds_a_stop_text(tiny_models):
    model, passes = tiny_models["bridge"], []
    (whole,) = SteeredLM(model).generate_until(
        requests("generate_until", [("w1 w20 w33", {"max_gen_toks": 12})])
    )
    stop = whole.split()[3]
    row = ("w1 w20 w33", {"max_gen_toks": 12, "until": [stop]})
    handle = model.unembed.register_forward_hook(lambda *_: passes.append(1))
    try:
        (text,) = SteeredLM(model).generate_until(requests("generate_until", [row]))
    finally:
        handle.remove()
    assert text == whole.split(stop)[0]
    assert len(passes) < 8


def test_sampling_depends_on_the_seed_and_the_request_and_not_on_the_batch(model):
    options = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 8}
    rows = requests("generate_until", [("w1 w2 w3", options), ("w9", options)] * 2)
    found = SteeredLM(model, batch_size=1).generate_until(rows)
    assert found == SteeredLM(model, batch_size=8).generate_until(rows)
    assert len(set(found)) == 4, "repeats of a request differ"
    assert found != SteeredLM(model, seed=9).generate_until(rows)


def test_choices_that_differ_in_their_last_token_share_a_pass(model):
    rows = []
    handle = model.embed.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    choices = [("w1 w2", f" w{i}") for i in range(4)] + [("w1 w2", " w1 w5"), ("w1", " w2 w5")]
    try:
        SteeredLM(model).loglikelihood(requests("loglikelihood", choices))
    finally:
        handle.remove()
    assert rows == [3]


def test_steerers_with_a_value_for_each_row_are_refused_by_name(model, make):
    words = {"create": ["w1"], "apply": ["w2"]}
    mask = torch.ones(8, 3, dtype=torch.bool)
    for steerer, name in [
        (make(target=["create"] * 8), "target"),
        (make(n_steps=[1, 2]), "n_steps"),
        (make(step_size=[0.1] * 8), "step_size"),
        (random_direction(make(target=["create"] * 8), seed=1), "target"),
        (make(scope=ResponseTokens() & ~RowMask(mask)), "scope"),
        (make(scope=AtPositions([[1], [2]])), "scope"),
        (LogitBias(words, target=["create", "apply"], bias=1.0), "target"),
        (JoinedSteerers(make(), make(target=["create", "apply"])), "target"),
    ]:
        with pytest.raises(ValueError, match=f"^{name} must be the same for all rows, got "):
            SteeredLM(model, steerer)
    for steerer in (make(scope=AtPositions([1, 2])), LogitBias(words, target="apply", bias=1.0)):
        SteeredLM(model, steerer).loglikelihood(requests("loglikelihood", PAIRS[:2]))


def test_a_bias_on_logits_is_evaluated_at_the_last_token_of_each_context(model):
    biased = SteeredLM(model, LogitBias({"a": ["w9"], "b": ["w8"]}, target="a", bias=50.0))
    found = biased.loglikelihood(requests("loglikelihood", [("w1", " w9"), ("w1 w2", " w9 w8")]))
    assert found[0] == (pytest.approx(0, abs=1e-4), True)
    assert found[1][0] < -0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 1.0, "top_p": 0.9}, "got top_p=0.9"),
        ({"num_beams": 4}, "got num_beams=4"),
        ({"max_gen_toks": 64}, "max_gen_toks must be a whole number >= 1 and <= 63, got 64"),
        ({"do_sample": True}, "temperature must be a finite number >= 1e-06, got 0.0"),
    ],
)
def test_options_that_are_not_offered_are_refused(tiny_models, options, message):
    row = ("w1", {"max_gen_toks": 2} | options)
    with pytest.raises(ValueError, match=re.escape(message)):
        SteeredLM(tiny_models["bridge"]).generate_until(requests("generate_until", [row]))


def test_wrong_requests_and_arguments_are_refused(tiny_models, untyped):
    model = tiny_models["bridge"]
    for pair, n in [(("w1", ""), 0), (("w1", " w1" * 65), 65)]:
        with pytest.raises(ValueError, match=f"1 to 64 tokens, the model's context, got {n}"):
            SteeredLM(model).loglikelihood(requests("loglikelihood", [pair]))
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0"):
        SteeredLM(model, batch_size=0)
    with pytest.raises(TypeError, match="steerer must be Steerer or JoinedSteerers, got str"):
        SteeredLM(model, "create")
    with pytest.raises(TypeError, match="model must be a HookedTransformer"):
        SteeredLM(model.original_model)


def test_without_lm_eval_the_error_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "sae_query_steer.integrations.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "sae-query-steer\[lm-eval\]"'):
        import_module("sae_query_steer.integrations.lm_eval")


# The harness itself, on tasks of our own.


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three tasks on local data."""
    folder = tmp_path_factory.mktemp("own") / "tasks"
    folder.mkdir()
    docs = [
        {"q": f"w{i} w{i + 7}", "a": [f"w{i}", f"w{i + 1} w3", "w9"], "gold": i % 3, "t": f"w{i}"}
        for i in range(12)
    ]
    lines = "\n".join(map(json.dumps, docs))
    (folder / "docs.jsonl").write_text(lines, encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "docs.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "num_fewshot": 2,
        "fewshot_split": "test",
    }
    metrics = {"aggregation": "mean", "higher_is_better": True}
    for task in (
        {
            "task": "choices",
            "output_type": "multiple_choice",
            "doc_to_choice": "{{a}}",
            "doc_to_target": "gold",
        },
        {
            "task": "writing",
            "output_type": "generate_until",
            "doc_to_target": "{{t}}",
            "generation_kwargs": {"until": ["w3"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match", **metrics}],
        },
        {
            "task": "rolling",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{q}} {{t}}",
            "num_fewshot": 0,
            "metric_list": [{"metric": "word_perplexity"}],
        },
    ):
        # JSON is YAML.
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task), encoding="utf-8")
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Leave out what lists the packages of the machine, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def evaluated(lm, tasks: Path, **options):
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = simple_evaluate(
        model=lm,
        tasks=["choices", "writing", "rolling"],
        task_manager=manager,
        bootstrap_iters=0,
        **options,
    )
    samples = {
        name: [doc["filtered_resps"] for doc in docs] for name, docs in found["samples"].items()
    }
    return found["results"], samples


@pytest.mark.parametrize("chat", [False, True])
def test_the_harness_reports_what_it_reports_of_its_own_model(
    models, folders, tasks, quick, chat, monkeypatch
):
    model, options = models["plain"]["bridge"], {"apply_chat_template": chat}
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    expected, theirs = evaluated(HFLM(**plain(folders["plain"]), batch_size=4), tasks, **options)
    found, ours = evaluated(SteeredLM(model), tasks, **options)
    assert ours["writing"] == theirs["writing"]
    for task in ("choices", "rolling"):
        mine, own = (torch.tensor(flat(one[task])) for one in (ours, theirs))
        torch.testing.assert_close(mine, own, rtol=0, atol=1e-4)
    assert found["choices"]["acc,none"] == expected["choices"]["acc,none"]
    key = "word_perplexity,none"
    assert found["rolling"][key] == pytest.approx(expected["rolling"][key], rel=1e-4)
    _, other = evaluated(SteeredLM(model), tasks, apply_chat_template=not chat)
    assert other["choices"] != ours["choices"]


def flat(values) -> list[float]:
    if not isinstance(values, list | tuple):
        return [float(values)]
    return [number for value in values for number in flat(value)]


# The command.


@pytest.fixture(scope="module")
def bundles(tiny_models, saes, targets, tmp_path_factory):
    """A bundle with a steerer, and one with centroids alone."""
    folder, model = tmp_path_factory.mktemp("bundles"), tiny_models["bridge"]
    steerer = sqs.LatentGradientSteerer(
        saes,
        targets,
        target="create",
        objective=sqs.SquaredDistance(),
        n_steps=4,
        step_size=1.0,
        scope=EveryPosition(),
    )
    sqs.hub.save_bundle(folder / "whole", model, saes, targets=targets, steerer=steerer)
    sqs.hub.save_bundle(folder / "centroids", model, saes, targets=targets)
    return folder


@pytest.fixture
def arguments(bundles, tiny_folder, tasks):
    folder = ["--model", tiny_folder, "--device", "cpu", "--bundle", bundles / "whole"]
    return ["lm-eval", *folder, "--tasks", "choices,writing", "--include-path", tasks]


def test_the_command_shows_both_and_writes_the_results(
    arguments, bundles, saes, targets, tiny_models, tasks, quick, tmp_path
):
    out = tmp_path / "out"
    done = invoke([*arguments, "--limit", "7", "--out", out])
    assert done.exception is None, done.exception
    assert "steered: LatentGradientSteerer(target='create', SquaredDistance()" in done.output
    found = json.loads((out / "results.json").read_text())
    assert [path.name for path in out.iterdir()] == ["results.json"]
    assert "scope=EveryPosition()" in found["steerer"] and "n_steps=4" in found["steerer"]
    table = [line.split() for line in done.output.splitlines()]
    names = ["unsteered", "unsteered_stderr", "steered", "steered_stderr"]
    assert ["task", "filter", "metric", *names] in table
    steerer = sqs.LatentGradientSteerer(
        *(saes, targets),
        target="create",
        objective=sqs.SquaredDistance(),
        n_steps=4,
        step_size=1.0,
        scope=EveryPosition(),
    )
    for which, one in {"unsteered": None, "steered": steerer}.items():
        results, _ = evaluated(SteeredLM(tiny_models["bridge"], one), tasks, limit=7)
        for task, metric in [("choices", "acc"), ("writing", "exact_match")]:
            (row,) = [row for row in table if row[:1] == [task] and row[2:3] == [metric]]
            shown = dict(zip(names, row[3:], strict=True))
            own = found[which]["results"][task]
            assert own[f"{metric},none"] == results[task][f"{metric},none"]
            assert shown[which] == f"{own[f'{metric},none']:.3f}"
            assert shown[f"{which}_stderr"] == f"{own[f'{metric}_stderr,none']:.3f}"
    assert found["unsteered"]["results"] != found["steered"]["results"]
    again = invoke([*arguments, "--out", out])
    assert "exists: give another folder" in str(again.exception)


def test_a_bundle_without_a_steerer_takes_the_target_that_is_given(
    arguments, bundles, quick, tmp_path
):
    arguments[arguments.index("--bundle") + 1] = bundles / "centroids"
    done = invoke([*arguments, "--limit", "2"])
    assert "--target must be given, because the bundle holds no steerer: one of" in str(
        done.exception
    )
    done = invoke([*arguments, "--limit", "2", "--target", "apply"])
    assert done.exception is None, done.exception
    assert "target='apply', PrototypeLogLikelihood" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--bundle": "none"}, "must be a folder that bundle wrote"),
        ({"--include-path": "none"}, "no folder none: give --include-path a folder of YAML"),
        ({"--limit": "0"}, "--limit must be a whole number >= 1, got 0"),
        ({"--batch-size": "0"}, "--batch-size must be a whole number >= 1, got 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    arguments, options, message, monkeypatch
):
    monkeypatch.setattr(sqs, "load_model", None)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)
    for option, value in options.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    assert message in str(invoke(arguments).exception)


def test_unknown_tasks_are_refused_before_the_model_is_loaded(arguments, monkeypatch):
    monkeypatch.setattr(sqs, "load_model", None)
    asked = []

    class OwnTasks(TaskManager):
        def __init__(self, include_path, include_defaults):
            asked.append(include_defaults)
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", OwnTasks)
    arguments[arguments.index("--tasks") + 1] = "choices,choice"
    done = invoke(arguments)
    assert "tasks of the harness or in --include-path, got ['choice']" in str(done.exception)
    assert asked == [False, True], "those of the harness are read only if needed"


def test_the_example_of_the_documents_runs(tiny_models, make, tasks, quick, monkeypatch, capsys):
    page = Path(__file__).resolve().parents[1] / "docs" / "comparing.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tasks.parent)
    model, steerer = tiny_models["bridge"], make(scope=EveryPosition(), step_size=1.0)
    exec(compile(example, "comparing.md", "exec"), {"model": model, "steerer": steerer})
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    for one, line in zip((None, steerer), shown, strict=True):
        own = evaluated(SteeredLM(model, one), tasks)[0]["choices"]
        assert line[0] == f"{own['acc,none']}"
        assert 0 < float(line[1]) < 1
    assert shown[0] != shown[1]
