"""AdapterStore: every registered adapter, packed as pages in CPU memory.

Owns the names, the versions behind them, how many requests hold each version, and a byte budget
over the packed buffers with the adapters' own files as the tier below. It refuses to know what is
in a buffer, how adapters are read and packed (a callback does that), and what is on the device.

A *version* is the identity of one loaded adapter. It is never reused: an adapter that is reloaded
under the same name gets a new one, and requests that were added before finish on the old one.
Version 0 is the base model: rank 0, no pages, nothing to hold or to drop.

Like the whole host half it belongs to one thread.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections import OrderedDict
from collections.abc import Callable, KeysView, Mapping
from typing import Any

from slora_jax.errors import (
    AdapterInUseError,
    AdapterLoadError,
    AdapterNotFoundError,
    CapacityError,
)

BASE_VERSION = 0
"""The base model as an adapter: what a request without an adapter uses."""

MOST_NAMES_COMPARED = 1000
"""Close names are looked for among this many: with 20,000 the search would take half a second."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedAdapter:
    """One adapter in the pool's form, ready to be copied to the device as it is."""

    digest: str
    """Of the adapter's content: equal digests mean equal weights."""
    ranks: tuple[int, ...]
    """Stored rank of each target: q, k, v, o, gate, up, down."""
    num_pages: int
    nbytes: int
    """CPU memory that the buffers take."""
    pages: Any
    """Runs of pages (``page_pool.HostPages``), opaque here."""
    scaling: Any
    """f32[layers, targets], opaque here."""
    config: Any = None
    """PEFT's configuration, opaque here; None for an adapter that was made without one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What the store knows about one version, without its weights."""

    name: str
    version: int
    ranks: tuple[int, ...]
    num_pages: int
    nbytes: int
    in_host_memory: bool
    has_file: bool
    """False for an adapter given as arrays, which cannot be read again."""


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class _Entry:
    name: str
    digest: str
    ranks: tuple[int, ...]
    num_pages: int
    nbytes: int
    config: Any
    packed: PackedAdapter | None
    reload: Callable[[], PackedAdapter] | None
    holds: int = 0
    is_registered: bool = True  # False once its name was given up while requests hold it

    def is_same_as(self, packed: PackedAdapter) -> bool:
        mine = (self.digest, self.ranks, self.num_pages, self.nbytes)
        return mine == (packed.digest, packed.ranks, packed.num_pages, packed.nbytes)


class AdapterStore:
    """Name → version → packed buffers.

    Invariants: a version exists while its name is registered or a request holds it, and is dropped
    at once when neither is true. The buffers kept add up to ``host_bytes``, at most the budget.

    Adapters that have files are dropped from memory least recently used first, and read again when
    they are fetched. One that is larger than what the budget leaves is still usable: it is read for
    each swap-in and kept only until that is done, so CPU memory exceeds the budget by at most the
    adapters of one step. Adapters without files count and are never dropped.
    """

    def __init__(self, budget_bytes: int | None = None):
        self._budget = budget_bytes
        self._next_version = BASE_VERSION + 1
        self._version_of: dict[str, int] = {}
        self._entries: dict[int, _Entry] = {}
        # Versions whose buffers may be dropped, least recently used first.
        self._droppable: OrderedDict[int, None] = OrderedDict()
        self._fileless_bytes = 0
        self.host_bytes = 0
        """Bytes of the buffers kept in CPU memory."""
        self.disk_reloads = 0
        """How often an adapter was read from its files again."""
        self.on_unregister: Callable[[int], None] = lambda version: None
        """Told of each version that new requests cannot ask for any more, before it is dropped."""
        self.on_drop: Callable[[int], None] = lambda version: None
        """Told of each version that ceases to exist."""

    # -- names: register / unregister ----------------------------------------------------------

    def register(
        self,
        name: str,
        packed: PackedAdapter,
        *,
        reload: Callable[[], PackedAdapter] | None = None,
    ) -> int:
        """Take an adapter under a free name and return its version.

        ``reload`` reads the same adapter again; None says that there are no files to read it from.
        """
        assert packed.num_pages >= 1, "an adapter of rank 0 everywhere is refused when it is read"
        if name in self._version_of:
            raise AdapterInUseError(
                f"an adapter named {name!r} is already loaded: unload it first, or use another name"
            )
        if reload is None:
            self._check_fits(name, packed.nbytes)
        version = self._next_version
        self._next_version += 1
        self._version_of[name] = version
        self._entries[version] = _Entry(
            name=name,
            digest=packed.digest,
            ranks=packed.ranks,
            num_pages=packed.num_pages,
            nbytes=packed.nbytes,
            config=packed.config,
            packed=None,
            reload=reload,
        )
        self._keep(version, packed)
        return version

    def unregister(self, name: str) -> int:
        """Give up a name at once; its version is dropped when its last hold is released."""
        version = self.resolve(name)
        del self._version_of[name]
        self._entries[version].is_registered = False
        self.on_unregister(version)
        self._drop_if_unused(version)
        return version

    def replace(self, name: str, packed: PackedAdapter) -> int:
        """Give ``name`` another adapter, without files, and return its version.

        New requests get it; the old version lives while requests hold it. All or nothing.
        """
        old = self._entries[self.resolve(name)]
        freed = old.nbytes if old.reload is None and not old.holds else 0
        self._check_fits(name, packed.nbytes - freed)
        self.unregister(name)
        return self.register(name, packed)

    def config(self, version: int) -> Any:
        """The configuration that ``version`` was registered with (the base has none)."""
        return self._entries[version].config

    def resolve(self, name: str) -> int:
        """The version that ``name`` stands for now."""
        try:
            return self._version_of[name]
        except KeyError:
            raise AdapterNotFoundError(self._not_found_message(name)) from None

    def names(self) -> KeysView[str]:
        """What new requests can ask for, in the order of loading: a view that follows changes."""
        return self._version_of.keys()

    # -- versions: hold / release --------------------------------------------------------------

    def hold(self, version: int) -> None:
        """Keep ``version`` in existence. One hold for each unfinished request."""
        if version != BASE_VERSION:
            self._entries[version].holds += 1

    def release(self, version: int) -> None:
        """Undo one ``hold``."""
        if version != BASE_VERSION:
            entry = self._entries[version]
            assert entry.holds > 0, f"version {version} of {entry.name!r} is not held"
            entry.holds -= 1
            self._drop_if_unused(version)

    def info(self, version: int) -> AdapterInfo:
        """What is known of an existing version (the base is not an adapter)."""
        entry = self._entries[version]
        return AdapterInfo(
            name=entry.name,
            version=version,
            ranks=entry.ranks,
            num_pages=entry.num_pages,
            nbytes=entry.nbytes,
            in_host_memory=entry.packed is not None,
            has_file=entry.reload is not None,
        )

    def num_pages(self, version: int) -> int:
        """Pages that ``version`` takes in the pool; none for the base."""
        return 0 if version == BASE_VERSION else self._entries[version].num_pages

    # -- buffers -------------------------------------------------------------------------------

    def fetch(self, version: int) -> PackedAdapter:
        """The buffers of ``version``, which becomes the most recently used.

        Reads its files again where they were dropped, and raises AdapterLoadError where that fails
        or gives something else than was registered; the store is then as it was.
        """
        entry = self._entries[version]
        if entry.packed is None:
            packed = _read_again(entry)
            self.disk_reloads += 1
            self._keep(version, packed)
            return packed
        if version in self._droppable:
            self._droppable.move_to_end(version)
        return entry.packed

    def drop_all_buffers(self) -> None:
        """Give all CPU memory back: nothing can be fetched any more that has no files."""
        for version in self._entries:
            self._drop_buffers(version)

    def _keep(self, version: int, packed: PackedAdapter) -> None:
        """Keep the buffers if the budget allows it, dropping others' as needed and no more."""
        entry = self._entries[version]
        if self._budget is not None:
            if self._fileless_bytes + entry.nbytes > self._budget:
                assert entry.reload is not None, "refused by _check_fits"
                return
            while self.host_bytes + entry.nbytes > self._budget:
                self._drop_buffers(next(iter(self._droppable)))
        entry.packed = packed
        self.host_bytes += entry.nbytes
        if entry.reload is None:
            self._fileless_bytes += entry.nbytes
        else:
            self._droppable[version] = None

    def _drop_buffers(self, version: int) -> None:
        entry = self._entries[version]
        if entry.packed is not None:
            self.host_bytes -= entry.nbytes
            entry.packed = None
            if entry.reload is None:
                self._fileless_bytes -= entry.nbytes
            else:
                del self._droppable[version]

    def _check_fits(self, name: str, nbytes: int) -> None:
        if self._budget is not None and self._fileless_bytes + nbytes > self._budget:
            raise CapacityError(
                f"adapter {name!r} needs {nbytes:,} bytes of CPU memory and has no files to fall "
                f"back to; host_adapter_bytes={self._budget:,}, of which such adapters take "
                f"{self._fileless_bytes:,} already: raise host_adapter_bytes, unload one of them, "
                "or load it from a directory"
            )

    def _drop_if_unused(self, version: int) -> None:
        entry = self._entries[version]
        if not entry.is_registered and not entry.holds:
            self._drop_buffers(version)
            del self._entries[version]
            self.on_drop(version)

    def _not_found_message(self, name: str) -> str:
        if not self._version_of:
            return f"no adapter named {name!r}: none is loaded, load it first"
        some = list(itertools.islice(self._version_of, MOST_NAMES_COMPARED))
        close = difflib.get_close_matches(name, some, n=3)
        listed = ", ".join(map(repr, close or some[:3]))
        return (
            f"no adapter named {name!r}; {'close names' if close else 'some names'} among the "
            f"{len(self._version_of):,} loaded: {listed}"
        )

    def check(self, holds: Mapping[int, int]) -> None:
        """Assert the invariants, given how many unfinished requests use each version. For tests."""
        entries = self._entries
        assert {v: e.holds for v, e in entries.items() if e.holds} == {
            v: n for v, n in holds.items() if n and v != BASE_VERSION
        }
        assert {v: e.name for v, e in entries.items() if e.is_registered} == {
            v: name for name, v in self._version_of.items()
        }
        assert all(e.is_registered or e.holds for e in entries.values())
        kept = {v: e for v, e in entries.items() if e.packed is not None}
        assert self.host_bytes == sum(e.nbytes for e in kept.values())
        assert self._budget is None or self.host_bytes <= self._budget
        assert self._fileless_bytes == sum(e.nbytes for e in kept.values() if e.reload is None)
        assert set(self._droppable) == {v for v, e in kept.items() if e.reload is not None}
        assert all(e.packed is not None or e.reload is not None for e in entries.values())


def _read_again(entry: _Entry) -> PackedAdapter:
    assert entry.reload is not None, "buffers without files are never dropped"
    try:
        packed = entry.reload()
    except Exception as error:
        raise AdapterLoadError(
            f"adapter {entry.name!r} had left CPU memory (host_adapter_bytes) and could not be "
            f"read from its files again: {error}; unload it and load it again"
        ) from error
    if not entry.is_same_as(packed):
        raise AdapterLoadError(
            f"adapter {entry.name!r}: the files changed since they were loaded; unload it and load "
            "it again"
        )
    return packed
