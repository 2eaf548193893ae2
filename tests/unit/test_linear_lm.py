"""The linear-attention language model: its loss, what its tokens see, its gradients, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.models.linear_lm import HeadDecay, LinearLM, LinearLMConfig, LinearMixer, SoftmaxMixer

pytestmark = pytest.mark.timeout(60)
SIZES = {"vocab": 13, "width": 16, "layers": 3, "heads": 2, "key_dim": 6}
# Every decay, convolutions, one kind of hybrid, and nothing but softmax.
KINDS: dict[str, dict[str, Any]] = {
    **{decay: {"decay": decay} for decay in DECAYS},
    "convolution": {"decay": "scalar", "conv": 4},
    "hybrid": {"decay": "gated-delta", "conv": 3, "softmax_every": 2, "tie_embeddings": False},
    "softmax": {"softmax_every": 1},
}


def make_model(**settings: Any) -> LinearLM:
    return LinearLM(LinearLMConfig(**{**SIZES, **settings})).double()


def make_ids(batch: int = 2, tokens: int = 21) -> Tensor:
    return torch.randint(0, SIZES["vocab"], (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_mean_cross_entropy_of_the_logits_over_the_labels_that_count(kind):
    model, ids = make_model(**KINDS[kind]), make_ids()
    labels = ids.roll(-1, 1)
    labels[0, 3:9] = -100
    logits = model(ids)
    assert logits.shape == (2, 21, 13)
    counted = labels != -100
    expected = -F.log_softmax(logits, -1)[counted].gather(1, labels[counted].unsqueeze(1)).mean()
    torch.testing.assert_close(model(ids, labels), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_tiles_of_the_loss_change_nothing(tied):
    ids = make_ids()
    labels = ids.roll(-1, 1)
    labels[0, 3:9] = -100
    whole, tiled = make_model(tie_embeddings=tied), make_model(tie_embeddings=tied, tile_tokens=5)
    for model in (whole, tiled):
        model(ids, labels).backward()
    torch.testing.assert_close(tiled(ids, labels), whole(ids, labels), rtol=1e-12, atol=0)
    for (name, ours), theirs in zip(tiled.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=lambda text: f"{name}: {text}")  # noqa: B023
    assert torch.equal(tiled(ids), whole(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_depends_on_those_before_it_and_on_none_after(kind):
    model, ids = make_model(**KINDS[kind]), make_ids(batch=1)
    other = ids.clone()
    other[0, 10] = (ids[0, 10] + 1) % 13
    moved = (model(ids) - model(other)).abs().amax((0, 2))
    assert torch.equal(moved[:10], torch.zeros_like(moved[:10]))
    assert (moved[10:] > 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient_at_the_first_step(kind):
    model, ids = make_model(**KINDS[kind]), make_ids()
    model(ids, ids.roll(-1, 1)).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    assert without == set()


@pytest.mark.parametrize("kind", KINDS)
def test_learns_which_token_follows_which(kind):
    model = make_model(**KINDS[kind]).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = (3 * torch.arange(24) + torch.arange(4).unsqueeze(1)) % 13
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(ids, (ids + 3) % 13)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.0
    assert losses[-1] < 0.5


@pytest.mark.parametrize("decay", ["none", "head", "delta"])
def test_learns_to_copy_what_only_its_state_can_tell(decay):
    """The second half repeats the first, which is another in every batch: the loss there is of memory."""
    model = make_model(decay=decay, conv=2, width=32, layers=2, key_dim=None).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(120):
        first = torch.stack([torch.randperm(13, generator=generator)[:6] for _ in range(32)])
        ids = torch.cat([first, first], 1)
        labels = ids.roll(-1, 1)
        labels[:, :6], labels[:, -1] = -100, -100
        optimizer.zero_grad()
        loss = model(ids, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_softmax_layers_are_the_last_of_each_group():
    mixers = [type(layer.mixer) for layer in make_model(layers=5, softmax_every=2).layers]
    assert mixers == [LinearMixer, SoftmaxMixer, LinearMixer, SoftmaxMixer, LinearMixer]


def test_positions_are_those_given_and_count_from_zero_by_themselves():
    model, ids = make_model(softmax_every=1), make_ids(tokens=8)
    positions = torch.arange(8).unsqueeze(0)
    assert torch.equal(model(ids), model(ids, position_ids=positions))
    torch.testing.assert_close(model(ids), model(ids, position_ids=positions + 1000))
    assert (model(ids) - model(ids, position_ids=positions * 2)).abs().max() > 1e-3


def test_a_head_reaches_further_than_the_one_before_it_and_in_a_later_layer():
    config = LinearLMConfig(heads=4, layers=3)
    decays = torch.stack([HeadDecay(config, layer)(torch.zeros(())) for layer in range(3)])
    torch.testing.assert_close(decays[0], torch.tensor([-0.25, -(0.25**2), -(0.25**3), -(0.25**4)]))
    assert (decays < 0).all()
    assert (decays.diff(dim=0) > 0).all()
    assert (decays.diff(dim=1) > 0).all()


@pytest.mark.parametrize("kind", ["convolution", "hybrid"])
def test_checkpointing_changes_no_gradient(kind):
    ids = make_ids()
    grads = []
    for recompute in (False, True):
        model = make_model(checkpoint=recompute, **KINDS[kind])
        model(ids, ids.roll(-1, 1)).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_checkpointing_keeps_fewer_activations():
    ids, kept = make_ids(tokens=64), []
    for recompute in (False, True):
        model, sizes = make_model(checkpoint=recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, into=sizes: into.append(x.numel()) or x, lambda x: x):
            model(ids, ids)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_first_weights_depend_on_the_seed_and_on_nothing_else():
    settings = {**SIZES, **KINDS["hybrid"]}
    torch.manual_seed(1)
    first = LinearLM(LinearLMConfig(**settings))
    torch.manual_seed(2)
    second, other = LinearLM(LinearLMConfig(**settings)), LinearLM(LinearLMConfig(**settings, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_the_output_weights_are_the_embedding_unless_untied():
    names = {tied: {name for name, _ in make_model(tie_embeddings=tied).named_parameters()} for tied in (True, False)}
    assert names[False] - names[True] == {"head.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_full_precision(kind):
    ids = make_ids()
    exact = make_model(**KINDS[kind])(ids, ids.roll(-1, 1))
    loss = make_model(**KINDS[kind]).bfloat16()(ids, ids.roll(-1, 1))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=0.03, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_stays_near_full_precision(kind):
    ids, model = make_ids(), make_model(**KINDS[kind])
    exact = model(ids, ids.roll(-1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.float()(ids, ids.roll(-1, 1))
    loss.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=0.03, atol=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "exponential"}, "decay='exponential': choose from none, head"),
        ({"width": 15}, "width=15 is not a multiple of heads=2: the remainder is 1"),
        ({"width": 6, "softmax_every": 2}, "is 3: make it even"),
    ],
)
def test_settings_that_do_not_fit_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearLMConfig(**{**SIZES, **settings})
