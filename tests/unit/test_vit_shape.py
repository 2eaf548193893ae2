"""First weights of the scientific ViT on Megatron's layers, and its grid, without Megatron."""

from __future__ import annotations

import pytest
import torch

from dsp_plugin.models.vit import VisionTransformer
from dsp_plugin.patches.megatron.models.vit import VitShape
from dsp_plugin.patches.megatron.models.vit_weights import draw


def test_drawn_weights_have_the_distributions_of_the_plain_model() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(5, (2, 2), width=32, heads=4, depth=1, registers=2, classes=3, lead_time=True)
    for name, parameter in model.named_parameters():
        drawn = draw(name, parameter.shape, seed=1)
        assert torch.equal(drawn, draw(name, parameter.shape, seed=1))
        if "norm" in name:
            assert torch.equal(drawn, parameter), name
            continue
        assert not torch.equal(drawn, draw(name, parameter.shape, seed=2))
        if parameter.numel() > 30:
            error = abs(drawn.std() / parameter.std() - 1).item()
            assert error < 4 / parameter.numel() ** 0.5 + 0.02, (name, error)


@pytest.mark.parametrize(("sides", "patch"), [((8, 6), (2, 3)), ((2, 8, 6), (1, 2, 3))])
def test_pixels_come_in_the_order_of_the_plain_model(sides: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """The plain model without blocks, with an embedding and a readout that let pixels through."""
    shape = VitShape(1, sides, patch, attention="axial")
    fields = torch.randn(2, 1, *sides)
    taken = []

    def trunk(pixels: torch.Tensor, *_: object) -> torch.Tensor:
        taken.append(pixels)
        return pixels[..., 0, :]

    model = VisionTransformer(1, patch, width=8, heads=1, depth=0, attention="axial")
    model.trunk.forward = trunk  # type: ignore[method-assign]
    ids = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(model(fields, ids, ids), fields)
    assert torch.equal(shape.patchify(fields), taken[0])


def test_tokens_in_front_have_no_pixels() -> None:
    shape = VitShape(2, (4, 6), registers=2, classes=3)
    assert shape.tokens == {"l": 9}
    pixels = shape.patchify(torch.randn(2, 5, 4, 6))
    assert pixels.shape == (2, 9, 5, 4)
    assert pixels[:, :3].abs().max() == 0
    assert shape.places(pixels.device)[:, 0].tolist() == [-1, -2, -3, 0, 0, 0, 1, 1, 1]


def test_fields_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 8\) pixels, and the model is built for \(4, 6\)"):
        VitShape(2, (4, 6)).patchify(torch.zeros(2, 5, 4, 8))
    with pytest.raises(ValueError, match=r"\(4, 7\) pixels does not divide"):
        VitShape(2, (4, 7))
