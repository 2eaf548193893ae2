"""Which tokens of a video each rank of a model holds, under DSP and Megatron's ``--sequence-parallel``.

Context-parallel ranks share one dim, frames or patches, and switch it. With ``--sequence-parallel`` the tensor-parallel
ranks that hold the same tokens share them between layers, always by frames: context-parallel rank i has a run of
frames, and its tensor-parallel rank j the j-th part of it. After a switch to patches, tensor-parallel rank j has its
parts of all runs, so a switch goes between the same ranks as without, and each moves its own part only. What Megatron
gathers in a layer is then every frame, in the order `Tokens.gathered_frames`; attention does not mind the order, as
long as rotary tables follow it.

Shape suffixes are those of `dsp_plugin.models.video_dit`: T frames, S patches, B batch, C features; N is this rank's
tokens, frame by frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import shard_ranges
from dsp_plugin.methods import dsp
from dsp_plugin.planner.stages import Activation, StageSpec, plan_stages

Dim = Literal["t", "s"]


def sharded_dims(
    frames: int, patches: int, *, layers: int, features: int, element_size: int, size: int
) -> tuple[Dim, ...]:
    """The dim to shard in every block of a model of space-time layers, as the planner chooses it.

    Args:
        frames, patches: of the whole video.
        layers: space-time layers of the whole model, all pipeline stages.
        features: elements of a token.
        element_size: bytes of one.
        size: context-parallel ranks.

    Returns:
        For every layer two dims: of its space block and of its time block.
    """
    stages = [StageSpec("space", ("s",)), StageSpec("time", ("t",))] * layers
    activation = Activation({"t": frames, "s": patches, "b": 1}, features, element_size)
    plan = plan_stages(activation, stages, size, gather=False)
    return tuple(cast(Dim, row.sharded) for row in plan.rows)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a video of ``frames`` times ``patches``, on one rank.

    Attributes:
        frames, patches: T and S of the whole video.
        groups: the dsp axis is used.
        parts: tensor-parallel ranks that share the tokens between layers; 1 without ``--sequence-parallel``.
        part: which of them this rank is.

    Raises:
        SequenceParallelConfigError: frames do not divide by the parts, or a rank would have no token.
    """

    frames: int
    patches: int
    groups: SequenceParallelGroups
    parts: int = 1
    part: int = 0

    def __post_init__(self) -> None:
        if self.frames % self.parts:
            raise SequenceParallelConfigError(
                setting="frames",
                value=self.frames,
                why=f"with --sequence-parallel {self.parts} tensor-parallel ranks hold equal parts of the frames, and "
                f"{self.frames} / {self.parts} leaves {self.frames % self.parts}",
                remedy=f"train on a multiple of {self.parts} frames, or without --sequence-parallel",
            )
        size = self.groups.dsp.size
        for setting, length, why in (
            ("frames", self.frames // self.parts, f" over {self.parts} tensor-parallel ranks" * (self.parts > 1)),
            ("patches", self.patches, ""),
        ):
            if length < size:
                raise SequenceParallelConfigError(
                    setting=setting,
                    value=getattr(self, setting),
                    why=f"there are {length} {setting}{why} for {size} context-parallel ranks, and one would have none",
                    remedy=f"lower --context-parallel-size to {length} or less",
                )

    @cached_property
    def _own_runs(self) -> list[range]:
        """Of each context-parallel rank, the frames of this part."""
        runs = shard_ranges(self.frames // self.parts, self.groups.dsp.size)
        return [
            range(run.start * self.parts + len(run) * self.part, run.start * self.parts + len(run) * (self.part + 1))
            for run in runs
        ]

    def own_frames(self, sharded: Dim) -> list[int]:
        """The frames of this rank's tokens, in their order."""
        return list(self._own_runs[self.groups.dsp.rank] if sharded == "t" else chain(*self._own_runs))

    def gathered_frames(self, sharded: Dim) -> list[int]:
        """The frames of the tokens of all parts, in the order in which Megatron gathers them."""
        others = (Tokens(self.frames, self.patches, self.groups, self.parts, part) for part in range(self.parts))
        return list(chain.from_iterable(tokens.own_frames(sharded) for tokens in others))

    def own_patches(self, sharded: Dim) -> range:
        """The patches of this rank's tokens."""
        if sharded == "t":
            return range(self.patches)
        return shard_ranges(self.patches, self.groups.dsp.size)[self.groups.dsp.rank]

    def count(self, sharded: Dim) -> int:
        """N: this rank's tokens."""
        return len(self.own_frames(sharded)) * len(self.own_patches(sharded))

    def cut(self, whole_BTSC: Tensor, sharded: Dim) -> Tensor:
        """This rank's tokens ``[N, B, C]`` of a whole video, which needs no gradient."""
        frames = torch.tensor(self.own_frames(sharded), device=whole_BTSC.device)
        patches = self.own_patches(sharded)
        local = whole_BTSC.index_select(1, frames)[:, :, patches.start : patches.stop]
        return rearrange(local, "b t s c -> (t s) b c")

    def switch(self, x_NBC: Tensor, source: Dim, target: Dim) -> Tensor:
        """The tokens of this rank after the sharded dim has moved; a collective of the context-parallel ranks."""
        if source == target or self.groups.dsp.size == 1:
            return x_NBC
        x_TSBC = rearrange(x_NBC, "(t s) b c -> t s b c", s=len(self.own_patches(source)))
        dims = {"t": 0, "s": 1}
        length = self.frames // self.parts if source == "t" else self.patches
        moved = dsp.switch(x_TSBC, dims[source], dims[target], length=length, groups=self.groups)
        return rearrange(moved, "t s b c -> (t s) b c")
