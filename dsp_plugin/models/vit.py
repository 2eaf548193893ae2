"""A vision transformer for scientific fields: many variables on one grid, of which every batch may carry others.

Plain torch and einops, on one device, with no knowledge of parallelism; attention is that of video_dit.py. In reading
order: positions, from pixels to tokens, the blocks, the readout, the model `VisionTransformer`. What it is trained on
is next door, in vit_objective.py.

Tokens are patches of the grid. Under full attention they are one sequence, patches row by row, with the class token and
the registers in front; under axial attention they keep the dims of the grid. Everything between the first reshape and
the last is one module, `Trunk`: from the pixels of every token to the predictions at it. Positions are computed and
nothing outside attention grows faster than the number of tokens: a grid may have a million.

Shape suffixes:
    B  batch                        C  model width
    V  variables that came in       H  attention heads
    W  variables that are wanted    D  head dim, C / H
    P  pixels in a patch            G  dims of the grid: 2 (Y X) or 3 (Z Y X, or time in place of Z)
    N  the dims of the tokens: one under full attention, G under axial
    L  length attended over         A  angles of a position
    F  predictions at a token: W * P, and the number of classes if there are any

Sources: the scale, the class of model and long sequences of arXiv 2405.15780; variables as tokens of their own that
cross-attention aggregates, and lead time, are ClimaX's (arXiv 2301.10343); registers are of arXiv 2309.16588; axial
attention is of arXiv 1912.12180.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsp_plugin.models.video_dit import SelfAttention, wave

# --- positions


def angles(place_NG: Tensor, count: int) -> Tensor:
    """Angles [N, count], fp64: each dim of the grid turns its share of them, at frequencies from 1 to about 1/1000."""
    dims = place_NG.shape[-1]
    parts = []
    for dim in range(dims):
        share = (count + dims - 1 - dim) // dims
        frequency = 1000.0 ** (-torch.arange(share, dtype=torch.float64, device=place_NG.device) / share)
        parts.append(place_NG[..., dim, None].double() * frequency)
    return torch.cat(parts, dim=-1)


def places(grid: Sequence[int], front: int, flat: bool, device: torch.device) -> Tensor:
    """Where tokens lie, int64 [*grid, G], or [front + tokens, G] if flat: those in front at -1, -2, and so on."""
    place = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"), dim=-1)
    if not flat:
        return place
    ahead = -1 - torch.arange(front, device=device)
    return torch.cat([ahead[:, None].expand(front, len(grid)), place.flatten(0, -2)])


# --- from pixels to tokens


class VariableEmbedding(nn.Module):
    """The pixels of each variable in a patch to a token, by weights of that variable."""

    def __init__(self, known: int, pixels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(known, pixels, width))
        self.bias = nn.Parameter(torch.empty(known, width))

    def forward(self, pixels_BNVP: Tensor, variables_V: Tensor) -> Tensor:
        """Returns [B, N, V, C]."""
        return torch.einsum("...vp,vpc->...vc", pixels_BNVP, self.weight[variables_V]) + self.bias[variables_V]


class VariableAggregation(nn.Module):
    """One token out of the tokens of all variables in a patch, by cross-attention from a learned query.

    The query is the same at every patch, so its product with the key projection is one vector per head: keys, which
    would be as large as the embedding itself, are never formed.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, heads, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BNVC: Tensor) -> Tensor:
        """Returns [B, N, C]."""
        x_BNVC = self.norm(x_BNVC)
        share_BNVH = self.score(x_BNVC).softmax(dim=-2)
        value = rearrange(self.value(x_BNVC), "... v (h d) -> ... v h d", h=self.heads)
        return self.out(torch.einsum("...vh,...vhd->...hd", share_BNVH, value).flatten(-2))


class LeadTimeEmbedding(nn.Module):
    """How far ahead to forecast, in any unit, to a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, lead_B: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns [B, C] in `dtype`."""
        return self.mlp(wave(angles(lead_B[:, None], self.width // 2)).to(dtype))


class Embedding(nn.Module):
    """The pixels of a patch to one token: variables embedded, then aggregated."""

    def __init__(self, known: int, pixels: int, width: int, heads: int) -> None:
        super().__init__()
        self.variables = VariableEmbedding(known, pixels, width)
        self.aggregate = VariableAggregation(width, heads)

    def forward(self, pixels_BNVP: Tensor, variables_V: Tensor) -> Tensor:
        """Returns [B, N, C]; `variables_V` says which of the known variables came in, int64."""
        return self.aggregate(self.variables(pixels_BNVP, variables_V))


class Location(nn.Module):
    """Positions and lead time added to tokens; those in front take learned values in place of their own."""

    def __init__(self, width: int, front: int, lead_time: bool) -> None:
        super().__init__()
        self.lead_time = LeadTimeEmbedding(width) if lead_time else None
        self.front = nn.Parameter(torch.empty(front, width)) if front else None

    def forward(self, x_BNC: Tensor, place_NG: Tensor, lead_B: Tensor | None) -> Tensor:
        """Returns [B, N, C]; `place_NG` is as `places` gives it, `lead_B` for a model that takes a lead time."""
        x_BNC = x_BNC + wave(angles(place_NG, x_BNC.shape[-1] // 2)).to(x_BNC.dtype)
        if self.lead_time is not None and lead_B is not None:
            lead_BC = self.lead_time(lead_B, x_BNC.dtype)
            x_BNC = x_BNC + lead_BC.view(len(lead_BC), *[1] * (x_BNC.dim() - 2), -1)
        if self.front is not None:
            number_N = -1 - place_NG[..., 0]
            x_BNC = torch.where(number_N[..., None] >= 0, self.front[number_N.clamp(min=0)], x_BNC)
        return x_BNC


# --- the blocks


class Block(nn.Module):
    """Self-attention along one dim of the tokens, then an MLP, each on normed tokens and added to them.

    Args:
        width: model width C. heads: attention heads H.
        dim: along which dim it attends, counted among N; the other dims are batch.
    """

    def __init__(self, width: int, heads: int, dim: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.dim = dim
        self.norm_attn, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * width, width)
        )

    def forward(self, x_BNC: Tensor, rope: Tensor | None) -> Tensor:
        """Returns [B, N, C]; `rope` is the rotary table [L, D] of the dim attended along, None for none."""
        lines = self.norm_attn(x_BNC).movedim(1 + self.dim, -2)
        attended = self.attn(lines.flatten(0, -3), rope).view(lines.shape)
        x_BNC = x_BNC + attended.movedim(-2, 1 + self.dim)
        return x_BNC + self.mlp(self.norm_mlp(x_BNC))


class Layer(nn.ModuleDict):
    """One block for each dim of the tokens, named after it."""

    def __init__(self, width: int, heads: int, dims: Sequence[str]) -> None:
        super().__init__({name: Block(width, heads, dim) for dim, name in enumerate(dims)})

    def forward(self, x_BNC: Tensor, ropes: Sequence[Tensor | None]) -> Tensor:
        """Returns [B, N, C]; `ropes` are those of the dims, in order."""
        for block, rope in zip(self.values(), ropes, strict=True):
            x_BNC = block(x_BNC, rope)
        return x_BNC


# --- the readout


class Readout(nn.Module):
    """Each token to the pixels of the wanted variables, and to logits, of which those of the class token are used."""

    def __init__(self, known: int, pixels: int, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.empty(known, width, pixels))
        self.bias = nn.Parameter(torch.empty(known, pixels))
        self.classes = nn.Linear(width, classes) if classes else None

    def forward(self, x_BNC: Tensor, wanted_W: Tensor) -> Tensor:
        """Returns [B, N, F]: pixels (w p), then logits."""
        x_BNC = self.norm(x_BNC)
        pixels = torch.einsum("...c,wcp->...wp", x_BNC, self.weight[wanted_W]) + self.bias[wanted_W]
        logits = () if self.classes is None else (self.classes(x_BNC),)
        return torch.cat([pixels.flatten(-2), *logits], dim=-1)


# --- the model


class Trunk(nn.Module):
    """The model between its reshapes: the pixels of every token to the predictions at it."""

    def __init__(
        self, embed: Embedding, locate: Location, blocks: Sequence[nn.Module], readout: Readout, recompute: bool
    ) -> None:
        super().__init__()
        self.embed, self.locate, self.blocks, self.readout = embed, locate, nn.ModuleList(blocks), readout
        self.recompute = recompute

    def forward(
        self,
        pixels_BNVP: Tensor,
        variables_V: Tensor,
        wanted_W: Tensor,
        place_NG: Tensor,
        ropes: Sequence[Tensor | None],
        lead_B: Tensor | None,
    ) -> Tensor:
        """Returns [B, N, F]. The pixels at tokens in front are of no matter."""
        x_BNC = self.locate(self._run(self.embed, pixels_BNVP, variables_V), place_NG, lead_B)
        for layer in self.blocks:
            x_BNC = self._run(layer, x_BNC, ropes)
        return self.readout(x_BNC, wanted_W)

    def _run(self, part: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)


class VisionTransformer(nn.Module):
    """Predicts fields on a grid from fields on it.

    Args:
        known: number of variables that the model knows; they have the ids 0 to known - 1.
        patch: pixels of a patch along each dim of the grid, two dims (Y, X) or three (Z, Y, X).
        width: model width C. heads: attention heads H, any divisor of `width`. depth: layers.
        attention: "full", where each layer is one block in which all tokens attend to all, or "axial", where each layer
            has a block per dim of the grid that attends along it.
        rotary: turn queries and keys by their positions; without it positions are in the embedding only.
        registers: learned tokens in front of the patches. classes: if given, a class token comes before them, and the
            model answers with logits, too. Both need full attention.
        lead_time: whether the model is told how far ahead to forecast.
        recompute: whether training recomputes the embedding and each layer in the backward pass.

    Raises:
        ValueError: the sizes do not fit, or axial attention is asked to place tokens that lie on no line of the grid.
    """

    def __init__(
        self,
        known: int,
        patch: tuple[int, ...] = (2, 2),
        width: int = 64,
        heads: int = 4,
        depth: int = 4,
        attention: Literal["full", "axial"] = "full",
        rotary: bool = True,
        registers: int = 0,
        classes: int = 0,
        lead_time: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if attention not in ("full", "axial"):
            raise ValueError(f"attention={attention!r}: choose 'full' or 'axial'")
        if len(patch) not in (2, 3):
            raise ValueError(f"patch={patch} has {len(patch)} dims: a grid has two (Y, X) or three (Z, Y, X)")
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}: {width} mod {heads} = {width % heads}")
        if width // heads % 2:
            raise ValueError(f"positions take pairs of features: width / heads = {width // heads} must be even")
        front = registers + (1 if classes else 0)
        if attention == "axial" and front:
            raise ValueError(
                f"attention='axial' with registers={registers}, classes={classes}: tokens in front lie on no line of "
                "the grid, so no block would attend to them; use attention='full'"
            )
        self.patch, self.width, self.heads, self.attention = patch, width, heads, attention
        self.dims = ("z", "y", "x")[-len(patch) :]
        self.rotary, self.front, self.classes = rotary, front, classes
        along = ("l",) if attention == "full" else self.dims
        layers = [Layer(width, heads, along) for _ in range(depth)]
        embed, locate = Embedding(known, prod(patch), width, heads), Location(width, front, lead_time)
        self.trunk = Trunk(embed, locate, layers, Readout(known, prod(patch), width, classes), recompute)
        self.apply(initialise)

    def forward(
        self, fields: Tensor, variables: Tensor, wanted: Tensor, lead_time: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predictions of the wanted variables at every pixel.

        Args:
            fields: [B, V, Y, X] or [B, V, Z, Y, X]; taken in the dtype of the weights.
            variables: ids of those V variables, int64 [V], in any order; every call may bring others.
            wanted: ids of the variables to predict, int64 [W].
            lead_time: [B], where the model takes one.

        Returns:
            [B, W, Y, X] or [B, W, Z, Y, X] in the dtype of the weights; with classes also logits [B, classes].

        Raises:
            ValueError: the grid does not divide into patches, ids and fields disagree, or a lead time is missing.
        """
        self._check(fields, variables, lead_time)
        grid = [side // patch for side, patch in zip(fields.shape[2:], self.patch, strict=True)]
        dtype = self.trunk.readout.weight.dtype

        cells = dict(zip(("i", "j", "k"), self.patch, strict=False))
        apart = " ".join(f"({dim} {cell})" for dim, cell in zip(self.dims, cells, strict=True))
        tokens, inside = " ".join(self.dims), " ".join(cells)
        pixels = rearrange(fields.to(dtype), f"b v {apart} -> b {tokens} v ({inside})", **cells)
        flat = self.attention == "full"
        if flat:
            pixels = F.pad(pixels.flatten(1, -3), (0, 0, 0, 0, self.front, 0))
        place = places(grid, self.front, flat, fields.device)
        out = self.trunk(pixels, variables, wanted, place, self._ropes(grid, place, dtype), lead_time)

        patches = out[:, self.front :, : len(wanted) * pixels.shape[-1]].unflatten(1, grid) if flat else out
        predicted = rearrange(patches, f"b {tokens} (w {inside}) -> b w {apart}", **cells)
        return (predicted, out[:, 0, -self.classes :]) if self.classes else predicted

    def _ropes(self, grid: Sequence[int], place: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """The rotary tables of a layer's blocks; tokens in front are not turned."""
        count = self.width // self.heads // 2
        full = self.attention == "full"
        lines = [place.clamp(min=0)] if full else [torch.arange(n, device=place.device)[:, None] for n in grid]
        return [wave(angles(line, count)).to(dtype) if self.rotary else None for line in lines]

    def _check(self, fields: Tensor, variables: Tensor, lead_time: Tensor | None) -> None:
        sides = tuple(fields.shape[2:])
        if len(sides) != len(self.patch) or any(side % patch for side, patch in zip(sides, self.patch, strict=True)):
            raise ValueError(f"a grid of {sides} pixels does not divide into patches of {self.patch}")
        if variables.shape != fields.shape[1:2]:
            raise ValueError(f"{fields.shape[1]} fields came with ids {tuple(variables.shape)}: give one id to each")
        if (takes := self.trunk.locate.lead_time is not None) != (lead_time is not None):
            raise ValueError(f"lead_time={lead_time}, but the model {'takes one' if takes else 'takes none'}")


def initialise(module: nn.Module) -> None:
    """Small random weights everywhere; `Module.apply` hands it every submodule.

    Nothing starts at exactly zero, or a test that compares gradients of two runs would compare zeros.
    """
    match module:
        case nn.Linear():
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.01)
        case VariableEmbedding():
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            nn.init.normal_(module.bias, std=0.5)
        case Location():
            if module.front is not None:
                nn.init.normal_(module.front, std=0.5)
        case Readout():
            nn.init.normal_(module.weight, std=0.02)
            nn.init.normal_(module.bias, std=0.01)
