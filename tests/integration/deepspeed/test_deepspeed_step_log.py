"""``"log_every"`` in the section: the linear script logs its steps, and the numbers are those of the run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from deepspeed_world import run_launcher
from test_deepspeed_scripts import LINEAR_CONFIGS, LINEAR_SCRIPT

LENGTH, BATCH, STEPS = 37, 4, 4


def test_the_log_says_what_the_run_did(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    config = json.loads(LINEAR_CONFIGS[0].read_text()) | {"train_batch_size": BATCH}
    config["sequence_parallel"] = {
        "method": "lasp",
        "size": 2,
        "log_every": 2,
        "log_tensorboard": str(tmp_path / "events"),
    }
    path, metrics = tmp_path / "deepspeed.json", tmp_path / "metrics.json"
    path.write_text(json.dumps(config))
    model = ["--layers", "2", "--width", "16", "--heads", "2", "--softmax-every", "2", "--samples", "40"]
    script = [str(LINEAR_SCRIPT), "--deepspeed_config", str(path), "--metrics-out", str(metrics), *model]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dsp_plugin.launch"]
    run = [*start, *script, "--steps", str(STEPS), "--seq-length", str(LENGTH)]
    printed = run_launcher(run, 2, tmp_path, 150).read_text()

    losses = json.loads(metrics.read_text())["losses"]
    lines = re.findall(r"step (\d) \| loss (\S+) \| (\S+) s \| (\S+) tokens/s .* sent by a rank: (.*) \| peak", printed)
    assert [int(step) for step, *_ in lines] == [2, 4]
    for step, loss, seconds, rate, sent in lines:
        mean = sum(losses[int(step) - 2 : int(step)]) / 2
        assert float(loss) == pytest.approx(mean, rel=1e-5)
        tokens = float(rate.replace(",", "")) * float(seconds)
        assert tokens == pytest.approx(LENGTH * BATCH, rel=0.05)
        assert "lasp" in sent
        assert "lightseq" in sent
    assert list((tmp_path / "events").iterdir())
