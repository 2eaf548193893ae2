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

# Wide and long enough for checkpoints that are worth moving: of 1 MiB, fp32.
WIDER = {"hidden_size": 128, "intermediate_size": 256}
LONGER = 4100
PARTS = {
    "tile_tokens": {"tile_tokens": 128},
    "mlp_tiles": {"mlp_tiles": 8},
    "attention_rounds": {"attention_rounds": 2},
    "offload": {"offload": True},
    "all": {"tile_tokens": 128, "mlp_tiles": 8, "attention_rounds": 2, "offload": True},
}
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


def job(folder: Path, method: str, size: int, memory: dict[str, Any] | None = None, **settings: Any) -> Job:
    (folder / "config.json").write_text(json.dumps(SHAPE if memory is None else {**SHAPE, **WIDER}))
    settings = {"length": 402 if memory is None else LONGER, **settings}
    config = SequenceParallelConfig(method=method, size=size, memory=memory or {})
    return Job(partial(subject, f"hf:{folder}", settings), config)


def _real_ranks(jobs: list[Job]) -> list[RankRun]:
    return [real_rank(job) for job in jobs]


def _compare(jobs: list[Job], size: int) -> list[RankRun]:
    by_rank = spawn(_real_ranks, size, jobs, timeout=250.0)
    for index, each in enumerate(jobs):
        for rank in {0, size - 1}:
            dry, real = dry_run(each, size, rank), by_rank[rank][index]
            assert dry.rows == real.rows
            assert dry.memory[:3] == real.memory[:3]
            assert dry.memory.host == real.memory.host
            assert dry.memory.activations == pytest.approx(real.memory.activations, rel=0.1), each
            assert dry.memory.peak == pytest.approx(real.memory.peak, rel=0.1), each
    return by_rank[0]


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.matrix)])
def test_a_dry_run_of_a_language_model_has_the_bytes_and_the_memory_of_the_real_run(size: int, tmp_path: Path) -> None:
    jobs = [job(tmp_path, "ulysses", size, checkpointing=kept) for kept in (0, 1)]
    if size > 2:
        jobs.append(job(tmp_path, "ring", size))
    _compare(jobs, size)


@pytest.mark.parametrize(
    "part", ["all", *(pytest.param(part, marks=pytest.mark.matrix) for part in PARTS if part != "all")]
)
def test_so_it_has_with_what_is_traded_for_memory(part: str, tmp_path: Path) -> None:
    (found,) = _compare([job(tmp_path, "ulysses", 2, PARTS[part])], 2)
    assert (found.memory.host > 0) == ("offload" in PARTS[part])
