"""A dry run of a causal language model of Transformers says what its ranks do: bytes exactly, memory within a tenth."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsp_plugin import SequenceParallelConfig
from dsp_plugin.rehearsal.dryrun import Job, RankRun, dry_run, real_rank
from dsp_plugin.rehearsal.subject import subject
from dsp_plugin.spawn import spawn

pytest.importorskip("transformers")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}


def job(folder: Path, method: str, size: int, **settings: Any) -> Job:
    (folder / "config.json").write_text(json.dumps(SHAPE))
    settings = {"length": 402, **settings}
    return Job(partial(subject, f"hf:{folder}", settings), SequenceParallelConfig(method=method, size=size))


def _real_ranks(jobs: list[Job]) -> list[RankRun]:
    return [real_rank(job) for job in jobs]


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.matrix)])
def test_a_dry_run_of_a_language_model_has_the_bytes_and_the_memory_of_the_real_run(size: int, tmp_path: Path) -> None:
    jobs = [job(tmp_path, "ulysses", size, checkpointing=kept) for kept in (0, 1)]
    if size > 2:
        jobs.append(job(tmp_path, "ring", size))
    by_rank = spawn(_real_ranks, size, jobs, timeout=200.0)
    for index, each in enumerate(jobs):
        for rank in {0, size - 1}:
            dry, real = dry_run(each, size, rank), by_rank[rank][index]
            assert dry.rows == real.rows
            assert dry.memory[:3] == real.memory[:3]
            assert dry.memory.activations == pytest.approx(real.memory.activations, rel=0.1), each
            assert dry.memory.peak == pytest.approx(real.memory.peak, rel=0.1), each
