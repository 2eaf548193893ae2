"""Models beside GPT, of which each attention layer is an ordinary self-attention layer or multi-latent attention."""

from __future__ import annotations

from pathlib import Path

import pytest
from cores import needs
from megatron_runs import Run, assert_parity, train

SCRIPT = Path(__file__).with_name("other_models.py")
MLA = ("mla", "--num-query-groups", "8")

pytestmark = [
    pytest.mark.timeout(400),
    needs(
        "megatron.core.models.hybrid",
        "this megatron-core has no HybridModel, and builds multi-latent attention only on Transformer Engine",
    ),
]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Each model on one rank, without the plugin."""
    folder = tmp_path_factory.mktemp("models")
    return {model[0]: train(folder / model[0], 1, *model, plugin=False, script=SCRIPT) for model in (("hybrid",), MLA)}


@pytest.mark.parametrize(
    ("model", "ranks", "arguments"),
    [
        (("hybrid",), 2, "--context-parallel-size 2 --sp-method ring --recompute-granularity full"),
        (("hybrid",), 4, "--context-parallel-size 2 --tensor-model-parallel-size 2 --sp-method lightseq"),
        (MLA, 2, "--context-parallel-size 2 --sp-method ulysses"),
        (MLA, 4, "--context-parallel-size 4 --sp-method ring"),
        (MLA, 4, "--context-parallel-size 4 --sp-method lightseq"),
    ],
)
def test_trains_like_one_process(
    model: tuple[str, ...], ranks: int, arguments: str, references: dict[str, Run], tmp_path: Path
) -> None:
    assert_parity(train(tmp_path, ranks, *model, *arguments.split(), script=SCRIPT), references[model[0]])
