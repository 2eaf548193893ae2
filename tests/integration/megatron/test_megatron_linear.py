"""Models with linear attention under ``--sp-method lasp``: each trains as one process without the plugin does."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from cores import EVERY, NEWEST, OLDEST
from linear_workers import layer_errors, refused
from megatron_runs import CP2, CP4, PP2, TP2, VPP2, Run, assert_parity, assert_within_noise, train

from dsp_plugin.patches.megatron import Settings
from dsp_plugin.spawn import spawn

FULL, KEEP, SELECTIVE = (
    "--recompute-granularity full",
    "--recompute-granularity full --sp-recompute keep_attention",
    "--recompute-granularity selective",
)
LASP = ("--sp-method", "lasp")
HYBRID = "--linear-decay gated-delta --softmax-every 2"
LINEAR = "--linear-decay head"
DECAYS = ("none", "head", "scalar", "vector", "delta", "gated-delta", "kda")
EXCHANGES = ("ring", "allgather", "scan")

# Megatron-core, ranks, the model, and how it is run.
CASES = {
    "tp2 x cp2, ring": (NEWEST, 4, LINEAR, f"{TP2} {CP2} --sp-exchange ring"),
    "tp2 x cp2, sequence parallel, lightseq, allgather, selective recompute": (
        EVERY,
        4,
        HYBRID,
        f"{TP2} {CP2} --sequence-parallel --sp-exchange allgather {SELECTIVE}",
    ),
    "cp2 x pp2, interleaved, ulysses, scan, full recompute": (
        EVERY,
        4,
        HYBRID,
        f"{CP2} {PP2} {VPP2} --sp-softmax-method ulysses --sp-exchange scan {FULL}",
    ),
    "cp4, distributed optimizer, zigzag, ring, full recompute that keeps attention": (
        NEWEST,
        4,
        HYBRID,
        f"{CP4} --use-distributed-optimizer --sp-layout zigzag --sp-softmax-method ring --sp-exchange ring {KEEP}",
    ),
    "cp2 x pp2, allgather, full recompute that keeps attention": (
        NEWEST,
        4,
        LINEAR,
        f"{CP2} {PP2} --sp-exchange allgather {KEEP}",
    ),
}
MATRIX = {
    **{
        f"{decay}, {exchange}": (
            4,
            f"--linear-decay {decay} --softmax-every 2",
            f"{TP2} {CP2} --sequence-parallel --sp-exchange {exchange}",
        )
        for decay in DECAYS
        for exchange in EXCHANGES
    },
    **{
        f"{softmax}, {layout}, {name}": (
            4,
            HYBRID,
            f"{CP4} --sp-softmax-method {softmax} --sp-layout {layout} {recompute}",
        )
        for softmax, layout in (
            ("lightseq", "contiguous"),
            ("ulysses", "contiguous"),
            ("ulysses", "zigzag"),
            ("ring", "contiguous"),
            ("ring", "zigzag"),
            ("usp --sp-ulysses-size 2", "zigzag"),
        )
        for name, recompute in (("full", FULL), ("keep_attention", KEEP), ("selective", SELECTIVE))
    },
    "cp2 x dp2, distributed optimizer, uneven loss mask, per-token loss": (
        4,
        f"{HYBRID} --mask-newlines --calculate-per-token-loss",
        f"{CP2} --use-distributed-optimizer",
    ),
    "tp2 x cp2 x pp2, sequence parallel, distributed optimizer": (
        8,
        HYBRID,
        f"{TP2} {CP2} {PP2} --sequence-parallel --use-distributed-optimizer {SELECTIVE}",
    ),
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "model", "arguments"),
    [
        *(pytest.param(*case, id=name, marks=core) for name, (core, *case) in CASES.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.matrix) for name, case in MATRIX.items()),
    ],
)
def test_trains_like_one_process(
    ranks: int, model: str, arguments: str, reference: Callable[..., Run], tmp_path: Path
) -> None:
    run = train(tmp_path, ranks, *model.split(), *arguments.split(), *LASP)
    assert_parity(run, reference(*model.split()))


@OLDEST
@pytest.mark.timeout(400)
def test_bf16_stays_within_its_own_noise(reference: Callable[..., Run], tmp_path: Path) -> None:
    model = HYBRID.split()
    exact, rounded = reference(*model), reference(*model, "--bf16")
    run = train(tmp_path, 4, *CP4.split(), *LASP, *model, "--bf16")
    assert_within_noise(run, rounded, exact)


@OLDEST
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        pytest.param(1, "", id="one rank"),
        pytest.param(4, CP4, id="cp4"),
        pytest.param(4, f"{TP2} {CP2}", id="tp2 x cp2", marks=pytest.mark.matrix),
        pytest.param(4, f"{CP2} {PP2}", id="cp2 x pp2", marks=pytest.mark.matrix),
    ],
)
def test_checkpoint_loads_at_other_sizes(
    ranks: int, arguments: str, checkpoint: tuple[Path, Run], reference: Callable[..., Run], tmp_path: Path
) -> None:
    folder, continued = checkpoint
    method = LASP if ranks > 1 else ()
    run = train(tmp_path, ranks, *HYBRID.split(), *arguments.split(), *method, "--load", str(folder), plugin=ranks > 1)
    assert abs(run.losses[0] - reference(*HYBRID.split()).losses[0]) > 0.1, "these are not the trained weights"
    assert_parity(run, continued)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Weights that two ranks have trained and saved, and how the same two go on from them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    argv = (*HYBRID.split(), *CP2.split(), *LASP)
    train(folder / "first", 2, *argv, "--save", str(folder / "weights"))
    return folder / "weights", train(folder / "second", 2, *argv, "--load", str(folder / "weights"))


OTHER_MODELS = Path(__file__).with_name("other_models.py")


@pytest.fixture(scope="module")
def other_reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The models of `other_models` on one rank, without the plugin."""
    runs: dict[str, Run] = {}

    def run(model: str) -> Run:
        if model not in runs:
            runs[model] = train(tmp_path_factory.mktemp(model), 1, model, plugin=False, script=OTHER_MODELS)
        return runs[model]

    return run


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("model", "ranks", "arguments"),
    [
        pytest.param("gdn", 4, f"{CP4} --sp-layout zigzag --sp-softmax-method ring", id="gdn: cp4, zigzag"),
        pytest.param("gdn", 2, f"{CP2} {FULL}", id="gdn: cp2, full recompute", marks=pytest.mark.matrix),
        pytest.param("gdn", 4, f"{CP2} {SELECTIVE}", id="gdn: cp2 x dp2, selective", marks=pytest.mark.matrix),
        pytest.param("linear-hybrid", 4, f"{TP2} {CP2} --sequence-parallel {FULL}", id="hybrid: tp2 x cp2"),
        pytest.param("linear-hybrid", 4, f"{CP4} --sp-exchange ring", id="hybrid: cp4", marks=pytest.mark.matrix),
    ],
)
def test_megatrons_other_models_train_like_one_process(
    model: str, ranks: int, arguments: str, other_reference: Callable[[str], Run], tmp_path: Path
) -> None:
    if model == "linear-hybrid" and importlib.util.find_spec("megatron.core.models.hybrid") is None:
        pytest.skip("this megatron-core has no HybridModel")
    run = train(tmp_path, ranks, model, *arguments.split(), *LASP, script=OTHER_MODELS)
    assert_parity(run, other_reference(model))


@pytest.fixture(scope="module")
def errors() -> list[dict[str, float]]:
    """The largest relative error of each kind of layer, on each of two ranks."""
    return spawn(layer_errors, 2, timeout=150)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("decay", [*DECAYS, "gated-delta without convolution"])
def test_sharded_layer_is_the_whole_layer(decay: str, layout: str, errors: list[dict[str, float]]) -> None:
    assert max(found[f"{decay}, {layout}"] for found in errors) <= 1e-5


@pytest.fixture(scope="module")
def messages() -> list[dict[str, str]]:
    """The errors on each of two ranks."""
    return spawn(refused, 2, timeout=150)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no plugin", ["SequenceParallelConfigError", "context_parallel_size=2", "needs the plugin", "lasp"]),
        ("another method", ["SequenceParallelConfigError", "--sp-method ulysses does not do", "--sp-softmax-method"]),
        ("unknown decay", ["SequenceParallelConfigError", "decay='exponential'", "gated-delta"]),
        ("heads", ["SequenceParallelConfigError", "linear_num_key_heads=3", "4 / 3 leaves 1"]),
        ("frequency", ["SequenceParallelConfigError", "linear_attention_freq=0", "k of 1 or more"]),
        ("another size", ["SequenceParallelConfigError", "context_parallel_size=4"]),
        ("packed", ["UnsupportedError", "packed_seq_params='thd'"]),
        ("cache", ["UnsupportedError", "inference_context"]),
        ("documents", ["UnsupportedError", "attention_mask=", "--reset-attention-mask"]),
        ("documents on one rank", ["UnsupportedError", "attention_mask=", "--reset-attention-mask"]),
        ("packed gated delta net", ["UnsupportedError", "packed_seq_params='thd'"]),
    ],
)
def test_what_it_cannot_compute_is_refused_on_every_rank(
    case: str, words: list[str], messages: list[dict[str, str]]
) -> None:
    (message,) = {found[case] for found in messages}
    assert all(word in message for word in words), message


@pytest.mark.timeout(180)
def test_a_causal_mask_and_a_refusal_leave_the_layer_usable(messages: list[dict[str, str]]) -> None:
    assert [found["still works"] for found in messages] == ["", ""]


@pytest.mark.parametrize(("layout", "order"), [("auto", "contiguous"), ("zigzag", "zigzag")])
def test_tokens_are_contiguous_unless_the_user_says_else(layout: str, order: str) -> None:
    # The softmax method takes either.
    assert Settings("lasp", layout=layout, softmax_method="ring").layout_kind() == order


@pytest.mark.timeout(180)
def test_layer_specs_follow_the_frequency(messages: list[dict[str, str]]) -> None:
    assert [found["layers"] for found in messages] == ["every third: LLSL, list: SLLS, none: LLLL"] * 2
