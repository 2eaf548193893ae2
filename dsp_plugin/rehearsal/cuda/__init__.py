"""CUDA's and NCCL's rules on a machine without a GPU: fake `cuda` tensors, and what a device would be asked for."""
