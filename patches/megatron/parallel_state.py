"""`megatron.core.parallel_state`: our axes beside Megatron's own, made and destroyed with them.

Adds ``get_{ulysses,ring,dsp,lasp}_parallel_{group,world_size,rank}``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.config.start_line import BY_PLAN, announce
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.patches import cpu
from dsp_plugin.patches.megatron.state import MegatronState, attending, hierarchy, order_of
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch

logger = logging.getLogger(__name__)

AXES = ("ulysses", "ring", "dsp", "lasp")
_MODULE = "megatron.core.parallel_state"
_STATE = "_SEQUENCE_PARALLEL_STATE"


def registered_state() -> MegatronState | None:
    """The state that `patches` registered on Megatron's module; None where there is none."""
    return getattr(sys.modules.get(_MODULE), _STATE, None)


def patches(state: MegatronState) -> tuple[Patch, ...]:
    """The state itself, its making and unmaking, and three functions for each axis."""

    def patch(
        name: str, make: Callable[[Any], object], parameters: tuple[str, ...] = (), creates: bool = False
    ) -> Patch:
        return Patch(
            f"megatron groups: {name}", f"{_MODULE}:{name}", DISTRIBUTION, SUPPORTED, make, parameters, creates
        )

    accessors = [
        patch(f"get_{axis}_parallel_{what}", functools.partial(_accessor, state, axis, what), creates=True)
        for axis in AXES
        for what in ("group", "world_size", "rank")
    ]
    return (
        patch(_STATE, lambda _: state, creates=True),
        patch(
            "initialize_model_parallel",
            functools.partial(_initialize, state),
            (
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "context_parallel_size",
                "hierarchical_context_parallel_sizes",
            ),
        ),
        patch("destroy_model_parallel", functools.partial(_destroy, state)),
        *accessors,
    )


def _initialize(state: MegatronState, upstream: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        sizes = call.arguments
        config = state.configure(
            sizes["context_parallel_size"],
            tensor_model_parallel_size=sizes["tensor_model_parallel_size"],
            pipeline_model_parallel_size=sizes["pipeline_model_parallel_size"],
        )
        if config.size > 1:
            ours, given = hierarchy(config), sizes["hierarchical_context_parallel_sizes"]
            if given and list(given) != ours:
                raise SequenceParallelConfigError(
                    setting="hierarchical_context_parallel_sizes",
                    value=list(given),
                    why=f"the plugin makes Megatron's hierarchical groups of ulysses_size={config.ulysses_size} and "
                    f"ring_size={config.ring_size} ranks, {config.ulysses_order}: {ours}",
                    remedy="drop --hierarchical-context-parallel-sizes, or make them agree",
                )
            sizes["hierarchical_context_parallel_sizes"] = ours
        else:
            logger.warning("--sp-method %s has nothing to do: context_parallel_size is 1", config.method)
        upstream(*call.args, **call.kwargs)
        state.adopt(config, sys.modules[_MODULE])
        if config.size > 1:
            _announce(state, config)

    return initialize_model_parallel


def _announce(state: MegatronState, config: SequenceParallelConfig) -> None:
    """Says on the first rank that the plugin is at work. No model is built yet, nor its dtype known."""
    served = config.method in attending()
    announce(
        config,
        # Models with tokens of their own, such as the vision transformer, cut them in their own order.
        order=f"batches of text {order_of(config)}" if served else BY_PLAN,
        devices=("cuda" if torch.cuda.is_available() and not cpu.torch_patches().applied else "cpu",),
        attention=served,
        checkpointing=True,
        patched=state.patched,
    )


def _destroy(state: MegatronState, upstream: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(upstream)
    def destroy_model_parallel(*args: Any, **kwargs: Any) -> None:
        upstream(*args, **kwargs)
        state.clear()

    return destroy_model_parallel


def _accessor(state: MegatronState, axis: str, what: str, upstream: None) -> Callable[[], Any]:
    def accessor() -> Any:
        assert axis in state.process_groups, f"{axis} parallel group is not initialized"
        group = state.process_groups[axis]
        return {"group": lambda: group, "world_size": group.size, "rank": group.rank}[what]()

    accessor.__name__ = accessor.__qualname__ = f"get_{axis}_parallel_{what}"
    accessor.__doc__ = f"The {axis} axis of the sequence-parallel ranks: {what.replace('_', ' ')}."
    return accessor
