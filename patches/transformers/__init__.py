"""HF Transformers: causal language models shard their sequence as they are, told by nothing but a method and a size.

What a model family has to do with it is what Transformers asks of all families alike: attention is called through the
attention interface (`attention`), the loss through `PreTrainedModel.loss_function` (`loss`), and forward takes the
batch by the names that Transformers gives it (`inputs`). Each is changed on one model and on nothing else.

What callers see:

* whole batches go in, as without the plugin: labels unshifted, positions filled in;
* with labels, ``loss`` is the loss of the whole sequence, on every rank; ``logits`` are those of this rank's tokens,
  since whole ones would be P times as large and most scripts never look;
* without labels, ``logits`` are whole.
"""

from __future__ import annotations

from torch import nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.methods import METHODS
from dsp_plugin.patches.transformers.causal_lm import ShardedCausalLM
from dsp_plugin.patches.transformers.checks import check_described, checked_section
from dsp_plugin.patches.transformers.wrapped import model_in
from dsp_plugin.sharding.integrations import Integration, enter

__all__ = ["ShardedCausalLM", "check_described", "checked_section", "serves"]


def serves(module: nn.Module, config: SequenceParallelConfig) -> bool:
    """Whether the section leaves it to us how to shard ``module``, or the model of Transformers that it wraps."""
    described = config.batch or config.plan is not None or METHODS[config.method].kind == "switch"
    return not described and model_in(module) is not None


enter("transformers", Integration(serves, checked_section, ShardedCausalLM, check_described))
