"""Worlds of real DeepSpeed processes with Transformers' models, one per size, started when a test asks for results."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
# What each world runs, by its size and a name, in order, and the seconds until it counts as hung.
GROUPS = {
    (2, ""): (("hf_features", "hf_refused", "hf_training"), 200),
    (2, "living"): (("hf_living", "hf_peft", "hf_heads"), 280),
    (3, ""): (("hf_training",), 150),
    (4, ""): (("hf_training",), 150),
}
# What it runs beyond the covering subset.
MATRIX = {(2, "living"): ("hf_peft_matrix", "hf_heads_matrix")}

if any(importlib.util.find_spec(name) is None for name in ("deepspeed", "transformers", "peft")):
    collect_ignore_glob = ["test_*.py"]

sys.path.insert(0, str(HERE.parent / "deepspeed"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.deepspeed)
            item.add_marker(pytest.mark.timeout(300))


class World:
    """The results of one world."""

    def __init__(self, size: int, name: str, folder: Path, matrix: bool) -> None:
        from deepspeed_world import run_ranks

        self.size, self.folder = size, folder
        self.failure: AssertionError | None = None
        groups, timeout = GROUPS[size, name]
        groups += MATRIX.get((size, name), ()) if matrix else ()
        try:
            run_ranks([str(HERE / "hf_worker.py"), str(folder), *groups], size, folder, timeout)
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
def hf_world(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Callable[..., World]:
    """The world of a size and a name; it runs once per session."""
    worlds: dict[tuple[int, str], World] = {}

    def of(size: int, name: str = "") -> World:
        if (size, name) not in worlds:
            folder = tmp_path_factory.mktemp(f"hf_world{size}{name}")
            worlds[size, name] = World(size, name, folder, pytestconfig.getoption("--matrix"))
        return worlds[size, name]

    return of
