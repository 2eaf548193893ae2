"""Transformers' Trainer, beyond what it asks accelerate: what one rank does, and which logits an evaluation needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dsp_plugin.patches import accelerate
from dsp_plugin.patches.accelerate.replicas import folded, writes_here
from dsp_plugin.patches.patch import Patch, PatchSet
from dsp_plugin.patches.transformers.seams import DISTRIBUTION, SUPPORTED, TESTED
from dsp_plugin.patches.transformers.whole_logits import nobody_reads


def of_one_rank(upstream: property, on_each_node: str) -> property:
    """Replaces ``TrainingArguments.should_log`` and ``should_save``: not of all ranks that are process 0.

    Args:
        on_each_node: the argument by which the first rank of every node is asked for.
    """

    @functools.wraps(upstream.fget)  # type: ignore[arg-type]
    def should(self: Any) -> bool:
        one = folded() is None or getattr(self, on_each_node) or dist.get_rank() == 0
        return one and upstream.__get__(self)

    return property(should)


def world_zero(upstream: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Replaces ``Trainer.is_world_process_zero``."""

    @functools.wraps(upstream)
    def is_world_process_zero(self: Any) -> bool:
        return upstream(self) and (folded() is None or dist.get_rank() == 0)

    return is_world_process_zero


def saving_random_state(upstream: Callable[..., None]) -> Callable[..., None]:
    """Replaces ``Trainer._save_rng_state``, which writes what peers have alike into a file by the process's number."""

    @functools.wraps(upstream)
    def _save_rng_state(self: Any, output_dir: str) -> None:
        if writes_here():
            upstream(self, output_dir)

    return _save_rng_state


def counting_operations(upstream: Callable[[Any], None]) -> Callable[[Any], None]:
    """Replaces ``Trainer.store_flos``, which adds up what every rank counted, each for whole samples."""

    @functools.wraps(upstream)
    def store_flos(self: Any) -> None:
        groups = folded()
        if groups is not None:
            self.current_flos /= groups.sp.size
        upstream(self)

    return store_flos


def predicting(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``Trainer.prediction_step``, which looks at the logits also where it drops them."""

    @functools.wraps(upstream)
    def prediction_step(
        self: Any, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if not prediction_loss_only:
            return upstream(self, model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        with nobody_reads():
            return upstream(self, model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    return prediction_step


def _patch(name: str, target: str, make: Callable[[Any], Any], *parameters: str) -> Patch:
    return Patch(name, f"transformers.{target}", DISTRIBUTION, SUPPORTED, make, parameters, tested=TESTED)


ARGUMENTS = PatchSet(
    "sequence parallelism in Transformers' TrainingArguments",
    (
        *(
            _patch(
                f"{what} from one rank",
                f"training_args:TrainingArguments.should_{what}",
                functools.partial(of_one_rank, on_each_node=f"{what}_on_each_node"),
            )
            for what in ("log", "save")
        ),
    ),
)
PATCHES = PatchSet(
    "sequence parallelism in Transformers' Trainer",
    (
        _patch("have one world process zero", "trainer:Trainer.is_world_process_zero", world_zero),
        _patch(
            "write the random state of a process once",
            "trainer:Trainer._save_rng_state",
            saving_random_state,
            "output_dir",
        ),
        _patch("count the operations of each sample once", "trainer:Trainer.store_flos", counting_operations),
        _patch(
            "gather logits where they are kept",
            "trainer:Trainer.prediction_step",
            predicting,
            "model",
            "inputs",
            "prediction_loss_only",
            "ignore_keys",
        ),
    ),
)


def install_arguments() -> None:
    """Patches an imported ``transformers.training_args``, where accelerate is patched."""
    if accelerate.PATCHES.applied:
        ARGUMENTS.apply()


def install() -> None:
    """Patches an imported ``transformers.trainer``, where accelerate is patched."""
    if accelerate.PATCHES.applied:
        PATCHES.apply()
