"""How adapters are cut over the devices of a tensor-parallel model, and how each device's part lies
in its pages.

Owns both schemes, as plain arithmetic and NumPy. ``no_extra_collectives`` (ours): where the base is
cut by outputs (q, k, v, gate, up) every device has the whole A and its outputs of B; where it is
cut by inputs (o, down) its inputs of A and the whole B, whose term is then one more summand of the
base's all-reduce. ``s_lora`` (arXiv 2311.03285, section 6): A is cut by rank, or by inputs for o
and down, and B by outputs always; between the two halves a small intermediate is gathered, or added
up. Refuses to know how any of it is computed (``layers.lora``) and where a model's features are cut
(``models.llama``).

A scheme is one or two *stages*. A stage is a paged LoRA of its own: A and B of each target, of the
features that one device has. ``s_lora`` takes two, a shrink ``x · A · I`` and an expand ``h · I ·
B``, so that the same kernels serve it; the identities I lie in the adapter's pages and add some
percent to the bytes read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pallas_kernels.layout import GROUPS, LANES, TARGETS, AdapterLayout, LayerAdapter, stored_rank

Scheme = Literal["no_extra_collectives", "s_lora"]

CUT_BY_INPUTS = ("o", "down")
"""Targets whose base is cut by inputs; the others by outputs."""

WIDTH = LANES
"""Columns of the intermediate that each target has in ``s_lora``: the largest rank it takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterPartition:
    """One device's part of each adapter, the same size on all devices. Static and hashable."""

    scheme: Scheme
    owned: tuple[tuple[tuple[int, int], ...], ...]
    """Per device and target: (start, stop) of the outputs that it has; of the inputs for those of
    CUT_BY_INPUTS."""
    stages: tuple[AdapterLayout, ...]
    """What a device computes, one after the other."""

    @classmethod
    def make(
        cls,
        scheme: Scheme,
        features: Mapping[str, tuple[int, int]],
        owned: Sequence[Mapping[str, tuple[int, int]]],
        rows_per_page: int,
    ) -> AdapterPartition:
        """``features``: (inputs, outputs) of each target of the whole model; ``owned``: for each
        device, (start, stop) of what it has of a target. ``rows_per_page`` of one device.

        Raises ValueError where the outputs of o and down cannot be cut by ``s_lora``.
        """
        shards = len(owned)
        scheme = scheme if shards > 1 else "no_extra_collectives"  # nothing to cut
        share = {target: stop - start for target, (start, stop) in owned[0].items()}

        def layout(inputs: Mapping[str, int], outputs: Mapping[str, int]) -> AdapterLayout:
            return AdapterLayout(
                tuple(inputs[t] for t in TARGETS), tuple(outputs[t] for t in TARGETS), rows_per_page
            )

        inputs = {t: share[t] if t in CUT_BY_INPUTS else features[t][0] for t in TARGETS}
        if scheme == "no_extra_collectives":
            outputs = {t: features[t][1] if t in CUT_BY_INPUTS else share[t] for t in TARGETS}
            stages = (layout(inputs, outputs),)
        else:
            for target in CUT_BY_INPUTS:
                if features[target][1] % shards:
                    raise ValueError(
                        f"lora_partition='s_lora' cuts the {features[target][1]} outputs of "
                        f"{target!r} over {shards} devices: the model's hidden size must be a "
                        "multiple of their number"
                    )
            between = {t: WIDTH * len(group) for group in GROUPS for t in group}
            outputs = {
                t: features[t][1] // shards if t in CUT_BY_INPUTS else share[t] for t in TARGETS
            }
            stages = (layout(inputs, dict.fromkeys(TARGETS, WIDTH)), layout(between, outputs))
        order = tuple(tuple(device[t] for t in TARGETS) for device in owned)
        return cls(scheme=scheme, owned=order, stages=stages)

    @property
    def shards(self) -> int:
        """N, the devices that a model is cut over."""
        return len(self.owned)

    @property
    def rows_per_page(self) -> int:
        """Of one device."""
        return self.stages[0].rows_per_page

    def stage_ranks(self, ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Stored rank of each target in each stage, of an adapter of ``ranks``."""
        whole = tuple(stored_rank(int(rank)) for rank in ranks)
        if len(self.stages) == 1:
            return (whole,)
        cut = tuple(
            rank if target in CUT_BY_INPUTS else self.rank_share(rank)
            for target, rank in zip(TARGETS, whole, strict=True)
        )
        return cut, whole

    def rank_share(self, rank: int) -> int:
        """Of a rank that ``s_lora`` cuts, what each device stores: a multiple of 8, so the last
        devices may have less of it, or nothing."""
        return stored_rank(-(-rank // self.shards))

    def segments(self, ranks: Sequence[int]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """(a_row, b_row), each i32[7], of each stage; the stages lie one behind the other."""
        placed, first = [], 0
        for layout, of_stage in zip(self.stages, self.stage_ranks(ranks), strict=True):
            a_row, b_row, rows = layout.segments(of_stage)
            placed.append((a_row + np.int32(first), b_row + np.int32(first)))
            first += rows
        return tuple(placed)

    def num_rows(self, ranks: Sequence[int]) -> int:
        """Rows of 128 lanes that an adapter takes in one layer of one device."""
        stages = zip(self.stages, self.stage_ranks(ranks), strict=True)
        return sum(layout.segments(of_stage)[2] for layout, of_stage in stages)

    def num_pages(self, ranks: Sequence[int]) -> int:
        """Pages that an adapter of these ranks takes (on every device and layer, the same ids)."""
        return -(-self.num_rows(ranks) // self.rows_per_page)

    def pack(
        self,
        layers: Mapping[int, LayerAdapter],
        num_layers: int,
        ranks: Sequence[int],
        dtype: Any,
        devices: Sequence[int],
    ) -> np.ndarray:
        """The parts of ``devices``, in page form and side by side: [num_layers, num_pages,
        len(devices) * R, 128].

        ``layers`` and the errors are ``AdapterLayout.pack``'s; ValueError also for a rank that the
        scheme does not take.
        """
        if len(self.stages) > 1 and max(ranks) > WIDTH:
            raise ValueError(
                f"lora_partition='s_lora' takes ranks up to {WIDTH}, not {max(ranks)}: choose "
                "'no_extra_collectives'"
            )
        parts = []
        for device in devices:
            stages = []
            for number, (layout, of_stage) in enumerate(
                zip(self.stages, self.stage_ranks(ranks), strict=True)
            ):
                cut = {
                    layer: {
                        target: self._cut(number, device, target, ranks, *pair)
                        for target, pair in targets.items()
                    }
                    for layer, targets in layers.items()
                }
                # In pages of one segment's rows, so that what is not filled stays short.
                pages = dataclasses.replace(layout, rows_per_page=32).pack(
                    cut, num_layers, of_stage, dtype
                )
                stages.append(pages.reshape(num_layers, -1, LANES))
            parts.append(np.concatenate(stages, axis=1))
        whole = np.zeros(
            (num_layers, self.num_pages(ranks), len(devices), self.rows_per_page, LANES), dtype
        )
        for place, rows in enumerate(parts):
            short = whole.shape[1] * self.rows_per_page - rows.shape[1]
            rows = np.pad(rows, ((0, 0), (0, short), (0, 0)))
            whole[:, :, place] = rows.reshape(num_layers, -1, self.rows_per_page, LANES)
        return whole.reshape(num_layers, whole.shape[1], -1, LANES)

    def _cut(
        self,
        stage: int,
        device: int,
        target: str,
        ranks: Sequence[int],
        a: np.ndarray,
        b: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(a, b) of one device and stage, out of a layer's a [r, in] and b [out, r]."""
        own = slice(*self.owned[device][TARGETS.index(target)])
        if len(self.stages) == 1:
            return (a[:, own], b) if target in CUT_BY_INPUTS else (a, b[own])
        if stage == 0:
            if target in CUT_BY_INPUTS:
                a = a[:, own]
            else:
                share = self.rank_share(int(ranks[TARGETS.index(target)]))
                a = a[device * share : (device + 1) * share]
            return a, np.eye(WIDTH, len(a), dtype=a.dtype)
        if target in CUT_BY_INPUTS:
            width = len(b) // self.shards
            own = slice(device * width, (device + 1) * width)
        group = next(group for group in GROUPS if target in group)
        column = group.index(target) * WIDTH
        return np.eye(len(a), WIDTH * len(group), column, dtype=b.dtype), b[own]
