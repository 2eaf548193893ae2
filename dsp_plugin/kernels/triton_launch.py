"""How the Triton kernels of attention are launched: sizes of tiles, and the arguments that all of them take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.kernels.kernel import BlockSpec
from dsp_plugin.kernels.triton_usable import width


@dataclass(frozen=True)
class Sizes:
    """Of one launch.

    Attributes:
        rows, cols: queries and keys of a tile.
        warps: of a program.
        stages: how many tiles are on their way from memory.
    """

    rows: int
    cols: int
    warps: int
    stages: int


# By the widest head dim, rounded up, and bytes of an entry. They fit into 99 KiB of shared memory, which the smallest
# GPUs of compute capability 8.0 and up have (8.6, 8.9 and 12.0).
Table = dict[tuple[int, int], Sizes]
FORWARD: Table = {
    (64, 2): Sizes(128, 64, 4, 3),
    (128, 2): Sizes(128, 64, 8, 2),
    (256, 2): Sizes(64, 32, 4, 2),
    (64, 4): Sizes(64, 32, 4, 2),
    (128, 4): Sizes(32, 32, 4, 2),
    (256, 4): Sizes(16, 16, 4, 2),
}
OF_QUERIES: Table = {
    (64, 2): Sizes(64, 64, 4, 2),
    (128, 2): Sizes(64, 64, 8, 1),
    (256, 2): Sizes(32, 32, 4, 1),
    (64, 4): Sizes(32, 32, 4, 1),
    (128, 4): Sizes(32, 16, 4, 1),
    (256, 4): Sizes(16, 16, 4, 1),
}
OF_KEYS: Table = OF_QUERIES


_NOTHING = Dropout(0.0, 0, range(0), range(0))


def sizes(table: Table, q: Tensor, v: Tensor) -> Sizes:
    """Of a launch for q ``[..., D]`` and v ``[..., Dv]``."""
    return table[max(64, width(q.shape[-1]), width(v.shape[-1])), q.element_size()]


def arguments(q: Tensor, k: Tensor, v: Tensor, block: BlockSpec, tile: Sizes) -> dict[str, Any]:
    """What kernels take by name, over a block of q ``[B, n, H, D]``, k ``[B, m, K, D]`` and v ``[B, m, K, Dv]``."""
    left, right = block.band
    drop = block.dropout or _NOTHING
    dropping = {
        **{"seed": drop.bits, "threshold": drop.threshold, "keep_scale": drop.scale, "DROPOUT": drop is not _NOTHING},
        **{"q_start": drop.q_positions.start, "q_step": drop.q_positions.step},
        **{"k_start": drop.k_positions.start, "k_step": drop.k_positions.step},
        **{"first_head": drop.head_offset, "first_row": drop.batch_offset},
    }
    return {
        **{"rows": q.shape[1], "cols": k.shape[1], "group": q.shape[2] // k.shape[2], "scale": block.scale},
        **{"left": left or 0, "right": right or 0, "LEFT": left is not None, "RIGHT": right is not None},
        **{"D": q.shape[-1], "DV": v.shape[-1], "WIDE": width(q.shape[-1]), "WIDE_V": width(v.shape[-1])},
        **{"M": tile.rows, "N": tile.cols, "num_warps": tile.warps, "num_stages": tile.stages},
        **dropping,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
