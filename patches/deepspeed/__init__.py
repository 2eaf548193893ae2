"""DeepSpeed: `deepspeed.initialize` honours the ``"sequence_parallel"`` section of the user's JSON.

Sequence parallelism is folded into DeepSpeed's data parallelism: DeepSpeed averages gradients over the whole world,
which is what the gradient contract of the library asks for, and never learns that some of its data-parallel ranks hold
parts of one sample. What folding would otherwise get wrong is put right here, one module per seam: `batch` (what the
batch sizes mean), `refusals` (what cannot be combined), `engine` (groups, hooks and data loading), `checkpoint`
and `saving`, `step_log`, `same_sample` and `random_state` (what sequence peers share). `shared_memory` lets runs on CPU
be started again.

Without the section no call behaves differently.
"""

from __future__ import annotations

import functools
import warnings

from dsp_plugin.errors import PatchError
from dsp_plugin.patches.deepspeed import (
    batch,
    checkpoint,
    engine,
    initialize,
    pipeline,
    recompute,
    saving,
    shared_memory,
    step_log,
    unserved,
)
from dsp_plugin.patches.deepspeed.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch, PatchSet, applied_in_words


def _patched() -> str:
    """What this process has patched, for the line at the start."""
    return applied_in_words((*PATCHES, *recompute.PATCHES))


PATCHES = PatchSet(
    "sequence parallelism in DeepSpeed",
    (
        Patch(
            name="refuse what sequence parallelism cannot be combined with",
            target="deepspeed:initialize",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=initialize.refusing,
            parameters=("args", "model", "mpu", "config", "mesh_param", "config_params"),
        ),
        Patch(
            name="count batches in samples, not in ranks",
            target="deepspeed.runtime.config:DeepSpeedConfig._configure_train_batch_size",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=batch.folding,
            parameters=("self",),
        ),
        Patch(
            name="parallelize the module that an engine trains",
            target="deepspeed.runtime.engine:DeepSpeedEngine.__init__",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=functools.partial(engine.parallelizing, patched=_patched),
            parameters=("self", "model", "mpu", "config_class", "mesh_device"),
        ),
        Patch(
            name="give sequence peers the same samples",
            target="deepspeed.runtime.engine:DeepSpeedEngine.deepspeed_io",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=engine.counting_replicas,
            parameters=("self", "dataset", "data_sampler"),
        ),
        Patch(
            name="give sequence peers of a pipeline the same samples",
            target="deepspeed.runtime.pipe.engine:PipelineEngine._build_data_iter",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=engine.counting_replicas,
            parameters=("self", "dataset"),
        ),
        Patch(
            name="count the batches of a pipeline in samples",
            target="deepspeed.runtime.pipe.engine:PipelineEngine.__init__",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=pipeline.folding,
            parameters=("self",),
        ),
        Patch(
            name="refuse logits of a shard",
            target="deepspeed.runtime.pipe.engine:PipelineEngine.eval_batch",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=pipeline.refusing_logits,
            parameters=("self", "data_iter", "return_logits", "compute_loss"),
        ),
        Patch(
            name="set the train batch size in samples",
            target="deepspeed.runtime.engine:DeepSpeedEngine.set_train_batch_size",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=engine.counting_replicas,
            parameters=("self", "train_batch_size"),
        ),
        Patch(
            name="set the micro batch size in samples",
            target="deepspeed.runtime.engine:DeepSpeedEngine.set_train_micro_batch_size",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=engine.counting_replicas,
            parameters=("self", "micro_batch_size"),
        ),
        Patch(
            name="save checkpoints that may be cut anywhere, with a record of how they were made",
            target="deepspeed.runtime.engine:DeepSpeedEngine.save_checkpoint",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=saving.saving,
            parameters=("self", "save_dir", "tag", "save_latest"),
        ),
        Patch(
            name="end decoupled saves on all ranks before one is named",
            target="deepspeed.runtime.engine:DeepSpeedEngine._commit_decoupled_checkpoint",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=saving.committing,
            parameters=("self",),
        ),
        Patch(
            name="check checkpoints, and run nothing that is in them",
            target="deepspeed.runtime.engine:DeepSpeedEngine.load_checkpoint",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=checkpoint.checking,
            parameters=("self", "load_dir", "tag", "load_optimizer_states", "load_module_only"),
        ),
        Patch(
            name="log losses",
            target="deepspeed.runtime.engine:DeepSpeedEngine.backward",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=step_log.collecting,
        ),
        Patch(
            name="log steps",
            target="deepspeed.runtime.engine:DeepSpeedEngine.step",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=step_log.stepping,
        ),
        Patch(
            name="leave no shared memory behind",
            target="deepspeed.comm.torch:TorchBackend.__init__",
            distribution=DISTRIBUTION,
            supported=SUPPORTED,
            make=shared_memory.unnaming,
            parameters=("self",),
        ),
    ),
)


def install() -> None:
    """Patches an imported DeepSpeed. Idempotent.

    Raises:
        PatchError: this DeepSpeed is not one that the patches fit; it is left as it was.
    """
    PATCHES.apply()
    unserved.refusal().revert()


def install_where_it_fits() -> None:
    """`install` on a DeepSpeed that the patches fit; on any other nothing changes but that our section is refused."""
    try:
        install()
    except PatchError as error:
        try:
            unserved.refusal(error).apply()
        except PatchError:
            warnings.warn(f'a "sequence_parallel" section would be passed over: {error}', RuntimeWarning, stacklevel=2)


def uninstall() -> None:
    """Puts DeepSpeed back as it was.

    Raises:
        PatchError: something else has wrapped what was patched; nothing is undone then.
    """
    PATCHES.revert()
    unserved.refusal().revert()
