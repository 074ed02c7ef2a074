"""Tiny random models of every shape give the dense oracle's tokens and logits, adapters included.

One mixed batch a model, base and two adapters together, prompts longer than a chunk; the full
logits of every computed token are compared, with the float64 oracle on any Python and with
transformers + PEFT where they are installed. Then what must not matter: the kernels' name, the way
the forward pass is compiled, the checkpoint's format; and what may cost a little: the dtype.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slora_jax import LLM, SamplingParams
from slora_jax.forward_programs import LayeredForward, WholeForward
from slora_jax.outputs import RequestOutput
from slora_jax.transfer import unpack
from tests.serving import TinyModel, random_prompts, recorded_logits
from tests.transformers_oracle import TransformersModel

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha_tied": {"num_kv_heads": 4, "tie_word_embeddings": True},
    "mqa_dim64_llama3": {"num_kv_heads": 1, "head_dim": 64, "rope_scaling": LLAMA3},
    "gqa_dim80_tied": {"head_dim": 80, "tie_word_embeddings": True},
    "gqa_dim128_llama3": {"head_dim": 128, "rope_scaling": LLAMA3, "rope_theta": 5e5},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 11},
    "some": {"rank": 4, "targets": ("q", "v", "down"), "layers_to_transform": [1]},
}
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 96, "pool_bytes": 2**23}
PROMPTS = random_prompts((3, 45, 1, 17), seed=1)  # a decode row and six tiles, then decodes
ADAPTER_IDS = [None, "all", "some", "all"]
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)

TOLERANCE = {"float32": 2e-4, "float16": 0.2, "bfloat16": 1.6}
"""Of a logit, where logits spread by 5; of the root mean square, an eighth of it."""


@dataclasses.dataclass(eq=False)
class Run:
    """The mixed batch on one engine."""

    outputs: list[RequestOutput]
    logits: list[np.ndarray]  # per request f32[tokens, vocab]: row t predicts token t + 1

    @classmethod
    def of(cls, llm: LLM) -> "Run":
        with recorded_logits(llm) as recorded:
            outputs = llm.generate(PROMPTS, ADAPTER_IDS, GREEDY, progress=False)
        rows = [recorded[f"{output.request_id}-0"] for output in outputs]
        return cls(outputs, [np.stack([known[t] for t in range(len(known))]) for known in rows])

    @property
    def tokens(self) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self.outputs]

    def computed(self, index: int) -> list[int]:
        """The tokens whose logits are known: prompt and output but for the last."""
        return [*PROMPTS[index], *self.tokens[index][:-1]]


def write(directory, variant: str) -> TinyModel:
    seed = list(VARIANTS).index(variant)
    return TinyModel.write(directory, ADAPTERS, seed=seed, **VARIANTS[variant])


@dataclasses.dataclass(eq=False)
class Served:
    model: TinyModel
    llm: LLM
    run: Run


@pytest.fixture(scope="module", params=VARIANTS)
def served(request, tmp_path_factory):
    seed = list(VARIANTS).index(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    model = TinyModel.write(directory, ADAPTERS, seed=seed, **VARIANTS[request.param])
    with model.serve(**OPTIONS) as llm:
        yield Served(model, llm, Run.of(llm))


only_gqa = pytest.mark.parametrize("served", ["gqa"], indirect=True)


def assert_close(logits: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(logits, expected, atol=tolerance, rtol=0)
    assert np.sqrt(np.mean((logits - expected) ** 2)) < tolerance / 8


def test_tokens_and_logits_equal_the_oracle(served: Served):
    model, run = served.model, served.run
    for index, adapter in enumerate(ADAPTER_IDS):
        assert run.tokens[index] == model.greedy(PROMPTS[index], adapter, NUM_TOKENS)
        expected = model.oracle(adapter).logits(run.computed(index))
        assert_close(run.logits[index], expected, TOLERANCE["float32"])


@pytest.mark.oracle
def test_tokens_and_logits_equal_transformers_and_peft(served: Served):
    reference = TransformersModel(served.model.directory, served.model.adapters)
    for index, adapter in enumerate(ADAPTER_IDS):
        tokens, logits = reference.generate(PROMPTS[index], adapter, NUM_TOKENS, eos_token_ids=())
        assert served.run.tokens[index] == tokens
        ours = served.run.logits[index][len(PROMPTS[index]) - 1 :]
        assert_close(ours, logits, TOLERANCE["float32"])


# --- what must not matter ---


@only_gqa
def test_prompts_in_chunks_give_the_same_tokens(served: Served):
    with served.model.serve(**{**OPTIONS, "max_num_batched_tokens": 32}) as llm:
        assert Run.of(llm).tokens == served.run.tokens
        assert llm.stats().steps > served.llm.stats().steps


@only_gqa
def test_reference_kernels_give_the_same_tokens(served: Served):
    with served.model.serve(**OPTIONS, kernels="reference") as llm:
        assert Run.of(llm).tokens == served.run.tokens


@only_gqa
def test_one_program_or_one_a_layer_give_the_same_hidden_states(served: Served):
    runner = served.llm._engine._runner
    layered = runner._forward
    assert isinstance(layered, LayeredForward)  # what a CPU gets
    whole = WholeForward(served.llm._loaded.model, runner.view, served.llm._mesh, {})
    differences = []

    def both(pool, sampled, batch):
        of_whole, _ = whole(jax.tree.map(jnp.copy, pool), sampled, batch)
        hidden, pool = layered(pool, sampled, batch)
        differences.append(float(jnp.max(jnp.abs(hidden.all - of_whole.all))))
        assert jnp.array_equal(hidden.all[unpack(batch).ending_row], hidden.ending)
        return hidden, pool

    both.num_compiles = layered.num_compiles
    runner._forward = both
    params = SamplingParams(temperature=0, max_tokens=3)
    served.llm.generate(PROMPTS, ADAPTER_IDS, params, progress=False)
    runner._forward = layered
    assert len(differences) == 3
    assert max(differences) < 1e-5


@only_gqa
def test_an_orbax_checkpoint_gives_the_same_tokens(served: Served, tmp_path):
    served.llm.save(tmp_path / "orbax")
    restored = dataclasses.replace(served.model, directory=tmp_path / "orbax")
    with restored.serve(**OPTIONS) as llm:
        assert Run.of(llm).tokens == served.run.tokens


# --- what may cost a little ---


@only_gqa
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(served: Served, dtype: str):
    with served.model.serve(**{**OPTIONS, "dtype": dtype}) as llm:
        run = Run.of(llm)
    for index, adapter in enumerate(ADAPTER_IDS):
        exact = served.model.oracle(adapter).logits(run.computed(index))
        assert_close(run.logits[index], exact, TOLERANCE[dtype])
        chosen = exact[np.arange(-NUM_TOKENS, 0), run.tokens[index]]
        assert (chosen > exact[-NUM_TOKENS:].max(axis=1) - TOLERANCE[dtype]).all()
