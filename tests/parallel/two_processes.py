"""One of two processes that serve a model together: ``two_processes.py NUMBER PORT MODEL WHAT``.

Process 0 prints its tokens as JSON; WHAT is "serve", or "die" where process 1 is to be killed.
"""

import json
import os
import sys

import jax

number, port, folder, what = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number, local_device_ids=[0])

from slora_jax import LLM, SamplingParams  # noqa: E402

PROMPTS = [[1, 2, 3], [7, 8, 9] * 4, [5] * 9]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

llm = LLM(
    f"{folder}/model",
    progress=False,
    dtype="float32",
    tensor_parallel=2,
    max_num_seqs=3,
    max_num_batched_tokens=16,
    max_model_len=64,
    page_size=32,
    pool_bytes=2**21,
)
print("ready", number, os.getpid(), flush=True)
if number:
    llm.follow()
    print("followed", flush=True)
    sys.exit()

for name in ("all", "attention", "mlp"):
    llm.load_adapter(name, f"{folder}/adapters/{name}")
if what == "die":
    while True:
        llm.generate(PROMPTS, ["all", "attention", None], GREEDY, progress=False)
        print("served", flush=True)
for index, _ in llm.stream(PROMPTS, "mlp", GREEDY):
    if index == 1:
        break  # leaves the others unfinished: they are aborted
outputs = llm.generate(PROMPTS, ["all", "attention", None], GREEDY, progress=False)
stats = llm.stats()
print(json.dumps([output.outputs[0].token_ids for output in outputs]), stats.swap_ins, flush=True)
llm.close()
