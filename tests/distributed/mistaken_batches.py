"""Models that cannot be sharded by their batch, wrong batches, and groups of wrong sizes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mistakes import BATCH, HEADS, LENGTH, WIDTH, Groups, Mistake, config, unsupported, wrong
from torch import Tensor, nn

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError, parallelize


class Attention(nn.Module):
    def __init__(self, kind: str = "plain", heads: int = HEADS) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.multi = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "out of sight":
            return self.multi(x, x, x)[0]
        q = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, mask, gqa = q, None, False
        match self.kind:
            case "dense mask":
                mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
            case "cross":
                k = torch.zeros(BATCH, self.heads, 3 * LENGTH, q.shape[3])
            case "fewer kv heads":
                k = q[:, : self.heads // 2]
            case "without heads":
                q = k = x
            case "uneven kv heads":
                k, gqa = q[:, :3], True
        out = F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, attention: str = "plain", heads: int = HEADS, returns: str = "loss") -> None:
        super().__init__()
        self.attn, self.returns = Attention(attention, heads), returns

    def forward(self, x: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None) -> Any:
        x = self.attn(x)
        match self.returns:
            case "loss":
                return (x * 1.0).mean()
            case "tokens":
                return x
            case "text":
                return "a loss"
            case _:
                return {"logits": None}


def sharded_batch(
    groups: Groups,
    *,
    call: dict[str, Any] | None = None,
    batch: dict[str, int] | None = None,
    model: nn.Module | None = None,
    **settings: Any,
) -> None:
    settings = {
        "batch": batch or {"x": 1, "labels": 1},
        "attention": ["attn"],
        "loss": None if "gather_output" in settings else {},
        **settings,
    }
    model = model or Model()
    before = set(vars(model)), len(model._forward_pre_hooks)
    try:
        parallelize(model, config=config(**settings), groups=groups)
    except SequenceParallelConfigError:
        assert before == (set(vars(model)), len(model._forward_pre_hooks)), "half sharded"
        raise
    inputs = {"x": torch.zeros(BATCH, LENGTH, WIDTH), "labels": torch.zeros(BATCH, LENGTH, dtype=torch.int64)}
    model(**{**inputs, **(call or {})})


def groups_of_another_size(groups: Groups) -> None:
    parallelize(Model(), config=config(), groups=Groups.single())


def world_that_does_not_divide(groups: Groups) -> None:
    Groups.build(SequenceParallelConfig(method="dsp", size=dist.get_world_size() + 1))


BATCHES: dict[str, Mistake] = {
    "dense mask": unsupported(
        sharded_batch, "attn_mask of attn", "dense mask", "is_causal=True", model=Model("dense mask")
    ),
    "cross-attention in a routed module": unsupported(
        sharded_batch,
        "attention of attn",
        "key (2, 4, 24, 8)",
        "as many keys",
        "out of the attention",
        model=Model("cross"),
    ),
    "grouped heads without enable_gqa": unsupported(
        sharded_batch, "key (2, 2,", "enable_gqa is not set", "Pass enable_gqa=True", model=Model("fewer kv heads")
    ),
    "grouped heads that do not divide": wrong(
        sharded_batch, "heads=4 is not a multiple of kv_heads=3", model=Model("uneven kv heads")
    ),
    "attention without a head dim": unsupported(
        sharded_batch, "attention of attn", "expected self-attention on [B, H, n, D]", model=Model("without heads")
    ),
    "attention out of sight": unsupported(
        sharded_batch, "attention of attn", "never called", "Name the modules", model=Model("out of sight").eval()
    ),
    "model with fewer heads than ranks": wrong(
        sharded_batch, "heads=1 < ulysses_size=", "set a size of 1", model=Model(heads=1)
    ),
    "argument not passed": wrong(
        sharded_batch, "loss.labels='labels'", "called without labels", "Pass labels", call={"labels": None}
    ),
    "argument that is a list": wrong(sharded_batch, "batch.labels=1", "with list", "Pass it", call={"labels": [1, 2]}),
    "argument without the dim": wrong(
        sharded_batch, "batch.labels=1", "a tensor (8,)", "along dim 1", call={"labels": torch.zeros(8)}
    ),
    "labels of another length": wrong(
        sharded_batch,
        "batch={'x': 1, 'labels': 1}",
        "{'x': 8, 'labels': 7}",
        "pass whole sequences",
        call={"labels": torch.zeros(BATCH, 7)},
    ),
    "dim of the batch": wrong(
        sharded_batch, "different lengths: {'x': 2, 'labels': 8}", "Name the sequence dim", batch={"x": 0, "labels": 1}
    ),
    "argument that forward does not take": wrong(
        sharded_batch, "no argument 'tokens'", "takes x, labels, position_ids", batch={"tokens": 1, "labels": 1}
    ),
    "positions that forward does not take": wrong(
        sharded_batch, "positions='pos'", "from 0", "null if the model uses none", positions="pos"
    ),
    "positions of another length": wrong(
        sharded_batch, "sequence length=9", "8 tokens", "unsharded", call={"position_ids": torch.zeros(1, 9)}
    ),
    "positions that are no tensor": wrong(sharded_batch, "positions=-1", "with list", call={"position_ids": [0, 1]}),
    "attention glob without a match": wrong(
        sharded_batch, "attention='layers.*.attn'", "no module of Model", "attn.multi", attention=["layers.*.attn"]
    ),
    "loss that is no scalar": wrong(
        sharded_batch, "loss: forward returned a tensor (2,", "gather_output", model=Model(returns="tokens"), late=True
    ),
    "output of no tensor": wrong(
        sharded_batch, "model output='str'", "leads with one", model=Model(returns="text"), late=True
    ),
    "output with nothing first": wrong(
        sharded_batch, "model output='dict'", "leads with one", model=Model(returns="none"), late=True
    ),
    "gather along no dim": wrong(
        sharded_batch, "gather_output=3", "of 8 tokens", gather_output=3, model=Model(returns="tokens"), late=True
    ),
    "gather along the features": wrong(
        sharded_batch, "gather_output=2", "of 8 tokens", gather_output=2, model=Model(returns="tokens"), late=True
    ),
    "groups of another size": wrong(groups_of_another_size, "size=", "groups have 1 ranks", "from the same config"),
    "world that does not divide": wrong(world_that_does_not_divide, "does not divide the", "ranks of the world"),
}
