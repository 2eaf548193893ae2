"""What a sharded model says: one line at the start, and in the step log bytes as the ledger has them, tokens, work, and
whom a rank waited for."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stdout
from importlib import metadata

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups, ledger, parallelize
from dsp_plugin.methods import METHODS
from dsp_plugin.spawn import spawn
from dsp_plugin.training.step_log import StepLog, StepRecord

BATCH, LENGTH, HEADS, DIM, STEPS, SLEEP = 2, 26, 4, 8, 4, 0.4
PARAMETERS = 3 * (HEADS * DIM) ** 2
BEGIN = f"dsp_plugin {metadata.version('dsp-plugin')} |"
STARTS = {
    "ulysses": f"{BEGIN} ulysses over 2 ranks (U 2 x R 1, adjacent) | tokens contiguous | kernel cpu_flash, else math",
    "ring": f"{BEGIN} ring over 2 ranks (U 1 x R 2, adjacent) | tokens zigzag | kernel cpu_flash, else math",
}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Model(nn.Module):
    """Attention over a sequence, and a mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (self.attention(x).mean((1, 3)) - labels).square().mean()


def worker(method: str) -> tuple[list[StepRecord], dict[str, int], float, str]:
    """Records of four steps, two each; what the last step sent by method; its loss; what was printed at the start."""
    config = SequenceParallelConfig(
        method=method,
        size=2,
        attention=("attention",),
        batch={"x": 1, "labels": 1},
        positions=None,
        loss={"labels": "labels", "ignore_index": -100},
    )
    groups = SequenceParallelGroups.build(config)
    torch.manual_seed(0)
    model = Model()
    with redirect_stdout(io.StringIO()) as printed:
        parallelize(Model(), config=config.model_copy(update={"quiet": True}), groups=groups)
        print("quiet until here")
        parallelize(Model(), config=config, groups=groups)
        parallelize(model, config=config, groups=groups)
    records: list[StepRecord] = []
    log = StepLog(
        every=2,
        parameters=PARAMETERS,
        sequence_size=2,
        replicas=groups.dp.size,
        methods=[*METHODS, "loss"],
        peak_tflops=2.0,
        writers=[records.append],
    )
    for step in range(1, STEPS + 1):
        x, labels = torch.randn(BATCH, LENGTH, HEADS * DIM), torch.randn(BATCH, LENGTH)
        if step > 2 and dist.get_rank() == 1:
            time.sleep(SLEEP)
        with ledger() as sent:
            loss = model(x=x, labels=labels)
            loss.backward()
        log.step(step, loss)
        if step == 2:
            # What is left out of the account: neither its tokens nor its time.
            resume = log.pause()
            model(x=x, labels=labels)
            time.sleep(SLEEP)
            resume()
    log.close()
    return records, {name: sent.bytes(method=name) for name in (*METHODS, "loss")}, loss.item(), printed.getvalue()


def test_records_are_what_was_measured() -> None:
    for method in ("ulysses", "ring"):
        results = spawn(worker, 2, method, timeout=100)
        (first, second), _, _, _ = results[0]
        assert not results[1][0], "the first rank alone writes"
        assert [printed for *_, printed in results] == [f"quiet until here\n{STARTS[method]}\n", "quiet until here\n"]
        sent = {name: sum(of_rank[name] for _, of_rank, *_ in results) / 2 for name in results[0][1]}
        assert {name: size for name, size in second.sent.items() if name != "other"} == sent
        assert sent[method] > 0
        assert sent["loss"] == 16

        assert (first.step, second.step) == (2, 4)
        assert second.tokens_per_second * second.seconds == pytest.approx(BATCH * LENGTH)
        pairs = LENGTH * (LENGTH + 1) // 2
        work = 6 * PARAMETERS * BATCH * LENGTH / 2 + 3 * 4 * BATCH * HEADS * DIM * pairs / 2
        assert second.tflops * second.seconds * 1e12 == pytest.approx(work)
        assert second.mfu == pytest.approx(second.tflops / 2.0)
        assert len(second.memory) == 2
        assert min(second.memory) > 1 << 20

        # Rank 0 waits for rank 1, which sleeps before both steps; nobody waits like that before, nor for the pause.
        most, rank = second.waiting_most
        assert rank == 0
        assert most >= 0.9 * SLEEP
        assert first.waiting_most[0] < 0.9 * SLEEP
        assert SLEEP <= second.seconds < 2 * SLEEP + 1
