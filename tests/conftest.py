"""Options of the whole suite."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from compatibility import Recorder
from cores import left_to_another
from preloading import preload

# As where the environment is activated. Its ninja and the system's, of another version, would each compile anew what
# the other has compiled for DeepSpeed.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# As every spawned rank has; more threads than cores slow the small kernels of the tests many times over.
torch.set_num_threads(1)
preload()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", action="store_true", help="run every case of the big matrices, not the covering subset"
    )
    parser.addoption(
        "--cells-out", type=Path, metavar="FILE", help="write what was found of every cell of docs/compatibility.md"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "matrix: a case beyond the covering subset; runs with --matrix only")
    config.addinivalue_line(
        "markers",
        "core(which): of the tested megatron-cores the newest, the oldest or every one runs it; see tests/cores.py",
    )
    config.addinivalue_line(
        "markers", "cell(framework, method, feature, status, reason): the cell of docs/compatibility.md that it holds"
    )
    config.pluginmanager.register(Recorder(), "cells")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.pluginmanager.get_plugin("cells").collect(items)
    if config.getoption("--matrix"):
        return
    skip = pytest.mark.skip(reason="beyond the covering subset: run with --matrix")
    for item in items:
        if item.get_closest_marker("matrix") or left_to_another(item):
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--cells-out")
    if path is not None:
        session.config.pluginmanager.get_plugin("cells").write(path, sys.argv[1:])
