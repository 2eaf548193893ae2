"""The linear language model sharded by a method and a size alone: the same loss, logits and gradients as unsharded."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsp_plugin import (
    Plan,
    SequenceParallelConfig,
    SequenceParallelConfigError,
    SequenceParallelGroups,
    Stage,
    UnsupportedError,
    ledger,
    parallelize,
)
from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.models.linear_lm import LinearLM, LinearLMConfig
from dsp_plugin.spawn import RankFailure, spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(150)]

VOCABULARY, BATCH, LENGTH = 17, 2, 11
# Model settings, and those of the section beside method and size.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{decay: ({"decay": decay}, {}) for decay in DECAYS},
    "convolution": ({"decay": "gated-delta", "conv": 4}, {}),
    "hybrid, lightseq": ({"decay": "gated-delta", "conv": 4, "softmax_every": 2}, {}),
    "hybrid, ulysses": ({"decay": "head", "softmax_every": 2}, {"softmax_method": "ulysses"}),
    "hybrid, usp": ({"decay": "vector", "softmax_every": 2}, {"softmax_method": "usp", "heads": 3}),
    "hybrid, ring zigzag": (
        {"decay": "kda", "conv": 3, "softmax_every": 2},
        {"softmax_method": "ring", "layout": "zigzag"},
    ),
    "all softmax, ring": ({"softmax_every": 1}, {"method": "ring"}),
    "all softmax, ulysses": ({"softmax_every": 1}, {"method": "ulysses"}),
}
EXCHANGES = ("ring", "allgather", "scan")


def model_of(**settings: Any) -> LinearLM:
    sizes = {"vocab": VOCABULARY, "width": 12, "heads": 3, "key_dim": 6, "layers": 2, "hidden": 8}
    return LinearLM(LinearLMConfig(**{**sizes, **settings})).double()


def sharded(model: nn.Module, **settings: Any) -> Any:
    """`parallelize` by a section that says little."""
    config = SequenceParallelConfig(**{"method": "lasp", "size": dist.get_world_size(), **settings})
    return parallelize(model, config=config, groups=SequenceParallelGroups.build(config))


def batch_of(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Inputs and labels, which count unevenly over ranks."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(VOCABULARY, (BATCH, length), generator=generator)
    labels = torch.randint(VOCABULARY, (BATCH, length), generator=generator)
    labels[:, : length // 2] = -100
    return ids, labels


def check_same(model: LinearLM, loss: Tensor, plain: LinearLM, expected: Tensor, case: object) -> None:
    """The loss on this rank, and the mean over ranks of every gradient."""
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11, msg=lambda text: f"{case}: {text}")
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.grad is not None, (case, name)
        mean = ours.grad.clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        torch.testing.assert_close(mean, theirs.grad, rtol=1e-9, atol=1e-9, msg=lambda text: f"{case} {name}: {text}")  # noqa: B023


def _compare() -> int:
    ids, labels = batch_of()
    for number, (case, (settings, section)) in enumerate(KINDS.items()):
        plain, model = model_of(**settings), model_of(**settings, tile_tokens=(None, 4)[number % 2])
        expected = plain(ids, labels)
        expected.backward()
        exchange = {} if "method" in section else {"exchange": EXCHANGES[number % len(EXCHANGES)]}
        sharded(model, **exchange, **section)
        with ledger() as log:
            loss = model(ids, labels)
            loss.backward()
        check_same(model, loss, plain, expected, case)
        methods = {section.get("method", "lasp")} | ({"lightseq"} if case == "hybrid, lightseq" else set())
        for method in methods | ({section["softmax_method"]} if "softmax_method" in section else set()):
            assert log.bytes(method=method) > 0, (case, method)
    return len(KINDS)


@pytest.mark.parametrize("size", [2, 3])
def test_a_method_and_a_size_shard_the_model_exactly(size):
    assert spawn(_compare, size, timeout=120.0) == [len(KINDS)] * size


def _without_labels() -> None:
    ids, labels = batch_of()
    for settings, section in (KINDS["convolution"], KINDS["hybrid, ring zigzag"], KINDS["all softmax, ring"]):
        plain, model = model_of(**settings), model_of(**settings)
        sharded(model, **section)
        for training in (False, True):
            for each in (plain, model):
                each.train(training)
            torch.testing.assert_close(model(ids), plain(ids), rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(model(ids, labels=None), plain(ids), rtol=1e-11, atol=1e-11)
        # A script's own loss, and calls of both kinds before one backward pass.
        expected = nn.functional.cross_entropy(plain(ids).flatten(0, 1), labels.flatten()) + plain(ids, labels)
        expected.backward()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten()) + model(ids, labels)
        loss.backward()
        check_same(model, loss, plain, expected, settings)


def test_without_labels_the_logits_are_whole():
    spawn(_without_labels, 3, timeout=60.0)


def _recomputed() -> None:
    for (settings, section), recompute in product(
        (KINDS["convolution"], KINDS["hybrid, ring zigzag"]), ("full", "keep_attention")
    ):
        plain, model = model_of(**settings), model_of(checkpoint=True, **settings)
        sharded(model, recompute=recompute, **section)
        # Several lengths before one backward pass: each layer recomputes in the layout of its own pass.
        batches = [batch_of(length) for length in (8, 7)]
        expected = torch.stack([plain(*batch) for batch in batches]).sum()
        expected.backward()
        loss = torch.stack([model(*batch) for batch in batches]).sum()
        loss.backward()
        check_same(model, loss, plain, expected, (settings, recompute))


def test_checkpointed_layers_recompute_in_their_own_layout():
    spawn(_recomputed, 2, timeout=60.0)


class Wrapped(nn.Module):
    """A user's module around the model, which has something to do before and after."""

    def __init__(self, model: LinearLM) -> None:
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, text: Tensor) -> Tensor:
        return self.scale * self.model(text[:, :-1], labels=text[:, 1:])


class OwnLM(LinearLM):
    """A subclass."""


def _parts() -> None:
    text = batch_of(9)[0]
    for wrap in (Wrapped, lambda model: Wrapped(OwnLM(model.config).double())):
        plain, model = wrap(model_of(decay="scalar")), wrap(model_of(decay="scalar"))
        handle = sharded(model)
        with ledger() as log:
            loss = model(text)
            loss.backward()
        expected = plain(text)
        expected.backward()
        assert log.bytes(method="lasp") > 0
        check_same(model, loss, plain, expected, "wrapped")
        handle.remove()
        with ledger() as log:
            torch.testing.assert_close(model(text), expected)
        assert log.calls() == 0


def test_the_model_is_found_inside_a_wrapper_and_as_a_subclass():
    spawn(_parts, 2, timeout=60.0)


def _autocast() -> None:
    """bf16 inside: as far from the unsharded run in bf16 as that is from fp32."""
    ids, labels = batch_of(64)
    plain, model = (model_of(decay="gated-delta", conv=4, softmax_every=2).float() for _ in range(2))
    exact = plain(ids, labels)
    sharded(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, loss = plain(ids, labels), model(ids, labels)
    assert loss.dtype == expected.dtype
    noise = (expected - exact).abs().item()
    assert abs(loss.item() - expected.item()) < max(3 * noise, 1e-3)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast():
    spawn(_autocast, 2, timeout=60.0)


class Unknown(nn.Module):
    """Linear attention in a model of which nothing is known."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm(x)


def _refused(case: str) -> None:
    ids, labels = batch_of()
    match case:
        case "unknown model":
            sharded(Unknown())
        case "unknown model, ring":
            sharded(Unknown(), method="ring")
        case "softmax method on linear layers":
            model = model_of(decay="head")
            sharded(model, method="ulysses")
            model(ids, labels)
        case "dsp":
            sharded(model_of(decay="head"), method="dsp")
        case "a plan":
            config = SequenceParallelConfig(method="lasp", size=2)
            plan = Plan("b n c", (Stage("layers.*", ("n",)),))
            parallelize(model_of(), plan, config=config, groups=SequenceParallelGroups.build(config))
        case "no labels and nothing to gather":
            model = model_of(decay="head")
            batch, attention = {"input_ids": 1, "labels": 1}, ["layers.*.mixer"]
            sharded(model, batch=batch, attention=attention, loss={})
            model(ids)
        case "lengths that differ":
            model = model_of(decay="head")
            sharded(model)
            model(ids, labels[:, 1:])


REFUSED: dict[str, tuple[type[Exception], list[str]]] = {
    "unknown model": (
        SequenceParallelConfigError,
        ["method='lasp'", "shards the batch", "Unknown is not a model that we know", "LinearLM", '"attention": ['],
    ),
    "unknown model, ring": (SequenceParallelConfigError, ["method='ring'", "shards the batch", "Describe the model"]),
    "softmax method on linear layers": (
        UnsupportedError,
        ["linear_attention of layers.0.mixer", 'Set "method" to "lasp"'],
    ),
    "dsp": (SequenceParallelConfigError, ["no plan is known for dsp_plugin.models.linear_lm.LinearLM"]),
    "a plan": (
        SequenceParallelConfigError,
        ["plan: inside a plan's stages runs one of dsp, ulysses, ring, usp, not lasp"],
    ),
    "no labels and nothing to gather": (
        SequenceParallelConfigError,
        ["loss.labels='labels'", "called without labels", 'set "gather_output" beside "loss"'],
    ),
    "lengths that differ": (SequenceParallelConfigError, ["'input_ids': 11, 'labels': 10"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_every_rank(case):
    kind, parts = REFUSED[case]
    with pytest.raises(RankFailure) as failure:
        spawn(_refused, 2, case, timeout=30.0)
    assert len(failure.value.errors) == 2
    for error in failure.value.errors.values():
        assert type(error) is kind
        assert all(part in str(error) for part in parts), error
