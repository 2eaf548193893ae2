"""Every method beside every feature of DeepSpeed, on four ranks; a run holds the cells of several features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from deepspeed_cases import Case
from linear_cases import LinearCase

WORLD = 4
# What another method and size a run goes on with, from a checkpoint.
OTHER = {"ulysses": "ring", "ring": "lightseq", "lightseq": "usp", "usp": "ulysses"}


@dataclass(frozen=True)
class Cells:
    """A run and the features whose cells it holds; `covering` if CI runs it."""

    case: Case
    features: tuple[str, ...]
    covering: bool


def matrix() -> list[Cells]:
    """All of them."""
    return [*_softmax(), *_video(), *_linear()]


def matrix_cases(*, everything: bool) -> list[Case]:
    """The runs of a session: all, or those of the covering subset."""
    return [cells.case for cells in matrix() if everything or cells.covering]


def _softmax() -> Iterator[Cells]:
    for method, other in OTHER.items():
        # Usp has two axes to itself from four ranks on.
        size, then = (4, 2) if method == "usp" else (2, 4)
        accumulation = 2 if method == "usp" else 1
        run = partial(Case, "lm", method, size, WORLD)
        covered = {
            "ulysses": {0, 2, 4},
            "ring": {1, 3, 5},
            "lightseq": {2, 3, 6},
            "usp": {0, 1, 4},
        }[method]
        runs: list[tuple[Case, tuple[str, ...]]] = [
            (run(0, accumulation=2), ("ZeRO 0", "micro-batches > 1", "unequal token counts")),
            (run(1, recompute="full"), ("ZeRO 1", "recompute")),
            (run(2, recompute="keep_attention"), ("ZeRO 2", "keep_attention")),
            (run(3, accumulation=accumulation, then=(method, then)), ("ZeRO 3", "checkpoint, other SP size")),
            (run(1, then=(other, size)), ("ZeRO 1", "checkpoint, other method")),
            (run(2, dtype="bf16", steps=6), ("bf16",)),
            (
                run(3, accumulation=accumulation, then=(other, then), universal=True),
                ("ZeRO 3", "checkpoint, other method", "checkpoint, other SP size", "universal checkpoint"),
            ),
        ]
        for number, (case, features) in enumerate(runs):
            yield Cells(case, features, number in covered)


def _video() -> Iterator[Cells]:
    run = partial(Case, "video", "dsp", 2, WORLD)
    yield Cells(run(0, accumulation=2), ("ZeRO 0", "micro-batches > 1"), True)
    yield Cells(run(1, recompute="full"), ("ZeRO 1", "recompute"), True)
    yield Cells(run(2, then=("dsp", 4)), ("ZeRO 2", "checkpoint, other SP size"), True)
    yield Cells(run(3), ("ZeRO 3",), False)
    yield Cells(run(2, dtype="bf16", steps=6), ("bf16",), False)
    yield Cells(run(1, then=("dsp", 4), universal=True), ("ZeRO 1", "universal checkpoint"), True)


def _linear() -> Iterator[Cells]:
    run = partial(LinearCase, method="lasp", size=2, world=WORLD)
    yield Cells(run("hybrid", zero=0, accumulation=2), ("ZeRO 0", "micro-batches > 1", "unequal token counts"), True)
    yield Cells(run("gated-delta", zero=1, recompute="full"), ("ZeRO 1", "recompute"), False)
    yield Cells(run("hybrid", zero=2, recompute="keep_attention"), ("ZeRO 2", "keep_attention"), True)
    yield Cells(run("gated-delta", zero=3, then=("lasp", 4)), ("ZeRO 3", "checkpoint, other SP size"), True)
    yield Cells(run("hybrid", zero=2, dtype="bf16", steps=6), ("bf16",), True)
    yield Cells(run("head", zero=2, then=("lasp", 4), universal=True), ("ZeRO 2", "universal checkpoint"), True)
