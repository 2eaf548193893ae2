"""A process with a GPU that is not there, to run cases in: what torch believes of devices, it believes for good."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import cuda_guard
import cuda_world


class Worker:
    """The process; started by the first case, for all of them."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> Any:
        """What the function returns there. It and its arguments are pickled; its module may import torch.

        Raises:
            RuntimeError: it raised, with the traceback.
            BrokenProcessPool: the process died.
            TimeoutError: it took too long.
        """
        if self._pool is None:
            # Spawned, not forked: it must not inherit a torch that has looked for devices.
            self._pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), cuda_world.start, (str(cuda_guard.built()),)
            )
        try:
            return self._pool.submit(_told, function, *arguments).result(timeout)
        except (TimeoutError, OSError):
            self.stop()
            raise

    def stop(self) -> None:
        """End the process, whatever it does."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        for process in list((pool._processes or {}).values()):
            process.kill()
        # Its threads are not waited for: they may wait for the process that is gone.
        pool.shutdown(wait=False, cancel_futures=True)


def _told(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception:
        # Not all of torch's errors can be pickled.
        raise RuntimeError(traceback.format_exc()) from None
