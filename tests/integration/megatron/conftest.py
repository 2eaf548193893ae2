"""The reference that all parity tests share, and the skip where Megatron-core is absent."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron_runs import Run, train

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    installed = importlib.util.find_spec("megatron") is not None
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.megatron)
            if not installed:
                item.add_marker(pytest.mark.skip(reason="megatron-core is not installed: pip install -e '.[megatron]'"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Runs of stock Megatron on one rank, without the plugin; one for each set of extra arguments."""
    runs: dict[tuple[str, ...], Run] = {}

    def run(*argv: str) -> Run:
        if argv not in runs:
            runs[argv] = train(tmp_path_factory.mktemp("reference"), 1, *argv, plugin=False)
        return runs[argv]

    return run
