"""Plans on grids of any number of dims: axial, planes, windows, short dims, batch as a dim, features elsewhere."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from parity import Case, assert_parity
from torch import Tensor, nn

from dsp_plugin import Plan, Stage

pytestmark = pytest.mark.distributed
WIDTH, HEADS = 8, 4
Along = tuple[str, ...]


class Attend(nn.Module):
    """Attention, written out or torch's own, which a plan can route."""

    def __init__(self, routed: bool) -> None:
        super().__init__()
        self.routed = routed

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[n, heads, l, e] each, to the same."""
        if self.routed:
            return F.scaled_dot_product_attention(q, k, v)
        return ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v


class Mix(nn.Module):
    """Attention along some dims of a grid, with every other dim as batch; then an MLP.

    Args:
        dims: of the grid. along: those that it attends along.
        layout: how it takes and returns tokens: ``dims`` and the features, c, in any order.
        routed: whether the attention is torch's own.
    """

    def __init__(self, dims: str, along: Along, layout: str, routed: bool) -> None:
        super().__init__()
        others = " ".join(name for name in dims.split() if name not in along)
        self.dims, self.layout = dims, layout
        self.inside = f"({others}) heads ({' '.join(along)}) e"
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend = Attend(routed)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens in its layout, to the same."""
        x = rearrange(x, f"{self.layout} -> {self.dims} c")
        sizes = dict(zip(self.dims.split(), x.shape[:-1], strict=True))
        qkv = rearrange(self.qkv(self.norm(x)), f"{self.dims} (qkv heads e) -> qkv {self.inside}", qkv=3, heads=HEADS)
        mixed = self.attend(*qkv.unbind(0))
        x = x + self.out(rearrange(mixed, f"{self.inside} -> {self.dims} (heads e)", **sizes))
        return rearrange(x + self.mlp(x), f"{self.dims} c -> {self.layout}")


class Grid(nn.Module):
    """Stages between two linear layers."""

    def __init__(self, dims: str, stages: tuple[Along, ...], layout: str, routed: bool) -> None:
        super().__init__()
        self.dims, self.layout = dims, layout
        self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.mixers = nn.ModuleList(Mix(dims, along, layout, routed) for along in stages)

    def forward(self, cells: Tensor) -> Tensor:
        """[*dims, 3] to [*dims, 2]."""
        x = rearrange(self.embed(cells), f"{self.dims} c -> {self.layout}")
        for mix in self.mixers:
            x = mix(x)
        return self.head(rearrange(x, f"{self.layout} -> {self.dims} c"))


def grid(
    dims: str, sizes: tuple[int, ...], stages: tuple[Along, ...], layout: str, routed: bool
) -> tuple[nn.Module, dict[str, Any]]:
    return Grid(dims, stages, layout, routed), {"cells": torch.randn(*sizes, 3)}


def grid_case(
    dims: str,
    sizes: tuple[int, ...],
    *stages: Along,
    layout: str | None = None,
    routed: bool = False,
    batch_dim: str | None = "b",
    **case: Any,
) -> Case:
    """A grid, and the plan that says of every stage what it computes along."""
    layout = layout or f"{dims} c"
    plan = Plan(
        tokens=f"{dims} c",
        stages=tuple(
            Stage(
                f"mixers.{index}",
                along,
                layout=layout,
                attention="attend" if routed else None,
                heads=HEADS if routed else None,
            )
            for index, along in enumerate(stages)
        ),
        batch_dim=batch_dim,
    )
    settings = {"dims": dims, "sizes": sizes, "stages": stages, "layout": layout, "routed": routed}
    return Case(grid, settings, plan=plan, **case)


VIDEO = grid_case("b t h w", (2, 5, 3, 7), ("t",), ("h",), ("w",), ("t",))
VOLUME = grid_case("b d h w", (2, 3, 5, 7), ("w",), ("h",), ("d",), layout="b c d h w")
CASES = {
    "video": VIDEO,
    "video_fp32": replace(VIDEO, dtype=torch.float32),
    "volume_channels_first": VOLUME,
    "volume_channels_among": grid_case("b d h w", (1, 3, 5, 7), ("w",), ("h",), ("d",), layout="w d c b h"),
    "planes": grid_case("b d h w", (2, 5, 3, 7), ("h", "w"), ("d", "w"), ("d", "h")),
    "windows": grid_case("b ny nx wy wx", (2, 3, 2, 5, 3), ("wy", "wx"), ("ny", "nx"), ("wy", "wx")),
    "four_dims": grid_case("b v t h w", (1, 4, 3, 2, 5), ("v",), ("t",), ("h", "w"), ("v", "t", "h")),
    # On four ranks no dim has an entry for each.
    "short": grid_case("b d h w", (2, 2, 3, 2), ("d",), ("h",), ("w",)),
    "single": grid_case("b d h w", (1, 1, 1, 5), ("w",), ("h",), ("d", "h")),
    # Attention over everything leaves the batch, of two on three and four ranks as well.
    "batch": grid_case("b h w", (2, 3, 5), ("h", "w"), ("h",), ("h", "w"), batch_dim=None),
    # Or, with its attention routed, nothing: then Ulysses runs inside.
    "everything": grid_case("b d h w", (2, 3, 2, 5), ("w",), ("d", "h", "w"), ("h", "d"), routed=True),
}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_sharded_grid_has_the_unsharded_output_gradients_and_the_planned_bytes(size):
    for (name, case), result in zip(CASES.items(), assert_parity(size, *CASES.values()), strict=True):
        for (_, sharded, _, inside), along in zip(result.stages, case.settings["stages"], strict=True):
            assert (sharded in along) == (inside == "ulysses"), (name, result.stages)
        assert any(inside == "ulysses" for _, _, _, inside in result.stages) == (name == "everything"), name


@pytest.mark.matrix
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_random_grids(size):
    """Up to five dims of one to six entries, and stages that leave at least one of them alone."""
    draw = random.Random(size)
    cases = []
    for _ in range(30):
        names = draw.sample(["t", "z", "y", "x", "v"], draw.randint(2, 4))
        sizes = tuple(draw.randint(1, 6) for _ in range(len(names) + 1))
        stages = [tuple(draw.sample(names, draw.randint(1, len(names) - 1))) for _ in range(4)]
        layout = ["b", *names, "c"]
        draw.shuffle(layout)
        batch_dim = draw.choice(["b", None])
        case = grid_case(" ".join(["b", *names]), sizes, *stages, layout=" ".join(layout), batch_dim=batch_dim)
        cases.append(case)
    assert_parity(size, *cases, timeout=240)
