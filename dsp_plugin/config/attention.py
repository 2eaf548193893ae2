"""The attention that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from dsp_plugin.config.settings import Settings
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import METHODS


def attention_of(config: Settings, name: str | None = None) -> Callable[..., Any]:
    """The attention of the configured method, with what it takes from the configuration filled in.

    Args:
        name: another method's, for stages whose plan chose it.

    Returns:
        For softmax methods ``attention(q, k, v, what=AttentionSpec, where=Where)``, on the configured kernel where the
        spec names none; for linear ones as `dsp_plugin.methods.lasp.attention`.
    """
    method = METHODS[config.method if name is None else name]
    assert method.attention is not None, f"{method.name} replaces no attention"
    configured = partial(method.attention, **{setting: getattr(config, setting) for setting in method.settings})
    if method.kind == "linear":
        return configured

    def attention(q: Tensor, k: Tensor, v: Tensor, *, what: AttentionSpec, **where: Any) -> Tensor:
        kernel = config.kernel if what.kernel == "auto" else what.kernel
        return configured(q, k, v, what=replace(what, kernel=kernel), **where)

    return attention
