"""What Megatron's fp8 and fp4 recipes take away from recomputation, refused where a layer is built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dsp_plugin import UnsupportedError
from dsp_plugin.patches.megatron.recompute import check_checkpoints
from dsp_plugin.patches.megatron.state import Settings


def state(**settings: Any) -> Any:
    return SimpleNamespace(settings=Settings(method="ulysses", **settings))


def config(granularity: str | None, fp8: str | None = None, fp4: str | None = None) -> Any:
    return SimpleNamespace(recompute_granularity=granularity, fp8=fp8, fp4=fp4)


@pytest.mark.parametrize("precision", [{"fp8": "hybrid"}, {"fp4": "e2m1"}])
@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"recompute": "keep_attention"}, "--sp-recompute='keep_attention'"),
        ({"memory": {"offload": "1GiB"}}, "offload"),
    ],
)
def test_transformer_engines_checkpoint_keeps_nothing_of_ours(
    precision: dict[str, str], asked: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedError) as refused:
        check_checkpoints(state(**asked), config("full", **precision))
    for part in (named, *precision, "Transformer Engine's checkpoint", "--recompute-granularity selective"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "of"),
    [
        ({"recompute": "keep_attention"}, config("full")),
        ({"recompute": "keep_attention"}, config("selective", fp8="hybrid")),
        ({"recompute": "keep_attention"}, config(None, fp8="hybrid")),
        ({}, config("full", fp8="hybrid")),
        ({"memory": "auto"}, config("full", fp4="e2m1")),
    ],
)
def test_nothing_else_is_refused(asked: dict[str, Any], of: Any) -> None:
    check_checkpoints(state(**asked), of)
