"""Options of the whole suite."""

from __future__ import annotations

import pytest
import torch

# As every spawned rank has; more threads than cores slow the small kernels of the tests many times over.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", action="store_true", help="run every case of the big matrices, not the covering subset"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "matrix: a case beyond the covering subset; runs with --matrix only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--matrix"):
        return
    skip = pytest.mark.skip(reason="beyond the covering subset: run with --matrix")
    for item in items:
        if item.get_closest_marker("matrix"):
            item.add_marker(skip)
