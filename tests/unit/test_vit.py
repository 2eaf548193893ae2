"""The scientific ViT: which tokens see which, subsets of variables, its grids, and the loss against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.models.video_dit import rotate, wave
from dsp_plugin.models.vit import (
    VariableAggregation,
    VariableEmbedding,
    VisionTransformer,
    angles,
    initialise,
    places,
)
from dsp_plugin.models.vit_objective import VitObjective, latitude_weights, weighted_mse
from dsp_plugin.models.vit_plan import plan

pytestmark = pytest.mark.timeout(60)

ATTENTION = ("full", "axial")
GRIDS = {(2, 3): (5, 3), (1, 1): (3, 7), (2, 1, 2): (3, 5, 2), (1, 2, 3): (1, 4, 3)}
KNOWN = 5
CPU = torch.device("cpu")


def make_model(patch: tuple[int, ...] = (2, 3), **settings: Any) -> VisionTransformer:
    return VisionTransformer(KNOWN, patch, **{"width": 24, "heads": 3, "depth": 2, **settings}).double()


def make_fields(patch: tuple[int, ...] = (2, 3), batch: int = 2, variables: int = 3) -> Tensor:
    sides = [cells * side for cells, side in zip(GRIDS[patch], patch, strict=True)]
    return torch.randn(batch, variables, *sides, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("patch", GRIDS, ids=str)
def test_every_grid_gives_the_wanted_variables_at_every_pixel(patch, attention):
    fields = make_fields(patch)
    out = make_model(patch, attention=attention)(fields, torch.tensor([4, 0, 2]), wanted=torch.tensor([1, 3]))
    assert out.shape == (2, 2, *fields.shape[2:])


EXTRAS = ({}, {"registers": 3}, {"classes": 4}, {"registers": 2, "classes": 30, "lead_time": True})


@pytest.mark.parametrize(
    ("attention", "extras"), [("axial", {}), ("axial", {"lead_time": True}), *(("full", extras) for extras in EXTRAS)]
)
@pytest.mark.parametrize("patch", [(2, 3), (2, 1, 2)], ids=str)
def test_every_parameter_has_a_gradient_at_the_first_step(patch, attention, extras):
    model = make_model(patch, attention=attention, **extras)
    fields, ids = make_fields(patch, variables=KNOWN), torch.arange(KNOWN)
    given = {"lead_time": torch.rand(2)} if "lead_time" in extras else {}
    if "classes" in extras:
        given["label"] = torch.tensor([3, 1])
    VitObjective(model)(fields, ids, ids, torch.randn_like(fields), **given).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    assert without == set()
    # Each variable has weights of its own.
    for weights in (model.trunk.embed.variables.weight, model.trunk.readout.weight):
        assert (weights.grad.flatten(1).abs().amax(1) > 1e-9).all()


@pytest.mark.parametrize("attention", ATTENTION)
def test_recomputed_layers_change_no_gradient(attention):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model, fields = make_model(attention=attention, recompute=recompute), make_fields()
        model(fields, torch.tensor([1, 3, 4]), torch.tensor([1, 0])).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


# --- variables


def restricted(model: VisionTransformer, kept: list[int], **settings: Any) -> VisionTransformer:
    """The model that knows only the variables `kept`, with the same weights."""
    small = VisionTransformer(len(kept), (2, 3), width=24, heads=3, depth=2, **settings).double()
    weights = model.state_dict()
    for name in ("embed.variables.weight", "embed.variables.bias", "readout.weight", "readout.bias"):
        weights[f"trunk.{name}"] = weights[f"trunk.{name}"][kept]
    small.load_state_dict(weights)
    return small


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_subset_in_any_order_gives_what_the_model_of_that_subset_gives(attention):
    model, kept = make_model(attention=attention), [0, 2, 3]
    fields = make_fields()
    expected = restricted(model, kept, attention=attention)(fields, torch.arange(3), torch.arange(3))
    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
        out = model(fields[:, order], torch.tensor(kept)[order], torch.tensor(kept)[order])
        torch.testing.assert_close(out, expected[:, order], rtol=1e-12, atol=1e-12)


def test_every_variable_counts_and_which_one_it_is_counts():
    model, fields = make_model(), make_fields()
    ids = torch.tensor([0, 2, 3])
    wanted = torch.tensor([1])
    out = model(fields, ids, wanted)
    for variable in range(3):
        changed = fields.clone()
        changed[:, variable] += 0.1
        assert (model(changed, ids, wanted) - out).abs().max() > 1e-4
    assert (model(fields, torch.tensor([0, 2, 4]), wanted) - out).abs().max() > 1e-4


def test_aggregation_is_cross_attention_from_one_learned_query():
    """Against torch's attention, with a query and keys whose products are the folded scores."""
    width, heads, variables = 12, 3, 4
    module = VariableAggregation(width, heads).apply(initialise).double()
    x_BNVC = torch.randn(2, 5, variables, width, dtype=torch.float64)
    normed = module.norm(x_BNVC).flatten(0, 1)
    q_HD = torch.randn(heads, width // heads, dtype=torch.float64)
    # A key projection of rank one per head: k . q is then the score, whatever the query.
    direction_HD = q_HD / q_HD.square().sum(-1, keepdim=True) * (width // heads) ** 0.5
    k_BHVD = torch.einsum("bvc,hc,hd->bhvd", normed, module.score.weight, direction_HD)
    v_BHVD = module.value(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
    q_BH1D = q_HD[None, :, None].expand(len(normed), -1, -1, -1)
    expected = module.out(nn.functional.scaled_dot_product_attention(q_BH1D, k_BHVD, v_BHVD).transpose(1, 2).flatten(1))
    torch.testing.assert_close(module(x_BNVC).flatten(0, 1), expected, rtol=1e-12, atol=1e-12)


def test_variables_are_embedded_each_by_its_own_weights():
    module = VariableEmbedding(KNOWN, 6, 8).apply(initialise).double()
    pixels_BNVP = torch.randn(2, 4, 2, 6, dtype=torch.float64)
    out = module(pixels_BNVP, torch.tensor([3, 1]))
    for place, variable in enumerate((3, 1)):
        expected = pixels_BNVP[:, :, place] @ module.weight[variable] + module.bias[variable]
        torch.testing.assert_close(out[:, :, place], expected)


# --- the grid


@pytest.mark.parametrize("patch", [(2, 3), (2, 1, 2)], ids=str)
def test_pixels_stay_in_their_places(patch):
    """Without blocks a token depends on its own pixels only, and so does what is read out of it."""
    model = make_model(patch, depth=0)
    fields, ids = make_fields(patch), torch.tensor([0, 2, 3])
    out = model(fields, ids, ids)
    where = tuple(slice((cells - 1) * side, cells * side) for cells, side in zip(GRIDS[patch], patch, strict=True))
    changed = fields.clone()
    changed[0, 1][where] += 1.0
    moved = (model(changed, ids, ids) - out).abs()
    assert (moved[0][(slice(None), *where)] > 1e-6).all()
    moved[0][(slice(None), *where)] = 0
    assert moved.max() == 0


def test_a_pixel_is_read_out_where_it_was_read_in():
    """A readout that inverts the embedding gives the fields back, so both take the pixels of a patch in one order."""
    model = make_model(depth=0, width=6, heads=1)
    embed, readout = model.trunk.embed, model.trunk.readout
    embed.forward = lambda pixels_BNVP, variables_V: pixels_BNVP[..., 0, :]
    model.trunk.locate.forward = lambda x_BNC, place_NG, lead_B: x_BNC
    readout.norm = nn.Identity()
    with torch.no_grad():
        readout.weight.copy_(torch.eye(6).expand(KNOWN, 6, 6) * torch.arange(1.0, 1.0 + KNOWN)[:, None, None])
        readout.bias.zero_()
    fields = make_fields(variables=1)
    out = model(fields, torch.tensor([2]), torch.tensor([3, 0]))
    torch.testing.assert_close(out, fields * torch.tensor([4.0, 1.0])[:, None, None], rtol=0, atol=0)


def reach(model: VisionTransformer, patch: tuple[int, ...]) -> Tensor:
    """Which tokens one layer lets the first token's pixels reach, a bool over the grid."""
    fields, ids = make_fields(patch, batch=1), torch.tensor([0, 2, 3])
    changed = fields.clone()
    changed[(..., *(slice(0, side) for side in patch))] += 1.0
    moved = (model(changed, ids, ids) - model(fields, ids, ids)).abs().amax((0, 1))
    for dim, side in enumerate(patch):
        moved = moved.unflatten(dim, (-1, side)).amax(dim + 1)
    return moved > 1e-9


@pytest.mark.parametrize("patch", [(2, 3), (2, 1, 2)], ids=str)
def test_full_attention_reaches_every_token_and_a_block_of_axial_attention_its_line(patch):
    assert reach(make_model(patch, depth=1), patch).all()
    for dim, name in enumerate(("z", "y", "x")[-len(patch) :]):
        model = make_model(patch, attention="axial", depth=1)
        for other in set(model.trunk.blocks[0]) - {name}:
            model.trunk.blocks[0][other].forward = lambda x_BNC, rope: x_BNC
        expected = torch.zeros(GRIDS[patch], dtype=torch.bool)
        expected[tuple(slice(None) if other == dim else 0 for other in range(len(patch)))] = True
        assert torch.equal(reach(model, patch), expected)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("rotary", [True, False])
def test_order_along_every_dim_matters(attention, rotary):
    model = make_model((1, 1), attention=attention, rotary=rotary)
    fields, ids = make_fields((1, 1)), torch.tensor([0, 2, 3])
    for dim in (-1, -2):
        flipped = model(fields.flip(dim), ids, ids).flip(dim)
        assert not torch.allclose(flipped, model(fields, ids, ids), atol=1e-3)


def test_rotary_scores_depend_on_the_distance_in_each_dim():
    q_1D, k_1D = torch.randn(2, 1, 12, dtype=torch.float64)

    def score(there: list[int], here: list[int]) -> Tensor:
        table = wave(angles(torch.tensor([there, here]), 6))
        return (rotate(q_1D, table[:1]) * rotate(k_1D, table[1:])).sum()

    at = score([3, 1, 4], [1, 5, 9])
    torch.testing.assert_close(score([13, 21, 4], [11, 25, 9]), at)
    for dim in range(3):
        there = [3, 1, 4]
        there[dim] += 1
        assert (score(there, [1, 5, 9]) - at).abs() > 1e-4


def test_tokens_in_front_come_before_the_patches_in_order():
    place = places((2, 2), 2, True, CPU)
    assert place.tolist() == [[-1, -1], [-2, -2], [0, 0], [0, 1], [1, 0], [1, 1]]


# --- tokens in front, lead time


def test_registers_and_the_class_token_take_part():
    model, fields, ids = make_model(registers=2, classes=4), make_fields(), torch.tensor([0, 2, 3])
    out, logits = model(fields, ids, ids)
    assert logits.shape == (2, 4)
    for row in range(3):
        with torch.no_grad():
            model.trunk.locate.front[row] += 0.5 * torch.randn(24)
        changed, other_logits = model(fields, ids, ids)
        assert (changed - out).abs().max() > 1e-4
        assert (other_logits - logits).abs().max() > 1e-4
        out, logits = changed, other_logits


def test_logits_hang_on_the_class_token_of_their_sample_and_on_its_fields():
    model, fields, ids = make_model(classes=40), make_fields(), torch.tensor([0, 2, 3])
    changed = fields.clone()
    changed[0] += 0.3
    moved = (model(changed, ids, ids)[1] - model(fields, ids, ids)[1]).abs().amax(1)
    assert moved[0] > 1e-4
    assert moved[1] == 0


def test_lead_time_counts_for_its_sample():
    model, fields, ids = make_model(lead_time=True), make_fields(), torch.tensor([0, 2, 3])
    lead = torch.tensor([1.0, 2.0])
    moved = (
        model(fields, ids, ids, lead_time=lead + torch.tensor([0.0, 1.0])) - model(fields, ids, ids, lead_time=lead)
    ).abs()
    assert moved[0].max() == 0
    assert moved[1].max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"attention": "axial", "registers": 1}, "registers=1"),
        ({"attention": "axial", "classes": 2}, "classes=2"),
        ({"attention": "local"}, "local"),
        ({"width": 25}, "25 mod 3"),
        ({"width": 27}, "= 9"),
        ({"patch": (2,)}, "1 dims"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        make_model(**settings)


def test_calls_that_do_not_fit_are_refused():
    model, ids = make_model(), torch.tensor([0, 2, 3])
    with pytest.raises(ValueError, match="does not divide"):
        model(torch.randn(2, 3, 5, 6), ids, ids)
    with pytest.raises(ValueError, match="one id"):
        model(make_fields(), ids[:2], ids)
    with pytest.raises(ValueError, match="takes none"):
        model(make_fields(), ids, ids, lead_time=torch.ones(2))
    with pytest.raises(ValueError, match="takes one"):
        make_model(lead_time=True)(make_fields(), ids, ids)


def test_a_module_without_the_model_has_no_plan():
    with pytest.raises(SequenceParallelConfigError, match="no part of class VisionTransformer"):
        plan(nn.Linear(2, 2))


# --- the loss


def test_loss_is_the_mean_error_by_the_cosine_of_latitude():
    latitude = np.deg2rad(np.linspace(-85, 80, 7))
    predicted, target = np.random.default_rng(0).normal(size=(2, 2, 3, 7, 4))
    weights = np.cos(latitude) / np.cos(latitude).mean()
    expected = (weights[:, None] * (predicted - target) ** 2).mean()
    weight_Y = latitude_weights(torch.from_numpy(latitude))
    assert float(weight_Y.mean()) == pytest.approx(1.0)
    loss = weighted_mse(torch.from_numpy(predicted), torch.from_numpy(target), weight_Y)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_loss_of_low_precision_is_taken_in_fp32_with_exact_weights():
    weight_Y = latitude_weights(torch.linspace(-1.4, 1.4, 8).double()).float()
    model = nn.Identity()
    model.forward = lambda fields, *_: fields
    objective = VitObjective(model, torch.linspace(-1.4, 1.4, 8)).bfloat16()
    predicted, target = torch.randn(2, 2, 3, 8, 5, dtype=torch.bfloat16)
    loss = objective(predicted, torch.arange(3), torch.arange(3), target)
    expected = (weight_Y[:, None] * (predicted.float() - target.float()).square()).mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_loss_adds_the_cross_entropy_of_the_classes():
    model, fields, ids = make_model(classes=4), make_fields(), torch.tensor([0, 2, 3])
    target, label = torch.randn_like(fields), torch.tensor([3, 0])
    predicted, logits = model(fields, ids, ids)
    expected = (predicted - target).square().mean() - logits.log_softmax(-1)[[0, 1], label].mean()
    torch.testing.assert_close(VitObjective(model)(fields, ids, ids, target, label=label), expected)
