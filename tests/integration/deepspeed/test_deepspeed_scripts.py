"""A user's script that knows nothing of us: the launcher, or one import, and its JSON shard its sequence."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from causal_lm import CausalLM
from deepspeed_cases import Case
from deepspeed_world import run_launcher, run_ranks
from test_deepspeed_parity import LOSS_TOLERANCE
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).parent
SCRIPT = HERE / "user_script.py"
CLIPPING = 1.0
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OPTIMIZER = {"lr": 2e-3, "eps": 1e-4, "weight_decay": 0.01}


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
    """Its losses are those of one process, on both ranks, and its batch size is the one it asked for."""
    pytest.importorskip("deepspeed")
    config = {
        "train_batch_size": 4,
        "gradient_clipping": CLIPPING,
        "optimizer": {"type": "AdamW", "params": {**OPTIMIZER, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "sequence_parallel": Case("lm", "ulysses", 2, 2, 2).section(),
    }
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(config))
    start(["--deepspeed_config", str(path), "--out", str(tmp_path / "out")], tmp_path)
    for rank in range(2):
        result = json.loads((tmp_path / "out" / f"rank{rank}.json").read_text())
        assert result["losses"] == pytest.approx(expected_losses(), rel=LOSS_TOLERANCE)
        assert result["batch"] == 4
