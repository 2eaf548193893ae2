"""Time and memory of linear attention against the sequence length, beside softmax attention."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plots
from benchmarks.contenders import CAUSAL
from benchmarks.measure import Samples, in_turns
from benchmarks.progress import Advance
from benchmarks.result import Result, Row
from dsp_plugin.comm.ledger import ledger
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels.linear import linear_attention
from dsp_plugin.kernels.softmax import attention as softmax_attention
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout, LayoutKind
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.method import Where
from dsp_plugin.spawn import RankFailure, spawn

NAME = "linear_length"
HEADS, HEAD_DIM, SIZE = 4, 64, 2
# Softmax attention is left out from where it takes minutes.
FULL = {2048: 5, 4096: 5, 8192: 5, 16384: 3, 32768: 3, 65536: 3}
QUICK = {1024: 2, 2048: 2}
FULL_SOFTMAX, QUICK_SOFTMAX = 16384, 2048
_COLORS = {"lasp head": "#a463f2", "lasp gated-delta": "#9c6b4e"}


@dataclass(frozen=True)
class Contender:
    """A kind of attention by a method in a layout; ``decay`` is empty for softmax attention."""

    method: str
    layout: LayoutKind
    decay: str = ""

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"lasp {self.decay}" if self.decay else f"{self.method} {self.layout}"


CONTENDERS = [
    Contender("lasp", "contiguous", "head"),
    Contender("lasp", "contiguous", "gated-delta"),
    Contender("ring", "zigzag"),
    Contender("ulysses", "contiguous"),
]


@dataclass(frozen=True)
class Point:
    """What one contender took at one length.

    Attributes:
        peak: bytes by rank that a step's peak lies above what is resident before it, inputs included.
        sent: bytes by rank.
    """

    samples: Samples
    peak: list[int]
    sent: list[int]


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(_plan(quick))


def _plan(quick: bool) -> list[tuple[int, int, Contender]]:
    repeats, longest = (QUICK, QUICK_SOFTMAX) if quick else (FULL, FULL_SOFTMAX)
    return [
        (length, count, contender)
        for length, count in repeats.items()
        for contender in CONTENDERS
        if contender.decay or length <= longest
    ]


def run(quick: bool, advance: Advance) -> Result:
    """Measure every contender at every length, each in processes of its own."""
    result = Result(
        NAME,
        "Linear attention against the sequence length",
        {
            "shape": f"causal, B=1, H=K={HEADS}, D={HEAD_DIM}, fp32, P={SIZE}",
            "repeats by length": str(QUICK if quick else FULL),
        },
        {
            "length": "L",
            "contender": "method",
            "seconds": "s",
            "spread": "spread",
            "per_token": "us per token",
            "of_shortest": "per token, of the shortest L",
            "exponent": "exponent from L/2",
            "cpu_busiest": "CPU s, busiest rank",
            "peak_mib": "MiB a step adds at its peak, per rank",
            "peak_per_token": "KiB of it per token of the rank",
            "sent_mib": "MiB sent per rank",
        },
        ["length", "contender", "seconds", "of_shortest", "exponent", "peak_mib", "sent_mib"],
        notes=[
            "A step is forward and backward, the slowest rank's, medians of repeats. Per token: of the whole sequence.",
            "Exponent: x where seconds grow as L^x, from half the length.",
            "Peak: of the first step at this length in a process of its own, Linux's high-water mark (VmHWM, reset "
            "before) less what was resident before (VmRSS). Inputs are resident before, their gradients are not. Freed "
            "memory goes back at once, so that it is the tensors' and not what the allocator holds.",
            "In timed steps glibc keeps freed memory, as GPU allocators do: page faults would be up to half the time.",
        ],
    )
    for length, count, contender in _plan(quick):
        advance(f"L={length} {contender.name}")
        try:
            _row(result, length, contender, spawn(measure, SIZE, contender, length, count, timeout=200.0)[0])
        except RankFailure as failure:
            result.failures.append(f"L={length} {contender.name}: {failure}")
    for contender in CONTENDERS:
        rows = [row for row in result.rows if row["contender"] == contender.name]
        if len(rows) > 1:
            result.notes.append(f"{contender.name}: seconds grow as L^{_exponent(rows):.2f} over all lengths.")
    return result


def measure(contender: Contender, length: int, repeats: int) -> Point:
    """On each rank: memory of a first step and time of more, after a short sequence that also checks."""
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method=contender.method, size=SIZE))
    _check(contender, groups)
    step = _sharded(contender, groups, length)
    with ledger() as log:
        peak = peak_bytes(step)
    by_rank: list[tuple[int, int]] = [(0, 0)] * SIZE
    dist.all_gather_object(by_rank, (peak, log.bytes()))
    _keep_freed_memory()
    step()
    samples = in_turns({contender.name: step}, repeats)[contender.name]
    return Point(samples, [peak for peak, _ in by_rank], [sent for _, sent in by_rank])


def peak_bytes(step: Callable[[], object]) -> int:
    """How far the memory of this process rises above where it is, while ``step`` runs; Linux with glibc only."""
    glibc = ctypes.CDLL(None)
    # Blocks of 64 KiB and more go back as soon as they are freed: else holes between live ones would count.
    mmap_threshold = -3
    glibc.mallopt(mmap_threshold, 2**16)
    # What has been kept of freed memory would be used again, and go uncounted.
    glibc.malloc_trim(0)
    # Sets the high-water mark to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _keep_freed_memory() -> None:
    """As allocators of GPUs do: glibc hands large blocks back, and getting them anew may cost as much as a step."""
    never_map, never_trim = -4, -1
    ctypes.CDLL(None).mallopt(never_map, 0)
    ctypes.CDLL(None).mallopt(never_trim, 2**31 - 1)


def _status(key: str) -> int:
    """Bytes, from the kilobytes of a line of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _tensors(contender: Contender, length: int) -> list[Tensor]:
    """Whole inputs and gradient of the output, alike on every rank: q, k, v, gates, dout."""
    generator = torch.Generator().manual_seed(length)
    q, k, v, dout = (torch.randn(1, length, HEADS, HEAD_DIM, generator=generator) for _ in range(4))
    gates: list[Tensor] = []
    if contender.decay == "head":
        gates = [-(2.0 ** -torch.arange(1.0, HEADS + 1))]
    elif contender.decay == "gated-delta":
        k = F.normalize(k, dim=-1)
        rates, betas = (torch.randn(1, length, HEADS, generator=generator) for _ in range(2))
        gates = [F.logsigmoid(rates) / 16, betas.sigmoid()]
    return [q, k, v, *gates, dout]


def _sharded(contender: Contender, groups: SequenceParallelGroups, length: int) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward on this rank's tokens."""
    layout = Layout(contender.layout, length, SIZE)
    *inputs, dout = (
        layout.shard(x, 1, groups.sp.rank).clone() if x.dim() > 1 else x for x in _tensors(contender, length)
    )
    attention = METHODS[contender.method].attention
    assert attention is not None
    settings = {} if contender.decay else {"what": AttentionSpec(CAUSAL)}
    return _both_passes(partial(attention, where=Where(groups, layout), **settings), inputs, dout)


def _both_passes(call: Callable[..., Tensor], tensors: list[Tensor], dout: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    inputs = [x.requires_grad_() for x in tensors]

    def step() -> tuple[Tensor, ...]:
        out = call(*inputs)
        return out, *torch.autograd.grad(out, inputs, dout)

    return step


def _check(contender: Contender, groups: SequenceParallelGroups, length: int = 512) -> None:
    """A fast wrong answer is no result. Also starts what the first step would start: threads, connections."""
    layout = Layout(contender.layout, length, SIZE)
    *inputs, dout = _tensors(contender, length)
    softmax = partial(softmax_attention, spec=AttentionSpec(CAUSAL))
    local: Callable[..., Tensor] = linear_attention if contender.decay else softmax  # type: ignore[assignment]
    found, expected = _sharded(contender, groups, length)(), _both_passes(local, inputs, dout)()
    for index, (got, whole) in enumerate(zip(found, expected, strict=True)):
        if whole.dim() == 1:
            # A gate per head has a part of its gradient on every rank.
            dist.all_reduce(got)
        wanted = layout.shard(whole, 1, groups.sp.rank) if whole.dim() > 1 else whole
        error = (got - wanted).abs().max().item() / max(1.0, whole.abs().max().item())
        assert error < 1e-4, f"{contender.name}: result {index} is {error:.1e} off that of one process"


def _row(result: Result, length: int, contender: Contender, point: Point) -> None:
    samples = point.samples
    row: Row = {
        "length": length,
        "contender": contender.name,
        "seconds": samples.wall,
        "spread": samples.spread,
        "per_token": samples.wall / length * 1e6,
        "cpu_busiest": max(samples.cpu_by_rank),
        "peak_mib": max(point.peak) / 2**20,
        "peak_per_token": max(point.peak) / 2**10 / (length / SIZE),
        "sent_mib": fmean(point.sent) / 2**20,
        "samples": samples.walls,
        "peak_by_rank": point.peak,
        "sent_by_rank": point.sent,
    }
    before = [earlier for earlier in result.rows if earlier["contender"] == contender.name]
    row["of_shortest"] = row["per_token"] / before[0]["per_token"] if before else 1.0
    if before:
        row["exponent"] = math.log(row["seconds"] / before[-1]["seconds"]) / math.log(length / before[-1]["length"])
    result.rows.append(row)


def _exponent(rows: list[Row]) -> float:
    """The slope of log seconds over log length, by least squares."""
    x, y = ([math.log(row[key]) for row in rows] for key in ("length", "seconds"))
    mean_x, mean_y = fmean(x), fmean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def draw(result: Result, path: Path) -> None:
    """Time per token, memory per token of a rank, and bytes sent, over the length."""
    figure, panels = plots.panels(3, f"Linear and softmax attention, forward + backward, P={SIZE}")
    lengths = sorted({row["length"] for row in result.rows})
    keys = {
        "per_token": "us per token",
        "peak_per_token": "KiB at the peak per local token",
        "sent_mib": "MiB sent per rank",
    }
    for panel, (key, title) in zip(panels, keys.items(), strict=True):
        for contender in CONTENDERS:
            mine = [row for row in result.rows if row["contender"] == contender.name]
            x, y = ([row[column] for row in mine] for column in ("length", key))
            color = _COLORS.get(contender.name, plots.color(contender.name))
            panel.plot(x, y, marker="o", markersize=4, color=color, label=contender.name)
        panel.set_title(title)
        plots.lengths(panel, lengths)
        if key == "sent_mib":
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    plots.save(figure, path)
