"""Panels of curves as a picture, for the benchmarks' reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float]]

CONDITIONS = (
    "baseline",
    "setting",
    "model",
    "workload",
    "requests",
    "rate",
    "alpha",
    "cv",
    "scheduler",
)
"""What tells the curves of one picture apart."""


def draw(
    path: Path,
    title: str,
    x_label: str,
    panels: Mapping[str, Mapping[str, Points]],
    *,
    x_scale: str = "linear",
) -> None:
    """``panels``: what is on the y axis → curve → points. Says so where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("  (no plot: pip install 'slora-jax[plot]')")
        return
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (y_label, curves) in zip(axes, panels.items(), strict=True):
        for label, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axis.set(xlabel=x_label, ylabel=y_label, ylim=(0, None), xscale=x_scale)
        if x_scale == "symlog":
            axis.set(xlim=(0, None))
        axis.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)


def against_adapters(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw what ``benchmark_serving.py --json`` wrote: a curve a system and setting."""
    metrics = {
        "output tokens/s": ("output_tokens_per_s", 1),
        "TTFT p50, ms": ("ttft_p50", 1e3),
        "SLO attainment": ("slo_attainment", 1),
    }
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {label: {} for label in metrics}
    rows = [row for row in rows if "num_adapters" in row]
    differ = [key for key in CONDITIONS if len({row[key] for row in rows}) > 1]
    for row in sorted(rows, key=lambda row: row["num_adapters"]):
        what = [f"{key} {row[key]}" for key in differ if key != "baseline"]
        curve = ", ".join([row["baseline"] or "slora-jax", *what])
        for label, (key, factor) in metrics.items():
            panels[label].setdefault(curve, []).append((row["num_adapters"], factor * row[key]))
    title = ", ".join(
        sorted({row["device"] for row in rows})
        + [f"{key} {rows[0][key]}" for key in ("setting", "workload") if key not in differ]
    )
    draw(path, title, "adapters", panels, x_scale="symlog")
