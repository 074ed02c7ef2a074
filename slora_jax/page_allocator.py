"""PageAllocator: which page of the pool belongs to whom.

Owns the free list over page ids and the owner of every page that is not free. It refuses to know
what a page holds (KV of a request, weights of an adapter), how large it is, and who should give
pages up when they are short: it says no, and its callers decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

NULL_PAGE = 0
"""Never given out: padding reads and writes it."""

Owner = tuple[str, Hashable]
"""(kind, id): ``("kv", request_id)`` or ``("adapter", version)``."""


class PageAllocator:
    """A free list over the page ids 1 … ``num_pages`` - 1. Every operation is O(1) a page.

    Invariant: each of these ids is free or owned by exactly one owner, never both.
    """

    def __init__(self, num_pages: int):
        assert num_pages >= 1, "the null page is always there"
        # A stack: the page freed last is given out first; the first pages given out are 1, 2, 3, …
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._owner: list[Owner | None] = [None] * num_pages
        self._counts: Counter[str] = Counter()

    @property
    def num_usable(self) -> int:
        """Pages that can be owned at all: every page but the null page."""
        return len(self._owner) - 1

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def allocate(self, n: int, owner: Owner) -> list[int] | None:
        """Give ``n`` more pages to ``owner``: all of them, or None when fewer are free."""
        assert n >= 0
        if n > len(self._free):
            return None
        first = len(self._free) - n
        pages = self._free[first:]
        pages.reverse()
        del self._free[first:]
        for page in pages:
            self._owner[page] = owner
        self._counts[owner[0]] += n
        return pages

    def free(self, pages: Iterable[int], owner: Owner) -> None:
        """Take back pages that ``owner`` owns."""
        for page in pages:
            assert page != NULL_PAGE, "the null page is never owned"
            assert self._owner[page] == owner, (
                f"page {page} belongs to {self._owner[page]}, not to {owner}"
            )
            self._owner[page] = None
            self._free.append(page)
            self._counts[owner[0]] -= 1

    def counts(self) -> dict[str, int]:
        """Owned pages by kind of owner."""
        return {kind: count for kind, count in self._counts.items() if count}

    def owners(self) -> dict[Owner, list[int]]:
        """Every owner's pages in ascending order. Looks at the whole pool: for tests."""
        owners: dict[Owner, list[int]] = {}
        for page, owner in enumerate(self._owner):
            if owner is not None:
                owners.setdefault(owner, []).append(page)
        return owners

    def pages_of(self, owner: Owner) -> list[int]:
        """One owner's pages in ascending order. Looks at the whole pool: for tests."""
        return self.owners().get(owner, [])

    def check(self) -> None:
        """Assert the invariant. Looks at the whole pool: for tests."""
        owned = [page for page, owner in enumerate(self._owner) if owner is not None]
        assert sorted(self._free + owned) == list(range(1, len(self._owner)))
        assert self.counts() == Counter(owner[0] for owner in self._owner if owner is not None)
