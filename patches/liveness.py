"""Puts the ranks of a launched script under watch (`dsp_plugin.watch.liveness`), from its first world of ranks on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist

from dsp_plugin.comm.ledger import ledger
from dsp_plugin.errors import PatchError
from dsp_plugin.patches.patch import Patch
from dsp_plugin.watch.last_words import Latest
from dsp_plugin.watch.liveness import Watch


@contextmanager
def watched(timeout: float) -> Iterator[None]:
    """Watches the ranks of the world that the block makes with `init_process_group`, if there are several.

    A world that the block makes later is not watched by itself; the watch of the first goes on beside it. What leaves
    the block leaves it here too, after the other ranks have been told; `SystemExit` with status 0 is no failure.

    Args:
        timeout: seconds of silence after which a rank is taken for dead; 0 watches nobody.
    """
    if timeout == 0:
        yield
        return
    latest = Latest()
    watches: list[Watch | None] = []

    def make(upstream: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(upstream)
        def init_process_group(*args: Any, **kwargs: Any) -> Any:
            result = upstream(*args, **kwargs)
            # A dry run's ranks exist on paper only, and MPI's have no store.
            if not watches and dist.get_world_size() > 1 and dist.get_backend() not in ("fake", "mpi"):
                store = dist.distributed_c10d._get_default_store()
                watches.append(Watch.join(store, dist.get_rank(), dist.get_world_size(), timeout, latest))
            return result

        return init_process_group

    patch = Patch("liveness", "torch.distributed:init_process_group", "torch", ">=2.6", make)
    patch.apply()
    error: BaseException | None = None
    try:
        with ledger(latest):
            yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        finished = isinstance(error, SystemExit) and error.code in (None, 0)
        for watch in watches:
            if watch is not None:
                watch.leave(None if finished else error)
        # What a script has put in its place since is the script's.
        with contextlib.suppress(PatchError):
            patch.revert()
