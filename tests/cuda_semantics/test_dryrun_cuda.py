"""A dry run on fake CUDA tensors sends what one on the CPU does, and names the lines that a GPU would pay for."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dsp_plugin import SequenceParallelConfig, UnsupportedError
from dsp_plugin.rehearsal.cuda.process import CudaProcess
from dsp_plugin.rehearsal.dryrun import Job, dry_run
from dsp_plugin.rehearsal.subject import Library, Subject, subject

pytestmark = pytest.mark.timeout(300)

SMALL = {"frames": 7, "height": 12, "width": 20, "hidden": 32, "depth": 1}


def job(build: Any) -> Job:
    return Job(build, SequenceParallelConfig(method="ulysses", size=1))


class Wasteful(nn.Module):
    """Waits for the device once, and copies to it once."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.linear, self.reads = nn.Linear(8, 8), reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.linear(x) + torch.tensor([1.0], device=x.device)
        out.detach().cpu()
        return out * out.sum().item() if self.reads else out


def wasteful(reads: bool) -> Subject:
    # As of a library that shards by itself: nothing is hooked.
    return Subject(Wasteful(reads), {"x": torch.randn(4, 8)}, Library(int, 1, False, False, 1))


def test_bytes_and_parameters_are_those_of_a_dry_run_on_the_cpu(worker: CudaProcess) -> None:
    wanted = Job(partial(subject, "video-dit", SMALL), SequenceParallelConfig(method="dsp", size=2))
    here, there = dry_run(wanted, 2, 1), worker.run(dry_run, wanted, 2, 1, "cuda")
    assert there.rows == here.rows
    assert there.memory[:3] == here.memory[:3]
    assert here.asked is None
    for counts in there.asked:
        assert counts.launches + counts.attention == counts.places.total() > 0
        assert not [*counts.syncs, *counts.mixed, *counts.faults]


def test_lines_that_a_gpu_would_pay_for_are_named(worker: CudaProcess) -> None:
    forward, backward = worker.run(dry_run, job(partial(wasteful, False)), 1, 0, "cuda").asked
    (waits,), (made,), (copied,) = forward.syncs, forward.made, forward.uploads
    assert "test_dryrun_cuda.py:" in waits
    assert "test_dryrun_cuda.py:" in made
    assert made.split(" at ")[1] == copied.split(" at ")[1]
    assert not backward.syncs
    assert "linear" in {owner.module for owner in backward.places}


def test_a_line_that_needs_a_value_is_named_as_the_run_ends(worker: CudaProcess) -> None:
    with pytest.raises(UnsupportedError, match=r"test_dryrun_cuda.py:\d+\), which have none"):
        worker.run(dry_run, job(partial(wasteful, True)), 1, 0, "cuda")
