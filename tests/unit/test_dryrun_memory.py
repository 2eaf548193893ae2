"""Who holds a peak, what a rank needs, the longest that fits, the plot, and models by config or arguments: dry."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError
from dsp_plugin.cli import dryrun as cli_dryrun
from dsp_plugin.rehearsal.budget import needs
from dsp_plugin.rehearsal.dryrun import Job, RankRun, dry_run
from dsp_plugin.rehearsal.longest import longest
from dsp_plugin.rehearsal.memory import StorageTracker
from dsp_plugin.rehearsal.model_states import moving_bytes, units_of
from dsp_plugin.rehearsal.places import ModulePlaces
from dsp_plugin.rehearsal.subject import subject
from dsp_plugin.rehearsal.timeline import BACKWARD, FORWARD, RECOMPUTE, REST, Holder, Owner, Timeline

pytestmark = pytest.mark.timeout(120)

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 500,
    "tie_word_embeddings": False,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SHAPE))
    return f"hf:{file}"


def run(*arguments: str) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    cli_dryrun.register(app)
    return CliRunner().invoke(app, ["dry-run", *arguments])


# --- the timeline


def test_holders_of_the_peak_are_grouped_over_layers_and_the_host_is_apart() -> None:
    timeline = Timeline()
    for layer in range(3):
        timeline.allocate(10, Owner(f"layers.{layer}.mlp", "mm", FORWARD))
    gone = timeline.allocate(5, Owner("head", "mm", FORWARD))
    timeline.free(gone)
    timeline.allocate(1000, Owner("layers.0", "copy", FORWARD), on_host=True)
    timeline.mark(BACKWARD)
    gradient = timeline.allocate(100, Owner("head", "mm", BACKWARD))
    last = timeline.allocate(40, Owner("layers.2", "add", RECOMPUTE))
    timeline.free(last)
    assert timeline.peak() == 170
    assert timeline.peak(without={gradient}) == 70
    assert timeline.peak(on_host=True) == 1000
    assert timeline.alive_before(BACKWARD) == 30
    assert timeline.holders({gradient}) == [
        Holder("layers.*", "add", RECOMPUTE, 1, 40),
        Holder("layers.*.mlp", "mm", FORWARD, 3, 30),
    ]
    assert sum(holder.nbytes for holder in timeline.holders()) == 170


def test_layers_of_a_plot_add_up_to_the_curve_and_keep_the_peak() -> None:
    timeline = Timeline()
    for index in range(500):
        key = timeline.allocate(index % 7, Owner(f"part{index % 5}", "mm", FORWARD))
        if index % 3:
            timeline.free(key)
    layers = timeline.layers(most=2, samples=50)
    assert [layer.module for layer in layers][-1] == REST
    assert len(layers) == 3
    curve = timeline.curve()
    for place, event in enumerate(layers[0].events):
        assert sum(layer.nbytes[place] for layer in layers) == curve[event]
    assert max(sum(values) for values in zip(*(layer.nbytes for layer in layers), strict=True)) == timeline.peak()


class Two(nn.Module):
    """Two layers, the second recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As wide as x."""
        from torch.utils.checkpoint import checkpoint

        found: torch.Tensor = checkpoint(self.second, self.first(x).relu(), use_reentrant=False)
        return found


def test_operators_of_the_backward_pass_belong_to_the_module_that_made_their_node() -> None:
    module = Two()
    places = ModulePlaces(module)
    tracker = StorageTracker(places=places)
    with places, tracker:
        tracker.begin(FORWARD)
        output = module(torch.randn(3, 4, requires_grad=True)).sum()
        tracker.begin(BACKWARD)
        output.backward()
    owners = set(tracker.timeline._owners)
    assert {Owner(part, "addmm", FORWARD) for part in ("first", "second.0", "second.1")} <= owners
    assert {Owner(part, "mm", BACKWARD) for part in ("first", "second.0", "second.1")} <= owners
    # What is recomputed ends where nothing more is needed.
    assert [owner.module for owner in owners if owner.phase == RECOMPUTE] == ["second.0"]
    assert Owner("Two", "threshold_backward", BACKWARD) in owners


# --- what a rank needs


def test_stage_3_gathers_two_units_and_has_the_gradient_of_one() -> None:
    layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)) for _ in range(4)])
    module = nn.ModuleDict({"layers": layers, "head": nn.Linear(10, 5)})
    assert units_of(module) == (55, 17, 17, 17, 17)
    assert [moving_bytes((55, 17), torch.bfloat16, stage) for stage in range(4)] == [0, 0, 110, 254]


def test_needs_are_states_inputs_and_activations_and_offloading_moves_bytes_to_the_host(model: str) -> None:
    job = Job(partial(subject, model, {"length": 64}), SequenceParallelConfig(method="ulysses", size=4), torch.bfloat16)
    found = dry_run(job, 8)
    for need in needs(found, torch.bfloat16, 8):
        assert need.total == sum(need[1:7])
        assert (need.inputs, need.activations) == (found.memory.inputs, found.memory.activations)
    on_device, on_host = (needs(found, torch.bfloat16, 8, offload)[3] for offload in ("none", "all"))
    moved = on_device.weights + on_device.gradients + on_device.optimizer
    assert on_device.total - on_host.total == moved == on_host.host
    assert needs(found, torch.bfloat16, 8, "optimizer")[0].host == 0


# --- the longest


@pytest.mark.parametrize(
    ("excess", "found"),
    [
        (lambda n: 3 * n - 1000, 328),
        (lambda n: max(3 * n, 7 * n - 500) - 5000, 784),
        (lambda n: n * n - 5000, 64),
        (lambda n: 3 * n - 40, 8),
        (lambda n: n + 5000, 0),
    ],
)
def test_the_longest_that_fits_is_found_and_was_run(excess: Any, found: int) -> None:
    result = longest(excess, 8, 16)
    assert result.length == found
    if found:
        assert excess(found) <= 0 < excess(found + 8)
        assert result.tried[found] == excess(found)


def test_a_hundredth_is_near_enough() -> None:
    runs: list[int] = []

    def excess(length: int) -> int:
        runs.append(length)
        return 3 * length + length // 7 % 100 - 3_000_000

    result = longest(excess, 8, 1024)
    assert excess(result.length) <= 0 < excess(int(result.length * 1.01) + 8)
    assert len(runs) <= 7


def test_memory_is_a_straight_line_in_length(model: str) -> None:
    config = SequenceParallelConfig(method="ulysses", size=2)

    def activations(length: int) -> int:
        memory: RankRun = dry_run(Job(partial(subject, model, {"length": length}), config), 2)
        return memory.memory.activations

    first, second, third = map(activations, (1024, 2048, 3072))
    assert third - second == second - first > 0


# --- the command


def test_the_command_finds_the_longest_names_the_holders_and_draws(model: str, tmp_path: Path) -> None:
    plot = tmp_path / "step.svg"
    asked = ("--model", model, "--method", "ulysses", "--size", "2", "--length", "max", "--device-memory", "64MiB")
    shown = run(*asked, "--timeline", str(plot), "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["dtype"] == "bfloat16"
    length, memory = found["longest"]["length"], found["runs"]["dry"]["memory"]
    (used,) = (need for need in found["needs"] if need["states"] == "ZeRO 3")
    assert length % 512 == 0
    assert length > 512
    assert 0 <= 64 * 2**20 - used["total"] == -found["excess"] < found["longest"]["slope"] * 512
    holders = found["holders_of_the_peak_of_activations"]
    assert holders[0]["operator"] == "_log_softmax"
    assert sum(holder["nbytes"] for holder in holders) == pytest.approx(memory["activations"], rel=1e-3)
    drawn = ElementTree.parse(plot).getroot()
    texts = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {FORWARD, BACKWARD, "lm_head"} <= texts


def test_the_command_says_what_fits_in_words(model: str) -> None:
    asked = ("--model", model, "--method", "ulysses", "--size", "2", "--length", "1024")
    assert "it fits" in run(*asked, "--device-memory", "1GB").stdout
    shown = run(*asked, "--device-memory", "1GB", "--host-memory", "1KB", "--zero-offload", "optimizer")
    assert "of host memory" in shown.stdout
    assert "too many: it does not fit" in shown.stdout
    assert "Who holds the peak of activations" in shown.stdout
    assert "lm_head" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "hf:no-such-model"], "name one of llama-70b, llama-8b, qwen3-8b"),
        (["--length", "many"], "--length=.many.*expected a number of tokens"),
        (["--length", "max"], "any length fits where there is no limit"),
        (["--device-memory", "lots"], "no amount of memory"),
        (["--memory", "{tile"], "not JSON"),
        (["--memory", '{"tile_token": 3}'], "tile_token"),
        (["--device", "cuda", "--real"], "Leave --device out"),
        (["--zero-offload", "weights"], "none, optimizer, all"),
        (["--length", "3", "--size", "4"], "would hold none of so short a sequence"),
        (["--set", "layers=3"], "has no such setting"),
    ],
)
def test_the_command_refuses_in_words(model: str, arguments: list[str], said: str) -> None:
    given = arguments if "--model" in arguments else ["--model", model, *arguments]
    shown = run("--method", "ulysses", *given)
    assert shown.exit_code == 2, shown.output
    assert shown.stderr.startswith("error: ")
    assert shown.stderr.count("\n") == 1
    assert re.search(said, shown.stderr, re.IGNORECASE), shown.stderr


def test_a_config_that_transformers_cannot_build_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "model_type": "no-such-family"}))
    with pytest.raises(SequenceParallelConfigError, match="Transformers builds no causal language model"):
        subject(f"hf:{tmp_path}", {})


# --- argument files


ARGUMENTS = """
# a comment
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 500
--tensor-model-parallel-size 2 --pipeline-model-parallel-size 3 --context-parallel-size 4
--sp-method usp --sp-ulysses-size 2 --lr 3e-4 --train-iters 5 --no-rope-fusion
"""


def test_a_file_of_arguments_says_method_and_sizes(tmp_path: Path) -> None:
    from dsp_plugin.rehearsal.subject import section_of

    file = tmp_path / "gpt.args"
    file.write_text(ARGUMENTS)
    section = section_of(f"megatron:{file}")
    asked = {"method": "usp", "size": 4, "ulysses_size": 2, "model_ranks": 6, "stages": 3}
    assert {name: section[name] for name in asked} == asked


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--lr 3e-4", "--num-experts 8"), "--num-experts.*does not know what they change"),
        (("--num-layers 2", ""), "--num-layers must be there"),
        (("--num-layers 2", "--num-layers two"), "invalid int value"),
        (("", ""), "the file of arguments says usp"),
    ],
)
def test_a_file_of_arguments_is_refused_in_words(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    file = tmp_path / "gpt.args"
    file.write_text(ARGUMENTS.replace(*change) if change[0] else ARGUMENTS)
    shown = run("--model", f"megatron:{file}", "--method", "ring")
    assert shown.exit_code == 2, shown.output
    assert re.search(said, shown.stderr, re.IGNORECASE), shown.stderr
