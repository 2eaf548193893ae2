"""Models that another library's own interfaces shard, by a method and a size: who serves them enters here.

An integration enters itself when it is imported, which `dsp_plugin.patches.autoload` sees to once the library that it
serves is. So whoever shards a model, `parallelize` or a framework's engine, finds it without knowing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.plans.plan import known_plan


class Sharded(Protocol):
    """What is in place on one model; as text, what was changed of the library that it is from.

    Attributes:
        may_drop: whether its attention may drop.
    """

    may_drop: bool

    def remove(self) -> None:
        """Leave the model as it was."""

    def aside(self) -> bool:
        """Whether the model now computes whole sequences by itself, which peers may not do at all."""

    def generated(self) -> bool:
        """Whether it has computed by itself what peers may train on, each of which has computed it, too."""

    def make_logits_whole(self, model: nn.Module, engine: nn.Module | None = None) -> None:
        """Have outputs beside a loss whole where they are read; see `Parallelized.make_outputs_whole`."""


class Complete(Protocol):
    """See `Integration.complete`."""

    def __call__(
        self, model: Any, section: Mapping[str, Any], tensor_parallel_size: int = 1
    ) -> SequenceParallelConfig: ...


@dataclass(frozen=True)
class Integration:
    """How models of one library are sharded.

    Attributes:
        serves: whether the config leaves it to the integration how to shard a module. Imports nothing.
        complete: the settings that a user gave, with those that follow from the model; refuses what cannot be sharded.
        shard: puts in place what `complete` returned.
        check_described: refuses a config that describes a model of the library as it is not; passes over any other.
    """

    serves: Callable[[nn.Module, SequenceParallelConfig], bool]
    complete: Complete
    shard: Callable[[Any, SequenceParallelConfig, SequenceParallelGroups], Sharded]
    check_described: Callable[[Any, SequenceParallelConfig], None]


_entered: dict[str, Integration] = {}


def enter(library: str, integration: Integration) -> None:
    """Have an integration asked about every module that is sharded from now on; again, in place of the one before."""
    _entered[library] = integration


def integration_of(module: nn.Module, config: SequenceParallelConfig) -> Integration | None:
    """Who serves ``module`` under ``config``; None where the config or a known plan says how to shard it.

    Raises:
        SequenceParallelConfigError: the config describes it as it is not.
    """
    for integration in _entered.values():
        if integration.serves(module, config) and known_plan(module) is None:
            return integration
    for integration in _entered.values():
        integration.check_described(module, config)
    return None
