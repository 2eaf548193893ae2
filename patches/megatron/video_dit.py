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
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.models.video_dit import ConditionEmbedding, TimeEmbedding, space_angles, time_angles, wave
from dsp_plugin.patches.megatron.attention import check_groups
from dsp_plugin.patches.megatron.parallel_state import registered_state
from dsp_plugin.patches.megatron.video_dit_layers import FinalLayer, Place, SpaceTimeLayer, mark_partial
from dsp_plugin.patches.megatron.video_tokens import Dim, Tokens, sharded_dims


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


class ParallelVideoDiT(nn.Module):
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
        from megatron.core import parallel_state
        from megatron.core.enums import ModelType
        from megatron.core.transformer.transformer_block import get_num_layers_to_build
        from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

        super().__init__()
        check(config)
        self.config, self.shape, self.positions = config, shape, positions
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        # What Megatron's schedules and its `finalize_model_grads` ask of a model.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.input_tensor: Tensor | None = None

        self.tokens = local_tokens(config, shape)
        dims = _dims(config, shape, self.tokens)
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
        # What arrives is sharded as the block before leaves it; the embedded video as the first block wants it.
        self.arrives, self.leaves = dims[max(2 * first - 1, 0)], dims[-1]
        self.dims = {str(layer): dims[2 * layer : 2 * layer + 2] for layer in layers}

        width = config.hidden_size
        self.turned = width // config.num_attention_heads if positions == "rotary" else width
        if self.turned % 4:
            raise ValueError(f"positions={positions!r} needs a multiple of 4 features, not {self.turned}")
        if pre_process:
            self.patch_embed = mark_partial(config, nn.Linear(shape.pixels, width))
            self.time_embed = TimeEmbedding(width)
            self.condition_embed = ConditionEmbedding(width, vocabulary, text_width)
        # Keyed by the layer's place in the whole model: parameters have one name at any pipeline size.
        self.blocks = nn.ModuleDict({layer: SpaceTimeLayer(config) for layer in self.dims})
        if post_process:
            self.final = FinalLayer(config, shape.pixels)
        self.tp_group = parallel_state.get_tensor_model_parallel_group()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Takes what the stage before sent, from Megatron's schedule."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, video_BTIYX: Tensor, t_B: Tensor, labels: Tensor) -> Tensor:
        """One stage of the velocity at a noisy video.

        Args:
            video_BTIYX: the whole noisy video, the same on all ranks that share it; read by the first stage.
            t_B: its time, 0 for noise and 1 for data.
            labels: class ids [B], token ids [B, n] (int64) or text features [B, n, text_width].

        Returns:
            From the last stage the velocity ``[N, B, K]`` of this rank's tokens, which `local_target` cuts out of a
            video; else what the next stage takes, ``[N + M + 1, B, C]``.

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
            assert self.input_tensor is not None, "the schedule hands every later stage an input"
            rows = [self.tokens.count(self.arrives), self.shape.caption + 1, 1]
            x_NBC, text_MBC, cond_1BC = self.input_tensor.split(rows)
        arrives = self.arrives
        for layer, block in self.blocks.items():
            space, time = (self._place(dim, tables) for dim in self.dims[layer])
            x_NBC = block(x_NBC, cond_1BC, text_MBC, arrives, space, time)
            arrives = time.sharded
        if self.post_process:
            y: Tensor = self.final(x_NBC, cond_1BC)
            return y
        return torch.cat([x_NBC, text_MBC, cond_1BC])

    def local_target(self, video_BTIYX: Tensor) -> Tensor:
        """The tokens ``[N, B, K]`` of a whole video for which the last stage answers on this rank."""
        return self.tokens.cut(self.shape.patchify(video_BTIYX), self.leaves)

    def _tables(self, device: torch.device, dtype: torch.dtype) -> dict[Dim, Tensor]:
        """The positions along each dim, of the whole video."""
        count = self.turned // 2
        return {
            "s": wave(space_angles(self.shape.rows, self.shape.columns, count, device)).to(dtype),
            "t": wave(time_angles(self.shape.frames, count, device)).to(dtype),
        }

    def _place(self, sharded: Dim, tables: dict[Dim, Tensor]) -> Place:
        if self.positions == "sinusoidal":
            return Place(self.tokens, sharded, None)
        if sharded == "t":
            return Place(self.tokens, sharded, tables["s"])
        order = torch.tensor(self.tokens.gathered_frames(sharded), device=tables["t"].device)
        return Place(self.tokens, sharded, tables["t"][order])

    def _embedded(
        self, video_BTIYX: Tensor, t_B: Tensor, labels: Tensor, tables: dict[Dim, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.config.params_dtype
        x_NBC = self.patch_embed(self.tokens.cut(self.shape.patchify(video_BTIYX), self.arrives).to(dtype))
        text_BMC = self.condition_embed(labels if labels.dtype == torch.int64 else labels.to(dtype))
        cond_BC = self.time_embed(t_B, dtype) + text_BMC.mean(dim=1)
        if self.positions == "sinusoidal":
            position_BTSC = (tables["s"] + tables["t"][:, None])[None]
            x_NBC = x_NBC + self.tokens.cut(position_BTSC, self.arrives)
        return x_NBC, rearrange(text_BMC, "b m c -> m b c"), cond_BC[None]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints: loads at other tensor, context, pipeline and data parallel sizes."""
        from megatron.core.transformer.utils import (
            ensure_metadata_has_dp_cp_group,
            make_sharded_tensors_for_checkpoint,
        )

        metadata = ensure_metadata_has_dp_cp_group(metadata)
        parameters: dict[str, Any] = dict(self.named_parameters())
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            parameters,
            prefix,
            {
                name: parameter.partition_dim
                for name, parameter in parameters.items()
                if getattr(parameter, "tensor_model_parallel", False)
            },
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return found


def check(config: Any) -> None:
    """Refuses what the model could not compute or would ignore; the same on every rank, before anything is sent.

    Raises:
        SequenceParallelConfigError: context parallelism without ``--sp-method dsp``.
        UnsupportedError: dropout, or recomputation that keeps attention.
    """
    for setting in ("hidden_dropout", "attention_dropout"):
        if getattr(config, setting) != 0.0:
            raise UnsupportedError(
                setting=setting,
                value=getattr(config, setting),
                why="VideoDiT has no dropout, so it would be ignored",
                remedy="set it to 0",
            )
    if config.context_parallel_size == 1:
        return
    state = registered_state()
    if state is None or state.settings.method != "dsp":
        given = "the plugin is not installed" if state is None else f"--sp-method is {state.settings.method}"
        raise SequenceParallelConfigError(
            setting="context_parallel_size",
            value=config.context_parallel_size,
            why=f"context-parallel ranks share a video by switching its sharded dim, and {given}",
            remedy="start the script with `python -m dsp_plugin.launch` and --sp-method dsp",
        )
    if state.settings.recompute != "full":
        raise UnsupportedError(
            setting="--sp-recompute",
            value=state.settings.recompute,
            why="dsp does not look inside attention, so it has none to keep",
            remedy="drop it; --recompute-granularity full and selective are exact without",
        )
    check_groups(state, config, None)


def local_tokens(config: Any, shape: VideoShape) -> Tokens:
    """This rank's place in a video.

    Raises:
        SequenceParallelConfigError: the sizes of the video do not fit the ranks.
    """
    from megatron.core import parallel_state

    state = registered_state()
    alone = config.context_parallel_size == 1 or state is None or state.groups is None
    groups = SequenceParallelGroups.single() if alone else state.groups
    assert groups is not None
    parts, part = 1, 0
    if config.sequence_parallel:
        parts = parallel_state.get_tensor_model_parallel_world_size()
        part = parallel_state.get_tensor_model_parallel_rank()
    return Tokens(shape.frames, shape.patches, groups, parts, part)


def _dims(config: Any, shape: VideoShape, tokens: Tokens) -> tuple[Dim, ...]:
    return sharded_dims(
        shape.frames,
        shape.patches,
        layers=config.num_layers,
        features=config.hidden_size,
        element_size=config.params_dtype.itemsize,
        size=tokens.groups.dsp.size,
    )


def pipeline_seq_length(config: Any, shape: VideoShape) -> int:
    """The ``seq_length`` for Megatron's pipeline schedules, of which they make the shape that crosses a stage's border.

    They divide it by the context-parallel size, and under ``sequence_parallel`` by the tensor-parallel size; the
    quotient is the rows that this rank's stages hand on. It is another one on ranks with fewer tokens, and the same
    along the pipeline.
    """
    tokens = local_tokens(config, shape)
    # Every border lies behind a layer, and every layer leaves the same dim sharded.
    leaves = set(_dims(config, shape, tokens)[1::2])
    assert len(leaves) == 1, leaves
    rows = tokens.count(leaves.pop()) + shape.caption + 2
    return rows * config.context_parallel_size * tokens.parts
