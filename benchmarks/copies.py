"""How many bytes tensor operations write: what a copy costs, whoever makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATES = ("empty", "new_empty", "empty_like", "empty_permuted", "empty_strided", "new_empty_strided")


class WrittenBytes(TorchDispatchMode):
    """Counts while it is entered, in backward passes too. What collectives receive does not count, nor do views.

    Attributes:
        written: bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, and add what it returns."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "aten" and not func.is_view and name not in (*_ALLOCATES, "detach", "_unsafe_view"):
            self.written += sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out
