"""One way to train a model on a cluster: what the planner's alternatives are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dsp_plugin.config.memory import MemoryConfig
from dsp_plugin.layout import LayoutKind
from dsp_plugin.methods import METHODS

Framework = Literal["deepspeed", "megatron"]
Recompute = Literal["full", "keep_attention", "none"]


@dataclass(frozen=True)
class Arrangement:
    """How ranks share a step, and what they do for memory. Ranks of an axis are adjacent in the order of `axes`.

    Attributes:
        framework: whose states and whose parallel axes.
        ranks: of the whole world.
        node: ranks of one node.
        method: of `METHODS`, for softmax attention; with one rank to a sequence it sends nothing.
        ulysses: U. ring: R; ``U * R`` ranks share a sequence.
        tensor: TP. pipeline: PP.
        stage: of ZeRO, 0 to 3; on Megatron-core 1 means the distributed optimizer, and there are no others.
        recompute: what activation checkpointing does, ``none`` being without.
        memory: what a step trades for memory.
        micro_batches: sequences that a replica takes one after another in a step.
        order: of the tokens; None for what the framework would take.
        element_size: bytes of an activation on the wire; memory is that of training in bf16 in any case.
    """

    framework: Framework
    ranks: int
    node: int
    method: str
    ulysses: int = 1
    ring: int = 1
    tensor: int = 1
    pipeline: int = 1
    stage: int = 0
    recompute: Recompute = "full"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    micro_batches: int = 1
    order: LayoutKind | None = None
    element_size: int = 2

    @property
    def size(self) -> int:
        """P."""
        return self.ulysses * self.ring

    @property
    def replicas(self) -> int:
        """Sequences that are trained at the same time."""
        return self.ranks // (self.size * self.tensor * self.pipeline)

    @property
    def sharing(self) -> int:
        """Ranks with the same part of the weights, over which gradients are averaged and ZeRO shards."""
        return self.ranks // (self.tensor * self.pipeline)

    @property
    def layout(self) -> LayoutKind:
        """The order of the tokens; where none is asked for, Megatron-core's own is zigzag."""
        if self.order is not None:
            return self.order
        legal = METHODS[self.method].layouts
        return "zigzag" if self.framework == "megatron" and "zigzag" in legal else legal[0]

    def describe(self) -> str:
        """In words, for tables and messages."""
        parts = [f"{self.method} {self.ulysses} x {self.ring}"]
        parts += [f"TP {self.tensor}"] if self.tensor > 1 else []
        parts += [f"PP {self.pipeline}"] if self.pipeline > 1 else []
        parts.append(self.states)
        return ", ".join(parts)

    @property
    def states(self) -> str:
        """Who shards weights, gradients and optimizer states."""
        if self.framework == "deepspeed":
            return f"ZeRO {self.stage}"
        return "distributed optimizer" if self.stage else "whole optimizer"
