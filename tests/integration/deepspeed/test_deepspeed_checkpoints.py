"""Checkpoints that go on in a world of another size, and files that would run code.

Other methods and sizes in the same world are in `test_deepspeed_matrix`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed_world import run_launcher, run_ranks

from dsp_plugin.training.checkpoint import FILE

HERE = Path(__file__).parent
SCRIPT = HERE.parents[2] / "launch" / "examples" / "train_linear_deepspeed.py"
STEPS, SAVED_AT = 5, 2
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
