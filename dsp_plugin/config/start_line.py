"""The one line by which a run says, on its first rank, that the plugin is at work and how.

    dsp_plugin 0.1.0 | ulysses over 4 ranks (U 4 x R 1, adjacent) | tokens zigzag | kernel cpu_flash, else math

Whoever shards a model hands over what the settings do not say; what nobody knows at the start is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import metadata

import torch
import torch.distributed as dist
from torch import nn

from dsp_plugin.config.settings import Settings
from dsp_plugin.kernels.candidates import candidates_in_words, linear_candidates_in_words
from dsp_plugin.methods import METHODS

BY_PLAN = "dims by plan"


def announce(
    config: Settings,
    *,
    order: str,
    devices: Iterable[str],
    dtype: torch.dtype | None = None,
    dropout: bool = True,
    attention: bool = True,
    checkpointing: bool = False,
    patched: str = "",
) -> None:
    """Prints the line, on the first rank alone, and no line twice in a process; nothing with ``quiet``.

    Args:
        order: which rank holds what: ``tokens zigzag``, or `BY_PLAN`.
        devices: types of those that attention may run on.
        dtype: of the model; None where it is not known.
        dropout: whether attention may drop.
        attention: whether methods compute attention; where not, the model does.
        checkpointing: whether ``config.recompute`` holds for the model's checkpointing.
        patched: what was changed of frameworks, with versions.
    """
    if config.quiet or (dist.is_initialized() and dist.get_rank() != 0):
        return
    parts = [f"dsp_plugin {_version()}", _ranks(config), order]
    if not attention:
        parts.append("attention the model's own")
    else:
        devices = tuple(devices)
        kernel = candidates_in_words(devices, dtype, dropout) if config.kernel == "auto" else config.kernel
        # A plan names attention for stages of which no dim is free; in all others the model's own sees whole lines.
        kernel += " where a stage computes along the sharded dim" if config.kind == "switch" else ""
        if config.kind == "linear":
            parts.append(f"linear kernel {linear_candidates_in_words(devices)}")
        parts.append(f"{'softmax ' if config.kind == 'linear' else ''}kernel {kernel}")
    if checkpointing:
        # There is nothing to keep of an attention that is never looked into.
        parts.append(f"recompute {config.recompute if attention else 'full'}")
    memory = config.memory if isinstance(config.memory, str) else config.memory.in_words()
    if memory:
        parts.append(f"memory {memory}")
    if patched:
        parts.append(f"patched {patched}")
    _print_once(" | ".join(parts))


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype that it computes in, where its parameters tell: those in fp32 may be cast by autocast."""
    found = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return found.pop() if len(found) == 1 and torch.float32 not in found else None


def devices_of(module: nn.Module) -> tuple[str, ...]:
    """Types of the devices that it may run on. Scripts may move it from the CPU to CUDA, but not the other way."""
    found = {parameter.device.type for parameter in module.parameters()} - {"cpu", "meta"}
    return tuple(found) or (("cuda", "cpu") if torch.cuda.is_available() else ("cpu",))


def _version() -> str:
    try:
        return metadata.version("dsp-plugin")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _ranks(config: Settings) -> str:
    """The method, its ranks, and how they are arranged."""
    grid = f"U {config.ulysses_size} x R {config.ring_size}, {config.ulysses_order}"
    if METHODS[config.method].kind == "linear":
        grid = f"exchange {config.exchange}; softmax by {config.softmax_method}, {grid}"
    return f"{config.method} over {config.size} rank{'s' if config.size > 1 else ''} ({grid})"


@cache
def _print_once(line: str) -> None:
    print(line, flush=True)
