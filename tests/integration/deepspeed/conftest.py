"""Worlds of real DeepSpeed processes, each started when the first test asks for one of its results."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_world import run_ranks

HERE = Path(__file__).parent
# What each world runs, in order, and the seconds until it counts as hung.
Worlds = dict[int, tuple[tuple[str, ...], int]]
GROUPS: Worlds = {
    2: (("parity",), 240),
    3: (("parity",), 200),
    4: (("parity", "deepspeed_sharing", "deepspeed_refused"), 290),
}
LINEAR: Worlds = {2: (("linear",), 240), 3: (("linear",), 240), 4: (("linear",), 290)}

if importlib.util.find_spec("deepspeed") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.deepspeed)
            item.add_marker(pytest.mark.timeout(400))


class World:
    """The results of one world."""

    def __init__(self, size: int, folder: Path, groups: tuple[str, ...], timeout: float) -> None:
        self.size, self.folder = size, folder
        self.failure: AssertionError | None = None
        try:
            run_ranks([str(HERE / "deepspeed_worker.py"), str(folder), *groups], size, folder, timeout)
        except AssertionError as failure:
            self.failure = failure

    def results(self, case: str) -> list[dict[str, Any]]:
        """What each rank recorded of a case."""
        found = []
        for rank in range(self.size):
            path = self.folder / f"{case}.rank{rank}.json"
            assert path.exists(), f"rank {rank} never ended case {case}:\n{self.failure}"
            found.append(json.loads(path.read_text()))
        failed = [result["failed"] for result in found if "failed" in result]
        assert not failed, failed[0]
        return found

    def gradients(self, case: str) -> dict[str, torch.Tensor | None]:
        """The gradients of the first step, by parameter name."""
        return torch.load(self.folder / f"{case}.pt")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], World]:
    """The world of a size; it runs once per session."""
    return _worlds(GROUPS, tmp_path_factory)


@pytest.fixture(scope="session")
def linear_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], World]:
    """The same for linear attention."""
    return _worlds(LINEAR, tmp_path_factory)


@pytest.fixture(scope="session")
def matrix_world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], World]:
    """The same for the compatibility matrix, as much of it as the session runs."""
    group = "matrix" if request.config.getoption("--matrix") else "covering"
    return _worlds({4: ((group,), 390)}, tmp_path_factory)


@pytest.fixture(scope="session")
def grid_world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], World]:
    """The same for stages and tensor-parallel ranks beside sequence groups."""
    group = "grid_matrix" if request.config.getoption("--matrix") else "grid_covering"
    return _worlds({4: ((group,), 390)}, tmp_path_factory)


def _worlds(worlds: Worlds, folders: pytest.TempPathFactory) -> Callable[[int], World]:
    return cache(lambda size: World(size, folders.mktemp(f"world{size}"), *worlds[size]))
