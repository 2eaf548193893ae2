"""ViViT (arXiv 2103.15691): transformers' joint model, and the factorized ones built from its unmodified parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from parity import Case, assert_parity
from torch import Tensor, nn

from dsp_plugin import Plan, Region, Stage, UnsupportedError
from dsp_plugin.spawn import RankFailure

pytestmark = pytest.mark.distributed

# Five tubelets in time, nine in space: 46 tokens with the class token.
TUBELET, FRAMES, IMAGE, BATCH, HEADS = (2, 4, 4), 10, 12, 2, 4
TIMES, PATCHES = FRAMES // TUBELET[0], (IMAGE // TUBELET[1]) ** 2


def vivit_config(attention: str = "sdpa") -> Any:
    """A small ViViT whose attention goes through torch's `scaled_dot_product_attention`."""
    from transformers import VivitConfig

    return VivitConfig(
        image_size=IMAGE,
        num_frames=FRAMES,
        tubelet_size=list(TUBELET),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=32,
        attn_implementation=attention,
    )


def video(batch: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, FRAMES, 3, IMAGE, IMAGE)}


# --- joint: every token attends to every other, the class token among them


def joint(batch: int = BATCH, attention: str = "sdpa") -> tuple[nn.Module, dict[str, Any]]:
    from transformers import VivitModel

    return VivitModel(vivit_config(attention)), video(batch)


JOINT = Plan(tokens="b l c", stages=(Stage("layers.*", ("l",), attention="attention", heads=HEADS),))
JOINT_OR_BATCH = Plan(
    tokens="b l c", stages=(Stage("layers.*", ("l",), attention="attention", heads=HEADS),), batch_dim=None
)


# --- model 2: a spatial encoder over each frame of tubelets, then a temporal encoder over one token per frame


class SpatialEncoder(nn.Module):
    """Frames of patches to frame tokens: what their class tokens have become."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.vivit.modeling_vivit import VivitLayer

        self.layers = nn.ModuleList(VivitLayer(config) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[(B T), 1 + S, C] to [(B T), C]."""
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]


class FactorizedEncoder(nn.Module):
    """ViViT's model 2."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.vivit.modeling_vivit import VivitLayer, VivitTubeletEmbeddings

        width = config.hidden_size
        self.embed = VivitTubeletEmbeddings(config)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + PATCHES, width))
        self.space = SpatialEncoder(config)
        self.time_class = nn.Parameter(torch.zeros(1, 1, width))
        self.time_positions = nn.Parameter(torch.zeros(1, 1 + TIMES, width))
        self.time = nn.ModuleList(VivitLayer(config) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, frames, 3, Y, X] to the class token [B, C]."""
        patches = rearrange(self.embed(pixel_values), "b (t s) c -> (b t) s c", t=TIMES)
        x = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1) + self.positions
        frames = rearrange(self.space(x), "(b t) c -> b t c", t=TIMES)
        x = torch.cat([self.time_class.expand(len(frames), -1, -1), frames], dim=1) + self.time_positions
        for layer in self.time:
            x = layer(x)
        return self.norm(x[:, 0])


def factorized_encoder(batch: int = BATCH) -> tuple[nn.Module, dict[str, Any]]:
    return FactorizedEncoder(vivit_config()), video(batch)


FACTORIZED_ENCODER = Plan(
    tokens="b t s c",
    stages=(Stage("space.layers.*", ("s",), layout="(b t) 1+s c"),),
    sizes={"t": TIMES},
    region=Region("space", layout="(b t) 1+s c", leaves="(b t) c"),
)


# --- model 3: every layer attends over space, then over time


class FactorizedLayer(nn.Module):
    """ViViT's factorized self-attention."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.vivit.modeling_vivit import VivitAttention, VivitMLP

        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size) for _ in range(3))
        self.space, self.time = VivitAttention(config), VivitAttention(config)
        self.mlp = VivitMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, S, C] to the same."""
        batch = len(x)
        mixed, _ = self.space(rearrange(self.norms[0](x), "b t s c -> (b t) s c"))
        x = x + rearrange(mixed, "(b t) s c -> b t s c", b=batch)
        mixed, _ = self.time(rearrange(self.norms[1](x), "b t s c -> (b s) t c"))
        x = x + rearrange(mixed, "(b s) t c -> b t s c", b=batch)
        return x + self.mlp(self.norms[2](x))


class FactorizedAttention(nn.Module):
    """ViViT's model 3."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.vivit.modeling_vivit import VivitTubeletEmbeddings

        self.embed = VivitTubeletEmbeddings(config)
        self.positions = nn.Parameter(torch.zeros(1, TIMES, PATCHES, config.hidden_size))
        self.layers = nn.Sequential(*(FactorizedLayer(config) for _ in range(2)))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, frames, 3, Y, X] to tokens [B, T, S, C]."""
        x = rearrange(self.embed(pixel_values), "b (t s) c -> b t s c", t=TIMES) + self.positions
        return self.norm(self.layers(x))


def factorized_attention(batch: int = BATCH) -> tuple[nn.Module, dict[str, Any]]:
    return FactorizedAttention(vivit_config()), video(batch)


# Between the two stages of a layer the residual stream is sharded as the norms and the MLP are: along t.
FACTORIZED_ATTENTION = Plan(
    tokens="b t s c",
    stages=(
        Stage("layers.*.space", ("s",), layout="(b t) s c"),
        Stage("layers.*.time", ("t",), layout="(b s) t c"),
    ),
    between="t",
    region=Region("layers"),
)


CASES = (
    Case(joint, plan=JOINT),
    Case(joint, plan=JOINT, dtype=torch.float32),
    Case(joint, plan=JOINT, config={"method": "ring"}),
    Case(joint, {"batch": 4}, plan=JOINT_OR_BATCH),
    Case(factorized_encoder, plan=FACTORIZED_ENCODER),
    Case(factorized_attention, plan=FACTORIZED_ATTENTION),
)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sharded_vivit_has_the_unsharded_output_gradients_and_the_planned_bytes(size):
    whole, _, ring, batch, encoder, attention = (result.stages for result in assert_parity(size, *CASES))
    assert [stage[1:] for stage in whole] == [("l", "split l", "ulysses"), ("l", "keep", "ulysses")]
    assert {stage[1:] for stage in ring} == {("l", "split l", "ring"), ("l", "keep", "ring")}
    assert {stage[3] for stage in batch} == {"local"}
    assert encoder == (("space.layers.0", "t", "split t", "local"), ("space.layers.1", "t", "keep", "local"))
    assert [stage[1:] for stage in attention[:2]] == [("t", "keep", "local"), ("s", "switch t -> s and back", "local")]


def test_attention_that_is_written_out_cannot_be_served():
    with pytest.raises(RankFailure) as failure:
        assert_parity(2, Case(joint, {"attention": "eager"}, plan=JOINT))
    assert len(failure.value.errors) == 2
    for error in failure.value.errors.values():
        assert isinstance(error, UnsupportedError)
        assert "attention of layers.0.attention: its forward never called" in str(error)
        assert "set the model's attention implementation to sdpa" in str(error)
