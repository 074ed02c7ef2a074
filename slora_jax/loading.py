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

from pallas_kernels.layout import GROUPS, LANES, TARGETS, stored_rank
from slora_jax.adapter_partition import CUT_BY_INPUTS, AdapterPartition, Scheme
from slora_jax.adapter_store import PackedAdapter
from slora_jax.errors import (
    AdapterLoadError,
    ConfigError,
    InvalidRequestError,
    ModelLoadError,
    SloraError,
)
from slora_jax.layers.rope import RopeScaling
from slora_jax.models.llama import Llama, LlamaConfig
from slora_jax.page_pool import HostMemory, run_lengths
from slora_jax.sharding import MODEL_AXIS, named_sharding
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

    with raising(ModelLoadError, "model", name_or_path):
        directory = sources.resolve_model(name_or_path, progress=progress)
        if orbax.is_orbax_model(directory):
            hyperparameters = orbax.read_config(directory)
            tokenizer = Tokenizer.from_directory(directory)
            model = _restore(directory, _to_config(hyperparameters, mesh.size), dtype, mesh)
        else:
            checkpoint = hf_llama.open_llama(directory)
            hyperparameters = checkpoint.config
            tokenizer = Tokenizer.from_directory(directory)
            model = _read(checkpoint, _to_config(hyperparameters, mesh.size), dtype, mesh, progress)
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
    ``config.json`` is followed. Equal shapes give equal weights; text is read as bytes.

    Raises:
        ModelLoadError: there is no such name or directory, or it asks for what is not supported.
    """
    _require_own_checkpoints()
    from checkpoints import hf_llama, sources
    from checkpoints.architectures import ARCHITECTURES
    from checkpoints.tokenizer import byte_tokenizer

    with raising(ModelLoadError, "model", name_or_path):
        known = ARCHITECTURES.get(os.fspath(name_or_path))
        if known is None and not Path(name_or_path).is_dir():
            raise ModelLoadError(
                f"no model {os.fspath(name_or_path)!r} to fill with random weights: give a "
                f"directory with config.json, or one of {', '.join(ARCHITECTURES)}"
            )
        hyperparameters = known or hf_llama.read_config(sources.resolve_model(name_or_path))
    config = _to_config(hyperparameters, mesh.size)

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
        model=_fill(config, mesh, dtype, load, progress=False),
        tokenizer=byte_tokenizer(config.vocab_size),
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

    if loaded.directory is None:
        raise ModelLoadError("a model of random weights (load='dummy') is not worth saving")
    params: dict[str, jax.Array] = {}
    for path, variable in _flat_params(nnx.state(loaded.model)):
        params |= _taken_apart(path, variable[...], loaded.model)
    with raising(ModelLoadError, "directory", directory):
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
    partition: AdapterPartition,
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
        with raising(AdapterLoadError, "adapter", directory):
            adapter = peft_lora.read_peft_adapter(directory, dict(hyperparameters))
        return pack_adapter(adapter, hyperparameters["num_layers"], partition, dtype, host)

    with raising(AdapterLoadError, "adapter", source):
        directory = sources.resolve_adapter(source).resolve()
    return load


def adapter_from_arrays(
    arrays: Mapping[str, Any],
    config: Mapping[str, Any],
    hyperparameters: Mapping[str, Any],
    partition: AdapterPartition,
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
    return pack_adapter(adapter, hyperparameters["num_layers"], partition, dtype, host)


def pack_adapter(
    adapter: LoraAdapter,
    num_layers: int,
    partition: AdapterPartition,
    dtype: jnp.dtype,
    host: HostMemory,
) -> PackedAdapter:
    """LoRA pairs → pages [layers, pages, rows, 128] in the pool's dtype, in ``host``: of each of
    its devices the part that ``partition`` gives it.

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
        pages = partition.pack(layers, num_layers, ranks, dtype, host.shards)
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
    partition: AdapterPartition,
    dtype: jnp.dtype,
    host: HostMemory,
) -> Iterator[PackedAdapter]:
    """Distinct random adapters, one for each rank in turn, in page form: for benchmarks.

    Cut from one random block at different places, and in plain memory views of it; A and B have
    deviation 0.02, scaling is 2. Ranks are multiples of 8, and each A and B fills whole segments.
    """
    pages_of = {
        rank: partition.num_pages([rank if t in targets else 0 for t in TARGETS])
        for rank in set(ranks_of_adapters)
    }
    rows = len(host.shards) * partition.rows_per_page
    page = rows * LANES
    largest = num_layers * max(pages_of.values(), default=0) * page
    block = np.random.default_rng(0).standard_normal(
        largest + LANES * len(ranks_of_adapters), dtype=np.float32
    )
    block = (0.02 * block).astype(dtype)
    for index, rank in enumerate(ranks_of_adapters):
        shape = (num_layers, pages_of[rank], rows, LANES)
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


def adapter_partition(
    config: LlamaConfig, shards: int, scheme: Scheme, rows_per_page: int
) -> AdapterPartition:
    """How this model's adapters are cut over ``shards`` devices, in pages of so many rows of each.

    Raises ValueError where the scheme cannot cut them.
    """
    owned = [config.owned_by(shard, shards) for shard in range(shards)]
    return AdapterPartition.make(scheme, config.target_features(), owned, rows_per_page)


def _to_config(hyperparameters: Mapping[str, Any], shards: int) -> LlamaConfig:
    names = [field.name for field in dataclasses.fields(LlamaConfig)]
    values = {name: hyperparameters[name] for name in names}
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    if values["vocab_size"] >= 2**18:
        # Top-p adds 30-bit shares of the whole vocabulary in 32-bit integers (slora_jax.sampling).
        raise ModelLoadError(f"vocab_size={values['vocab_size']} is not supported: 262143 is most")
    if values["head_dim"] > 128:
        raise ModelLoadError(f"head_dim={values['head_dim']} is not supported: 128 is the largest")
    config = LlamaConfig(**values)
    try:
        config.share(shards)
    except ValueError as error:
        raise ConfigError(f"the model cannot be cut over {shards} devices: {error}") from error
    return config


class _TensorSource(Protocol):
    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray: ...


def _read(
    checkpoint: _TensorSource,
    config: LlamaConfig,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh,
    progress: bool,
) -> Llama:
    """Each device reads what it has and nothing else, so a model may exceed a host's memory."""
    shards = mesh.size

    def load(path: ParamPath, axes: Axes, shape: tuple[int, ...]) -> jax.Array:
        def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            shard = max(
                (part.start or 0) * shards // size for part, size in zip(index, shape, strict=True)
            )
            parts = [
                _cast(checkpoint.read(name, where), dtype, name)
                for name, where in _stored_parts(path, config, shard, shards)
            ]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            size = [len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True)]
            short = [n - m for n, m in zip(size, whole.shape, strict=True)]  # of vocabulary
            return np.pad(whole, [(0, n) for n in short]) if any(short) else whole

        return jax.make_array_from_callback(shape, named_sharding(mesh, axes), of_device)

    return _fill(config, mesh, dtype, load, progress)


def _restore(
    directory: Path, config: LlamaConfig, dtype: jnp.dtype, mesh: jax.sharding.Mesh
) -> Llama:
    from checkpoints import orbax

    abstract: dict[str, jax.ShapeDtypeStruct] = {}
    for path, variable in _flat_params(_abstract_model(config, 1, dtype)[1]):
        for name, shape in _stored_shapes(path, variable.shape, config).items():
            sharding = _stored_sharding(name, shape, config, mesh)
            abstract[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    restored = orbax.restore_model(directory, abstract)

    def load(path: ParamPath, axes: Axes, shape: tuple[int, ...]) -> jax.Array:
        parts = [restored.pop(name) for name in _stored_names(path)]
        return _side_by_side(parts, shape, named_sharding(mesh, axes))

    return _fill(config, mesh, dtype, load, False)


def _abstract_model(
    config: LlamaConfig, shards: int, dtype: jnp.dtype
) -> tuple[nnx.GraphDef[Llama], nnx.State]:
    """A model's structure and shapes. Not by ``nnx.eval_shape``: within ``jax.set_mesh`` it would
    take our logical axes for the mesh's."""
    return jax.eval_shape(lambda: nnx.split(Llama(config, shards, dtype=dtype, rngs=nnx.Rngs(0))))


def abstract_model(config: LlamaConfig, dtype: jnp.dtype, mesh: jax.sharding.Mesh) -> Llama:
    """The model's shapes in their shardings over ``mesh``, for compilers: no weights."""

    def load(path: ParamPath, axes: Axes, shape: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, axes))

    return _fill(config, mesh, dtype, load, progress=False)


def _fill(
    config: LlamaConfig,
    mesh: jax.sharding.Mesh,
    dtype: jnp.dtype,
    load: Callable[[ParamPath, Axes, tuple[int, ...]], jax.Array],
    progress: bool,
) -> Llama:
    """A model whose every parameter is what ``load(path, logical axes, shape)`` returns."""
    graph, state = _abstract_model(config, mesh.size, dtype)
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


_FUSED: dict[str, tuple[str, ...]] = dict(
    zip(("qkv", "out", "gate_up", "down"), GROUPS, strict=True)
)
"""Attribute of a fused linear → the targets that it is made of."""


def _stored_names(path: ParamPath) -> list[str]:
    """The stored tensors, in canonical names, that side by side make the parameter at ``path``."""
    if path[0] != "layers":
        return [str(path[0])]
    layer, owner = path[1], str(path[-2])
    return [f"layers.{layer}.{name}" for name in _FUSED.get(owner, (owner,))]


def _stored_parts(
    path: ParamPath, config: LlamaConfig, shard: int, shards: int
) -> list[tuple[str, tuple[slice, ...] | None]]:
    """(stored tensor, what of it is read; None is all) that make a device's part of the parameter
    at ``path``, one above the other; less where the vocabulary's last share is padded."""
    names = _stored_names(path)
    if shards == 1:
        return [(name, None) for name in names]
    owner = str(path[-2])
    if owner in ("embed_tokens", "lm_head"):
        rows = -(-config.vocab_size // shards)
        start, stop = (min(rows * n, config.vocab_size) for n in (shard, shard + 1))
        return [(names[0], (slice(start, stop), slice(None)))]
    if owner not in _FUSED:
        return [(names[0], None)]
    owned = config.owned_by(shard, shards)
    parts: list[tuple[str, tuple[slice, ...] | None]] = []
    for name, target in zip(names, _FUSED[owner], strict=True):
        own = slice(*owned[target])
        by_inputs = target in CUT_BY_INPUTS
        parts.append((name, (slice(None), own) if by_inputs else (own, slice(None))))
    return parts


def _stored_shapes(
    path: ParamPath, shape: tuple[int, ...], config: LlamaConfig
) -> dict[str, tuple[int, ...]]:
    """The stored tensors of the parameter at ``path``, which is of ``shape`` on one device."""
    names = _stored_names(path)
    if len(names) == 1:
        return {names[0]: shape}
    inputs, outputs = config.group_features(_FUSED[str(path[-2])])
    return {name: (rows, inputs) for name, rows in zip(names, outputs, strict=True)}


def _stored_sharding(
    name: str, shape: tuple[int, ...], config: LlamaConfig, mesh: jax.sharding.Mesh
) -> jax.sharding.NamedSharding:
    """How a stored tensor is read over ``mesh``: each device what it has of it."""
    target = name.rpartition(".")[2]
    if target in ("k", "v") and config.num_kv_heads < mesh.size:
        # Neighbours have the same head.
        devices = mesh.devices.reshape(config.num_kv_heads, -1)
        mesh = jax.sharding.Mesh(devices, (MODEL_AXIS, "copies"))
    axes = {
        **dict.fromkeys(("q", "k", "v"), ("heads", "embed")),
        "o": ("embed", "heads"),
        **dict.fromkeys(("gate", "up"), ("mlp", "embed")),
        "down": ("embed", "mlp"),
        **dict.fromkeys(("embed_tokens", "lm_head"), ("vocab", "embed")),
    }.get(target, ("norm",))
    if "vocab" in axes and shape[0] % mesh.size:
        axes = ("embed", "embed")  # read whole, cut and padded afterwards
    return named_sharding(mesh, axes)


def _side_by_side(
    parts: list[jax.Array], shape: tuple[int, ...], sharding: jax.sharding.NamedSharding
) -> jax.Array:
    """Each device's shards of ``parts``, one above the other, as one array: nothing is sent."""
    if len(parts) == 1 and parts[0].sharding == sharding and parts[0].shape == shape:
        return parts[0]
    shards = [{shard.device: shard.data for shard in part.addressable_shards} for part in parts]
    of_devices = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        own = jnp.concatenate([shard[device] for shard in shards])
        if len(own) != len(range(*index[0].indices(shape[0]))):  # a vocabulary that was read whole
            own = jnp.pad(own, ((0, shape[0] - len(own)), (0, 0)))[index[0]]
        of_devices.append(own)
    return jax.make_array_from_single_device_arrays(shape, sharding, of_devices)


def _taken_apart(path: ParamPath, value: jax.Array, model: Llama) -> dict[str, jax.Array]:
    """The inverse: the stored tensors of the parameter at ``path``, whatever it is cut over."""
    names, shards = _stored_names(path), model.shards.count
    if len(names) == 1:
        is_vocab = path[0] in ("embed_tokens", "lm_head")
        return {names[0]: value[: model.config.vocab_size] if is_vocab else value}
    group = _FUSED[str(path[-2])]
    _, widths = model.config.share(shards).group_features(group)
    _, outputs = model.config.group_features(group)
    of_devices = value.reshape(shards, -1, value.shape[-1])
    stored: dict[str, jax.Array] = {}
    start = 0
    for name, width, rows in zip(names, widths, outputs, strict=True):
        copies = shards * width // rows
        part = of_devices[::copies, start : start + width]
        stored[name] = part.reshape(rows, value.shape[-1])
        start += width
    return stored


def _cast(array: np.ndarray, dtype: jnp.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if np.dtype(dtype) == np.float16 and not np.isfinite(cast).all():
        raise ModelLoadError(
            f"{name} has values beyond float16: choose dtype='float32' or a device with bfloat16"
        )
    return cast


@contextlib.contextmanager
def raising(error_type: type[SloraError], what: str, given: object) -> Iterator[None]:
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
