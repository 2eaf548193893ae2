"""Ranks tell each other that they go on, before they enter what one of them may have to refuse.

A check on what only this rank sees (its number of tokens, the way that its data takes through a model) would raise on
one rank and leave the others waiting in the next collective. `go_on` raises on all of them, or on none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from zlib import crc32

import torch
import torch.distributed as dist

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.ledger import AGREEMENT, COMPARISON
from dsp_plugin.comm.wire import Sender, collect
from dsp_plugin.errors import CollectiveMismatchError, SequenceParallelConfigError, UnsupportedError

Refusal = SequenceParallelConfigError | UnsupportedError
_KINDS: tuple[type[Refusal], ...] = (SequenceParallelConfigError, UnsupportedError)


_each_for_itself = False


@contextmanager
def each_for_itself() -> Iterator[None]:
    """Inside, ranks go on or refuse without asking: for who hears by other means of one that breaks off."""
    global _each_for_itself
    before, _each_for_itself = _each_for_itself, True
    try:
        yield
    finally:
        _each_for_itself = before


def go_on(step: str, refusal: Refusal | None, axis: Axis) -> None:
    """Return on every rank of ``axis``, or raise the same error on every one. Collective.

    Sends 24 bytes to every other rank, and where a rank refuses, or comes to another step, the words of each. The
    answers are read on the host, which waits for the device where the axis has no backend for the host: for passes of
    a new kind, not for all.

    Args:
        step: what this rank is about to do; ranks must come to the same.
        refusal: why it cannot.

    Raises:
        SequenceParallelConfigError, UnsupportedError: the refusal of the first rank that has one.
        CollectiveMismatchError: ranks came to different steps.
    """
    if _each_for_itself or not answers(axis):
        if refusal is not None:
            raise refusal
        return
    words = (step if refusal is None else str(refusal)).encode()
    kind = 0 if refusal is None else 1 + _KINDS.index(type(refusal))
    heads = of_all([crc32(step.encode()), kind, len(words)], axis, AGREEMENT)
    if not any(kind for _, kind, _ in heads) and len({head[0] for head in heads}) == 1:
        return
    longest = max(length for *_, length in heads)
    texts = [bytes(row) for row in of_all([*words.ljust(longest, b" ")], axis, AGREEMENT)]
    said = [text[:length].decode() for text, (*_, length) in zip(texts, heads, strict=True)]
    for rank, (_, kind, _), text in zip(axis.ranks, heads, said, strict=True):
        if kind:
            raise _KINDS[kind - 1](f"{text} (Said by rank {rank} of the sequence's ranks {list(axis.ranks)}.)")
    ways = "; ".join(f"rank {rank}: {text}" for rank, text in zip(axis.ranks, said, strict=True))
    raise CollectiveMismatchError(
        f"the ranks of one sequence are about to do different things. {ways}. Give them the same batch, and let no "
        f"branch depend on the rank or on the part of the data that it holds."
    )


def answers(axis: Axis) -> bool:
    """Whether there is anybody to ask: not on an axis of one rank, nor among the ranks of a dry run."""
    return axis.size > 1 and dist.get_backend(axis.group) != "fake"


def of_all(values: Sequence[int], axis: Axis, purpose: str = COMPARISON) -> list[list[int]]:
    """The 64-bit integers of every rank, in rank order; each gives as many. Collective, and read on the host.

    Args:
        purpose: what the ledger books it under.
    """
    mine = torch.tensor(list(values), dtype=torch.int64, device=_device(axis))
    rows = collect(mine, [len(values)] * axis.size, Sender(axis, purpose, "forward"))
    return torch.stack(rows).tolist()


def _device(axis: Axis) -> torch.device:
    """Where collectives of an axis take tensors: the host's, if they take any of it."""
    assert axis.group is not None
    on_host = any(device.type == "cpu" for device in axis.group._device_types)
    return torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
