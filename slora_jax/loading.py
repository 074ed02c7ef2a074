"""From files or arrays to a model on the device and adapters in page form.

The only importer of ``checkpoints``, and lazily: ``import slora_jax`` stays light, and a foreign
package of that name is found out here. Owns the mapping of stored tensors onto fused weights and of
LoRA pairs onto pages; refuses to know file formats (``checkpoints``) and the pool (``page_pool``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from pallas_kernels.layout import LANES, TARGETS, AdapterLayout, stored_rank
from slora_jax.adapter_store import PackedAdapter
from slora_jax.errors import AdapterLoadError, InvalidRequestError, ModelLoadError, SloraError
from slora_jax.layers.rope import RopeScaling
from slora_jax.models.llama import Llama, LlamaConfig
from slora_jax.page_pool import HostMemory, run_lengths
from slora_jax.sharding import named_sharding
from slora_jax.trace_store import TraceStore

if TYPE_CHECKING:
    from checkpoints.peft_lora import LoraAdapter
    from checkpoints.tokenizer import Tokenizer

Axes = tuple[str, ...]
ParamPath = tuple[Any, ...]
"""Attribute names and layer indices that lead to a parameter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model on its devices and what its directory says about how to use it."""

    model: Llama
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    hyperparameters: dict[str, Any]
    """As ``checkpoints`` normalises them."""
    directory: Path | None
    """None for random weights."""


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh,
    progress: bool,
) -> LoadedModel:
    """Read a base model: a directory (Hugging Face or our Orbax form), a hub id, or the demo alias.

    Tensors are read one at a time, cast to ``dtype`` and sent to ``mesh``.

    Raises:
        ModelLoadError: it cannot be found or read, or asks for what is not supported, by name.
    """
    _require_own_checkpoints()
    from checkpoints import hf_llama, orbax, sources
    from checkpoints.tokenizer import Tokenizer

    with _raising(ModelLoadError, "model", name_or_path):
        directory = sources.resolve_model(name_or_path, progress=progress)
        if orbax.is_orbax_model(directory):
            hyperparameters = orbax.read_config(directory)
            tokenizer = Tokenizer.from_directory(directory)
            model = _restore(directory, _to_config(hyperparameters), dtype, mesh)
        else:
            checkpoint = hf_llama.open_llama(directory)
            hyperparameters = checkpoint.config
            tokenizer = Tokenizer.from_directory(directory)
            model = _read(checkpoint, _to_config(hyperparameters), dtype, mesh, progress)
    eos = {*hyperparameters["eos_token_ids"]}
    if tokenizer.eos_token_id is not None:
        eos.add(tokenizer.eos_token_id)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        eos_token_ids=tuple(sorted(eos)),
        hyperparameters=dict(hyperparameters),
        directory=directory,
    )


def keep_compiled_programs() -> TraceStore | None:
    """Let JAX keep what it compiles in the user's cache folder, unless it was told of another.

    Returns where to keep what is traced, beside it; None where that cannot be.
    """
    _require_own_checkpoints()
    from checkpoints import sources

    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009 (typed as unknown)
        jax.config.update("jax_compilation_cache_dir", str(sources.default_cache_dir() / "xla"))
    folder = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009
    if "://" in folder or not TraceStore.is_supported():
        return None
    return TraceStore(Path(folder, "slora-jax-traces"))


def dummy_model(
    name_or_path: str | os.PathLike[str], *, dtype: jnp.dtype, mesh: jax.sharding.Mesh
) -> LoadedModel:
    """Random weights in a real shape, made on the device: for benchmarks and tests of size.

    ``name_or_path``: a name of ``checkpoints.architectures`` ("llama-7b", …), or a directory whose
    ``config.json`` is followed. Equal shapes give equal weights; text is read and written as bytes.

    Raises:
        ModelLoadError: there is no such name or directory, or it asks for what is not supported.
    """
    _require_own_checkpoints()
    from checkpoints import hf_llama, sources
    from checkpoints.architectures import ARCHITECTURES
    from checkpoints.tokenizer import byte_tokenizer

    with _raising(ModelLoadError, "model", name_or_path):
        known = ARCHITECTURES.get(os.fspath(name_or_path))
        if known is None and not Path(name_or_path).is_dir():
            raise ModelLoadError(
                f"no model {os.fspath(name_or_path)!r} to fill with random weights: give a "
                f"directory with config.json, or one of {', '.join(ARCHITECTURES)}"
            )
        hyperparameters = known or hf_llama.read_config(sources.resolve_model(name_or_path))
    config = _to_config(hyperparameters)

    @functools.cache
    def random(shape: tuple[int, ...], axes: Axes) -> Callable[[jax.Array], jax.Array]:
        def make(key: jax.Array) -> jax.Array:
            if len(shape) == 1:  # a norm
                return jnp.ones(shape, dtype)
            return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

        return jax.jit(make, out_shardings=named_sharding(mesh, axes))

    def load(path: ParamPath, axes: Axes, shape: tuple[int, ...]) -> jax.Array:
        key = jax.random.key(zlib.crc32(_dotted(path).encode()))
        return random(shape, axes)(key)

    return LoadedModel(
        model=_fill(config, dtype, load, progress=False),
        tokenizer=byte_tokenizer(),
        eos_token_ids=tuple(hyperparameters["eos_token_ids"]),
        hyperparameters=dict(hyperparameters),
        directory=None,
    )


def save_model(loaded: LoadedModel, directory: str | os.PathLike[str]) -> None:
    """Write a loaded model in Orbax form, with its tokenizer; ``load_model`` reads it back.

    Raises:
        ModelLoadError: the directory cannot be written.
    """
    from checkpoints import orbax

    flat = _flat_params(nnx.state(loaded.model))
    params = {_dotted(path): variable[...] for path, variable in flat}
    if loaded.directory is None:
        raise ModelLoadError("a model of random weights (load='dummy') is not worth saving")
    with _raising(ModelLoadError, "directory", directory):
        orbax.save_model(
            Path(directory), loaded.hyperparameters, params, files_from=loaded.directory
        )


def render_chat(tokenizer: Tokenizer, conversation: Any) -> str:
    """Messages → the prompt, by the model's own chat template, open for the assistant's turn.

    Raises:
        InvalidRequestError: the model has no template, or it does not take these messages.
    """
    from checkpoints import errors

    try:
        return tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
    except (errors.CheckpointError, TypeError, RecursionError) as error:  # keys, cycles
        raise InvalidRequestError(f"the conversation cannot be rendered: {error}") from error


def adapter_loader(
    source: str | os.PathLike[str],
    hyperparameters: Mapping[str, Any],
    layout: AdapterLayout,
    dtype: jnp.dtype,
    host: HostMemory,
) -> Callable[[], PackedAdapter]:
    """A function that reads the PEFT directory (or hub id) ``source`` into page form.

    The name is resolved now, so that a reload reads the very same directory. Calling it raises
    ``AdapterLoadError`` where the files cannot be used.
    """
    _require_own_checkpoints()
    from checkpoints import peft_lora, sources

    def load() -> PackedAdapter:
        with _raising(AdapterLoadError, "adapter", directory):
            adapter = peft_lora.read_peft_adapter(directory, dict(hyperparameters))
        return pack_adapter(adapter, hyperparameters["num_layers"], layout, dtype, host)

    with _raising(AdapterLoadError, "adapter", source):
        directory = sources.resolve_adapter(source).resolve()
    return load


def adapter_from_arrays(
    arrays: Mapping[str, Any],
    config: Mapping[str, Any],
    hyperparameters: Mapping[str, Any],
    layout: AdapterLayout,
    dtype: jnp.dtype,
    host: HostMemory,
    *,
    source: str,
) -> PackedAdapter:
    """In-memory tensors under PEFT's names, with PEFT's config, into page form.

    Raises:
        AdapterLoadError: they do not fit each other or the base model.
    """
    _require_own_checkpoints()
    from checkpoints import errors, peft_lora

    if not isinstance(config, Mapping):
        raise AdapterLoadError(
            f"{source}: config is {config!r:.80}: give PEFT's adapter_config.json as a dict"
        )
    try:
        adapter = peft_lora.parse_peft_adapter(
            arrays, {"peft_type": "LORA", **config}, dict(hyperparameters), source=source
        )
    except errors.CheckpointError as error:
        raise AdapterLoadError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise AdapterLoadError(
            f"{source}: give its tensors by PEFT's names, and a config of such plain values as "
            f"adapter_config.json has: {error}"
        ) from error
    return pack_adapter(adapter, hyperparameters["num_layers"], layout, dtype, host)


def pack_adapter(
    adapter: LoraAdapter,
    num_layers: int,
    layout: AdapterLayout,
    dtype: jnp.dtype,
    host: HostMemory,
) -> PackedAdapter:
    """LoRA pairs → pages [layers, pages, rows, 128] in the pool's dtype, in ``host``.

    A target's rank is its largest over the layers; layers without it hold zeros, since a page id
    means the same page in every layer.
    """
    ranks = [0] * len(TARGETS)
    scaling = np.zeros((num_layers, len(TARGETS)), np.float32)
    layers: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for (layer, target), pair in adapter.pairs.items():
        column = TARGETS.index(target)
        ranks[column] = max(ranks[column], stored_rank(pair.rank))
        scaling[layer, column] = pair.scaling
        layers.setdefault(layer, {})[target] = pair.a, pair.b
    try:
        pages = layout.pack(layers, num_layers, ranks, dtype)
    except ValueError as error:
        raise AdapterLoadError(
            f"the adapter does not fit dtype {np.dtype(dtype)}: {error}"
        ) from error
    return PackedAdapter(
        digest=adapter.digest,
        ranks=tuple(ranks),
        num_pages=pages.shape[1],
        nbytes=pages.nbytes,
        pages=host.place(pages),
        scaling=scaling,
        config=adapter.config,
    )


def dummy_adapters(
    ranks_of_adapters: Sequence[int],
    targets: Sequence[str],
    num_layers: int,
    layout: AdapterLayout,
    dtype: jnp.dtype,
    host: HostMemory,
) -> Iterator[PackedAdapter]:
    """Distinct random adapters, one for each rank in turn, in page form: for benchmarks.

    Cut from one random block at different places, and in plain memory views of it; A and B have
    deviation 0.02, scaling is 2. Ranks are multiples of 8, and each A and B fills whole segments.
    """
    pages_of = {
        rank: layout.num_pages([rank if t in targets else 0 for t in TARGETS])
        for rank in set(ranks_of_adapters)
    }
    page = layout.rows_per_page * LANES
    largest = num_layers * max(pages_of.values(), default=0) * page
    block = np.random.default_rng(0).standard_normal(
        largest + LANES * len(ranks_of_adapters), dtype=np.float32
    )
    block = (0.02 * block).astype(dtype)
    for index, rank in enumerate(ranks_of_adapters):
        shape = (num_layers, pages_of[rank], layout.rows_per_page, LANES)
        first = LANES * index
        ranks = tuple(stored_rank(rank) if t in targets else 0 for t in TARGETS)
        yield PackedAdapter(
            digest=f"dummy {index}",
            ranks=ranks,
            num_pages=shape[1],
            nbytes=math.prod(shape) * block.itemsize,
            pages=tuple(host.place_run(run) for run in _runs_of(block[first:], shape)),
            scaling=np.full((num_layers, len(TARGETS)), 2.0, np.float32),
        )


def _runs_of(block: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Pages of ``shape`` [layers, n, rows, 128] as runs that are views into ``block``."""
    runs, start = [], 0
    for count in run_lengths(shape[1]):
        run = (shape[0], count, *shape[2:])
        runs.append(block[start : start + math.prod(run)].reshape(run))
        start += math.prod(run)
    return tuple(runs)


def adapter_layout(config: LlamaConfig, rows_per_page: int) -> AdapterLayout:
    """How this model's adapters lie in pages of so many rows."""
    features = config.target_features()
    return AdapterLayout(
        in_features=tuple(features[target][0] for target in TARGETS),
        out_features=tuple(features[target][1] for target in TARGETS),
        rows_per_page=rows_per_page,
    )


def _to_config(hyperparameters: Mapping[str, Any]) -> LlamaConfig:
    names = [field.name for field in dataclasses.fields(LlamaConfig)]
    values = {name: hyperparameters[name] for name in names}
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    if values["vocab_size"] >= 2**18:
        # Top-p adds 30-bit shares of the whole vocabulary in 32-bit integers (slora_jax.sampling).
        raise ModelLoadError(f"vocab_size={values['vocab_size']} is not supported: 262143 is most")
    if values["head_dim"] > 128:
        raise ModelLoadError(f"head_dim={values['head_dim']} is not supported: 128 is the largest")
    return LlamaConfig(**values)


class _TensorSource(Protocol):
    def read(self, name: str) -> np.ndarray: ...


def _read(
    checkpoint: _TensorSource,
    config: LlamaConfig,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh,
    progress: bool,
) -> Llama:
    def load(path: ParamPath, axes: Axes, shape: tuple[int, ...]) -> jax.Array:
        parts = [_cast(checkpoint.read(name), dtype, name) for name in _stored_names(path)]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return jax.device_put(whole, named_sharding(mesh, axes))

    return _fill(config, dtype, load, progress)


def _restore(
    directory: Path, config: LlamaConfig, dtype: jnp.dtype, mesh: jax.sharding.Mesh
) -> Llama:
    from checkpoints import orbax

    abstract: dict[str, jax.ShapeDtypeStruct] = {}
    for path, variable in _flat_params(nnx.state(_abstract_model(config, dtype))):
        abstract[_dotted(path)] = jax.ShapeDtypeStruct(
            variable.shape,
            dtype,
            sharding=named_sharding(mesh, variable.get_metadata("out_sharding")),
        )
    restored = orbax.restore_model(directory, abstract)
    return _fill(config, dtype, lambda path, axes, shape: restored[_dotted(path)], False)


def _abstract_model(config: LlamaConfig, dtype: jnp.dtype) -> Llama:
    return nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))


def _fill(
    config: LlamaConfig,
    dtype: jnp.dtype,
    load: Callable[[ParamPath, Axes, tuple[int, ...]], jax.Array],
    progress: bool,
) -> Llama:
    """A model whose every parameter is what ``load(path, logical axes, shape)`` returns."""
    graph, state = nnx.split(_abstract_model(config, dtype))
    flat = _flat_params(state)
    bar = tqdm(flat, desc="Loading weights", disable=not progress, delay=1.0)
    filled = [
        (path, variable.replace(load(path, variable.get_metadata("out_sharding"), variable.shape)))
        for path, variable in bar
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _flat_params(state: nnx.State) -> list[tuple[ParamPath, Any]]:
    return [(path, variable) for path, variable in nnx.to_flat_state(state)]


def _dotted(path: ParamPath) -> str:
    return ".".join(str(part) for part in path)


def _stored_names(path: ParamPath) -> list[str]:
    """The stored tensors, in canonical names, that side by side make the parameter at ``path``."""
    if path[0] != "layers":
        return [str(path[0])]
    fused = {"qkv": ("q", "k", "v"), "out": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
    layer, owner = path[1], str(path[-2])
    return [f"layers.{layer}.{name}" for name in fused.get(owner, (owner,))]


def _cast(array: np.ndarray, dtype: jnp.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if np.dtype(dtype) == np.float16 and not np.isfinite(cast).all():
        raise ModelLoadError(
            f"{name} has values beyond float16: choose dtype='float32' or a device with bfloat16"
        )
    return cast


@contextlib.contextmanager
def _raising(error_type: type[SloraError], what: str, given: object) -> Iterator[None]:
    """What is wrong with a name or path that the user gave, or with what lies there."""
    from checkpoints import errors

    if not isinstance(given, str | os.PathLike) or not isinstance(os.fspath(given), str):
        raise error_type(f"{what} {given!r:.80} is no name or path: give a string or a Path")
    try:
        yield
    except errors.CheckpointError as error:
        raise error_type(str(error)) from error
    except (OSError, RuntimeError) as error:  # too long, ~nobody, no permission, no device memory
        reason = f"{error!s:.200}"
        raise error_type(f"{what} {os.fspath(given)!r:.80} cannot be used: {reason}") from error


def _require_own_checkpoints() -> None:
    """Raise where another package called ``checkpoints`` hides ours."""
    try:
        import checkpoints
    except Exception as error:  # ours only defines an exception: another's was run
        raise ModelLoadError(
            f"another module named 'checkpoints' hides the one of slora-jax and fails ({error!r}): "
            "rename or remove it, or change sys.path"
        ) from error

    found = [Path(p).resolve() for p in _package_paths(checkpoints)]
    ours = Path(__file__).resolve().parent.parent / "checkpoints"
    if ours not in found:
        raise ModelLoadError(
            f"another package named 'checkpoints' is imported from {', '.join(map(str, found))} "
            f"and hides the one of slora-jax at {ours}: rename or remove it, or change sys.path"
        )


def _package_paths(module: Any) -> Iterable[str]:
    return list(getattr(module, "__path__", [])) or [getattr(module, "__file__", None) or "memory"]
