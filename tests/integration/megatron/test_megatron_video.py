"""The video DiT on Megatron-core trains as the plain `VideoDiT` does in one process, with the same weights and batches.

fp32, gradient clipping, 4 microbatches unless a case says else; losses of 3 optimizer steps, and every gradient of the
first one. The reference is no Megatron at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cores import EVERY, NEWEST, OLDEST
from megatron_runs import (
    CORE_SCRIPT,
    CP2,
    CP4,
    EXAMPLES,
    PP2,
    TP2,
    VPP2,
    Run,
    assert_parity,
    assert_refused,
    assert_within_noise,
    train,
)
from switch_formula import assert_switches
from video_reference import plain_run

VIDEO_SCRIPT = EXAMPLES / "pretrain_video_core.py"
COUNTED_SCRIPT = Path(__file__).with_name("counted_video.py")
TPSP = f"{TP2} --sequence-parallel"
FULL, SELECTIVE = "--recompute-granularity full", "--recompute-granularity selective"
ZERO = "--use-distributed-optimizer"
DSP = ("--sp-method", "dsp")
DEPTH, WIDTH, PATCHES, MICROBATCHES, STEPS = 4, 96, 25, 4, 3


def cells(*features: str) -> list[pytest.MarkDecorator]:
    """The cells of docs/compatibility.md that a case holds."""
    return [pytest.mark.cell("megatron", "dsp", feature) for feature in features]


# Megatron-core, ranks, arguments, and the cells. There are 25 patches, which nothing divides, and 8 frames unless a
# case says else.
CASES: dict[str, tuple[pytest.MarkDecorator, int, str, tuple[str, ...]]] = {
    "tp2 x cp2 x pp2, sequence parallel": (EVERY, 8, f"{TPSP} {CP2} {PP2}", ("TP2 x SP2 x PP2",)),
    "cp2 x pp2 x dp2, distributed optimizer, 7 frames": (
        EVERY,
        8,
        f"{CP2} {PP2} {ZERO} --frames 7",
        ("SP2 x PP2 x DP2",),
    ),
    "cp2, micro-batch of 2": (NEWEST, 2, f"{CP2} --micro-batch-size 2", ("micro-batches > 1",)),
    "tp2 x cp2, sinusoidal positions": (OLDEST, 4, f"{TP2} {CP2} --positions sinusoidal", ("TP",)),
    "tp2 x cp2, sequence parallel, 6 frames, selective recompute": (
        NEWEST,
        4,
        f"{TPSP} {CP2} --frames 6 {SELECTIVE}",
        ("TP-SP", "unequal token counts", "recompute"),
    ),
    "cp2 x pp2, 7 frames": (OLDEST, 4, f"{CP2} {PP2} --frames 7", ("PP", "unequal token counts")),
    "cp2 x pp2, interleaved, 7 frames, full recompute": (
        NEWEST,
        4,
        f"{CP2} {PP2} {VPP2} --frames 7 {FULL}",
        ("interleaved PP", "recompute"),
    ),
    "cp2 x dp2, distributed optimizer": (NEWEST, 4, f"{CP2} {ZERO}", ("distributed optimizer",)),
    "cp4, 7 frames": (NEWEST, 4, f"{CP4} --frames 7", ("unequal token counts",)),
}
MATRIX: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "one rank": (1, "", ()),
    "tp2": (2, TP2, ()),
    "tp2, sequence parallel": (2, TPSP, ()),
    "pp2": (2, PP2, ()),
    "pp2, interleaved": (2, f"{PP2} {VPP2}", ()),
    "cp2, full recompute": (2, f"{CP2} {FULL}", ("recompute",)),
    "cp3, 7 frames, sinusoidal positions": (3, "--context-parallel-size 3 --frames 7 --positions sinusoidal", ()),
    "tp2 x cp2, sequence parallel, sinusoidal positions, distributed optimizer": (
        4,
        f"{TPSP} {CP2} --positions sinusoidal {ZERO}",
        ("TP-SP",),
    ),
    "tp2 x pp2, sequence parallel, interleaved": (4, f"{TPSP} {PP2} {VPP2}", ()),
    "tp2 x cp2 x dp2, sequence parallel, 6 frames, full recompute": (
        8,
        f"{TPSP} {CP2} --frames 6 {FULL} {ZERO}",
        ("TP-SP", "recompute"),
    ),
    "tp4, sequence parallel": (4, "--tensor-model-parallel-size 4 --sequence-parallel", ()),
}


@pytest.fixture(scope="module")
def plain() -> Callable[..., Run]:
    """Runs of the plain model, by what changes it."""
    return cache(plain_run)


def model_arguments(argv: list[str]) -> dict[str, Any]:
    """The part of a command line that changes the model or the data."""
    found: dict[str, Any] = {}
    if "--frames" in argv:
        found["frames"] = int(argv[argv.index("--frames") + 1])
    if "--positions" in argv:
        found["positions"] = argv[argv.index("--positions") + 1]
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        *(
            pytest.param(ranks, argv, id=name, marks=[core, *cells(*held)])
            for name, (core, ranks, argv, held) in CASES.items()
        ),
        *(
            pytest.param(ranks, argv, id=name, marks=[pytest.mark.matrix, *cells(*held)])
            for name, (ranks, argv, held) in MATRIX.items()
        ),
    ],
)
def test_trains_like_the_plain_model(ranks: int, arguments: str, plain: Callable[..., Run], tmp_path: Path) -> None:
    argv = arguments.split()
    run = train(tmp_path, ranks, *argv, *DSP, script=VIDEO_SCRIPT, timeout=300)
    assert_parity(run, plain(**model_arguments(argv)))


@OLDEST
@pytest.mark.timeout(400)
@pytest.mark.cell("megatron", "dsp", "bf16")
def test_bf16_stays_within_its_own_noise(plain: Callable[..., Run], tmp_path: Path) -> None:
    small = ("--num-layers", "2", "--bf16")
    one = train(tmp_path / "one", 1, *small, plugin=False, script=VIDEO_SCRIPT, timeout=300)
    four = train(tmp_path / "four", 4, *TPSP.split(), *CP2.split(), *small, *DSP, script=VIDEO_SCRIPT, timeout=300)
    assert_within_noise(four, one, plain(depth=2))


@NEWEST
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "arguments", "sizes"),
    [
        pytest.param(4, f"{CP4} --frames 7 --micro-batch-size 2", {"cp": 4, "frames": 7, "micro_batch": 2}, id="cp4"),
        pytest.param(4, f"{CP2} {PP2} --frames 7", {"cp": 2, "pp": 2, "frames": 7}, id="cp2 x pp2"),
        pytest.param(
            4,
            f"{TPSP} {CP2} --frames 6",
            {"tp": 2, "cp": 2, "parts": 2, "frames": 6},
            id="tp2 x cp2, sequence parallel",
        ),
        pytest.param(
            4, f"{TP2} {CP2} --frames 7", {"tp": 2, "cp": 2, "frames": 7}, id="tp2 x cp2", marks=pytest.mark.matrix
        ),
    ],
)
def test_switches_send_the_bytes_of_the_formula_and_nothing_else(
    ranks: int, arguments: str, sizes: dict[str, int], plain: Callable[..., Run], tmp_path: Path
) -> None:
    argv = arguments.split()
    run = train(tmp_path, ranks, *argv, *DSP, script=COUNTED_SCRIPT, timeout=300)
    assert_parity(run, plain(**model_arguments(argv)))
    micro_batch = sizes.get("micro_batch", 1)
    assert_switches(
        tmp_path,
        (sizes["frames"] // sizes.get("parts", 1), PATCHES, micro_batch, WIDTH),
        first=0,
        layers=DEPTH,
        times=STEPS * MICROBATCHES // micro_batch,
        **{name: size for name, size in sizes.items() if name in ("tp", "cp", "pp")},
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and optimizer after one step of four context-parallel ranks with the distributed optimizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    saving = ("--checkpoint", str(folder / "run"), "--save-every", "1", "--train-iters", "1")
    train(folder, 4, *CP4.split(), ZERO, *DSP, *saving, script=VIDEO_SCRIPT, timeout=300)
    return folder / "run"


SP, SIZES = "checkpoint, other SP size", "checkpoint, other TP, PP, DP"
RESUMED: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "tp2 x pp2, sequence parallel": (4, f"{TPSP} {PP2} {ZERO}", (SIZES,)),
    "cp2 x dp2": (4, f"{CP2} {ZERO}", (SP, SIZES)),
}
RESUMED_MATRIX: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "one rank": (1, ZERO, (SP,)),
    "cp2": (2, f"{CP2} {ZERO}", (SP,)),
    "cp2 x pp2, interleaved": (4, f"{CP2} {PP2} {VPP2} {ZERO}", (SIZES,)),
    "tp2 x cp2": (4, f"{TP2} {CP2} {ZERO}", (SIZES,)),
}


@OLDEST
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        *(pytest.param(ranks, argv, id=name, marks=cells(*held)) for name, (ranks, argv, held) in RESUMED.items()),
        *(
            pytest.param(ranks, argv, id=name, marks=[pytest.mark.matrix, *cells(*held)])
            for name, (ranks, argv, held) in RESUMED_MATRIX.items()
        ),
    ],
)
def test_goes_on_at_other_sizes(
    ranks: int, arguments: str, checkpoint: Path, plain: Callable[..., Run], tmp_path: Path
) -> None:
    argv = (*arguments.split(), *DSP, "--checkpoint", str(checkpoint))
    assert_parity(train(tmp_path, ranks, *argv, script=VIDEO_SCRIPT, timeout=300), plain(dumped=1))


@NEWEST
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("arguments", "script", "words"),
    [
        pytest.param(
            f"{CP2} --sp-method dsp",
            CORE_SCRIPT,
            ["--sp-method='dsp'", "the one dim that its tokens have", "one of ulysses, ring"],
            id="a language model",
        ),
        pytest.param(
            f"{CP2} --sp-method ulysses",
            VIDEO_SCRIPT,
            ["context_parallel_size=2", "--sp-method is ulysses", "--sp-method dsp"],
            id="another method",
        ),
        pytest.param(
            f"{TPSP} --frames 7 --sp-method dsp",
            VIDEO_SCRIPT,
            ["frames=7", "7 / 2 leaves 1", "without --sequence-parallel"],
            id="frames",
        ),
        pytest.param(
            f"{CP2} {FULL} --sp-method dsp --sp-recompute keep_attention",
            VIDEO_SCRIPT,
            ["--sp-recompute='keep_attention'", "does not look inside attention"],
            id="keep_attention",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_on_every_rank(
    arguments: str, script: Path, words: list[str], tmp_path: Path
) -> None:
    assert_refused(tmp_path, words, *arguments.split(), script=script)
