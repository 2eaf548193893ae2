"""A table of wrong settings, with what each error must say.

Wrong inputs, for which ranks are needed, are in `tests/distributed/test_errors.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from config_makers import BATCH, Config, deepspeed, dsp, lasp, megatron, ulysses

from dsp_plugin import SequenceParallelConfigError
from dsp_plugin.methods import METHODS

KNOWN = f"one of {', '.join(METHODS)}"
SOFTMAX = "ulysses, ring, usp, lightseq"
# Name: (what a user wrote, what the error must contain: setting, value, arithmetic or reason, remedy).
WRONG_CONFIGS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no method": (lambda: Config(size=2), ["method: missing", KNOWN]),
    "misspelt method": (
        lambda: Config(method="ulises", size=2),
        ["method='ulises'", "no such method", "nearest is 'ulysses'", f"Set it to {KNOWN}"],
    ),
    "method of another type": (lambda: Config(method=["ulysses"], size=2), ["method=['ulysses']", "no such method"]),
    "no size": (lambda: Config(method="dsp"), ["size: missing", "how many ranks", "divisor of the number of GPUs"]),
    "size zero": (lambda: ulysses(size=0), ["size=0", "integer of 1 or more", "such as 2"]),
    "size negative": (lambda: ulysses(size=-2), ["size=-2", "1 or more", "such as 2"]),
    "size as text": (lambda: ulysses(size="4"), ["size='4'", "not str '4'", "such as 2"]),
    "size as truth": (lambda: ulysses(size=True), ["size=True", "not bool", "such as 2"]),
    "size fractional": (lambda: ulysses(size=2.5), ["size=2.5", "not float", "such as 2"]),
    "ulysses size as text": (lambda: ulysses(ulysses_size="2"), ["ulysses_size='2'", "not str", "such as 2"]),
    "ring size zero": (lambda: ulysses(ring_size=0), ["ring_size=0", "1 or more"]),
    "sizes that do not multiply": (
        lambda: ulysses(size=4, ulysses_size=2),
        ["size=4", "2 * 1 = 2, not 4", "Set size alone"],
    ),
    "a ring for ulysses": (
        lambda: ulysses(size=4, ring_size=2),
        ["ring_size=2", "ulysses has no ring", "ulysses_size 4 * ring_size 1", "Drop ring_size"],
    ),
    "a ring for dsp": (lambda: dsp(size=4, ring_size=4), ["ring_size=4", "dsp has no ring", "Drop ring_size"]),
    "unknown layout": (lambda: ulysses(layout="zig-zag"), ["layout='zig-zag'", "striped", "mean 'zigzag'?"]),
    "layout of another method": (
        lambda: dsp(layout="zigzag"),
        ["layout='zigzag'", "dsp takes contiguous", 'or to "auto"'],
    ),
    "layout beside a plan": (
        lambda: ulysses(plan="my.plans:plan", layout="striped"),
        ["layout='striped'", "plan='my.plans:plan'", "contiguous runs", "Drop layout"],
    ),
    "unknown kernel": (lambda: ulysses(kernel="fa4"), ["kernel='fa4'", "cuda_flash", "mean 'fa3'?"]),
    "debug as text": (lambda: ulysses(debug="yes"), ["debug='yes'", "boolean", "Write true or false"]),
    "quiet as text": (lambda: ulysses(quiet="yes"), ["quiet='yes'", "boolean", "Write true or false"]),
    "plan without a colon": (lambda: dsp(plan="my.plans.plan"), ["plan='my.plans.plan'", "package.module:name"]),
    "unknown key": (
        lambda: ulysses(layuot="auto"),
        ["unknown key 'layuot'", "mean 'layout'?", "Known keys: method, size"],
    ),
    "unknown key of loss": (
        lambda: ulysses(**BATCH, loss={"label": "labels"}),
        ["unknown key 'loss.label'", "mean 'loss.labels'?", "Known keys: labels, ignore_index"],
    ),
    "key that is no text": (
        lambda: Config.parse({"method": "dsp", "size": 2, 3: 4}, source="here"),
        ["here: unknown key '3'", "Known keys: method"],
    ),
    "attention as text": (
        lambda: ulysses(attention="attn"),
        ["attention='attn'", "tuple", "list of module-name globs"],
    ),
    "batch as list": (lambda: ulysses(batch=["input_ids"]), ["batch=['input_ids']", "dictionary", '{"input_ids": 1']),
    "batch dim as text": (
        lambda: ulysses(batch={"input_ids": "1"}, attention=["attn"]),
        ["batch.input_ids='1'", "integer", "sequence dims"],
    ),
    "batch with dsp": (
        lambda: dsp(**BATCH, gather_output=1),
        ["batch={'input_ids': 1, 'labels': 1}", "DSP shards the activation", "Drop batch, or use method ulysses"],
    ),
    "batch and plan": (
        lambda: ulysses(**BATCH, gather_output=1, plan="a:b"),
        ["batch={", "plan='a:b'", "shard twice", "Keep one of plan and batch"],
    ),
    "batch without attention": (
        lambda: ulysses(batch={"input_ids": 1}, gather_output=1),
        ["attention=[]", "['input_ids']", "no module is named", '"attention": ['],
    ),
    "attention without batch": (
        lambda: ulysses(attention=["attn"]),
        ["attention=['attn']", "no forward argument is sharded", '"batch": {'],
    ),
    "neither loss nor output": (
        lambda: ulysses(**BATCH),
        ["loss: neither of loss and gather_output", '"gather_output": 1', "both if forward returns a loss only where"],
    ),
    "loss without batch": (lambda: ulysses(loss={}), ["loss={'labels'", "no forward argument is sharded", '"batch"']),
    "output without batch": (
        lambda: ulysses(gather_output=1),
        ["gather_output=1", "nothing to contract or gather", "drop this setting"],
    ),
    "output dim as text": (lambda: ulysses(**BATCH, gather_output="1"), ["gather_output='1'", "integer", "such as 1"]),
    "positions without batch": (
        lambda: ulysses(positions="position_ids"),
        ["positions='position_ids'", "positions are whole already", '"batch"'],
    ),
    "positions as number": (lambda: ulysses(**BATCH, loss={}, positions=3), ["positions=3", "string", "null if"]),
    "labels that are not sharded": (
        lambda: ulysses(**BATCH, loss={"labels": "targets"}),
        ["loss.labels='targets'", "['input_ids', 'labels']", 'Add "targets" to batch'],
    ),
    "loss as text": (lambda: ulysses(**BATCH, loss="labels"), ["loss='labels'", "dictionary", '{"labels": "labels"']),
    "ignore_index as text": (
        lambda: ulysses(**BATCH, loss={"ignore_index": "-100"}),
        ["loss.ignore_index='-100'", "integer", '"ignore_index": -100'],
    ),
    "unknown exchange": (
        lambda: lasp(exchange="all_gather"),
        ["exchange='all_gather'", "known are auto, ring, allgather, scan", "Did you mean 'allgather'?"],
    ),
    "exchange as number": (lambda: lasp(exchange=2), ["exchange=2", "known are auto, ring", "Did you mean"]),
    "exchange of states for softmax": (
        lambda: ulysses(exchange="ring"),
        [
            "exchange='ring'",
            "method ulysses exchanges no states",
            "it is for lasp",
            "Drop exchange, or set method to lasp",
        ],
    ),
    "misspelt softmax method": (
        lambda: lasp(softmax_method="lightsec"),
        ["softmax_method='lightsec'", "no such method", "nearest is 'lightseq'", f"one of {SOFTMAX}"],
    ),
    "softmax method that moves dims": (
        lambda: lasp(softmax_method="dsp"),
        ["softmax_method='dsp'", "dsp is a switch method", "serves no softmax attention", f"one of {SOFTMAX}"],
    ),
    "softmax method that is linear": (
        lambda: lasp(softmax_method="lasp"),
        ["softmax_method='lasp'", "lasp is a linear method", f"one of {SOFTMAX}"],
    ),
    "no softmax method": (lambda: lasp(softmax_method=None), ["softmax_method: missing", f"one of {SOFTMAX}"]),
    "softmax method beside a softmax method": (
        lambda: ulysses(softmax_method="ring"),
        [
            "softmax_method='ring'",
            "method lasp shards",
            "method is ulysses",
            "Drop softmax_method, or set method to lasp",
        ],
    ),
    "softmax method beside dsp": (
        lambda: dsp(softmax_method="ulysses"),
        ["softmax_method='ulysses'", "method is dsp", "Drop softmax_method"],
    ),
    "layout that lasp has not": (
        lambda: lasp(layout="striped", softmax_method="ring"),
        ["layout='striped'", "method lasp takes contiguous, zigzag", 'or to "auto"'],
    ),
    "layout that the softmax layers cannot have": (
        lambda: lasp(layout="zigzag"),
        ["softmax_method='lightseq'", "takes contiguous, and layout is 'zigzag'", "one of ulysses, ring, usp, or drop"],
    ),
    "a ring for ulysses beside lasp": (
        lambda: lasp(softmax_method="ulysses", ring_size=2),
        ["ring_size=2", "softmax_method ulysses has no ring", "ulysses_size 4 * ring_size 1"],
    ),
    "ulysses for lightseq beside lasp": (
        lambda: lasp(ulysses_size=2),
        ["ulysses_size=2", "softmax_method lightseq has no ulysses", "Drop ulysses_size"],
    ),
    "lasp by a plan": (
        lambda: lasp(plan="a:b"),
        ["plan='a:b'", "one of dsp, ulysses, ring, usp, not lasp", "shard the batch"],
    ),
    "exchange flag without lasp": (
        lambda: megatron(sp_method="ring", sp_exchange="scan", context_parallel_size=2),
        ["Megatron flags", "exchange='scan'", "method ring exchanges no states"],
    ),
    "linear flags without a method": (
        lambda: megatron(sp_method=None, sp_exchange="scan", sp_softmax_method="ring"),
        ["--sp-exchange, --sp-softmax-method", "without --sp-method"],
    ),
    "section that is none": (
        lambda: deepspeed(4),
        ['DeepSpeed config "sequence_parallel"=4', "got int", '{"method": "ulysses", "size": 4}'],
    ),
    "section as list": (lambda: deepspeed(["ulysses", 4]), ["=['ulysses', 4]", "got list", '"method": "ulysses"']),
    "section as truth": (lambda: deepspeed(True), ["=True", "got bool", "Write {"]),
    "empty section": (lambda: deepspeed({}), ['DeepSpeed config "sequence_parallel": method: missing', KNOWN]),
    "wrong key in section": (
        lambda: deepspeed({"method": "ulysses", "sise": 4}),
        ["DeepSpeed config \"sequence_parallel\": unknown key 'sise'", "mean 'size'?"],
    ),
    "count of steps as text": (lambda: ulysses(log_every="10"), ["log_every='10'", "integer", "such as 10"]),
    "endless throughput": (
        lambda: ulysses(log_every=1, peak_tflops=float("inf")),
        ["peak_tflops=inf", "finite", "such as 989"],
    ),
    "throughput as text": (
        lambda: ulysses(log_every=1, peak_tflops="989"),
        ["peak_tflops='989'", "number, not str", "such as 989"],
    ),
    "memory as a number": (lambda: ulysses(memory=4), ["memory=4", "expected a section", 'Write "auto", or {']),
    "memory of another word": (lambda: ulysses(memory="all"), ["memory='all'", 'Write "auto", or {']),
    "unknown part of memory": (
        lambda: ulysses(memory={"offloads": True}),
        ["unknown key 'memory.offloads'", "mean 'memory.offload'?", "Known keys: tile_tokens, mlp_tiles"],
    ),
    "tiles of no tokens": (
        lambda: ulysses(memory={"tile_tokens": 0}),
        ["memory.tile_tokens=0", "integer of 1 or more, not 0", '"tile_tokens": 4096'],
    ),
    "tiles as truth": (lambda: ulysses(memory={"mlp_tiles": True}), ["memory.mlp_tiles=True", "1 or more, not True"]),
    "host memory without a unit": (lambda: ulysses(memory={"offload": 40}), ["memory.offload=40", 'such as "40GiB"']),
    "host memory of nothing": (lambda: ulysses(memory={"offload": "0GiB"}), ["memory.offload='0GiB'", "1 byte"]),
    "rounds of a ring": (
        lambda: Config(method="ring", size=2, memory={"attention_rounds": 2}),
        ["memory.attention_rounds=2", "method ring gathers none", "set method to one of ulysses, usp"],
    ),
    "more rounds than heads": (
        lambda: ulysses(size=4, memory={"attention_rounds": 3}).check_model(heads=16, tensor_parallel_size=2),
        ["memory.attention_rounds=3", "8 query heads over ulysses_size=4 leave a rank 2", "Set it to 2 or less"],
    ),
    "tiles of a model by batch": (
        lambda: ulysses(**BATCH, loss={"labels": "labels"}, memory={"tile_tokens": 64}),
        ["memory.tile_tokens=64", "described by batch", "dsp_plugin.token_log_probs"],
    ),
    "tiles of a model by plan": (lambda: dsp(memory={"mlp_tiles": 4}), ["memory.mlp_tiles=4", "described by a plan"]),
    "memory that is no JSON": (
        lambda: megatron(sp_method="ulysses", context_parallel_size=2, sp_memory="{tile_tokens: 4}"),
        ["--sp-memory='{tile_tokens: 4}'", "not JSON", 'Write "auto", or {'],
    ),
    "folder without a name": (
        lambda: ulysses(log_every=1, log_tensorboard=""),
        ["log_tensorboard=''", "text that can be printed", "path of a folder"],
    ),
    "plan without a package": (lambda: dsp(plan=".a:b"), ["plan='.a:b'", "joined by dots", "package.module:name"]),
    "attention as set": (lambda: ulysses(attention={"attn"}), ["attention={'attn'}", "list or tuple, not set"]),
    "batch of no argument": (
        lambda: ulysses(batch={"input ids": 1}, attention=["attn"]),
        ["batch.input ids", "name of an argument", "sequence dims"],
    ),
    "dim that no tensor has": (
        lambda: ulysses(batch={"input_ids": 64}, attention=["attn"]),
        ["batch.input_ids=64", "63"],
    ),
    "misspelt section": (
        lambda: Config.from_deepspeed({"sequence-parallel": {"method": "ulysses", "size": 2}}),
        ["DeepSpeed config 'sequence-parallel'={'method'", "nobody reads", 'Call it "sequence_parallel"'],
    ),
    "flags without a method": (
        lambda: megatron(sp_method=None, sp_layout="zigzag", sp_debug=True, context_parallel_size=2),
        ["--sp-layout, --sp-debug", "without --sp-method", f"Add --sp-method, {KNOWN}"],
    ),
    "flags that do not multiply": (
        lambda: megatron(sp_method="ulysses", sp_ulysses_size=2, context_parallel_size=4),
        ["Megatron flags", "--context-parallel-size", "size=4", "2 * 1 = 2, not 4"],
    ),
    "misspelt method flag": (lambda: megatron(sp_method="ulyses"), ["Megatron flags", "method='ulyses'", "'ulysses'"]),
    "world that does not divide": (
        lambda: ulysses(size=3).check_world(8),
        ["size=3", "size = 3 = 3 does not divide the 8 ranks", "multiple of 3 ranks"],
    ),
    "world with tensor parallelism": (
        lambda: ulysses(size=2).check_world(8, tensor_parallel_size=3, pipeline_parallel_size=1),
        ["size * tensor_parallel_size * pipeline_parallel_size = 2 * 3 * 1 = 6 does not divide the 8", "divides 8"],
    ),
    "world smaller than the group": (lambda: dsp(size=4).check_world(2), ["4 does not divide the 2 ranks"]),
    "fewer heads than ranks": (
        lambda: ulysses(size=4).check_model(heads=3),
        ["method='ulysses' with size=4", "heads=3 < ulysses_size=4", "set a size of 3 or less"],
    ),
    "fewer heads than ranks after tensor parallelism": (
        lambda: ulysses(size=4).check_model(heads=8, tensor_parallel_size=4),
        ["heads=8, kv_heads=8, tensor_parallel_size=4", "heads=2 < ulysses_size=4", "lower the tensor-parallel size"],
    ),
    "heads that tensor parallelism cannot split": (
        lambda: ulysses().check_model(heads=6, tensor_parallel_size=4),
        ["tensor_parallel_size=4", "6 query heads", "6 / 4 leaves 2", "divisor of the head counts"],
    ),
    "kv heads that tensor parallelism cannot split": (
        lambda: ulysses().check_model(heads=12, kv_heads=6, tensor_parallel_size=4),
        ["tensor_parallel_size=4", "6 key/value heads", "6 / 4 leaves 2", "divisor"],
    ),
    "heads that kv heads do not divide": (
        lambda: ulysses().check_model(heads=6, kv_heads=4),
        ["heads=6 is not a multiple of kv_heads=4", "fix the model's head counts"],
    ),
    "heads that query heads of linear attention do not divide": (
        lambda: lasp().check_model(heads=6, kv_heads=4),
        ["method='lasp' with size=4", "heads=6 is not a multiple of kv_heads=4"],
    ),
    "fewer heads than ranks for the softmax layers": (
        lambda: lasp(softmax_method="ulysses").check_model(heads=3),
        ["method='lasp'", "heads=3 < ulysses_size=4", "set a size of 3 or less"],
    ),
    "no heads": (lambda: ulysses().check_model(heads=0), ["heads=0, kv_heads=0", "1 or more", "Correct the model"]),
    "no tensor-parallel rank": (
        lambda: ulysses().check_model(heads=4, tensor_parallel_size=0),
        ["tensor_parallel_size=0", "1 or more"],
    ),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_wrong_settings_say_what_is_set_why_it_cannot_be_and_what_to_do(name):
    make, parts = WRONG_CONFIGS[name]
    with pytest.raises(SequenceParallelConfigError) as refused:
        make()
    message = str(refused.value)
    for part in parts:
        assert part in message, message
    assert message.endswith((".", "?"))
    assert ".." not in message
    assert "?." not in message


def test_more_than_forty_wrong_settings():
    assert len(WRONG_CONFIGS) >= 40
