"""Megatron's optimizers over torch's Adam: state dicts that can be made before the first step, saved and loaded.

That is how Megatron runs without Apex and Transformer Engine, whose Adam counts steps per group. Torch's counts them
per parameter, which upstream's distributed optimizer does not survive: making its state dict fails before the first
step, loading misses ``step``, and one tensor of it is then shared by all parameters, each of which counts it up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch

DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"
_WHOLE = "megatron.core.optimizer.optimizer"


def patches() -> tuple[Patch, ...]:
    """The ways in and out of Megatron's three optimizers; none where Apex or Transformer Engine is there."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return ()

    def patch(target: str, make: Callable[[Any], object], *parameters: str) -> Patch:
        name = target.rpartition(":")[2]
        return Patch(f"megatron optimizer: {name}", target, DISTRIBUTION, SUPPORTED, make, parameters)

    owner = f"{DISTRIBUTED}:DistributedOptimizer"
    return (
        patch(f"{owner}.state_dict", _state_dict),
        patch(f"{owner}.load_state_dict", _load_distributed, "state_dict"),
        patch(f"{owner}._set_main_param_and_optimizer_states", _set_states, "model_param", "tensors"),
        patch(f"{_WHOLE}:FP32Optimizer.sharded_state_dict", _from_the_start, "model_sharded_state_dict"),
        patch(f"{_WHOLE}:FP32Optimizer.load_state_dict", functools.partial(_load_whole, False), "state_dict"),
        patch(
            f"{_WHOLE}:Float16OptimizerWithFloat16Params.sharded_state_dict",
            _from_the_start,
            "model_sharded_state_dict",
        ),
        patch(
            f"{_WHOLE}:Float16OptimizerWithFloat16Params.load_state_dict",
            functools.partial(_load_whole, True),
            "state_dict",
        ),
    )


def _state_dict(upstream: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(upstream)
    def state_dict(self: Any) -> dict[str, Any]:
        """Upstream's content, with step 0 where there has been none, or where this rank holds no parameter."""
        inner = self.optimizer.state_dict()
        steps = {float(state["step"]) for state in inner["state"].values() if "step" in state}
        assert len(steps) <= 1, f"parameters have taken different numbers of steps: {sorted(steps)}"
        step = steps.pop() if steps else 0.0
        groups = [
            {**{name: value for name, value in group.items() if name != "params"}, "step": step}
            for group in inner["param_groups"]
        ]
        others = {name: value for name, value in inner.items() if name not in ("state", "param_groups")}
        content: dict[str, Any] = {"optimizer": {**others, "param_groups": groups}}
        if self.grad_scaler:
            content["grad_scaler"] = self.grad_scaler.state_dict()
        return content

    return state_dict


def _load_distributed(upstream: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(upstream)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        upstream(self, state_dict)
        _count_apart(self.optimizer.state.values())

    return load_state_dict


def _set_states(upstream: Callable[..., Any]) -> Callable[..., Any]:
    # Not every caller turns gradients off, and main weights in fp32 are views of the model's.
    @functools.wraps(upstream)
    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, place = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        # Set from the param groups before; what `tensors` may have of it is from before the load.
        upstream(self, model_param, {**tensors, "step": state["step"]} if "step" in state else tensors)

    return _set_main_param_and_optimizer_states


def _from_the_start(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """States exist before the first step too, so that a checkpoint of step 0 has all that a load looks for."""

    @functools.wraps(upstream)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.init_state_fn is not None and self.optimizer is not None:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))
        return upstream(self, *args, **kwargs)

    return sharded_state_dict


def _load_whole(nested: bool, upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream stores no step where it is 0, and then leaves every parameter without one."""

    @functools.wraps(upstream)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        states = (state_dict["optimizer"] if nested and "optimizer" in state_dict else state_dict).get("state", {})
        if "common_step" not in states:
            for state in states.values():
                if "exp_avg" in state:
                    state.setdefault("step", torch.tensor(0.0))
        upstream(self, state_dict)
        if self.optimizer is not None:
            _count_apart(self.optimizer.state.values())

    return load_state_dict


def _count_apart(states: Iterable[dict[str, Any]]) -> None:
    """Gives each parameter a step of its own."""
    for state in states:
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
