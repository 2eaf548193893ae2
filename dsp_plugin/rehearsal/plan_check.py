"""What a comparison of a sharded and an unsharded pass says about a plan."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class StageCheck:
    """One stage, sharded against unsharded.

    Attributes:
        stage: the name of its module. sharded: the dim that was sharded.
        given: error of the tokens that it was given, relative to the largest entry. gave: of those that it returned.
    """

    stage: str
    sharded: str
    given: float
    gave: float


@dataclass(frozen=True)
class Fault:
    """The first place where the sharded pass went wrong.

    Attributes:
        place: in words, as in ``in blocks.1.time`` or ``between blocks.0 and blocks.1``.
        stage: the one concerned; None outside of all of them.
        sharded: the dim that was sharded there; None where tokens are whole.
        error: relative; infinite where shapes differ or the pass broke off.
        message: what was raised there, if anything was.
        hints: what may be the reason.
    """

    place: str
    stage: str | None
    sharded: str | None
    error: float
    message: str = ""
    hints: tuple[str, ...] = ()

    def __str__(self) -> str:
        dim = f" (sharded {self.sharded})" if self.sharded is not None else ""
        how = "has another shape" if self.error == inf else f"differs by {self.error:.1e}"
        what = f"the sharded pass broke off: {self.message}" if self.message else how
        return "\n  ".join([f"{self.place}{dim}: {what}", *(f"maybe: {hint}" for hint in self.hints)])


@dataclass(frozen=True)
class PlanCheck:
    """What the comparison found.

    Attributes:
        fault: the first place that differs; None if the plan is right for the model.
        stages: in the order in which they ran; none where the pass broke off.
        output: largest relative error of the tensors that the model returned.
        gradient: the parameter whose gradient is off most, and by how much; None without a backward pass.
        tolerance: for all of these.
        random: whether the unsharded model draws random numbers, which sharding may change.
        sent: bytes that left all ranks. planned: bytes of the stage table, forward and backward.
    """

    fault: Fault | None
    stages: tuple[StageCheck, ...] = ()
    output: float = 0.0
    gradient: tuple[str, float] | None = None
    tolerance: float = 0.0
    random: bool = False
    sent: int = 0
    planned: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return self.fault is None
