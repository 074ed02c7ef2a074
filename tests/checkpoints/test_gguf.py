"""GGUF to Hugging Face directories: the numbers, the tokenizer, and what is refused."""

import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from checkpoints import CheckpointError
from checkpoints.gguf import convert_gguf
from checkpoints.hf_llama import open_llama
from checkpoints.name_map import hf_name
from checkpoints.tokenizer import Tokenizer
from tests.checkpoints.tiny_gguf import TEMPLATE, write_tiny_gguf

Quantization = gguf.GGMLQuantizationType


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Quantization.F32, Quantization.F16, Quantization.Q4_1])
def test_weights_and_config(tmp_path: Path, kind, tied: bool):
    expected = write_tiny_gguf(tmp_path / "m.gguf", tmp_path / "s", quantization=kind, tied=tied)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    model = open_llama(tmp_path / "out")
    assert model.config == {
        **open_llama(tmp_path / "s").config,
        "max_position_embeddings": 512,
        "bos_token_id": 257,
        "eos_token_ids": (258,),
    }
    assert set(model.names()) == set(expected)
    for name, weight in expected.items():
        np.testing.assert_array_equal(model.read(name), weight)
    if kind == Quantization.F32:
        original = open_llama(tmp_path / "s")
        for name in model.names():
            np.testing.assert_array_equal(model.read(name), original.read(name))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.gguf", "out", "s"]


@pytest.mark.slow  # transformers takes 10 s to get ready for its first GGUF
@pytest.mark.oracle
def test_bits_equal_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    write_tiny_gguf(tmp_path / "m.gguf", tmp_path / "s", quantization=Quantization.Q8_0)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert_equal_to_transformers(transformers, torch, tmp_path / "m.gguf", tmp_path / "out")


def assert_equal_to_transformers(transformers, torch, file: Path, directory: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    ours = open_llama(directory)
    for name in ours.names():
        assert ours.read(name).tobytes() == theirs[hf_name(name)].numpy().tobytes(), name


def test_tokenizer(tmp_path: Path):
    write_tiny_gguf(tmp_path / "m.gguf", tmp_path / "s")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_directory(tmp_path / "out")
    assert tokenizer.special_ids == {256, 257, 258}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (257, 258)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "x"
    assert TEMPLATE not in (tmp_path / "out/tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not supported"),
        ({"llama.rope.scaling.type": "linear"}, "rope scaling in GGUF is not supported"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.attention.key_length": 16}, "sizes differ"),
        ({"llama.block_count": None}, r"llama.block_count is missing"),
        ({"llama.block_count": "two"}, r"llama.block_count has the unexpected value 'two'"),
        ({"llama.block_count": 3}, r"missing tensor 'blk.2.attn_norm.weight'"),
        ({"llama.block_count": 1}, r"unexpected tensor 'blk.1.attn_k.weight'"),
        ({"llama.block_count": 0}, "inconsistent sizes"),
        ({"llama.attention.head_count": 0}, "must be above 0"),
        ({"llama.attention.head_count_kv": 3}, "inconsistent sizes"),
        ({"llama.feed_forward_length": 65}, r"has shape \[64, 32\], expected \[65, 32\]"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama' with pre-tokenizer 'smollm'"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe' is not supported"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer None"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "expected"),
        ({"tokenizer.ggml.token_type": [1]}, "token list is inconsistent"),
        ({"tokenizer.ggml.tokens": list(range(384))}, "must be a list of strings"),
        ({"tokenizer.ggml.merges": [1, 2]}, "must be a list of strings"),
        ({"tokenizer.ggml.merges": ["no such"]}, "tokenizer is inconsistent"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id=999 is no token"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 9999}, "no token"),
    ],
)
def test_what_is_refused(tmp_path: Path, metadata, message: str):
    write_tiny_gguf(tmp_path / "m.gguf", tmp_path / "s", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.gguf", "s"]


def test_biases_and_rope_factors(tmp_path: Path):
    write_tiny_gguf(tmp_path / "a.gguf", tmp_path / "s", extra_tensors=("blk.0.attn_q.bias",))
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'blk.0.attn_q.bias'"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    write_tiny_gguf(tmp_path / "b.gguf", tmp_path / "t", extra_tensors=("rope_freqs.weight",))
    with pytest.raises(CheckpointError, match="rope scaling in GGUF"):
        convert_gguf(tmp_path / "b.gguf", tmp_path / "out")


def test_bos_before_every_text(tmp_path: Path):
    metadata = {"tokenizer.ggml.add_bos_token": True}
    write_tiny_gguf(tmp_path / "m.gguf", tmp_path / "s", metadata=metadata)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_directory(tmp_path / "out")
    assert tokenizer.encode("<plain>") == [257, 260]


@pytest.mark.parametrize("keep", [0, 3, 24, 1000, -100])
def test_truncated_files(tmp_path: Path, keep: int):
    file = tmp_path / "m.gguf"
    write_tiny_gguf(file, tmp_path / "s")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or corrupt GGUF"):
        convert_gguf(file, tmp_path / "out")


def test_paths_and_packages_that_are_not_there(tmp_path: Path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no.gguf: no such file"):
        convert_gguf(tmp_path / "no.gguf", tmp_path / "out")
    write_tiny_gguf(tmp_path / "m.gguf", tmp_path / "s")
    with pytest.raises(CheckpointError, match="already exists and is not empty"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "s")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r'pip install "slora-jax\[gguf\]"'):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch):
    write_tiny_gguf(tmp_path / "m.gguf", tmp_path / "s")

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoints.gguf.write_json", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "s"]
