"""The loop: it learns, it is a function of its seed, and a killed run ends as an unbroken one."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from slora_jax import ConfigError, InvalidRequestError, TrainingError
from slora_jax.training import Example, Trainer, TrainingConfig, chat_example
from tests.training.runs import ADAPTER, RUN, random_examples


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


@pytest.fixture(scope="module")
def unbroken(base):
    """(losses, adapter) of the whole run"""
    trainer = Trainer(base, ADAPTER, RUN)
    return trainer.fit(random_examples(), progress=False), trainer.adapter


def test_it_learns_and_leaves_the_base_alone(base):
    before = [np.array(leaf) for leaf in jax.tree.leaves(base.model)]
    config = dataclasses.replace(RUN, num_steps=40, learning_rate=2e-2)
    losses = Trainer(base, ADAPTER, config).fit(random_examples(4), progress=False)
    assert len(losses) == 40
    assert losses[-1] < 0.2 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.leaves(base.model))


def test_a_killed_run_ends_as_an_unbroken_one(base, model_directory, tmp_path, unbroken):
    program = Path(__file__).with_name("killed_run.py")
    killed = subprocess.run(
        [sys.executable, program, model_directory, tmp_path / "run", "5"],
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    resumed = Trainer(base, ADAPTER, RUN)
    losses = resumed.fit(random_examples(), directory=tmp_path / "run", progress=False)
    assert 2 <= len(losses) <= 4  # from step 2 or 4: the newest that was complete
    assert losses == unbroken[0][-len(losses) :]
    assert_equal(resumed.adapter, unbroken[1])

    done = Trainer(base, ADAPTER, RUN)
    assert done.fit(random_examples(), directory=tmp_path / "run", progress=False) == []
    assert_equal(done.adapter, unbroken[1])


def test_another_seed_is_another_run(base, unbroken):
    other = Trainer(base, ADAPTER, dataclasses.replace(RUN, seed=1))
    assert other.fit(random_examples(), progress=False) != unbroken[0]


def test_restored_on_another_mesh(base, tmp_path):
    config = dataclasses.replace(RUN, batch_size=4, num_steps=2)
    two = Trainer(base, ADAPTER, config, devices=jax.devices()[:2])
    two.fit(random_examples(), directory=tmp_path, progress=False)
    four = Trainer(base, ADAPTER, config, devices=jax.devices()[4:8])
    assert four.fit(random_examples(), directory=tmp_path, progress=False) == []
    assert four.step_number == 2
    assert_equal(four.adapter, two.adapter)
    assert four._adapter["q"][0].devices() == set(jax.devices()[4:8])


def test_resume_of_another_run_is_refused(base, tmp_path):
    one_step = dataclasses.replace(RUN, num_steps=1)
    Trainer(base, ADAPTER, one_step).fit(random_examples(), directory=tmp_path, progress=False)

    def resume(adapter=ADAPTER, examples=None, **changes):
        trainer = Trainer(base, adapter, dataclasses.replace(one_step, **changes))
        trainer.fit(examples or random_examples(), directory=tmp_path, progress=False)

    with pytest.raises(TrainingError, match=r"learning_rate=0\.01, now 0\.5"):
        resume(learning_rate=0.5)
    with pytest.raises(TrainingError, match="another adapter"):
        resume(adapter={**ADAPTER, "lora_alpha": 9})
    with pytest.raises(TrainingError, match="another examples"):
        resume(examples=random_examples(seed=1))
    for file in tmp_path.rglob("*arrays/_METADATA"):
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
    ):
        with pytest.raises(TrainingError, match=message):
            trainer.fit(examples, progress=False)
    assert trainer.step_number == 0
    with pytest.raises(TrainingError, match="assistant's message"):
        chat_example(base, [{"role": "user", "content": "Hi"}])
    with pytest.raises(InvalidRequestError, match="cannot be rendered"):
        chat_example(base, [{"content": "Hi"}, {"role": "assistant", "content": "Ho"}])


def test_chat_example_is_what_chat_serves(base):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    example = chat_example(base, messages)
    prompt = base.tokenizer.decode(example.prompt, skip_special_tokens=False)
    assert prompt == base.tokenizer.apply_chat_template(messages[:1])
    assert example.completion == (*b"Ho", base.tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 4, "gradient_accumulation_steps": 3}, "no multiple"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**options)


def test_rows_that_cannot_be_split(base):
    with pytest.raises(ConfigError, match="3 devices"):
        Trainer(base, ADAPTER, RUN, devices=jax.devices()[:3])
