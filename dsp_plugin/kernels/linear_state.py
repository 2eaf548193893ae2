"""Summaries of stretches of linear attention: they compose associatively, and so do those of the gradients.

A stretch of tokens turns the state that comes in into the state that goes out, ``S_out = T S_in + S``. The pair
``(T, S)`` is its summary: the *transition*, and the state from zero. In the backward pass the gradient of the state
runs through the same stretches the other way, ``D_in = T^T D_out + R``, with summaries of the same form.

Where a document starts nothing passes, and that is chosen, not multiplied by 0: 0 * NaN is NaN, and a number of one
document that is none would be one of all.

States are ``[..., K, V]``, fp32 (fp64 for fp64 inputs). Transitions are None where nothing decays, ``[..., 1, 1]`` for
a decay of the whole state, ``[..., K, 1]`` for one of each key dim, and ``[..., K, K]`` for delta rules.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_DIM = 2


class Scan(NamedTuple):
    """The summaries of consecutive chunks, added up. ``[B, H, N, ...]`` for N chunks, ``[B, H, ...]`` for all of them.

    Attributes:
        entering: the state that enters each chunk when none enters the first.
        before: the transition of everything before each chunk.
        transition: that of all chunks; 0 where nothing passes them and states decay.
        state: what leaves the last chunk when nothing enters the first.
        reached: the chunks that a state which enters the first comes to, those that ``before`` is of: the ones before
            the first start of a document, in the order of the scan.
        passes: whether it leaves the last, too: no document starts here.
    """

    entering: Tensor
    before: Tensor | None
    transition: Tensor | None
    state: Tensor
    reached: range
    passes: bool

    def entered_by(self, state: Tensor | None) -> Tensor:
        """The state that enters each chunk when ``state`` ``[B, H, K, V]`` enters the first."""
        if state is None or not self.reached:
            return self.entering
        added = apply(self.before, state.unsqueeze(CHUNK_DIM))
        if len(self.reached) == self.entering.shape[CHUNK_DIM]:
            return self.entering + added
        states = self.entering.clone()
        states.narrow(CHUNK_DIM, self.reached.start, len(self.reached)).add_(added)
        return states

    def left_by(self, state: Tensor | None) -> Tensor:
        """The state that leaves the last chunk when ``state`` enters the first."""
        return self.state + apply(self.transition, state) if self.passes and state is not None else self.state


def apply(transition: Tensor | None, state: Tensor) -> Tensor:
    """``T S``."""
    if transition is None:
        return state
    return transition * state if transition.shape[-1] == 1 else transition @ state


def compose(later: Tensor | None, earlier: Tensor | None) -> Tensor | None:
    """``T2 T1``, the transition of two stretches in a row."""
    if later is None or earlier is None:
        return earlier if later is None else later
    return apply(later, earlier)


def transposed(transition: Tensor | None) -> Tensor | None:
    """``T^T``, the transition of gradients."""
    return transition if transition is None or transition.shape[-1] == 1 else transition.mT


def transition_gradient(transition: Tensor, gradient: Tensor, state: Tensor) -> Tensor:
    """The gradient of ``T`` from that of ``T S``, in the shape of ``T``."""
    if transition.shape[-1] > 1:
        return gradient @ state.mT
    return (gradient * state).sum_to_size(transition.shape)


def scan(transition: Tensor | None, state: Tensor, starts: Collection[int] = (), *, reverse: bool = False) -> Scan:
    """Add up the summaries of chunks.

    Args:
        transition: ``[B or 1, H or 1, N, ...]``, one per chunk.
        state: ``[B, H, N, K, V]``.
        starts: the chunks with which documents start: no state enters them, no gradient leaves them.
        reverse: go from the last chunk to the first, as gradients do.
    """
    count = state.shape[CHUNK_DIM]
    transitions = None if transition is None else transition.unbind(CHUNK_DIM)
    states = state.unbind(CHUNK_DIM)
    nothing = torch.zeros_like(states[0])
    total, product = nothing, None if transitions is None else _identity(transitions[0])
    entering, before = [], []
    passes, reached = True, 0
    for chunk in reversed(range(count)) if reverse else range(count):
        if chunk in starts and not reverse:
            total, passes = nothing, False
        entering.append(total)
        reached += passes
        if passes and product is not None:
            before.append(product)
        if chunk in starts and reverse:
            total, passes = nothing, False
            continue
        if transitions is None:
            total = total + states[chunk]
            continue
        total = apply(transitions[chunk], total) + states[chunk]
        if passes:
            product = compose(transitions[chunk], product)
    if reverse:
        entering.reverse()
        before.reverse()
    return Scan(
        entering=torch.stack(entering, CHUNK_DIM),
        before=torch.stack(before, CHUNK_DIM) if before else None,
        transition=product if passes or product is None else torch.zeros_like(product),
        state=total,
        reached=range(count - reached, count) if reverse else range(reached),
        passes=passes,
    )


def _identity(transition: Tensor) -> Tensor:
    if transition.shape[-1] == 1:
        return torch.ones_like(transition)
    eye = torch.eye(transition.shape[-1], dtype=transition.dtype, device=transition.device)
    return eye.expand_as(transition)
