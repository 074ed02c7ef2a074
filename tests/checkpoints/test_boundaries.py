"""What the package must not do: import heavy libraries, and open pickles."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints

ROOT = Path(__file__).parents[2]
SOURCES = sorted(Path(checkpoints.__file__).parent.glob("*.py"))
HEAVY = {"jax", "torch", "transformers", "peft", "gguf", "huggingface_hub", "orbax", "flax"}


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_is_light():
    modules = sorted(file.stem for file in SOURCES)
    assert {"hf_llama", "peft_lora", "gguf", "sources", "orbax"} <= set(modules)
    light = [f"checkpoints.{name}" for name in modules if name not in ("__init__", "orbax")]
    program = f"import sys, checkpoints, {', '.join(light)}\nprint(*sys.modules)"
    loaded = {name.partition(".")[0] for name in run(program).split()}
    assert not loaded & HEAVY
    assert not loaded & {"slora_jax", "pallas_kernels"}


WATCH = """
import sys
from pathlib import Path

def forbid(event, arguments):
    if event == "pickle.find_class" or (
        event == "open" and str(arguments[0]).endswith((".bin", ".pt", ".pkl", ".pth", ".npy"))
    ):
        raise SystemExit(f"{event} {arguments}")

from checkpoints.hf_llama import open_llama
from checkpoints.peft_lora import read_peft_adapter
from checkpoints.sources import resolve_adapter, resolve_model
from checkpoints.tokenizer import Tokenizer
sys.addaudithook(forbid)
model = open_llama(resolve_model(sys.argv[1]))
for name in model.names():
    model.read(name)
Tokenizer.from_directory(sys.argv[1])
read_peft_adapter(resolve_adapter(sys.argv[2]), model.config)
for directory in sys.argv[1:]:
    for file in Path(directory).glob("*.safetensors"):
        file.unlink()
    try:
        adapter = directory == sys.argv[2]
        read_peft_adapter(directory, model.config) if adapter else open_llama(directory)
    except Exception as error:
        print(type(error).__name__, error)
"""


class Bomb:
    def __reduce__(self):
        return (print, ("the pickle was loaded",))


def test_pickles_are_never_opened(model: Path, adapter: Path):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "extra.npy"):
        (model / name).write_bytes(pickle.dumps(Bomb()))
        (adapter / name).write_bytes(pickle.dumps(Bomb()))
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    printed = run(WATCH, model, adapter)
    assert "loaded" not in printed.replace("never loaded", "")
    assert printed.count("CheckpointError") == 2
    assert printed.count("a pickle, which is never loaded") == 2


@pytest.mark.parametrize("word", ["pickle", "torch.load", "allow_pickle=True", "eval(", "exec("])
def test_the_source_has_no_loader_of_code(word: str):
    assert len(SOURCES) > 8
    for file in SOURCES:
        code = file.read_text()
        if word == "pickle":
            assert "import pickle" not in code
        else:
            assert word not in code
