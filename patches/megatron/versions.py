"""The Megatron-core versions that these patches are for."""

DISTRIBUTION = "megatron-core"
SUPPORTED = ">=0.16.1,<0.20"
