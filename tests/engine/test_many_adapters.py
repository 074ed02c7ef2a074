"""2,000 registered adapters, a pool with room for 16, requests by a power law: all answers right.

Most adapters are arrays and stay in CPU memory; every tenth is a directory, and CPU memory has
room for few of those, so that they are read from disk again and again.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.name_map import TARGETS, module_name, target_shape
from checkpoints.peft_lora import parse_peft_adapter, read_peft_adapter
from checkpoints.synthetic import write_synthetic_adapter
from slora_jax import LLM, AdapterLoadError, RequestFailedError, SamplingParams
from slora_jax.outputs import RequestOutput
from tests.engine.conftest import SERVED
from tests.oracle import DenseLlama
from tests.serving import TinyModel, assert_only_idle_adapters_left, fresh_engine

NUM_ADAPTERS = 2000
ON_DISK = range(0, NUM_ADAPTERS, 10)
IN_MEMORY = 6  # of those on disk
PAGES = 2  # of an adapter of one target
NUM_TOKENS = 3
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@dataclasses.dataclass(eq=False)
class Crowd:
    """The adapters, by number: adapter ``k`` is called ``user k``."""

    model: TinyModel
    llm: LLM
    directory: Path
    oracles: dict[int, DenseLlama] = dataclasses.field(default_factory=dict)

    def path(self, k: int) -> Path:
        return self.directory / str(k)

    def write(self, k: int, seed: int) -> None:
        shutil.rmtree(self.path(k), ignore_errors=True)
        self.oracles.pop(k, None)
        options = {"rank": 1 + k % 8, "targets": [TARGETS[k % 7]], "scale": 2.0}
        write_synthetic_adapter(self.path(k), self.model.checkpoint.config, seed=seed, **options)

    def arrays(self, k: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Tensors and configuration, as PEFT has them."""
        config, target, rank = self.model.checkpoint.config, TARGETS[k % 7], 1 + k % 8
        generator = np.random.default_rng(k)
        tensors = {}
        for layer in range(config["num_layers"]):
            module = f"base_model.model.{module_name(layer, target)}"
            out_features, in_features = target_shape(config, target)
            for half, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                values = generator.standard_normal(shape, np.float32)
                tensors[f"{module}.lora_{half}.weight"] = values * shape[1] ** -0.5
        target_modules = [module_name(0, target).rpartition(".")[2]]
        options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": target_modules}
        return tensors, {"peft_type": "LORA", **options}

    def load(self, k: int) -> None:
        source = (self.path(k),) if k in ON_DISK else self.arrays(k)
        self.llm.load_adapter(f"user {k}", *source)

    def oracle(self, k: int) -> DenseLlama:
        config = self.model.checkpoint.config
        if k not in self.oracles:
            if k in ON_DISK:
                adapter = read_peft_adapter(self.path(k), config)
            else:
                adapter = parse_peft_adapter(*self.arrays(k), config, source=f"user {k}")
            self.oracles[k] = DenseLlama(self.model.checkpoint, adapter)
        return self.oracles[k]

    def generate(self, prompts: list[list[int]], users: list[int]) -> list[RequestOutput]:
        return self.llm.generate(prompts, [f"user {k}" for k in users], GREEDY, progress=False)

    def check(self, outputs: list[RequestOutput], users: list[int]) -> None:
        for output, k in zip(outputs, users, strict=True):
            expected = self.oracle(k).greedy(output.prompt_token_ids, NUM_TOKENS)
            assert list(output.outputs[0].token_ids) == expected, f"user {k}"


@pytest.fixture(scope="module")
def crowd(compiled_llm: LLM, tiny: TinyModel, tmp_path_factory) -> Iterator[Crowd]:
    bytes_each = PAGES * compiled_llm.stats().page_bytes
    arrays = NUM_ADAPTERS - len(ON_DISK)
    options = {
        **SERVED,
        "max_num_batched_tokens": 32,
        "host_adapter_bytes": (arrays + IN_MEMORY) * bytes_each,
    }
    num_pages = 1 + 16 * PAGES + SERVED["max_num_seqs"] * 2
    with fresh_engine(compiled_llm, {}, num_pages=num_pages, **options) as llm:
        crowd = Crowd(tiny, llm, tmp_path_factory.mktemp("crowd"))
        for k in ON_DISK:
            crowd.write(k, seed=k)
        for k in range(NUM_ADAPTERS):
            crowd.load(k)
        yield crowd


def power_law_requests(count: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """(prompts, users): user k as often as 1 / (k + 1)."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, NUM_ADAPTERS + 1)
    users = generator.choice(NUM_ADAPTERS, count, p=weights / weights.sum()).tolist()
    prompts = [generator.integers(0, 256, generator.integers(1, 20)).tolist() for _ in users]
    return prompts, users


@pytest.mark.slow
def test_500_requests_over_2000_adapters_finish_right(crowd: Crowd):
    adapters = crowd.llm.list_adapters()
    assert len(adapters) == NUM_ADAPTERS
    assert sum(info.in_host_memory for info in adapters if info.has_file) == IN_MEMORY

    prompts, users = power_law_requests(500, seed=0)
    assert len(set(users)) > 150
    outputs = crowd.generate(prompts, users)
    crowd.check(outputs, users)

    stats = crowd.llm.stats()
    assert stats.evictions > 100
    assert stats.disk_reloads > 20
    assert stats.adapters_resident <= 20
    assert_only_idle_adapters_left(crowd.llm)

    # The steady state compiles nothing.
    prompts, users = power_law_requests(200, seed=1)
    crowd.check(crowd.generate(prompts, users), users)
    assert crowd.llm.stats().compiles == stats.compiles
    assert crowd.llm.stats().evictions > stats.evictions


@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_an_adapter_whose_files_are_not_what_they_were_fails_alone(crowd: Crowd, damage: str):
    engine = crowd.llm._engine
    spoilt = next(
        k
        for k in reversed(ON_DISK)
        if not (info := engine.store.info(engine.store.resolve(f"user {k}"))).in_host_memory
        and info.version not in engine.cache.resident()
    )
    if damage == "changed":
        crowd.write(spoilt, seed=spoilt + 1)
    else:
        shutil.rmtree(crowd.path(spoilt))
    others = [3, 50, 7, 1999]
    users = [*others[:2], spoilt, *others[2:]]
    prompts = power_law_requests(len(users), seed=2)[0]
    with pytest.raises(RequestFailedError, match=f"1 of 5 .*user {spoilt}") as caught:
        crowd.generate(prompts, users)

    outputs = caught.value.outputs
    failed = outputs.pop(2)
    assert isinstance(failed.error, AdapterLoadError)
    assert isinstance(caught.value.__cause__, AdapterLoadError)
    assert (failed.outputs[0].finish_reason, failed.outputs[0].token_ids) == ("error", ())
    crowd.check(outputs, others)
    assert_only_idle_adapters_left(crowd.llm)

    # What the error says to do helps.
    crowd.write(spoilt, seed=spoilt + 1)
    crowd.llm.unload_adapter(f"user {spoilt}")
    crowd.load(spoilt)
    crowd.check(crowd.generate([prompts[2]], [spoilt]), [spoilt])
