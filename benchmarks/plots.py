"""One look for all plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#97bbf5", "#9c6b4e")
_ORDER = ("ulysses", "ring zigzag", "usp", "lightseq", "ring contiguous", "ring striped")


def color(name: str) -> str:
    """The same for a contender in every plot; grey for what is not one."""
    return next((_COLORS[index] for index, start in enumerate(_ORDER) if name.startswith(start)), "0.45")


def panels(count: int, title: str) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` panels in a row."""
    figure = Figure(figsize=(4.6 * count, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def line(panel: Any, name: str, x: Sequence[float], y: Sequence[float]) -> None:
    """One contender over ``x``."""
    style = "-" if color(name).startswith("#") else "--"
    panel.plot(x, y, marker="o", markersize=4, linestyle=style, color=color(name), label=name)


def lengths(panel: Any, values: Sequence[int]) -> None:
    """A logarithmic axis of sequence lengths."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [f"{value // 1024}K" if value >= 1024 else str(value) for value in values])
    panel.minorticks_off()
    panel.set_xlabel("sequence length")


def bars(panel: Any, places: Sequence[str], series: Mapping[str, Sequence[float]], colors: Sequence[str]) -> None:
    """Grouped bars: at every place one of each series, with its value on top."""
    width = 0.8 / max(len(series), 1)
    for index, (name, values) in enumerate(series.items()):
        left = [place - 0.4 + (index + 0.5) * width for place in range(len(places))]
        drawn = panel.bar(left, values, width * 0.92, color=colors[index], label=name)
        panel.bar_label(drawn, fmt="%.2f", fontsize=7, padding=1)
    panel.set_xticks(range(len(places)), places)


def save(figure: Figure, path: Path) -> None:
    """As PNG."""
    figure.savefig(path, dpi=130)
