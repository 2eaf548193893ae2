"""Wrong inputs on spawned ranks: the same error on every rank, before anything is sent, and nobody hangs.

Wrong settings, which no rank is needed for, are in `tests/unit/test_config.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_plugin import (
    Layout,
    MaskSpec,
    Plan,
    SequenceParallelConfig,
    SequenceParallelConfigError,
    SequenceParallelGroups,
    Stage,
    UnsupportedError,
    ledger,
    parallelize,
)
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import dsp, ulysses
from dsp_plugin.methods.method import Where
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(90)]

Groups = SequenceParallelGroups
BATCH, LENGTH, HEADS, HEAD_DIM = 2, 8, 4, 8
WIDTH = HEADS * HEAD_DIM


def config(**settings: Any) -> SequenceParallelConfig:
    return SequenceParallelConfig(**{"method": "ulysses", "size": dist.get_world_size(), **settings})


# --- attention called directly


def attend(
    groups: Groups,
    *,
    tokens: int | None = None,
    k_tokens: int | None = None,
    v_tokens: int | None = None,
    heads: int = HEADS,
    kv_heads: int = HEADS,
    k_dim: int = HEAD_DIM,
    k_batch: int = BATCH,
    v_dtype: torch.dtype = torch.float32,
    dims: int = 4,
    **settings: Any,
) -> None:
    layout = Layout("contiguous", LENGTH, groups.sp.size)
    n = layout.sizes[groups.sp.rank] if tokens is None else tokens
    q = torch.zeros(BATCH, n, heads, HEAD_DIM)
    k = torch.zeros(k_batch, n if k_tokens is None else k_tokens, kv_heads, k_dim)
    v = torch.zeros(k_batch, k.shape[1] if v_tokens is None else v_tokens, kv_heads, HEAD_DIM, dtype=v_dtype)
    if dims == 3:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    ulysses.attention(q, k, v, what=AttentionSpec(**settings), where=Where(groups, layout))


# --- DSP called directly


def local_activation(groups: Groups, dim: int = 1) -> Tensor:
    return Layout("contiguous", LENGTH, groups.sp.size).shard(
        torch.zeros(BATCH, LENGTH, LENGTH, 4), dim, groups.sp.rank
    )


def switch(groups: Groups, from_dim: int, to_dim: int, length: int = LENGTH) -> None:
    dsp.switch(local_activation(groups), from_dim, to_dim, length=length, groups=groups)


# --- a model whose batch is sharded


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


# --- a model sharded by a plan


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.attn = dim, Attention()

    def forward(self, tokens: Tensor, table: Tensor | None = None) -> Tensor:
        return tokens + tokens.mean(self.dim, keepdim=True)


class Joint(nn.Module):
    """Attends, causally, to all tokens of all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = CausalAttention()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attn(tokens.flatten(1, 2)).view_as(tokens)


class CausalAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


class Video(nn.Module):
    def __init__(self, order: str = "space time", give: Any = None, table: Tensor | None = None) -> None:
        super().__init__()
        self.space, self.time, self.end, self.joint = Block(2), Block(1), Block(2), Joint()
        self.order, self.give, self.table = order, give, table

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order.split():
            block = self.get_submodule(name)
            if self.give is not None:
                x = block(self.give)
            else:
                x = block(x, self.table) if self.table is not None else block(x)
        return x


SPACE, TIME, END = (Stage(name, (dim,)) for name, dim in (("space", "s"), ("time", "t"), ("end", "s")))


def by_plan(
    groups: Groups,
    *stages: Stage,
    tokens: str = "b t s c",
    model: nn.Module | None = None,
    plan: Plan | None = None,
    **settings: Any,
) -> None:
    settings = {"method": "dsp", **settings}
    if stages:
        plan = Plan(tokens, stages)
    model = model or Video()
    try:
        handle = parallelize(model, plan, config=config(**settings), groups=groups)
    except SequenceParallelConfigError:
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules()), "half sharded"
        raise
    model(torch.zeros(BATCH, LENGTH, LENGTH, WIDTH))
    handle.remove()


def by_reference(groups: Groups, plan: str) -> None:
    parallelize(Video(), config=config(method="dsp", plan=plan), groups=groups)


def groups_of_another_size(groups: Groups) -> None:
    parallelize(Model(), config=config(), groups=Groups.single())


def world_that_does_not_divide(groups: Groups) -> None:
    Groups.build(SequenceParallelConfig(method="dsp", size=dist.get_world_size() + 1))


@dataclass(frozen=True)
class Mistake:
    """What a user does wrong, and what the error must be.

    Attributes:
        late: it shows only in what the model returns, when its attention has run, alike on every rank.
    """

    make: Callable[[Groups], None]
    error: type[Exception]
    parts: tuple[str, ...]
    late: bool = False


def wrong(make: Callable[..., None], *parts: str, late: bool = False, **how: Any) -> Mistake:
    return Mistake(partial(make, **how), SequenceParallelConfigError, parts, late)


def unsupported(make: Callable[..., None], *parts: str, **how: Any) -> Mistake:
    return Mistake(partial(make, **how), UnsupportedError, parts)


def switched(*args: int, **how: Any) -> Callable[..., None]:
    return lambda groups: switch(groups, *args, **how)


def planned(*stages: Stage, **how: Any) -> Callable[..., None]:
    return lambda groups: by_plan(groups, *stages, **how)


MISTAKES: dict[str, Mistake] = {
    "unsharded tokens": wrong(attend, "sequence length=8", "8 tokens in the contiguous layout", "rank", tokens=LENGTH),
    "too few tokens": wrong(attend, "sequence length=1", "holds", "same layout and length", tokens=1),
    "cross-attention": wrong(attend, "attention inputs", "k (2, 30, 4, 8)", "call it directly", k_tokens=30),
    "values of other tokens": wrong(attend, "attention inputs", "v (2, 9, 4, 8)", "equal B, n and K", v_tokens=9),
    "other batch of keys": wrong(attend, "attention inputs", "k (3,", "equal B", k_batch=3),
    "other head dim of keys": wrong(attend, "attention inputs", "4, 16)", "q [B, n, H, D], k [B, n, K, D]", k_dim=16),
    "tensors without heads": wrong(attend, "attention inputs", "expected q [B, n, H, D]", dims=3),
    "mixed dtypes": wrong(attend, "v torch.bfloat16", "share a dtype", "Cast them", v_dtype=torch.bfloat16),
    "fewer heads than ranks": wrong(attend, "heads=1 < ulysses_size=", "set a size of 1 or less", heads=1, kv_heads=1),
    "kv heads that do not divide": wrong(attend, "heads=4 is not a multiple of kv_heads=3", "fix the", kv_heads=3),
    "borders short of the end": wrong(
        attend, "cu_seqlens=(0, 3, 7)", "last border is 7", "8 tokens", mask=MaskSpec(cu_seqlens=(0, 3, 7))
    ),
    "borders of a shard": wrong(attend, "cu_seqlens=(0, 4)", "not of a shard", mask=MaskSpec(cu_seqlens=(0, 4))),
    "dropout without a seed": wrong(attend, "dropout_seed", "dropout_p=0.1", "same on every rank", dropout_p=0.1),
    "dropout of 1.5": wrong(attend, "dropout_p=1.5", "lies in [0, 1)", dropout_p=1.5, dropout_seed=1),
    "unknown kernel": wrong(attend, "kernel='flash'", "kernels are auto", kernel="flash"),
    "kernel of another device": unsupported(attend, "kernel='cuda_flash'", "device cpu", "'auto'", kernel="cuda_flash"),
    "switch to the same dim": wrong(switched(1, 1), "switch='1 -> 1'", "two different dims", "Drop the switch"),
    "switch to the same dim from behind": wrong(switched(1, -3), "switch='1 -> 1'", "two different dims"),
    "switch of a wrong length": wrong(
        switched(1, 2, length=80), "length=80", "of 80 entries", "dim that is sharded now"
    ),
    "switch from the whole dim": wrong(switched(2, 1), "length=8", "dim 2 of a tensor", "not 8"),
    "switch to no dim": wrong(switched(1, 4), "switch to_dim=4", "dims 0 to 3", "Count dims"),
    "gather of a wrong length": wrong(
        lambda groups: dsp.gather(local_activation(groups), 1, length=99, groups=groups), "length=99", "of 99 entries"
    ),
    "gather of no dim": wrong(
        lambda groups: dsp.gather(local_activation(groups), -5, length=LENGTH, groups=groups), "gather dim=-5", "0 to 3"
    ),
    "split of no dim": wrong(
        lambda groups: dsp.split(torch.zeros(4, 4), 2, groups=groups), "split dim=2", "dims 0 to 1", "Count dims"
    ),
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
    "zigzag inside a plan": wrong(
        planned(SPACE, method="ulysses", layout="zigzag"), "layout='zigzag'", "contiguous runs", "Drop layout"
    ),
    "no plan for the model": wrong(by_plan, "plan: no plan is known for", "Video", "Write a Plan"),
    "plan that cannot be imported": wrong(
        by_reference, "plan='no.plans:mine'", "cannot be imported", "package.module:name", plan="no.plans:mine"
    ),
    "plan that is none": wrong(by_reference, "plan='math:pi'", "is a float, not a dsp_plugin.Plan", plan="math:pi"),
    "plan without a match": wrong(
        planned(Stage("blocks.*", ("s",))), "plan stage='blocks.*'", "no module of Video", "space"
    ),
    "plan attention without a match": wrong(
        planned(Stage("space", ("s",), attention="self_attn", heads=4)),
        "plan attention of space='self_attn'",
        "attn.multi",
    ),
    "tokens of another rank": wrong(
        planned(SPACE, tokens="b t h s c"), "tokens of space='b t h s c'", "5 dims", "(2, 8, 8, 32)", "memory order"
    ),
    "tokens by a wrong name": wrong(
        planned(Stage("space", ("s",), tokens="hidden")), "plan of space='hidden'", "takes tokens, table"
    ),
    "tokens by a place too far": wrong(
        planned(Stage("space", ("s",), tokens=2)), "plan of space=2", "takes tokens, table"
    ),
    "tokens that are no tensor": wrong(
        planned(SPACE, model=Video("space", give=[1])), "plan tokens of space=0", "given list", "one of tokens, table"
    ),
    "table of another rank": wrong(
        planned(Stage("space", ("s",), follows={1: "t d"}), model=Video("space", table=torch.zeros(LENGTH))),
        "plan follows of space, 1='t d'",
        "a tensor (8,) has 1 dims",
        "every dim of the argument",
    ),
    "table of another length": wrong(
        planned(Stage("space", ("s",), follows={"table": "t d"}), model=Video("space", table=torch.zeros(5, 2))),
        "plan follows of space, 'table'='t d'",
        "sizes (5, 2), but t should be 8",
        "pass it whole",
    ),
    "stages in another order": wrong(
        planned(SPACE, TIME, END, model=Video("space end time")),
        "plan.stages='end'",
        "ran where time was due",
        'order to "layers"',
        "register the modules",
    ),
    "a stage that is left out and runs all the same": wrong(
        planned(SPACE, Stage("time", ("t",), when=lambda call: False), END, model=Video("space time end")),
        "plan.stages='time'",
        "ran where end was due",
    ),
    "a first stage that does not run": wrong(
        planned(SPACE, TIME, model=Video("time")), "plan.stages='time'", "ran where space was due"
    ),
    "a last stage that does not run": wrong(
        planned(SPACE, TIME, model=Video("space")), "plan.stages='time'", "never made whole again", "every forward pass"
    ),
    "a module in two stages": wrong(
        planned(SPACE, Stage("sp*", ("t",))), "plan.stages='space'", "stage 'sp*'", "every module by one stage"
    ),
    "a stage inside a stage": wrong(
        planned(SPACE, Stage("space.attn", ("s",))), "plan.stages='space.attn'", "(in) space", "inside another stage"
    ),
    "no dim free": wrong(
        planned(Stage("space", ("s", "t"))), "plan='space'", "no dim can be sharded", "t: ", "s: ", "lower size"
    ),
    "no single dim free for ulysses": wrong(
        planned(SPACE, TIME, method="ulysses"), "no single dim", "s by space", "t by time", "Use method dsp"
    ),
    "causal attention over several sharded dims": unsupported(
        planned(Stage("joint", ("t", "s"), attention="attn", heads=HEADS), model=Video("joint")),
        "is_causal of joint.attn=True",
        "not in global order",
        "drop the mask",
    ),
}


Outcome = tuple[str, str, int, float]


def _make_all_mistakes() -> dict[str, Outcome]:
    """Error, message, collectives entered and seconds, of each mistake on this rank."""
    groups = Groups.build(config())
    outcomes = {}
    for name, mistake in MISTAKES.items():
        start = time.monotonic()
        error, message = "nothing", ""
        with ledger() as log:
            try:
                mistake.make(groups)
            except Exception as raised:
                error, message = type(raised).__name__, str(raised)
        outcomes[name] = error, message, log.calls(), time.monotonic() - start
    return outcomes


@cache
def outcomes_by_rank(size: int) -> list[dict[str, Outcome]]:
    return spawn(_make_all_mistakes, size, timeout=45.0)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", MISTAKES)
def test_every_rank_gets_the_same_error_and_sends_nothing(name, size):
    mistake = MISTAKES[name]
    by_rank = [outcomes[name] for outcomes in outcomes_by_rank(size)]
    for error, message, calls, seconds in by_rank:
        assert error == mistake.error.__name__, message
        for part in mistake.parts:
            assert part in message, message
        assert calls == by_rank[0][2]
        assert mistake.late or calls == 0
        assert seconds < 5
    if not mistake.late and name not in RANK_IN_TEXT:
        assert len({message for _, message, *_ in by_rank}) == 1


# Their messages tell what this rank holds, which differs where the length does not divide.
RANK_IN_TEXT = {
    "unsharded tokens",
    "too few tokens",
    "cross-attention",
    "values of other tokens",
    "other batch of keys",
    "other head dim of keys",
    "tensors without heads",
    "switch of a wrong length",
    "switch from the whole dim",
    "switch to no dim",
    "gather of no dim",
    "gather of a wrong length",
    "cross-attention in a routed module",
    "grouped heads without enable_gqa",
    "attention without a head dim",
    "dense mask",
}


def test_more_than_forty_mistakes():
    assert len(MISTAKES) >= 40
