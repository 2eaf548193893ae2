"""Checkpointing that keeps attention's results against checkpointing that runs attention again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks import plots
from benchmarks.contenders import CAUSAL
from benchmarks.measure import Samples, in_turns
from benchmarks.progress import Advance
from benchmarks.result import Result
from dsp_plugin.comm.ledger import ledger
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels.counter import calls
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.method import Where
from dsp_plugin.spawn import RankFailure, spawn
from dsp_plugin.training.recompute import Tape

NAME = "recompute"
LAYERS, HEADS, HEAD_DIM, SIZE = 2, 4, 64, 2
FULL = {2048: 5, 4096: 3, 8192: 3, 16384: 2}
QUICK = {1024: 2, 2048: 2}
MODES = ("none", "full", "keep_attention")


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(QUICK if quick else FULL)


def run(quick: bool, advance: Advance) -> Result:
    """Measure at all lengths."""
    repeats = QUICK if quick else FULL
    width = HEADS * HEAD_DIM
    result = Result(
        NAME,
        "Checkpointing that keeps attention against ordinary checkpointing",
        {
            "model": f"{LAYERS} layers, width {width}, {HEADS} heads, MLP {4 * width}, fp32, each checkpointed",
            "attention": f"ring zigzag, causal, P={SIZE}, B=1",
            "repeats by length": str(repeats),
        },
        {
            "length": "L",
            "mode": "mode",
            "seconds": "s per step",
            "spread": "spread",
            "faster": "full / this",
            "kept_mib": "MiB kept per rank, measured",
            "kept_formula_mib": "by formula",
            "attention_again": "attention kernels run again",
            "sent_again_mib": "MiB sent again",
        },
        ["length", "mode", "seconds", "faster", "kept_mib", "sent_again_mib"],
        notes=[
            "A step is forward and backward, the slowest rank's, medians of repeats in turns, gradients not reduced.",
            "Formula: layers x B n H (D e + 4) bytes, the output and the log-sum-exp. 'none' keeps all activations; "
            "they are not counted here.",
            "A backward pass of attention has 2.5 times the arithmetic of a forward pass: where there is nothing but "
            "attention, and transfers are free, not running it again wins 4.5 / 3.5 = 1.29x over 'full'.",
        ],
    )
    for length, count in repeats.items():
        advance(f"L={length} P={SIZE}")
        try:
            _rows(result, length, spawn(measure, SIZE, length, count, timeout=240.0))
        except RankFailure as failure:
            result.failures.append(f"L={length}: {failure}")
    return result


def kept_bytes(tokens: int) -> int:
    """What `keep_attention` keeps on a rank of ``tokens`` tokens, by the formula in `dsp_plugin.training.recompute`."""
    return LAYERS * tokens * HEADS * (HEAD_DIM * 4 + 4)


@dataclass(frozen=True)
class Step:
    """What one step did on one rank beside taking time.

    Attributes:
        kept: bytes on the tapes between forward and backward.
        kernels: attention forward kernels during backward.
        sent: bytes of attention's forward sent during backward.
    """

    kept: int
    kernels: int
    sent: int


class Layer(nn.Module):
    """A pre-norm transformer layer on this rank's tokens ``[1, n, width]``."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        x = x + self.out(self.attention(q, k, v).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def measure(length: int, repeats: int) -> tuple[dict[str, Samples], dict[str, Step]]:
    """On every rank: a step in every mode, in turns, after a warm-up that also checks, at a small size."""
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method="ring", size=SIZE))
    warm_up = _Training(groups, min(length, 2048))
    warm_up.step("none")
    expected = warm_up.gradients()
    for mode in MODES[1:]:
        warm_up.step(mode)
        torch.testing.assert_close(warm_up.gradients(), expected, msg=f"gradients with {mode!r} differ")
    training = _Training(groups, length)
    done: dict[str, Step] = {}

    def step(mode: str) -> None:
        done[mode] = training.step(mode)

    return in_turns({mode: partial(step, mode) for mode in MODES}, repeats), done


class _Training:
    """The model, and this rank's tokens of one sequence."""

    def __init__(self, groups: SequenceParallelGroups, length: int) -> None:
        layout = Layout("zigzag", length, SIZE)
        ring = METHODS["ring"].attention
        assert ring is not None
        torch.manual_seed(0)
        attention = partial(ring, what=AttentionSpec(CAUSAL), where=Where(groups, layout))
        self._layers = nn.ModuleList(Layer(attention) for _ in range(LAYERS))
        self._x = torch.randn(1, layout.sizes[groups.sp.rank], HEADS * HEAD_DIM)

    def step(self, mode: str) -> Step:
        """Forward and backward."""
        self._layers.zero_grad()
        tapes: list[Tape] = []
        loss = _through(self._layers, self._x, mode, tapes).square().mean()
        kept = sum(tape.nbytes() for tape in tapes)
        with calls() as kernels, ledger() as log:
            loss.backward()
        return Step(kept, kernels.forward, log.bytes(phase="forward"))

    def gradients(self) -> list[Tensor]:
        """Of all parameters."""
        return [parameter.grad.clone() for parameter in self._layers.parameters() if parameter.grad is not None]


def _through(layers: nn.ModuleList, x: Tensor, mode: str, tapes: list[Tape]) -> Tensor:
    def on_a_tape() -> tuple[Any, Any]:
        tapes.append(Tape())
        return tapes[-1].record(), tapes[-1].replay()

    for layer in layers:
        if mode == "none":
            x = layer(x)
        elif mode == "full":
            x = checkpoint(layer, x, use_reentrant=False)
        else:
            x = checkpoint(layer, x, use_reentrant=False, context_fn=on_a_tape)
    return x


def _rows(result: Result, length: int, ranks: list[tuple[dict[str, Samples], dict[str, Step]]]) -> None:
    samples = ranks[0][0]
    for mode in MODES:
        did = [steps[mode] for _, steps in ranks]
        result.rows.append(
            {
                "length": length,
                "mode": mode,
                "seconds": samples[mode].wall,
                "faster": samples["full"].wall / samples[mode].wall,
                "kept_mib": max(step.kept for step in did) / 2**20,
                "kept_formula_mib": kept_bytes(-(-length // SIZE)) / 2**20 if mode == "keep_attention" else 0.0,
                "attention_again": max(step.kernels for step in did),
                "sent_again_mib": max(step.sent for step in did) / 2**20,
                "spread": samples[mode].spread,
                "samples": samples[mode].walls,
            }
        )


def draw(result: Result, path: Path) -> None:
    """Step time relative to ordinary checkpointing, and what it costs in memory."""
    figure, (times, memory) = plots.panels(2, f"Ring, P={SIZE}: checkpointing that keeps attention")
    lengths = sorted({row["length"] for row in result.rows})
    labels = [f"L={length // 1024}K" for length in lengths]
    found = {(row["mode"], row["length"]): row for row in result.rows}
    series = {mode: [1 / found[mode, length]["faster"] for length in lengths] for mode in MODES}
    plots.bars(times, labels, series, ["#97bbf5", "0.6", "#ff725c"])
    times.set_title("step time, 1 = ordinary ('full')")
    times.set_ylim(0, 1.25 * max(max(values) for values in series.values()))
    times.legend(fontsize=8, loc="upper right", ncols=3)
    kept = [found["keep_attention", length] for length in lengths]
    both = {"measured": [r["kept_mib"] for r in kept], "formula": [r["kept_formula_mib"] for r in kept]}
    plots.bars(memory, labels, both, ["#ff725c", "#9c6b4e"])
    memory.set_title("MiB kept per rank")
    memory.legend(fontsize=8, loc="upper left")
    plots.save(figure, path)
