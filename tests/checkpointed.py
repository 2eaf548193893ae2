"""The ways in which a stretch of a model is checkpointed, and what memory it holds on to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dsp_plugin.training.recompute import keep_attention

Through = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def whole(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=True)


def non_reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False)


def by_context(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False, context_fn=keep_attention)


# Name -> how the whole stack is called, how each layer is, and whether torch is patched.
WAYS: dict[str, tuple[Through, Through, bool]] = {
    "context function": (whole, by_context, False),
    "non-reentrant": (whole, non_reentrant, True),
    "reentrant": (whole, reentrant, True),
    "one stretch, non-reentrant": (non_reentrant, whole, True),
    "one stretch, reentrant": (reentrant, whole, True),
    "nested, both non-reentrant": (non_reentrant, non_reentrant, True),
    "nested, both reentrant": (reentrant, reentrant, True),
    "nested, outer reentrant": (reentrant, non_reentrant, True),
    "nested, inner reentrant": (non_reentrant, reentrant, True),
    "nested, context functions": (by_context, by_context, False),
}
ORDINARY: dict[str, tuple[Through, Through, bool]] = {
    "ordinary non-reentrant": (whole, non_reentrant, False),
    "ordinary reentrant": (whole, reentrant, False),
}


class Storages(TorchDispatchMode):
    """Sees every storage that operations of this thread make, also those whose tensors are out of Python's sight."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views of what was there before are not made here.
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in given:
                    continue
                self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def nbytes(self) -> int:
        """Bytes of those that are still there."""
        return sum(nbytes for storage, nbytes in self._found.values() if not storage.expired())

    def settled(self, expected: int) -> int:
        """The same, once gloo's threads have let go of what they sent."""
        for _ in range(100):
            if self.nbytes() == expected:
                break
            time.sleep(0.02)
        return self.nbytes()
