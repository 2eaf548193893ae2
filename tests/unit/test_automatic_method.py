"""``"method": "auto"``: settled by shapes alone, alike on every rank, and refused where they are not known."""

import argparse
import pickle

import pytest
import torch
from torch import nn

from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups, parallelize
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.patches.megatron.arguments import add_flags, settle_method
from dsp_plugin.patches.megatron.state import Settings
from dsp_plugin.planner.auto import method_for
from dsp_plugin.planner.model_files import shapes_of
from dsp_plugin.planner.shapes import Shapes

LLAMA = shapes_of("llama-8b")
FEW = Shapes(4, 256, 4, 2, 64, 512, 1000, positions=8192)


def chosen(monkeypatch, shapes, size, *, world=None, node=8, **section):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    found = method_for(shapes, {"method": "auto", "size": size, **section}, world_size=world or size)
    config = SequenceParallelConfig(**found)
    return config.method, config.ulysses_size, config.ring_size


def test_one_node_exchanges_heads(monkeypatch):
    assert chosen(monkeypatch, LLAMA, 8) == ("ulysses", 8, 1)
    assert chosen(monkeypatch, LLAMA, 4, world=16) == ("ulysses", 4, 1)


def test_across_nodes_heads_are_exchanged_within(monkeypatch):
    method, ulysses, ring = chosen(monkeypatch, shapes_of("llama-70b"), 16, world=16)
    assert ulysses <= 8
    assert ulysses * ring == 16
    assert method in ("usp", "ring")


def test_no_more_ulysses_ranks_than_heads(monkeypatch):
    assert chosen(monkeypatch, FEW, 8)[1] <= 4
    assert chosen(monkeypatch, FEW, 1) == ("ulysses", 1, 1)


def test_what_else_is_asked_for_is_had(monkeypatch):
    rounds = {"memory": {"attention_rounds": 2}}
    assert chosen(monkeypatch, FEW, 2, **rounds)[1] == 2
    assert chosen(monkeypatch, LLAMA, 8, layout="zigzag")[0] in ("ring", "usp")


def test_it_stands_in_until_then():
    config = SequenceParallelConfig(method="auto", size=8, log_every=3)
    assert config.automatic
    assert config.size == 8
    assert config.given() == {"method": "auto", "size": 8, "log_every": 3}
    assert pickle.loads(pickle.dumps(config)).automatic
    assert not SequenceParallelConfig(method="usp", size=8).automatic


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "size: missing"),
        ({"size": 8, "ulysses_size": 2}, 'method is "auto", which chooses it'),
        ({"size": 8, "softmax_method": "ring"}, "softmax_method='ring'"),
        ({"size": 8, "layout": "striped"}, "not all that it may choose take this order"),
        ({"size": 8, "plan": "a:b"}, "plan does not tell them"),
        ({"size": 8, "batch": {"x": 1}, "attention": ["a"], "gather_output": 1}, "batch does not tell them"),
    ],
)
def test_what_it_cannot_be_beside_is_refused(settings, words):
    with pytest.raises(SequenceParallelConfigError, match=words):
        SequenceParallelConfig(method="auto", **settings)


def test_a_model_of_transformers_tells_its_shapes():
    transformers = pytest.importorskip("transformers")
    from dsp_plugin.patches.transformers.checks import checked_section

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
            )
        )
    config = checked_section(model, {"method": "auto", "size": 2, "quiet": True})
    assert not config.automatic
    assert config.method in ("ulysses", "ring")
    assert (config.size, config.quiet) == (2, True)
    # Groups of plain scripts are older than what is known of the model.
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        asked = SequenceParallelConfig(method="auto", size=2)
        groups = SequenceParallelGroups.build(asked)
        words = f'Write what it comes to for this model: "method": "{config.method}", "size": 2'
        with pytest.raises(SequenceParallelConfigError, match=words):
            parallelize(model, config=asked, groups=groups)
        with pytest.raises(SequenceParallelConfigError, match="of Linear they are not known"):
            parallelize(nn.Linear(2, 2), config=asked, groups=groups)
    finally:
        dist.destroy_process_group()


def flags(*argv):
    return add_flags(argparse.ArgumentParser()).parse_args(list(argv))


MEGATRON = "--num-layers 4 --hidden-size 256 --num-attention-heads 8 --vocab-size 1000 --seq-length 4096".split()  # noqa: SIM905


def test_megatrons_arguments_tell_them(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    given = flags("--sp-method", "auto")
    settle_method(given, [*MEGATRON, "--context-parallel-size", "4"])
    config = SequenceParallelConfig.from_megatron(argparse.Namespace(**vars(given), context_parallel_size=4))
    assert config is not None
    assert not config.automatic
    assert config.size == 4
    named = flags("--sp-method", "ring")
    settle_method(named, [])
    assert named.sp_method == "ring"


def test_where_they_do_not_it_is_refused():
    with pytest.raises(SequenceParallelConfigError, match="--num-layers: missing"):
        settle_method(flags("--sp-method", "auto"), ["--context-parallel-size", "4"])
    with pytest.raises(UnsupportedError, match="--hybrid-override-pattern"):
        settle_method(flags("--sp-method", "auto"), [*MEGATRON, "--hybrid-override-pattern", "M*"])
    with pytest.raises(SequenceParallelConfigError, match="does not start"):
        Settings("auto").config(4)
