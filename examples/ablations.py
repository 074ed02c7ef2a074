"""S-LoRA's baselines in the host half: what the library does not do, as fairly as it would do it.

All keep continuous batching and the same step. Their device halves are in `ablations_device.py`.
"""

from __future__ import annotations

from slora_jax.adapter_cache import AdapterCache
from slora_jax.adapter_store import AdapterStore
from slora_jax.page_allocator import PageAllocator
from slora_jax.policies import Policy
from slora_jax.request import Request

PATIENCE = 32
"""Admissions that `OneAdapter` gives to one adapter while another's request waits longer."""


class SplitCache(AdapterCache):
    """no-unify-mem: ``adapter_pages`` of the pool hold adapters and nothing else, the others KV.

    One id space as ever; what is free of each part follows from the allocator's counts.
    """

    def __init__(self, allocator: PageAllocator, store: AdapterStore, *, adapter_pages: int):
        super().__init__(allocator, store)
        self._adapter_pages = adapter_pages

    def _kv_free(self) -> int:
        kv_pages = self._allocator.num_usable - self._adapter_pages
        return kv_pages - self._allocator.counts().get("kv", 0)

    def evict_idle(self, num_pages_needed: int) -> bool:
        """Whether KV has so many pages: adapters' are of no use to it."""
        return num_pages_needed <= self._kv_free()

    def num_available(self, version: int) -> int:
        """KV pages, or -1 where the adapters' part has no room for ``version``."""
        if version in self._resident and version not in self._idle:
            own_pages = 0
        else:
            own_pages = self._store.num_pages(version)
        adapter_free = self._allocator.num_free - self._kv_free() + self._idle_pages
        return self._kv_free() if own_pages <= adapter_free else -1

    def _bring_in(self, version: int):
        num_pages = self._store.num_pages(version)
        if not super().evict_idle(num_pages + self._kv_free()):
            return None
        return super()._bring_in(version)


class OneResidentCache(AdapterCache):
    """merge: one adapter is in the weights, so any other that comes has to be merged anew."""

    def _bring_in(self, version: int):
        self.evict_idle(self._allocator.num_free + self._idle_pages)
        return super()._bring_in(version)


class OneAdapter(Policy):
    """One adapter a batch: others wait until it is empty. The base counts as an adapter.

    Requests of the adapter that runs go first; after ``PATIENCE`` of them in a row that pass over
    an older request of another adapter, none is admitted until the batch is empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running = 0
        self._version = 0
        self._passed = 0

    def peek(self) -> Request | None:
        """The oldest of the adapter that runs, the oldest of all where none does."""
        oldest = super().peek()
        if oldest is None or not self._running:
            return oldest
        if oldest.adapter_version != self._version and self._passed >= PATIENCE:
            return None
        return next((r for r in self.upcoming() if r.adapter_version == self._version), None)

    def admitted(self, request: Request) -> None:
        """See ``Policy``."""
        if not self._running or request.adapter_version != self._version:
            self._version, self._passed = request.adapter_version, 0
        else:
            self._passed += 1
        self._running += 1

    def left(self, request: Request) -> None:
        """See ``Policy``."""
        self._running -= 1
