"""Rows that are padded and packed unlike are what Transformers makes of them: logits, losses and all gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_rows import Batch, batch, built, logits_of, loss_of
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


@cache
def _alone(family: str, kind: str, seed: int, labelled: bool) -> tuple[Tensor, float, list[Tensor]]:
    """Logits, loss and gradients by Transformers."""
    given, model = batch(kind, seed), built(family)
    expected = logits_of(model, given)
    loss = loss_of(expected, _labels(given, kind, labelled=labelled))
    backward(loss)
    return expected.detach(), loss.item(), [parameter.grad for parameter in model.parameters()]


def _labels(given: Batch, kind: str, *, labelled: bool) -> Tensor:
    # Transformers' sdpa attention has zeros where padding sees no token; there the first token is predicted.
    return given.labels(first=labelled and kind in ("left", "right", "sides"))


def _compared(family: str, method: str, layout: str, kind: str, seed: int, *, labelled: bool) -> float:
    """The worst error of logits and gradients, or of the loss that Transformers takes and its gradients."""
    expected, wanted, gradients = _alone(family, kind, seed, labelled)
    given, model = batch(kind, seed), built(family)
    _sharded(model, method, layout, dist.get_world_size() if dist.is_initialized() else 1)
    labels, error = _labels(given, kind, labelled=labelled), 0.0
    if labelled:
        loss = model(input_ids=given.tokens, labels=labels, **given.told).loss
    else:
        found = model(input_ids=given.tokens, **given.told).logits
        loss = loss_of(found, labels)
        error = (found - expected)[given.real].abs().max().item()
    backward(loss)
    mine = [parameter.grad for parameter in model.parameters()]
    return max(error, abs(loss.item() - wanted), _errors(mine, gradients))


def _every_kind(seeds: range) -> dict[str, float]:
    torch.set_num_threads(1)
    found = {}
    for seed in seeds:
        for turn, (method, layout) in enumerate(PLACED):
            # The ring has three layouts: each kind in one of them, and by every method.
            for number, kind in enumerate(KINDS):
                if method == "ring" and (number + seed) % 3 != turn:
                    continue
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
        assert len(found) == len(KINDS) * len({method for method, _ in PLACED}) * len(seeds)


@pytest.mark.parametrize("kind", ["sides", "packed", "restated"])
def test_embeddings_and_recomputed_layers_find_their_rows_again(kind: str) -> None:
    given, found = batch(kind, 4), []
    for sharded in (False, True):
        model = built("llama")
        labels = given.labels(first=kind == "sides")
        with InDouble():
            embedded = model.get_input_embeddings()(given.tokens)
            if sharded:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                _sharded(model, "ring", "zigzag", 1)
                loss = model(inputs_embeds=embedded, labels=labels, **given.told).loss
            else:
                loss = loss_of(logits_of(model, given), labels)
            backward(loss)
        found.append([parameter.grad for parameter in model.parameters()])
    assert _errors(found[1], found[0]) < 1e-10
