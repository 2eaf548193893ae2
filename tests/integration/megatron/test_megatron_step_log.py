"""``--sp-log-every`` on Megatron-core: lines whose numbers are those of the run, and events for TensorBoard."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from megatron_runs import train

LENGTH, GLOBAL_BATCH = 64, 4


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        (2, "--context-parallel-size 2 --sp-method ring"),
        (4, "--context-parallel-size 2 --pipeline-model-parallel-size 2 --sp-method ulysses --mask-newlines"),
    ],
)
def test_the_log_says_what_the_run_did(ranks: int, arguments: str, tmp_path: Path) -> None:
    events = tmp_path / "events"
    log = ["--sp-log-every", "1", "--sp-log-tensorboard", str(events), "--sp-peak-tflops", "1"]
    run = train(tmp_path, ranks, *arguments.split(), *log)
    pattern = r"step (\d) \| loss (\S+) \| (\S+) s \| (\S+) tokens/s .*MFU .* sent by a rank: (.*) \| peak memory [1-9]"
    lines = re.findall(pattern, run.output)
    assert [int(step) for step, *_ in lines] == [1, 2, 3]
    for (_, loss, seconds, rate, sent), expected in zip(lines, run.losses, strict=True):
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        tokens = float(rate.replace(",", "")) * float(seconds)
        assert tokens == pytest.approx(LENGTH * GLOBAL_BATCH, rel=0.05)
        assert arguments.split("--sp-method ")[1].split()[0] in sent

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(events))
    found.Reload()
    names = {name.removeprefix("sequence_parallel/") for name in found.Tags()["scalars"]}
    expected_names = {"loss", "mfu", "tokens_per_second", "waiting_seconds_most", f"peak_memory_bytes/rank_{ranks - 1}"}
    assert expected_names <= names
