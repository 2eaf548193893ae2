"""Every method on two ranks with NCCL: output, every gradient and bytes against the fp64 references, as on gloo.

``DSP_PLUGIN_GPU_TESTS=cpu`` runs the same on CPU ranks and gloo, so that the tests are known to be right without a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import METHODS
from dsp_plugin.verification.cases import Case, default_cases
from dsp_plugin.verification.refusal import refusal
from dsp_plugin.verification.world import device_kind, verify_cases

RANKS = 2
ON_CPU = os.environ.get("DSP_PLUGIN_GPU_TESTS") == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not ON_CPU and torch.cuda.device_count() < RANKS,
        reason=f"needs {RANKS} CUDA devices, has {torch.cuda.device_count()}; on gloo: DSP_PLUGIN_GPU_TESTS=cpu",
    ),
]

DTYPES = (torch.float32, torch.bfloat16)


def legal(method: str, dtype: torch.dtype) -> list[Case]:
    """Masks, layouts, packed sequences, head counts and lengths that do not divide."""
    cases = default_cases(method, RANKS, {"dtype": dtype})
    return [case for case in cases if refusal(case, device_kind(RANKS)) is None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_output_gradients_and_bytes(method: str, dtype: torch.dtype) -> None:
    cases = legal(method, dtype)
    assert cases
    failed = [result for result in verify_cases(cases, 500.0) if not result.ok]
    assert not failed, failed[:3]


def test_dropout_is_that_of_the_unsharded_run() -> None:
    cases = [
        Case(method, RANKS, dropout=0.2, mask=MaskSpec(causal=True))
        for method in ("ulysses", "ring", "usp", "lightseq")
    ]
    runs = [case for case in cases if refusal(case, device_kind(RANKS)) is None]
    assert runs
    for case in runs:
        (result,) = verify_cases([case], 200.0)
        assert result.ok, result
