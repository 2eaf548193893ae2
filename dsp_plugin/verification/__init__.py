"""Methods against the fp64 dense oracle and their own byte formulas: what `dsp-plugin verify` and the tests run."""

from dsp_plugin.verification.cases import Case, default_cases, parse_mask, refusal
from dsp_plugin.verification.engine import run_case, run_cases
from dsp_plugin.verification.report import CaseResult, TensorError, WireCheck

__all__ = [
    "Case",
    "CaseResult",
    "TensorError",
    "WireCheck",
    "default_cases",
    "parse_mask",
    "refusal",
    "run_case",
    "run_cases",
]
