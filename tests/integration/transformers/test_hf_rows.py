"""Rows that are padded and packed unlike are what Transformers makes of them: logits, losses and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_rows import batch, built, logits_of, loss_of
from torch import Tensor

from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.patches.transformers import ShardedCausalLM, checked_section
from dsp_plugin.spawn import spawn
from dsp_plugin.verification.double import InDouble, backward

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

KINDS = ("left", "right", "sides", "middle", "packed", "alike", "numbered", "flat", "ends", "indexed", "restated")
PLACED = (
    ("ring", "zigzag"),
    ("ring", "contiguous"),
    ("ring", "striped"),
    ("ulysses", "auto"),
    ("usp", "auto"),
    ("lightseq", "auto"),
)


def _sharded(model: Any, method: str, layout: str, size: int) -> None:
    section = {"method": method, "size": size, "layout": layout}
    if method == "usp" and size == 4:
        section["ulysses_size"] = 2
    config: SequenceParallelConfig = checked_section(model, section)
    groups = SequenceParallelGroups.build(config) if size > 1 else SequenceParallelGroups.single()
    ShardedCausalLM(model, config, groups)


def _errors(gradients: list[Tensor], wanted: list[Tensor]) -> float:
    """The worst, in parts of the largest gradient."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    for gradient in gradients if size > 1 else []:
        dist.all_reduce(gradient)
        gradient /= size
    worst = max((a - b).abs().max().item() for a, b in zip(gradients, wanted, strict=True))
    return worst / max(gradient.abs().max().item() for gradient in wanted)


def _compared(family: str, method: str, layout: str, kind: str, seed: int, *, labelled: bool) -> float:
    """The worst error of logits and gradients, or of the loss that Transformers takes and its gradients."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    given = batch(kind, seed)
    alone, mine = built(family), built(family)
    _sharded(mine, method, layout, size)
    # Transformers' sdpa attention has zeros where padding sees no token; there the first token is predicted.
    labels = given.labels(first=labelled and kind in ("left", "right", "sides"))
    expected = logits_of(alone, given)
    wanted = loss_of(expected, labels)
    error = 0.0
    if labelled:
        loss = mine(input_ids=given.tokens, labels=labels, **given.told).loss
    else:
        found = mine(input_ids=given.tokens, **given.told).logits
        loss = loss_of(found, labels)
        error = (found - expected)[given.real].abs().max().item()
    for each in (loss, wanted):
        backward(each)
    gradients = [[parameter.grad for parameter in model.parameters()] for model in (mine, alone)]
    return max(error, abs(loss.item() - wanted.item()), _errors(*gradients))


def _every_kind(seeds: range) -> dict[str, float]:
    torch.set_num_threads(1)
    found = {}
    for seed in seeds:
        for turn, (method, layout) in enumerate(PLACED):
            for number, kind in enumerate(KINDS):
                labelled, windowed = (turn + number + seed) % 2, (turn + number // 2 + seed) % 2
                family = "mistral" if windowed and kind not in ("middle", "numbered") else "llama"
                with InDouble():
                    error = _compared(family, method, layout, kind, seed, labelled=bool(labelled))
                found[f"{family} {method} {layout} {kind} {seed} {labelled}"] = error
    return found


@pytest.mark.parametrize(
    ("size", "seeds"),
    [
        (1, range(1)),
        (3, range(1, 2)),
        *(
            pytest.param(size, range(seed, seed + 1), marks=pytest.mark.matrix)
            for size in (1, 2, 3, 4)
            for seed in (2, 3, 4)
        ),
    ],
)
def test_rows_are_what_transformers_makes_of_them(size: int, seeds: range) -> None:
    results = spawn(_every_kind, size, seeds, timeout=270) if size > 1 else [_every_kind(seeds)]
    for found in results:
        assert not {name: error for name, error in found.items() if error > 1e-10}
        assert len(found) == len(KINDS) * len(PLACED) * len(seeds)
