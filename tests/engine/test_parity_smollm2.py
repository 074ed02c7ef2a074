"""SmolLM2-135M-Instruct with six real PEFT adapters: token for token what transformers + PEFT say.

16 prompts, plain text and chat, in one mixed batch over the base and the adapters, in float32. The
oracle serves the same files one prompt at a time, by ``model.generate``, its adapters unmerged.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.hf_llama import read_config
from checkpoints.sources import DEMO_MODEL, resolve_model
from checkpoints.synthetic import write_synthetic_adapter
from slora_jax import LLM, SamplingParams
from slora_jax.outputs import RequestOutput
from tests.serving import log_softmax, recorded_logits
from tests.transformers_oracle import TransformersModel

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

SYNTHETIC: dict[str, dict[str, Any]] = {
    "mlp 8": {"rank": 8, "targets": ("gate", "up", "down")},
    "all 64": {"rank": 64},
}
PEFT: dict[str, dict[str, Any]] = {
    "attention 2": {"r": 2, "lora_alpha": 4, "target_modules": ATTENTION},
    "all 16 rslora": {
        "r": 16,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "use_rslora": True,
    },
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": [*ATTENTION, *MLP],
        "rank_pattern": {"q_proj": 4, r"layers\.(1|2)\.mlp\.down_proj": 24},
        "alpha_pattern": {"v_proj": 4, "up_proj": 24},
    },
    "late layers": {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "layers_to_transform": list(range(20, 30)),
    },
}
STRENGTH = {
    "mlp 8": 0.15,
    "all 64": 0.15,
    "attention 2": 0.2,
    "all 16 rslora": 0.15,
    "patterns": 0.15,
    "late layers": 0.4,
}
"""The change of a projection's output, relative to a random model's own: seen, and no gibberish."""
ADAPTERS = tuple(STRENGTH)

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "The three most important things about gardening are",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, the Apollo 11 mission",
    "1, 1, 2, 3, 5, 8,",
]
QUESTIONS = [
    "What is gravity?",
    "Write a haiku about rain.",
    "List three fruits that are red.",
    "How do I boil an egg?",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue? Answer in one sentence.",
    "Give me a name for a grey cat.",
]
ADAPTER_IDS = [None, *ADAPTERS, "all 64", None, *ADAPTERS, "attention 2"]
NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=20)


def write_with_peft(directory: Path, model_directory: Path) -> dict[str, Path]:
    """Adapters as PEFT itself saves them, all halves random."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    configs = {
        name: peft.LoraConfig(task_type="CAUSAL_LM", **options) for name, options in PEFT.items()
    }
    first, *others = configs
    model = peft.get_peft_model(base, configs[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, configs[name])
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, half in getattr(module, "lora_B", {}).items():
                rank, in_features = module.lora_A[name].weight.shape
                module.lora_A[name].weight.normal_(0, in_features**-0.5)
                half.weight.normal_(0, STRENGTH[name] / (module.scaling[name] * rank**0.5))
    model.save_pretrained(directory, save_embedding_layers=False)
    return {name: directory / name for name in configs}


@dataclasses.dataclass(eq=False)
class Served:
    llm: LLM
    outputs: list[RequestOutput]
    expected: list[tuple[list[int], np.ndarray]]
    """Per prompt: tokens, and f32[tokens, vocab] raw logits."""
    reference: TransformersModel

    def tokens(self, index: int) -> list[int]:
        return list(self.outputs[index].outputs[0].token_ids)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    directory, model_directory = tmp_path_factory.mktemp("adapters"), resolve_model(DEMO_MODEL)
    paths = write_with_peft(directory, model_directory)
    for seed, (name, options) in enumerate(SYNTHETIC.items(), start=1):
        paths[name] = directory / name
        config = read_config(model_directory)
        write_synthetic_adapter(paths[name], config, seed=seed, scale=STRENGTH[name], **options)
    return paths


@pytest.fixture(scope="module")
def served(adapters: dict[str, Path]) -> Iterator[Served]:
    with LLM(DEMO_MODEL, dtype="float32", progress=False, max_num_seqs=16, pool_bytes=2**29) as llm:
        for name in ADAPTERS:
            llm.load_adapter(name, adapters[name])
        chats = [
            llm.tokenizer.apply_chat_template([{"role": "user", "content": question}])
            for question in QUESTIONS
        ]
        outputs = llm.generate([*TEXTS, *chats], ADAPTER_IDS, GREEDY, progress=False)
        reference = TransformersModel(resolve_model(DEMO_MODEL), adapters)
        expected = [
            reference.generate(
                output.prompt_token_ids,
                output.adapter_id,
                NUM_TOKENS,
                eos_token_ids=llm._engine._eos_token_ids,
            )
            for output in outputs
        ]
        yield Served(llm, outputs, expected, reference)


def test_tokens_are_identical(served: Served):
    for index, (tokens, _) in enumerate(served.expected):
        assert served.tokens(index) == tokens, f"prompt {index}, {ADAPTER_IDS[index]}"
    assert max(len(tokens) for tokens, _ in served.expected) == NUM_TOKENS


def test_log_probabilities_of_every_token_agree(served: Served):
    for output, (tokens, logits) in zip(served.outputs, served.expected, strict=True):
        expected = log_softmax(logits)
        completion = output.outputs[0]
        for row, token, score in zip(expected, tokens, completion.logprobs, strict=True):
            assert len(score) == 20
            ours = np.asarray([entry.logprob for entry in score.values()])
            assert np.abs(ours - row[list(score)]).max() < 1e-3
            assert np.abs(np.sort(ours)[::-1] - np.sort(row)[:-21:-1]).max() < 1e-3
            assert score[token].rank == 1


def test_full_logits_of_prompts_agree(served: Served):
    """The whole vocabulary at every position, in one batch over base and adapters."""
    prompts = [output.prompt_token_ids for output in served.outputs[:7]]
    once = SamplingParams(temperature=0, max_tokens=1)
    with recorded_logits(served.llm) as recorded:
        outputs = served.llm.generate(prompts, ADAPTER_IDS[:7], once, progress=False)
    for prompt, adapter, output in zip(prompts, ADAPTER_IDS, outputs, strict=False):
        known = recorded[f"{output.request_id}-0"]
        ours = np.stack([known[position] for position in range(len(prompt))])
        assert np.abs(ours - served.reference.logits(prompt, adapter)).max() < 1e-3


def test_chats_are_rendered_and_encoded_as_by_transformers(served: Served):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(DEMO_MODEL))
    messages = [
        {"role": "system", "content": "You answer in French."},
        {"role": "user", "content": QUESTIONS[0]},
    ]
    once = SamplingParams(temperature=0, max_tokens=1)
    (output,) = served.llm.chat(messages, "late layers", once, progress=False)
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert list(output.prompt_token_ids) == encoded["input_ids"]


def test_every_adapter_changes_the_text(served: Served):
    """Also from the others' text; and none breaks it."""
    prompt = served.outputs[1].prompt_token_ids
    short = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    outputs = served.llm.generate([prompt] * 7, [None, *ADAPTERS], short, progress=False)
    texts = [output.outputs[0].text for output in outputs]
    assert len(set(texts)) == 7
    assert all(len(set(output.outputs[0].token_ids)) > 12 for output in outputs), texts
