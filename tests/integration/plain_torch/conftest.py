"""Ranks that train in plain PyTorch: the libraries are imported once, not once for every rank."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from preloading import preload

HERE = Path(__file__).parent
PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
]

if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_imported_once() -> None:
    preload(*PRELOADED)
