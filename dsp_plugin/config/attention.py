"""The attention that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from dsp_plugin.config.settings import Settings
from dsp_plugin.methods import METHODS


def attention_of(config: Settings, name: str | None = None) -> Callable[..., Tensor]:
    """The attention of the configured method, with the settings that it takes from the configuration filled in.

    Args:
        name: another method's, for stages whose plan chose it.
    """
    method = METHODS[config.method if name is None else name]
    assert method.attention is not None, f"{method.name} replaces no attention"
    return partial(method.attention, **{name: getattr(config, name) for name in method.settings})
