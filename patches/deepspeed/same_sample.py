"""What a DeepSpeed script does so that sequence peers get the same samples, for the check that finds others."""

from __future__ import annotations

from dsp_plugin.comm.axis import Axis
from dsp_plugin.training.same_sample import SameSampleCheck


def same_sample_check(sp: Axis) -> SameSampleCheck:
    """The check of what an engine's module is given."""
    return SameSampleCheck(
        sp,
        "Pass the dataset as deepspeed.initialize(training_data=...) or to engine.deepspeed_io(...), or give your "
        "DataLoader batch_sampler=dsp_plugin.SequenceParallelBatchSampler(len(dataset), "
        "groups=engine.sequence_parallel_groups, global_batch_size=..., micro_batch_size=...). Noise and augmentations "
        "must be drawn equally on the ranks of one sequence, too: do not seed by global rank after "
        "deepspeed.initialize.",
    )
