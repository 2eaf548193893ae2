"""Worlds of real DeepSpeed processes with Transformers' models, one per size, started when a test asks for results."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "deepspeed"))

from script_world import ScriptWorld

HERE = Path(__file__).parent
# What each world runs, by its size and a name, in order, and the seconds until it counts as hung.
GROUPS = {
    (2, ""): (("hf_features", "hf_tiles", "hf_refused", "hf_training"), 240),
    (2, "living"): (("hf_living", "hf_peft", "hf_heads", "hf_tiled"), 280),
    (2, "compiled"): (("hf_compiled",), 600),
    (3, ""): (("hf_training",), 150),
    (4, ""): (("hf_training",), 150),
}
# What it runs beyond the covering subset.
MATRIX = {
    (2, "living"): ("hf_peft_matrix", "hf_heads_matrix", "hf_tiled_matrix"),
    (2, "compiled"): ("hf_compiled_matrix",),
}

if any(importlib.util.find_spec(name) is None for name in ("deepspeed", "transformers", "peft")):
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.deepspeed)
            item.add_marker(pytest.mark.timeout(300))


class World(ScriptWorld):
    """The results of one world."""

    def __init__(self, size: int, name: str, folder: Path, matrix: bool) -> None:
        groups, timeout = GROUPS[size, name]
        groups += MATRIX.get((size, name), ()) if matrix else ()
        super().__init__([str(HERE / "hf_worker.py"), str(folder), *groups], size, folder, timeout)

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
