"""What calls over some of a rank's tokens add up to: outputs merged by their log-sum-exp, and gradients.

The first result that covers all tokens is taken as it is. Those of tokens that do not lie in one stretch, as the late
runs of packed documents, are added up by themselves, and brought to their places once, after the last of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsp_plugin.kernels.merge import accumulation_dtype, empty_state, merge_
from dsp_plugin.methods.places import Places


class Picked:
    """Tensors ``[B, n, ...]`` of all queries, and an lse ``[B, H, n]`` behind them, as calls for some of them want it.

    Those that had to be copied are kept until the last of these calls.
    """

    def __init__(self, *tensors: Tensor, lse: Tensor | None = None) -> None:
        self._tensors, self._lse = tensors, lse
        self._kept: dict[Places, tuple[Tensor, ...]] = {}

    def of(self, places: Places, *, again: bool) -> tuple[Tensor, ...]:
        """Those of some queries.

        Args:
            again: whether a later call wants the same.
        """
        found = self._kept.pop(places, None)
        if found is None:
            found = tuple(places.pick(x) for x in self._tensors)
            if self._lse is not None:
                # Kernels read it as dense.
                found = *found, places.pick(self._lse, 2).contiguous()
        if again:
            self._kept[places] = found
        return found


class Outputs:
    """Attention outputs and their lse.

    Args:
        q: ``[B, n, H, D]``; v: ``[B, m, K, Dv]``.
    """

    def __init__(self, q: Tensor, v: Tensor) -> None:
        self._q, self._v, self._wide = q, v, accumulation_dtype(q.dtype)
        self._whole: tuple[Tensor, Tensor] | None = None
        self._apart: dict[Places, tuple[Tensor, Tensor]] = {}

    def add(self, places: Places, out: Tensor, lse: Tensor, *, again: bool, may_be_empty: bool) -> None:
        """Merge a call's result.

        Args:
            places: its queries.
            again: whether a later call has the same.
            may_be_empty: whether one of them may have seen no key.
        """
        if places.stretch is not None:
            if self._whole is None and places.covers(self._q.shape[1]):
                self._whole = self._widened(out, lse)
                return
            whole, whole_lse = self._started()
            merge_(places.pick(whole), places.pick(whole_lse, 2), out, lse, may_be_empty=may_be_empty)
            return
        state = self._apart.pop(places, None)
        if state is None:
            state = self._widened(out, lse)
        else:
            merge_(*state, out, lse, may_be_empty=may_be_empty)
        if again:
            self._apart[places] = state
        else:
            self._bring_home(places, *state)

    def total(self) -> tuple[Tensor, Tensor]:
        """``out`` in the dtype of q, 0 where no key was seen, and ``lse``, -inf there."""
        out, lse = self._started()
        return out.to(self._q.dtype), lse

    def _bring_home(self, places: Places, out: Tensor, lse: Tensor) -> None:
        whole, whole_lse = self._started()
        index = places.on(whole.device)
        so_far = whole.index_select(1, index), whole_lse.index_select(2, index)
        merge_(*so_far, out, lse, may_be_empty=False)
        whole.index_copy_(1, index, so_far[0])
        whole_lse.index_copy_(2, index, so_far[1])

    def _widened(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return out.to(self._wide), lse.to(self._wide)

    def _started(self) -> tuple[Tensor, Tensor]:
        if self._whole is None:
            self._whole = empty_state(self._q, self._v)
        return self._whole


class Gradients:
    """Gradients of tokens ``[B, n, ...]``, added up in fp32 (fp64 for fp64)."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._wide = like, accumulation_dtype(like.dtype)
        self._whole: Tensor | None = None
        self._apart: dict[Places, Tensor] = {}

    def add(self, places: Places, gradient: Tensor, *, again: bool = False, last: bool = False) -> None:
        """Add those of some tokens.

        Args:
            again: whether others for the same tokens are to come.
            last: whether none at all is to come.
        """
        if places.covers(self._like.shape[1]):
            if self._whole is None:
                self._whole = gradient
            elif last and self._wide != self._like.dtype and self._wide in (self._whole.dtype, gradient.dtype):
                rounded = gradient.new_empty(self._like.shape, dtype=self._like.dtype)
                self._whole = torch.add(self._whole, gradient, out=rounded)
            else:
                self._started().add_(gradient)
        elif places.stretch is not None:
            places.add_(self._started(), gradient)
        else:
            apart = self._apart.pop(places, None)
            apart = gradient.to(self._wide) if apart is None else apart.add_(gradient)
            if again:
                self._apart[places] = apart
            else:
                places.add_(self._started(), apart)

    def total(self) -> Tensor:
        """The sum, in the dtype of the tokens."""
        return (self._started() if self._whole is None else self._whole).to(self._like.dtype)

    def _started(self) -> Tensor:
        if self._whole is None:
            self._whole = torch.zeros(self._like.shape, dtype=self._wide, device=self._like.device)
        self._whole = self._whole.to(self._wide)
        return self._whole
