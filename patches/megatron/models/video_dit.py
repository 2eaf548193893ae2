"""`dsp_plugin.models.video_dit.VideoDiT` on Megatron-core: DSP beside tensor, pipeline and data parallelism.

Megatron's ``context_parallel_size`` is the DSP size. Every block runs with the dim sharded that it does not compute
along, as the planner chooses for the whole pipeline; a pipeline border carries tokens with the dim sharded of the block
before it. Embedders live in the first stage alone, and the condition travels with the tokens, as further rows of what
Megatron sends: its gradient comes back the same way, so no gradient has to be added up between stages.

Parameters have the names that they have in `VideoDiT`, in every stage; `video_dit_weights` loads its weights.

Shape suffixes are those of `dsp_plugin.models.video_dit`, with tokens before the batch: N is this rank's tokens, M
condition tokens, K the pixels of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from dsp_plugin.comm import meter
from dsp_plugin.models.video_dit import ConditionEmbedding, TimeEmbedding, space_angles, time_angles, wave
from dsp_plugin.patches.megatron.models.grid_tokens import local_tokens, on_device, sharded_dims
from dsp_plugin.patches.megatron.models.token_layers import Place, mark_partial
from dsp_plugin.patches.megatron.models.token_stage import TokenStage, check_no_dropout, check_switching, context_state
from dsp_plugin.patches.megatron.models.video_dit_layers import FinalLayer, space_time_layer

# What a block computes along.
_ALONG = {"space": "s", "time": "t"}


@dataclass(frozen=True)
class VideoShape:
    """What a batch looks like; every batch of a run has this shape.

    Attributes:
        frames: T.
        height, width: of a frame, in pixels.
        caption: condition tokens of a video: 1 for a class label, else token ids or features.
        channels: image channels I.
        patch: side of the square patch, in pixels.

    Raises:
        ValueError: frames do not divide into patches.
    """

    frames: int
    height: int
    width: int
    caption: int = 1
    channels: int = 1
    patch: int = 4

    def __post_init__(self) -> None:
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(
                f"frames of {self.height} x {self.width} pixels do not divide into patches of side {self.patch}"
            )

    @property
    def rows(self) -> int:
        """Rows of patches in a frame."""
        return self.height // self.patch

    @property
    def columns(self) -> int:
        """Columns of patches in a frame."""
        return self.width // self.patch

    @property
    def patches(self) -> int:
        """S."""
        return self.rows * self.columns

    @property
    def pixels(self) -> int:
        """K: pixels of a patch, over all channels."""
        return self.channels * self.patch * self.patch

    def patchify(self, video_BTIYX: Tensor) -> Tensor:
        """Returns [B, T, S, K].

        Raises:
            ValueError: the video has another shape.
        """
        whole = (self.frames, self.channels, self.height, self.width)
        if tuple(video_BTIYX.shape[1:]) != whole:
            raise ValueError(f"a video {tuple(video_BTIYX.shape[1:])} where the model was built for {whole}")
        side = self.patch
        return rearrange(video_BTIYX, "b t i (r y) (k x) -> b t (r k) (i y x)", y=side, x=side)


class ParallelVideoDiT(TokenStage):
    """One pipeline stage, or virtual stage, of a `VideoDiT`.

    Takes the whole batch on every rank and cuts out this rank's tokens. ``num_layers`` of the configuration is the
    depth, in space-time layers.

    Args:
        config: Megatron's `TransformerConfig`.
        shape: of the batches.
        vocabulary, text_width, positions: as in `VideoDiT`.
        pre_process, post_process: whether this is the first stage, the last stage.
        vp_stage: the virtual stage, of a pipeline that has some.

    Raises:
        SequenceParallelConfigError: context parallelism without ``--sp-method dsp``, or sizes that do not fit the
            ranks.
        UnsupportedError: a setting that the model would silently ignore.
    """

    def __init__(
        self,
        config: Any,
        shape: VideoShape,
        *,
        vocabulary: int = 10,
        text_width: int | None = None,
        positions: Literal["rotary", "sinusoidal"] = "rotary",
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        check(config)
        tokens = local_tokens(config, {"t": shape.frames, "s": shape.patches}, {"t": "frames", "s": "patches"})
        dims = sharded_dims(
            tokens.sizes,
            list(_ALONG.values()) * config.num_layers,
            features=config.hidden_size,
            element_size=config.params_dtype.itemsize,
            size=tokens.groups.dsp.size,
        )
        super().__init__(
            config,
            tokens,
            dims,
            # The condition, its own first token, and the vector for norms.
            rows=shape.caption + 2,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.shape, self.positions = shape, positions

        width = config.hidden_size
        self.turned = width // config.num_attention_heads if positions == "rotary" else width
        if self.turned % 4:
            raise ValueError(f"positions={positions!r} needs a multiple of 4 features, not {self.turned}")
        if pre_process:
            self.patch_embed = mark_partial(config, nn.Linear(shape.pixels, width))
            self.time_embed = TimeEmbedding(width)
            self.condition_embed = ConditionEmbedding(width, vocabulary, text_width)
        # Keyed by the layer's place in the whole model: parameters have one name at any pipeline size.
        self.blocks = nn.ModuleDict({layer: space_time_layer(config) for layer in self.dims})
        if post_process:
            self.final = FinalLayer(config, shape.pixels)

    def forward(self, video_BTIYX: Tensor, t_B: Tensor, labels: Tensor) -> Tensor:
        """One stage of the velocity at a noisy video.

        Args:
            video_BTIYX: the whole noisy video, the same on all ranks that share it; read by the first stage.
            t_B: its time, 0 for noise and 1 for data.
            labels: class ids [B], token ids [B, n] (int64) or text features [B, n, text_width].

        Returns:
            From the last stage the velocity ``[N, B, K]`` of this rank's tokens, which `local_target` cuts out of a
            video; else what the next stage takes, ``[N + M + 1, B, C]`` and padding.

        Raises:
            ValueError: the batch has another shape than the model was built for.
        """
        caption = 1 if labels.dim() == 1 else labels.shape[1]
        if caption != self.shape.caption:
            raise ValueError(f"captions of {caption} where the model was built for {self.shape.caption}")
        dtype = self.config.params_dtype
        device = video_BTIYX.device
        tables = self._tables(device, dtype)
        if self.pre_process:
            if torch.is_grad_enabled():
                meter.count(tokens=self.shape.frames * self.shape.patches * len(video_BTIYX))
            x_NBC, text_MBC, cond_1BC = self._embedded(video_BTIYX, t_B, labels, tables)
        else:
            rows = [self.tokens.count(self.arrives), self.shape.caption + 1, 1]
            x_NBC, text_MBC, cond_1BC = self.received(sum(rows)).split(rows)
        arrives = self.arrives
        for layer, block in self.blocks.items():
            places = [
                self._place(dim, along, tables) for dim, along in zip(self.dims[layer], _ALONG.values(), strict=True)
            ]
            x_NBC = block(x_NBC, arrives, places, cond_1BC, text_MBC)
            arrives = places[-1].sharded
        if self.post_process:
            y: Tensor = self.final(x_NBC, cond_1BC)
            return y
        return self.handed_on(torch.cat([x_NBC, text_MBC, cond_1BC]))

    def local_target(self, video_BTIYX: Tensor) -> Tensor:
        """The tokens ``[N, B, K]`` of a whole video for which the last stage answers on this rank."""
        return self.tokens.cut(self.shape.patchify(video_BTIYX), self.leaves)

    def _tables(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The positions along each dim, of the whole video."""
        count = self.turned // 2
        return {
            "s": wave(space_angles(self.shape.rows, self.shape.columns, count, device)).to(dtype),
            "t": wave(time_angles(self.shape.frames, count, device)).to(dtype),
        }

    def _place(self, sharded: str, along: str, tables: dict[str, Tensor]) -> Place:
        rope = None
        if self.positions == "rotary":
            order = on_device(self.tokens.gathered(along, sharded), tables[along].device)
            rope = tables[along][order]
        return Place(self.tokens, sharded, along, rope)

    def _embedded(
        self, video_BTIYX: Tensor, t_B: Tensor, labels: Tensor, tables: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.config.params_dtype
        x_NBC = self.patch_embed(self.tokens.cut(self.shape.patchify(video_BTIYX), self.arrives).to(dtype))
        text_BMC = self.condition_embed(labels if labels.dtype == torch.int64 else labels.to(dtype))
        cond_BC = self.time_embed(t_B, dtype) + text_BMC.mean(dim=1)
        if self.positions == "sinusoidal":
            position_BTSC = (tables["s"] + tables["t"][:, None])[None]
            x_NBC = x_NBC + self.tokens.cut(position_BTSC, self.arrives)
        return x_NBC, rearrange(text_BMC, "b m c -> m b c"), cond_BC[None]


def check(config: Any) -> None:
    """Refuses what the model could not compute or would ignore; the same on every rank, before anything is sent.

    Raises:
        SequenceParallelConfigError: context parallelism without ``--sp-method dsp``.
        UnsupportedError: dropout, or recomputation that keeps attention.
    """
    check_no_dropout(config, "VideoDiT")
    way = "context-parallel ranks share a video by switching its sharded dim"
    check_switching(context_state(config, ("dsp",), way))
