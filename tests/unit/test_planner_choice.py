"""What the planner chooses where the answer is known."""

from dataclasses import replace

import pytest

from dsp_plugin.config.memory import MemoryConfig
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.mask import MaskSpec
from dsp_plugin.planner.arrangement import Arrangement
from dsp_plugin.planner.choice import Task, choose, memory_for
from dsp_plugin.planner.cluster import PRESETS, of_size
from dsp_plugin.planner.memory_model import memory_of
from dsp_plugin.planner.model_files import shapes_of
from dsp_plugin.planner.paste import flags, sections
from dsp_plugin.planner.time_model import imbalance, time_of, wire_bytes

LLAMA = shapes_of("llama-8b")
GIB = 1 << 30


def cluster(gpus, preset="h100", **changes):
    return replace(of_size(PRESETS[preset], gpus, 8), **changes)


def task(gpus, length, shapes=LLAMA, **settings):
    return Task(shapes, cluster(gpus), length=length, **settings)


def of(found, method, ulysses, ring):
    return next(
        each
        for each in found
        if (each.how.method, each.how.ulysses, each.how.ring, each.how.tensor) == (method, ulysses, ring, 1)
    )


def test_no_more_ulysses_ranks_than_heads():
    found = choose(task(64, 1 << 20, recompute="full"))
    too_many = of(found, "ulysses", 64, 1)
    assert not too_many.fits
    assert "heads=32 < ulysses_size=64" in too_many.reason
    assert all(each.how.ulysses <= 32 for each in found if each.fits)


@pytest.mark.parametrize("length", [1 << 15, 1 << 17])
def test_one_node_exchanges_heads(length):
    """A ring's hops there are too short to be worth their merging."""
    found = choose(task(8, length, tensor=1, stage=3, recompute="full"))
    by_size = {each.how.method: each for each in found if each.how.size == 8}
    assert by_size["ulysses"].rate > by_size["ring"].rate
    assert found[0].how.method in ("ulysses", "usp")


def test_across_nodes_heads_are_exchanged_within_and_keys_passed_on_across():
    """At lengths where the wire counts."""
    slow = replace(cluster(16), inter=5e9)
    found = choose(Task(LLAMA, slow, length=1 << 17, tensor=1, stage=3, recompute="full"))
    at_16 = sorted((each for each in found if each.how.size == 16 and each.fits), key=lambda each: -each.rate)
    assert (at_16[0].how.method, at_16[0].how.ulysses, at_16[0].how.ring) == ("usp", 8, 2)
    assert of(found, "ulysses", 16, 1).rate < of(found, "usp", 8, 2).rate


def test_a_large_model_needs_its_states_shared():
    found = choose(task(8, 8192, shapes_of("llama-70b"), tensor=1, stage=0))
    assert not any(each.fits for each in found)
    assert "does not fit by" in found[0].reason
    assert "of states" in found[0].reason
    found = choose(task(64, 131072, shapes_of("llama-70b")))
    assert found[0].fits
    assert found[0].how.stage == 3 or found[0].how.tensor > 1


def test_longest_grows_with_memory_and_is_the_longest():
    lengths = []
    for gib in (40, 60, 79):
        asked = Task(LLAMA, cluster(8, device_bytes=gib * GIB), tensor=1, methods=("ulysses",))
        winner = choose(asked)[0]
        assert winner.fits
        assert memory_of(LLAMA, winner.how, winner.length).device <= asked.device_bytes
        longer = int(winner.length * 1.02)
        how = replace(winner.how, stage=3, recompute="full")
        assert memory_for(LLAMA, how, longer, asked.device_bytes, asked.host_bytes) is None
        lengths.append(winner.length)
    assert lengths == sorted(set(lengths))


def test_the_least_costly_parts_that_fit_are_taken():
    how = Arrangement("deepspeed", 8, 8, "ulysses", 8, 1, stage=3)
    bare = memory_of(LLAMA, how, 1 << 19).device
    assert memory_for(LLAMA, how, 1 << 19, bare, 1 << 40) == MemoryConfig()
    tiled = memory_for(LLAMA, how, 1 << 19, bare - 1, 1 << 40)
    assert tiled is not None
    assert tiled.model_fields_set == {"tile_tokens"}
    found, budget = tiled, bare
    taken = []
    while found is not None:
        budget = memory_of(LLAMA, replace(how, memory=found), 1 << 19).device
        taken.append(found.model_fields_set)
        found = memory_for(LLAMA, how, 1 << 19, budget - 1, 1 << 40)
    assert {"tile_tokens", "offload", "mlp_tiles"} <= taken[-1]


def test_room_for_activations_decides_which_parts_are_taken():
    how = Arrangement("deepspeed", 8, 8, "ulysses", 8, 1, stage=3)
    whole = memory_of(LLAMA, how, 1 << 20)
    states = whole.device - whole.activations
    roomy, tight, none = (
        memory_for(LLAMA, how, 1 << 20, device_bytes, 1 << 40) for device_bytes in (1 << 50, states + (40 << 30), None)
    )
    assert roomy == MemoryConfig()
    assert tight is not None
    assert none is not None
    assert "tile_tokens" in tight.model_fields_set
    assert {"tile_tokens", "mlp_tiles", "offload"} <= none.model_fields_set


def test_host_memory_that_does_not_suffice_is_used_up_to_its_budget():
    how = Arrangement("deepspeed", 8, 8, "ulysses", 8, 1, stage=3)
    full = memory_of(LLAMA, replace(how, memory=MemoryConfig(tile_tokens=523, offload=True)), 1 << 20)
    found = memory_for(LLAMA, how, 1 << 20, full.device + GIB, full.host - GIB)
    assert found is not None
    assert 0 < found.host_bytes <= full.host - GIB


@pytest.mark.parametrize(("ring", "expected"), [(2, 1.5), (4, 1.75), (8, 1.875)])
def test_a_contiguous_causal_ring_waits_for_its_last_rank(ring, expected):
    how, causal = Arrangement("deepspeed", ring, ring, "ring", 1, ring), MaskSpec(causal=True)
    assert imbalance(how, 1 << 16, causal) == pytest.approx(1.0, rel=1e-3)
    assert imbalance(replace(how, order="contiguous"), 1 << 16, causal) == pytest.approx(expected, rel=1e-3)
    # LightSeq, in the same order, leaves a rank idle one step in P + 2.
    assert imbalance(replace(how, method="lightseq"), 1 << 16, causal) == pytest.approx(1 + 1 / (ring + 1))


def test_bytes_are_those_of_the_methods():
    how = Arrangement("deepspeed", 8, 8, "usp", 4, 2)
    around, along = wire_bytes(LLAMA, how, 1 << 16, None)
    shard = (1 << 16) // 8 * 4096 * 2
    assert around.forward == 2 * 5 * 3 * shard // (4 * 4)
    assert along.forward == pytest.approx(2 * 0.25 * shard * 0.75, rel=0.35)


def test_recomputing_takes_longer_and_holds_less():
    how = Arrangement("deepspeed", 8, 8, "ulysses", 8, 1, stage=3)
    ways = [replace(how, recompute=name) for name in ("none", "keep_attention", "full")]
    steps = [time_of(LLAMA, way, 1 << 17, cluster(8)).step for way in ways]
    held = [memory_of(LLAMA, way, 1 << 17).kept for way in ways]
    assert steps == sorted(set(steps))
    assert held == sorted(set(held), reverse=True)


@pytest.mark.parametrize("gpus", [1, 8, 64])
@pytest.mark.parametrize("length", [1 << 15, None])
def test_what_is_printed_is_a_legal_config(gpus, length):
    for each in choose(task(gpus, length)):
        if each.fits:
            config = SequenceParallelConfig.from_deepspeed(sections(each.how))
            assert config is not None
            assert (config.ulysses_size, config.ring_size) == (each.how.ulysses, each.how.ring)
            assert config.memory == each.how.memory


def test_megatrons_flags_name_sizes_that_make_the_world():
    found = choose(task(64, 1 << 17, shapes_of("llama-70b"), framework="megatron", micro_batches=8))
    winner = found[0]
    assert winner.fits
    text = " ".join(flags(winner.how, winner.length))
    assert f"--context-parallel-size {winner.how.size}" in text
    assert 64 % (winner.how.size * winner.how.tensor * winner.how.pipeline) == 0
    assert any(each.how.pipeline > 1 and each.fits for each in found)


def test_every_loser_says_why():
    found = choose(task(16, 1 << 18))
    assert not found[0].reason
    assert all(each.reason for each in found[1:])
