"""What was traced once is read from disk, and gives the same tokens; broken files harm nobody."""

import pytest

from slora_jax import LLM, SamplingParams
from slora_jax.forward_programs import WholeForward
from slora_jax.models.llama import Llama
from slora_jax.trace_store import TraceStore

OPTIONS = {"max_num_seqs": 2, "prefill_tile": 8, "page_size": 16, "max_num_batched_tokens": 16}
PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture
def llm(tiny):
    with LLM(tiny.directory, progress=False, max_model_len=32, pool_bytes=2**20, **OPTIONS) as llm:
        llm.load_adapter("qv", tiny.adapters["qv"])
        yield llm


def generate(llm, traces):
    """With all programs made anew, as in a new process."""
    runner = llm.engine._runner
    runner._forward = WholeForward(llm._loaded.model, runner.view, llm._mesh, {}, traces)
    outputs = llm.generate(["abc", "de"], ["qv", None], PARAMS, progress=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.skipif(not TraceStore.is_supported(), reason="flatbuffers is not installed")
def test_a_later_start_traces_nothing(llm, tmp_path, monkeypatch):
    expected = generate(llm, None)
    assert generate(llm, TraceStore(tmp_path)) == expected
    files = sorted(tmp_path.glob("*.jax"))
    assert len(files) == 2  # prefill, decode

    def fail(*args):
        raise AssertionError("traced again")

    with monkeypatch.context() as patch:
        patch.setattr(Llama, "__call__", fail)
        assert generate(llm, TraceStore(tmp_path)) == expected

    files[0].write_bytes(files[0].read_bytes()[:100])
    assert generate(llm, TraceStore(tmp_path)) == expected
    assert len(files[0].read_bytes()) > 100
    assert sorted(tmp_path.glob("*")) == files


@pytest.mark.skipif(not TraceStore.is_supported(), reason="flatbuffers is not installed")
def test_what_cannot_be_written_is_no_error(llm, tmp_path):
    (tmp_path / "file").touch()
    assert generate(llm, TraceStore(tmp_path / "file")) == generate(llm, None)
