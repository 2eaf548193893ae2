"""Sequence parallelism in Megatron-core, on its own context-parallel groups.

Megatron's ``context_parallel_size`` is the sequence-parallel size; data parallelism, the distributed optimizer, loss
averaging and checkpoints then hold unchanged, because they already treat context-parallel ranks as holders of one
sequence.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any

from dsp_plugin.errors import PatchError
from dsp_plugin.patches.megatron import (
    attention,
    checkpoint,
    gated_delta_net,
    loss,
    multi_token,
    norm,
    optimizer,
    parallel_state,
    recompute,
    step_log,
    tiled_head,
    tiled_mlp,
)
from dsp_plugin.patches.megatron import layout as token_order
from dsp_plugin.patches.megatron.state import MegatronState, Settings
from dsp_plugin.patches.patch import Patch, PatchSet, applied_in_words
from dsp_plugin.patches.post_import import after_import

logger = logging.getLogger(__name__)

__all__ = ["MegatronState", "Settings", "install", "install_checkpoints", "installed", "uninstall"]


def install(
    method: str,
    *,
    ulysses_size: int | None = None,
    ring_size: int | None = None,
    layout: str = "auto",
    kernel: str = "auto",
    debug: bool = False,
    recompute: str = "full",
    ulysses_order: str = "adjacent",
    ring_gradient_dtype: str = "fp32",
    exchange: str | None = None,
    softmax_method: str | None = None,
    heads: int | None = None,
    log_every: int = 0,
    log_tensorboard: str | None = None,
    log_wandb: str | None = None,
    peak_tflops: float | None = None,
    memory: str | dict[str, Any] | None = None,
    quiet: bool = False,
) -> MegatronState:
    """Patches Megatron-core so that its context-parallel ranks run `method`; to be called before it is initialized.

    Args:
        method: a method of `dsp_plugin.methods` that serves attention, such as ``"ulysses"``. The size is Megatron's
            own ``context_parallel_size``; where that is 1, upstream's attention stays as it is.
        ulysses_size, ring_size: how that size factors; by default as the method implies.
        layout: order of the tokens. ``"auto"`` is ``"zigzag"``, as Megatron cuts batches, unless the method takes
            only ``"contiguous"``, or passes states in that order.
        kernel: local attention kernel, see `SequenceParallelConfig`.
        debug: compare ranks before each collective.
        recompute: ``"full"``, or ``"keep_attention"``: what Megatron recomputes, it recomputes without attention.
        ulysses_order, ring_gradient_dtype: see `SequenceParallelConfig`.
        exchange, softmax_method: of ``"lasp"``: how states travel, and who serves the softmax layers of the model.
        heads: query heads on one tensor-parallel rank, by which ``"usp"`` chooses sizes that are not given.
        log_every, log_tensorboard, log_wandb, peak_tflops: the step log, see `SequenceParallelConfig`.
        memory: what a step trades for memory, ``"auto"`` or a section, see `MemoryConfig`.
        quiet: no line at the start, which is otherwise printed where groups are made.

    Returns:
        What the patches share; calling again with the same settings returns the same object.

    Raises:
        SequenceParallelConfigError: the settings are illegal by themselves.
        PatchError: Megatron-core is absent, its version or a signature is unsupported, it is initialized already, or
            other settings are installed. Nothing is patched then.
    """
    settings = Settings(
        method,
        ulysses_size,
        ring_size,
        layout,
        kernel,
        debug,
        recompute,
        ulysses_order,
        ring_gradient_dtype,
        exchange,
        softmax_method,
        heads,
        log_every,
        log_tensorboard,
        log_wandb,
        peak_tflops,
        memory,
        quiet,
    )
    settings.check()
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise PatchError(
            f"--sp-method {method} needs Megatron-core, which is not installed. Install it: "
            "pip install 'dsp-plugin[megatron]'."
        )
    existing = installed()
    if existing is not None:
        if existing.settings != settings:
            raise PatchError(
                f"Megatron-core is already patched with {existing.settings}, asked for {settings}. One process has one "
                "method: call dsp_plugin.patches.megatron.uninstall() first."
            )
        return existing
    from megatron.core import parallel_state as upstream

    if upstream.model_parallel_is_initialized():
        raise PatchError(
            "Megatron-core's model-parallel groups exist already, without the plugin's. Start the script "
            "with `python -m dsp_plugin.launch`, or call dsp_plugin.patches.megatron.install before it makes them."
        )
    state = MegatronState(settings)
    token_order.refuse_early_importers(state)
    patches = _patches(state)
    patches.apply()
    state.patched = applied_in_words(patches)
    return state


def install_checkpoints() -> None:
    """Patches saving and loading alone, for runs that shard no sequence: they share checkpoints with those that do.

    What of Megatron-core is not imported yet is patched when it is. A version that the patches are not for is left as
    it is, with a warning.
    """
    for module, patches in ((checkpoint.MODULE, checkpoint.patches), (optimizer.DISTRIBUTED, optimizer.patches)):

        def apply(patches: Callable[[], tuple[Patch, ...]] = patches) -> None:
            try:
                PatchSet("checkpoints of Megatron-core", patches()).apply()
            except PatchError as error:
                logger.warning("%s", error)

        if module in sys.modules:
            apply()
        else:
            after_import(module, apply)


def installed() -> MegatronState | None:
    """What `install` returned in this process; None where it was not called, or undone."""
    return parallel_state.registered_state()


def uninstall() -> None:
    """Puts Megatron-core back as it was; does nothing where it is not patched.

    Raises:
        PatchError: something else patched the same places later and is still there.
    """
    state = installed()
    if state is not None:
        _patches(state).revert()
    for module, patches in ((checkpoint.MODULE, checkpoint.patches), (optimizer.DISTRIBUTED, optimizer.patches)):
        if module in sys.modules:
            PatchSet("checkpoints of Megatron-core", patches()).revert()


def _patches(state: MegatronState) -> PatchSet:
    return PatchSet(
        "sequence parallelism in Megatron-core",
        (
            *parallel_state.patches(state),
            *attention.patches(state),
            *token_order.patches(state),
            *gated_delta_net.patches(state),
            *norm.patches(),
            *loss.patches(state),
            *multi_token.patches(state),
            *recompute.patches(state),
            *tiled_head.patches(state),
            *tiled_mlp.patches(state),
            *step_log.patches(state),
            *checkpoint.patches(),
            *optimizer.patches(),
        ),
    )
