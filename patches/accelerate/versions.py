"""The accelerate versions that these patches are for."""

DISTRIBUTION = "accelerate"
SUPPORTED = ">=1.10,<2"
TESTED = "1.15"
