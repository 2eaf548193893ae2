"""What pipeline stages of models over a grid of tokens have in common, and what all of them refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.patches.megatron.attention import check_groups
from dsp_plugin.patches.megatron.models.grid_tokens import Tokens
from dsp_plugin.patches.megatron.parallel_state import registered_state
from dsp_plugin.patches.megatron.recompute import check_checkpoints
from dsp_plugin.patches.megatron.state import MegatronState


class TokenStage(nn.Module):
    """One pipeline stage, or virtual stage, of a model of equal layers. A border carries one known sharded dim.

    Args:
        config: Megatron's `TransformerConfig`; ``num_layers`` is the depth of the whole model.
        tokens: of this rank.
        dims: the dim that is sharded in every block of the whole model.
        rows: that cross a border besides the tokens.
        pre_process, post_process: whether this is the first stage, the last stage.
        vp_stage: the virtual stage, of a pipeline that has some.

    Raises:
        SequenceParallelConfigError: the sizes of the grid do not fit the ranks.

    Attributes:
        dims: those of each layer of this stage, by its place in the whole model.
        arrives: the dim sharded in what this stage takes: as the block before leaves it, and for the first stage as the
            first block wants it.
        leaves: that of what the last stage returns.
    """

    def __init__(
        self,
        config: Any,
        tokens: Tokens,
        dims: Sequence[str],
        *,
        rows: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        from megatron.core import parallel_state
        from megatron.core.enums import ModelType
        from megatron.core.transformer.transformer_block import get_num_layers_to_build
        from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

        super().__init__()
        tokens.check(dims)
        self.config, self.tokens = config, tokens
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        # What Megatron's schedules and its `finalize_model_grads` ask of a model.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.input_tensor: Tensor | None = None

        blocks = len(dims) // config.num_layers
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
        self.dims = {str(layer): tuple(dims[blocks * layer : blocks * (layer + 1)]) for layer in layers}
        self.arrives, self.leaves = dims[max(blocks * first - 1, 0)], dims[-1]
        # The schedules know one shape: where uneven ranks hold more tokens of one dim than of another, the most.
        self.border_rows = rows + max(tokens.count(dim) for dim in dims[blocks - 1 :: blocks])
        self.tp_group = parallel_state.get_tensor_model_parallel_group()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Takes what the stage before sent, from Megatron's schedule."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def received(self, rows: int) -> Tensor:
        """The first rows of what the stage before handed on; padding lies behind them."""
        assert self.input_tensor is not None, "the schedule hands every later stage an input"
        return self.input_tensor[:rows]

    def handed_on(self, x_NBC: Tensor) -> Tensor:
        """Tokens, and rows behind them, as they cross the border."""
        assert len(x_NBC) <= self.border_rows, (len(x_NBC), self.border_rows)
        return F.pad(x_NBC, (0, 0, 0, 0, 0, self.border_rows - len(x_NBC)))

    def pipeline_seq_length(self) -> int:
        """The ``seq_length`` for Megatron's pipeline schedules, of which they make the shape that crosses a border.

        They divide it by the context-parallel size, and under ``sequence_parallel`` by the tensor-parallel size; the
        quotient is the rows that this rank's stages hand on. It is another one on ranks with fewer tokens, and the same
        along the pipeline.
        """
        ranks: int = self.config.context_parallel_size
        return self.border_rows * ranks * self.tokens.parts

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


def check_no_dropout(config: Any, model: str) -> None:
    """Refuses what a model without dropout would ignore.

    Raises:
        UnsupportedError: the configuration has dropout.
    """
    for setting in ("hidden_dropout", "attention_dropout"):
        if getattr(config, setting) != 0.0:
            raise UnsupportedError(
                setting=setting,
                value=getattr(config, setting),
                why=f"{model} has no dropout, so it would be ignored",
                remedy="set it to 0",
            )


def context_state(config: Any, methods: Sequence[str], way: str) -> MegatronState | None:
    """The plugin's state for a model that context-parallel ranks share; None where each rank has all of it.

    Args:
        config: Megatron's `TransformerConfig`.
        methods: that the model can be shared by.
        way: how they do it, for the error: "context-parallel ranks share a video by ...".

    Raises:
        SequenceParallelConfigError: another method is installed, or none.
        UnsupportedError: the model is built on other groups than Megatron's.
    """
    if config.context_parallel_size == 1:
        return None
    state = registered_state()
    if state is None or state.settings.method not in methods:
        given = "the plugin is not installed" if state is None else f"--sp-method is {state.settings.method}"
        raise SequenceParallelConfigError(
            setting="context_parallel_size",
            value=config.context_parallel_size,
            why=f"{way}, and {given}",
            remedy=f"start the script with `python -m dsp_plugin.launch` and --sp-method {' or '.join(methods)}",
        )
    check_groups(state, config, None)
    check_checkpoints(state, config)
    return state


def check_switching(state: MegatronState | None) -> None:
    """Refuses recomputation that keeps attention, of which switches know nothing.

    Raises:
        UnsupportedError: it is asked for.
    """
    if state is not None and state.settings.recompute != "full":
        raise UnsupportedError(
            setting="--sp-recompute",
            value=state.settings.recompute,
            why="dsp does not look inside attention, so it has none to keep",
            remedy="drop it; --recompute-granularity full and selective are exact without",
        )
