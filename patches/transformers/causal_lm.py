"""A model of Transformers, sharded: its batch, its attention and its loss.

Of a causal language model everything is sharded, up to the loss. Of others the backbone is: it gives whole hidden
states, and on these a head computes on every rank alike what it computes unsharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

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
from dsp_plugin.patches.transformers.mixers import Mixers, attention_calls
from dsp_plugin.patches.transformers.noise import scale_noise
from dsp_plugin.patches.transformers.overlay import Overlay, unsharded_generate
from dsp_plugin.patches.transformers.passes import ModelPass
from dsp_plugin.patches.transformers.pending import PendingLogits
from dsp_plugin.patches.transformers.seams import DISTRIBUTION, SEAMS
from dsp_plugin.patches.transformers.selection import select
from dsp_plugin.patches.transformers.tiled_head import tiled_head
from dsp_plugin.patches.transformers.tiled_mlp import tile_mlps
from dsp_plugin.patches.transformers.tiled_norms import tile_norms
from dsp_plugin.patches.transformers.whole_logits import OutermostHook
from dsp_plugin.patches.transformers.wrapped import is_causal_lm, model_in, sharded_part
from dsp_plugin.sharding.outputs import all_tensors, first_tensor
from dsp_plugin.training.copies import LeftBehind
from dsp_plugin.training.extents import Running, in_unknown_rerun
from dsp_plugin.training.randomness import RegionVisit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_REMOVE = "_sequence_parallel_remove"


class ShardedCausalLM:
    """What is in place on one model; `remove` takes it off.

    Attributes:
        may_drop: whether attention may drop; families that name its rate otherwise count as if it did.

    Args:
        module: one that `checked_section` accepts: the model, or what it is wrapped in.
        config: what `checked_section` returns.
    """

    def __init__(self, module: nn.Module, config: SequenceParallelConfig, groups: SequenceParallelGroups) -> None:
        found = model_in(module)
        assert found is not None
        model = sharded_part(found)
        # Of an engine around another wrapper.
        vars(model).get(_REMOVE, _nothing)()
        self._config, self._groups = config, groups
        declared = model.config.get_text_config()
        self._layers, self._name = attention_calls(model), type(found).__name__
        self.may_drop = getattr(declared, "attention_dropout", None) != 0
        self._inputs = InputSharder(config, groups.sp)
        self._passes: Running[ModelPass] = Running(again=lambda _: selection.selected())
        self._attention = SequenceAttention(config, groups, self._passes)
        self._visit: RegionVisit | None = None
        self._unscale: Callable[[], None] = _nothing
        # Of the pass that has ended, where it left logits of this rank's tokens.
        self._local: Placement | None = None
        with ExitStack() as undo:
            name, mask = f"sequence_parallel_{config.method}", MaskReader(self._passes)
            self._selection = selection = select(model, module, name, self._attention, mask, undo)
            self._mixers = Mixers(model, config, groups, self._passes, undo)
            for part in dict.fromkeys((*parts_of(model), *self._mixers.parts)):
                undo.callback(part.register_forward_pre_hook(LeftBehind(self._refuse_astray)).remove)
            undo.callback(enter_again())
            undo.callback(self._passes.close)
            self._head = tiled_head(model, config.tile_tokens, self._takes_loss, undo)
            self._loss = SequenceLoss(groups.sp, self._passes, self._head is not None)
            self._overlay = Overlay(model, undo)
            tile_mlps(model, config, self.aside, undo)
            tile_norms(model, config, self.aside, undo)
            if is_causal_lm(model):
                self._overlay.put("_loss_function", self._loss)
            self._overlay.replace("forward", self._sharded(model, model.forward))
            if hasattr(model, "generate"):
                self._overlay.replace("generate", unsharded_generate(model, self._overlay))
            pooler = getattr(model, "pooler", None)
            if isinstance(pooler, nn.Module):
                Overlay(pooler, undo).replace("forward", self._pooled(pooler.forward))
            self._overlay.put(_REMOVE, LeftBehind(self.remove))
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
        if self._config.logits == "gather" or self._head is not None:
            self._undo.callback(OutermostHook(self._take_reader).attach(model, engine))

    def _take_reader(self) -> Callable[[Any], Tensor] | None:
        placement, self._local = self._local, None
        return None if placement is None else partial(self._read, placement=placement)

    def _read(self, local: Tensor | PendingLogits, placement: Placement) -> Tensor:
        if isinstance(local, PendingLogits):
            local = local.compute()
        return self._gather(local, placement) if self._config.logits == "gather" else local

    def _gather(self, local: Tensor, placement: Placement) -> Tensor:
        layout, method = placement.layout, self._config.method
        return placement.rows.as_given(gather(local, SEQUENCE_DIM, layout, axis=self._groups.sp, method=method))

    def aside(self) -> bool:
        """Whether the model generates, by itself: each rank for all tokens of whole sequences."""
        return self._overlay.aside

    def generated(self) -> bool:
        """Whether it has generated, see `Sharded.generated`."""
        return self._overlay.generated

    def _sharded(self, model: PreTrainedModel, upstream: Callable[..., Any]) -> Callable[..., Any]:
        """Replaces the model's forward, not hooks around it: wrappers call either."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._overlay.aside:
                return upstream(*args, **kwargs)
            self._attention.calls = self._loss.calls = self._mixers.calls = 0
            values, placement = self._inputs.shard(model, args, kwargs)
            self._mixers.check(placement)
            try:
                with self._selection.selected():
                    self._begin(model, placement)
                    output = upstream(**values)
                    # Before what follows, which all ranks do alike.
                    self._leave()
                    return self._after(model, output)
            finally:
                self._leave()
                self._passes.end()

        return forward

    def _pooled(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        """Stands in for what a backbone takes of a sequence: of its first token, mostly."""

        def pool(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            running = self._passes.now
            return upstream(hidden if running is None else self._gather(hidden, running.placement), *args, **kwargs)

        return pool

    def _takes_loss(self) -> bool:
        """Whether a forward pass runs whose loss the model takes."""
        return self._passes.now is not None and self._passes.now.placement.takes_loss

    def _begin(self, model: PreTrainedModel, placement: Placement) -> None:
        self._visit = RegionVisit(self._groups.sp) if model.training else None
        self._passes.begin(ModelPass(placement, self._visit.seed if self._visit is not None else None))
        self._unscale = scale_noise(model, placement.layout, self._groups.sp.rank)

    def _leave(self) -> None:
        unscale, self._unscale = self._unscale, _nothing
        unscale()
        if self._visit is not None:
            self._visit.leave()
            self._visit = None

    def _after(self, model: nn.Module, output: Any) -> Any:
        running = self._passes.now
        assert running is not None
        placement = running.placement
        for what, calls, expected in (
            ("attention interface", self._attention.calls, self._layers),
            ("linear layers", self._mixers.calls, len(self._mixers.parts)),
            ("loss function", self._loss.calls, int(placement.takes_loss)),
        ):
            if calls != expected:
                raise UnsupportedError(
                    setting=f"{type(model).__name__} with sequence_parallel",
                    why=f"its forward called the {what} of Transformers {calls} times where {expected} were due, so "
                    f"part of it was computed within the shard",
                    remedy="leave loss_function as it is after deepspeed.initialize; if it is, the model's code does "
                    "not use them",
                )
        if placement.fused is not None:
            output = placement.fused.gather(output, partial(self._gather, placement=placement))
        elif not placement.labelled:
            first, rebuild = first_tensor(output)
            output = rebuild(self._gather(first, placement))
        self._local = placement if placement.takes_loss else None
        if self._local is not None:
            for part in output.values() if isinstance(output, dict) else output:
                if isinstance(part, PendingLogits):
                    part.returned()
        self._passes.recall_by(all_tensors(output), running)
        return output

    def _refuse_astray(self, part: nn.Module, args: object) -> None:
        """What runs a part of a pass again must bring the pass back: else attention would see a shard as the whole."""
        if in_unknown_rerun() and self._passes.now is None:
            raise UnsupportedError(
                setting=f"{type(part).__name__} with sequence_parallel",
                why="it was run again outside of the model's forward, where nothing says which tokens this rank holds",
                remedy="use torch.utils.checkpoint, and take the loss from what the model returns",
            )


def parts_of(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules below the model that read its config, and so all that ask for attention."""
    for part in model.modules():
        if part is not model and vars(part).get("config") is model.config:
            yield part


def _nothing() -> None:
    """Where a forward pass changed nothing that has to be put back."""
