"""Which model a plan was asked for."""

from __future__ import annotations

from torch import nn

from dsp_plugin.errors import SequenceParallelConfigError


def sizes_of(module: nn.Module, kind: str, reference: str) -> tuple[int, int]:
    """Attention heads of a diffusers model, and the pixels times channels that it gives back for a token.

    Args:
        kind: the name of its class.
        reference: of the plan that asks, for the error.

    Raises:
        SequenceParallelConfigError: ``module`` is of another class.
    """
    # By name, not by class: the class is the user's to import.
    if kind not in (known.__name__ for known in type(module).__mro__):
        raise SequenceParallelConfigError(
            setting="plan",
            value=reference,
            why=f"is the plan of a {kind}, not of a {type(module).__name__}",
            remedy=f'leave "plan" out: inside of other modules a {kind} is found by its class',
        )
    # Not an nn.Linear under low-rank adapters.
    pixels = module.get_submodule("proj_out").out_features
    return int(module.config["num_attention_heads"]), int(pixels)  # type: ignore[index, arg-type]
