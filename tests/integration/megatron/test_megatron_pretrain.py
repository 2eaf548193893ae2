"""`megatron.training.pretrain`, whose command line, data, log and validation are Megatron's own."""

from __future__ import annotations

import re

import pytest
from cores import needs_training
from megatron_runs import EXAMPLES, ROOT, torchrun

pytestmark = [pytest.mark.timeout(400), needs_training()]
SCRIPT = str(EXAMPLES / "pretrain_gpt.py")
ARGUMENTS = (ROOT / "configs" / "megatron" / "gpt_tiny_cpu.args").read_text().split()


def logged(ranks: int, *argv: str) -> list[tuple[str, str]]:
    """Loss and gradient norm of each iteration, as Megatron prints them."""
    output = torchrun(ranks, "-m", "dsp_plugin.launch", "--cpu", SCRIPT, *ARGUMENTS, *argv).stdout
    lines = re.findall(r"lm loss: (\S+) .*?grad norm: (\S+) ", output)
    assert len(lines) == 3, output[-5000:]
    return lines


def assert_same(found: list[tuple[str, str]], expected: list[tuple[str, str]]) -> None:
    """Seven and four printed digits, the last of which may round differently."""
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
        assert float(norm) == pytest.approx(float(expected_norm), abs=1.1e-3)


@pytest.fixture(scope="module")
def stock() -> list[tuple[str, str]]:
    lines = logged(1)
    assert float(lines[-1][0]) < float(lines[0][0])
    return lines


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        pytest.param(2, "--context-parallel-size 2 --sp-method ulysses", marks=pytest.mark.matrix),
        pytest.param(2, "--context-parallel-size 2 --sp-method lightseq", marks=pytest.mark.matrix),
        pytest.param(
            2,
            '--context-parallel-size 2 --sp-method ulysses --sp-memory {"tile_tokens":13,"mlp_tiles":3}',
            marks=pytest.mark.matrix,
        ),
        (4, "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 --sp-method ulysses"),
    ],
    ids=["cp2", "lightseq: cp2", "cp2, tiles", "tp2 x cp2, sequence parallel"],
)
def test_logs_the_losses_of_stock_megatron(ranks: int, arguments: str, stock: list[tuple[str, str]]) -> None:
    assert_same(logged(ranks, *arguments.split()), stock)


def test_context_parallelism_without_a_method_is_upstreams() -> None:
    done = torchrun(
        2, "-m", "dsp_plugin.launch", "--cpu", SCRIPT, *ARGUMENTS, "--context-parallel-size", "2", check=False
    )
    assert done.returncode != 0
    assert "Context parallelism is only supported by TEDotProductAttention" in done.stdout
