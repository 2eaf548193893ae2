"""Hugging Face accelerate, and with it Transformers' Trainer and TRL: their processes are our replicas.

The ``"sequence_parallel"`` section of the DeepSpeed config that `DeepSpeedPlugin` or `TrainingArguments` read is all
that a script gives; without DeepSpeed, the section that the run was told (`dsp_plugin.config.told`). `replicas` says
what a process is, `operations` what is sent between processes, `prepared` which models are sharded. Without a section
no call behaves differently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dsp_plugin.config.schema import DEEPSPEED_SECTION
from dsp_plugin.config.told import told
from dsp_plugin.errors import PatchError
from dsp_plugin.patches.accelerate import operations, prepared, replicas
from dsp_plugin.patches.accelerate.versions import DISTRIBUTION, SUPPORTED, TESTED
from dsp_plugin.patches.patch import Patch, PatchSet


def _patch(name: str, target: str, make: Callable[[Any], Any], *parameters: str) -> Patch:
    return Patch(name, f"accelerate.{target}", DISTRIBUTION, SUPPORTED, make, parameters, tested=TESTED)


PATCHES = PatchSet(
    "sequence parallelism in accelerate",
    (
        _patch(
            "read the section of a DeepSpeed config",
            "utils.deepspeed:HfDeepSpeedConfig.__init__",
            replicas.reading_config,
            "self",
        ),
        _patch(
            "take DeepSpeed's ranks on CPUs for one world",
            "state:PartialState._prepare_backend",
            replicas.choosing_backend,
            "cpu",
            "sagemaker_dp",
            "backend",
        ),
        _patch("count replicas as processes", "state:PartialState.__init__", replicas.starting, "self"),
        _patch("count ranks as processes again", "state:PartialState._reset_state", replicas.resetting),
        _patch(
            "refuse a second way to share sequences",
            "state:AcceleratorState.__init__",
            replicas.configuring,
            "parallelism_config",
        ),
        _patch("have one main process", "state:PartialState.is_main_process", replicas.main_process),
        _patch("have one last process", "state:PartialState.is_last_process", replicas.last_process),
        _patch("wait for all ranks", "state:PartialState.use_distributed", replicas.several_processes),
        _patch(
            "write the state of a process once",
            "accelerator:save_accelerator_state",
            replicas.writing_state,
            "output_dir",
        ),
        _patch("gather from replicas", "utils.operations:_gpu_gather", operations.gathering, "tensor"),
        _patch(
            "gather objects from replicas",
            "utils.operations:_gpu_gather_object",
            operations.gathering_objects,
            "object",
        ),
        *(
            _patch("reduce over replicas", f"{module}:reduce", operations.reducing, "tensor", "reduction", "scale")
            for module in ("utils.operations", "utils", "accelerator")
        ),
        _patch("broadcast from a replica", "utils.operations:_gpu_broadcast", operations.broadcasting, "data", "src"),
        *(
            _patch(
                "broadcast objects from a replica",
                f"{module}:broadcast_object_list",
                operations.broadcasting_objects,
                "object_list",
                "from_process",
            )
            for module in ("utils.operations", "utils")
        ),
        _patch(
            "dispatch batches from one rank",
            "data_loader:DataLoaderDispatcher._fetch_batches",
            operations.fetching,
            "iterator",
        ),
        _patch("shard models", "accelerator:Accelerator.prepare_model", prepared.preparing, "model"),
        _patch("shard models of FSDP2", "accelerator:Accelerator._prepare_fsdp2", prepared.preparing_fsdp2),
    ),
)


def install() -> None:
    """Patches an imported accelerate. Idempotent.

    Raises:
        PatchError: this accelerate is not one that the patches fit; it is left as it was.
    """
    PATCHES.apply()


def install_where_it_fits() -> None:
    """`install` on an accelerate that the patches fit; on any other nothing changes but that our section is refused.

    Raises:
        PatchError: they do not fit, and the run was told a section.
    """
    try:
        install()
    except PatchError as error:
        if told() is not None:
            raise
        with suppress(PatchError):
            _refusal(error).apply()


def _refusal(why: PatchError) -> Patch:
    def make(upstream: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(upstream)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            upstream(self, *args, **kwargs)
            if DEEPSPEED_SECTION in self.config:
                raise PatchError(
                    f'the config has a "{DEEPSPEED_SECTION}" section, which this accelerate cannot honour: {why}'
                )

        return __init__

    target = "accelerate.utils.deepspeed:HfDeepSpeedConfig.__init__"
    return Patch("refuse the section under an unserved accelerate", target, DISTRIBUTION, ">=0", make, ("self",))


def uninstall() -> None:
    """Puts accelerate back as it was.

    Raises:
        PatchError: something else has wrapped what was patched; nothing is undone then.
    """
    PATCHES.revert()
