"""Random damage to any file gives a `CheckpointError` or a correct load, never anything else."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import CheckpointError
from checkpoints.hf_llama import open_llama, read_config
from checkpoints.name_map import tensor_shapes
from checkpoints.peft_lora import MAX_RANK, parse_peft_adapter, read_peft_adapter
from checkpoints.synthetic import write_synthetic_adapter, write_synthetic_llama
from checkpoints.tokenizer import Tokenizer

# `re` warns about odd patterns; here a warning would be an exception.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model, a single-file model, and an adapter for both."""
    path = tmp_path_factory.mktemp("fuzz")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "num_kv_heads": 1}
    write_synthetic_llama(path / "single", **small)
    config = write_synthetic_llama(path / "sharded", max_shard_bytes=8000, **small)
    write_synthetic_adapter(path / "adapter", config, seed=0, rank=2, rank_pattern={"q_proj": 3})
    return path


# A change: at a fraction of the file, overwrite, insert, delete, or cut there. The header is where
# most of the structure is, so half of the places are near the start.
PLACES = st.one_of(st.floats(0, 1), st.floats(0, 0.02))
CHANGES = st.lists(
    st.one_of(
        st.tuples(PLACES, st.just("overwrite"), st.binary(min_size=1, max_size=8)),
        st.tuples(PLACES, st.just("flip"), st.binary(min_size=1, max_size=1)),
        st.tuples(
            PLACES, st.just("insert"), st.sampled_from([b"0", b'"', b"}", b",", b"-", b"9" * 9])
        ),
        st.tuples(PLACES, st.just("delete"), st.binary(min_size=1, max_size=3)),
        st.tuples(PLACES, st.just("truncate"), st.just(b"")),
    ),
    min_size=1,
    max_size=3,
)


def damage(content: bytes, changes) -> bytes:
    for place, kind, data in changes:
        at = int(place * len(content))
        if kind == "truncate":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + data + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + len(data) :]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ data[0]]) + content[at + 1 :]
        else:
            content = content[:at] + data + content[at + len(data) :]
    return content


@contextlib.contextmanager
def damaged_copy(original: Path, file: str, changes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(original, Path(scratch) / "copy"))
        (copy / file).write_bytes(damage((copy / file).read_bytes(), changes))
        yield copy


def load_model(directory: Path) -> None:
    """Read everything; whatever is read must fit the config."""
    try:
        checkpoint = open_llama(directory)
    except CheckpointError:
        return
    shapes = tensor_shapes(checkpoint.config)
    assert list(shapes) == checkpoint.names()
    for name, shape in shapes.items():
        with contextlib.suppress(CheckpointError):  # NaN or Inf
            array = checkpoint.read(name)
            assert array.shape == shape
            assert array.dtype.name in ("float32", "float16", "bfloat16")


@given(changes=CHANGES)
def test_weights(originals: Path, changes):
    with damaged_copy(originals / "single", "model.safetensors", changes) as directory:
        load_model(directory)


@given(changes=CHANGES, file=st.sampled_from(["config.json", "generation_config.json"]))
def test_configs(originals: Path, changes, file: str):
    with damaged_copy(originals / "single", file, changes) as directory:
        load_model(directory)


@given(changes=CHANGES)
def test_index(originals: Path, changes):
    with damaged_copy(originals / "sharded", "model.safetensors.index.json", changes) as directory:
        load_model(directory)


@given(changes=CHANGES, file=st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]))
def test_adapters(originals: Path, changes, file: str):
    config = read_config(originals / "single")
    with damaged_copy(originals / "adapter", file, changes) as directory:
        try:
            adapter = read_peft_adapter(directory, config)
        except CheckpointError:
            return
    assert adapter.pairs
    for pair in adapter.pairs.values():
        assert 1 <= pair.rank <= MAX_RANK
        assert pair.a.shape[0] == pair.b.shape[1]


@given(changes=CHANGES, file=st.sampled_from(["tokenizer_config.json", "tokenizer.json"]))
@settings(max_examples=30)
def test_tokenizers(originals: Path, changes, file: str):
    with damaged_copy(originals / "single", file, changes) as directory:
        try:
            tokenizer = Tokenizer.from_directory(directory)
        except CheckpointError:
            return
        assert isinstance(tokenizer.decode(tokenizer.encode("Hi there")), str)
        with contextlib.suppress(CheckpointError):
            assert isinstance(
                tokenizer.apply_chat_template([{"role": "user", "content": "x"}]), str
            )


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(data=st.data())
def test_any_json_value_in_any_option_of_a_model(originals: Path, data):
    original = json.loads((originals / "single/config.json").read_text())
    more = [
        "sliding_window",
        "quantization_config",
        "rope_parameters",
        "dtype",
        "partial_rotary_factor",
    ]
    key = data.draw(st.sampled_from([*original, *more]))
    value = data.draw(JSON)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps({**original, key: value}))
        with contextlib.suppress(CheckpointError):
            config = read_config(scratch)
            assert all(isinstance(token, int) for token in config["eos_token_ids"])


@given(data=st.data())
def test_any_json_value_in_any_option_of_an_adapter(originals: Path, data):
    config = read_config(originals / "single")
    original = json.loads((originals / "adapter/adapter_config.json").read_text())
    more = ["exclude_modules", "layers_pattern", "modules_to_save", "use_dora", "runtime_config"]
    key = data.draw(st.sampled_from([*original, *more, "unknown"]))
    with contextlib.suppress(CheckpointError):
        options = {**original, key: data.draw(JSON)}
        parse_peft_adapter({"x": [[0.0]]}, options, config, source="fuzz")
