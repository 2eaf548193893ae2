"""Time of one step on every rank, and what it takes to compare steps fairly."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Spent:
    """What a step took on one rank, in seconds: ``wall`` from a common start, ``cpu`` of all threads of the rank."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Samples:
    """The repeats of one step, each as every rank saw it."""

    repeats: list[list[Spent]]

    @property
    def walls(self) -> list[float]:
        """Seconds until the slowest rank was through, by repeat."""
        return [max(spent.wall for spent in ranks) for ranks in self.repeats]

    @property
    def wall(self) -> float:
        """Median of `walls`."""
        return median(self.walls)

    @property
    def spread(self) -> str:
        """How far the repeats lie apart, of their median; empty for a single one."""
        return f"{(max(self.walls) - min(self.walls)) / self.wall:.0%}" if len(self.walls) > 1 else ""

    @property
    def cpu_by_rank(self) -> list[float]:
        """Median CPU seconds of every rank: what it computes, not what it waits."""
        return [median(spent.cpu for spent in repeats) for repeats in zip(*self.repeats, strict=True)]


def timed(step: Callable[[], object]) -> list[Spent]:
    """Run ``step`` on all ranks of the world from a common start, and tell every rank what it took on each."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    mine = Spent(time.perf_counter() - wall, time.process_time() - cpu)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return ranks


def in_turns(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Samples]:
    """Repeats of all steps in turns, so that a slow minute of the machine hits all alike."""
    samples: dict[str, list[list[Spent]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            samples[name].append(timed(step))
    return {name: Samples(repeats_of) for name, repeats_of in samples.items()}
