"""A dry run of a GPT of Megatron-core says what its ranks do: bytes exactly, memory within a tenth."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from dsp_plugin import SequenceParallelConfig
from dsp_plugin.rehearsal.dryrun import Job, RankRun, dry_run, real_rank
from dsp_plugin.rehearsal.subject import subject
from dsp_plugin.spawn import spawn

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.distributed, pytest.mark.megatron, pytest.mark.timeout(300)]

SHAPE = """
--num-layers 4 --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --vocab-size 1000 --make-vocab-size-divisible-by 8 --seq-length 512 --swiglu --disable-bias-linear
--normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights
"""
PARALLEL = {
    "tensor": (4, "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full"),
    "pipeline": (4, "--pipeline-model-parallel-size 2"),
}


def job(file: Path, arguments: str) -> Job:
    file.write_text(SHAPE + arguments)
    config = SequenceParallelConfig(method="ulysses", size=2)
    return Job(partial(subject, f"megatron:{file}", {}, config), config, torch.float32)


def dry(asked: Job, ranks: int) -> list[RankRun]:
    """In a process of its own, since CPU mode does not end."""
    return [dry_run(asked, ranks, rank) for rank in range(ranks)]


def _alone(asked: Job, ranks: int) -> list[RankRun]:
    import torch.distributed as dist

    dist.destroy_process_group()
    return dry(asked, ranks)


@pytest.mark.parametrize("how", [pytest.param("tensor"), pytest.param("pipeline", marks=pytest.mark.matrix)])
def test_a_dry_run_of_a_gpt_has_the_bytes_and_the_memory_of_the_real_run(how: str, tmp_path: Path) -> None:
    ranks, arguments = PARALLEL[how]
    asked = job(tmp_path / "gpt.args", arguments)
    (found,) = spawn(_alone, 1, asked, ranks, timeout=120.0)
    for real, expected in zip(spawn(real_rank, ranks, asked, timeout=200.0), found, strict=True):
        assert expected.rows == real.rows
        assert expected.memory[:3] == real.memory[:3]
        assert expected.memory.activations == pytest.approx(real.memory.activations, rel=0.1)
        assert expected.memory.peak == pytest.approx(real.memory.peak, rel=0.1)
