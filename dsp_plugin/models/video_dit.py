"""A video diffusion transformer: space attention inside each frame, time attention along each patch.

Plain torch and einops, on one device, with no knowledge of parallelism. In reading order: positions, the blocks, the
model `VideoDiT`. What it is trained on and sampled by is next door, in rectified_flow.py.

Shape suffixes:
    B  batch                      I     image channels of the video
    T  frames                     Y, X  height and width of a frame, in pixels
    S  patches in one frame, row by row
    C  model width                H     attention heads
    M  condition tokens           D     head dim, C / H
    L  length attended over: S in a space block, T in a time block
    A  angles of a position table: D / 2 (rotary) or C / 2 (sinusoidal)

Sources: the block is DiT's (arXiv 2212.09748) with PixArt's cross-attention (arXiv 2310.00426); space and time
apart are Latte's and Open-Sora's (arXiv 2401.03048, 2412.20404).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

# --- positions


def angles(position_L: Tensor, count: int, period: float) -> Tensor:
    """Angles [L, count], fp64: position times `count` frequencies, falling geometrically from 1 to about 1 / period."""
    frequency = period ** (-torch.arange(count, dtype=torch.float64, device=position_L.device) / count)
    return torch.outer(position_L.double(), frequency)


def time_angles(frames: int, count: int, device: torch.device) -> Tensor:
    """Angles [T, count] of the frames."""
    return angles(torch.arange(frames, device=device), count, period=100.0)


def space_angles(rows: int, columns: int, count: int, device: torch.device) -> Tensor:
    """Angles [S, count] of the patches: the first half turns with the row, the second half with the column."""
    row = repeat(angles(torch.arange(rows, device=device), count // 2, period=100.0), "y a -> (y x) a", x=columns)
    column = repeat(angles(torch.arange(columns, device=device), count // 2, period=100.0), "x a -> (y x) a", y=rows)
    return torch.cat([row, column], dim=-1)


def wave(angle_LA: Tensor) -> Tensor:
    """Table [L, 2A]: the cosines of the angles, then their sines."""
    return torch.cat([angle_LA.cos(), angle_LA.sin()], dim=-1)


def rotate(x_BHLD: Tensor, rope_LD: Tensor) -> Tensor:
    """Turn the feature pairs (i, i + D/2) of every token by its position's angles (arXiv 2104.09864)."""
    cos, sin = rope_LD.chunk(2, dim=-1)
    first, second = x_BHLD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


# --- the blocks


class SelfAttention(nn.Module):
    """Multi-head attention of each sequence in the batch to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # No bias: a constant added to every key shifts a row of scores as a whole, and softmax gives that no gradient.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, rope_LD: Tensor | None) -> Tensor:
        """Returns [B, L, C]; `rope_LD` is the table of rotary positions, None when tokens carry positions already."""
        q_BHLD, k_BHLD, v_BHLD = rearrange(self.qkv(x_BLC), "b l (qkv h d) -> qkv b h l d", qkv=3, h=self.heads)
        if rope_LD is not None:
            q_BHLD, k_BHLD = rotate(q_BHLD, rope_LD), rotate(k_BHLD, rope_LD)
        out_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD)
        return self.out(rearrange(out_BHLD, "b h l d -> b l (h d)"))


class CrossAttention(nn.Module):
    """Multi-head attention of every video token to the condition tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTSC: Tensor, text_BMC: Tensor) -> Tensor:
        """Returns [B, T, S, C]."""
        q = rearrange(self.q(x_BTSC), "b t s (h d) -> b h (t s) d", h=self.heads)
        k, v = rearrange(self.kv(text_BMC), "b m (kv h d) -> kv b h m d", kv=2, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v)
        _, frames, patches, _ = x_BTSC.shape
        return self.out(rearrange(out, "b h (t s) d -> b t s (h d)", t=frames, s=patches))


class Modulation(nn.Module):
    """The adaptive part of adaptive layer norm: the condition vector to `parts` vectors that broadcast over tokens."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, cond_BC: Tensor) -> Tensor:
        """Returns [parts, B, 1, 1, C]."""
        return rearrange(self.linear(F.silu(cond_BC)), "b (parts c) -> parts b 1 1 c", parts=self.parts)


def plain_norm(width: int) -> nn.LayerNorm:
    """Layer norm without weights: the modulation supplies scale and shift."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    """Self-attention along one dim, cross-attention to the condition, MLP; a subclass says along which dim."""

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.modulation = Modulation(width, parts=6)
        self.norm_attn, self.norm_cross, self.norm_mlp = plain_norm(width), nn.LayerNorm(width), plain_norm(width)
        self.attn = SelfAttention(width, heads)
        self.cross = CrossAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * width, width)
        )

    def attend(self, x_BTSC: Tensor, rope_LD: Tensor | None) -> Tensor:
        """Self-attention along the block's dim."""
        raise AssertionError(f"{type(self).__name__} must say along which dim it attends")

    def forward(self, x_BTSC: Tensor, cond_BC: Tensor, text_BMC: Tensor, rope: Tensor | None) -> Tensor:
        """One residual block.

        Args:
            x_BTSC: video tokens.
            cond_BC: condition vector (diffusion time and mean condition token); it sets scales, shifts and gates.
            text_BMC: condition tokens, for the cross-attention.
            rope: rotary table of the dim attended along, [S, D] or [T, D]; None with sinusoidal positions.

        Returns:
            [B, T, S, C].
        """
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(cond_BC)
        x_BTSC = x_BTSC + gate_attn * self.attend(self.norm_attn(x_BTSC) * (1 + scale_attn) + shift_attn, rope)
        x_BTSC = x_BTSC + self.cross(self.norm_cross(x_BTSC), text_BMC)
        return x_BTSC + gate_mlp * self.mlp(self.norm_mlp(x_BTSC) * (1 + scale_mlp) + shift_mlp)


class SpaceBlock(Block):
    """Every frame attends within itself; frames do not see each other."""

    def attend(self, x_BTSC: Tensor, rope_SD: Tensor | None) -> Tensor:
        """Self-attention along s."""
        batch, frames, _, _ = x_BTSC.shape
        out = self.attn(rearrange(x_BTSC, "b t s c -> (b t) s c"), rope_SD)
        return rearrange(out, "(b t) s c -> b t s c", b=batch, t=frames)


class TimeBlock(Block):
    """Every patch position attends along time; positions do not see each other."""

    def attend(self, x_BTSC: Tensor, rope_TD: Tensor | None) -> Tensor:
        """Self-attention along t."""
        batch, _, patches, _ = x_BTSC.shape
        out = self.attn(rearrange(x_BTSC, "b t s c -> (b s) t c"), rope_TD)
        return rearrange(out, "(b s) t c -> b t s c", b=batch, s=patches)


class SpaceTimeLayer(nn.Module):
    """A space block, then a time block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.space = SpaceBlock(width, heads)
        self.time = TimeBlock(width, heads)

    def forward(
        self,
        x_BTSC: Tensor,
        cond_BC: Tensor,
        text_BMC: Tensor,
        rope_SD: Tensor | None,
        rope_TD: Tensor | None,
    ) -> Tensor:
        """Returns [B, T, S, C]."""
        return self.time(self.space(x_BTSC, cond_BC, text_BMC, rope_SD), cond_BC, text_BMC, rope_TD)


# --- the model


class TimeEmbedding(nn.Module):
    """Diffusion time in [0, 1] to a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns [B, C] in `dtype`."""
        # Times are spread over 0..1000, which is what a period of 10,000 resolves.
        return self.mlp(wave(angles(1000.0 * t_B.double(), self.width // 2, period=10_000.0)).to(dtype))


class ConditionEmbedding(nn.Module):
    """Condition tokens from class labels, from a caption's token ids, or from a text encoder's features.

    One learned token always comes first. A lone label would otherwise be the only key of the cross-attention, whose
    softmax is then constant; and every video token can attend to it to take nothing from the caption.
    """

    def __init__(self, width: int, vocabulary: int, text_width: int | None) -> None:
        super().__init__()
        self.vocabulary, self.text_width = vocabulary, text_width
        self.first = nn.Parameter(torch.empty(width))
        # The table's last row is the null label of classifier-free guidance.
        self.embed = nn.Embedding(vocabulary + 1, width) if text_width is None else nn.Linear(text_width, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Class ids [B], token ids [B, n] (int64) or features [B, n, text_width] to condition tokens [B, 1 + n, C]."""
        tokens = self.embed(labels[:, None] if labels.dim() == 1 else labels)
        return torch.cat([self.first.expand(tokens.shape[0], 1, -1), tokens], dim=1)

    def null(self, labels: Tensor) -> Tensor:
        """The absent condition, in the shape of `labels`."""
        return torch.full_like(labels, self.vocabulary if self.text_width is None else 0)


class FinalLayer(nn.Module):
    """Adaptive norm, then each token back to its patch's pixels."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, parts=2)
        self.norm = plain_norm(width)
        self.linear = nn.Linear(width, pixels)

    def forward(self, x_BTSC: Tensor, cond_BC: Tensor) -> Tensor:
        """Returns [B, T, S, pixels in a patch]."""
        shift, scale = self.modulation(cond_BC)
        return self.linear(self.norm(x_BTSC) * (1 + scale) + shift)


class VideoDiT(nn.Module):
    """Predicts the rectified-flow velocity of a noisy video.

    Args:
        channels: image channels I.
        patch: side of the square patch, in pixels; it must divide the frames' height and width.
        width: model width C. heads: attention heads H, any divisor of `width`. depth: space-time layers.
        vocabulary: number of class labels or caption token ids.
        text_width: if given, the condition is features of that width from a text encoder, in place of ids.
        positions: "rotary" (inside each self-attention) or "sinusoidal" (added before the first block).

    Raises:
        ValueError: if the sizes do not divide as the positions need.
    """

    def __init__(
        self,
        channels: int = 1,
        patch: int = 4,
        width: int = 64,
        heads: int = 4,
        depth: int = 3,
        vocabulary: int = 10,
        text_width: int | None = None,
        positions: Literal["rotary", "sinusoidal"] = "rotary",
    ) -> None:
        super().__init__()
        if positions not in ("rotary", "sinusoidal"):
            raise ValueError(f"positions={positions!r}: choose 'rotary' or 'sinusoidal'")
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}: {width} mod {heads} = {width % heads}")
        # A position in space needs a cosine and a sine for the row, and both for the column: features come in fours.
        turned = width // heads if positions == "rotary" else width
        if turned % 4:
            name = "the head dim, width / heads" if positions == "rotary" else "width"
            raise ValueError(f"positions={positions!r} needs {name} = {turned} to be a multiple of 4")

        self.patch, self.positions, self.turned = patch, positions, turned
        self.patch_embed = nn.Linear(channels * patch * patch, width)
        self.time_embed = TimeEmbedding(width)
        self.condition_embed = ConditionEmbedding(width, vocabulary, text_width)
        self.blocks = nn.ModuleList(SpaceTimeLayer(width, heads) for _ in range(depth))
        self.final = FinalLayer(width, channels * patch * patch)
        self.apply(initialise)

    def forward(self, video_BTIYX: Tensor, t_B: Tensor, labels: Tensor) -> Tensor:
        """Velocity [B, T, I, Y, X] at the noisy video `video_BTIYX` and time `t_B` (0 is noise, 1 is data).

        `labels` are class ids [B], token ids [B, n] (int64) or text features [B, n, text_width]. The model computes in
        the dtype of its weights, whatever the dtype of the video, and answers in it.
        """
        height, width = video_BTIYX.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"frames of {height} x {width} pixels do not divide into patches of side {self.patch}")
        rows, columns = height // self.patch, width // self.patch
        dtype = self.patch_embed.weight.dtype

        pixels = rearrange(video_BTIYX, "b t i (r y) (k x) -> b t (r k) (i y x)", y=self.patch, x=self.patch)
        x_BTSC = self.patch_embed(pixels.to(dtype))
        text_BMC = self.condition_embed(labels if labels.dtype == torch.int64 else labels.to(dtype))
        cond_BC = self.time_embed(t_B, dtype) + text_BMC.mean(dim=1)

        count = self.turned // 2
        space_S = wave(space_angles(rows, columns, count, x_BTSC.device)).to(dtype)
        time_T = wave(time_angles(video_BTIYX.shape[1], count, x_BTSC.device)).to(dtype)
        rope_SD: Tensor | None = space_S
        rope_TD: Tensor | None = time_T
        if self.positions == "sinusoidal":
            x_BTSC = x_BTSC + space_S + time_T[:, None]
            rope_SD = rope_TD = None

        for layer in self.blocks:
            x_BTSC = layer(x_BTSC, cond_BC, text_BMC, rope_SD, rope_TD)
        pixels = self.final(x_BTSC, cond_BC)
        return rearrange(
            pixels, "b t (r k) (i y x) -> b t i (r y) (k x)", r=rows, k=columns, y=self.patch, x=self.patch
        )


def initialise(module: nn.Module) -> None:
    """Small random weights everywhere; `Module.apply` hands it every submodule.

    DiT starts modulations and the final layer at exactly zero. Then most gradients of the first steps are exactly zero
    too, and a test that compares the gradients of two runs compares zeros. So: small, not zero.
    """
    match module:
        case nn.Linear():
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.01)
        case nn.Embedding():
            nn.init.normal_(module.weight, std=0.5)
        case ConditionEmbedding():
            nn.init.normal_(module.first, std=0.5)
        case Modulation():
            nn.init.normal_(module.linear.weight, std=0.02)
        case FinalLayer():
            nn.init.normal_(module.linear.weight, std=0.02)
