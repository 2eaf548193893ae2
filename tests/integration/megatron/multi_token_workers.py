"""What the ranks of `dsp_plugin.spawn` do in the tests of multi-token prediction."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
import torch.distributed as dist
from megatron_workers import initialized
from tiled_head_workers import MTP, batch, gpt
from torch import Tensor

from dsp_plugin.patches import megatron

_MODULE = "megatron.core.transformer.multi_token_prediction"


def masks(length: int, ranks: int) -> dict[str, Tensor | None]:
    """Loss masks by what they are."""
    late = torch.zeros(2, length, dtype=torch.float64)
    late[0, length // ranks] = 1
    generator = torch.Generator().manual_seed(11)
    return {
        "random": torch.randint(2, (2, length), generator=generator).double(),
        # The first rank has none of its own, and gets it when the mask is shifted.
        "one token, of a later rank": late,
        "none": torch.zeros(2, length, dtype=torch.float64),
        "not given": None,
    }


def errors(method: str) -> dict[str, float]:
    """By mask and weight of the loss, how far gradients and log are from those of one process, of the largest."""
    found = {}
    ranks = dist.get_world_size()
    for per_token in (False, True):
        for name, mask in masks(24, ranks).items():
            if name == "none" and not hasattr(importlib.import_module(_MODULE), "process_mtp_loss"):
                # There upstream divides by 0 in one process, too.
                continue
            whole, logged = _step(1, method, mask, per_token)
            shared, shared_log = _step(ranks, method, mask, per_token)
            scale = max(x.abs().max().item() for x in whole.values()) or 1.0
            assert whole.keys() == shared.keys()
            difference = max((shared[key] - whole[key]).abs().max().item() for key in whole)
            found[f"{name}, per token: {per_token}"] = difference / scale
            log_scale = logged.abs().max().item() or 1.0
            found[f"{name}, per token: {per_token}, log"] = (shared_log - logged).abs().max().item() / log_scale
    return found


def _step(size: int, method: str, mask: Tensor | None, per_token: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the losses of further tokens alone, as data parallelism adds them up, and the log of these."""
    multi_token = importlib.import_module(_MODULE)
    # With tiles the loss is in fp64, too.
    megatron.install(method, memory={"tile_tokens": 7}, quiet=True)
    with initialized(None, context_parallel_size=size) as parallel_state:
        # Angles are in fp32, of which a shard's may differ in the last bit.
        model = gpt(multi_token=True, positions="learned_absolute", calculate_per_token_loss=per_token)
        given: dict[str, Any] = {**batch(), "loss_mask": mask}
        given["labels"] = given["labels"].clamp(min=0)
        del given["attention_mask"]
        if size > 1:
            cut = importlib.import_module("megatron.core.utils").get_batch_on_this_cp_rank
            given = cut(
                given, **({"is_hybrid_cp": False} if "is_hybrid_cp" in inspect.signature(cut).parameters else {})
            )
        multi_token.MTPLossLoggingHelper.tracker.clear()
        multi_token.MTPLossAutoScaler.set_loss_scale(torch.ones(()))
        losses = model(attention_mask=None, **given)
        (losses * 0).sum().backward()
        gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        group = parallel_state.get_context_parallel_group()
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=group)
            gradient /= 1 if per_token else size
        tracker = multi_token.MTPLossLoggingHelper.tracker
        log = tracker["loss_values" if "loss_values" in tracker else "values"].double()
        assert log.numel() == MTP
        dist.all_reduce(log, group=group)
        return gradients, log / size
