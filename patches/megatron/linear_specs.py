"""The name that users give: ``--spec dsp_plugin.patches.megatron.linear_specs gated_delta_gpt``, or by import.

Scripts and command lines outside this repository have it, so it does not follow the files behind it.
"""

from dsp_plugin.patches.megatron.models.linear_specs import gated_delta_gpt, hybrid_layer_specs, linear_layer_spec

__all__ = ["gated_delta_gpt", "hybrid_layer_specs", "linear_layer_spec"]
