"""Every method beside every feature of Megatron-core: each trains as one process of stock Megatron does.

fp32, grouped-query attention, rotary embeddings, gradient clipping, tied embeddings, 4 microbatches, 3 optimizer steps.
`lasp` is a hybrid of gated delta rules and softmax attention. What `dsp` does there is in test_megatron_video.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cores import NEWEST
from megatron_runs import PP2, TP2, VPP2, Run, assert_parity, assert_within_noise, model_arguments, train

FULL = "--recompute-granularity full"

# Method: its arguments, its least sequence-parallel size, the model.
METHODS = {
    "ulysses": ("--sp-method ulysses", 2, ""),
    "ring": ("--sp-method ring", 2, ""),
    "usp": ("--sp-method usp --sp-ulysses-size 2 --sp-ring-size 2", 4, ""),
    "lightseq": ("--sp-method lightseq", 2, ""),
    "lasp": ("--sp-method lasp", 2, "--linear-decay gated-delta --softmax-every 2"),
}
# Feature: ranks beside those of the sequence, and arguments.
FEATURES = {
    "TP": (2, TP2),
    "TP-SP": (2, f"{TP2} --sequence-parallel"),
    "PP": (2, PP2),
    "interleaved PP": (2, f"{PP2} {VPP2}"),
    "distributed optimizer": (2, "--use-distributed-optimizer"),
    "recompute": (1, FULL),
    "keep_attention": (1, f"{FULL} --sp-recompute keep_attention"),
    "bf16": (1, "--bf16"),
    "micro-batches > 1": (1, ""),
    "unequal token counts": (1, "--mask-newlines"),
    "TP2 x SP2 x PP2": (4, f"{TP2} {PP2} --sequence-parallel"),
    "SP2 x PP2 x DP2": (4, f"{PP2} --use-distributed-optimizer"),
}
# In CI: with every feature one method, with every method two to four features, in another pairing than those of
# test_megatron_parity.py.
COVERING = {
    ("ulysses", "bf16"),
    ("ulysses", "TP2 x SP2 x PP2"),
    ("ulysses", "unequal token counts"),
    ("ring", "TP"),
    ("ring", "distributed optimizer"),
    ("ring", "unequal token counts"),
    ("usp", "micro-batches > 1"),
    ("usp", "recompute"),
    ("usp", "unequal token counts"),
    ("lightseq", "keep_attention"),
    ("lightseq", "interleaved PP"),
    ("lightseq", "TP-SP"),
    ("lasp", "PP"),
    ("lasp", "SP2 x PP2 x DP2"),
    ("lasp", "unequal token counts"),
}
# test_megatron_parity.py, with another pairing, serves the oldest.
pytestmark = NEWEST


def cells() -> Iterator[Any]:
    """A parameter set for every cell."""
    for method in METHODS:
        for feature in FEATURES:
            marks = [pytest.mark.cell("megatron", method, feature)]
            if (method, feature) not in COVERING:
                marks.append(pytest.mark.matrix)
            yield pytest.param(method, feature, id=f"{method}: {feature}", marks=marks)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("method", "feature"), list(cells()))
def test_trains_like_one_process_of_stock_megatron(
    method: str, feature: str, reference: Callable[..., Run], tmp_path: Path
) -> None:
    flags, size, model = METHODS[method]
    others, arguments = FEATURES[feature]
    argv = [*model.split(), *arguments.split(), "--context-parallel-size", str(size), *flags.split()]
    run = train(tmp_path, size * others, *argv, timeout=300)
    expected = reference(*model_arguments(argv))
    if feature == "bf16":
        exact = reference(*model_arguments([argument for argument in argv if argument != "--bf16"]))
        assert_within_noise(run, expected, exact)
    else:
        assert_parity(run, expected)


@pytest.mark.cell("megatron", "ulysses", "unequal token counts")
@pytest.mark.cell("megatron", "ring", "unequal token counts")
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_uneven_counts_per_token(method: str, reference: Callable[..., Run], tmp_path: Path) -> None:
    """The other way in which Megatron averages, over data-parallel ranks too."""
    argv = ["--mask-newlines", "--calculate-per-token-loss", "--context-parallel-size", "2", "--sp-method", method]
    assert_parity(train(tmp_path, 4, *argv), reference(*model_arguments(argv)))
