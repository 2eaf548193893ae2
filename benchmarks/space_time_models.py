"""The contenders of `benchmarks.space_time`: one video transformer, the same weights, on the ranks of one world."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups, parallelize
from dsp_plugin.models import video_dit_plan
from dsp_plugin.models.rectified_flow import RectifiedFlowObjective
from dsp_plugin.models.video_dit import VideoDiT
from dsp_plugin.patches import cpu
from dsp_plugin.patches.megatron.models import video_dit_weights
from dsp_plugin.patches.megatron.models.video_dit import ParallelVideoDiT, VideoShape
from dsp_plugin.plans.plan import Plan

PATCH, VOCABULARY, SEED = 4, 10, 7
KEPT = {"ulysses": "t", "ring": "s"}
"""The dim that stays sharded, by method: bytes are the same for both dims, and ring took less CPU with this one."""


@dataclass(frozen=True)
class Sizes:
    """Of the model and its batch.

    Attributes:
        frames: T.
        side: of a frame, in pixels.
        width: C.
        heads: of every attention.
        depth: space-time layers, of two blocks each.
        caption: condition tokens of a video.
        batch: videos.
    """

    frames: int
    side: int
    width: int
    heads: int
    depth: int
    caption: int = 8
    batch: int = 1

    @property
    def pixels(self) -> int:
        """In a patch of one channel."""
        return PATCH**2

    @property
    def patches(self) -> int:
        """S."""
        return (self.side // PATCH) ** 2

    def videos(self) -> dict[str, Tensor]:
        """The arguments of `RectifiedFlowObjective`, the same on every rank."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.batch, self.frames, 1, self.side, self.side)
        return {
            "video": torch.randn(shape, generator=generator),
            "labels": torch.randint(VOCABULARY, (self.batch, self.caption), generator=generator),
            "t": torch.rand(self.batch, generator=generator),
            "noise": torch.randn(shape, generator=generator),
        }


class Contender(Protocol):
    """A way to train the model on the ranks of the world."""

    def step(self) -> None:
        """Forward and backward."""

    def reduce(self) -> None:
        """Make the gradients of the last step exact, where ranks have parts of them."""

    def loss(self) -> float:
        """Of the last step, over all tokens; a collective of all ranks."""

    def gradients(self) -> dict[str, Tensor]:
        """Whole, by the names of `VideoDiT`; a collective of all ranks."""


class Planned:
    """`VideoDiT` on plain torch: sharded by its plan, or whole.

    Args:
        method: None for the whole model.
    """

    def __init__(self, sizes: Sizes, method: str | None) -> None:
        self._model = _plain(sizes)
        self._objective = RectifiedFlowObjective(self._model)
        self._batch = sizes.videos()
        self._loss = torch.tensor(torch.nan)
        self._ranks = 1
        if method is not None:
            config = SequenceParallelConfig(method=method, size=dist.get_world_size())
            self._ranks = config.size
            groups = SequenceParallelGroups.build(config)
            parallelize(self._objective, _plan(self._objective, KEPT.get(method)), config=config, groups=groups)

    def step(self) -> None:
        """See `Contender`."""
        self._objective.zero_grad()
        self._loss = self._objective(**self._batch)
        self._loss.backward()

    def reduce(self) -> None:
        """The mean over ranks, in one all-reduce."""
        if self._ranks == 1:
            return
        grads = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        flat = torch.cat([grad.view(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= self._ranks
        for grad, reduced in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(reduced.view_as(grad))

    def loss(self) -> float:
        """See `Contender`."""
        return self._loss.item()

    def gradients(self) -> dict[str, Tensor]:
        """See `Contender`."""
        return {
            name: parameter.grad for name, parameter in self._model.named_parameters() if parameter.grad is not None
        }


class TensorParallel:
    """`ParallelVideoDiT` on Megatron-core: the width over all ranks, with ``--sequence-parallel``."""

    def __init__(self, sizes: Sizes) -> None:
        cpu.install()
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.transformer import TransformerConfig

        ranks = dist.get_world_size()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
        tensor_parallel.model_parallel_cuda_manual_seed(SEED)
        _scatter_without_gathering()
        config = TransformerConfig(
            num_layers=sizes.depth,
            hidden_size=sizes.width,
            num_attention_heads=sizes.heads,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=ranks,
            sequence_parallel=True,
            gradient_accumulation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
        )
        shape = VideoShape(sizes.frames, sizes.side, sizes.side, caption=sizes.caption, patch=PATCH)
        self._model = ParallelVideoDiT(config, shape, vocabulary=VOCABULARY)
        video_dit_weights.load(self._model, dict(_plain(sizes).named_parameters()))
        # Megatron's own reductions of gradients ask for it.
        self._chunk = DistributedDataParallel(
            config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), self._model
        )
        self._batch = sizes.videos()
        self._loss = torch.tensor(torch.nan)

    def step(self) -> None:
        """See `Contender`."""
        video, noise, t = self._batch["video"], self._batch["noise"], self._batch["t"]
        self._chunk.zero_grad_buffer()
        share = t.view(-1, 1, 1, 1, 1)
        velocity = self._chunk(share * video + (1 - share) * noise, t, self._batch["labels"])
        target = self._model.local_target(video - noise)
        self._loss = (velocity - target).square().sum() / video.numel()
        self._loss.backward()

    def reduce(self) -> None:
        """Adds up what ranks know of parameters that all of them hold."""
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads([self._chunk])

    def loss(self) -> float:
        """See `Contender`."""
        total = self._loss.detach().clone()
        dist.all_reduce(total)
        return total.item()

    def gradients(self) -> dict[str, Tensor]:
        """See `Contender`."""
        mine: dict[str, Any] = {name: parameter.main_grad for name, parameter in self._model.named_parameters()}
        return video_dit_weights.whole(self._model, mine)


def _plan(module: nn.Module, kept: str | None) -> Plan:
    """The plan of a `VideoDiT`; with ``kept``, only blocks that compute along that dim can run with theirs sharded."""
    plan = video_dit_plan.plan(module)
    if kept is None:
        return plan
    stages = [
        stage if kept in stage.computes_along else replace(stage, attention=None, heads=None) for stage in plan.stages
    ]
    return replace(plan, stages=tuple(stages))


def _plain(sizes: Sizes) -> nn.Module:
    model = VideoDiT(patch=PATCH, width=sizes.width, heads=sizes.heads, depth=sizes.depth, vocabulary=VOCABULARY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(video_dit_weights.draw(name, parameter.shape, SEED))
    return model


class _Scattering:
    """A reduce-scatter under way."""

    def __init__(self, output: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
        self._output, self._whole = output, whole
        self._parts = torch.empty_like(whole)
        self._work = dist.all_to_all_single(self._parts, whole, group=group, async_op=True)

    def wait(self) -> None:
        """Until ``output`` has the sum."""
        self._work.wait()
        torch.sum(self._parts.view(-1, *self._output.shape), 0, out=self._output)


def _reduce_scatter(
    output: Tensor, whole: Tensor, *, group: dist.ProcessGroup, async_op: bool = False
) -> _Scattering | None:
    scattering = _Scattering(output, whole.contiguous(), group)
    if async_op:
        return scattering
    scattering.wait()
    return None


def _scatter_without_gathering() -> None:
    """gloo's reduce-scatter is an all-reduce that throws most away: it sends twice what Megatron's TP-SP has to."""
    from megatron.core.tensor_parallel import layers, mappings

    layers.dist_reduce_scatter_func = mappings.dist_reduce_scatter_func = _reduce_scatter
