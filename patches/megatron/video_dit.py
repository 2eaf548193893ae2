"""The name by which users import the video transformer on Megatron-core; it does not follow the files behind it."""

from dsp_plugin.patches.megatron.models.video_dit import ParallelVideoDiT, VideoShape

__all__ = ["ParallelVideoDiT", "VideoShape"]
