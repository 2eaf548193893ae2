"""A causal language model as a user writes it, sharded by `config.batch`: the same loss and gradients as unsharded."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsp_plugin import Layout, SequenceParallelConfig, SequenceParallelGroups, ledger, parallelize
from dsp_plugin.methods import METHODS, Workload
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

Groups = SequenceParallelGroups
VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, LAYERS, BATCH = 11, 6, 2, 4, 2, 2
WIDTH = HEADS * HEAD_DIM
IGNORED = -100


# --- the user's model: knows nothing of sequence parallelism


def rotate(x_BHLD: Tensor, position_BL: Tensor) -> Tensor:
    frequency = 100.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    # In fp32, as most models do, so that under autocast q and k leave in another dtype than v.
    angle_BLA = position_BL[..., None] * frequency
    cos, sin = angle_BLA.cos()[:, None].to(torch.promote_types(x_BHLD.dtype, torch.float32)), angle_BLA.sin()[:, None]
    first, second = x_BHLD.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * KV_HEADS * HEAD_DIM)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BLC: Tensor, position_BL: Tensor) -> Tensor:
        q = self.q(x_BLC).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = self.kv(x_BLC).unflatten(-1, (2 * KV_HEADS, HEAD_DIM)).transpose(1, 2).chunk(2, 1)
        q, k = rotate(q, position_BL), rotate(k, position_BL)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BLC: Tensor, position_BL: Tensor) -> Tensor:
        x_BLC = x_BLC + self.attn(self.norm(x_BLC), position_BL)
        return x_BLC + self.mlp(x_BLC).tanh()


Output = namedtuple("Output", ["loss", "extra"])


class CausalLM(nn.Module):
    """`reentrant`: how layers are checkpointed; None for not at all. `returns`: the form of the output."""

    def __init__(self, reentrant: bool | None = None, returns: str = "tensor", ignore_index: int = IGNORED) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.reentrant, self.returns, self.ignore_index = reentrant, returns, ignore_index

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None) -> Any:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids)
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x, position_ids)
            else:
                x = checkpoint(layer, x, position_ids, use_reentrant=self.reentrant)
        logits = self.head(x)
        if labels is None:
            return logits
        if self.returns == "written out":
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            counted = (labels != self.ignore_index).flatten()
            return (losses * counted).sum() / counted.sum()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=self.ignore_index)
        match self.returns:
            case "dict":
                return OrderedDict(logits=logits, loss=loss)
            case "tuple":
                return loss, None
            case "named":
                return Output(loss, "extra")
            case _:
                return loss


class KeywordLM(CausalLM):
    """Takes what it hands on as keywords, as wrappers do."""

    def forward(self, input_ids: Tensor, **further: Any) -> Any:
        return super().forward(input_ids, **further)


# --- the comparison


def config(layout: str = "contiguous", in_model: bool = True, **settings: Any) -> SequenceParallelConfig:
    how = (
        {"batch": {"input_ids": 1, "labels": 1}, "loss": {}}
        if in_model
        else {"batch": {"input_ids": 1}, "gather_output": 1}
    )
    return SequenceParallelConfig(
        **{
            "method": "ulysses",
            "size": dist.get_world_size(),
            "layout": layout,
            "attention": ["layers.*.attn"],
            **how,
            **settings,
        }
    )


def model_of(kind: type[CausalLM] = CausalLM, **how: Any) -> CausalLM:
    torch.manual_seed(0)
    return kind(**how).double()


def batch_of(length: int, labels: str, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(VOCABULARY, (BATCH, length), generator=generator)
    targets = torch.randint(VOCABULARY, (BATCH, length), generator=generator)
    match labels:
        case "uneven":
            targets[torch.rand(BATCH, length, generator=generator) < 0.5] = IGNORED
            targets[0, 0] = 1
        case "first only":
            targets[:, 1:] = IGNORED
        case "last only":
            targets[0] = IGNORED
            targets[:, :-1] = IGNORED
    return ids, targets


def loss_by(model: nn.Module, ids: Tensor, labels: Tensor, in_model: bool, **positions: Tensor) -> Tensor:
    if in_model:
        return model(ids, labels=labels, **positions)
    return F.cross_entropy(model(ids, **positions).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def check_same(sharded: nn.Module, loss: Tensor, plain: nn.Module, expected: Tensor, case: object) -> None:
    """Loss bit-equal on all ranks; loss, and mean over ranks of every gradient, equal to the unsharded."""
    size = dist.get_world_size()
    values = [torch.zeros_like(loss.detach()) for _ in range(size)]
    dist.all_gather(values, loss.detach())
    assert len({value.item() for value in values}) == 1, case
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12, msg=f"{case}: {loss} != {expected}")
    for (name, ours), (_, theirs) in zip(sharded.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.grad is not None, (case, name)
        mean = ours.grad.clone()
        dist.all_reduce(mean)
        mean /= size
        torch.testing.assert_close(mean, theirs.grad, rtol=1e-10, atol=1e-10, msg=lambda text: f"{case} {name}: {text}")  # noqa: B023


def _compare(size: int) -> int:
    groups = Groups.build(SequenceParallelConfig(method="ulysses", size=size))
    lengths, masks = (8, 7, 2), ("all", "uneven", "first only", "last only")
    plain_cases = product(("contiguous", "zigzag", "striped"), lengths, masks, (True, False), (None,))
    checkpointed = product(("contiguous", "zigzag"), (7, 2), ("last only",), (True, False), (True, False))
    cases = [*plain_cases, *checkpointed]
    for case in cases:
        layout, length, labels, in_model, reentrant = case
        ids, targets = batch_of(length, labels, size)
        plain, sharded = model_of(), model_of(reentrant=reentrant)
        expected = loss_by(plain, ids, targets, in_model)
        expected.backward()
        parallelize(sharded, config=config(layout, in_model), groups=groups)
        with ledger() as log:
            loss = loss_by(sharded, ids, targets, in_model)
            loss.backward()
        check_same(sharded, loss, plain, expected, case)
        workload = Workload(size, HEADS, KV_HEADS, length, BATCH, HEAD_DIM, element_size=8, layout=layout)
        per_layer = METHODS["ulysses"].wire_bytes(workload, groups.sp.rank)
        passes = 1 if reentrant is None else 2
        assert log.bytes(collective="all_to_all", phase="forward") == LAYERS * passes * per_layer.forward, case
        assert log.bytes(collective="all_to_all", phase="backward") == LAYERS * per_layer.backward, case
        assert log.bytes(method="loss") == (16 * (size - 1) if in_model else 0), case
    return len(cases)


@pytest.mark.parametrize("size", [1, 2, 3, pytest.param(4, marks=pytest.mark.matrix)])
def test_loss_gradients_and_bytes_are_exact(size):
    assert spawn(_compare, size, size, timeout=100.0) == [88] * size


def _positions(size: int) -> None:
    groups = Groups.build(SequenceParallelConfig(method="ulysses", size=size))
    ids, targets = batch_of(7, "uneven", size)
    # Not 0, 1, 2, ...: the positions of packed documents, the user's own.
    own = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    for kind, given, listed in product((CausalLM, KeywordLM), ("no", "one row", "all rows"), (False, True)):
        positions = {} if given == "no" else {"position_ids": own if given == "one row" else own.expand(BATCH, -1)}
        if listed and not positions:
            continue
        plain, sharded = model_of(kind), model_of(kind)
        expected = loss_by(plain, ids, targets, True, **positions)
        expected.backward()
        batch = {"input_ids": 1, "labels": 1, **({"position_ids": 1} if listed else {})}
        parallelize(sharded, config=config("zigzag", batch=batch), groups=groups)
        loss = loss_by(sharded, ids, targets, True, **positions)
        loss.backward()
        check_same(sharded, loss, plain, expected, (kind.__name__, given, listed))


def test_positions_are_filled_in_or_sharded_with_the_tokens_however_they_are_passed():
    spawn(_positions, 3, 3)


def _outputs(size: int) -> None:
    groups = Groups.build(SequenceParallelConfig(method="ulysses", size=size))
    for returns, ignore_index in product(("dict", "tuple", "named", "written out"), (IGNORED, 0)):
        ids, targets = batch_of(7, "last only", size)
        targets[targets == IGNORED] = ignore_index
        targets[1, -1] = 3
        plain, sharded = (model_of(returns=returns, ignore_index=ignore_index) for _ in range(2))
        parallelize(sharded, config=config(loss={"ignore_index": ignore_index}), groups=groups)
        expected, output = plain(ids, targets), sharded(ids, targets)
        assert type(output) is type(expected)
        if returns != "written out":
            key = "loss" if returns == "dict" else 0
            loss, expected = output[key], expected[key]
        else:
            loss = output
        loss.backward()
        expected.backward()
        check_same(sharded, loss, plain, expected, (returns, ignore_index))
        if returns == "named":
            assert output.extra == "extra"


def test_the_loss_is_found_in_the_output_whose_form_stays():
    spawn(_outputs, 3, 3)


def _two_lengths(size: int) -> None:
    """Two forward passes, one backward pass: checkpointed layers must recompute in the layout of their own pass."""
    groups = Groups.build(SequenceParallelConfig(method="ulysses", size=size))
    for reentrant in (None, False, True):
        plain, sharded = model_of(), model_of(reentrant=reentrant)
        parallelize(sharded, config=config("zigzag"), groups=groups)
        # Some rank holds as many tokens of one as of another, so that only the layout can tell them apart.
        batches = [batch_of(length, "uneven", size) for length in (8, 7, 9)]
        expected = torch.stack([plain(*batch) for batch in batches]).sum()
        loss = torch.stack([sharded(*batch) for batch in batches]).sum()
        expected.backward()
        loss.backward()
        check_same(sharded, loss, plain, expected, reentrant)


def test_forward_passes_of_several_lengths_before_one_backward_pass():
    spawn(_two_lengths, 2, 2, timeout=30.0)


def _half_precision(size: int) -> None:
    groups = Groups.build(SequenceParallelConfig(method="ulysses", size=size))
    ids, targets = batch_of(8, "uneven", size)
    plain, sharded = model_of().float(), model_of().float()
    parallelize(sharded, config=config(), groups=groups)
    for context in (torch.autocast("cpu", torch.bfloat16), nullcontext()):
        with context:
            expected, loss = plain(ids, targets), sharded(ids, targets)
        assert loss.dtype == expected.dtype
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    # On each rank 512 labels with a loss of 200 add up to more than fp16 holds.
    tall = TallLoss().half()
    parallelize(tall, config=config(batch={"x": 1, "labels": 1}, positions=None), groups=groups)
    loss = tall(torch.full((1, 1024, 1), 200.0).half(), torch.ones(1, 1024, dtype=torch.int64))
    assert (loss.dtype, loss.item()) == (torch.float16, 200.0)
    loss.backward()
    assert tall.weight.grad.item() == pytest.approx(200.0, rel=1e-2)


class TallLoss(nn.Module):
    """The mean of its input, by way of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].attn = Values()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (self.layers[0].attn(x) * self.weight).mean()


class Values(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x[:, None].expand(-1, 4, -1, 8)
        return F.scaled_dot_product_attention(heads * 0, heads * 0, heads)[:, 0, :, :1]


def test_half_precision_computes_in_torchs_dtypes_and_does_not_overflow():
    spawn(_half_precision, 2, 2)


def _remove(size: int) -> None:
    groups = Groups.build(SequenceParallelConfig(method="ulysses", size=size))
    ids, targets = batch_of(7, "uneven", size)
    model = model_of()

    def state() -> list[tuple]:
        return [
            (name, sorted(vars(part)), len(part._forward_pre_hooks), len(part._forward_hooks), part.forward.__func__)
            for name, part in model.named_modules()
        ]

    before = state()
    handle = parallelize(model, config=config(), groups=groups)
    with ledger() as log:
        sharded = model(ids, targets)
    assert log.calls() > 0
    handle.remove()
    assert state() == before
    with ledger() as log:
        plain = model(ids, targets)
    assert log.calls() == 0
    torch.testing.assert_close(plain, sharded)
    handle.remove()
    assert state() == before

    # A forward that somebody else had replaced comes back, too.
    def theirs(x_BLC: Tensor, position_BL: Tensor) -> Tensor:
        return Attention.forward(attention, x_BLC, position_BL)

    attention = model.layers[0].attn
    attention.forward = theirs
    parallelize(model, config=config(), groups=groups).remove()
    assert attention.forward is theirs


def test_remove_leaves_the_module_as_it_was():
    spawn(_remove, 2, 2)


def _copied(size: int) -> None:
    """A copy, such as that of an exponential moving average, computes with its own weights."""
    groups = Groups.build(SequenceParallelConfig(method="ulysses", size=size))
    ids, targets = batch_of(7, "uneven", size)
    model, plain = model_of(), model_of()
    parallelize(model, config=config(), groups=groups)
    copied = copy.deepcopy(model)
    for each in (copied, plain):
        with torch.no_grad():
            each.layers[0].attn.out.weight.mul_(3)
    loss, expected = copied(ids, targets), plain(ids, targets)
    loss.backward()
    expected.backward()
    check_same(copied, loss, plain, expected, "copy")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_deep_copy_is_sharded_and_independent():
    spawn(_copied, 2, 2)


def test_the_layouts_under_test_leave_a_rank_without_a_label():
    _, targets = batch_of(7, "last only", 3)
    counts = [int((Layout("zigzag", 7, 3).shard(targets, 1, rank) != IGNORED).sum()) for rank in range(3)]
    assert 0 in counts
    assert sum(counts) == 1
