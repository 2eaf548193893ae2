"""Ranks that hold other people's models: the libraries are imported once, not once for every rank of every test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from preloading import preload

HERE = Path(__file__).parent
# What the tests of each library need; a rank that imports either by itself needs seconds for it.
NEEDED = {
    "diffusers": ["test_latte.py", "test_wan.py", "test_sampling.py", "test_plans_deepspeed.py"],
    "transformers": ["test_timesformer.py", "test_vivit.py", "test_plans_deepspeed.py"],
    "esm": ["test_msa.py"],
}
PRELOADED = [
    "diffusers.models.transformers.latte_transformer_3d",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "transformers.models.timesformer.modeling_timesformer",
    "transformers.models.vivit.modeling_vivit",
    "esm",
]

collect_ignore = [
    name for library, files in NEEDED.items() if importlib.util.find_spec(library) is None for name in files
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_imported_once() -> None:
    preload(*PRELOADED)
