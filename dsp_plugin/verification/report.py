"""What a verification found: how far every tensor is from the oracle, and every byte beside its formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from dsp_plugin.verification.cases import Case

# Largest allowed |got - oracle| / max |oracle|.
TOLERANCES: dict[torch.dtype, float] = {torch.float64: 1e-12, torch.float32: 1e-5}
# 16-bit types: root-mean-square error over that of the unsharded run with the same kernel, both against the oracle. The
# largest error would be decided by one unlucky rounding.
HALF_PRECISION_FACTOR = 1.5
# What passes in any case: some tensors of such a run, decays and their gradients, are fp32 throughout.
HALF_PRECISION_FLOOR = TOLERANCES[torch.float32]
# Below this a tensor is zero but for rounding (a query that sees one key has no gradient), and its error is taken
# relative to the largest value of any tensor of the case.
_NOTHING = 1e-9


class TensorError(NamedTuple):
    """Distance of one tensor from the oracle.

    Attributes:
        name: ``out``, or a gradient's name.
        error: the largest difference over the oracle's largest value; in 16 bits the root mean square difference.
        limit: the error up to which it passes.
    """

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether it passes; not a number does not."""
        return self.error <= self.limit


class WireCheck(NamedTuple):
    """Bytes that left one rank, by the ledger and by the formula."""

    what: str
    rank: int
    forward: int
    forward_formula: int
    backward: int
    backward_formula: int

    @property
    def ok(self) -> bool:
        """Whether ledger and formula agree to the byte."""
        return (self.forward, self.backward) == (self.forward_formula, self.backward_formula)


class Distance(NamedTuple):
    """How far one rank's part of a tensor is from the oracle, relative to the oracle's largest value.

    Attributes:
        largest: largest difference.
        squares: sum of squared differences.
        elements: how many there are.
        limit: on the largest difference over all ranks, or on the root mean square if ``typical``.
    """

    name: str
    largest: float
    squares: float
    elements: int
    limit: float
    typical: bool


@dataclass(frozen=True)
class RankReport:
    """What one rank saw. Every rank lists the same tensors and checks, in the same order."""

    distances: tuple[Distance, ...]
    wire: tuple[WireCheck, ...]


@dataclass(frozen=True)
class CaseResult:
    """The verdict on one case, the same on every rank.

    Attributes:
        errors: the worst over ranks for every tensor, the output first.
        wire: by check and rank; the first check is the method's declared ``wire_bytes``.
        refused: why the case is illegal; nothing was run then.
    """

    case: Case
    errors: tuple[TensorError, ...] = ()
    wire: tuple[WireCheck, ...] = ()
    refused: str | None = None

    @classmethod
    def merged(cls, case: Case, reports: Sequence[RankReport]) -> CaseResult:
        """Put the reports of all ranks together."""
        errors = tuple(_over_ranks(same) for same in zip(*(report.distances for report in reports), strict=True))
        return cls(case, errors, tuple(check for report in reports for check in report.wire))

    @property
    def ok(self) -> bool:
        """Whether it ran and everything passed."""
        return self.refused is None and not self.failures()

    @property
    def output(self) -> TensorError:
        """The output's error."""
        return self.errors[0]

    @property
    def worst_gradient(self) -> TensorError:
        """The gradient nearest to its limit, or furthest beyond."""
        return max(self.errors[1:], key=_badness)

    @property
    def headline(self) -> tuple[WireCheck, ...]:
        """The checks against the method's declared ``wire_bytes``, by rank."""
        return tuple(check for check in self.wire if check.what == self.wire[0].what)

    def failures(self) -> list[str]:
        """What did not pass, one line each."""
        lines = [
            f"{error.name} is off by {error.error:.2e} of its largest value, limit {error.limit:.2e}"
            for error in self.errors
            if not error.ok
        ]
        lines += [
            f"rank {check.rank} sent {check.forward} bytes forward and {check.backward} backward for {check.what}, "
            f"the formula says {check.forward_formula} and {check.backward_formula}"
            for check in self.wire
            if not check.ok
        ]
        return lines


def _over_ranks(parts: Sequence[Distance]) -> TensorError:
    first = parts[0]
    if first.typical:
        error = math.sqrt(sum(part.squares for part in parts) / max(sum(part.elements for part in parts), 1))
    else:
        error = max((part.largest for part in parts), key=_nan_is_worst)
    return TensorError(first.name, error, first.limit)


def _badness(error: TensorError) -> tuple[bool, float]:
    return not error.ok, _nan_is_worst(error.error / error.limit if error.limit else error.error)


def _nan_is_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _whole(x: Tensor) -> Tensor:
    return x


def judge(
    got: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    unsharded: Mapping[str, Tensor],
    dtype: torch.dtype,
    part: Callable[[Tensor], Tensor] = _whole,
    other_parts: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> list[Distance]:
    """Compare what a rank got with its part of the oracle.

    Args:
        got: this rank's tensors by name, ``out`` first.
        oracle: the whole tensors, fp64.
        unsharded: the whole tensors from one process in ``dtype``; they set the limit for 16-bit types.
        dtype: of the run.
        part: takes from a whole tensor what this rank holds.
        other_parts: the same for the tensors, by name, that are not cut like the rest.
    """
    peaks = {name: _largest(want) for name, want in oracle.items()}
    distances = []
    for name, want in oracle.items():
        scale = peaks[name] if peaks[name] > _NOTHING else max(peaks.values())
        difference = (got[name].double() - other_parts.get(name, part)(want)) / scale
        limit = TOLERANCES.get(dtype)
        typical = limit is None
        if limit is None:
            rounding = (unsharded[name].double() - want) / scale
            limit = max(HALF_PRECISION_FACTOR * rounding.square().mean().sqrt().item(), HALF_PRECISION_FLOOR)
        distances.append(_distance(name, difference, limit, typical))
    return distances


def exact(name: str, got: Tensor, expected: Tensor) -> Distance:
    """Compare tensors that were only moved, so that not a bit may differ."""
    if got.shape != expected.shape:
        return Distance(name, math.inf, math.inf, got.numel(), 0.0, typical=False)
    return _distance(name, got.double() - expected.double(), 0.0, typical=False)


def _distance(name: str, difference: Tensor, limit: float, typical: bool) -> Distance:
    squares = difference.square().sum().item()
    return Distance(name, _largest(difference), squares, difference.numel(), limit, typical)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
