"""The scientific ViT on Megatron-core trains as the plain `VisionTransformer` does in one process, on the same batches.

fp32, gradient clipping, 4 microbatches of other variables each unless a case says else; losses of 3 optimizer steps,
and every gradient of the first one. The reference is no Megatron at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cores import NEWEST
from megatron_runs import CP2, CP4, EXAMPLES, PP2, TP2, VPP2, Run, assert_parity, assert_refused, train
from plain_training import BATCH, STEPS
from switch_formula import assert_switches
from vit_reference import SAMPLES, WEATHERS, plain_run

VIT_SCRIPT = EXAMPLES / "pretrain_vit_core.py"
COUNTED_SCRIPT = Path(__file__).with_name("counted_vit.py")
TPSP = f"{TP2} --sequence-parallel"
RECOMPUTE = "--recompute-granularity full"
ZERO = "--use-distributed-optimizer"
DATA = ("--weathers", str(WEATHERS), "--moments", str(SAMPLES + 1))
# Three moments a sample: 3 x 7 x 5 patches.
TIMES = f"--times 3 --moments {3 * SAMPLES + 1}"
# 7 x 5 patches, which nothing divides; 6 x 5 where tensor-parallel ranks hold equal parts of the first dim.
UNEVEN, EVEN_ROWS = "--rows 14 --columns 10", "--rows 12 --columns 10"
DSP = f"{UNEVEN} --sp-method dsp"
PARTED = f"{EVEN_ROWS} --sp-method dsp"
# 38 tokens, a class token and two registers among them.
FULL = f"{UNEVEN} --attention full --registers 2 --classify --lead-time"
DEPTH, WIDTH, PATCH = 4, 64, 2

CASES: dict[str, tuple[int, str]] = {
    "axial, cp2, micro-batch of 2": (2, f"{DSP} {CP2} --micro-batch-size 2 --lead-time"),
    "full, ring cp2": (2, f"{FULL} --sp-method ring {CP2}"),
    "axial, cp2 x tp2, full recompute": (4, f"{DSP} {CP2} {TP2} {RECOMPUTE}"),
    "axial, cp2 x dp2, distributed optimizer": (4, f"{DSP} {CP2} {ZERO}"),
    "full, ulysses cp2 x tp2": (4, f"{FULL} --sp-method ulysses {CP2} {TP2}"),
    "axial, three dims, cp2 x pp2": (4, f"{DSP} {TIMES} {CP2} {PP2}"),
}
MATRIX: dict[str, tuple[int, str]] = {
    "axial, one rank": (1, DSP),
    "axial, tp2": (2, f"{DSP} {TP2}"),
    "axial, tp2, sequence parallel": (2, f"{PARTED} {TPSP}"),
    "axial, cp3": (3, f"{DSP} --context-parallel-size 3"),
    "axial, cp4": (4, f"{DSP} {CP4}"),
    "axial, cp2 x pp2, interleaved, full recompute": (4, f"{DSP} {CP2} {PP2} {VPP2} {RECOMPUTE}"),
    "axial, tp2 x cp2 x pp2": (8, f"{DSP} {TP2} {CP2} {PP2}"),
    "axial, tp2 x cp2 x pp2, sequence parallel": (8, f"{PARTED} {TPSP} {CP2} {PP2} --lead-time"),
    "axial, tp2 x cp2 x dp2, distributed optimizer": (8, f"{DSP} {TP2} {CP2} {ZERO}"),
    "axial, three dims, cp4 x pp2": (8, f"{DSP} {TIMES} {CP4} {PP2}"),
    "axial, three dims, cp2 x pp2, interleaved": (4, f"{DSP} {TIMES} {CP2} {PP2} {VPP2}"),
    "full, three dims, ulysses cp2": (
        2,
        f"{UNEVEN} --attention full --registers 2 --lead-time {TIMES} --sp-method ulysses {CP2}",
    ),
    "full, one rank": (1, f"{FULL} --sp-method ulysses"),
    "full, tp2, sequence parallel": (2, f"{FULL} --sp-method ulysses {TPSP}"),
    "full, ulysses cp2 x tp2, sequence parallel": (4, f"{FULL} --sp-method ulysses {CP2} {TPSP}"),
    "full, ulysses cp2 x pp2": (4, f"{FULL} --sp-method ulysses {CP2} {PP2}"),
    "full, ulysses cp2 x pp2, keep attention": (
        4,
        f"{FULL} --sp-method ulysses {CP2} {PP2} {RECOMPUTE} --sp-recompute keep_attention",
    ),
    "full, usp cp4": (4, f"{FULL} --sp-method usp --sp-ulysses-size 2 {CP4}"),
    "full, ring cp4": (4, f"{FULL} --sp-method ring {CP4}"),
    "full, ulysses tp2 x cp2 x pp2": (8, f"{FULL} --sp-method ulysses {TP2} {CP2} {PP2}"),
}
COUNTED: dict[str, tuple[int, str, dict[str, int]]] = {
    "axial, cp2 x pp2": (4, f"{DSP} {CP2} {PP2}", {"cp": 2, "pp": 2}),
    "axial, cp2 x tp2, sequence parallel": (4, f"{PARTED} {TPSP} {CP2}", {"cp": 2, "tp": 2, "parts": 2}),
}


pytestmark = NEWEST


@pytest.fixture(scope="module")
def plain() -> Callable[..., Run]:
    """Runs of the plain model, by what changes it."""
    return cache(plain_run)


def model_arguments(argv: list[str]) -> dict[str, Any]:
    """The part of a command line that changes the model or the data."""
    found: dict[str, Any] = {}
    for flag, name in (
        ("--rows", "rows"),
        ("--columns", "columns"),
        ("--registers", "registers"),
        ("--times", "times"),
        ("--micro-batch-size", "micro_batch"),
    ):
        if flag in argv:
            found[name] = int(argv[argv.index(flag) + 1])
    if "--attention" in argv:
        found["attention"] = argv[argv.index("--attention") + 1]
    return {**found, "classify": "--classify" in argv, "lead_time": "--lead-time" in argv}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        *(pytest.param(*case, id=name) for name, case in CASES.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.matrix) for name, case in MATRIX.items()),
    ],
)
def test_trains_like_the_plain_model(ranks: int, arguments: str, plain: Callable[..., Run], tmp_path: Path) -> None:
    argv = arguments.split()
    run = train(tmp_path, ranks, *DATA, *argv, script=VIT_SCRIPT, timeout=300)
    assert_parity(run, plain(**model_arguments(argv)))


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "arguments", "sizes"), [pytest.param(*case, id=name) for name, case in COUNTED.items()]
)
def test_switches_send_the_bytes_of_the_formula_and_nothing_else(
    ranks: int, arguments: str, sizes: dict[str, int], plain: Callable[..., Run], tmp_path: Path
) -> None:
    argv = arguments.split()
    run = train(tmp_path, ranks, *DATA, *argv, script=COUNTED_SCRIPT, timeout=300)
    model = model_arguments(argv)
    assert_parity(run, plain(**model))
    parts = sizes.pop("parts", 1)
    # The first block of a layer attends along y, so it has x sharded.
    shape = (model["rows"] // PATCH // parts, model["columns"] // PATCH, 1, WIDTH)
    assert_switches(tmp_path, shape, first=1, layers=DEPTH, times=STEPS * BATCH, **sizes)


@pytest.mark.matrix
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        pytest.param(4, f"{PARTED} {TPSP} {PP2} {ZERO}", id="tp2 x pp2, sequence parallel"),
        pytest.param(4, f"{PARTED} {CP2} {TP2} {ZERO}", id="cp2 x tp2"),
    ],
)
def test_goes_on_at_other_sizes(ranks: int, arguments: str, plain: Callable[..., Run], tmp_path: Path) -> None:
    saving = ("--checkpoint", str(tmp_path / "run"), "--save-every", "1")
    train(tmp_path, 4, *PARTED.split(), *CP4.split(), ZERO, *DATA, *saving, "--train-iters", "1", script=VIT_SCRIPT)
    argv = arguments.split()
    run = train(tmp_path, ranks, *argv, *DATA, *saving[:2], script=VIT_SCRIPT, timeout=300)
    assert_parity(run, plain(**model_arguments(argv), dumped=1))


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(
            f"{UNEVEN} {CP2} --sp-method ulysses",
            ["context_parallel_size=2", "axial attention by switching", "--sp-method is ulysses", "--sp-method dsp"],
            id="axial by ulysses",
        ),
        pytest.param(
            f"{FULL} {CP2} --sp-method dsp",
            ["context_parallel_size=2", "one sequence", "--sp-method is dsp", "--sp-method ulysses or usp or ring"],
            id="full by dsp",
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            f"{FULL} {CP2} --sp-method ulysses --sp-layout zigzag",
            ["--sp-layout='zigzag'", "balanced in any order"],
            id="zigzag",
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            f"{UNEVEN} {TPSP} --sp-method dsp",
            ["patches along y=7", "7 / 2 leaves 1", "without --sequence-parallel"],
            id="rows",
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            f"{DSP} {CP2} {RECOMPUTE} --sp-recompute keep_attention",
            ["--sp-recompute='keep_attention'", "does not look inside attention"],
            id="keep_attention",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_what_it_cannot_do_is_refused_on_every_rank(arguments: str, words: list[str], tmp_path: Path) -> None:
    assert_refused(tmp_path, words, *arguments.split(), *DATA, script=VIT_SCRIPT)
