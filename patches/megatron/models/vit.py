"""`dsp_plugin.models.vit.VisionTransformer` on Megatron-core: sequence, tensor, pipeline and data parallelism.

Megatron's ``context_parallel_size`` is the sequence-parallel size. Under axial attention it is DSP's: every block runs
with a dim of the grid sharded that it does not attend along, as the planner chooses for the whole pipeline, and a
pipeline border carries tokens with the dim sharded of the block before it. Under full attention tokens are one sharded
sequence, those in front included, and an attention method serves the blocks. Embedding and readout take a token at a
time; nothing but tokens crosses a border.

Parameters have the names that they have in `VisionTransformer`, in every stage.

Shape suffixes are those of `dsp_plugin.models.vit`, with tokens before the batch: N is this rank's tokens, G the dims
that tokens have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsp_plugin.comm import meter
from dsp_plugin.config.attention import attention_of
from dsp_plugin.errors import UnsupportedError
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import Where
from dsp_plugin.models.video_dit import wave
from dsp_plugin.models.vit import VisionTransformer, angles, places
from dsp_plugin.patches.megatron.models.grid_tokens import Tokens, local_tokens, on_device, sharded_dims
from dsp_plugin.patches.megatron.models.token_layers import Place, mark_partial
from dsp_plugin.patches.megatron.models.token_stage import TokenStage, check_no_dropout, check_switching, context_state
from dsp_plugin.patches.megatron.models.vit_layers import layer, parallel_embedding
from dsp_plugin.patches.megatron.state import MegatronState

_INSIDE = ("i", "j", "k")
# By which methods a sequence can be shared that is not causal.
SEQUENCE_METHODS = ("ulysses", "usp", "ring")
_NAMES = {"l": "tokens", "z": "patches along z", "y": "patches along y", "x": "patches along x"}


@dataclass(frozen=True)
class VitShape:
    """The model but for its width, heads and depth, and the grid of its fields; every batch of a run has this grid.

    Attributes:
        known, patch, attention, rotary, registers, classes, lead_time: as in `VisionTransformer`.
        sides: of the grid in pixels, (Y, X) or (Z, Y, X).
    """

    known: int
    sides: tuple[int, ...]
    patch: tuple[int, ...] = (2, 2)
    attention: Literal["full", "axial"] = "full"
    rotary: bool = True
    registers: int = 0
    classes: int = 0
    lead_time: bool = False

    def __post_init__(self) -> None:
        if len(self.sides) != len(self.patch) or any(
            side % cell for side, cell in zip(self.sides, self.patch, strict=True)
        ):
            raise ValueError(f"a grid of {self.sides} pixels does not divide into patches of {self.patch}")

    @property
    def front(self) -> int:
        """Tokens in front of the patches."""
        return self.registers + (1 if self.classes else 0)

    @property
    def grid(self) -> dict[str, int]:
        """Patches along each dim of the grid."""
        dims = ("z", "y", "x")[-len(self.patch) :]
        return {dim: side // cell for dim, side, cell in zip(dims, self.sides, self.patch, strict=True)}

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens along each dim that they have."""
        if self.attention == "axial":
            return self.grid
        return {"l": self.front + prod(self.grid.values())}

    def patchify(self, fields_BVYX: Tensor) -> Tensor:
        """Returns [B, G, V, P], with zeros at the tokens in front.

        Raises:
            ValueError: the fields have another grid.
        """
        if tuple(fields_BVYX.shape[2:]) != self.sides:
            raise ValueError(
                f"fields on {tuple(fields_BVYX.shape[2:])} pixels, and the model is built for {self.sides}"
            )
        cells = dict(zip(_INSIDE, self.patch, strict=False))
        apart = " ".join(f"({dim} {cell})" for dim, cell in zip(self.grid, cells, strict=True))
        pixels = rearrange(fields_BVYX, f"b v {apart} -> b {' '.join(self.grid)} v ({' '.join(cells)})", **cells)
        if self.attention == "axial":
            return pixels
        return F.pad(pixels.flatten(1, -3), (0, 0, 0, 0, self.front, 0))

    def places(self, device: torch.device) -> Tensor:
        """Where tokens lie: int64 [G, dims of the grid]; see `dsp_plugin.models.vit.places`."""
        return places(list(self.grid.values()), self.front, self.attention == "full", device)

    def plain(self, config: Any) -> VisionTransformer:
        """The plain model without its blocks.

        Raises:
            ValueError: sizes do not fit each other.
        """
        return VisionTransformer(
            self.known,
            self.patch,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            depth=0,
            attention=self.attention,
            rotary=self.rotary,
            registers=self.registers,
            classes=self.classes,
            lead_time=self.lead_time,
        )


class ParallelVisionTransformer(TokenStage):
    """One pipeline stage, or virtual stage, of a `VisionTransformer`.

    Takes whole fields on every rank and cuts out this rank's tokens. ``num_layers`` of the configuration is the depth.

    Args:
        config: Megatron's `TransformerConfig`.
        shape: of the model and of its fields.
        pre_process, post_process: whether this is the first stage, the last stage.
        vp_stage: the virtual stage, of a pipeline that has some.

    Raises:
        SequenceParallelConfigError: context parallelism by a method that cannot serve this attention, or sizes that do
            not fit the ranks.
        UnsupportedError: a setting that the model would silently ignore.
        ValueError: see `VisionTransformer`.
    """

    def __init__(
        self,
        config: Any,
        shape: VitShape,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        state = check(config, shape)
        tokens = local_tokens(config, shape.tokens, _NAMES)
        super().__init__(
            config,
            tokens,
            _dims(config, tokens),
            rows=0,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.shape = shape
        self.attend = _attention(state, tokens)
        plain = shape.plain(config).trunk
        parts: dict[str, nn.Module] = {}
        if pre_process:
            parts["embed"] = parallel_embedding(config, plain.embed)
            parts["locate"] = mark_partial(config, plain.locate)
        # Keyed by the layer's place in the whole model: parameters have one name at any pipeline size.
        parts["blocks"] = nn.ModuleDict({place: layer(config, tuple(tokens.sizes)) for place in self.dims})
        if post_process:
            parts["readout"] = mark_partial(config, plain.readout)
        self.trunk = nn.ModuleDict(parts)

    def forward(
        self, fields_BVYX: Tensor, variables_V: Tensor, wanted_W: Tensor, lead_B: Tensor | None = None
    ) -> Tensor:
        """One stage of the predictions.

        Args:
            fields_BVYX: whole fields, the same on all ranks that share them; read by the first stage.
            variables_V: ids of those V variables, int64, in any order; every call may bring others.
            wanted_W: ids of the variables to predict, int64; read by the last stage.
            lead_B: where the model takes a lead time.

        Returns:
            From the last stage ``[N, B, F]`` at this rank's tokens, for `local_loss`; else what the next stage takes,
            ``[N, B, C]`` and padding.

        Raises:
            ValueError: the fields are not what the model was built for.
        """
        if self.pre_process:
            x_NBC = self._embedded(fields_BVYX, variables_V, lead_B)
        else:
            x_NBC = self.received(self.tokens.count(self.arrives))
        arrives, ropes = self.arrives, self._ropes(fields_BVYX.device)
        blocks = self.trunk["blocks"]
        assert isinstance(blocks, nn.ModuleDict)
        for place, block in blocks.items():
            where = [
                Place(self.tokens, sharded, along, self._rope(ropes, along, sharded), self.attend)
                for along, sharded in zip(self.tokens.sizes, self.dims[place], strict=True)
            ]
            x_NBC = block(x_NBC, arrives, where)
            arrives = where[-1].sharded
        if self.post_process:
            y: Tensor = self.trunk["readout"](x_NBC, wanted_W)
            return y
        return self.handed_on(x_NBC)

    def local_loss(
        self, out_NBF: Tensor, target_BWYX: Tensor, weight_Y: Tensor | None = None, label_B: Tensor | None = None
    ) -> Tensor:
        """This rank's part of what `VitObjective` returns; parts of all ranks add up to it.

        Args:
            out_NBF: from the last stage.
            target_BWYX: whole; ``weight_Y`` and ``label_B`` as `dsp_plugin.models.vit_objective` has them.

        Returns:
            A scalar, in fp32 at least.
        """
        wide = torch.promote_types(out_NBF.dtype, torch.float32)
        rows = torch.ones(target_BWYX.shape[-2]) if weight_Y is None else weight_Y
        weight_BWYX = rows.to(target_BWYX.device, wide)[:, None].expand_as(target_BWYX)
        # Zero at the tokens in front, which predict nothing.
        target_NBF, weight_NBF = (
            self.tokens.cut(self.shape.patchify(x), self.leaves).flatten(-2)
            for x in (target_BWYX.to(wide), weight_BWYX)
        )
        pixels = target_NBF.shape[-1]
        error_NBF = out_NBF[..., :pixels].to(wide) - target_NBF
        loss = (error_NBF.square() * weight_NBF).sum() / target_BWYX.numel()
        if label_B is not None and self.tokens.own("l", "l")[0] == 0:
            loss = loss + F.cross_entropy(out_NBF[0, :, pixels:].to(wide), label_B)
        return loss

    def _embedded(self, fields_BVYX: Tensor, variables_V: Tensor, lead_B: Tensor | None) -> Tensor:
        if variables_V.shape != fields_BVYX.shape[1:2]:
            raise ValueError(
                f"{fields_BVYX.shape[1]} fields came with ids {tuple(variables_V.shape)}: give one to each"
            )
        if self.shape.lead_time != (lead_B is not None):
            raise ValueError(f"lead_time={lead_B}, but the model takes {'one' if self.shape.lead_time else 'none'}")
        if torch.is_grad_enabled() and self.shape.attention == "axial":
            meter.count(tokens=prod(self.shape.tokens.values()) * len(fields_BVYX))
        embed = self.trunk["embed"]
        pixels_NBVP = self.tokens.cut(self.shape.patchify(fields_BVYX), self.arrives).to(self.config.params_dtype)
        if self.config.recompute_granularity == "full" and self.training:
            # Megatron's own checkpoint gives no gradient to weights where no input needs one.
            x_NBC: Tensor = checkpoint(embed, pixels_NBVP, variables_V, use_reentrant=False)
        else:
            x_NBC = embed(pixels_NBVP, variables_V)
        place_NG = self.tokens.cut(self.shape.places(x_NBC.device)[None], self.arrives)[:, 0]
        return self.trunk["locate"](x_NBC.transpose(0, 1), place_NG, lead_B).transpose(0, 1)

    def _ropes(self, device: torch.device) -> dict[str, Tensor]:
        """Rotary tables of the whole grid, by the dim attended along, if any; tokens in front are not turned."""
        if not self.shape.rotary:
            return {}
        count = self.config.hidden_size // self.config.num_attention_heads // 2
        if self.shape.attention == "full":
            lines = {"l": self.shape.places(device).clamp(min=0)}
        else:
            lines = {dim: torch.arange(length, device=device)[:, None] for dim, length in self.shape.grid.items()}
        return {dim: wave(angles(line, count)).to(self.config.params_dtype) for dim, line in lines.items()}

    def _rope(self, ropes: dict[str, Tensor], along: str, sharded: str) -> Tensor | None:
        if along not in ropes:
            return None
        return ropes[along][on_device(self.tokens.gathered(along, sharded), ropes[along].device)]


def _dims(config: Any, tokens: Tokens) -> tuple[str, ...]:
    """The dim that is sharded in every block of the whole model: of a sequence, the one that there is."""
    blocks = list(tokens.sizes) * config.num_layers
    if len(tokens.sizes) == 1:
        return tuple(blocks)
    return sharded_dims(
        tokens.sizes,
        blocks,
        features=config.hidden_size,
        element_size=config.params_dtype.itemsize,
        size=tokens.groups.dsp.size,
    )


def _attention(state: MegatronState | None, tokens: Tokens) -> Any:
    """How blocks attend: on whole lines, or by the method of a sharded sequence."""
    if state is None or len(tokens.sizes) > 1:
        return F.scaled_dot_product_attention
    config, layout = state.config, tokens.layout()
    assert config is not None
    method = partial(attention_of(config), what=AttentionSpec(), where=Where(tokens.groups, layout))

    def attention(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        return method(*(x.transpose(1, 2) for x in (q_BHLD, k_BHLD, v_BHLD))).transpose(1, 2)

    return attention


def check(config: Any, shape: VitShape) -> MegatronState | None:
    """Refuses what the model could not compute or would ignore; the same on every rank, before anything is sent.

    Returns:
        The plugin's state; None without context parallelism.

    Raises:
        SequenceParallelConfigError: context parallelism by a method that cannot serve this attention, or its heads.
        UnsupportedError: dropout, or a setting of the method that this attention has no use for.
    """
    check_no_dropout(config, "VisionTransformer")
    if shape.attention == "axial":
        way = "context-parallel ranks share a grid under axial attention by switching its sharded dim"
        state = context_state(config, ("dsp",), way)
        check_switching(state)
        return state
    way = "under full attention context-parallel ranks share one sequence of tokens, whose attention a method serves"
    state = context_state(config, SEQUENCE_METHODS, way)
    if state is None:
        return None
    if state.settings.layout not in ("auto", "contiguous"):
        raise UnsupportedError(
            setting="--sp-layout",
            value=state.settings.layout,
            why="ranks hold runs of the model's tokens, which attend both ways and so are balanced in any order",
            remedy="drop it",
        )
    assert state.config is not None
    state.config.check_model(
        heads=config.num_attention_heads,
        length=shape.tokens["l"],
        tensor_parallel_size=config.tensor_model_parallel_size,
    )
    return state
