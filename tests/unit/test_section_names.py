"""Sections of a DeepSpeed config that mean ours by another name are refused; DeepSpeed's own keys never are."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError
from dsp_plugin.config.section_names import misnamed

OURS = {"method": "ulysses", "size": 2}
DEEPSPEED = {
    "train_batch_size": 8,
    "sequence_parallel_size": 2,
    "seq_parallel_communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
    "tensor_parallel": {"autotp_size": 2},
    "pipeline": {"stages": "auto"},
    "expert_parallel": {"enabled": False},
    "sparse_attention": {"mode": "fixed", "block": 16},
    "compression_training": {"sparse_pruning": {"shared_parameters": {"method": "l1"}}},
}


@pytest.mark.parametrize(
    "name",
    [
        *("SEQUENCE_PARALLEL", "Sequence_Parallel", "sequence-parallel", "sequence parallel", "sequenceParallel"),
        *("SequenceParallel", "sequenceparallel", "sequence.parallel", "sequence_parallel ", "sequence_parallels"),
        *("seq_parallel", "seqParallel", "SEQ-PARALLEL", "seq_par", "sequence_par", "s_parallel", "sp", "SP", "s_p"),
        *("sequence_parallelism", "sequence_parallel_config", "sp_config", "ds_sequence_parallel", "dsp", "dsp_plugin"),
        *("sequnce_parallel", "sequence_paralell", "sequence_parrallel", "context_parallel", "sequence_parallel"),
    ],
)
def test_a_section_whose_name_means_ours_is_refused(name: str) -> None:
    name = name if name != "sequence_parallel" else "\uff53equence_parallel"
    for value in (OURS, {}, 2, True, [OURS]):
        with pytest.raises(SequenceParallelConfigError, match=r'would train unsharded.*Call it "sequence_parallel"'):
            SequenceParallelConfig.from_deepspeed({**DEEPSPEED, name: value})
    # Beside the right one it is no better: which one is meant?
    with pytest.raises(SequenceParallelConfigError, match="nobody reads"):
        SequenceParallelConfig.from_deepspeed({"sequence_parallel": OURS, name: {"method": "ring", "size": 2}})


@pytest.mark.parametrize(
    "config",
    [
        {"parallelism": OURS},
        {"parallelism": {"Method": "USP", "size": 4}},
        {"long_context": {"ulysses_size": 2}},
        {"ulysses": {"size": 2}},
        {"dsp_plugin_settings": {"softmax_method": "ring"}},
        {"zero_optimization": {"stage": 1, "sequence_parallel": OURS}},
        {"deepspeed": {"sequence_parallel": {"method": "lasp", "size": 2}}},
    ],
)
def test_a_section_with_our_settings_in_it_is_refused_by_any_name_and_at_any_depth(config: dict[str, Any]) -> None:
    with pytest.raises(SequenceParallelConfigError, match="at the top level of the config"):
        SequenceParallelConfig.from_deepspeed({**DEEPSPEED, **config})


def test_deepspeeds_own_sections_are_let_pass() -> None:
    assert SequenceParallelConfig.from_deepspeed(DEEPSPEED) is None
    assert SequenceParallelConfig.from_deepspeed({**DEEPSPEED, "sequence_parallel": None}) is None
    found = SequenceParallelConfig.from_deepspeed({**DEEPSPEED, "sequence_parallel": OURS})
    assert found == SequenceParallelConfig(**OURS)


def test_no_key_that_deepspeed_reads_is_taken_for_ours() -> None:
    """Every word in DeepSpeed's own configuration code, read from its source."""
    found = importlib.util.find_spec("deepspeed")
    assert found is not None
    assert found.submodule_search_locations is not None
    words = set()
    for path in Path(found.submodule_search_locations[0]).rglob("*.py"):
        if "config" in path.stem or "constants" in path.stem:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                    words.add(node.value)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    words.add(node.target.id)
    assert {"train_batch_size", "sequence_parallel_size", "overlap_comm", "autotp_size"} <= words
    assert len(words) > 500
    # A value, of how ranks are used for experts.
    words.remove("sp")
    assert [word for word in words if misnamed({word: {"enabled": True}}) is not None] == []
