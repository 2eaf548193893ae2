"""A user's script that knows nothing of us: the launcher, or one import, and its JSON shard its sequence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import torch
from causal_lm import CausalLM
from deepspeed_cases import Case
from deepspeed_world import run_launcher, run_ranks
from test_deepspeed_parity import LOSS_TOLERANCE
from torch.utils.data import DataLoader, DistributedSampler

from dsp_plugin import SequenceParallelConfig

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SCRIPT = HERE / "user_script.py"
LINEAR_SCRIPT = ROOT / "launch" / "examples" / "train_linear_deepspeed.py"
LINEAR_CONFIGS = sorted((ROOT / "configs" / "deepspeed").glob("linear_*.json"))
CLIPPING = 1.0
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OPTIMIZER = {"lr": 2e-3, "eps": 1e-4, "weight_decay": 0.01}


# What a run that is sharded says, once.
START = re.compile(
    rf"dsp_plugin {re.escape(metadata.version('dsp-plugin'))} \| ulysses over 2 ranks \(U 2 x R 1, adjacent\) "
    r"\| tokens contiguous \| kernel cpu_flash, else math \| recompute full \| patched deepspeed \S+ \(\d\d patches\), "
    r"torch \S+ \(4 patches\)"
)


def with_launcher(arguments: list[str], folder: Path) -> None:
    """Ranks that a cluster's scheduler started, each running the launcher."""
    run_ranks(["-m", "dsp_plugin.launch", str(SCRIPT), *arguments], 2, folder, 90)


def with_torchrun(arguments: list[str], folder: Path) -> None:
    """The launcher under torchrun."""
    run_launcher([*TORCHRUN, "-m", "dsp_plugin.launch", str(SCRIPT), *arguments], 2, folder, 90)


def with_import(arguments: list[str], folder: Path) -> None:
    """One import in the script, where sorted imports put it: after DeepSpeed."""
    edited = folder / "train.py"
    text = SCRIPT.read_text().replace("import deepspeed\n", "import deepspeed\nimport dsp_plugin\n")
    edited.write_text(text.replace("Path(__file__).resolve().parent", f"'{HERE}'"))
    run_launcher([*TORCHRUN, str(edited), *arguments], 2, folder, 90)


@cache
def expected_losses() -> list[float]:
    """The script's loop in one process, without DeepSpeed."""
    from user_script import Text

    torch.manual_seed(0)
    model = CausalLM()
    data = Text(12)
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, num_replicas=1, rank=0))
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    losses = []
    for batch in loader:
        loss = model(**batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("start", [with_launcher, with_torchrun, with_import], ids=lambda start: start.__name__)
def test_unmodified_script(start: Callable[[list[str], Path], None], tmp_path: Path) -> None:
    """Its losses are those of one process, on both ranks, and its batch size is the one it asked for.

    One line says on the first rank that it is sharded, unless the section is quiet.
    """
    pytest.importorskip("deepspeed")
    config = {
        "train_batch_size": 4,
        "gradient_clipping": CLIPPING,
        "optimizer": {"type": "AdamW", "params": {**OPTIMIZER, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "sequence_parallel": {**Case("lm", "ulysses", 2, 2, 2).section(), "quiet": start is with_import},
    }
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(config))
    start(["--deepspeed_config", str(path), "--out", str(tmp_path / "out")], tmp_path)
    for rank in range(2):
        result = json.loads((tmp_path / "out" / f"rank{rank}.json").read_text())
        assert result["losses"] == pytest.approx(expected_losses(), rel=LOSS_TOLERANCE)
        assert result["batch"] == 4
    said = {path.stem: re.findall(r"^dsp_plugin .*", path.read_text(), re.M) for path in tmp_path.glob("*.log")}
    lines = [line for found in said.values() for line in found]
    assert len(lines) == (0 if start is with_import else 1)
    assert all(START.fullmatch(line) for line in lines), lines
    assert "rank1" not in said or not said["rank1"]


@pytest.mark.matrix
def test_script_of_the_linear_language_model(tmp_path: Path) -> None:
    """With the section its losses on two ranks are those that one rank has without. A hybrid, its layers recomputed."""
    pytest.importorskip("deepspeed")
    config = json.loads(LINEAR_CONFIGS[0].read_text())
    section = {**config.pop("sequence_parallel"), "size": 2, "recompute": "keep_attention"}
    model = ["--layers", "2", "--width", "16", "--heads", "2", "--softmax-every", "2", "--recompute"]
    arguments = [*model, "--steps", "3", "--seq-length", "37", "--samples", "20"]
    losses = {}
    for ranks, settings in ((1, config), (2, {**config, "sequence_parallel": section})):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        path, metrics = folder / "deepspeed.json", folder / "metrics.json"
        path.write_text(json.dumps(settings))
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        script = [str(LINEAR_SCRIPT), "--deepspeed_config", str(path), "--metrics-out", str(metrics), *arguments]
        run_launcher([*start, "-m", "dsp_plugin.launch", *script], ranks, folder, 120)
        losses[ranks] = json.loads(metrics.read_text())["losses"]
    assert len(losses[1]) == 3
    assert losses[2] == pytest.approx(losses[1], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("path", LINEAR_CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_linear_language_model_are_legal(path: Path) -> None:
    """A method and a size, and a batch that one sequence group of four ranks can work on."""
    config = json.loads(path.read_text())
    section = SequenceParallelConfig.from_deepspeed(config)
    assert (section.method, section.size, section.batch) == ("lasp", 4, {})
    assert config["zero_optimization"]["stage"] == int(path.stem[-1])
