"""The process that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dsp_plugin.rehearsal.cuda import guard
from dsp_plugin.rehearsal.cuda.process import CudaProcess


@pytest.fixture(scope="session")
def worker() -> Iterator[CudaProcess]:
    """A process whose torch believes in a GPU."""
    if not guard.library().exists() and guard.compiler() is None:
        pytest.skip("the CUDA guard is to be compiled, and no C++ compiler is found")
    shared = CudaProcess()
    yield shared
    shared.stop()
