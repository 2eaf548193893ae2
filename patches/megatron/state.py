"""What the Megatron patches share: the user's settings, and what Megatron's initialization makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed import ProcessGroup

from dsp_plugin.comm.axis import Axis
from dsp_plugin.config.memory import MemoryConfig
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import LayoutKind
from dsp_plugin.methods import METHODS
from dsp_plugin.training.host_budget import offload_for
from dsp_plugin.training.offload import Offload, hold

Memory = MemoryConfig | Literal["auto"]
NATIVE_LAYOUT: LayoutKind = "zigzag"
# The orders in which batches and rotary embeddings can be cut: Megatron's own, and the one of patches.megatron.layout.
LAYOUTS: tuple[LayoutKind, ...] = (NATIVE_LAYOUT, "contiguous")


def servable() -> list[str]:
    """The methods that context-parallel ranks can run: those that take tokens in an order they can have."""
    return [name for name, method in METHODS.items() if any(layout in method.layouts for layout in LAYOUTS)]


def attending() -> list[str]:
    """Those that serve Megatron's attention layers; another switches dims between the layers of a model made for it."""
    return [name for name in servable() if METHODS[name].kind in ("softmax", "linear")]


def order_of(config: SequenceParallelConfig) -> LayoutKind:
    """The order of the tokens: Megatron's own where the user leaves it open and the method is no worse off for it.

    Linear attention is: it would be converted to contiguous order and back in every layer.
    """
    return config.layout_for(None if METHODS[config.method].kind == "linear" else NATIVE_LAYOUT)


@dataclass(frozen=True)
class Settings:
    """The ``--sp-*`` flags. The size is not among them: it is Megatron's ``context_parallel_size``.

    Attributes:
        heads: query heads on one tensor-parallel rank, where known before the model is built.
        memory: ``"auto"``, or the section, as JSON or parsed.
    """

    method: str
    ulysses_size: int | None = None
    ring_size: int | None = None
    layout: str = "auto"
    kernel: str = "auto"
    debug: bool = False
    recompute: str = "full"
    ulysses_order: str = "adjacent"
    ring_gradient_dtype: str = "fp32"
    exchange: str | None = None
    softmax_method: str | None = None
    heads: int | None = None
    log_every: int = 0
    log_tensorboard: str | None = None
    log_wandb: str | None = None
    peak_tflops: float | None = None
    memory: str | dict[str, Any] | None = None
    quiet: bool = field(default=False, compare=False)

    def config(self, size: int) -> SequenceParallelConfig:
        """The whole configuration for `size` context-parallel ranks.

        Raises:
            SequenceParallelConfigError: the settings are illegal, or do not fit the size.
        """
        flags = {f"sp_{name}": value for name, value in dataclasses.asdict(self).items()}
        config = SequenceParallelConfig.from_megatron(SimpleNamespace(**flags, context_parallel_size=size))
        assert config is not None
        config.refuse_automatic("a model that dsp_plugin.launch does not start")
        if order_of(config) not in LAYOUTS:
            raise SequenceParallelConfigError(
                setting="--sp-layout",
                value=config.layout,
                why=f"Megatron's batches and rotary embeddings come in {' or '.join(LAYOUTS)} order",
                remedy=f"use auto, {' or '.join(LAYOUTS)}",
            )
        return config

    def check(self) -> None:
        """Checks what can be checked before the context-parallel size is known.

        Raises:
            SequenceParallelConfigError: see `config`.
        """
        self._of_any_size()

    def layout_kind(self) -> LayoutKind:
        """The order of the tokens, which does not depend on the size."""
        return order_of(self._of_any_size())

    def memory_parts(self) -> Memory:
        """What a step trades for memory, which does not depend on the size either."""
        return self._of_any_size().memory

    def _of_any_size(self) -> SequenceParallelConfig:
        return self.config((self.ulysses_size or 1) * (self.ring_size or 1))


def hierarchy(config: SequenceParallelConfig) -> list[int]:
    """Megatron's ``hierarchical_context_parallel_sizes``: the axis of neighbouring ranks first."""
    sizes = [config.ulysses_size, config.ring_size]
    return sizes if config.ulysses_order == "adjacent" else sizes[::-1]


@dataclass
class MegatronState:
    """One per process, registered on `megatron.core.parallel_state` like Megatron's own groups.

    Attributes:
        settings: the user's flags.
        config: set by `initialize_model_parallel`, None before it and after `destroy_model_parallel`; likewise
            `groups`.
        groups: the axes that methods communicate on.
        process_groups: the group behind each registered axis, also where it has one rank.
        patched: what of Megatron-core and others is patched, in words.
        offload: where checkpoints wait, if not on the device; as long as the groups are there.
    """

    settings: Settings
    config: SequenceParallelConfig | None = None
    groups: SequenceParallelGroups | None = None
    process_groups: dict[str, ProcessGroup] = field(default_factory=dict)
    patched: str = ""
    offload: Offload | None = None
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def configure(self, context_parallel_size: int, **other_sizes: int) -> SequenceParallelConfig:
        """Validates the settings against Megatron's sizes, before any group exists.

        Raises:
            SequenceParallelConfigError: they do not fit each other or the world.
        """
        config = self.settings.config(context_parallel_size)
        if dist.is_initialized():
            try:
                config.check_world(dist.get_world_size(), **other_sizes)
            except SequenceParallelConfigError as error:
                raise SequenceParallelConfigError(f"Megatron sizes (size is context_parallel_size): {error}") from None
        return config

    def adopt(self, config: SequenceParallelConfig, upstream: Any) -> None:
        """Takes the axes from Megatron's groups.

        Args:
            config: from `configure`.
            upstream: `megatron.core.parallel_state`, initialized; for more than one context-parallel rank with
                hierarchical sizes `hierarchy(config)`.

        Raises:
            SequenceParallelConfigError: the machine has not the host memory that checkpoints may take.
        """
        sequence = upstream.get_context_parallel_group()
        ulysses, ring = sequence, sequence
        if config.size > 1:
            near, far = upstream.get_hierarchical_context_parallel_groups()
            ulysses, ring = (near, far) if config.ulysses_order == "adjacent" else (far, near)
            # One communicator, not two, where a factor spans the whole sequence group.
            ulysses = sequence if config.ring_size == 1 else ulysses
            ring = sequence if config.ulysses_size == 1 else ring
        self.config = config
        self.process_groups = {"ulysses": ulysses, "ring": ring, "dsp": sequence, "lasp": sequence}
        self.groups = SequenceParallelGroups.from_axes(
            sp=Axis.of_group("sp", sequence),
            ulysses=Axis.of_group("ulysses", ulysses),
            ring=Axis.of_group("ring", ring),
            dp=Axis.of_group("dp", upstream.get_data_parallel_group()),
            debug=config.debug,
        )
        self.offload = offload_for(config.offload, self.groups.sp)
        if self.offload is not None:
            self._undo.append(hold(self.offload))

    def clear(self) -> None:
        """Forgets the groups, as Megatron forgets its own."""
        while self._undo:
            self._undo.pop()()
        self.config = self.groups = self.offload = None
        self.process_groups = {}
