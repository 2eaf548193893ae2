"""`megatron.training.pretrain`, whose command line, data, log and validation are Megatron's own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from megatron_runs import ROOT, torchrun

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.training") is None,
        reason="this megatron-core is core only; its wheel ships megatron.training from 0.17 on",
    ),
]
SCRIPT = str(ROOT / "launch" / "pretrain_gpt.py")
CONFIGS = ROOT / "configs" / "megatron"
ARGUMENTS = (CONFIGS / "gpt_tiny_cpu.args").read_text().split()


def logged(ranks: int, *argv: str, arguments: list[str] = ARGUMENTS) -> list[tuple[str, str]]:
    """Loss and gradient norm of each iteration, as Megatron prints them."""
    return iterations(torchrun(ranks, "-m", "dsp_plugin.launch", "--cpu", SCRIPT, *arguments, *argv).stdout)


def iterations(output: str) -> list[tuple[str, str]]:
    """The same, from what a run has printed."""
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
        (2, "--context-parallel-size 2 --sp-method ulysses"),
        (2, "--context-parallel-size 2 --sp-method lightseq"),
        (4, "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 --sp-method ulysses"),
    ],
    ids=["cp2", "lightseq: cp2", "tp2 x cp2, sequence parallel"],
)
def test_logs_the_losses_of_stock_megatron(ranks: int, arguments: str, stock: list[tuple[str, str]]) -> None:
    assert_same(logged(ranks, *arguments.split()), stock)


def test_launch_script_of_the_hybrid_trains_like_one_process() -> None:
    spec = "--spec dsp_plugin.patches.megatron.linear_specs gated_delta_gpt"
    tiny = CONFIGS / "hybrid_tiny_cpu.args"
    settings = {
        "TORCHRUN": f"{sys.executable} -m torch.distributed.run",
        "ARGUMENTS": str(tiny),
        **{"GPUS": "2", "TP": "1", "CP": "2", "DSP_PLUGIN_CPU": "1", "OMP_NUM_THREADS": "1"},
    }
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "megatron_hybrid_lasp.sh")],
        env={**os.environ, **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    one = logged(1, *spec.split(), arguments=tiny.read_text().split())
    assert float(one[-1][0]) < float(one[0][0])
    assert_same(iterations(done.stdout), one)


def test_help_and_args_have_the_flags() -> None:
    done = torchrun(1, "-m", "dsp_plugin.launch", "--cpu", SCRIPT, "--help")
    names = "method ulysses-size ring-size ulysses-order ring-gradient-dtype layout kernel debug recompute exchange"
    flags = [f"--sp-{name}" for name in (*names.split(), "softmax-method")]
    assert all(flag in done.stdout for flag in flags)
    assert "--context-parallel-size" in done.stdout


def test_context_parallelism_without_a_method_is_upstreams() -> None:
    done = torchrun(
        2, "-m", "dsp_plugin.launch", "--cpu", SCRIPT, *ARGUMENTS, "--context-parallel-size", "2", check=False
    )
    assert done.returncode != 0
    assert "Context parallelism is only supported by TEDotProductAttention" in done.stdout


def test_document_masks_are_refused_by_name() -> None:
    # The mock documents are hundreds of tokens long: a sample must be longer to have a border inside.
    long = "--seq-length 2048 --max-position-embeddings 2048"
    arguments = f"--context-parallel-size 2 --sp-method ulysses --reset-attention-mask {long}"
    done = torchrun(2, "-m", "dsp_plugin.launch", "--cpu", SCRIPT, *ARGUMENTS, *arguments.split(), check=False)
    assert done.returncode != 0
    assert "attention_mask=" in done.stdout
    assert "--reset-attention-mask" in done.stdout
