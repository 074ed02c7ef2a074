"""Once every size of step has been compiled ahead, serving compiles nothing more."""

import numpy as np

from slora_jax import LLM, SamplingParams
from slora_jax.forward_programs import WholeForward
from slora_jax.model_runner import row_buckets, step_buckets

NAMES = ["attention", "mlp", "all", "qv", "wide", None]
OPTIONS = {"max_num_seqs": 6, "prefill_tile": 8, "page_size": 16, "max_num_batched_tokens": 32}


def test_random_steps_compile_nothing_after_warming_up(tiny):
    num_steps = 10_000
    rng = np.random.default_rng(0)
    with LLM(
        tiny.directory, progress=False, max_model_len=64, pool_bytes=25 * 2**15, **OPTIONS
    ) as llm:
        for name, path in tiny.adapters.items():
            llm.load_adapter(name, path)
        engine = llm.engine
        runner = engine._runner
        # What kernels get: the step as one program, in few sizes.
        runner._forward = WholeForward(llm._loaded.model, runner.view, llm._mesh, {})
        runner._steps, runner._samples = step_buckets("gpu", 6, 4, 8), row_buckets("gpu", 6)
        llm.warm_up()
        ready = llm.stats().compiles
        while llm.stats().steps < num_steps:
            while engine.scheduler.num_waiting < 3 and rng.random() < 0.4:
                length, tokens = rng.integers(1, 30, 2)
                params = SamplingParams(temperature=0, max_tokens=int(tokens), ignore_eos=True)
                prompt = rng.integers(0, 256, length).tolist()
                engine.add_request(prompt, params, NAMES[rng.integers(len(NAMES))])
            if engine.has_unfinished:
                engine.step()
        stats = llm.stats()
        assert stats.compiles == ready
        assert stats.preemptions > 0
        assert stats.swap_ins > len(NAMES)
