"""The shipped adapters do their jobs: a slice of what examples/score_demo_adapters.py measures."""

import json

import pytest

from checkpoints.sources import DEMO_ADAPTERS, DEMO_MODEL
from examples.demo_tasks import TASKS, conversation, is_correct
from slora_jax import LLM, SamplingParams

COUNT = 3


@pytest.mark.slow
def test_each_adapter_does_its_own_job_in_one_batch():
    questions = []
    for name, task in TASKS.items():
        for text, expected in task.held_out_examples(COUNT):
            questions += [(name, text, expected), (None, text, expected)]
    with LLM(
        DEMO_MODEL, dtype="float32", max_model_len=256, max_num_seqs=16, pool_bytes=2**28
    ) as llm:
        for name in TASKS:
            llm.load_adapter(name, DEMO_ADAPTERS / name)

        def ask(questions):
            greedy = [
                SamplingParams(temperature=0, max_tokens=48 if adapter else 16)
                for adapter, _, _ in questions
            ]
            conversations = [conversation(text) for _, text, _ in questions]
            adapters = [adapter for adapter, _, _ in questions]
            outputs = llm.chat(conversations, adapters, greedy, progress=False)
            return [output.outputs[0].text for output in outputs]

        answers = ask(questions)
        right = [is_correct(a, q[2]) for a, q in zip(answers, questions, strict=True)]
        assert sum(right[0::2]) >= 0.8 * COUNT * len(TASKS)
        assert sum(right[1::2]) <= 0.2 * COUNT * len(TASKS)
        alone = [index for index, question in enumerate(questions) if question[0] == "sql"]
        assert ask([questions[i] for i in alone]) == [answers[i] for i in alone]


def test_every_task_ships_its_adapter_and_card():
    assert {path.name for path in DEMO_ADAPTERS.iterdir()} == set(TASKS)
    files = [path for path in DEMO_ADAPTERS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    for name, task in TASKS.items():
        directory = DEMO_ADAPTERS / name
        config = json.loads((directory / "adapter_config.json").read_text())
        assert config.items() >= task.adapter_config.items()
        assert "exact match" in (directory / "README.md").read_text()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_held_out_examples_are_no_training_examples(task):
    training = task.training_examples(500)
    assert training == task.training_examples(500)
    assert len({text for text, _ in training}) == 500
    held_out = task.held_out_examples(50)
    assert held_out == task.held_out_examples(50)
    assert not {text for text, _ in held_out} & {text for text, _ in task.training_examples()}
