"""MLPs of a model of Transformers, computed in tiles of tokens where ``memory.mlp_tiles`` says so.

Experts are left as they are: each computes the tokens that it is sent, few of them. A model's dense MLPs and shared
experts are known by their classes, which were compared with the whole ones, family by family.

Under ZeRO 3 DeepSpeed gathers weights around every module's call, which would be around every projection of every
tile. So an MLP is made a leaf, whose weights DeepSpeed gathers around its own call and its own backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.patches.transformers.overlay import Overlay
from dsp_plugin.tiles.mlp import AUTO_MLP_BYTES, bytes_of_token, tile_count, tiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Classes that compute token by token, as tests/integration/transformers/test_hf_tiled_mlp.py finds.
_CLASSES = """
    AXK1MLP AfmoeMLP ApertusMLP ArceeMLP AriaSharedExpertsMLP BeamMLP BitNetMLP Cohere2MLP CohereMLP CwmMLP
    DeepseekV2MLP DeepseekV3MLP Dots1MLP Emu3MLP Ernie4_5MLP Ernie4_5_MoeMLP Exaone4MLP ExaoneMoeMLP GPT2MLP
    GPTBigCodeMLP GPTNeoXMLP Gemma3MLP Gemma3nTextMLP Gemma4TextMLP Gemma4UnifiedTextMLP GemmaMLP Glm4MLP
    Glm4MoeLiteMLP Glm4MoeMLP GlmMLP GraniteMLP HYV3MLP HeliumMLP HunYuanDenseV1MLP HunYuanMoEV1MLP HyperCLOVAXMLP
    Jais2MLP Kolibri1MLP LagunaMLP Lfm2MLP LlamaMLP LongcatFlashMLP MiniCPM3MLP MiniMaxM3VLDenseMLP Ministral3MLP
    MinistralMLP MistralMLP MllamaTextMLP ModernBertDecoderMLP MoshiGatingMLP NanoChatMLP NemotronMLP Olmo2MLP
    Olmo3MLP OlmoMLP PersimmonMLP Phi3MLP Phi4MultimodalMLP PhiMLP Qwen2MLP Qwen2MoeMLP Qwen3MLP SeedOssMLP
    SmolLM3MLP SolarOpenMLP Starcoder2MLP YoutuMLP
"""
KNOWN = frozenset(_CLASSES.split())
EXPERTS = "experts"
# By which classes call functional dropout.
DROPOUT_RATES = ("residual_dropout",)
# By which PEFT's adapters that have no module for it do, each a rate by the name of an adapter.
ADAPTERS_RATES = ("rank_dropout", "module_dropout")
_SETTING = "memory.mlp_tiles"
_NO_DROPOUT = "set the rate to 0 (resid_pdrop, residual_dropout, mlp_dropout; lora_dropout of adapters), or drop it"


def mlps_of(model: nn.Module) -> Iterator[nn.Module]:
    """Those that can be computed in tiles."""
    for name, module in model.named_modules():
        if EXPERTS not in name.split(".") and is_upstreams(module, KNOWN.__contains__):
            yield module


def check_mlps(model: PreTrainedModel, config: SequenceParallelConfig) -> None:
    """Check that MLPs are there to be tiled, where the section asks for it.

    Raises:
        SequenceParallelConfigError: none is known in this family, or they draw random numbers.
    """
    if config.memory == "auto" or config.memory.mlp_tiles == 1:
        return
    found, family = list(mlps_of(model)), model.config.model_type
    if not found:
        experts = any(EXPERTS in name.split(".") for name, _ in model.named_modules())
        why = (
            f"all MLPs of {family} are experts, of which each computes the few tokens that it is sent"
            if experts
            else f"no MLP is known in {family} ({type(model).__name__}): none of its modules is of a class that was "
            f"compared with the whole one"
        )
        raise SequenceParallelConfigError(
            setting=_SETTING, value=config.memory.mlp_tiles, why=why, remedy="drop it, or set it to 1"
        )
    for mlp in found:
        rate = _dropout_of(mlp)
        if rate:
            raise SequenceParallelConfigError(
                setting=_SETTING, value=config.memory.mlp_tiles, why=_drawing(mlp, rate), remedy=_NO_DROPOUT
            )


def tile_mlps(model: nn.Module, config: SequenceParallelConfig, aside: Callable[[], bool], undo: ExitStack) -> None:
    """Have the model's MLPs computed in tiles, as the section says. Call it before DeepSpeed has its hooks.

    Args:
        aside: whether the model now computes as its own methods do.
        undo: gets what takes it off.
    """
    tiles = None if config.memory == "auto" else config.memory.mlp_tiles
    if tiles == 1:
        return
    for mlp in mlps_of(model):
        Overlay(mlp, undo).replace("forward", TiledMLP(mlp, mlp.forward, tiles, aside))
        _gather_whole(mlp, undo)


class TiledMLP:
    """Stands in for the forward of an MLP, on as many tokens as there are.

    Args:
        tiles: None for as few as keep each within `AUTO_MLP_BYTES`, and for the whole where it draws random numbers.
    """

    def __init__(
        self, mlp: nn.Module, upstream: Callable[..., Any], tiles: int | None, aside: Callable[[], bool]
    ) -> None:
        self._mlp, self._upstream, self._tiles, self._aside = mlp, upstream, tiles, aside

    # A compiler would trace the tiles' gradients, which are taken in a backward pass within another.
    @torch.compiler.disable
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the MLP returns of hidden states ``[..., E]``; any other arguments are no tensors."""
        rate = _dropout_of(self._mlp) if self._mlp.training else 0
        if rate and self._tiles is not None:
            raise UnsupportedError(
                setting=_SETTING, value=self._tiles, why=_drawing(self._mlp, rate), remedy=_NO_DROPOUT
            )
        tiles = self._tiles if self._tiles is not None else self._fitting(x)
        if tiles == 1 or rate or self._aside():
            return self._upstream(x, *args, **kwargs)
        self._refuse_parts()
        rows = x.dim() == 2

        def compute(tile: Tensor) -> Tensor:
            # Some look for three dims where they get three.
            found: Tensor = self._upstream(tile if rows else tile.unsqueeze(0), *args, **kwargs)
            return found if rows else found.squeeze(0)

        return tiled(compute, x, self._mlp, tiles=tiles)

    def _fitting(self, x: Tensor) -> int:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return tile_count(x[..., 0].numel(), bytes_of_token(_widths(self._mlp), dtype.itemsize), AUTO_MLP_BYTES)

    def _refuse_parts(self) -> None:
        """Weights that are gathered within the MLP would be gathered for every tile, or not at all for a backward."""
        from torch.distributed.tensor import DTensor

        for name, parameter in self._mlp.named_parameters():
            away = getattr(getattr(parameter, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE"
            if away or isinstance(parameter, DTensor):
                raise UnsupportedError(
                    setting=f"{_SETTING} of {type(self._mlp).__name__}",
                    value=self._tiles,
                    why=f"this rank has a part of {name}, so it is gathered by what the MLP calls, once for every tile",
                    remedy="call fully_shard on decoder layers or on MLPs, not on what is in them; with DeepSpeed, "
                    "give the model to deepspeed.initialize as it is; or drop it",
                )


def is_upstreams(module: nn.Module, named: Callable[[str], bool]) -> bool:
    """Whether its forward is that of a class of Transformers of such a name.

    Also where torch's ``fully_shard`` made a subclass of it.
    """
    for kind in type(module).__mro__:
        if named(kind.__name__) and kind.__module__.partition(".")[0] == "transformers":
            return type(module).forward is kind.forward  # type: ignore[attr-defined]
    return False


def _dropout_of(mlp: nn.Module) -> float:
    """The largest rate at which something in the MLP, or in adapters of it, drops when it trains."""
    rates = [float(getattr(mlp, name, 0)) for name in DROPOUT_RATES]
    for module in mlp.modules():
        if "Dropout" in type(module).__name__:
            rates.append(float(getattr(module, "p", 0)))
        for name in ADAPTERS_RATES:
            rates += map(float, getattr(module, name, {}).values())
    return max(rates)


def _drawing(mlp: nn.Module, rate: float) -> str:
    return (
        f"{type(mlp).__name__} drops features at a rate of {rate}, and its tiles are computed again in the backward "
        "pass, where others would be dropped"
    )


def _widths(mlp: nn.Module) -> list[int]:
    """Features of what each projection returns."""
    found = []
    for module in mlp.modules():
        # Wrappers of adapters have no weight of their own.
        weight = module._parameters.get("weight")
        if weight is not None:
            shape = getattr(weight, "ds_shape", weight.shape)
            # Transformers' Conv1D calls them nf; weights of norms have one dim.
            width = getattr(module, "out_features", getattr(module, "nf", shape[0] if len(shape) > 1 else None))
            found += [width] if isinstance(width, int) else []
    return found


def _gather_whole(mlp: nn.Module, undo: ExitStack) -> None:
    if "deepspeed" not in sys.modules:
        return
    from deepspeed.utils import set_z3_leaf_module, z3_leaf_module

    undo.callback(set_z3_leaf_module, mlp, z3_leaf_module(mlp))
    set_z3_leaf_module(mlp, True)
    undo.callback(mlp.register_forward_pre_hook(_differentiable_input).remove)


def _differentiable_input(mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """DeepSpeed reduces the gradients of a leaf when that of its input is there, so it has to have one."""
    x = args[0]
    if not torch.is_grad_enabled() or x.requires_grad or not any(p.requires_grad for p in mlp.parameters()):
        return args
    return x.detach().requires_grad_(), *args[1:]
