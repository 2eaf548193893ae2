"""What ``"method": "auto"`` comes to, once shapes are known: alike on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

from dsp_plugin.config.automatic import AUTO
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.integers import integer_of
from dsp_plugin.planner.arrangement import Arrangement, Framework
from dsp_plugin.planner.choice import illegal, methods_of_size
from dsp_plugin.planner.cluster import DEFAULT_PRESET, PRESETS, of_size
from dsp_plugin.planner.shapes import Shapes
from dsp_plugin.planner.time_model import time_of

DEFAULT_LENGTH = 1 << 17
"""Tokens of the sequences to choose for, where a model does not say how many it was made for."""


def method_for(
    shapes: Shapes,
    section: Mapping[str, Any],
    *,
    world_size: int,
    tensor: int = 1,
    framework: Framework = "deepspeed",
) -> dict[str, Any]:
    """``section`` with the method and the sizes of the fastest way to share a sequence among ``size`` ranks.

    A function of its arguments and of the ranks of a node (``LOCAL_WORLD_SIZE``, as launchers set it; without it all
    are on one). Links and devices are those of the planner's default cluster. Sequences are as long as the model was
    made for.

    Args:
        section: whose method is ``"auto"``; legal otherwise.
        world_size: all ranks.
        tensor: TP.

    Raises:
        SequenceParallelConfigError: no method serves so many ranks.
    """
    size, node = int(section["size"]), integer_of("LOCAL_WORLD_SIZE", world_size)
    cluster = of_size(PRESETS[DEFAULT_PRESET], world_size, node if world_size % node == 0 else world_size)
    length = max(shapes.positions or DEFAULT_LENGTH, 2 * size)
    memory = section.get("memory")
    rounds = memory.get("attention_rounds", 1) if isinstance(memory, Mapping) else 1
    legal: dict[Arrangement, float] = {}
    reasons: list[str] = []
    for method, ulysses in methods_of_size(size):
        how = Arrangement(
            framework, world_size, cluster.node, method, ulysses, size // ulysses, tensor, stage=1, recompute="full"
        )
        if rounds != 1 and (ulysses == 1 or method not in ("ulysses", "usp")):
            continue
        if section.get("layout", AUTO) not in (AUTO, how.layout):
            continue
        against = illegal(shapes, how, length)
        reasons += against
        if not against:
            legal[how] = time_of(shapes, how, length, cluster).step
    if not legal:
        raise SequenceParallelConfigError(
            setting="method",
            value=AUTO,
            why=f"no method serves size={size}: {' '.join(dict.fromkeys(reasons))}",
            remedy="set another size, or drop layout and memory.attention_rounds",
        )
    # Of what is about as fast the simplest: they are in that order.
    best = min(legal, key=lambda how: (-round(-log(legal[how]) * 100), list(legal).index(how)))
    found = {**section, "method": best.method}
    if best.method == "usp":
        found |= {"ulysses_size": best.ulysses, "ring_size": best.ring}
    return found
