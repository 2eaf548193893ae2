"""The stage table of a model: which dim is sharded where, what that costs, and what it beat."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.methods.method import WireBytes
from dsp_plugin.planner.stages import StagePlan, StageRow
from dsp_plugin.rehearsal.dryrun import Job, dry_run
from dsp_plugin.rehearsal.subject import Setting, subject

# One dim sharded throughout, with attention served inside the stages that compute along it.
BASELINE = "ulysses"


@dataclass(frozen=True)
class TableRow:
    """Stages that are served alike.

    Attributes:
        stage: the name of their module, with ``*`` for the number of a layer where there are several.
        count: how many there are.
        wire: bytes leaving the busiest rank, in one of them.
        instead: the next best dim and what it would cost, or why there is none.
    """

    stage: str
    count: int
    sharded: str
    move: str
    inside: str
    wire: WireBytes
    instead: str


@dataclass(frozen=True)
class StageTable:
    """All rows, and what they add up to.

    Attributes:
        plan: what the rows are of.
        totals: by method, bytes that leave all ranks forward and backward, or why the method cannot run.
    """

    plan: StagePlan
    totals: Mapping[str, int | str]

    def rows(self, every: bool = False) -> list[TableRow]:
        """One row for each kind of stage, in the order of their first, or one for every stage."""
        rows = [_row(row, self.plan.total) for row in self.plan.rows]
        return rows if every else _collapsed(rows)


def stage_table(
    reference: str,
    settings: Mapping[str, Setting],
    plan: str | None,
    size: int,
    method: str = "dsp",
    dtype: torch.dtype = torch.float32,
) -> StageTable:
    """Plan a model of any size, from a dry run that needs no memory for it.

    Args:
        reference: of the subject, see `rehearsal.subject`. settings: of it.
        plan: ``package.module:name``; the one known for the model when None.
        size: P.
        method: of the config.
        dtype: of weights and activations.

    Raises:
        SequenceParallelConfigError: the plan does not fit the model, or no dim can be sharded in some stage.
        UnsupportedError: the model reads values of its tensors, which a dry run has not.
    """
    found = _planned(reference, settings, plan, size, method, dtype)
    totals: dict[str, int | str] = {method: found.total}
    for other in ("dsp", BASELINE):
        if other not in totals:
            try:
                totals[other] = _planned(reference, settings, plan, size, other, dtype).total
            except (SequenceParallelConfigError, UnsupportedError) as error:
                totals[other] = _shortened(str(error))
    return StageTable(found, totals)


def _planned(
    reference: str, settings: Mapping[str, Setting], plan: str | None, size: int, method: str, dtype: torch.dtype
) -> StagePlan:
    job = Job(
        partial(subject, reference, settings), SequenceParallelConfig(method=method, size=size, plan=plan), dtype=dtype
    )
    try:
        with _no_tracebacks_logged():
            found = dry_run(job, size).stage_plan
    except (SequenceParallelConfigError, UnsupportedError):
        raise
    except Exception as error:
        raise SequenceParallelConfigError(
            setting="plan",
            value=plan,
            why=f"sharded by it, the model broke off with {type(error).__name__}: {str(error).strip().rstrip('.')}",
            remedy="find the stage with --validate, and --small for sizes that this machine can run",
        ) from error
    if found is None:
        raise SequenceParallelConfigError(
            setting="--model",
            value=reference,
            why="its batch is sharded, not the stages of a plan",
            remedy="write a plan for it and name it with --plan",
        )
    return found


@contextmanager
def _no_tracebacks_logged() -> Iterator[None]:
    """Fake tensors log every error that they raise."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _shortened(message: str) -> str:
    """Without what is said once more for every layer."""
    kept: list[str] = []
    for part in _any_layer(message).split("; "):
        # The first part comes behind what introduces it, the last before a remedy.
        if not any(other.endswith(part) or part.startswith(other) for other in kept):
            kept.append(part)
    return "; ".join(kept)


def _any_layer(text: str) -> str:
    return re.sub(r"(^|\.)\d+(?=[.\s]|$)", r"\1*", text)


def _row(row: StageRow, total: int) -> TableRow:
    return TableRow(row.stage, 1, row.sharded, row.move, row.inside, row.wire, _instead(row, total))


def _instead(row: StageRow, total: int) -> str:
    others = {dim: cost for dim, cost in row.alternatives.items() if dim != row.sharded}
    priced = {dim: cost for dim, cost in others.items() if isinstance(cost, int)}
    if priced:
        dim = min(priced, key=lambda name: priced[name])
        more = priced[dim] - total
        if more < 0:
            return f"{dim}: {-more:,} bytes fewer, but ranks without work"
        return f"{dim}: {more:,} bytes more" if more else f"{dim}: as many bytes"
    return "; ".join(f"{dim}: {reason}" for dim, reason in others.items()) or "no other dim"


def _collapsed(rows: Sequence[TableRow]) -> list[TableRow]:
    kinds: dict[tuple, list[TableRow]] = {}
    for row in rows:
        kinds.setdefault((_any_layer(row.stage), *(getattr(row, part) for part in _ALIKE)), []).append(row)
    return [
        TableRow(
            key[0] if len(alike) > 1 else alike[0].stage, len(alike), *(getattr(alike[0], part) for part in _ALIKE)
        )
        for key, alike in kinds.items()
    ]


_ALIKE = ("sharded", "move", "inside", "wire", "instead")
