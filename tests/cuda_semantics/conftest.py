"""The process that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_guard
import pytest
from cuda_worker import Worker


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    """A process whose torch believes in a GPU."""
    if not cuda_guard.library().exists() and cuda_guard.compiler() is None:
        pytest.skip("the CUDA guard is to be compiled, and no C++ compiler is found")
    shared = Worker()
    yield shared
    shared.stop()
