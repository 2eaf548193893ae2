"""The weights of `VideoDiT` for Megatron's layers, and the batches, without Megatron."""

from __future__ import annotations

import pytest
import torch

from dsp_plugin.models.video_dit import VideoDiT
from dsp_plugin.patches.megatron.models.video_dit import VideoShape
from dsp_plugin.patches.megatron.models.video_dit_weights import by_head, by_part, draw

HEADS, WIDTH = 4, 32


def model() -> VideoDiT:
    """A small one."""
    torch.manual_seed(0)
    return VideoDiT(width=WIDTH, heads=HEADS, depth=1)


def test_heads_lie_together_and_go_back() -> None:
    moved = 0
    for name, parameter in model().named_parameters():
        there = by_head(name, parameter.detach(), HEADS)
        moved += not torch.equal(there, parameter)
        assert torch.equal(by_part(name, there, HEADS), parameter), name
    # Of a space and a time block: queries, keys and values of the self-attention, keys and values of the other.
    assert moved == 4


def test_one_head_has_its_query_key_and_value() -> None:
    rows = torch.arange(3 * WIDTH).unsqueeze(1)
    size = WIDTH // HEADS
    first = by_head("blocks.0.time.attn.qkv.weight", rows, HEADS)[: 3 * size, 0].tolist()
    assert first == [part * WIDTH + row for part in range(3) for row in range(size)]


def test_drawn_weights_have_the_distributions_of_the_plain_model() -> None:
    for name, parameter in model().named_parameters():
        drawn = draw(name, parameter.shape, seed=1)
        assert torch.equal(drawn, draw(name, parameter.shape, seed=1))
        if "norm" in name:
            assert torch.equal(drawn, parameter), name
            continue
        assert not torch.equal(drawn, draw(name, parameter.shape, seed=2))
        error = abs(drawn.std() / parameter.std() - 1).item()
        assert error < 4 / parameter.numel() ** 0.5 + 0.02, (name, error)


def test_a_batch_of_another_shape_is_refused() -> None:
    shape = VideoShape(frames=3, height=8, width=12)
    assert shape.patchify(torch.zeros(2, 3, 1, 8, 12)).shape == (2, 3, 6, 16)
    with pytest.raises(ValueError, match=r"\(4, 1, 8, 12\) where the model was built for \(3, 1, 8, 12\)"):
        shape.patchify(torch.zeros(2, 4, 1, 8, 12))
    with pytest.raises(ValueError, match="8 x 10 pixels do not divide"):
        VideoShape(frames=3, height=8, width=10)
