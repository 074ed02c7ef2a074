"""Synthetic checkpoints are reproducible, and fit for tests: no near-ties, adapters that matter."""

from pathlib import Path

import pytest

from checkpoints.name_map import TARGETS
from checkpoints.synthetic import write_synthetic_adapter, write_synthetic_llama


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_equal_arguments_give_equal_files(tmp_path: Path):
    config = write_synthetic_llama(tmp_path / "a", seed=4, tie_word_embeddings=True)
    write_synthetic_llama(tmp_path / "b", seed=4, tie_word_embeddings=True)
    write_synthetic_llama(tmp_path / "c", seed=5, tie_word_embeddings=True)
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "c")
    write_synthetic_adapter(tmp_path / "x", config, seed=4)
    write_synthetic_adapter(tmp_path / "y", config, seed=4)
    write_synthetic_adapter(tmp_path / "z", config, seed=5)
    assert files(tmp_path / "x") == files(tmp_path / "y") != files(tmp_path / "z")


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_spread_and_every_adapter_moves_them(tmp_path: Path, tied: bool):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = write_synthetic_llama(tmp_path / "model", tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([list(b"The quick brown fox jumps over the lazy dog")])
    with torch.no_grad():
        base = model(ids).logits[0]
        assert 4 < base.std() < 6
        best = base.topk(2).values
        assert (best[:, 0] - best[:, 1]).median() > 0.4
        assert len(base.argmax(-1).unique()) > 10
        for number, target in enumerate(TARGETS):
            path = tmp_path / target
            write_synthetic_adapter(path, config, seed=number, targets=(target,), rank=2)
            adapted = peft.PeftModel.from_pretrained(model, path)(ids).logits[0]
            assert (adapted - base).std() > 0.5, target
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
