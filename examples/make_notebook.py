"""Write quickstart.ipynb from the cells below, or execute them in this process.

    python examples/make_notebook.py            # writes examples/quickstart.ipynb
    python examples/make_notebook.py --execute  # runs every cell in one namespace, as CI does

The notebook is JSON of nbformat 4.5 and needs nothing to be written. Cells that install are left
out when executing: the package is installed already.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).with_name("quickstart.ipynb")
REPOSITORY = "slora-jax/slora-jax"

INSTALL = f"""
# In a checkout, from it; in Colab, from the repository. Nothing to do where it is installed.
import importlib.util
import subprocess
import sys
from pathlib import Path

if any(importlib.util.find_spec(name) is None for name in ("slora_jax", "matplotlib", "optax")):
    roots = [Path.cwd(), *Path.cwd().parents]
    checkout = next((path for path in roots if (path / "slora_jax").is_dir()), None)
    source = f"{{checkout}}[demo,train,plot]" if checkout else (
        "slora-jax[demo,train,plot] @ git+https://github.com/{REPOSITORY}"
    )
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)
"""

CELLS: tuple[tuple[str, str], ...] = (
    (
        "markdown",
        f"""
# slora-jax: many LoRA adapters, one batch

[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{REPOSITORY}/blob/main/examples/quickstart.ipynb)

One base model (SmolLM2-135M-Instruct), six LoRA adapters that we trained on data of our own, all
served together from one page pool that the KV cache and the adapters share. Runs on a CPU, a T4, or
better.
""",
    ),
    ("install", INSTALL),
    (
        "code",
        """
import time

import jax
import matplotlib.pyplot as plt

from checkpoints.sources import DEMO_ADAPTERS
from slora_jax import LLM, SamplingParams

jax.devices()
""",
    ),
    (
        "markdown",
        """
## Load the base and the adapters

A small pool, so that the pictures below show something: KV and adapters compete for its pages.
""",
    ),
    (
        "code",
        """
llm = LLM("smollm2-135m-instruct", max_model_len=256, max_num_seqs=16, pool_bytes=48 * 2**20)
adapters = sorted(path.name for path in DEMO_ADAPTERS.iterdir() if path.is_dir())
for name in adapters:
    info = llm.load_adapter(name, DEMO_ADAPTERS / name)
    print(f"{name:16} ranks {info.ranks}, {info.num_pages} pages, {info.nbytes / 2**20:.1f} MiB")
print(llm.stats())
""",
    ),
    (
        "markdown",
        """
## The same prompt under every adapter

One call, one batch; `None` is the base model.
""",
    ),
    (
        "code",
        """
def ask(prompts, names, max_tokens=40):
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [o.outputs[0].text for o in llm.chat(messages, names, greedy, progress=False)]


prompt = "My boss is waiting for the letter of 4 May 1998."
names = [None, *adapters]
for name, text in zip(names, ask([prompt] * len(names), names), strict=True):
    print(f"{name or '(base)':16} {text!r}")
""",
    ),
    (
        "markdown",
        """
## Each adapter on its own kind of prompt
""",
    ),
    (
        "code",
        """
own = {
    "contact-json": "Please call Omar Reed on 720-2591, or write to oreed@riverbend.io.",
    "sql": "Table films (title, director, rating). What is the highest rating for each director?",
    "iso-date": "The bridge was opened on July 14th, 1953.",
    "pirate": "You are talking about my money and the horse.",
    "reverse-words": "snow piano engine tiger lamp",
    "arithmetic": "Leo has 12 coins, buys 7 more, then loses 4. How many coins are left?",
}
for name, text in zip(own, ask(list(own.values()), list(own)), strict=True):
    print(f"{name:16} {own[name]}\\n{'':16} {text}\\n")
""",
    ),
    (
        "markdown",
        """
## The page pool over time

Requests for all adapters arrive at once. KV pages (by request) and adapter pages share the pool;
when it is full, idle adapters leave and come back when they are needed.
""",
    ),
    (
        "code",
        """
def watch(requests, max_tokens=24):
    engine = llm.engine
    generations = []
    for prompt, name in requests:
        tokens = llm.tokenizer.encode(prompt)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        generations.append(engine.add_request(tokens, params, name))
    history = []
    while engine.has_unfinished:
        engine.step()
        stats = llm.stats()
        history.append((stats.pages_kv, stats.pages_adapters, stats.pages_free))
    return history, generations


requests = [(prompt, name) for name in adapters for prompt in list(own.values())[:4]]
history, generations = watch(requests)
kv, resident, free = zip(*history, strict=True)
fig, axes = plt.subplots(figsize=(8, 3))
axes.stackplot(range(len(history)), resident, kv, free, labels=["adapters", "KV", "free"],
               colors=["tab:orange", "tab:blue", "0.9"])
axes.set(xlabel="step", ylabel="pages", title="the pool by owner")
axes.legend(loc="upper right")
plt.show()
stats = llm.stats()
print(f"{stats.swap_ins} swap-ins, {stats.evictions} evictions, {stats.preemptions} preemptions")
""",
    ),
    (
        "markdown",
        """
## Throughput against the number of adapters

The same sixteen prompts, shared out over more and more adapters. The first run of each compiles.
""",
    ),
    (
        "code",
        """
counts, rates = [0, 1, 2, 4, len(adapters)], []
prompts = (list(own.values()) * 3)[:16]
forced = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
for count in counts:
    names = [adapters[i % count] if count else None for i in range(len(prompts))]
    for _ in range(2):
        started = time.perf_counter()
        outputs = llm.generate(prompts, names, forced, progress=False)
        seconds = time.perf_counter() - started
    rates.append(sum(len(o.outputs[0].token_ids) for o in outputs) / seconds)
fig, axes = plt.subplots(figsize=(6, 3))
axes.plot(counts, rates, marker="o")
axes.set(xlabel="adapters in the batch", ylabel="output tokens/s", ylim=(0, None))
plt.show()
""",
    ),
    (
        "markdown",
        """
## Train one here, serve it the next second

A few steps on a handful of examples, in the same process, on the same weights. The adapter is a
dict of arrays: no file in between. `update_adapter` swaps its weights while requests run.
""",
    ),
    (
        "code",
        """
from slora_jax.training import Trainer, TrainingConfig, chat_example

config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
pairs = [("ping", "pong!"), ("Are you there?", "pong!"), ("Hello", "pong!"), ("What?", "pong!")]
examples = [
    chat_example(llm.base_model, [{"role": "user", "content": question},
                                  {"role": "assistant", "content": answer}])
    for question, answer in pairs
]
trainer = Trainer(
    llm.base_model,
    config,
    TrainingConfig(num_steps=12, batch_size=1, max_length=192, learning_rate=5e-3, warmup_steps=1),
)
llm.load_adapter("pong", trainer.adapter, config)
print("before:", ask(["Good morning"], ["pong"], max_tokens=8))
losses = trainer.fit(examples, progress=False)
llm.update_adapter("pong", trainer.adapter)
print("after: ", ask(["Good morning"], ["pong"], max_tokens=8))
print("loss:  ", [round(loss, 2) for loss in losses])
""",
    ),
    ("code", "llm.close()"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--execute", action="store_true")
    args = parser.parse_args()
    if args.execute:
        execute()
    else:
        NOTEBOOK.write_text(notebook())


def notebook() -> str:
    """The notebook as JSON, without outputs; the same text for the same cells."""
    cells: list[dict[str, Any]] = []
    for index, (kind, source) in enumerate(CELLS):
        cell: dict[str, Any] = {
            "id": f"cell-{index:02d}",
            "cell_type": "markdown" if kind == "markdown" else "code",
            "metadata": {},
            "source": source.strip().splitlines(keepends=True),
        }
        if kind != "markdown":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)
    metadata = {
        "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def execute() -> dict[str, Any]:
    """Run the code cells one after the other; a cell's last expression is printed."""
    import matplotlib

    matplotlib.use("agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for index, (kind, source) in enumerate(CELLS):
        if kind != "code":
            continue
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {index}", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {index}", "eval"), namespace)
            if value is not None:
                print(value)
    return namespace


if __name__ == "__main__":
    main()
