"""A causal language model of Transformers, sharded: its batch, its attention and its loss."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from dsp_plugin.comm.collectives import gather
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.patches.recompute import enter_again
from dsp_plugin.patches.transformers.attention import SequenceAttention
from dsp_plugin.patches.transformers.inputs import SEQUENCE_DIM, InputSharder, Placement
from dsp_plugin.patches.transformers.loss import SequenceLoss
from dsp_plugin.patches.transformers.mask import MaskReader
from dsp_plugin.patches.transformers.noise import scale_noise
from dsp_plugin.patches.transformers.passes import ModelPass
from dsp_plugin.patches.transformers.seams import DISTRIBUTION, SEAMS
from dsp_plugin.patches.transformers.whole_logits import OutermostHook
from dsp_plugin.sharding.outputs import all_tensors, first_tensor
from dsp_plugin.training.extents import Running
from dsp_plugin.training.randomness import RegionVisit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ShardedCausalLM:
    """What is in place on one model; `remove` takes it off.

    Attributes:
        may_drop: whether attention may drop; families that name its rate otherwise count as if it did.

    Args:
        model: one that `checked_section` accepts.
        config: what `checked_section` returns.
    """

    def __init__(self, model: PreTrainedModel, config: SequenceParallelConfig, groups: SequenceParallelGroups) -> None:
        self._config, self._groups = config, groups
        declared = model.config.get_text_config()
        self._layers, self._name = declared.num_hidden_layers, type(model).__name__
        self.may_drop = getattr(declared, "attention_dropout", None) != 0
        self._inputs = InputSharder(config, groups.sp)
        self._passes: Running[ModelPass] = Running()
        self._attention, self._mask = SequenceAttention(config, groups, self._passes), MaskReader(self._passes)
        self._loss = SequenceLoss(model.loss_function, groups.sp)
        self._visit: RegionVisit | None = None
        self._unscale: Callable[[], None] = _nothing
        # Of the pass that has ended, where it left logits of this rank's tokens.
        self._local: Placement | None = None
        with ExitStack() as undo:
            _select_attention(model, f"sequence_parallel_{config.method}", self._attention, self._mask, undo)
            _set_loss(model, self._loss, undo)
            undo.callback(enter_again())
            undo.callback(self._passes.close)
            undo.callback(self._passes.ended_with(model, self._leave))
            undo.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            # Before what follows, which all ranks do alike; also where the forward pass fails.
            undo.callback(model.register_forward_hook(self._leave, always_call=True).remove)
            undo.callback(model.register_forward_hook(self._after).remove)
            undo.callback(model.register_forward_hook(self._end, always_call=True).remove)
            self._undo = undo.pop_all()

    def __str__(self) -> str:
        """What is changed of Transformers."""
        return f"one {self._name} of {DISTRIBUTION} {SEAMS[0].version}"

    def remove(self) -> None:
        """Leave the model as it was."""
        self._undo.close()

    def make_logits_whole(self, model: nn.Module, engine: nn.Module | None = None) -> None:
        """Have the logits beside a loss whole where they are read, unless the section says otherwise.

        Call it when all other hooks are in place.

        Args:
            model: the sharded one, or what is wrapped around it.
            engine: what calls it, if something does.
        """
        if self._config.logits == "gather":
            self._undo.callback(OutermostHook(self._take_gather).attach(model, engine))

    def _take_gather(self) -> Callable[[Tensor], Tensor] | None:
        placement, self._local = self._local, None
        return None if placement is None else partial(self._gather, placement=placement)

    def _gather(self, local: Tensor, placement: Placement) -> Tensor:
        layout, method = placement.layout, self._config.method
        return placement.rows.as_given(gather(local, SEQUENCE_DIM, layout, axis=self._groups.sp, method=method))

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._attention.calls = self._loss.calls = 0
        kwargs, placement = self._inputs.shard(model, args, kwargs)
        self._visit = RegionVisit(self._groups.sp) if model.training else None
        self._passes.begin(ModelPass(placement, self._visit.seed if self._visit is not None else None))
        self._unscale = scale_noise(model, placement.layout, self._groups.sp.rank)
        return (), kwargs

    def _leave(self, *_: object) -> None:
        unscale, self._unscale = self._unscale, _nothing
        unscale()
        if self._visit is not None:
            self._visit.leave()
            self._visit = None

    def _end(self, *_: object) -> None:
        self._passes.end()

    def _after(self, model: nn.Module, args: object, output: Any) -> Any:
        running = self._passes.now
        assert running is not None
        placement = running.placement
        for what, calls, expected in (
            ("attention interface", self._attention.calls, self._layers),
            ("loss function", self._loss.calls, int(placement.labelled and placement.fused is None)),
        ):
            if calls != expected:
                raise UnsupportedError(
                    setting=f"{type(model).__name__} with sequence_parallel",
                    why=f"its forward called the {what} of Transformers {calls} times where {expected} were due, so "
                    f"part of it was computed within the shard",
                    remedy="leave config._attn_implementation and loss_function as they are after "
                    "deepspeed.initialize; if they are, the model's code does not use them",
                )
        if placement.fused is not None:
            output = placement.fused.gather(output, partial(self._gather, placement=placement))
        elif not placement.labelled:
            first, rebuild = first_tensor(output)
            output = rebuild(self._gather(first, placement))
        self._local = placement if placement.labelled and placement.fused is None else None
        self._passes.recall_by(all_tensors(output), running)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _nothing() -> None:
    """Where a forward pass changed nothing that has to be put back."""


def _select_attention(
    model: PreTrainedModel, name: str, attention: SequenceAttention, mask: MaskReader, undo: ExitStack
) -> None:
    """Register ``attention`` and ``mask`` and make them this model's, which from now on has a config of its own.

    A config may be shared with another model, and the interface looks the name up in it.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    name = next(free for number in count() if (free := f"{name}_{number}") not in ALL_ATTENTION_FUNCTIONS)
    shared, own = model.config, deepcopy(model.config)
    before = own._attn_implementation
    for module in model.modules():
        if vars(module).get("config") is shared:
            vars(module)["config"] = own
    for interface, ours in ((AttentionInterface, attention), (AttentionMaskInterface, mask)):
        interface.register(name, ours)
        # The table outlives the model.
        undo.callback(weakref.finalize(model, interface._global_mapping.pop, name))
    own._attn_implementation = name
    undo.callback(setattr, own, "_attn_implementation", before)


def _set_loss(model: PreTrainedModel, loss: SequenceLoss, undo: ExitStack) -> None:
    before = vars(model).get("_loss_function")
    model.loss_function = loss
    if before is None:
        undo.callback(delattr, model, "_loss_function")
    else:
        undo.callback(setattr, model, "loss_function", before)
