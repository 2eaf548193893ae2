"""The config: what each source gives, and what follows from it."""

from __future__ import annotations

import pytest
from config_makers import BATCH, Config, deepspeed, dsp, lasp, megatron, ulysses

from dsp_plugin.config.settings import EXCHANGE_CHOICES, KERNEL_CHOICES, LAYOUT_CHOICES
from dsp_plugin.kernels.table import KERNELS
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.state_exchange import EXCHANGES


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"size": 4}, (4, 4, 1)),
        ({"ulysses_size": 4}, (4, 4, 1)),
        ({"size": 4, "ulysses_size": 4, "ring_size": 1}, (4, 4, 1)),
        ({"ring_size": 1}, (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("method", ["ulysses", "dsp"])
def test_sizes_follow_from_each_other(method, given, sizes):
    config = Config(method=method, **given)
    assert (config.size, config.ulysses_size, config.ring_size) == sizes


def test_the_same_settings_from_every_source_are_the_same_config():
    expected = Config(method="ulysses", size=4, layout="zigzag", kernel="math", debug=True, quiet=True)
    section = {"method": "ulysses", "size": 4, "layout": "zigzag", "kernel": "math", "debug": True, "quiet": True}
    assert deepspeed(section) == expected
    assert Config.parse(section, source="test") == expected
    flags = {"sp_method": "ulysses", "sp_layout": "zigzag", "sp_kernel": "math", "sp_debug": True, "sp_quiet": True}
    assert megatron(**flags, context_parallel_size=4) == expected
    assert megatron(**flags, sp_ulysses_size=None, sp_ring_size=1, context_parallel_size=4) == expected


def test_absent_settings_mean_no_sequence_parallelism():
    assert Config.from_deepspeed({"train_batch_size": 8}) is None
    assert Config.from_deepspeed({"train_batch_size": 8, "sequence_parallel": None}) is None
    # DeepSpeed's own keys that start alike are not ours to judge.
    assert Config.from_deepspeed({"sequence_parallel_size": 2, "data_parallel_size": 4}) is None
    assert megatron(context_parallel_size=2) is None
    assert megatron(sp_method=None, sp_debug=False, context_parallel_size=2) is None
    assert megatron(sp_method="ulysses").size == 1


def test_legal_combinations():
    assert ulysses(**BATCH, loss={}).loss.ignore_index == -100
    assert ulysses(**BATCH, gather_output=-2, positions=None).gather_output == -2
    assert ulysses(plan="my.plans:Plans.video", layout="contiguous").plan == "my.plans:Plans.video"
    assert dsp(positions=None).positions is None
    assert ulysses(layout="striped").layout_for("zigzag") == "striped"
    assert ulysses().layout_for("zigzag") == "zigzag"
    assert ulysses().layout_for() == "contiguous"


def test_a_loss_with_labels_and_outputs_without():
    both = ulysses(**BATCH, loss={}, gather_output=1)
    assert (both.loss.labels, both.gather_output) == ("labels", 1)


@pytest.mark.parametrize(
    ("softmax_method", "given", "sizes"),
    [
        (None, {"size": 4}, (4, 1, 4)),
        ("lightseq", {"ring_size": 3}, (3, 1, 3)),
        ("ring", {"size": 4}, (4, 1, 4)),
        ("ulysses", {"size": 4}, (4, 4, 1)),
        ("usp", {"size": 4, "heads": 2}, (4, 2, 2)),
        ("usp", {"ulysses_size": 2, "ring_size": 3}, (6, 2, 3)),
    ],
)
def test_under_lasp_the_axes_are_those_of_the_softmax_method(softmax_method, given, sizes):
    chosen = {} if softmax_method is None else {"softmax_method": softmax_method}
    config = Config(method="lasp", **given, **chosen)
    assert (config.size, config.ulysses_size, config.ring_size) == sizes
    assert config.for_softmax == (softmax_method or "lightseq")


@pytest.mark.parametrize("method", [method.name for method in METHODS.values() if method.kind != "linear"])
def test_other_methods_serve_softmax_themselves(method):
    assert Config(method=method, size=2, exchange="auto").for_softmax == method


def test_under_lasp_the_layout_is_one_that_softmax_layers_can_have():
    assert lasp().layout_for() == "contiguous"
    assert lasp().layout_for("zigzag") == "contiguous"
    assert lasp(softmax_method="ring").layout_for() == "contiguous"
    assert lasp(softmax_method="ring").layout_for("zigzag") == "zigzag"
    assert lasp(softmax_method="ring", layout="zigzag").layout_for() == "zigzag"
    assert lasp(softmax_method="ring").layout_for("striped") == "contiguous"


def test_linear_settings_from_every_source_are_the_same_config():
    expected = lasp(exchange="scan", softmax_method="usp", ulysses_size=2)
    assert deepspeed({"method": "lasp", "size": 4, "exchange": "scan", "softmax_method": "usp", "ulysses_size": 2}) == (
        expected
    )
    flags = {"sp_method": "lasp", "sp_exchange": "scan", "sp_softmax_method": "usp", "sp_ulysses_size": 2}
    assert megatron(**flags, context_parallel_size=4) == expected


def test_exchanges_are_those_that_exist():
    assert ("auto", *EXCHANGES) == EXCHANGE_CHOICES
    for exchange in EXCHANGE_CHOICES:
        assert lasp(exchange=exchange).exchange == exchange


def test_check_world_returns_the_data_parallel_size():
    assert ulysses(size=2).check_world(8) == 4
    assert ulysses(size=2).check_world(8, tensor_parallel_size=2, pipeline_parallel_size=2) == 1


def test_check_model_accepts_what_the_methods_serve():
    ulysses(size=4).check_model(heads=7, kv_heads=1, length=5)
    ulysses(size=3).check_model(heads=8, kv_heads=2, tensor_parallel_size=2)
    # Fewer key/value heads than tensor-parallel ranks: Megatron repeats them.
    ulysses(size=2).check_model(heads=8, kv_heads=2, tensor_parallel_size=4)
    # DSP does not look at heads.
    dsp(size=8).check_model(heads=1)


def test_a_config_is_a_value_and_cannot_be_changed():
    assert ulysses() == ulysses()
    with pytest.raises(ValueError, match="frozen"):
        ulysses().size = 4


def test_choices_are_those_of_the_tables():
    assert ("auto", *KERNELS) == KERNEL_CHOICES
    assert LAYOUT_CHOICES == ("auto", "contiguous", "zigzag", "striped")
    for kernel in KERNEL_CHOICES:
        assert ulysses(kernel=kernel).kernel == kernel
