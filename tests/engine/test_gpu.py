"""The engine with the GPU kernels, beside plain XLA on the same GPU."""

import numpy as np
import pytest

from checkpoints.synthetic import write_synthetic_adapter, write_synthetic_llama
from slora_jax import LLM, SamplingParams

pytestmark = pytest.mark.gpu

RANKS = {"narrow": 8, "odd": 20, "wide": 64}
OPTIONS = {"max_num_seqs": 24, "max_model_len": 512, "pool_bytes": 2**28, "progress": False}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu")
    write_synthetic_llama(
        path / "model",
        seed=3,
        hidden_size=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=1024,
        max_position_embeddings=512,
    )
    return path


def serve(directory, kernels, lengths, names, dtype="bfloat16"):
    """(prompt log-probabilities, tokens) of each request."""
    rng = np.random.default_rng(0)
    with LLM(directory / "model", dtype=dtype, kernels=kernels, **OPTIONS) as llm:
        for seed, (name, rank) in enumerate(RANKS.items()):
            path = directory / name
            if not path.exists():
                about = llm._loaded.hyperparameters
                write_synthetic_adapter(path, about, seed=seed, rank=rank, scale=0.5)
            llm.load_adapter(name, path)
        prompts = [rng.integers(0, llm.vocab_size, length).tolist() for length in lengths]
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, prompt_logprobs=0)
        outputs = llm.generate(prompts, names, params, progress=False)
        assert llm.engine.view.kernels == kernels
    scores = [
        np.array(
            [p[t].logprob for t, p in zip(o.prompt_token_ids, o.prompt_logprobs, strict=True) if p]
        )
        for o in outputs
    ]
    return scores, [output.outputs[0].token_ids for output in outputs]


def test_kernels_score_prompts_as_xla_does(directory):
    lengths = [5, 300, 64, 17, 129, 1, 40, 2] * 3
    names = [None, *RANKS] * 6
    by_kernels, tokens = serve(directory, "gpu", lengths, names)
    by_xla, other_tokens = serve(directory, "xla", lengths, names)
    exact, _ = serve(directory, "xla", lengths, names, dtype="float32")
    # What bfloat16 itself costs is the measure: kernels may not add to it.
    ours, theirs, exact = map(np.concatenate, (by_kernels, by_xla, exact))
    for over, bound in ((np.mean, 1.1), (np.max, 1.5)):
        rounding = over((theirs - exact) ** 2) ** 0.5
        assert over((ours - exact) ** 2) ** 0.5 < bound * rounding
    same = [a[:8] == b[:8] for a, b in zip(tokens, other_tokens, strict=True)]
    assert np.mean(same) > 0.8  # bfloat16: near ties may fall either way
