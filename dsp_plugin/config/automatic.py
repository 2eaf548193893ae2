"""``"method": "auto"``: what a config says until the shapes of the model tell which method it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsp_plugin.errors import SequenceParallelConfigError

AUTO = "auto"
# Of the user's settings, those that only one method has, or that describe a model without telling its shapes.
_CHOSEN = ("ulysses_size", "ring_size", "softmax_method", "exchange")
_DESCRIBING = ("batch", "plan", "attention")


def stand_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with a method that serves any heads, by which sizes can be checked before the model is known.

    Raises:
        SequenceParallelConfigError: something is set that is to be chosen, or that leaves the model's shapes open.
    """
    for key in _CHOSEN:
        if settings.get(key) is not None:
            raise SequenceParallelConfigError(
                setting=key,
                value=settings[key],
                why=f'method is "{AUTO}", which chooses it',
                remedy=f"drop {key}, or name the method",
            )
    for key in _DESCRIBING:
        if settings.get(key):
            raise SequenceParallelConfigError(
                setting="method",
                value=AUTO,
                why=f"it is chosen by a model's numbers of heads, layers and widths, and {key} does not tell them",
                remedy="name the method",
            )
    if settings.get("size") is None:
        raise SequenceParallelConfigError(
            setting="size",
            why=f'missing: method "{AUTO}" chooses how so many ranks share a sequence, not how many',
            remedy="set size to a divisor of the number of GPUs; dsp-plugin plan says which",
        )
    if settings.get("layout") == "striped":
        raise SequenceParallelConfigError(
            setting="layout",
            value="striped",
            why=f'method is "{AUTO}", and not all that it may choose take this order',
            remedy="drop layout, or name the method",
        )
    return {**settings, "method": "usp", "ulysses_size": 1, "ring_size": settings["size"]}
