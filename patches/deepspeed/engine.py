"""`DeepSpeedEngine`: groups and hooks before it is built, equal peers after, and replicas where it means replicas."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dsp_plugin.comm.axis import Axis
from dsp_plugin.config.schema import DEEPSPEED_SECTION, SequenceParallelConfig
from dsp_plugin.config.start_line import announce, dtype_of
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.patches.deepspeed import pipeline, random_state, recompute, step_log, tensor_parallel
from dsp_plugin.patches.deepspeed.refusals import refuse_conflicts
from dsp_plugin.patches.deepspeed.same_sample import same_sample_check
from dsp_plugin.plans.known_models import softmax_heads
from dsp_plugin.sharding.integrations import integration_of
from dsp_plugin.sharding.parallelize import Parallelized, hooked
from dsp_plugin.sharding.unused_offload import refuse_unused
from dsp_plugin.sharding.wrappers import unwrapped
from dsp_plugin.training.copies import Undo
from dsp_plugin.training.host_budget import offload_for

GROUPS = "sequence_parallel_groups"
CONFIG = "sequence_parallel_config"
UNDO = "_sequence_parallel_undo"


def parallelizing(upstream: Callable[..., None], patched: Callable[[], str]) -> Callable[..., None]:
    """Replaces ``DeepSpeedEngine.__init__``.

    The engine gets `sequence_parallel_config` and `sequence_parallel_groups`; its module gets the library's hooks
    before ZeRO adds its own, so a parameter is gathered inside, not around, what our hooks run. The first rank says so.

    Args:
        patched: says what is patched.
    """
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        given = signature.bind(self, *args, **kwargs).arguments
        param_dict = given["config_class"]._param_dict
        section = SequenceParallelConfig.from_deepspeed(param_dict)
        if section is None:
            upstream(self, *args, **kwargs)
            return
        # What `torch.compile` returned only calls the model.
        module = unwrapped(given["model"])
        staged, tensor_size = pipeline.is_pipeline(module), tensor_parallel.size_of(param_dict)
        # A PipelineModule is its own model parallel unit.
        refuse_conflicts(param_dict, module, None if staged else given.get("mpu"), given.get("mesh_device"))

        writers = step_log.writers_of(section)
        _unhook(module)
        hook, section = _route(module, param_dict, section, partial(device_of, given.get("args")))
        groups = _groups(module, section, tensor_size)
        if tensor_size > 1:
            tensor_parallel.keep_vocabulary_whole(given["config_class"])
        # The check comes first among the hooks, to see the inputs whole. A stage has its own, of what it is fed.
        check = same_sample_check(groups.sp)
        undo = Undo([] if staged else [check.attach(module).remove])
        setattr(module, UNDO, undo)
        buffers = {name for name, _ in module.named_buffers()}
        # torch.nn.Module takes plain attributes before its own __init__; deepspeed_io needs these during upstream's.
        setattr(self, CONFIG, section)
        setattr(self, GROUPS, groups)
        try:
            keep, offload = section.recompute == "keep_attention", offload_for(section.offload, groups.sp)
            undo.append(recompute.hold_for(self, module, keep=keep, offload=offload))
            if offload is not None and not offload.auto and not staged:
                undo.append(refuse_unused(module, offload))
            handle = hook(module, config=section, groups=groups)
            undo.append(handle.remove)
            if isinstance(handle, Parallelized):
                check.alone, check.always = handle.aside, handle.generated
            upstream(self, *args, **kwargs)
        except BaseException:
            _unhook(module)
            raise

        assert set(groups.sp.ranks) <= set(dist.get_process_group_ranks(self.data_parallel_group))
        _share_buffers(module, buffers, groups.sp)
        if tensor_size > 1:
            tensor_parallel.share_random_state()
        seed = random_state.shared_seed(groups.sp)
        undo += [hook.remove for hook in random_state.ForwardSeed(seed, groups.dp.rank, self).attach(module)]
        random_state.share(groups.sp)
        if isinstance(handle, Parallelized):
            handle.make_outputs_whole(module, self)
        if section.log_every:
            undo.append(step_log.start(self, section, groups, writers))
        if staged:
            pipeline.count_replicas(self, groups.dp)
        _announce(module, section, handle, patched())

    return __init__


def _announce(module: nn.Module, section: SequenceParallelConfig, handle: Any, patched: str) -> None:
    by_hooks = isinstance(handle, Parallelized)
    announce(
        section,
        order=handle.order if by_hooks else f"tokens {section.layout_for()}",
        devices=(_device().type,),
        dtype=dtype_of(module),
        dropout=handle.may_drop if by_hooks else True,
        attention=handle.serves_attention if by_hooks else True,
        checkpointing=True,
        patched=", ".join(part for part in (patched, handle.changed if by_hooks else "") if part),
    )


def counting_replicas(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces an engine method in which `dp_world_size` and `global_rank` mean replicas and this rank's replica."""

    @functools.wraps(upstream)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        groups: SequenceParallelGroups | None = vars(self).get(GROUPS)
        if groups is None:
            return upstream(self, *args, **kwargs)
        with _as_replicas(self, groups.dp):
            return upstream(self, *args, **kwargs)

    return method


def _route(
    module: nn.Module,
    param_dict: Mapping[str, Any],
    section: SequenceParallelConfig,
    device: Callable[[], torch.device],
) -> tuple[Callable[..., Any], SequenceParallelConfig]:
    """What hooks the module, and the section with what the module says of itself."""
    if pipeline.is_pipeline(module):
        section.refuse_automatic("a PipelineModule")
        return partial(pipeline.PipelineStage, device=device), section
    integration = integration_of(module, section)
    if integration is not None:
        size = tensor_parallel.size_of(param_dict)
        return hooked, integration.complete(module, param_dict[DEEPSPEED_SECTION], tensor_parallel_size=size)
    section.refuse_automatic(type(module).__name__)
    heads = None if section.batch else softmax_heads(module)
    if heads is not None:
        known = SequenceParallelConfig.from_deepspeed(
            {DEEPSPEED_SECTION: {"heads": heads, **param_dict[DEEPSPEED_SECTION]}}
        )
        assert known is not None
        known.check_model(heads=heads)
        return hooked, known
    return hooked, section


def _groups(module: Any, section: SequenceParallelConfig, tensor_size: int) -> SequenceParallelGroups:
    """The groups inside what DeepSpeed takes for data parallelism."""
    if pipeline.is_pipeline(module):
        return SequenceParallelGroups.build(section, module._grid.dp_groups, pipeline_stages=module.num_stages)
    if tensor_size > 1:
        section.check_world(dist.get_world_size(), autotp_size=tensor_size)
        rows = tensor_parallel.data_rows(dist.get_world_size(), tensor_size)
        return SequenceParallelGroups.build(section, rows, autotp_size=tensor_size)
    return SequenceParallelGroups.build(section)


class _Replicas:
    """A model parallel unit that knows of replicas only."""

    def __init__(self, dp: Axis) -> None:
        self._dp = dp

    def get_data_parallel_world_size(self) -> int:
        """How many replicas there are."""
        return self._dp.size

    def get_data_parallel_rank(self) -> int:
        """This rank's replica."""
        return self._dp.rank


@contextmanager
def _as_replicas(engine: Any, dp: Axis) -> Iterator[None]:
    folded = engine.dp_world_size, engine.global_rank, engine.mpu
    engine.dp_world_size, engine.global_rank, engine.mpu = dp.size, dp.rank, _Replicas(dp)
    try:
        yield
    finally:
        engine.dp_world_size, engine.global_rank, engine.mpu = folded


def _unhook(module: nn.Module) -> None:
    """Takes off what an earlier engine put on the module, so that a script may build another engine around it."""
    for undo in reversed(vars(module).pop(UNDO, [])):
        undo()


def _share_buffers(module: nn.Module, names: set[str], sp: Axis) -> None:
    """Gives all peers the first one's buffers: DeepSpeed does so for parameters only, and scripts may seed by rank."""
    if sp.size == 1:
        return
    for name, buffer in module.named_buffers():
        if name in names:
            on_device = buffer.detach().to(_device()).contiguous()
            dist.broadcast(on_device, src=sp.ranks[0], group=sp.group)
            buffer.detach().copy_(on_device)


def _device() -> torch.device:
    """Where DeepSpeed's backend takes tensors."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def device_of(arguments: Any) -> torch.device:
    """The device that an engine made with these arguments of a script is going to take for its own."""
    from deepspeed.accelerator import get_accelerator

    rank = getattr(arguments, "device_rank", None)
    return torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"]) if rank is None else rank))
