"""The table of methods. Adding one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from dsp_plugin.methods import dsp, lasp, lightseq, ring, ulysses, usp
from dsp_plugin.methods.method import Method, WireBytes, Workload
from dsp_plugin.recompute import on_tape

if TYPE_CHECKING:
    from dsp_plugin.config import SequenceParallelConfig

_ALL = (dsp.METHOD, ulysses.METHOD, ring.METHOD, usp.METHOD, lightseq.METHOD, lasp.METHOD)

# Every attention answers from the tape of a checkpointed stretch, if there is one.
METHODS: dict[str, Method] = {
    method.name: replace(method, attention=on_tape(method.attention) if method.attention is not None else None)
    for method in _ALL
}


def attention_of(config: SequenceParallelConfig, name: str | None = None) -> Callable[..., Tensor]:
    """The attention of the configured method, with the settings that it takes from the configuration filled in.

    Args:
        name: another method's, for stages whose plan chose it.
    """
    method = METHODS[config.method if name is None else name]
    assert method.attention is not None, f"{method.name} replaces no attention"
    return partial(method.attention, **{name: getattr(config, name) for name in method.settings})


__all__ = ["METHODS", "Method", "WireBytes", "Workload", "attention_of"]
