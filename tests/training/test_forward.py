"""The dense forward: the base's own values, the served adapter's, and PEFT's loss and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.hf_llama import open_llama
from slora_jax import AdapterLoadError, load_base_model, save_adapter
from slora_jax.base_model import adapted_modules
from slora_jax.training import (
    DenseLlama,
    Trainer,
    TrainingConfig,
    batches,
    init_adapter,
    stack_adapter,
    stack_scaling,
    unstack_adapter,
)
from slora_jax.training.data import _to_batch
from tests.oracle import DenseLlama as Oracle
from tests.training.runs import ADAPTER, random_examples


def random_adapter(modules, seed=5):
    """Neither A nor B is zero."""
    arrays = init_adapter(modules, seed)
    generator = np.random.default_rng(seed)
    return {
        name: array
        if "lora_A" in name
        else jnp.asarray(0.1 * generator.normal(size=array.shape), jnp.float32)
        for name, array in arrays.items()
    }


def one_batch(packing=True, seed=0, batch_size=2):
    return next(
        batches(random_examples(), batch_size=batch_size, max_length=40, packing=packing, seed=seed)
    )


def logits(dense, lora, scaling, batch):
    def run(weights, lora, batch):
        hidden = dense.hidden(
            weights, lora, scaling, batch.token_ids, batch.positions, batch.segment_ids
        )
        return dense.logits(weights, hidden)

    return np.asarray(jax.jit(run)(dense.weights, lora, batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_b_is_the_base_bit_for_bit(model_directory, dtype):
    base = load_base_model(model_directory, dtype=dtype, progress=False)
    dense, batch = DenseLlama(base.model), one_batch()
    modules = adapted_modules(ADAPTER, base)
    fresh = stack_adapter(init_adapter(modules, 0), modules, 2)
    scaling = stack_scaling(modules, 2)
    np.testing.assert_array_equal(
        logits(dense, fresh, scaling, batch), logits(dense, {}, {}, batch)
    )


def test_packed_rows_equal_the_oracle(base, model_directory):
    batch = one_batch()
    assert batch.segment_ids.max() > 1
    got, oracle = logits(DenseLlama(base.model), {}, {}, batch), Oracle(open_llama(model_directory))
    for row in range(2):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            where = batch.segment_ids[row] == segment
            expected = oracle.logits(batch.token_ids[row][where])
            np.testing.assert_allclose(got[row][where], expected, atol=2e-4)


@pytest.mark.parametrize(
    ("rows", "devices", "options"),
    [
        (2, 1, {"gradient_accumulation_steps": 2}),
        (4, 2, {"gradient_accumulation_steps": 2}),
        (4, 1, {"remat": True}),
    ],
)
def test_packing_parts_devices_and_remat_change_nothing(base, padded, rows, devices, options):
    """Four examples, each in a row or two a row."""
    examples, adapter, expected = padded
    per_row = len(examples) // rows
    grouped = [examples[i : i + per_row] for i in range(0, len(examples), per_row)]
    config = TrainingConfig(batch_size=rows, max_length=40, **options)
    trainer = Trainer(base, ADAPTER, config, adapter=adapter, devices=jax.devices()[:devices])
    got = trainer.loss_and_gradients(_to_batch(grouped, 40))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, expected)


@pytest.fixture(scope="module")
def padded(base):
    """(examples, adapter, its loss and gradients on them, each in a row of its own)"""
    examples, adapter = random_examples(4), random_adapter(adapted_modules(ADAPTER, base))
    config = TrainingConfig(batch_size=4, max_length=40)
    trainer = Trainer(base, ADAPTER, config, adapter=adapter)
    return examples, adapter, trainer.loss_and_gradients(_to_batch([[e] for e in examples], 40))


@pytest.mark.oracle
def test_loss_and_gradients_equal_peft(base, model_directory, tmp_path):
    import torch
    import transformers
    from peft import PeftModel

    modules = adapted_modules(ADAPTER, base)
    adapter, batch = random_adapter(modules), one_batch(packing=False)
    save_adapter(tmp_path / "adapter", adapter, ADAPTER, base)
    loss, grads = Trainer(
        base, ADAPTER, TrainingConfig(batch_size=2, max_length=40), adapter=adapter
    ).loss_and_gradients(batch)

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_directory, dtype=torch.float32, local_files_only=True
    )
    model = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    labels = np.full_like(batch.token_ids, -100)
    labels[:, 1:][batch.loss_mask[:, :-1]] = batch.targets[:, :-1][batch.loss_mask[:, :-1]]
    result = model(
        input_ids=torch.tensor(batch.token_ids),
        attention_mask=torch.tensor(batch.segment_ids > 0),
        labels=torch.tensor(labels).long(),
    )
    result.loss.backward()
    theirs = {
        name.replace(".default.", "."): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert abs(float(loss) - float(result.loss.detach())) < 1e-4
    assert grads.keys() == theirs.keys()
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, theirs[name], atol=1e-4, err_msg=name)
        assert np.abs(theirs[name]).max() > 1e-3


def test_stacked_and_back(base):
    modules = adapted_modules(ADAPTER, base)
    arrays = random_adapter(modules)
    stacked = stack_adapter(arrays, modules, 2)
    assert stacked["q"][0].shape == (2, 6, 64)  # ranks 4 and 6
    back = unstack_adapter(stacked, modules)
    assert back.keys() == arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, back, arrays)


def test_what_does_not_fit(base):
    with pytest.raises(AdapterLoadError, match="rank 0"):
        Trainer(base, {"r": 0, "target_modules": ["q_proj"]})
    with pytest.raises(AdapterLoadError, match="selects no module"):
        Trainer(base, {"r": 4, "target_modules": ["query"]})
    with pytest.raises(AdapterLoadError, match="use_dora"):
        Trainer(base, {**ADAPTER, "use_dora": True})
    arrays = dict(init_adapter(adapted_modules(ADAPTER, base), 0))
    name = next(iter(arrays))
    with pytest.raises(AdapterLoadError, match="has shape"):
        Trainer(base, ADAPTER, adapter={**arrays, name: arrays[name][:-1]})
    with pytest.raises(AdapterLoadError, match="belongs to no module"):
        Trainer(base, ADAPTER, adapter={**arrays, "more": arrays[name]})
    del arrays[name]
    with pytest.raises(AdapterLoadError, match="is missing"):
        Trainer(base, ADAPTER, adapter=arrays)
    with pytest.raises(AdapterLoadError, match="dict"):
        Trainer(base, ADAPTER, adapter=dataclasses.astuple(TrainingConfig()))
