"""The planner's bytes against dry runs of the models that they are about, and against the arithmetic of ZeRO."""

from dataclasses import replace
from functools import partial

import planned_llama
import pytest
import torch

import dsp_plugin.patches.transformers  # noqa: F401, what shards Transformers' models enters itself
from dsp_plugin import SequenceParallelConfig
from dsp_plugin.config.memory import MemoryConfig
from dsp_plugin.planner.arrangement import Arrangement
from dsp_plugin.planner.memory_model import memory_of, model_states
from dsp_plugin.planner.model_files import shapes_of
from dsp_plugin.planner.shapes import Shapes
from dsp_plugin.rehearsal.dryrun import Job, dry_run
from dsp_plugin.rehearsal.model_states import model_states as zero_states
from dsp_plugin.rehearsal.model_states import moving_bytes
from dsp_plugin.rehearsal.subject import Subject

TOLERANCE = 0.10
# Wide in the MLP, in the vocabulary, in attention, and of odd lengths and uneven heads.
MLP = Shapes(3, 256, 8, 2, 32, 896, 64)
HEAD = Shapes(2, 256, 8, 2, 32, 512, 16032)
ATTENTION = Shapes(2, 128, 16, 16, 32, 32, 64)
UNEVEN = Shapes(2, 384, 6, 3, 64, 512, 64)


def subject(shapes: Shapes, length: int, recompute: str) -> Subject:
    counts = shapes.layers, shapes.hidden, shapes.heads, shapes.kv_heads, shapes.head_dim
    rest = shapes.intermediate, shapes.vocabulary, length, recompute == "full"
    return Subject(*planned_llama.llama(*counts, *rest))


PARTS = (
    (HEAD, "ulysses", 2, 1, {"tile_tokens": 64}),
    (MLP, "ulysses", 4, 1, {"mlp_tiles": 4}),
    (ATTENTION, "ulysses", 4, 1, {"attention_rounds": 2}),
    (ATTENTION, "usp", 2, 2, {"attention_rounds": 4}),
    (HEAD, "ulysses", 2, 1, {"tile_tokens": 64, "mlp_tiles": 8}),
)


@pytest.mark.parametrize(
    ("shapes", "method", "ulysses", "ring", "parts"),
    [pytest.param(*case, marks=[] if index == 4 else pytest.mark.matrix) for index, case in enumerate(PARTS)],
)
def test_parts_of_memory_are_those_of_a_dry_run(shapes, method, ulysses, ring, parts):
    how, length = replace(alone(shapes, method, ulysses, ring), memory=MemoryConfig(**parts)), 8192
    settings = {"layout": "contiguous"} if ring > 1 else {}
    sizes = {"ulysses_size": ulysses, "ring_size": ring}
    config = SequenceParallelConfig(method=method, **sizes, quiet=True, memory=parts, **settings)
    ran = dry_run(Job(partial(subject, shapes, length, "full"), config, torch.bfloat16), how.size)
    found = memory_of(shapes, how, length)
    assert found.activations == pytest.approx(ran.memory.activations, rel=TOLERANCE)


def alone(shapes: Shapes, method: str, ulysses: int, ring: int, recompute: str = "full") -> Arrangement:
    size = ulysses * ring
    return Arrangement("deepspeed", size, size, method, ulysses, ring, recompute=recompute)


@pytest.mark.parametrize("recompute", ["full", "none"])
@pytest.mark.parametrize(
    ("shapes", "method", "ulysses", "ring", "length"),
    [
        (MLP, "ulysses", 4, 1, 4096),
        (HEAD, "ulysses", 2, 1, 4096),
        pytest.param(ATTENTION, "usp", 2, 2, 4096, marks=pytest.mark.matrix),
        pytest.param(MLP, "ulysses", 1, 1, 4096, marks=pytest.mark.matrix),
        pytest.param(HEAD, "ring", 1, 2, 4096, marks=pytest.mark.matrix),
        pytest.param(ATTENTION, "ulysses", 8, 1, 8192, marks=pytest.mark.matrix),
        pytest.param(ATTENTION, "ring", 1, 4, 8192, marks=pytest.mark.matrix),
        pytest.param(MLP, "usp", 2, 4, 8192, marks=pytest.mark.matrix),
        pytest.param(ATTENTION, "lightseq", 1, 3, 4096, marks=pytest.mark.matrix),
        pytest.param(UNEVEN, "ulysses", 4, 1, 4001, marks=pytest.mark.matrix),
    ],
)
def test_activations_are_those_of_a_dry_run(shapes, method, ulysses, ring, length, recompute):
    how = alone(shapes, method, ulysses, ring, recompute)
    settings = {"layout": "contiguous"} if ring > 1 else {}
    config = SequenceParallelConfig(method=method, ulysses_size=ulysses, ring_size=ring, quiet=True, **settings)
    ran = dry_run(Job(partial(subject, shapes, length, recompute), config, torch.bfloat16), how.size)
    found = memory_of(shapes, how, length)
    assert found.activations == pytest.approx(ran.memory.activations, rel=TOLERANCE)
    assert shapes.parameters == ran.parameter_count
    assert found.weights == pytest.approx(ran.memory.parameters, rel=0.01)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_are_those_that_zero_leaves(stage):
    shapes = shapes_of("llama-8b")
    how = Arrangement("deepspeed", 8, 8, "ulysses", 8, 1, stage=stage)
    zero = zero_states(shapes.parameters, torch.bfloat16, 8, stage)
    units = sorted([shapes.head_parameters] * 2 + [shapes.layer_parameters] * shapes.layers, reverse=True)
    assert memory_of(shapes, how, 1 << 16).moving == moving_bytes(tuple(units), torch.bfloat16, stage)
    assert model_states(shapes, how) == (zero.weights, zero.gradients, zero.optimizer)


def test_megatrons_optimizer_is_shared_by_data_and_context_parallel_ranks():
    shapes = shapes_of("llama-8b")
    whole = Arrangement("megatron", 64, 8, "ulysses", 4, 1, tensor=8)
    shared = Arrangement("megatron", 64, 8, "ulysses", 4, 1, tensor=8, stage=1)
    assert model_states(shapes, whole)[2] == pytest.approx(8 * model_states(shapes, shared)[2])
    assert model_states(shapes, whole)[:2] == model_states(shapes, shared)[:2]


@pytest.mark.parametrize(
    ("parts", "less"),
    [({"tile_tokens": 512}, "kept"), ({"mlp_tiles": 8}, "kept"), ({"offload": True}, "moment")],
)
def test_each_part_takes_less_of_the_device(parts, less):
    shapes = shapes_of("llama-8b")
    how = Arrangement("deepspeed", 8, 8, "ulysses", 8, 1, stage=3, memory=MemoryConfig(tile_tokens=512))
    if "tile_tokens" in parts:
        how = Arrangement("deepspeed", 8, 8, "ulysses", 8, 1, stage=3)
    memory = MemoryConfig(**{**how.memory.model_dump(exclude_unset=True), **parts})
    with_it = Arrangement("deepspeed", 8, 8, "ulysses", 8, 1, stage=3, memory=memory)
    before, after = memory_of(shapes, how, 1 << 20), memory_of(shapes, with_it, 1 << 20)
    assert after.device < before.device
    assert getattr(after, less) == getattr(before, less)
    assert (after.host > 0) == ("offload" in parts)
    # A layer's checkpoint is on both sides while it moves.
    both = (1 << 20) // 8 * 4096 * 2 if "offload" in parts else 0
    assert after.host + after.kept == before.kept + both


def test_rounds_take_less_where_attention_is_the_dearest():
    how = alone(ATTENTION, "ulysses", 4, 1)
    rounds = Arrangement("deepspeed", 4, 4, "ulysses", 4, 1, memory=MemoryConfig(attention_rounds=4))
    assert memory_of(ATTENTION, how, 8192).peak == "attention of a layer"
    assert memory_of(ATTENTION, rounds, 8192).device < memory_of(ATTENTION, how, 8192).device
