"""accelerate's state: a process, as far as data goes, is a replica, of which several ranks hold parts.

accelerate, Transformers' Trainer and TRL ask one object how many processes there are and which one this is, and derive
from it what each reads, how many samples a step has, what a sum over processes means. Told of replicas they come out
right by themselves: sequence peers read the same samples, sizes and steps count samples, metrics count each sample
once. What is done by one process alone, such as writing a file, remains with one rank.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsp_plugin.config.schema import DEEPSPEED_SECTION, SequenceParallelConfig
from dsp_plugin.config.told import OPTION, VARIABLE, refuse_beside_deepspeed, told
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.training.randomness import share_generators


@dataclass
class _Folding:
    """What is so until accelerate's state is reset.

    Attributes:
        section: of the DeepSpeed config that was read last.
        groups: by which its processes are replicas. Not in its state, which scripts save with their arguments.
    """

    section: SequenceParallelConfig | None = None
    groups: SequenceParallelGroups | None = None


_now = _Folding()


def folded() -> SequenceParallelGroups | None:
    """The groups by which accelerate's processes are replicas; None where they are ranks."""
    return _now.groups


def first_rank() -> bool:
    """Whether this is the one rank that does what one process alone does; True wherever processes are ranks."""
    return folded() is None or not dist.is_initialized() or dist.get_rank() == 0


def writes_here() -> bool:
    """Whether this rank writes what each process writes, in a name that has its number: one of a replica on a node."""
    groups = folded()
    return groups is None or groups.sp.rank == 0 or int(os.environ.get("LOCAL_RANK", 0)) == 0


def reading_config(upstream: Callable[..., None]) -> Callable[..., None]:
    """Replaces ``HfDeepSpeedConfig.__init__``, which reads the config for accelerate and, by inheritance, the Trainer.

    Raises:
        SequenceParallelConfigError: the section is none, or another than that of a config that was read before, or the
            run was told one.
        UnsupportedError: AutoTP beside it.
    """

    @functools.wraps(upstream)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        upstream(self, *args, **kwargs)
        section = SequenceParallelConfig.from_deepspeed(self.config)
        refuse_beside_deepspeed(self.config)
        if section is None:
            return
        _check_beside(section, self.config)
        _now.section = section
        _fold()

    return __init__


def choosing_backend(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``PartialState._prepare_backend``, which takes ranks of DeepSpeed on CPUs for processes that are alone.

    Every one would then train on all samples; with or without a section, DeepSpeed's ranks are one world. So are those
    of a run that was told a section, of which accelerate expects to be told that they are on CPUs.
    """

    @functools.wraps(upstream)
    def _prepare_backend(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> Any:
        from accelerate.utils import DistributedType

        found = upstream(self, cpu, sagemaker_dp, backend)
        by_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        ranks = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
        if found[1] == DistributedType.NO and (by_deepspeed or told() is not None) and ranks > 1:
            return "gloo", DistributedType.MULTI_CPU
        return found

    return _prepare_backend


def starting(upstream: Callable[..., None]) -> Callable[..., None]:
    """Replaces ``PartialState.__init__``: what was read or told before there was a world folds the world now."""

    @functools.wraps(upstream)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        upstream(self, *args, **kwargs)
        _fold()

    return __init__


def resetting(upstream: staticmethod) -> staticmethod:
    """Replaces ``PartialState._reset_state``, by which every `TrainingArguments` begins."""
    reset = upstream.__func__

    @functools.wraps(reset)
    def _reset_state() -> None:
        _now.section = _now.groups = None
        reset()

    return staticmethod(_reset_state)


def configuring(upstream: Callable[..., None]) -> Callable[..., None]:
    """Replaces ``AcceleratorState.__init__``.

    Raises:
        SequenceParallelConfigError: accelerate's own parallelism config shares sequences, or layers, too.
        UnsupportedError: the run was told a section, and models are to be wrapped in what `parallelize` does not serve.
    """

    @functools.wraps(upstream)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        upstream(self, *args, **kwargs)
        if folded() is None:
            return
        _refuse_sizes(vars(self).get("parallelism_config"))
        if told() is not None:
            _refuse_wrappers(vars(self))

    return __init__


def main_process(upstream: property) -> property:
    """Replaces ``PartialState.is_main_process``: one rank is, not all that hold parts of the first samples."""
    return _of_rank(upstream, lambda rank, world_size: rank == 0)


def last_process(upstream: property) -> property:
    """Replaces ``PartialState.is_last_process``."""
    return _of_rank(upstream, lambda rank, world_size: rank == world_size - 1)


def several_processes(upstream: property) -> property:
    """Replaces ``PartialState.use_distributed``: the ranks of a single replica have to wait for each other, too."""
    return _of_rank(upstream, lambda rank, world_size: world_size > 1)


def writing_state(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``save_accelerator_state``, which writes what peers have alike into a file by the process's number."""

    @functools.wraps(upstream)
    def save_accelerator_state(output_dir: str, *args: Any, **kwargs: Any) -> Any:
        if writes_here():
            return upstream(output_dir, *args, **kwargs)
        return Path(output_dir)

    return save_accelerator_state


def _of_rank(upstream: property, answer: Callable[[int, int], bool]) -> property:
    @functools.wraps(upstream.fget)  # type: ignore[arg-type]
    def of_rank(self: Any) -> bool:
        if folded() is None or not dist.is_initialized():
            return upstream.__get__(self)
        return answer(dist.get_rank(), dist.get_world_size())

    return property(of_rank)


def _check_beside(section: SequenceParallelConfig, config: Mapping[str, Any]) -> None:
    before = _now.section
    if before is not None and before.size != section.size:
        raise SequenceParallelConfigError(
            setting="size",
            value=section.size,
            why=f"another DeepSpeed config of this process says {before.size}, and accelerate hands out samples by one",
            remedy="give the sections of all configs the same size",
        )
    if int(config.get("tensor_parallel", {}).get("autotp_size", 1) or 1) > 1:
        raise UnsupportedError(
            setting="tensor_parallel.autotp_size with sequence_parallel under accelerate",
            value=config["tensor_parallel"]["autotp_size"],
            why="accelerate numbers tensor-parallel ranks by a mesh of its own, which knows of no sequence",
            remedy="drop tensor_parallel, or call deepspeed.initialize without accelerate",
        )


def _refuse_sizes(mesh: Any) -> None:
    if told() is None:
        names: tuple[str, ...] = ("sp_size", "cp_size", "tp_size")
        source = f'the DeepSpeed config has a "{DEEPSPEED_SECTION}" section, which'
        other = f'the "{DEEPSPEED_SECTION}" section'
    else:
        # Its meshes are made of as many ranks as there are processes, which are replicas.
        names = ("sp_size", "cp_size", "tp_size", "dp_shard_size", "dp_replicate_size")
        source, other = f"the section of {OPTION} ({VARIABLE})", OPTION
    for name in names:
        size = getattr(mesh, name, None) or 1
        if size > 1:
            by_data = name.startswith("dp_")
            raise SequenceParallelConfigError(
                setting=f"ParallelismConfig.{name}",
                value=size,
                why=f"{source} alone says how ranks share a sequence"
                + (", and gradients are averaged over all ranks" if by_data else ""),
                remedy=f"drop {name} (and PARALLELISM_CONFIG_{name.upper()})"
                + (": DDP and FSDP2 go over all ranks by themselves" if by_data else f", or {other}"),
            )


def _refuse_wrappers(state: Mapping[str, Any]) -> None:
    kind = state["distributed_type"].value
    version = getattr(state.get("fsdp_plugin"), "fsdp_version", 1)
    if kind == "FSDP" and version != 2:
        raise UnsupportedError(
            setting="fsdp_version",
            value=version,
            why="FSDP1 puts parameters into flat ones, of which nothing says over which ranks their gradients are "
            "averaged",
            remedy="set fsdp_version to 2 (FSDP_VERSION=2), or leave FSDP out",
        )
    if kind not in ("FSDP", "NO") and not kind.startswith("MULTI_"):
        raise UnsupportedError(
            setting="distributed_type",
            value=kind,
            why=f"the section of {OPTION} ({VARIABLE}) is for models in DDP and FSDP2",
            remedy="choose one of these in accelerate's config",
        )


def _fold() -> None:
    from accelerate.state import AcceleratorState, PartialState

    shared = PartialState._shared_state
    section = _now.section or told()
    if section is None or "num_processes" not in shared or _now.groups is not None:
        return
    _now.groups = groups = SequenceParallelGroups.build(section)
    # accelerate's collectives are between replicas, and here all ranks are there to make their groups.
    assert groups.dp.size == 1 or groups.dp.group is not None
    for state in (shared, AcceleratorState._shared_state):
        if "num_processes" in state:
            state.update({"num_processes": groups.dp.size, "process_index": groups.dp.rank})
    # What a script draws from here on (weights, orders, noise) belongs to samples that peers share.
    share_generators(groups.sp)
