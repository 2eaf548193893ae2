"""The tiled head against the whole one: values and every gradient, and that nothing of [tokens, vocabulary] exists."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.tiles.head import tiled_log_probs, tiled_loss, tiled_token_losses
from dsp_plugin.tiles.spec import HeadSpec, Vocabulary

SHAPE, WIDTH, CLASSES = (2, 13), 8, 31
SPECS = {
    "plain": HeadSpec(),
    "scale": HeadSpec(scale=0.3),
    "softcap": HeadSpec(softcap=1.5),
    "scale and softcap": HeadSpec(scale=2.0, softcap=1.0),
    "smoothing": HeadSpec(label_smoothing=0.1),
    "z-loss": HeadSpec(z_loss=0.02),
    "all": HeadSpec(scale=1.7, softcap=2.0, label_smoothing=0.2, z_loss=0.01, ignore_index=3),
}


def _inputs(dtype: torch.dtype = torch.float64, bias: bool = True, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*SHAPE, WIDTH, generator=generator, dtype=dtype)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=dtype)
    labels = torch.randint(CLASSES, SHAPE, generator=generator)
    labels[0, ::3] = -100
    added = torch.randn(CLASSES, generator=generator, dtype=dtype).requires_grad_() if bias else None
    return hidden.requires_grad_(), weight.requires_grad_(), labels, added


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, what: HeadSpec) -> Tensor:
    logits = F.linear(hidden, weight, bias) * what.scale
    return logits if what.softcap is None else what.softcap * torch.tanh(logits / what.softcap)


def _whole(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, what: HeadSpec, classes: Tensor | None = None
) -> Tensor:
    """Each token's loss, by torch."""
    logits, ignore = _logits(hidden, weight, bias, what).flatten(0, -2), what.ignore_index
    given = labels.reshape(-1).masked_fill(labels.reshape(-1) == -100, ignore)
    losses = F.cross_entropy(
        logits, given, classes, ignore_index=ignore, reduction="none", label_smoothing=what.label_smoothing
    )
    z = what.z_loss * logits.logsumexp(-1).square()
    return (losses + z.masked_fill(given == ignore, 0.0)).view(labels.shape)


def _same(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    for x, right in zip(found, wanted, strict=True):
        scale = right.abs().max().clamp(min=1e-30)
        assert (x - right).abs().max() / scale < tolerance


@pytest.mark.parametrize("tile_tokens", [1, 7, 26, 100])
@pytest.mark.parametrize("name", SPECS)
def test_sum_and_tokens(name: str, tile_tokens: int) -> None:
    what = SPECS[name]
    hidden, weight, labels, bias = _inputs()
    labels = labels.masked_fill(labels == -100, what.ignore_index)
    of_token = torch.randn(SHAPE, dtype=torch.float64)
    classes = torch.rand(CLASSES, dtype=torch.float64)
    inputs = (hidden, weight, bias)
    for weights in (None, classes):
        losses = _whole(hidden, weight, labels, bias, what, weights)
        wanted = torch.autograd.grad((losses * of_token).sum() * 3, inputs)
        keywords: dict[str, Any] = {
            "tile_tokens": tile_tokens,
            "what": what,
            "bias_V": bias,
            "class_weights_V": weights,
        }
        total = tiled_loss(hidden, weight, labels, token_weights=of_token, **keywords)
        each = tiled_token_losses(hidden, weight, labels, **keywords)
        _same((total, each), ((losses * of_token).sum(), losses))
        _same(torch.autograd.grad(total * 3, inputs), wanted)
        _same(torch.autograd.grad((each * of_token).sum() * 3, inputs), wanted)


@pytest.mark.parametrize("what", [HeadSpec(), HeadSpec(scale=0.5, softcap=2.0)], ids=["plain", "capped"])
def test_log_probs_and_entropy(what: HeadSpec) -> None:
    hidden, weight, labels, bias = _inputs()
    inputs = (hidden, weight, bias)
    logs = _logits(hidden, weight, bias, what).log_softmax(-1)
    picked = logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(labels == -100, 0.0)
    entropies = -(logs.exp() * logs).sum(-1)
    by_log, by_entropy = torch.randn(2, *SHAPE, dtype=torch.float64)
    found, entropy = tiled_log_probs(hidden, weight, labels, tile_tokens=5, what=what, bias_V=bias, with_entropy=True)
    assert entropy is not None
    _same((found, entropy), (picked, entropies))
    for combine in (
        lambda log, entropy: (log * by_log).sum() + (entropy * by_entropy).sum(),
        lambda log, _: (log * by_log).sum(),
        lambda _, entropy: (entropy * by_entropy).sum(),
    ):
        _same(
            torch.autograd.grad(combine(found, entropy), inputs, retain_graph=True),
            torch.autograd.grad(combine(picked, entropies), inputs, retain_graph=True),
        )


def _in_parts(parts: int, call: Callable[..., Any]) -> list[Any]:
    """``call(rank, slice of the classes, vocabulary)`` on every part, a thread each, that exchange what they merge."""
    given: list[Any] = [None] * parts
    results: list[Any] = [None] * parts
    barrier = Barrier(parts, timeout=30)

    def run(rank: int) -> None:
        def merge(numbers: Tensor) -> Tensor:
            given[rank] = numbers
            barrier.wait()
            together = torch.stack(given)
            barrier.wait()
            return together

        bounds = [CLASSES * part // parts for part in range(parts + 1)]
        mine = slice(bounds[rank], bounds[rank + 1])
        results[rank] = call(mine, Vocabulary(mine.start, CLASSES, merge))

    threads = [Thread(target=run, args=(rank,)) for rank in range(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("name", ["plain", "scale and softcap", "smoothing", "z-loss"])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_shared_vocabulary(name: str, parts: int) -> None:
    what = SPECS[name]
    hidden, weight, labels, bias = _inputs()
    losses = _whole(hidden, weight, labels, bias, what)
    of_token = torch.randn(SHAPE, dtype=torch.float64)
    wanted = torch.autograd.grad((losses * of_token).sum(), (hidden, weight, bias))

    def call(mine: slice, share: Vocabulary) -> Any:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight[mine], bias[mine])]
        keywords: dict[str, Any] = {"tile_tokens": 7, "what": what, "bias_V": leaves[2], "vocabulary": share}
        each = tiled_token_losses(*leaves[:2], labels, **keywords)
        by_token = torch.autograd.grad((each * of_token).sum(), leaves)
        total = tiled_loss(*leaves[:2], labels, token_weights=of_token, **keywords)
        logs, entropy = tiled_log_probs(
            *leaves[:2], labels, **keywords | {"what": HeadSpec(what.scale, what.softcap)}, with_entropy=True
        )
        of_entropy = torch.autograd.grad((logs * of_token + entropy).sum(), leaves)
        return each.detach(), by_token, torch.autograd.grad(total, leaves), of_entropy

    logs = _logits(hidden, weight, bias, what).log_softmax(-1)
    picked = logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(labels == -100, 0.0)
    probable = torch.autograd.grad((picked * of_token - (logs.exp() * logs).sum(-1)).sum(), (hidden, weight, bias))
    results = _in_parts(parts, call)
    for which, right in ((1, wanted), (2, wanted), (3, probable)):
        found = [result[which] for result in results]
        _same((sum(x[0] for x in found), torch.cat([x[1] for x in found]), torch.cat([x[2] for x in found])), right)
    for result in results:
        _same(result[:1], (losses,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    """No further from fp64 than torch's own head and loss in that dtype."""
    exact = _inputs()
    wide = torch.autograd.grad(_whole(*exact[:3], exact[3], HeadSpec()).sum(), (exact[0], exact[1], exact[3]))
    hidden, weight, bias = (exact[index].detach().to(dtype).requires_grad_() for index in (0, 1, 3))
    labels = exact[2]
    logits = F.linear(hidden, weight, bias).flatten(0, -2).float()
    plain = torch.autograd.grad(F.cross_entropy(logits, labels.view(-1), reduction="sum"), (hidden, weight, bias))
    total = tiled_loss(hidden, weight, labels, tile_tokens=3, bias_V=bias)
    each = tiled_token_losses(hidden, weight, labels, tile_tokens=3, bias_V=bias)
    assert total.dtype == each.dtype == torch.float32
    for tiled in (total, each.sum()):
        for found, theirs, right in zip(torch.autograd.grad(tiled, (hidden, weight, bias)), plain, wide, strict=True):
            assert found.dtype == dtype
            error, allowed = ((x.double() - right).norm() / right.norm() for x in (found, theirs))
            assert error < max(1.5 * allowed, 1e-6)


def test_autocast_is_as_for_a_linear_layer() -> None:
    hidden, weight, labels, bias = _inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, -2).float(), labels.view(-1), reduction="sum")
        tiled = tiled_loss(hidden, weight, labels, tile_tokens=9, bias_V=bias)
        each = tiled_token_losses(hidden, weight, labels, tile_tokens=9, bias_V=bias).sum()
    wanted = torch.autograd.grad(plain, (hidden, weight, bias))
    for loss in (tiled, each):
        _same((loss,), (plain,), 1e-6)
        # Outside of autocast, as backward passes are.
        _same(torch.autograd.grad(loss, (hidden, weight, bias)), wanted, 2e-2)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returned."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.most = max([self.most, *found])
        return result


@pytest.mark.parametrize("loss", ["sum", "tokens", "none"])
def test_no_tensor_of_tokens_times_classes(loss: str) -> None:
    hidden = torch.randn(300, 4, requires_grad=True)
    weight = torch.randn(64, 4, requires_grad=True)
    labels = torch.randint(64, (300,))
    with _Largest() as largest:
        if loss == "none":
            with torch.no_grad():
                tiled_loss(hidden, weight, labels, tile_tokens=10)
        else:
            function = tiled_loss if loss == "sum" else tiled_token_losses
            function(hidden, weight, labels, tile_tokens=10).sum().backward()
    assert largest.most == max(300 * 4, 10 * 64)


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, labels, bias = _inputs()
    for frozen, (h, w, b) in product(
        (tiled_loss, lambda *args, **kwargs: tiled_token_losses(*args, **kwargs).sum()),
        ((hidden, weight.detach(), None), (hidden.detach(), weight, bias), (hidden.detach(), weight.detach(), bias)),
    ):
        wanted = [x for x in (h, w, b) if x is not None and x.requires_grad]
        found = torch.autograd.grad(frozen(h, w, labels, tile_tokens=4, bias_V=b), wanted)
        _same(found, torch.autograd.grad(_whole(h, w, labels, b, HeadSpec()).sum(), wanted))
    with torch.no_grad():
        assert not tiled_loss(hidden, weight, labels, tile_tokens=4).requires_grad


def test_retained_graphs_give_the_gradient_twice() -> None:
    hidden, weight, labels, _ = _inputs()
    total = tiled_loss(hidden, weight, labels, tile_tokens=4)
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    _same(torch.autograd.grad(total, (hidden, weight)), first, 1e-15)


def test_no_tokens() -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    hidden = torch.randn(0, 4, requires_grad=True)
    total = tiled_loss(hidden, weight, torch.zeros(0, dtype=torch.long), tile_tokens=4)
    total.backward()
    assert total == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_refusals() -> None:
    hidden, weight, labels, bias = _inputs()
    with pytest.raises(SequenceParallelConfigError, match="at least one token"):
        tiled_loss(hidden, weight, labels, tile_tokens=0)
    with pytest.raises(SequenceParallelConfigError, match="labels=\\(2, 12\\)"):
        tiled_loss(hidden, weight, labels[:, 1:], tile_tokens=4)
    with pytest.raises(SequenceParallelConfigError, match="bias"):
        tiled_loss(hidden, weight, labels, tile_tokens=4, bias_V=bias[1:])
    with pytest.raises(SequenceParallelConfigError, match="not smoothed"):
        tiled_log_probs(hidden, weight, labels, tile_tokens=4, what=HeadSpec(label_smoothing=0.1))
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda x: tiled_loss(x, weight, labels, tile_tokens=4), (hidden,), (hidden,))
    loss = tiled_loss(hidden, weight, labels, tile_tokens=4)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()
