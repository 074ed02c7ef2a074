"""The loop: it learns, it is a function of its seed, and a killed run ends as an unbroken one."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from slora_jax import (
    LLM,
    AdapterLoadError,
    ConfigError,
    InvalidRequestError,
    TrainingError,
    load_base_model,
    merge_adapter,
    write_llama,
)
from slora_jax.base_model import adapted_modules
from slora_jax.training import (
    Example,
    Trainer,
    TrainingConfig,
    batches,
    chat_example,
    init_adapter,
)
from tests.training.runs import ADAPTER, RUN, random_examples


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory):
    """(losses, adapter, checkpoints) of the whole run"""
    directory = tmp_path_factory.mktemp("unbroken")
    trainer = Trainer(base, ADAPTER, RUN)
    losses = trainer.fit(random_examples(), directory=directory, progress=False)
    return losses, trainer.adapter, directory


def test_it_learns_and_leaves_the_base_alone(base, model_directory, unbroken):
    losses, _, _ = unbroken
    assert len(losses) == RUN.num_steps
    assert losses[-1] < 0.2 * losses[0]
    untouched = load_base_model(model_directory, progress=False)
    jax.tree.map(
        np.testing.assert_array_equal, *map(jax.tree.leaves, (base.model, untouched.model))
    )


def test_a_killed_run_ends_as_an_unbroken_one(base, model_directory, tmp_path, unbroken):
    program = Path(__file__).with_name("killed_run.py")
    killed = subprocess.run(
        [sys.executable, program, model_directory, tmp_path / "run", "18"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    resumed = Trainer(base, ADAPTER, RUN)
    losses = resumed.fit(random_examples(), directory=tmp_path / "run", progress=False)
    assert len(losses) in (8, 16)  # after step 16, or after 8 if that was not yet complete
    assert losses == unbroken[0][-len(losses) :]
    assert_equal(resumed.adapter, unbroken[1])


def test_restored_on_other_meshes(base, unbroken):
    _, adapter, directory = unbroken
    for devices in (jax.devices()[:1], jax.devices()[4:8]):
        trainer = Trainer(base, ADAPTER, RUN, devices=devices)
        assert trainer.fit(random_examples(), directory=directory, progress=False) == []
        assert trainer.step_number == RUN.num_steps
        assert_equal(trainer.adapter, adapter)
        assert trainer._adapter["q"][0].devices() == set(devices)


def test_the_seed_decides_weights_and_order(base):
    modules = adapted_modules(ADAPTER, base)
    one, same, other = (init_adapter(modules, seed) for seed in (1, 1, 2))
    assert_equal(one, same)
    assert not np.array_equal(*(next(iter(arrays.values())) for arrays in (one, other)))

    def first_batches(seed):
        stream = batches(random_examples(), batch_size=2, max_length=16, packing=True, seed=seed)
        return [batch.token_ids.tolist() for batch in itertools.islice(stream, 6)]

    assert first_batches(1) == first_batches(1)
    assert first_batches(1) != first_batches(2)


def test_resume_of_another_run_is_refused(base, unbroken, tmp_path):
    directory = shutil.copytree(unbroken[2], tmp_path / "copy")

    def resume(adapter=ADAPTER, examples=None, on=base, start=None, optimizer=None, **changes):
        run = dataclasses.replace(RUN, **changes)
        trainer = Trainer(on, adapter, run, adapter=start, optimizer=optimizer)
        trainer.fit(examples or random_examples(), directory=directory, progress=False)

    with pytest.raises(TrainingError, match=r"learning_rate=0\.02, now 0\.5"):
        resume(learning_rate=0.5)
    with pytest.raises(TrainingError, match="another adapter"):
        resume(adapter={**ADAPTER, "lora_alpha": 9})
    with pytest.raises(TrainingError, match="another examples"):
        resume(examples=random_examples(seed=1))
    start = unbroken[1]
    with pytest.raises(TrainingError, match="another start"):
        resume(start=start)
    with pytest.raises(TrainingError, match="another optimizer"):
        resume(optimizer=RUN.optimizer())
    with pytest.raises(TrainingError, match="another base"):
        resume(on=merge_adapter(base, start, ADAPTER))
    damaged = list(directory.rglob("arrays/_METADATA"))
    assert damaged
    for file in damaged:
        file.write_text("{")
    with pytest.raises(TrainingError, match="cannot be read"):
        resume()


def test_examples_that_cannot_be_used(base):
    trainer = Trainer(base, ADAPTER, RUN)
    for examples, message in (
        ([], "no examples"),
        ([Example((1,), ())], "at least one token"),
        ([Example((1,) * 32, (1,))], "max_length=32"),
        ([Example((1,), (384,))], "token id 384"),
        (["text"], "give an Example"),
        ([Example("ab", "cd")], "token id 'a'"),
        ([Example((-1,), (1,))], "token id -1"),
        ([Example((1.5,), (1,))], "token id 1.5"),
        ([Example(np.ones(2, int), np.ones(2, int))], "give an Example"),
        (None, "a list of Example"),
    ):
        with pytest.raises(TrainingError, match=message):
            trainer.fit(examples, progress=False)
    assert trainer.step_number == 0
    with pytest.raises(TrainingError, match="assistant's message"):
        chat_example(base, [{"role": "user", "content": "Hi"}])
    with pytest.raises(InvalidRequestError, match="cannot be rendered"):
        chat_example(base, [{"content": "Hi"}, {"role": "assistant", "content": "Ho"}])
    for last in ({"role": "assistant"}, {"role": "assistant", "content": 3}, "Ho"):
        with pytest.raises(TrainingError, match="assistant's message"):
            chat_example(base, [{"role": "user", "content": "Hi"}, last])
    with pytest.raises(TrainingError, match="assistant's message"):
        chat_example(base, 5)


def test_chat_example_is_what_chat_serves(base):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    example = chat_example(base, messages)
    prompt = base.tokenizer.decode(example.prompt, skip_special_tokens=False)
    assert prompt == base.tokenizer.apply_chat_template(messages[:1])
    assert example.completion == (*b"Ho", base.tokenizer.eos_token_id)


def test_numbers_of_numpy_are_numbers():
    config = TrainingConfig(num_steps=np.int64(4), learning_rate=np.float32(0.5), seed=np.int32(3))
    assert config == TrainingConfig(num_steps=4, learning_rate=0.5, seed=3)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["num_steps"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "below 2"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"packing": "no"}, "packing='no'"),
        ({"batch_size": 4, "gradient_accumulation_steps": 3}, "no multiple"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**options)


def test_rows_that_cannot_be_split(base):
    with pytest.raises(ConfigError, match="3 devices"):
        Trainer(base, ADAPTER, RUN, devices=jax.devices()[:3])


@pytest.mark.parametrize("devices", [[], 5, "cpu", ["cpu"], jax.devices()[0]], ids=repr)
def test_devices_that_are_none(base, devices):
    with pytest.raises(ConfigError, match="devices="):
        Trainer(base, ADAPTER, RUN, devices=devices)


def test_an_optimizer_that_is_none(base):
    with pytest.raises(ConfigError, match="optimizer='adam'"):
        Trainer(base, ADAPTER, RUN, optimizer="adam")


def test_dropout_hides_inputs_from_the_adapter(base):
    """Of the last layer's down projection one token's inputs count: that before the completion."""
    config = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["down_proj"],
        "layers_to_transform": [1],
        "lora_dropout": 0.5,
    }
    rng = np.random.default_rng(0)
    zeros = init_adapter(adapted_modules(config, base), seed=0)
    start = {name: rng.standard_normal(array.shape) for name, array in zeros.items()}
    (a_name,) = (name for name in start if "lora_A" in name)
    example = Example((3, 4, 5), (6,))
    run = TrainingConfig(num_steps=2, batch_size=1, max_length=8, packing=False, warmup_steps=0)

    def weights_after(**changes):
        trainer = Trainer(base, config | changes, run, adapter=start)
        trainer.fit([example], progress=False)
        return trainer.adapter[a_name]

    once = Trainer(base, config, dataclasses.replace(run, num_steps=1), adapter=start)
    once.fit([example], progress=False)
    unseen = np.mean(np.all(once.adapter[a_name] == np.float32(start[a_name]), axis=0))
    assert 0.3 < unseen < 0.7
    np.testing.assert_array_equal(weights_after(), weights_after())
    assert np.any(weights_after() != weights_after(lora_dropout=0.0))
    # Each step hides others: after two steps fewer columns have never been seen.
    assert np.mean(np.all(weights_after() == np.float32(start[a_name]), axis=0)) < unseen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": "0.1"}, "lora_dropout='0.1'"),
        ({"init_lora_weights": False}, "init_lora_weights=False"),
    ],
)
def test_peft_options_that_training_refuses(base, changes, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(base, ADAPTER | changes, RUN)


def test_a_base_that_cannot_be_trained_on(base, model_directory):
    with pytest.raises(ConfigError, match="load_base_model"):
        Trainer(str(model_directory), ADAPTER, RUN)
    with pytest.raises(ConfigError, match="TrainingConfig"):
        Trainer(base, ADAPTER, {"num_steps": 3})
    with LLM(model_directory, tensor_parallel=2, progress=False, pool_bytes=2**21) as llm:
        cut = llm.base_model
        for call in (lambda: Trainer(cut, ADAPTER, RUN), lambda: merge_adapter(cut, "nowhere")):
            with pytest.raises(ConfigError, match="cut over 2 devices"):
                call()
        with pytest.raises(ConfigError, match="cut over 2 devices"):
            write_llama(model_directory / "written", cut)
        with pytest.raises(ConfigError, match="to be served on"):
            LLM(cut, progress=False)
    with pytest.raises(ConfigError, match="to be served on"):
        LLM(base, tensor_parallel=2, progress=False)
    with pytest.raises(ConfigError, match="has been closed"):
        Trainer(cut, ADAPTER, RUN)


def test_a_loss_that_is_nan_ends_the_run(base, tmp_path):
    run = dataclasses.replace(RUN, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(TrainingError, match="the loss is"):
        Trainer(base, ADAPTER, run).fit(random_examples(), progress=False)
    zeros = init_adapter(adapted_modules(ADAPTER, base), seed=0)
    name = next(iter(zeros))
    for odd in (np.nan, 1j):
        with pytest.raises(AdapterLoadError, match="finite real"):
            Trainer(base, ADAPTER, RUN, adapter=zeros | {name: np.asarray(zeros[name]) + odd})
    with pytest.raises(AdapterLoadError, match="is no array"):
        Trainer(base, ADAPTER, RUN, adapter=zeros | {name: np.asarray(zeros[name]).tolist()})
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", "~nobody-of-this-name/run"):
        with pytest.raises(TrainingError, match="no checkpoints can be kept"):
            Trainer(base, ADAPTER, RUN).fit(random_examples(), directory=directory)
    with pytest.raises(TrainingError, match="directory=5"):
        Trainer(base, ADAPTER, RUN).fit(random_examples(), directory=5, progress=False)
