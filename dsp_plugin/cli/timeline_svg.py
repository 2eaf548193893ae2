"""A plot of a dry run's memory over its allocations, drawn without a library: SVG is text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dsp_plugin.rehearsal.dryrun import RankRun
from dsp_plugin.rehearsal.timeline import Layer, Timeline

_WIDTH, _HEIGHT = 1200, 560
_LEFT, _TOP, _RIGHT, _BOTTOM = 90, 50, 330, 50
# Okabe and Ito's, told apart without colour vision, too.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


def timeline_svg(title: str, run: RankRun) -> str:
    """The file's text: bytes alive by module, a line with the parameters' gradients, a line of the host, the phases."""
    timeline = run.timeline
    assert timeline is not None
    layers = timeline.layers(run.gradients)
    events = layers[0].events
    whole, host = timeline.curve(), timeline.curve(on_host=True)
    most = max(run.memory.peak, max(host, default=0), 1)
    unit, name = next((unit, name) for unit, name in _UNITS if most >= unit)
    plot = _Axes(max(len(whole), 1), most)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="16">{escape(title)}</text>',
        *_grid(plot, most, unit, name),
        *_areas(plot, layers),
        _line(plot, events, [whole[event] for event in events], "black", "with gradients of parameters"),
    ]
    legend = [(_COLOURS[index], layer.module or "outside of modules") for index, layer in enumerate(layers)]
    legend.append(("black", "line: with gradients of parameters"))
    if any(host):
        lines.append(_line(plot, events, [host[event] for event in events], "red", "host memory"))
        legend.append(("red", "line: host memory"))
    lines += _phases(plot, timeline, len(whole))
    for index, (colour, text) in enumerate(legend):
        y = _TOP + 12 + 22 * index
        x = _WIDTH - _RIGHT + 20
        lines.append(f'<rect x="{x}" y="{y - 11}" width="14" height="14" fill="{colour}"/>')
        lines.append(f'<text x="{x + 20}" y="{y}">{escape(text)}</text>')
    return "\n".join([*lines, "</svg>", ""])


class _Axes:
    """Where events and bytes are on the page."""

    def __init__(self, events: int, most: int) -> None:
        self._events, self._most = events, most

    def x(self, event: int) -> str:
        return f"{_LEFT + (_WIDTH - _LEFT - _RIGHT) * event / self._events:.1f}"

    def y(self, nbytes: float) -> str:
        return f"{_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * nbytes / self._most:.1f}"


def _grid(plot: _Axes, most: int, unit: int, name: str) -> list[str]:
    lines = []
    for part in range(5):
        nbytes = most * part / 4
        y, right = plot.y(nbytes), _WIDTH - _RIGHT
        lines.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="#dddddd"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y}" text-anchor="end">{nbytes / unit:.2f} {name}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    lines.append(f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">allocations and frees, in order</text>')
    return lines


def _areas(plot: _Axes, layers: Sequence[Layer]) -> list[str]:
    """The layers on top of each other, the one that holds the most at the bottom."""
    lines, below = [], [0] * len(layers[0].events)
    for index, layer in enumerate(layers):
        above = [low + nbytes for low, nbytes in zip(below, layer.nbytes, strict=True)]
        there = [f"{plot.x(event)},{plot.y(top)}" for event, top in zip(layer.events, above, strict=True)]
        back = [f"{plot.x(event)},{plot.y(low)}" for event, low in zip(layer.events, below, strict=True)]
        name = escape(layer.module or "outside of modules")
        points = " ".join([*there, *reversed(back)])
        lines.append(f'<polygon points="{points}" fill="{_COLOURS[index]}" fill-opacity="0.8"><title>{name}</title>')
        lines.append("</polygon>")
        below = above
    return lines


def _line(plot: _Axes, events: Sequence[int], values: Sequence[int], colour: str, name: str) -> str:
    points = " ".join(f"{plot.x(event)},{plot.y(value)}" for event, value in zip(events, values, strict=True))
    return f'<polyline points="{points}" fill="none" stroke="{colour}"><title>{escape(name)}</title></polyline>'


def _phases(plot: _Axes, timeline: Timeline, events: int) -> list[str]:
    lines = []
    for event, phase in timeline.marks:
        x = plot.x(min(event, events))
        lines.append(f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="black" ')
        lines.append(f'stroke-dasharray="4 4"/><text x="{float(x) + 4}" y="{_TOP - 6}">{phase}</text>')
    return lines
