"""The command `dsp-plugin plan`: tables, what is to be pasted, and refusals."""

import json

import pytest
from typer.testing import CliRunner

from dsp_plugin.cli.app import app
from dsp_plugin.config.schema import SequenceParallelConfig

RUN = CliRunner()


def plan(*arguments):
    return RUN.invoke(app, ["plan", *arguments])


def test_a_ranked_table_and_the_section():
    done = plan("--model", "llama-8b", "--gpus", "8", "--length", "128K")
    assert done.exit_code == 0, done.output
    assert "8.03B parameters" in done.output
    assert "times slower, most of it in" in done.output
    text = done.output[done.output.index("{") : done.output.rindex("}") + 1]
    assert SequenceParallelConfig.from_deepspeed(json.loads(text)) is not None


def test_json_has_every_alternative_and_its_reason():
    done = plan("--model", "llama-8b", "--gpus", "8", "--length", "max", "--json", "--tp", "1")
    found = json.loads(done.output)
    assert found["ok"]
    first, *others = found["alternatives"]
    assert first["length"] == found["winner"]["length"] > 1 << 20
    assert all(each["why_not"] for each in others)
    section = found["winner"]["config"]["sequence_parallel"]
    assert SequenceParallelConfig.parse(section, source="winner").size == 8


def test_megatrons_flags():
    arguments = ["--model", "configs/megatron/gpt_7b.args", "--gpus", "16", "--length", "128K", "--json"]
    found = json.loads(plan(*arguments).output)
    assert found["framework"] == "megatron"
    assert any(flag.startswith("--context-parallel-size") for flag in found["winner"]["flags"])


def test_links_and_memory_are_told():
    slow = ["--intra", "8GB/s", "--inter", "1Gbit/s", "--device-memory", "40GiB", "--peak-tflops", "100"]
    common = ["--model", "llama-8b", "--gpus", "16", "--length", "64K", "--json", "--zero", "3", "--recompute", "full"]
    fast, told = (json.loads(plan(*common, *more).output)["alternatives"][0] for more in ([], slow))
    assert told["seconds"]["step"] > fast["seconds"]["step"]
    assert told["device_bytes"]["total"] < 36 << 30


def test_where_nothing_fits_the_arithmetic_is_shown_and_the_status_is_1():
    done = plan("--model", "llama-70b", "--gpus", "8", "--length", "1M", "--device-memory", "24GiB")
    assert done.exit_code == 1
    assert "does not fit by" in done.output
    assert "Nothing fits" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "llama-9b"], "no file can be read"),
        (["--gpus", "12"], "nodes of 8 GPUs make no 12: 12 / 8 leaves 4"),
        (["--length", "long"], "--length='long'"),
        (["--intra", "50GB"], "write 50GB/s or 400Gbit/s".capitalize()),
        (["--device-memory", "0GiB"], "--device-memory='0GiB'"),
        (["--reserve", "80GiB"], "it leaves nothing of a device's 79.0 GiB"),
        (["--hardware", "h10"], "the nearest is 'h100'"),
        (["--tp", "3"], "32 / 3 leaves 2"),
        (["--pp", "2"], "set --framework megatron".capitalize()),
        (["--framework", "megatron", "--zero", "3"], "the distributed optimizer"[4:]),
        (["--method", "lasp"], "use one of ulysses"),
        (["--framework", "megatron", "--pp", "5"], "32 / 5 leaves 2"),
    ],
)
def test_refusals(arguments, words):
    given = {"--model": "llama-8b", "--gpus": "8", "--length": "64K"}
    extra = dict(zip(arguments[::2], arguments[1::2], strict=True))
    done = plan(*(part for pair in {**given, **extra}.items() for part in pair))
    assert done.exit_code == 2
    assert words.lower() in done.output.lower()
