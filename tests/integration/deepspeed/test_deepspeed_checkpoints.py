"""Checkpoints that go on in a world of another size, that are not whole, and files that would run code.

Other methods and sizes in the same world are in `test_deepspeed_matrix`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from deepspeed_world import run_launcher, run_ranks

from dsp_plugin.training.checkpoint import FILE
from dsp_plugin.training.manifest import FILE as LIST

HERE = Path(__file__).parent
SCRIPT = HERE.parents[2] / "launch" / "examples" / "train_linear_deepspeed.py"
STEPS, SAVED_AT = 5, 2
MODEL_FILE, SHARD = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
SIZES = {"seq-length": 61, "samples": 64, "width": 48, "layers": 2, "decay": "head", "conv": 0, "softmax-every": 2}
MODEL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def config(folder: Path, zero: int, section: dict[str, Any] | None, universal: bool = False) -> Path:
    """The user's JSON: Adam with an epsilon that keeps rounding from growing, a schedule, and clipping."""
    settings: dict[str, Any] = {
        "train_batch_size": 4,
        "dataloader_drop_last": True,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-4, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 3, "total_num_steps": 20, "warmup_max_lr": 1e-3, "warmup_type": "linear"},
        },
        "checkpoint": {"load_universal": universal},
    }
    if section is not None:
        settings["sequence_parallel"] = section
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    return path


def train(
    folder: Path, world: int, zero: int, section: dict[str, Any] | None, *further: str, universal: bool = False
) -> list[float]:
    """Runs the script; losses of all steps, those before a restart included."""
    folder.mkdir(exist_ok=True)
    metrics = folder / "metrics.json"
    arguments = ["--deepspeed_config", str(config(folder, zero, section, universal)), *MODEL, *further]
    command = ["-m", "dsp_plugin.launch", str(SCRIPT), *arguments, "--metrics-out", str(metrics)]
    run_ranks(command, world, folder, 150)
    return json.loads(metrics.read_text())["losses"]


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.matrix
@pytest.mark.cell("deepspeed", "lasp", "universal checkpoint")
@pytest.mark.cell("deepspeed", "lasp", "checkpoint, other SP size")
def test_a_universal_checkpoint_goes_on_in_another_world(zero: int, tmp_path: Path) -> None:
    """SP2 x DP2 goes on as SP2 x DP1 by another exchange and softmax method, and as one rank without a section; the
    plain checkpoint is refused there, by a message with the remedy.
    """
    saved = tmp_path / "saved"
    section = {"method": "lasp", "size": 2, "exchange": "ring", "softmax_method": "ulysses"}
    resumed = {"method": "lasp", "size": 2, "exchange": "allgather", "softmax_method": "ring"}
    to_end = ("--steps", str(STEPS), "--checkpoint", str(saved))
    expected = train(tmp_path / "alone", 1, 0, None, "--steps", str(STEPS))
    first = ("--steps", str(SAVED_AT), "--checkpoint", str(saved), "--save-every", str(SAVED_AT))
    assert train(tmp_path / "first", 4, zero, section, *first) == pytest.approx(expected[:SAVED_AT], rel=1e-6)
    tag = f"global_step{SAVED_AT}"
    assert json.loads((saved / tag / FILE).read_text())["sizes"] == {"world": 4, "model": 1, "dp": 2, "sp": 2}

    with pytest.raises(
        AssertionError, match=r"world=2: the checkpoint was written by a run of world 4.*ds_to_universal"
    ):
        train(tmp_path / "refused", 2, zero, resumed, *to_end)
    convert = ["--input_folder", str(saved / tag), "--output_folder", str(saved / f"{tag}_universal")]
    run_launcher(["-m", "deepspeed.checkpoint.ds_to_universal", *convert, "--inject_missing_state"], 1, tmp_path, 150)
    found = train(tmp_path / "second", 2, zero, resumed, *to_end, universal=True)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found[:SAVED_AT] != found[SAVED_AT:]


def test_loading_runs_nothing_that_is_in_a_file(tmp_path: Path) -> None:
    """Neither the weights' file nor the optimizer's; the error names the function, the file and how to trust it."""
    run_ranks([str(HERE / "checkpoint_attack.py"), str(tmp_path)], 1, tmp_path, 150)
    assert not (tmp_path / "ran").exists()
    errors = (tmp_path / "error.txt").read_text().splitlines()
    assert len(errors) == 2, errors
    for error in errors:
        assert "posix.system" in error
        assert "DSP_PLUGIN_TRUST_CHECKPOINT=1" in error
        assert ".pt" in error


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `checkpoint_faults` found; both ranks found the same."""
    folder = tmp_path_factory.mktemp("faults")
    run_ranks([str(HERE / "checkpoint_faults.py"), str(folder)], 2, folder, 200)
    first, second = (json.loads((folder / f"loaded.{rank}.json").read_text()) for rank in range(2))
    told = second["saves"].pop("shards at latest"), second["saves"].pop("shards at latest beside training")
    assert told == ([], []), "the second rank wrote latest"
    assert {**first, "saves": None} == {**second, "saves": None}
    return {**first, "log": (folder / "rank0.log").read_text()}


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("swapped", rf"{SHARD.format(0)}: it is what was saved as {SHARD.format(1)}; \S+{SHARD.format(1)}: it is what"),
        ("cut", rf"{SHARD.format(1)}: it has 1,000 bytes, and [\d,]+ were saved"),
        ("model cut", r"mp_rank_00_model_states.pt: it has 1,000 bytes, and [\d,]+ were saved"),
        ("missing", rf"{SHARD.format(1)}: it is missing"),
        ("changed", rf"{SHARD.format(0)}: its content is not what was saved"),
        ("of another step", rf"{SHARD.format(1)}: its content is not what was saved"),
        ("one too many", rf"{SHARD.format(2)}: it is none of the files that were saved here"),
        ("unfinished", "global_step2: the run that wrote it ended before all of it was there"),
        ("list unreadable", "sequence_parallel_files.json does not list the files of a checkpoint: it is not JSON"),
        ("record unreadable", "sequence_parallel.json is not a record of a checkpoint: it is not JSON"),
        ("no list, cut", rf"{SHARD.format(1)}: it is cut"),
        ("no folder", "global_step2: there is no such folder"),
    ],
)
def test_what_is_not_whole_is_named_with_the_last_that_is(harm: str, said: str, faults: dict[str, Any]) -> None:
    """Asked for by its tag it is refused; where `latest` named it, the one before is loaded, and the log says so."""
    by_latest, by_tag = faults[harm]
    assert by_latest == "global_step1"
    assert by_tag.startswith("DamagedCheckpointError: ")
    assert re.search(said, by_tag), by_tag
    assert by_tag.endswith("load_checkpoint(..., tag='global_step1').") or "If you changed a file on purpose" in by_tag
    announced = rf"^dsp_plugin: \S+/{harm.replace(' ', '_')}/global_step2, .*{said}.* Going on from \S+/global_step1,"
    assert re.search(announced, faults["log"], re.MULTILINE)


def test_what_is_whole_or_cannot_be_told_is_loaded(faults: dict[str, Any]) -> None:
    """Checkpoints without a list are those of other runs. Weights alone need no shards. None is none, as upstream."""
    assert faults["nothing"] == faults["no list"] == ["global_step2", "global_step2"]
    assert faults["weights alone"] == ["global_step2", "None"]
    assert faults["latest empty"] == ["global_step2", "global_step2"]
    by_latest, by_tag = faults["no other"]
    assert by_latest == by_tag
    assert "mp_rank_00_model_states.pt: it has 1,000 bytes" in by_tag
    assert "No other checkpoint in" in by_tag
    by_tag, by_latest = faults["universal"]
    assert "global_step2: there is no such folder. No other" in by_tag
    assert "latest_universal does not exist" in by_latest


def test_latest_names_what_all_ranks_have_written(faults: dict[str, Any]) -> None:
    """Also where files are written beside training; what a save of more ranks left in the folder is gone."""
    saves = faults["saves"]
    assert saves["shards at latest"] == [True, True]
    assert saves["shards at latest beside training"] == [True]
    assert not saves["named early"]
    assert saves["loaded"] == "beside"
    assert saves["files"] == sorted([MODEL_FILE, SHARD.format(0), SHARD.format(1), FILE, LIST])


def test_weights_of_zero3_are_those_of_the_tag(faults: dict[str, Any]) -> None:
    """DeepSpeed by itself takes those that `latest` names, or under ``load_module_only`` none, without a word."""
    first, last = faults["zero 3"]["saved"]
    assert faults["zero 3"]["load_optimizer_states"] == pytest.approx(first, rel=1e-9)
    assert faults["zero 3"]["load_module_only"] == pytest.approx(first, rel=1e-9)
    assert first != pytest.approx(last, rel=1e-6)
