"""The name by which users import the scientific ViT on Megatron-core; it does not follow the files behind it."""

from dsp_plugin.patches.megatron.models.vit import ParallelVisionTransformer, VitShape

__all__ = ["ParallelVisionTransformer", "VitShape"]
