"""Linear attention on CUDA: fla's Triton kernels and plain torch equal the fp64 oracle, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_plugin import UnsupportedError
from dsp_plugin.kernels import calls, linear_fla
from dsp_plugin.kernels.linear import DECAYS, linear_attention
from dsp_plugin.kernels.linear_reference import token_recurrence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
LENGTH = 301
PACKED = (0, 1, 130, LENGTH)
KERNELS = ("fla", "chunked")
DELTA = ("delta", "gated-delta", "kda")

Inputs = dict[str, Tensor | None]


def usable(kernel: str) -> str:
    """The kernel's name; skips where this machine lacks it."""
    if kernel == "fla":
        reason = linear_fla.unusable(DEVICE, torch.bfloat16)
        if reason is not None:
            pytest.skip(f"fla: {reason}")
    return kernel


def make(
    decay: str,
    length: int = LENGTH,
    heads: int = 4,
    query_heads: int = 2,
    dim: int = 64,
    v_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    """Random inputs by name; gates and states are fp32, as models have them."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, device=DEVICE)

    gates = {
        "head": (1 + torch.arange(heads, device=DEVICE)) / -8.0,
        "scalar": F.logsigmoid(normal(length, heads) + 3),
        "vector": F.logsigmoid(normal(length, heads, dim) + 3),
    }
    gate = {"gated-delta": "scalar", "kda": "vector"}.get(decay, decay)
    k = normal(length, query_heads, dim)
    inputs = {
        "q": normal(length, query_heads, dim).to(dtype),
        "k": (F.normalize(k, dim=-1) if decay in DELTA else k).to(dtype),
        "v": normal(length, heads, v_dim).to(dtype),
        "g": gates.get(gate),
        "beta": normal(length, heads).sigmoid() if decay in DELTA else None,
        "initial_state": normal(heads, dim, v_dim),
    }
    return {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}


def differentiated(outputs: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Output, final state, and the gradients of all inputs under fixed random directions."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    directions = [torch.randn(x.shape, generator=generator, device=DEVICE).to(x.dtype) for x in outputs]
    wanted = {name: x for name, x in inputs.items() if x is not None}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), directions)
    named = dict(zip((f"d{name}" for name in wanted), gradients, strict=True))
    return {"out": outputs[0], "state": outputs[1], **named}


def run(inputs: Inputs, kernel: str, **settings: Any) -> dict[str, Tensor]:
    return differentiated(linear_attention(**inputs, output_final_state=True, kernel=kernel, **settings), inputs)


def oracle(inputs: Inputs, **settings: Any) -> dict[str, Tensor]:
    doubles = {name: None if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}
    return differentiated(token_recurrence(**doubles, **settings), doubles)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest value of each tensor."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        found = got[name].double()
        assert found.isfinite().all(), name
        error = (found - expected).abs().max() / expected.abs().max().clamp_min(0.25)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("decay", DECAYS)
def test_bf16(decay: str, cu_seqlens: tuple[int, ...] | None, kernel: str) -> None:
    inputs = make(decay)
    got = run(inputs, usable(kernel), cu_seqlens=cu_seqlens)
    assert_close(got, oracle(inputs, cu_seqlens=cu_seqlens), 2e-2)


@pytest.mark.parametrize("decay", DECAYS)
def test_fp16_in_fla(decay: str) -> None:
    inputs = make(decay, dtype=torch.float16)
    assert_close(run(inputs, usable("fla")), oracle(inputs), 5e-3)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector", "delta", "gated-delta", "kda"])
@pytest.mark.parametrize(
    "shape",
    [
        {"length": 1},
        {"length": 64},
        {"length": 1030},
        {"heads": 3, "query_heads": 3},
        {"dim": 128, "v_dim": 128},
        {"dim": 32, "v_dim": 80},
        {"dim": 256, "v_dim": 128, "query_heads": 1},
    ],
    ids=str,
)
def test_shapes_in_fla(decay: str, shape: dict[str, int]) -> None:
    inputs = make(decay, **shape)
    assert_close(run(inputs, usable("fla")), oracle(inputs), 2e-2)


@pytest.mark.parametrize("decay", DECAYS)
def test_stretches_of_fla_chain_to_the_whole(decay: str) -> None:
    """What ranks do with each other's states."""
    kernel, inputs = usable("fla"), make(decay)
    outs, state = [], inputs["initial_state"]
    for stretch in (slice(0, 100), slice(100, 101), slice(101, LENGTH)):
        of_tokens = ("q", "k", "v", "beta", *(("g",) if decay != "head" else ()))
        part = {name: x if x is None or name not in of_tokens else x[:, stretch] for name, x in inputs.items()}
        part["initial_state"] = state
        out, state = linear_attention(**part, output_final_state=True, kernel=kernel)
        outs.append(out)
    assert_close(differentiated((torch.cat(outs, 1), state), inputs), oracle(inputs), 2e-2)


@pytest.mark.parametrize("decay", DECAYS)
def test_fp32_in_plain_torch(decay: str) -> None:
    inputs = make(decay, dtype=torch.float32)
    assert_close(run(inputs, "chunked", cu_seqlens=PACKED), oracle(inputs, cu_seqlens=PACKED), 1e-4)


@pytest.mark.parametrize(
    ("dtype", "dim", "kernel"),
    [(torch.bfloat16, 64, "fla"), (torch.float32, 64, "chunked"), (torch.bfloat16, 33, "chunked")],
)
def test_auto_takes_fla_where_it_serves_the_tensors(dtype: torch.dtype, dim: int, kernel: str) -> None:
    usable("fla")
    with calls() as made:
        run(make("scalar", dtype=dtype, dim=dim), "auto")
    assert made.counts == {(kernel, "forward"): 1, (kernel, "backward"): 1}


def test_fla_refuses_fp32() -> None:
    usable("fla")
    with pytest.raises(UnsupportedError, match="fla computes in bfloat16 or float16"):
        run(make("scalar", dtype=torch.float32), "fla")
