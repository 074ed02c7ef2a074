"""AdapterCache: which adapters are in the page pool, and why they stay there.

Owns residency: the pages of each resident adapter, how many running requests refer to it, which
ones are pinned, and who leaves first when pages are short. It decides swap-ins and evictions and
hands them over as values; it refuses to know how pages are copied, and anything of requests but
their number.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from slora_jax.adapter_store import BASE_VERSION, AdapterStore, PackedAdapter
from slora_jax.errors import AdapterLoadError, CapacityError
from slora_jax.page_allocator import Owner, PageAllocator

logger = logging.getLogger("slora_jax.adapter_cache")


@dataclasses.dataclass(frozen=True, slots=True)
class SwapIn:
    """Copy ``packed`` into ``pages`` of the pool, before the step's tokens are computed."""

    version: int
    pages: tuple[int, ...]
    packed: PackedAdapter


@dataclasses.dataclass(slots=True, eq=False)
class _Resident:
    pages: tuple[int, ...]
    references: int = 0
    is_pinned: bool = False


class AdapterCache:
    """Adapters in the pool, by version.

    Invariant: a resident adapter owns exactly its pages in the allocator, and is in use (referred
    to by a running request), pinned, or idle. Only idle adapters are evicted, least recently used
    first. A version that the store drops owns no page any more.

    A failed operation leaves everything as it was. The base (version 0) owns no pages: it is always
    there and never listed.
    """

    def __init__(self, allocator: PageAllocator, store: AdapterStore):
        self._allocator = allocator
        self._store = store
        self._resident: dict[int, _Resident] = {}
        # Neither in use nor pinned, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._idle_pages = 0
        self._swap_ins: dict[int, SwapIn] = {}  # decided, not yet handed over
        self._evicted: list[int] = []  # likewise
        self.pinned_pages = 0
        """Pages of pinned adapters, which no request but their own can use."""
        self.hits = 0
        """How often a request's adapter was resident already."""
        self.swap_ins = 0
        self.swap_in_bytes = 0
        self.evictions = 0
        """How often an idle adapter left because its pages were needed."""
        store.on_unregister = self.unpin
        store.on_drop = self.forget

    # -- in use: acquire / release -------------------------------------------------------------

    def acquire(self, version: int) -> tuple[int, ...] | None:
        """The pages of an adapter that one more running request uses; None when pages are short.

        Swaps it in where it is not resident, evicting idle adapters as needed and no more. Raises
        AdapterLoadError where the store cannot read it.
        """
        if version == BASE_VERSION:
            return ()
        resident = self._resident.get(version)
        if resident is not None:
            self.hits += 1
            self._leave_idle(version, resident)
        else:
            resident = self._bring_in(version)
            if resident is None:
                return None
        resident.references += 1
        return resident.pages

    def release(self, version: int) -> None:
        """Undo one ``acquire``. An adapter that nobody uses stays until its pages are needed."""
        if version == BASE_VERSION:
            return
        resident = self._resident[version]
        assert resident.references > 0, f"adapter version {version} is not in use"
        resident.references -= 1
        self._enter_idle(version, resident)

    # -- ahead of time: touch / prefetch -------------------------------------------------------

    def touch(self, versions: Iterable[int]) -> int:
        """Let idle ones among ``versions`` be evicted last, the first of them very last.

        Returns their pages.
        """
        idle = [version for version in versions if version in self._idle]
        for version in reversed(idle):
            self._idle.move_to_end(version)
        return sum(len(self._resident[version].pages) for version in idle)

    def prefetch(self, version: int, *, spare: int) -> bool:
        """Swap an adapter in that nobody uses yet; it is idle, and evicted last.

        False, with nothing changed, where it is resident already, or where fewer than ``spare``
        pages would be left free or idle. Raises AdapterLoadError where it cannot be read.
        """
        if version == BASE_VERSION or version in self._resident:
            return False
        if self.num_available(version) < spare:
            return False
        resident = self._bring_in(version)
        assert resident is not None, "num_available counted its pages"
        self._enter_idle(version, resident)
        return True

    # -- kept whatever comes: pin / unpin ------------------------------------------------------

    def pin(self, version: int) -> None:
        """Swap an adapter in and never evict it, until it is unpinned or unregistered.

        Pinning twice is pinning once.
        Whether the requests in the queue still fit beside it is the scheduler's to check.
        """
        resident = self._resident.get(version)
        if resident is None:
            resident = self._bring_in(version)
            if resident is None:
                info = self._store.info(version)
                raise CapacityError(
                    f"adapter {info.name!r} takes {info.num_pages} pages, and only "
                    f"{self._allocator.num_free + self._idle_pages} of "
                    f"{self._allocator.num_usable} can be freed now "
                    f"({self.pinned_pages} are pinned, the others are used by running requests): "
                    "unpin another adapter, wait for requests to finish, or raise pool_bytes"
                )
        else:
            self._leave_idle(version, resident)
        if not resident.is_pinned:
            resident.is_pinned = True
            self.pinned_pages += len(resident.pages)

    def unpin(self, version: int) -> None:
        """Undo ``pin``; nothing where it is not pinned."""
        resident = self._resident.get(version)
        if resident is not None and resident.is_pinned:
            resident.is_pinned = False
            self.pinned_pages -= len(resident.pages)
            self._enter_idle(version, resident)

    def is_pinned(self, version: int) -> bool:
        """Whether ``version`` stays whatever comes."""
        resident = self._resident.get(version)
        return resident is not None and resident.is_pinned

    @property
    def num_pinned(self) -> int:
        """How many adapters are pinned."""
        return sum(resident.is_pinned for resident in self._resident.values())

    # -- residency: swap in / evict ------------------------------------------------------------

    def evict_idle(self, num_pages_needed: int) -> bool:
        """Evict idle adapters until that many pages are free, as few as it takes.

        False, with nothing evicted, where even all of them would not be enough.
        """
        if num_pages_needed > self._allocator.num_free + self._idle_pages:
            return False
        while self._allocator.num_free < num_pages_needed:
            version = next(iter(self._idle))
            self._leave_idle(version, self._resident[version])
            self._give_back(version)
            self.evictions += 1
        return True

    def forget(self, version: int) -> None:
        """Free the pages of a version that does not exist any more."""
        resident = self._resident.get(version)
        if resident is not None:
            assert version in self._idle, f"adapter version {version} is in use"
            self._leave_idle(version, resident)
            self._give_back(version)

    def lose_pool(self) -> None:
        """The pool's contents are gone, and nobody uses any: nothing is resident, and what is
        pinned comes in anew. A pinned adapter that cannot be read again is pinned no more.
        """
        pinned = [version for version, resident in self._resident.items() if resident.is_pinned]
        for version in pinned:
            self.unpin(version)
        for version in list(self._resident):
            self.forget(version)
        self._evicted.clear()  # whoever was told of them has lost them too
        for version in pinned:
            try:
                self.pin(version)
            except AdapterLoadError:
                logger.warning("an adapter is not pinned any more", exc_info=True)

    def num_available(self, version: int) -> int:
        """Pages that would be free or idle once ``version`` is in use; negative if it cannot be."""
        if version in self._resident and version not in self._idle:
            own_pages = 0
        else:
            own_pages = self._store.num_pages(version)
        return self._allocator.num_free + self._idle_pages - own_pages

    def take_swap_ins(self) -> tuple[SwapIn, ...]:
        """What must be copied before the next step; each is handed over once."""
        swap_ins = tuple(self._swap_ins.values())
        self._swap_ins.clear()
        self.swap_ins += len(swap_ins)
        self.swap_in_bytes += sum(swap_in.packed.nbytes for swap_in in swap_ins)
        return swap_ins

    def take_evicted(self) -> tuple[int, ...]:
        """Versions that left the pool since the last call. They left before the swap-ins that are
        handed over with them: a version in both is resident."""
        evicted = tuple(self._evicted)
        self._evicted.clear()
        return evicted

    def resident(self) -> dict[int, tuple[int, ...]]:
        """The pages of each adapter in the pool."""
        return {version: resident.pages for version, resident in self._resident.items()}

    @property
    def num_resident(self) -> int:
        """How many adapters are in the pool."""
        return len(self._resident)

    def _bring_in(self, version: int) -> _Resident | None:
        num_pages = self._store.num_pages(version)
        if num_pages > self._allocator.num_free + self._idle_pages:
            return None
        packed = self._store.fetch(version)  # may raise: nothing has changed yet
        self.evict_idle(num_pages)
        pages = self._allocator.allocate(num_pages, _owner(version))
        assert pages is not None
        resident = self._resident[version] = _Resident(tuple(pages))
        self._swap_ins[version] = SwapIn(version, resident.pages, packed)
        return resident

    def _give_back(self, version: int) -> None:
        self._allocator.free(self._resident.pop(version).pages, _owner(version))
        if self._swap_ins.pop(version, None) is None:
            self._evicted.append(version)

    def _enter_idle(self, version: int, resident: _Resident) -> None:
        if not resident.references and not resident.is_pinned:
            self._idle[version] = None
            self._idle_pages += len(resident.pages)

    def _leave_idle(self, version: int, resident: _Resident) -> None:
        if version in self._idle:
            del self._idle[version]
            self._idle_pages -= len(resident.pages)

    def check(self, references: Mapping[int, int]) -> None:
        """Assert the invariants, given how many running requests use each version. For tests."""
        assert {v: r.references for v, r in self._resident.items() if r.references} == {
            v: n for v, n in references.items() if n and v != BASE_VERSION
        }
        owned = {
            owner[1]: sorted(pages)
            for owner, pages in self._allocator.owners().items()
            if owner[0] == "adapter"
        }
        assert owned == {v: sorted(r.pages) for v, r in self._resident.items()}
        assert all(len(r.pages) == self._store.num_pages(v) for v, r in self._resident.items())
        idle = {v for v, r in self._resident.items() if not r.references and not r.is_pinned}
        assert set(self._idle) == idle
        assert self._idle_pages == sum(len(self._resident[v].pages) for v in idle)
        assert self.pinned_pages == sum(
            len(r.pages) for r in self._resident.values() if r.is_pinned
        )
        assert all(s.pages == self._resident[v].pages for v, s in self._swap_ins.items())


def _owner(version: int) -> Owner:
    return ("adapter", version)
