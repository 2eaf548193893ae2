"""Hooks that shard an unmodified module: inside it by a plan (DSP, Ulysses on one dim), or its batch (all others)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsp_plugin.comm.collectives import gather
from dsp_plugin.comm.consent import Refusal, go_on
from dsp_plugin.config.attention import attention_of
from dsp_plugin.config.checks import PLANNED
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.config.start_line import BY_PLAN, announce, devices_of, dtype_of
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout
from dsp_plugin.methods import METHODS
from dsp_plugin.patches.recompute import enter_again
from dsp_plugin.planner.stages import StagePlan
from dsp_plugin.plans.known_models import complete
from dsp_plugin.plans.plan import Plan, matching_modules, outermost, resolve_plan
from dsp_plugin.sharding import loss
from dsp_plugin.sharding.averaging import AveragedGradients
from dsp_plugin.sharding.batch import BatchSharder
from dsp_plugin.sharding.checkpoints import kept
from dsp_plugin.sharding.compiling import forget_compiled, uncompiled
from dsp_plugin.sharding.integrations import Sharded, integration_of
from dsp_plugin.sharding.outputs import all_tensors, first_tensor
from dsp_plugin.sharding.peers import EqualPeers
from dsp_plugin.sharding.region import ShardedRegion
from dsp_plugin.sharding.routing import AttentionRoute
from dsp_plugin.sharding.wrappers import ended_with, unwrapped
from dsp_plugin.training.extents import Running
from dsp_plugin.training.host_budget import offload_for
from dsp_plugin.training.randomness import RegionSeed, RegionVisit


class Parallelized:
    """Hooks in place on a module; `remove` takes them off."""

    def __init__(self, config: SequenceParallelConfig) -> None:
        self._config = config
        self._undo: list[Callable[[], object]] = []
        self._region: ShardedRegion | None = None
        self._integrated: Sharded | None = None

    @property
    def order(self) -> str:
        """Which rank holds what, for the line at the start."""
        return BY_PLAN if self._region is not None else f"tokens {self._config.layout_for()}"

    @property
    def serves_attention(self) -> bool:
        """Whether a method computes attention; under a plan that names none, the model does."""
        return self._region is None or self._region.serves_attention

    @property
    def may_drop(self) -> bool:
        """Whether attention may drop, as far as anybody knows."""
        return self._integrated is None or self._integrated.may_drop

    @property
    def changed(self) -> str:
        """What was changed of the library that the model is from, for the line at the start."""
        return "" if self._integrated is None else str(self._integrated)

    @property
    def stage_plan(self) -> StagePlan | None:
        """Which dim was sharded where, with bytes; None before the first forward pass and for batch sharding."""
        return self._region.stage_plan if self._region is not None else None

    def aside(self) -> bool:
        """Whether a model of another library now computes whole sequences by itself, which peers may not do at all."""
        return self._integrated is not None and self._integrated.aside()

    def generated(self) -> bool:
        """Whether such a model has generated what peers may train on, each what came out on it."""
        return self._integrated is not None and self._integrated.generated()

    def make_outputs_whole(self, module: nn.Module, engine: nn.Module | None = None) -> None:
        """Where the model is another library's, have what it returns beside a loss whole where it is read.

        Call it when all other hooks are in place, for what they look at must not count as read.

        Args:
            module: the sharded one, or what is wrapped around it.
            engine: what calls it, if something does.
        """
        if self._integrated is not None:
            self._integrated.make_logits_whole(module, engine)

    def remove(self) -> None:
        """Leave the module as it was."""
        forget_compiled()
        while self._undo:
            self._undo.pop()()


def parallelize(
    module: nn.Module,
    plan: Plan | None = None,
    *,
    config: SequenceParallelConfig,
    groups: SequenceParallelGroups,
) -> Parallelized:
    """Shard the sequence of ``module`` by hooks, and say so; its code and its callers stay as they are.

    With ``config.batch``, which the models in `known_models` do without, the named forward arguments are sharded before
    the module runs. Otherwise a plan says where inside the module tokens are split, switched and gathered. Causal
    language models of Transformers need neither. Either way callers see whole tensors, and the loss of whole sequences.
    The first rank prints one line, see `announce`.

    Of a model in `DistributedDataParallel`, or that `torch.compile` returned, the model inside is sharded. It may be
    compiled, or given to ``fully_shard``, before or after; attention and the moves of tokens stay out of what is
    compiled.

    Parameter gradients come out such that their mean over the sequence ranks is exact: DDP and ``fully_shard`` over all
    ranks take it. In the first passes and optimizer steps the ranks of a sequence compare what they must have alike,
    see `dsp_plugin.sharding.peers` and `dsp_plugin.sharding.averaging`.

    Args:
        plan: for ``module``; ``config.plan``, or the one known for the model, when None.

    Raises:
        SequenceParallelConfigError: the model does not fit the config or the plan.
        UnsupportedError: the model is in a wrapper that has to come after, or of a kind that cannot be sharded.
        PatchError: attention is to be kept (``config.recompute``), or checkpoints in host memory, and torch is not one
            that our patches fit.
    """
    checks: list[Callable[[], object]] = []
    inside = unwrapped(module)
    peers = EqualPeers(inside, groups)
    # Before what shards the model, to see whole inputs.
    for check in (AveragedGradients(inside, groups), peers):
        check.attach(checks)
    try:
        checks += kept(inside, config, offload_for(config.offload, groups.sp))
        handle = hooked(module, plan, config=config, groups=groups)
    except BaseException:
        for undo in checks:
            undo()
        raise
    handle._undo[:0] = checks
    if handle._integrated is not None:
        peers.alone, peers.samples.always = handle.aside, handle.generated
    handle.make_outputs_whole(module)
    announce(
        config,
        order=handle.order,
        devices=devices_of(module),
        dtype=dtype_of(module),
        dropout=handle.may_drop,
        attention=handle.serves_attention,
        patched=handle.changed,
        checkpointing=config.recompute == "keep_attention",
    )
    return handle


def hooked(
    module: nn.Module,
    plan: Plan | None = None,
    *,
    config: SequenceParallelConfig,
    groups: SequenceParallelGroups,
) -> Parallelized:
    """`parallelize` without a word, for who checks a model, or has more to say of it."""
    _check_groups(config, groups)
    given, module = module, unwrapped(module)
    integration = integration_of(module, config) if plan is None else None
    if integration is None or plan is not None:
        config.refuse_automatic(type(module).__name__)
    if integration is not None:
        automatic, config = config.automatic, integration.complete(module, config.given())
        if automatic:
            raise _named_too_late(config)
    elif plan is None:
        module, config = complete(module, config)
    handle = Parallelized(config)
    try:
        if integration is not None:
            handle._integrated = integration.shard(module, config, groups)
            handle._undo.append(handle._integrated.remove)
        elif config.batch:
            _shard_batch(module, config, groups, handle._undo, given)
        else:
            _check_fit(config)
            root, plan = (module, plan) if plan is not None else resolve_plan(module, config.plan)
            handle._region = ShardedRegion(root, plan, config, groups)
            handle._region.install(handle._undo)
    except BaseException:
        handle.remove()
        raise
    forget_compiled()
    return handle


def _named_too_late(config: SequenceParallelConfig) -> SequenceParallelConfigError:
    sizes = (
        f', "ulysses_size": {config.ulysses_size}, "ring_size": {config.ring_size}' if config.method == "usp" else ""
    )
    return SequenceParallelConfigError(
        setting="method",
        value="auto",
        why="groups were made before the model's shapes were known, and the method says which ranks they consist of",
        remedy=f'write what it comes to for this model: "method": "{config.method}", "size": {config.size}{sizes}',
    )


def _check_groups(config: SequenceParallelConfig, groups: SequenceParallelGroups) -> None:
    if groups.sp.size != config.size:
        raise SequenceParallelConfigError(
            setting="size",
            value=config.size,
            why=f"the groups have {groups.sp.size} ranks to a sequence",
            remedy="build the groups from the same config",
        )


def _check_fit(config: SequenceParallelConfig) -> None:
    """Of a config that leaves it to a plan."""
    if config.method not in PLANNED:
        raise SequenceParallelConfigError(
            setting="plan",
            why=f"inside a plan's stages runs one of {', '.join(PLANNED)}, not {config.method}",
            remedy="use one of these, or shard the batch",
        )
    if config.layout not in ("auto", "contiguous"):
        raise SequenceParallelConfigError(
            setting="layout",
            value=config.layout,
            why="a plan shards dims of the activation, each of them in contiguous runs",
            remedy='drop layout, or shard the batch, as in "batch": {"input_ids": 1}',
        )


@dataclass
class _Pass:
    """One forward pass: where its tokens are, how many labels count on this rank, its seeds."""

    layout: Layout | None = None
    count: Tensor | None = None
    visit: RegionVisit | None = None

    @property
    def seed(self) -> RegionSeed | None:
        return None if self.visit is None else self.visit.seed


def _shard_batch(
    module: nn.Module,
    config: SequenceParallelConfig,
    groups: SequenceParallelGroups,
    undo: list[Callable[[], object]],
    given: nn.Module,
) -> None:
    sharder, attention = BatchSharder(module, config, groups.sp), attention_of(config, config.for_softmax)
    linear = attention_of(config) if METHODS[config.method].kind == "linear" else None
    found = [_named(module, given, pattern) for pattern in config.attention]
    passes: Running[_Pass] = Running()
    kinds: set[str] = set()

    @uncompiled
    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        passes.begin(state := _Pass())
        kind = f"forward of {_shapes(args, kwargs)}"
        refusal: Refusal | None = None
        try:
            args, kwargs, state.layout, state.count = sharder.shard(args, kwargs)
        except (SequenceParallelConfigError, UnsupportedError) as error:
            refusal = error
        if kind not in kinds:
            go_on(kind, refusal, groups.sp)
            kinds.add(kind)
        elif refusal is not None:
            raise refusal
        state.visit = RegionVisit(groups.sp) if module.training and groups.sp.size > 1 else None
        return args, kwargs

    @uncompiled
    def leave(*_: object) -> None:
        if passes.now is not None and passes.now.visit is not None:
            passes.now.visit.leave()

    @uncompiled
    def end(*_: object) -> None:
        passes.end()

    @uncompiled
    def after(_: nn.Module, args: tuple, output: Any) -> Any:
        state = passes.now
        assert state is not None
        assert state.layout is not None
        first, rebuild = first_tensor(output)
        if state.count is not None:
            whole = global_loss(first, state.count, groups)
        else:
            assert config.gather_output is not None
            whole = _global_output(first, config.gather_output, state.layout, config.method, groups)
        output = rebuild(whole)
        passes.recall_by(all_tensors(output), state)
        return output

    undo.append(enter_again())
    undo.append(passes.close)
    undo.append(ended_with(module, passes, leave))
    undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    # Before what follows, which all ranks do alike; also where the forward pass fails.
    undo.append(module.register_forward_hook(leave, always_call=True).remove)
    undo.append(module.register_forward_hook(after).remove)
    undo.append(module.register_forward_hook(end, always_call=True).remove)
    for name, part in outermost({name: part for modules in found for name, part in modules.items()}).items():
        route = AttentionRoute(
            name,
            attention,
            groups,
            lambda: None if passes.now is None else passes.now.layout,
            lambda: None if passes.now is None else passes.now.seed,
            linear,
        )
        undo.append(route.install(unwrapped(part)))


def _named(module: nn.Module, given: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules that a glob names, by their names in the model or in what it is wrapped in."""
    try:
        return matching_modules(module, pattern, "attention")
    except SequenceParallelConfigError:
        if given is module:
            raise
        return matching_modules(given, pattern, "attention")


def _shapes(args: tuple, kwargs: dict[str, Any]) -> str:
    """What passes of one kind have in common."""
    named = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
    return ", ".join(f"{name} {list(x.shape)}" for name, x in named.items() if isinstance(x, Tensor))


def global_loss(local_mean: Tensor, count: Tensor, groups: SequenceParallelGroups) -> Tensor:
    """The mean loss of the whole sequence from the mean over the ``count`` labels of this rank; see `loss.contract`.

    Raises:
        SequenceParallelConfigError: it is no scalar.
    """
    if local_mean.numel() != 1:
        raise SequenceParallelConfigError(
            setting="loss",
            why=f"forward returned a tensor {tuple(local_mean.shape)} where the config promises a scalar mean loss",
            remedy='return the mean loss, or set "gather_output" and compute the loss outside',
        )
    # A sum over many tokens overflows fp16, and bf16 rounds it.
    wide = local_mean.to(torch.promote_types(local_mean.dtype, torch.float32))
    # The mean over a shard of no tokens is NaN, and NaN times a count of 0 too.
    local_sum = torch.where(count > 0, wide * count, torch.zeros_like(wide))
    whole = loss.contract(local_sum.reshape(()), count, groups.sp).to(local_mean.dtype)
    # No view where it need not be one: ``loss /= steps`` on a view would lose the hooks that fully_shard puts on it.
    return whole if local_mean.dim() == 0 else whole.reshape(local_mean.shape)


def _global_output(output: Tensor, dim: int, layout: Layout, method: str, groups: SequenceParallelGroups) -> Tensor:
    expected = layout.sizes[groups.sp.rank]
    if not -output.dim() <= dim < output.dim() or output.shape[dim] != expected:
        raise SequenceParallelConfigError(
            setting="gather_output",
            value=dim,
            why=f"the output {tuple(output.shape)} has not this rank's {expected} of {layout.length} tokens there",
            remedy="give the sequence dim of the tensor that forward returns (first)",
        )
    return gather(output, dim % output.dim(), layout, axis=groups.sp, method=method)
