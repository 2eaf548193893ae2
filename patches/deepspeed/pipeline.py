"""`PipelineModule` beside sequence parallelism: ranks are ``stage x data x sequence``, sequence peers adjacent.

A rank passes its own tokens on: the first stage cuts what the script feeds, activations stay cut at every border, since
ranks that meet there have the same place in their sequence groups, and the last stage cuts the labels. In the section,
``batch`` names what a micro batch ``(inputs, labels)`` holds: ``inputs`` and ``labels`` where they are tensors,
``inputs.0``, ``labels.0``, ... where they are tuples. The first entry of inputs says along which dim the sequence runs
at the borders, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.collectives import all_gather
from dsp_plugin.config.attention import attention_of
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout
from dsp_plugin.methods import METHODS
from dsp_plugin.patches.deepspeed.same_sample import same_sample_check
from dsp_plugin.patches.recompute import enter_again
from dsp_plugin.plans.plan import matching_modules, outermost
from dsp_plugin.sharding.batch import BatchSharder
from dsp_plugin.sharding.parallelize import global_loss
from dsp_plugin.sharding.routing import AttentionRoute
from dsp_plugin.training.extents import Running
from dsp_plugin.training.randomness import RegionSeed, RegionVisit

INPUTS, LABELS = "inputs", "labels"
EXAMPLE = (
    '"batch": {"inputs.0": 1, "inputs.1": 1, "labels": 1}, "positions": "inputs.1", "attention": ["*.attn"], '
    '"loss": {"labels": "labels"}'
)


def is_pipeline(model: nn.Module) -> bool:
    """Whether DeepSpeed trains ``model`` by stages."""
    from deepspeed import PipelineModule

    return isinstance(model, PipelineModule)


def unsupported(
    config: Mapping[str, Any], section: SequenceParallelConfig, model: Any
) -> Iterator[tuple[str, str, str]]:
    """Feature, why, remedy."""
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

    if not is_pipeline(model):
        return
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage >= 2:
        yield (
            f"PipelineModule and zero_optimization.stage {stage}",
            "DeepSpeed's own pipeline engine takes ZeRO 0 and 1 only",
            "Set zero_optimization.stage to 1, or train the layers as one torch.nn.Module",
        )
    if METHODS[section.method].kind == "switch" or section.plan is not None:
        yield (
            "PipelineModule and a plan",
            "a stage holds its own layers only, so none knows which dim the one before it left sharded",
            "Train the layers as one torch.nn.Module (ZeRO 0 to 3), or use another method",
        )
    if section.log_every:
        yield (
            "PipelineModule and log_every",
            "the step log is written by engine.backward and engine.step, which a pipeline never calls",
            "Leave log_every out; train_batch logs every steps_per_print steps",
        )
    if isinstance(model, DualPipeVModule):
        yield (
            "DualPipeVModule",
            "its two passes a batch run other stages at a time than those of PipelineModule",
            "Use PipelineModule",
        )
    if model._topo.get_dim("model") > 1:
        yield (
            "PipelineModule with an axis 'model'",
            "layers that are tensor-parallel by themselves do not say which heads they hold",
            "Use PipeDataParallelTopology, or num_stages",
        )


def check_section(section: SequenceParallelConfig, model: Any) -> None:
    """Checks that the section says what a pipeline needs to know.

    Raises:
        SequenceParallelConfigError: it does not.
    """
    inputs, labels = _named(section, INPUTS), _named(section, LABELS)
    if not inputs or not labels or len(inputs) + len(labels) < len(section.batch):
        raise SequenceParallelConfigError(
            setting="batch",
            value=dict(section.batch),
            why="the micro batches of a PipelineModule are (inputs, labels), and both hold whole sequences",
            remedy=f'name them "inputs" and "labels", or "inputs.0" and so on where they are tuples, as in {EXAMPLE}',
        )
    if "positions" not in section.model_fields_set or (
        section.positions is not None and not section.positions.startswith(f"{INPUTS}.")
    ):
        raise SequenceParallelConfigError(
            setting="positions",
            value=section.positions if "positions" in section.model_fields_set else None,
            why="the layers of a PipelineModule hand tensors on without names, so nothing says which are positions, "
            "and tokens of every shard would be numbered from 0",
            remedy='name an entry of a tuple of inputs, such as "inputs.1" (it is filled in if the data has none); '
            "null if the model uses no positions",
        )
    if section.loss is None or getattr(model, "loss_fn", None) is None:
        raise SequenceParallelConfigError(
            setting="loss",
            value=None if section.loss is None else section.loss.labels,
            why="the mean loss of a sequence is made of what every rank's tokens add to it",
            remedy='set "loss": {"labels": "labels"}, and give PipelineModule a loss_fn that takes the mean over the '
            "labels it is given",
        )


def _named(section: SequenceParallelConfig, what: str) -> dict[str, int]:
    return {name: dim for name, dim in section.batch.items() if name.split(".")[0] == what}


@dataclass
class StagePass:
    """One forward pass of a stage: where its tokens are, and its seeds in training."""

    layout: Layout
    seed: RegionSeed | None


class PipelineStage:
    """What is in place on this rank's stage; `remove` takes it off.

    Args:
        module: a `PipelineModule` and
        config: a section that `check_section` accepts.
        device: where collectives take tensors.
    """

    def __init__(
        self,
        module: Any,
        *,
        config: SequenceParallelConfig,
        groups: SequenceParallelGroups,
        device: Callable[[], torch.device],
    ) -> None:
        self._config, self._groups = config, groups
        self._check = same_sample_check(groups.sp)
        self._first = module.stage_id == 0
        inputs, labels = _named(config, INPUTS), _named(config, LABELS)
        self._dim = next(iter(inputs.values()))
        self._inputs = BatchSharder(_Named(), config.model_copy(update={"batch": inputs, "loss": None}), groups.sp)
        self._labels = BatchSharder(_Named(), config.model_copy(update={"batch": labels, "positions": None}), groups.sp)
        self._layout: Layout | None = None
        self._passes: Running[StagePass] = Running()
        self._visit: RegionVisit | None = None
        with ExitStack() as undo:
            undo.callback(enter_again())
            undo.callback(self._passes.close)
            undo.callback(self._passes.ended_with(module, self._leave))
            self._route(module, device(), undo)
            undo.callback(module.register_forward_pre_hook(self._before).remove)
            undo.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            undo.callback(module.register_forward_hook(self._after).remove)
            undo.callback(module.register_forward_hook(self._end, always_call=True).remove)
            if module.stage_id == module.num_stages - 1:
                undo.callback(setattr, module, "loss_fn", module.loss_fn)
                module.loss_fn = partial(self._loss, module, module.loss_fn)
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Leave the stage as it was."""
        self._undo.close()

    def _route(self, module: nn.Module, device: torch.device, undo: ExitStack) -> None:
        config = self._config
        attention = attention_of(config, config.for_softmax)
        linear = attention_of(config) if METHODS[config.method].kind == "linear" else None
        found = _attention_modules(module, config.attention, device)
        for name, part in found.items():
            route = AttentionRoute(name, attention, self._groups, self._layout_now, self._seed_now, linear)
            undo.callback(route.install(part))

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        (inputs,) = args
        if self._first:
            named = _entries(INPUTS, inputs)
            self._check.compare(module.training, (), named)
            _, named, self._layout, _ = self._inputs.shard((), named)
            inputs = _rebuilt(named, INPUTS)
        else:
            self._layout = self._layout_of(inputs)
        self._visit = RegionVisit(self._groups.sp) if module.training and self._groups.sp.size > 1 else None
        self._passes.begin(StagePass(self._layout, None if self._visit is None else self._visit.seed))
        return (inputs,)

    def _layout_now(self) -> Layout | None:
        return None if self._passes.now is None else self._passes.now.layout

    def _seed_now(self) -> RegionSeed | None:
        return None if self._passes.now is None else self._passes.now.seed

    def _end(self, *_: object) -> None:
        self._passes.end()

    def _leave(self, *_: object) -> None:
        if self._visit is not None:
            self._visit.leave()
            self._visit = None

    def _after(self, module: nn.Module, args: object, output: Any) -> None:
        assert self._passes.now is not None
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor):
                self._passes.recall_by((tensor,), self._passes.now)

    def _layout_of(self, inputs: Any) -> Layout:
        """The placement of the tokens that the stage before sent: of the whole, a rank gets to see only its part."""
        first, sp = inputs[0] if isinstance(inputs, tuple) else inputs, self._groups.sp
        mine = torch.tensor([first.shape[self._dim]], device=first.device)
        sizes = all_gather(mine, 0, Layout.of_sizes([1] * sp.size), axis=sp, method="batch").tolist()
        layout = Layout(self._config.layout_for(), sum(sizes), sp.size)
        if list(layout.sizes) != sizes:
            raise SequenceParallelConfigError(
                setting="batch",
                value=dict(self._config.batch),
                why=f"at a border between stages, dim {self._dim} of the first tensor has {sizes} tokens on the "
                f"sequence's ranks, which is no sequence in shards",
                remedy="let layers pass on tensors whose sequence runs along the dim of the first of inputs",
            )
        return layout

    def _loss(self, module: nn.Module, upstream: Callable[..., Tensor], outputs: Any, labels: Any) -> Tensor:
        named = _entries(LABELS, labels)
        self._check.compare(module.training, (), named)
        _, named, layout, count = self._labels.shard((), named)
        assert count is not None
        if self._layout != layout:
            raise SequenceParallelConfigError(
                setting="batch",
                value=dict(self._config.batch),
                why=f"labels are of {layout.length} tokens, inputs of {self._layout and self._layout.length}",
                remedy="give every token a label, -100 where it counts for nothing",
            )
        return global_loss(upstream(outputs, _rebuilt(named, LABELS)), count, self._groups)


class _Named(nn.Module):
    """Stands in for a model whose forward takes the entries of a batch by name."""

    def forward(self, **entries: Any) -> None:
        """Never runs."""


def _entries(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, tuple | list):
        return {f"{name}.{index}": item for index, item in enumerate(value)}
    return {name: value}


def _rebuilt(entries: dict[str, Any], name: str) -> Any:
    # Positions that were filled in make a tuple of what came as a tensor.
    if list(entries) == [name]:
        return entries[name]
    values = {0 if key == name else int(key.split(".")[1]): value for key, value in entries.items()}
    return tuple(values[index] for index in sorted(values))


def _attention_modules(module: nn.Module, patterns: tuple[str, ...], device: torch.device) -> dict[str, nn.Module]:
    """The modules of this stage; a pattern need match in one stage only. Collective."""
    found: dict[str, nn.Module] = {}
    matches = torch.zeros(len(patterns), dtype=torch.int64, device=device)
    for index, pattern in enumerate(patterns):
        try:
            here = matching_modules(module, pattern, "attention")
        except SequenceParallelConfigError:
            here = {}
        matches[index] = len(here)
        found.update(here)
    dist.all_reduce(matches)
    for pattern, count in zip(patterns, matches.tolist(), strict=True):
        if not count:
            raise SequenceParallelConfigError(
                setting="attention",
                value=pattern,
                why="matches no module of any stage; layers of a PipelineModule are named by number, as in 1.attn",
                remedy="write names as named_modules() gives them, with * for one name",
            )
    return outermost(found)


def count_replicas(engine: Any, dp: Axis) -> None:
    """Makes an engine, in the middle of its construction, take replicas for data parallelism, until `folding` ends."""
    engine.dp_world_size = engine.module._grid.data_parallel_size = dp.size


def folding(upstream: Callable[..., None]) -> Callable[..., None]:
    """Replaces ``PipelineEngine.__init__``, which multiplies micro batches by its grid's data-parallel size."""

    @functools.wraps(upstream)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        upstream(self, *args, **kwargs)
        grid = self.grid
        grid.data_parallel_size = len(grid.dp_group)
        self.dp_world_size = dist.get_world_size(group=self.data_parallel_group)
        self.is_data_parallel = grid.data_parallel_size > 1

    return __init__


def refusing_logits(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``PipelineEngine.eval_batch``: without a loss, or with logits, it would return those of a shard."""

    @functools.wraps(upstream)
    def eval_batch(
        self: Any, data_iter: Any, return_logits: bool = False, compute_loss: bool = True, **rest: Any
    ) -> Any:
        if isinstance(vars(self).get("sequence_parallel_groups"), SequenceParallelGroups) and (
            return_logits or not compute_loss
        ):
            raise UnsupportedError(
                setting="eval_batch(return_logits=..., compute_loss=...) with sequence_parallel",
                value=(return_logits, compute_loss),
                why="the last stage has the logits of this rank's tokens only",
                remedy="evaluate the loss, or take logits from an engine without the section",
            )
        return upstream(self, data_iter, return_logits, compute_loss, **rest)

    return eval_batch
