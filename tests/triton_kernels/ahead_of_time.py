"""Compiles our Triton kernels for a GPU by the assembler that Triton brings; no GPU is needed."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch

from dsp_plugin.kernels import triton_launch
from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.kernels.kernel import BlockSpec

# Bytes that a block may have on compute capability 8.6, 8.9 and 12.0.
LEAST_SHARED = 99 * 1024
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Case(NamedTuple):
    """A kernel, the head dim and dtype of its inputs, and the compute capability that it is compiled for."""

    kernel: str
    dim: int
    dtype: torch.dtype
    capability: int

    def __str__(self) -> str:
        return f"{self.kernel}-{self.dim}-{str(self.dtype).removeprefix('torch.')}-sm{self.capability}"


CASES = [
    *map(Case._make, product(("forward", "dq", "dkv"), (64, 128, 256), (torch.bfloat16, torch.float32), (80, 90))),
    Case("merge", 64, torch.bfloat16, 80),
]
FEW = [case for case in CASES if case[1:] == (64, torch.bfloat16, 80)]


def shared_memory(case: Case) -> int:
    """The bytes of shared memory that the compiled kernel takes; causal, with dropout."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, given = _told(case)
    options = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[(index,)] = "constexpr", given[name]
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        elif name in given:
            signature[name] = "fp32" if isinstance(given[name], float) else "i32"
        else:
            fp32 = name in ("lse", "delta", "block_lse") or (case.kernel == "merge" and name == "out")
            stride = name[-2:] in ("_b", "_n", "_h")
            signature[name] = "i32" if stride else "*fp32" if fp32 else _POINTERS[case.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", case.capability, 32), options=options)
    return int(compiled.metadata.shared)


def _told(case: Case) -> tuple[Any, dict[str, Any]]:
    from dsp_plugin.kernels import triton_backward, triton_forward, triton_merge_kernel

    if case.kernel == "merge":
        sizes = {"batch": 2, "rows": 64, "heads": 4, "DV": case.dim, "WIDE": case.dim, "R": 32}
        return triton_merge_kernel.merge_kernel, sizes
    kernel, table = {
        "forward": (triton_forward.forward_kernel, triton_launch.FORWARD),
        "dq": (triton_backward.dq_kernel, triton_launch.OF_QUERIES),
        "dkv": (triton_backward.dkv_kernel, triton_launch.OF_KEYS),
    }[case.kernel]
    q, k = (torch.empty(1, 64, heads, case.dim, dtype=case.dtype) for heads in (4, 2))
    block = BlockSpec((None, 0), 0.1, Dropout(0.1, 1, range(64), range(64)))
    return kernel, triton_launch.arguments(q, k, k, block, triton_launch.sizes(table, q, k))
