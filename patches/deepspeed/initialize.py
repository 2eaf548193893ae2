"""`deepspeed.initialize`: everything that cannot work is refused before DeepSpeed makes a group or a collective."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.config.told import refuse_beside_deepspeed
from dsp_plugin.patches.deepspeed.refusals import refuse_conflicts
from dsp_plugin.sharding.wrappers import unwrapped


def refusing(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces `deepspeed.initialize`; it returns what upstream returns.

    The work is done in `engine`, so an `initialize` that the script took from DeepSpeed before us works as well.
    """
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        config = _user_config(given)
        refuse_beside_deepspeed(config or {})
        if config is not None and given.get("model") is not None and SequenceParallelConfig.from_deepspeed(config):
            refuse_conflicts(config, unwrapped(given["model"]), given.get("mpu"), given.get("mesh_param"))
        return upstream(*args, **kwargs)

    return initialize


def _user_config(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config by the ways that DeepSpeed takes one; None where DeepSpeed will say itself what is wrong with it."""
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    arguments = given.get("args")
    for candidate in (
        given.get("config"),
        given.get("config_params"),
        getattr(arguments, "deepspeed_config", None),
        getattr(arguments, "deepscale_config", None),
    ):
        if candidate is not None:
            try:
                return load_ds_config(candidate)
            except ValueError:
                return None
    return None
