"""The step log: how fast a run is, what it waits for, sends and holds in memory, every so many optimizer steps.

Per rank and step are measured: the bytes of the ledger by method, the time that computation waited for communication of
this library (`dsp_plugin.comm.meter`), and peak memory. Model FLOPs are counted by formula and not measured: 6 a
parameter and token (forward and backward), and three forward passes of softmax attention under its mask. Recomputation,
linear attention and what frameworks send of their own (gradients, parameters) are not counted.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dsp_plugin.comm.ledger import Ledger, ledger
from dsp_plugin.comm.meter import Meter, meter
from dsp_plugin.training.offload import in_force

OTHER = "other"
# Dense 16-bit peaks in TFLOP/s by what a device's name contains, from NVIDIA's data sheets; the first that fits counts.
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "V100": 125.0,
}


@dataclass(frozen=True)
class StepRecord:
    """Means over the steps since the last record, of one optimizer step.

    Attributes:
        step: optimizer steps done.
        loss: mean over ranks, None where it is not known.
        seconds: of a step.
        tokens_per_second: of the whole world.
        tflops: model TFLOP/s of a rank, mean over ranks.
        mfu: that over the device's peak, 0 to 1; None where the peak is not known.
        waiting: seconds that computation waited for communication, mean over ranks.
        waiting_most: the longest, and the rank.
        sent: bytes that leave a rank, mean over ranks, by method.
        memory: peak bytes of each rank since the last record: device memory, on CPU resident memory since the start.
        on_host: bytes of checkpoints in host memory, at most so far, of the rank with the most; 0 without an offload.
    """

    step: int
    loss: float | None
    seconds: float
    tokens_per_second: float
    tflops: float
    mfu: float | None
    waiting: float
    waiting_most: tuple[float, int]
    sent: dict[str, float]
    memory: tuple[int, ...]
    on_host: int = 0

    @property
    def memory_most(self) -> tuple[int, int]:
        """The highest peak, and the rank."""
        peak = max(self.memory)
        return peak, self.memory.index(peak)


class StepLog:
    """Counts from its making on; `step` ends every optimizer step, on every rank.

    Args:
        every: steps between records.
        parameters: that this rank computes with; a share of one that ranks hold together counts as that share.
        sequence_size: ranks that share a sequence. replicas: data-parallel groups of them.
        methods: names of the ledger to list; what is sent under others is `OTHER`.
        peak_tflops: of a device; None takes what `PEAKS` knows of it, for parameters of 16 bits.
        writers: get each record, on the first rank.
    """

    def __init__(
        self,
        *,
        every: int,
        parameters: int,
        sequence_size: int,
        replicas: int,
        methods: Sequence[str],
        peak_tflops: float | None,
        writers: Sequence[Callable[[StepRecord], None]],
    ) -> None:
        self._every, self._parameters = every, parameters
        self._sequence_size, self._replicas = sequence_size, replicas
        self._methods = (*methods, OTHER)
        self._peak, self._writers = peak_tflops, writers
        self._ledger, self._meter = Ledger(), Meter()
        self._open = ExitStack()
        self._count()
        self._steps = 0
        self._losses: list[torch.Tensor] = []
        self._sent_before: dict[str, int] = {}
        self._started = time.perf_counter()

    def step(self, step: int, loss: torch.Tensor | None = None, weight: torch.Tensor | float = 1.0) -> None:
        """Ends an optimizer step. A collective of all ranks every `every` steps.

        Args:
            step: its number in the run, from 1.
            loss: of this rank, a scalar; None where it has none. weight: its share in the mean over ranks, such as
                its tokens.
        """
        self._steps += 1
        self._meter.fold()
        if loss is not None:
            value = loss.detach().double().reshape(())
            self._losses.append(torch.stack([value, torch.ones_like(value)]) * weight)
        if step % self._every == 0:
            record = self._record(step)
            if dist.get_rank() == 0:
                for write in self._writers:
                    write(record)
            self._restart()

    def pause(self) -> Callable[[], None]:
        """Leaves what runs until the returned function is called out of the account: an evaluation, say."""
        self._open.close()
        begun = time.perf_counter()

        def resume() -> None:
            self._started += time.perf_counter() - begun
            self._count()

        return resume

    def close(self) -> None:
        """Stops counting."""
        self._open.close()

    def _count(self) -> None:
        self._open.enter_context(ledger(self._ledger))
        self._open.enter_context(meter(self._meter))

    def _record(self, step: int) -> StepRecord:
        if _on_cuda():
            # The clock would else stop where the last kernel was launched, not where it ended.
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - self._started) / self._steps
        losses = torch.stack(self._losses).sum(0).tolist() if self._losses else [0.0, 0.0]
        counted = [float(self._meter.tokens), float(self._parameters), float(self._meter.attention_flops)]
        memory = [float(_peak_memory()), float(_most_on_host())]
        rows = _gathered([*losses, *counted, self._meter.waited(), *memory, *self._sent()])
        loss_sum, weight = (sum(row[place] for row in rows) for place in (0, 1))
        # Of a pipeline, the first stage alone sees tokens come in.
        tokens = max(row[2] for row in rows) / self._steps
        work = [6 * row[3] * tokens / self._sequence_size + 3 * row[4] / self._steps for row in rows]
        tflops = sum(work) / len(rows) / seconds / 1e12
        waits = [row[5] / self._steps for row in rows]
        return StepRecord(
            step=step,
            loss=loss_sum / weight if weight else None,
            seconds=seconds,
            tokens_per_second=tokens * self._replicas / seconds,
            tflops=tflops,
            mfu=tflops / self._peak if self._peak else None,
            waiting=sum(waits) / len(waits),
            waiting_most=(max(waits), waits.index(max(waits))),
            sent={
                name: sum(row[8 + place] for row in rows) / len(rows) / self._steps
                for place, name in enumerate(self._methods)
            },
            memory=tuple(int(row[6]) for row in rows),
            on_host=max(int(row[7]) for row in rows),
        )

    def _sent(self) -> list[float]:
        totals = dict.fromkeys(self._methods, 0)
        for row in self._ledger.rows():
            totals[row.method if row.method in totals else OTHER] += row.bytes
        since = [float(total - self._sent_before.get(name, 0)) for name, total in totals.items()]
        self._sent_before = totals
        return since

    def _restart(self) -> None:
        self._meter.clear()
        self._steps = 0
        self._losses = []
        if _on_cuda():
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()


def known_peak(dtype: torch.dtype) -> float | None:
    """TFLOP/s of this rank's device for matrix products of `dtype`; None where they are not known."""
    if dtype.itemsize != 2 or not _on_cuda():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _peak_memory() -> int:
    if _on_cuda():
        return int(torch.cuda.max_memory_allocated())
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _most_on_host() -> int:
    offload = in_force()
    return 0 if offload is None else offload.counts().host_peak


def _gathered(mine: list[float]) -> list[list[float]]:
    device = "cuda" if _on_cuda() else "cpu"
    row = torch.tensor(mine, dtype=torch.float64, device=device)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return [row.tolist() for row in rows]


def _on_cuda() -> bool:
    """Whether the run is on CUDA: its backend says so also where torch.cuda is answered by the CPU."""
    return "nccl" in str(dist.get_backend())
