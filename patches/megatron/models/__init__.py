"""Models on Megatron-core's layers: video and vision transformers by DSP, linear attention for its GPT."""
