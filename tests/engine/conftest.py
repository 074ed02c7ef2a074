"""One tiny model and one set of compiled programs for all tests of a running engine.

Compiling is nearly all that these tests cost. So there is one LLM a session, whose step sizes are
few (``SIZES``), and each test gets an engine of its own on top of it (``fresh_engine``).
"""

from collections.abc import Iterator

import pytest

from slora_jax import LLM
from tests.serving import TinyModel, fresh_engine

MAX_NUM_SEQS, TILE, MAX_TILES = 4, 8, 4
SIZES = {(d, t, rank) for d in (0, 4) for t in (0, 4) for rank in (0, 32, 64) if d or t}
"""(decode rows, tiles, ranks) of a step. They serve any step of these adapters: see ``Buckets``."""

SERVED = {"max_num_seqs": MAX_NUM_SEQS, "prefill_tile": TILE, "page_size": 16}

ADAPTERS = {
    "attention": {"rank": 2, "targets": ("q", "k", "v", "o")},  # 8 pages
    "mlp": {"rank": 8, "targets": ("gate", "up", "down")},  # 6 pages
    "all": {"rank": 5},  # 14 pages
    "qv": {"rank": 16, "targets": ("q", "v")},  # 4 pages
    "wide": {"rank": 24, "targets": ("v",), "layers_to_transform": [1]},  # 2 pages
    "all_reloaded": {"rank": 5},  # other weights for the name "all"
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyModel:
    return TinyModel.write(tmp_path_factory.mktemp("tiny"), ADAPTERS, seed=1)


@pytest.fixture(scope="session")
def compiled_llm(tiny: TinyModel) -> Iterator[LLM]:
    """To be given a ``fresh_engine`` by each test."""
    options = {"max_num_batched_tokens": TILE * MAX_TILES, "max_model_len": 128}
    with LLM(
        tiny.directory, progress=False, dtype="float32", pool_bytes=2**23, **SERVED, **options
    ) as llm:
        runner = llm._engine._runner
        runner._steps._compiled |= SIZES
        runner._samples._compiled.add((MAX_NUM_SEQS,))
        yield llm


@pytest.fixture
def llm(compiled_llm: LLM, tiny: TinyModel) -> Iterator[LLM]:
    """A roomy engine with all adapters loaded."""
    with fresh_engine(compiled_llm, tiny.adapters, **SERVED, max_num_batched_tokens=32) as llm:
        yield llm
