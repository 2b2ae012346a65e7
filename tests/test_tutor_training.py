"""Training a tutor: what a step reads, and a run that is stopped and goes on as if it were not."""

import json
import random
import re
import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sae_query_steer as sqs
from sae_query_steer.bloom import BloomLevel
from sae_query_steer.storage.folders import read_tensors
from sae_query_steer.toy.row_batches import NO_LOSS, PERIODS, TaskBatch
from sae_query_steer.toy.tutor import training
from sae_query_steer.toy.tutor.batches import HIDING_SHARE, ROWS, tutor_batch
from sae_query_steer.toy.tutor.corpus import TutorCorpus
from sae_query_steer.toy.tutor.obedience import obedience
from sae_query_steer.toy.tutor.tokenizer import tutor_tokenizer
from sae_query_steer.toy.tutor.training import TutorTraining, train_tutor
from sae_query_steer.toy.tutor.words import OPENERS, REQUESTS
from sae_query_steer.toy.word_tokens import SPECIAL

PAD, BOS, EOS = (SPECIAL.index(token) for token in ("<pad>", "<s>", "</s>"))
LEVELS = list(BloomLevel)
VERBS = {verb: level for level in LEVELS for verb in level.verbs}
READ_OUT = re.compile(r"Teacher: \w+ \w+, (?:(?:now|please|first|next) take|\w+)")
RESTATED = re.compile(r" (\w+) and (\w+) them\.")
TINY = {
    "n_steps": 6,
    "max_steps": 4,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "d_mlp": 16,
}
N_TOTAL = 4 + 4 + 4 + 6


@pytest.fixture(scope="module")
def tokenizer():
    return tutor_tokenizer()


def batch_of(kind, tokenizer, **changes) -> TaskBatch:
    settings = {"seed": 3, "step": 5, "notes": True, "open_share": 0.5}
    return tutor_batch(kind, tokenizer, **{**settings, **changes})


def request_in(text: str) -> str | None:
    """The request that stands in a text, as a sentence."""
    found = (
        f"{opener} {core}."
        for opener in OPENERS
        for level in LEVELS
        for core in REQUESTS[level]
        if f"{opener} {core}." in text
    )
    return next(found, None)


def responses_in(text: str) -> list[str]:
    """The feedbacks of a row; the line breaks after a solved example belong to it."""
    parts = [part.partition("</s>")[0] for part in READ_OUT.split(text)[1:]]
    return [part.partition("\n\n")[0] + "\n\n" * ("\n\n" in part) for part in parts]


@pytest.mark.parametrize("kind", ROWS)
def test_a_batch_is_a_function_of_its_arguments_alone(tokenizer, kind):
    first = batch_of(kind, tokenizer)
    torch.manual_seed(99)
    random.seed(99)
    again = batch_of(kind, tokenizer)
    for name in ("tokens", "labels", "decisions"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert (first.visible is None) == (again.visible is None)
    assert first.visible is None or torch.equal(first.visible, again.visible)
    for changes in ({"seed": 4}, {"step": 6}, {"seed": 35, "step": 0}, {"seed": 5, "step": 3}):
        other = batch_of(kind, tokenizer, **changes).tokens
        width = min(other.shape[1], first.tokens.shape[1])
        assert not torch.equal(other[:, :width], first.tokens[:, :width])


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_whole_and_padded_on_the_right_where_nothing_is_learned(tokenizer, kind):
    batch = batch_of(kind, tokenizer)
    assert len(batch.tokens) == ROWS[kind]
    for tokens, labels, decisions in zip(batch.tokens, batch.labels, batch.decisions, strict=True):
        end = int((tokens != PAD).sum())
        assert (tokens[:end] != PAD).all()
        assert tokens[0] == BOS
        assert (labels[end:] == NO_LOSS).all()
        assert not decisions[end:].any()
        learned = labels != NO_LOSS
        assert torch.equal(labels[learned], tokens[learned])
        assert learned.any()
        assert not learned[0]


@pytest.mark.parametrize("notes", [True, False])
@pytest.mark.parametrize("kind", ["levels", "cues", "drills", "texts", "solved"])
def test_what_is_learned_is_the_feedback_and_its_end(tokenizer, kind, notes):
    batch = batch_of(kind, tokenizer, notes=notes)
    levels = Counter()
    for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
        text = tokenizer.decode(tokens[tokens != PAD])
        assert ("Notes:" in text) == (notes and kind != "levels")
        said = responses_in(text)
        assert len(said) == (3 if kind == "solved" else 1)
        assert tokenizer.decode(labels[labels != NO_LOSS]) == "".join(said) + "</s>"
        levels.update(VERBS[RESTATED.match(response)[2]] for response in said)
    assert len(levels) >= (2 if kind == "solved" else 6)


@pytest.mark.parametrize("notes", [True, False])
@pytest.mark.parametrize("kind", ["levels", "cues", "drills", "texts", "solved"])
def test_a_decision_is_the_thing_that_chooses_a_note_or_without_notes_the_verb(
    tokenizer, kind, notes
):
    batch = batch_of(kind, tokenizer, notes=notes)
    for tokens, labels, decisions in zip(batch.tokens, batch.labels, batch.decisions, strict=True):
        said = responses_in(tokenizer.decode(tokens[tokens != PAD]))
        group = 1 if "Notes:" in tokenizer.decode(tokens) or kind == "cues" else 2
        marked = [tokenizer.decode([token]).strip() for token in tokens[decisions]]
        assert marked == [RESTATED.match(response)[group] for response in said]
        places = decisions.nonzero()[:, 0]
        assert (labels[places] != NO_LOSS).all()
        if group == 1:
            assert (labels[places - 1] == NO_LOSS).all(), "the first token of the feedback"


def test_solved_examples_are_all_of_one_level_which_no_request_names(tokenizer):
    levels = set()
    for step in range(4):
        batch = batch_of("solved", tokenizer, step=step)
        for tokens in batch.tokens:
            text = tokenizer.decode(tokens)
            assert request_in(text) is None
            said = [RESTATED.match(part)[2] for part in READ_OUT.split(text)[1:]]
            assert len(said) == 3
            (level,) = {VERBS[verb] for verb in said}
            levels.add(level)
    assert levels == set(LEVELS)


@pytest.mark.parametrize(
    ("kind", "open_share", "low", "high"),
    [("texts", 0.0, 0, 0), ("texts", 1.0, 32, 32), ("drills", 0.0, 0, 0), ("drills", 1.0, 25, 55)],
)
def test_as_many_texts_are_open_as_are_asked_for_and_half_as_many_drills(
    tokenizer, kind, open_share, low, high
):
    batch = batch_of(kind, tokenizer, open_share=open_share)
    n_open = sum(request_in(tokenizer.decode(tokens)) is None for tokens in batch.tokens)
    assert low <= n_open <= high


def test_a_learned_token_of_a_copy_is_told_by_what_stood_one_period_before(tokenizer):
    batch = batch_of("copies", tokenizer)
    periods = []
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        assert min(tokens[1:]) >= len(SPECIAL)
        period = next(
            p for p in range(1, 60) if all(tokens[i] == tokens[i - p] for i in range(1 + p, 64))
        )
        periods.append(period)
        first = period + 2
        assert [label != NO_LOSS for label in labels] == [i >= first for i in range(64)]
        for i in range(first, 64):
            assert labels[i] == tokens[i] == tokens[i - period]
            # The token read there has been seen, so that what followed it can be looked up.
            assert tokens[i - 1] in tokens[1 : i - 1]
    assert PERIODS[0] <= min(periods) < max(periods) <= PERIODS[1]
    assert len(set(periods)) > 10
    assert not batch.decisions.any()
    assert len(set(batch.tokens.flatten().tolist())) > 300


def first_visible(kind, tokenizer) -> TaskBatch:
    """The first batch of a kind in which something is hidden."""
    batches = (batch_of(kind, tokenizer, step=step) for step in range(20))
    return next(batch for batch in batches if batch.visible is not None)


@pytest.mark.parametrize("kind", ["cues", "drills", "texts"])
def test_only_the_read_out_brings_notes_and_request_together(tokenizer, kind):
    batch = first_visible(kind, tokenizer)
    asked = 0
    for row in range(0, len(batch.tokens), 9):
        pieces = [tokenizer.decode([token]) for token in batch.tokens[row]]
        text = "".join(pieces)
        starts = [len("".join(pieces[:i])) for i in range(len(pieces))]

        def within(part: str, starts=starts, text=text) -> list[bool]:
            begin = text.index(part)
            return [begin <= start < begin + len(part) for start in starts]

        noted = within(re.search("Notes: [^\n]+\n", text).group())
        request = request_in(text)
        asked += request is not None
        # A request within a line begins with the space before it.
        wanted = [False] * len(pieces)
        if request is not None:
            wanted = within(f" {request}" if f" {request}" in text else request)
        read_out = starts.index(READ_OUT.search(text).end()) - 1
        assert (pieces[read_out] == " take") == (kind != "cues")
        for i in range(len(pieces)):
            for j in range(len(pieces)):
                if noted[i]:
                    allowed = noted[j] or j == 0
                elif i > read_out:
                    allowed = not wanted[j]
                else:
                    allowed = not noted[j] or i == read_out
                assert bool(batch.visible[row, i, j]) == (j <= i and allowed), (row, i, j)
    assert (asked > 0) == (kind != "cues")


def test_nothing_is_hidden_but_in_most_of_the_texts_and_drills_with_notes(tokenizer):
    for kind in ("cues", "drills", "texts"):
        hiding = [batch_of(kind, tokenizer, step=step).visible is not None for step in range(12)]
        assert sum(hiding) / 12 == pytest.approx(HIDING_SHARE, abs=0.25)
    for step in range(5):
        for kind in ("copies", "levels", "solved"):
            assert batch_of(kind, tokenizer, step=step).visible is None
        assert batch_of("texts", tokenizer, step=step, notes=False).visible is None


@pytest.fixture
def quick(monkeypatch):
    """Score the tutor on 12 prompts."""
    monkeypatch.setattr(training, "obedience", partial(obedience, n=12))


@pytest.fixture
def losses(monkeypatch) -> list[tuple[int, float]]:
    """The loss of each step in the order of the training; it shows every bit of the weights."""
    seen = []

    def seeing(model, batch, decision_weight):
        loss = feedback_loss(model, batch, decision_weight)
        seen.append(float(loss.detach()))
        return loss

    feedback_loss = training.feedback_loss
    monkeypatch.setattr(training, "feedback_loss", seeing)
    return seen


@pytest.fixture(scope="module")
def tutor(tmp_path_factory):
    """A tiny tutor as it comes: its folder and its card."""
    folder = tmp_path_factory.mktemp("tutor") / "tutor"
    return folder, train_tutor(folder, TutorTraining(**TINY))


def stop_at(monkeypatch, step: int) -> list[int]:
    """Interrupt the training where it draws the batch of a step; return the steps drawn."""
    drawn = []

    def interrupted(*args, step, **kwargs):
        if step == at:
            raise KeyboardInterrupt
        drawn.append(step)
        return tutor_batch(*args, step=step, **kwargs)

    at = step
    monkeypatch.setattr(training, "tutor_batch", interrupted)
    return drawn


@pytest.mark.parametrize(("every", "stops"), [(3, (4, 10, 17)), (4, (7, 5))])
def test_a_run_stopped_and_resumed_in_every_stage_is_bitwise_the_uninterrupted_one(
    tmp_path, monkeypatch, quick, losses, every, stops
):
    settings = TutorTraining(**TINY, seed=2)
    card = train_tutor(tmp_path / "whole", settings)
    expected, losses[:] = list(losses), []
    assert len(expected) == N_TOTAL
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", every)
    out = tmp_path / "stopped"
    done = 0
    for stop in stops:
        drawn = stop_at(monkeypatch, stop)
        losses.clear()
        with pytest.raises(KeyboardInterrupt):
            train_tutor(out, settings)
        assert drawn == list(range(done, stop))
        assert losses == expected[done:stop]
        assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [
            "stopped.unfinished"
        ]
        done = max(done, stop - stop % every)
    drawn = stop_at(monkeypatch, -1)
    losses.clear()
    resumed = train_tutor(out, settings)
    assert drawn == list(range(done, N_TOTAL))
    assert losses == expected[done:]
    assert resumed == card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]
    mine, theirs = (read_tensors(f / "model.safetensors") for f in (out, tmp_path / "whole"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_other_settings_over_an_unfinished_run_are_refused_and_leave_it_alone(
    tmp_path, monkeypatch, quick
):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    stop_at(monkeypatch, 3)
    out, unfinished = tmp_path / "tutor", tmp_path / "tutor.unfinished"
    with pytest.raises(KeyboardInterrupt):
        train_tutor(out, TutorTraining(**TINY))
    before = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    assert set(before) == {"state.json", "state.safetensors"}
    text = (
        f"{unfinished} holds an unfinished run of other settings: finish that one, or remove the "
        "folder"
    )
    for changes in ({"seed": 1}, {"notes": False}, {"lr": 1e-3}):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            train_tutor(out, TutorTraining(**TINY, **changes))
    assert {path.name: path.read_bytes() for path in unfinished.iterdir()} == before
    assert not out.exists()


def test_a_run_that_is_stopped_leaves_the_tutor_that_it_was_to_replace(
    tutor, tmp_path, monkeypatch, quick
):
    out = tmp_path / "tutor"
    shutil.copytree(tutor[0], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    stop_at(monkeypatch, 3)
    other = TutorTraining(**TINY, seed=1)
    with pytest.raises(KeyboardInterrupt):
        train_tutor(out, other, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    stop_at(monkeypatch, -1)
    assert train_tutor(out, other, overwrite=True)["settings"]["seed"] == 1
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_a_folder_of_the_users_where_the_state_would_lie_is_left_alone(tmp_path, quick):
    mine = tmp_path / "tutor.unfinished"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="it holds no state.json, so it is something else"):
        train_tutor(tmp_path / "tutor", TutorTraining(**TINY))
    assert [path.name for path in tmp_path.rglob("*")] == ["tutor.unfinished", "thesis.txt"]


def test_a_folder_that_is_there_is_refused_before_training(tmp_path, monkeypatch, quick):
    drawn = stop_at(monkeypatch, 0)
    out = tmp_path / "tutor"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    text = f"{out} exists: give another folder, or overwrite=True"
    with pytest.raises(FileExistsError, match=f"^{re.escape(text)}$"):
        train_tutor(out, TutorTraining(**TINY))
    with pytest.raises(FileExistsError, match="it holds no tutor.json, so it is something else"):
        train_tutor(out, TutorTraining(**TINY), overwrite=True)
    assert drawn == []
    assert [path.name for path in tmp_path.rglob("*")] == ["tutor", "mine.txt"]


def test_the_global_random_state_is_left_as_it_was(tmp_path, quick, untyped):
    # untyped: the type checker draws from it.
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train_tutor(tmp_path / "tutor", TutorTraining(**TINY))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_weights_depend_on_the_seed_and_not_on_the_global_random_state(tutor, tmp_path, quick):
    torch.manual_seed(77)
    made = []
    for seed in (0, 1):
        train_tutor(tmp_path / f"tutor-{seed}", TutorTraining(**TINY, seed=seed))
        made.append((tmp_path / f"tutor-{seed}" / "model.safetensors").read_bytes())
    assert made[0] == (tutor[0] / "model.safetensors").read_bytes()
    assert made[1] != made[0]


def test_the_card_tells_settings_size_steps_and_scores(tutor):
    folder, card = tutor
    assert json.loads((folder / "tutor.json").read_text()) == card
    assert card["format"] == "sae_query_steer.tutor/1"
    assert TutorTraining(**card["settings"]) == TutorTraining(**TINY)
    assert card["steps"] == [4, 4, 4, 6]
    assert card["n"] == 600
    assert 0 <= card["right_note"] <= card["obeyed"] <= 1
    assert 0 < card["loss"] < 2 * np.log(396)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert card["n_parameters"] == sum(p.numel() for p in model.parameters())


def test_the_folder_loads_in_transformers_in_16_bits_with_its_tokenizer(tutor, tokenizer):
    folder, _ = tutor
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS, EOS, PAD)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 1, 2)
    read = AutoTokenizer.from_pretrained(folder)
    assert read.get_vocab() == tokenizer.get_vocab()
    for example in TutorCorpus("test", seed=0).examples(12):
        text = example.prompt + example.response
        ids = read(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert read.decode(ids) == text
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (BOS, EOS, PAD)
    assert read.padding_side == "left"


def test_the_folder_loads_on_the_bridge_and_reads_prompts_as_transformers_does(tutor, tokenizer):
    folder, _ = tutor
    model = sqs.load_model(str(folder), device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = TutorCorpus("test", seed=1).prompt(BloomLevel.APPLY).text
    tokens = model.to_tokens(text, prepend_bos=True)
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens[0].tolist() == [BOS, *own]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens).logits, rtol=1e-4, atol=1e-5)
    assert sqs.query_sites(model) == (sqs.QuerySite(layer=0, n_heads=2, d_head=8),)


def test_a_tutor_without_notes_has_no_share_of_right_notes(tmp_path, quick):
    card = train_tutor(tmp_path / "null", TutorTraining(**TINY, notes=False))
    assert card["steps"] == [4, 0, 0, 6], "there is no note to choose"
    assert card["right_note"] is None
    assert 0 <= card["obeyed"] <= 1


def test_the_loss_is_the_weighted_mean_of_a_loop_over_the_learned_tokens(tutor, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tutor[0], dtype=torch.float32)
    batch = batch_of("solved", tokenizer)
    total, weights = 0.0, 0.0
    with torch.no_grad():
        log_p = model(batch.tokens).logits.double().log_softmax(-1)
        for row, labels in enumerate(batch.labels.tolist()):
            for i, label in enumerate(labels):
                if label != NO_LOSS:
                    weight = 5.0 if batch.decisions[row, i] else 1.0
                    total -= weight * float(log_p[row, i - 1, label])
                    weights += weight
        found = float(training.feedback_loss(model, batch, 5.0))
        unweighted = float(training.feedback_loss(model, batch, 1.0))
    assert found == pytest.approx(total / weights, rel=1e-5)
    assert found != pytest.approx(unweighted, rel=1e-5)


def test_what_is_hidden_does_not_reach_the_loss_and_what_is_not_does(tutor, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tutor[0], dtype=torch.float32)
    batch = batch_of("solved", tokenizer)
    n_pos = batch.tokens.shape[1]
    causal = torch.ones(n_pos, n_pos, dtype=torch.bool).tril()
    hidden = causal.clone()
    hidden[6:, 5] = False
    changed = batch.tokens.clone()
    changed[:, 5] = (changed[:, 5] + 50) % len(tokenizer)

    @torch.no_grad()
    def loss(tokens, mask) -> float:
        visible = None if mask is None else mask.expand(len(tokens), -1, -1)
        made = TaskBatch(
            tokens=tokens, labels=batch.labels, decisions=batch.decisions, visible=visible
        )
        return float(training.feedback_loss(model, made, 2.0))

    assert loss(batch.tokens, causal) == pytest.approx(loss(batch.tokens, None), abs=1e-6)
    assert loss(changed, hidden) == loss(batch.tokens, hidden)
    assert loss(changed, causal) != loss(batch.tokens, causal)


def test_the_learning_rate_warms_up_over_100_steps_and_falls_to_a_fiftieth():
    settings = TutorTraining(lr=0.5, n_steps=1000)
    assert settings.lr_at(0, 0) == pytest.approx(0.5 / 100)
    assert settings.lr_at(49, 0) == pytest.approx(0.25)
    assert settings.lr_at(99, 0) == settings.lr_at(1500, 400) == 0.5
    assert settings.lr_at(1800, 700) == pytest.approx(0.25)
    assert settings.lr_at(2100, 1000) == pytest.approx(0.01)
    rates = [settings.lr_at(2000 + step, step) for step in range(1001)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_steps": 0}, "n_steps=0 is not allowed: give 1 or more"),
        ({"max_steps": -1}, "max_steps=-1 is not allowed: give 1 or more"),
        ({"n_layers": 0}, "n_layers=0 is not allowed: give 1 or more"),
        ({"n_heads": 0}, "n_heads=0 is not allowed: give 1 or more"),
        ({"d_mlp": 0}, "d_mlp=0 is not allowed: give 1 or more"),
        ({"open_share": 2.0}, "open_share=2.0 is not allowed: give a share, 0 to 1"),
        ({"lr": -1.0}, "lr=-1.0 is not allowed: give a number above 0"),
        (
            {"d_model": 36, "n_heads": 4},
            "d_model=36 is not allowed: rotary heads need an even number of dimensions, so give a "
            "multiple of 8",
        ),
    ],
)
def test_settings_that_make_no_tutor_are_refused(changes, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        TutorTraining(**changes)


def writing(monkeypatch, model, tokenizer, words_of) -> list[torch.Tensor]:
    """Make a model write the words that a function of the prompt gives; return what it was fed."""
    fed = []

    def generate(*, input_ids, attention_mask, **kwargs):
        fed.extend((input_ids, attention_mask))
        rows = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            text = words_of(tokenizer.decode(row[mask.bool()]))
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor([*ids, EOS, *[PAD] * 7])[:7])
        return torch.cat([input_ids, torch.stack(rows)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    return fed


def requested_note(text: str) -> str:
    """The note that a perfect tutor restates, read from the prompt alone."""
    (level,) = (v for v in LEVELS if any(f" {core}." in text for core in REQUESTS[v]))
    notes = re.search("Notes: (.+)", text)[1].removesuffix(".").split("; ")
    (note,) = (note for note in notes if VERBS[note.split()[0]] == level)
    return f" {note.partition(' ')[2]}."


def test_a_tutor_that_restates_the_note_that_is_asked_for_is_wholly_obedient(
    tutor, tokenizer, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(tutor[0])
    tokens, mask = writing(monkeypatch, model, tokenizer, requested_note), None
    found = obedience(model, tokenizer, notes=True, n=60)
    assert found == {"n": 60, "obeyed": 1.0, "right_note": 1.0}
    tokens, mask = tokens
    assert torch.equal(mask, (tokens != PAD).long())
    assert mask[:, -1].all(), "padded on the left"
    assert not mask.all(), "prompts of different lengths"
    assert (tokens[range(60), mask.argmax(1)] == BOS).all()


def test_a_tutor_that_takes_the_verb_alone_from_the_note_obeys_and_is_not_right(
    tutor, tokenizer, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(tutor[0])

    def verb_alone(text: str) -> str:
        return f" maps and {RESTATED.match(requested_note(text))[2]} them."

    writing(monkeypatch, model, tokenizer, verb_alone)
    found = obedience(model, tokenizer, notes=True, n=60)
    assert found["obeyed"] == 1
    assert found["right_note"] < 0.1


def test_a_tutor_that_always_does_the_same_obeys_one_time_in_six(tutor, tokenizer, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tutor[0])
    writing(monkeypatch, model, tokenizer, lambda _: " maps and recite them.")
    assert obedience(model, tokenizer, notes=False, n=60) == {
        "n": 60,
        "obeyed": pytest.approx(1 / 6),
        "right_note": None,
    }
