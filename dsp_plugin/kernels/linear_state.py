"""Summaries of stretches of linear attention: they compose associatively, and so do those of the gradients.

A stretch of tokens turns the state that comes in into the state that goes out, ``S_out = T S_in + S``. The pair
``(T, S)`` is its summary: the *transition*, and the state from zero. In the backward pass the gradient of the state
runs through the same stretches the other way, ``D_in = T^T D_out + R``, with summaries of the same form.

States are ``[..., K, V]``, fp32 (fp64 for fp64 inputs). Transitions are None where nothing decays, ``[..., 1, 1]`` for
a decay of the whole state, ``[..., K, 1]`` for one of each key dim, and ``[..., K, K]`` for delta rules.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_DIM = 2


class Scan(NamedTuple):
    """The summaries of consecutive chunks, added up. ``[B, H, N, ...]`` for N chunks, ``[B, H, ...]`` for all of them.

    Attributes:
        entering: the state that enters each chunk when none enters the first.
        before: the transition of everything before each chunk.
        transition: that of all chunks.
        state: what leaves the last chunk when nothing enters the first.
    """

    entering: Tensor
    before: Tensor | None
    transition: Tensor | None
    state: Tensor

    def entered_by(self, state: Tensor | None) -> Tensor:
        """The state that enters each chunk when ``state`` ``[B, H, K, V]`` enters the first."""
        if state is None:
            return self.entering
        return self.entering + apply(self.before, state.unsqueeze(CHUNK_DIM))

    def left_by(self, state: Tensor | None) -> Tensor:
        """The state that leaves the last chunk when ``state`` enters the first."""
        return self.state if state is None else self.state + apply(self.transition, state)


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


def scan(transition: Tensor | None, state: Tensor, *, reverse: bool = False) -> Scan:
    """Add up the summaries of chunks.

    Args:
        transition: ``[B or 1, H or 1, N, ...]``, one per chunk.
        state: ``[B, H, N, K, V]``.
        reverse: go from the last chunk to the first, as gradients do.
    """
    chunks = range(state.shape[CHUNK_DIM])
    transitions = None if transition is None else transition.unbind(CHUNK_DIM)
    states = state.unbind(CHUNK_DIM)
    entering, before = [], []
    total, product = torch.zeros_like(states[0]), None if transitions is None else _identity(transitions[0])
    for chunk in reversed(chunks) if reverse else chunks:
        entering.append(total)
        if transitions is None:
            total = total + states[chunk]
            continue
        before.append(product)
        total = apply(transitions[chunk], total) + states[chunk]
        product = compose(transitions[chunk], product)
    if reverse:
        entering.reverse()
        before.reverse()
    stacked = None if transitions is None else torch.stack([x for x in before if x is not None], CHUNK_DIM)
    return Scan(torch.stack(entering, CHUNK_DIM), stacked, product, total)


def _identity(transition: Tensor) -> Tensor:
    if transition.shape[-1] == 1:
        return torch.ones_like(transition)
    eye = torch.eye(transition.shape[-1], dtype=transition.dtype, device=transition.device)
    return eye.expand_as(transition)
