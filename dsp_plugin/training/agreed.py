"""Work that ranks do each for themselves, or one for all, with one outcome: what fails on one fails on every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def on_all(work: Callable[[], Result]) -> list[Result]:
    """Every rank of the world does its work and gets the results of all, by rank. Every rank calls it.

    Raises:
        Exception: the work failed on a rank; every rank raises the error of the first on which it did.
    """
    own: tuple[Result | None, Exception | None]
    try:
        own = work(), None
    except Exception as error:
        own = None, error
    # An error's traceback stays here, and not every error of a foreign library can be sent.
    sent = own if own[1] is None else (None, _sendable(own[1]))
    outcomes: list = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, sent)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            if rank == dist.get_rank() and own[1] is not None:
                raise own[1]
            failure.add_note(f"This is the error of rank {rank}.")
            raise failure
    return [result for result, _ in outcomes]


def on_first(work: Callable[[], Result]) -> Result:
    """The first rank of the world does the work, and every rank gets its result. Every rank calls it.

    Raises:
        Exception: the work failed; on every rank.
    """
    return on_all(lambda: work() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]


def _sendable(error: Exception) -> Exception:
    known = isinstance(error, OSError) or type(error).__module__.startswith("dsp_plugin.")
    return error if known else RuntimeError(f"{type(error).__name__}: {error}")
