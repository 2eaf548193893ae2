"""Methods against an fp64 oracle and their own byte formulas: what `dsp-plugin verify` and the tests run."""

from dsp_plugin.verification.cases import Case, default_cases
from dsp_plugin.verification.engine import run_case, run_cases
from dsp_plugin.verification.masks import parse_mask
from dsp_plugin.verification.refusal import refusal
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
