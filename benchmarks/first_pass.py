"""What it costs that ranks agree, in the first pass of a kind, to go on with each attention."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import plots
from benchmarks.measure import Samples, in_turns
from benchmarks.progress import Advance
from benchmarks.result import Result
from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups, ledger, parallelize
from dsp_plugin.comm.consent import go_on
from dsp_plugin.comm.ledger import AGREEMENT
from dsp_plugin.spawn import RankFailure, spawn

NAME = "first_pass"
HEADS, WIDTH, LAYERS = 8, 256, 8
AGREEMENTS = 100
FULL, QUICK = (2047, 8191), (255,)
FULL_REPEATS, QUICK_REPEATS = 5, 2
SIZES = (2, 4)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BnC: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BnC).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x_BnC + self.out(attended.transpose(1, 2).flatten(2))


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(SIZES) * len(QUICK if quick else FULL)


def run(quick: bool, advance: Advance) -> Result:
    """Measure at all lengths and sizes."""
    lengths, repeats = (QUICK, QUICK_REPEATS) if quick else (FULL, FULL_REPEATS)
    result = Result(
        NAME,
        "The first pass of a kind",
        {"model": f"{LAYERS} layers of causal attention, B=1, H={HEADS}, C={WIDTH}, fp32, ulysses", "repeats": repeats},
        {
            "length": "L",
            "size": "P",
            "known": "s, known kind",
            "first": "s, first of its kind",
            "slower": "first / known",
            "calls": "agreements",
            "sent": "bytes sent per rank",
            "each": "ms each, alone",
        },
        ["length", "size", "known", "first", "slower", "each"],
        notes=[
            "A step is forward and backward, medians of repeats in turns. In the first pass of a kind ranks agree once "
            "on its shapes and, where they hold unequally many tokens, as here, once on every attention.",
            f"Alone: the mean of {AGREEMENTS} agreements one after the other.",
        ],
    )
    for length in lengths:
        for size in SIZES:
            advance(f"L={length} P={size}")
            try:
                samples, calls, sent = spawn(_measured, size, length, repeats, timeout=300.0)[0]
            except RankFailure as failure:
                result.failures.append(f"L={length} P={size}: {failure}")
                continue
            known, first, alone = (samples[name].wall for name in ("known", "first", "alone"))
            row = {"length": length, "size": size, "known": known, "first": first, "slower": first / known}
            result.rows.append({**row, "calls": calls, "sent": sent, "each": 1e3 * alone / AGREEMENTS})
    return result


def _measured(length: int, repeats: int) -> tuple[dict[str, Samples], int, int]:
    config = SequenceParallelConfig(
        method="ulysses",
        size=torch.distributed.get_world_size(),
        batch={"input": 1},
        attention=("*",),
        gather_output=1,
        positions=None,
        quiet=True,
    )
    groups = SequenceParallelGroups.build(config)
    torch.manual_seed(0)
    layers = nn.Sequential(*(_Attention() for _ in range(LAYERS)))
    x = torch.randn(1, length, WIDTH)

    def sharded() -> nn.Module:
        model = deepcopy(layers)
        parallelize(model, config=config, groups=groups)
        return model

    def step(model: nn.Module) -> None:
        model(x).sum().backward()

    def agree() -> None:
        for _ in range(AGREEMENTS):
            go_on("a step", None, groups.sp)

    models: Iterator[nn.Module] = iter([sharded() for _ in range(repeats + 1)])
    known = next(models)
    with ledger() as log:
        step(known)
    steps = {"known": lambda: step(known), "first": lambda: step(next(models)), "alone": agree}
    return in_turns(steps, repeats), log.calls(method=AGREEMENT), log.bytes(method=AGREEMENT)


def draw(result: Result, path: Path) -> None:
    """How many times longer the first pass of a kind takes than one of a known kind."""
    figure, (panel,) = plots.panels(1, "The first pass of a kind: times as long as one of a known kind")
    labels = [f"P={row['size']}\nL={row['length']}" for row in result.rows]
    plots.bars(panel, labels, {"first / known": [row["slower"] for row in result.rows]}, [plots.color("ulysses")])
    panel.axhline(1, color="0.6", linewidth=1)
    plots.save(figure, path)
