"""The DeepSpeed versions that these patches are for."""

DISTRIBUTION = "deepspeed"
SUPPORTED = ">=0.19,<0.20"
