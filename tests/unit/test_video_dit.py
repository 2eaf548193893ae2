"""The reference video transformer: what its blocks mix and what they do not, its loss, its sampler, its plan."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.models.rectified_flow import RectifiedFlow, RectifiedFlowObjective
from dsp_plugin.models.video_dit import (
    CrossAttention,
    SelfAttention,
    SpaceBlock,
    TimeBlock,
    VideoDiT,
    initialise,
    rotate,
    space_angles,
    time_angles,
    wave,
)
from dsp_plugin.models.video_dit_plan import plan

pytestmark = pytest.mark.timeout(60)

POSITIONS = ("rotary", "sinusoidal")
CPU = torch.device("cpu")


SIZES = {"channels": 2, "patch": 2, "width": 24, "heads": 3, "depth": 2, "vocabulary": 5}


def make_model(**sizes: Any) -> VideoDiT:
    return VideoDiT(**{**SIZES, **sizes}).double()


def make_inputs(batch: int = 2, frames: int = 3, rows: int = 2, columns: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    video = torch.randn(batch, frames, 2, 2 * rows, 2 * columns, dtype=torch.float64)
    return video, torch.rand(batch), torch.randint(0, 5, (batch, 4))


def make_block(kind: type[SpaceBlock] | type[TimeBlock], width: int = 24, heads: int = 3) -> SpaceBlock | TimeBlock:
    return kind(width, heads).apply(initialise).double()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- the model


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("rows", "columns", "frames"), [(2, 3, 3), (1, 1, 5), (4, 2, 1)])
def test_velocity_has_the_shape_of_the_video(positions: str, rows: int, columns: int, frames: int):
    video, t, labels = make_inputs(frames=frames, rows=rows, columns=columns)
    assert make_model(positions=positions)(video, t, labels).shape == video.shape


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("condition", ["class", "caption", "features"])
def test_every_parameter_has_a_gradient_at_the_first_step(positions: str, condition: str):
    model = make_model(positions=positions, text_width=7 if condition == "features" else None)
    video, t, labels = make_inputs()
    labels = {"class": labels[:, 0], "caption": labels, "features": torch.randn(2, 4, 7)}[condition]
    RectifiedFlow().loss(model, video, labels, t, torch.randn_like(video)).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    assert without == set()


@pytest.mark.parametrize("positions", POSITIONS)
def test_order_of_frames_and_of_patches_matters(positions: str):
    model = make_model(positions=positions)
    video, t, labels = make_inputs(rows=2, columns=2)
    video[1], t[1], labels[1] = video[0].flip(0), t[0], labels[0]
    out = model(video, t, labels)
    assert not torch.allclose(out[1], out[0].flip(0), atol=1e-4)
    video[1] = video[0].flip(-2)[:, :, [1, 0, 3, 2]]  # The patch rows swapped, the pixels inside each patch not.
    out = model(video, t, labels)
    assert not torch.allclose(out[1], out[0].flip(-2)[:, :, [1, 0, 3, 2]], atol=1e-4)


def test_patches_keep_their_pixels():
    """With identity embeddings and no blocks the model is a layer norm over each patch: pixels stay in their places."""
    model = make_model(width=8, heads=1, depth=0)
    for linear in (model.patch_embed, model.final.linear):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    nn.init.zeros_(model.final.modulation.linear.weight)
    nn.init.zeros_(model.final.modulation.linear.bias)
    video, t, labels = make_inputs()
    out = model(video, t, labels)
    for row, column in ((0, 0), (1, 2)):
        where = (..., slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        expected = nn.functional.layer_norm(video[where].flatten(2), (8,), eps=1e-6)
        torch.testing.assert_close(out[where].flatten(2), expected)


def test_output_depends_on_time_and_on_every_label():
    model = make_model()
    video, t, labels = make_inputs()
    out = model(video, t, labels)
    assert (model(video, t + 0.1, labels) - out).abs().amax() > 1e-4
    for i in range(labels.shape[1]):
        other = labels.clone()
        other[:, i] = (other[:, i] + 1) % 5
        assert (model(video, t, other) - out).abs().flatten(1).amax(1).min() > 1e-5


def test_samples_of_a_batch_do_not_mix():
    model = make_model()
    video, t, labels = make_inputs(batch=3)
    one = model(video[1:2], t[1:2], labels[1:2])
    torch.testing.assert_close(model(video, t, labels)[1:2], one, rtol=1e-12, atol=1e-12)


def test_a_bf16_model_takes_fp32_videos_and_answers_in_bf16():
    model = make_model().bfloat16()
    video, t, labels = make_inputs()
    assert model(video.float(), t, labels).dtype == torch.bfloat16
    assert RectifiedFlow().loss(model, video.float(), labels, t, torch.randn_like(video).float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 25, "heads": 3}, "25 mod 3 = 1"),
        ({"width": 18, "heads": 3}, "head dim, width / heads = 6"),
        ({"width": 18, "heads": 3, "positions": "sinusoidal"}, "width = 18 to be a multiple of 4"),
        ({"positions": "learned"}, "positions='learned'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_model(**sizes)


def test_frames_that_do_not_divide_into_patches_are_refused():
    video, t, labels = make_inputs()
    with pytest.raises(ValueError, match="4 x 5 pixels"):
        make_model()(video[..., :5], t, labels)


# --- the blocks


@pytest.mark.parametrize(("kind", "batch_dim", "own_dim"), [(SpaceBlock, 1, 2), (TimeBlock, 2, 1)])
def test_a_block_treats_the_other_dim_as_batch(kind: type[SpaceBlock], batch_dim: int, own_dim: int):
    block = make_block(kind)
    x = torch.randn(2, 5, 7, 24, dtype=torch.float64)
    cond, text = torch.randn(2, 24, dtype=torch.float64), torch.randn(2, 3, 24, dtype=torch.float64)
    angle = time_angles(x.shape[own_dim], 4, CPU)
    out = block(x, cond, text, wave(angle))
    order = torch.randperm(x.shape[batch_dim])
    permuted = block(x.index_select(batch_dim, order), cond, text, wave(angle))
    torch.testing.assert_close(permuted, out.index_select(batch_dim, order), rtol=1e-12, atol=1e-12)

    moved = x.clone()
    # Random: layer norm would not see a constant.
    moved.select(batch_dim, 0).select(own_dim - (own_dim > batch_dim), 0).add_(torch.randn(2, 24))
    difference = (block(moved, cond, text, wave(angle)) - out).abs().amax((0, 3))
    touched, *untouched = difference.unbind(batch_dim - 1)
    assert touched.min() > 1e-6, "every token along the block's own dim sees the change"
    assert torch.stack(untouched).max() < 1e-12, "no other slice does"


@pytest.mark.parametrize(("kind", "shape"), [(SpaceBlock, (2, 0, 3, 24)), (TimeBlock, (2, 3, 0, 24))])
def test_a_block_takes_an_empty_shard_of_the_other_dim(kind: type[SpaceBlock], shape: tuple[int, ...]):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    cond = torch.randn(2, 24, dtype=torch.float64)
    out = make_block(kind)(x, cond, torch.randn(2, 3, 24, dtype=torch.float64), wave(time_angles(3, 4, CPU)))
    assert out.shape == shape
    out.sum().backward()
    assert x.grad is not None


def test_self_attention_equals_a_hand_written_one():
    attention = SelfAttention(24, 3).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = (x @ w.T for w in attention.qkv.weight.split(24))
    heads = []
    for cut in (slice(0, 8), slice(8, 16), slice(16, 24)):
        scores = q[..., cut] @ k[..., cut].transpose(1, 2) / math.sqrt(8)
        heads.append(scores.softmax(-1) @ v[..., cut])
    expected = torch.cat(heads, -1) @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(x, None), expected, rtol=1e-12, atol=1e-12)


def test_cross_attention_equals_a_hand_written_one():
    attention = CrossAttention(16, 2).double()
    x, text = torch.randn(2, 3, 5, 16, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    q, (k, v) = x @ attention.q.weight.T, (text @ w.T for w in attention.kv.weight.split(16))
    heads = []
    for cut in (slice(0, 8), slice(8, 16)):
        scores = torch.einsum("btsd,bmd->btsm", q[..., cut], k[..., cut]) / math.sqrt(8)
        heads.append(torch.einsum("btsm,bmd->btsd", scores.softmax(-1), v[..., cut]))
    expected = torch.cat(heads, -1) @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(x, text), expected, rtol=1e-12, atol=1e-12)


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    table = wave(time_angles(10, 4, CPU))
    q_L, k_L = rotate(q.expand(10, 8), table), rotate(k.expand(10, 8), table)
    scores = q_L @ k_L.T
    for distance in range(-9, 10):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.diagonal()[0], q @ k)
    assert not torch.allclose(scores.diagonal(1)[0], scores.diagonal(-1)[0])


def test_space_angles_turn_with_row_and_column_apart():
    angle = space_angles(3, 5, 6, CPU).reshape(3, 5, 6)
    torch.testing.assert_close(angle[:, :, :3], time_angles(3, 3, CPU)[:, None].expand(3, 5, 3))
    torch.testing.assert_close(angle[:, :, 3:], time_angles(5, 3, CPU)[None].expand(3, 5, 3))


# --- loss and sampler


def test_loss_equals_the_formula():
    model = make_model()
    video, t, labels = make_inputs()
    noise = torch.randn_like(video)
    total = 0.0
    for b in range(2):
        on_path = t[b].double() * video[b] + (1 - t[b].double()) * noise[b]
        velocity = model(on_path[None], t[b : b + 1], labels[b : b + 1])[0]
        total += ((velocity - (video[b] - noise[b])) ** 2).sum().item()
    loss = RectifiedFlowObjective(model)(video, labels, t, noise)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(total / video.numel(), rel=1e-12)


def test_a_generator_draws_what_is_not_given():
    model = make_model()
    video, _, labels = make_inputs()

    def loss(seed: int) -> float:
        return RectifiedFlow().loss(model, video, labels, generator=torch.Generator().manual_seed(seed)).item()

    assert loss(1) == loss(1) != loss(2)


def test_sampler_follows_the_exact_field_to_the_data():
    """The velocity from x at time t towards one known video is (video - x) / (1 - t): Euler arrives there exactly."""
    target = torch.randn(2, 3, 1, 4, 4)

    def field(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return (target - x) / (1 - t[:, None, None, None, None])

    out = RectifiedFlow().sample(field, tuple(target.shape), torch.zeros(2, dtype=torch.int64), steps=7)
    torch.testing.assert_close(out, target, rtol=1e-5, atol=1e-5)


def test_sampler_is_a_function_of_its_seed():
    model = make_model()
    labels = torch.randint(0, 5, (2, 4))

    def sample(seed: int, guidance: float = 1.0) -> Tensor:
        return RectifiedFlow().sample(
            model,
            (2, 3, 2, 4, 6),
            labels,
            steps=3,
            generator=torch.Generator().manual_seed(seed),
            guidance=guidance,
            null_labels=model.condition_embed.null(labels),
        )

    assert torch.equal(sample(1), sample(1))
    assert not torch.allclose(sample(1), sample(2))
    assert not torch.allclose(sample(1), sample(1, guidance=3.0))


def test_guidance_extrapolates_from_the_null_labels():
    def field(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return labels[:, None, None, None, None].expand_as(x).float()

    def sample(guidance: float) -> Tensor:
        return RectifiedFlow().sample(
            field,
            (1, 1, 1, 2, 2),
            torch.tensor([5]),
            steps=4,
            generator=torch.Generator().manual_seed(0),
            guidance=guidance,
            null_labels=torch.tensor([1]),
        )

    torch.testing.assert_close(sample(3.0) - sample(1.0), torch.full((1, 1, 1, 2, 2), 8.0))


def test_training_lowers_the_loss():
    """The loss starts near 2; the best velocity that ignores the noisy video, the mean image, leaves the noise's 1."""
    model = VideoDiT(width=16, heads=2, depth=1, vocabulary=5)
    video = torch.full((8, 2, 1, 8, 8), -1.0)
    video[..., 2:6, 2:6] = 1.0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(150):
        generator = torch.Generator().manual_seed(step)
        loss = RectifiedFlow().loss(model, video, torch.zeros(8, dtype=torch.int64), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.7


# --- the plan


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal"])
@pytest.mark.parametrize("wrap", [lambda model: model, RectifiedFlowObjective])
def test_the_plan_goes_from_pixels_to_pixels_wherever_the_model_is(wrap: Any, positions: str):
    module = wrap(make_model(depth=2, positions=positions))
    *embed, space, time, final = plan(module).stages
    # Sinusoidal positions are added to whole tokens, behind the embedding.
    assert [stage.takes for stage in embed] == (["b t s p"] if positions == "rotary" else [])
    assert final.gives == "b t s p"
    for stage in (*embed, final):
        assert stage.computes_along == ()
        assert module.get_submodule(stage.modules) is not None
    assert (space.computes_along, time.computes_along) == (("s",), ("t",))
    assert space.heads == time.heads == 3
    for stage, kind in ((space, SpaceBlock), (time, TimeBlock)):
        for i in range(2):
            assert isinstance(module.get_submodule(stage.modules.replace("*", str(i))), kind)


def test_a_module_without_the_model_has_no_plan():
    with pytest.raises(SequenceParallelConfigError, match="Linear has no part of class VideoDiT"):
        plan(nn.Linear(2, 2))
