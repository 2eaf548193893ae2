"""What a batch says of its rows: where documents start, and which tokens are padding.

Collators say it in several ways, often in more than one at a time: positions that start again, a mask of ones and zeros
or of the numbers of documents, and what Transformers' flash attention takes, `cu_seq_lens_q` and its like. All of it is
read in one copy from the device, after a flag that says whether there is anything to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError

Borders = tuple[int, ...]
MASK, POSITIONS, NUMBERS = "attention_mask", "position_ids", "seq_idx"
BORDERS, LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
TAKEN = (MASK, NUMBERS, *BORDERS, *LENGTHS)
"""Arguments of forward that say nothing beyond where documents and padding are."""


@dataclass(frozen=True)
class Rows:
    """The rows of a batch with their padding behind their tokens, where a causal mask hides it.

    Attributes:
        order: int64 ``[B, L]``, where the tokens of each row came from; None where all lie as they were given.
        documents: borders that all rows share, as `MaskSpec.cu_seqlens`; None for one document, or where rows differ.
        documents_by_row: where rows differ, those of each.
        blind: bool ``[B, L]``: tokens that see no other and not themselves; None if there are none that count.
        interrupted: a document goes on behind padding that stood in its midst.
        apart: where there is padding, the borders of each row between its tokens and their padding; None without. For
            attention that is not causal, which would see it.
        told: something beyond positions says where documents start. Transformers' linear layers do not look at
            positions: by these alone, states and convolutions go on from one document to the next.
    """

    order: Tensor | None = None
    documents: Borders | None = None
    documents_by_row: tuple[Borders, ...] | None = None
    blind: Tensor | None = None
    interrupted: bool = False
    apart: tuple[Borders, ...] | None = None
    told: bool = False

    def arranged(self, x: Tensor) -> Tensor:
        """``x``, ``[1 or B, L, ...]`` as given, in the order of the rows."""
        return x if self.order is None else _taken(x.expand(len(self.order), *x.shape[1:]), self.order)

    def as_given(self, x: Tensor) -> Tensor:
        """What `arranged` gave ``x``."""
        return x if self.order is None else _taken(x, self.order.argsort(1))


def take_rows(values: dict[str, Any], counted: Tensor | None, batch: int, length: int) -> Rows:
    """Takes all of it but positions out of ``values``, forward's arguments by name.

    Args:
        counted: bool ``[B, L]``, the tokens that the loss is taken at; None without labels.

    Raises:
        UnsupportedError: a mask that is no ``[B, L]``.
        SequenceParallelConfigError: shapes do not fit, two of them contradict each other, a document comes in parts, or
            the loss counts at padding.
    """
    given = {name: values.pop(name, None) for name in TAKEN} | {POSITIONS: values.get(POSITIONS)}
    given = {name: torch.as_tensor(value) for name, value in given.items() if value is not None and _known(name, value)}
    for name in (POSITIONS, MASK, NUMBERS):
        if name in given:
            check_shape(name, given[name], (batch,) if name == MASK else (1, batch), length)
    if not given or _plain(given):
        return Rows()
    device = next((value.device for value in given.values() if value.dim()), torch.device("cpu"))
    if MASK in given and counted is not None:
        given["counted"] = counted
    told = _on_host(given)
    real = told[MASK] != 0 if MASK in told else torch.ones(batch, length, dtype=torch.bool)
    order = None
    if (real[:, 1:] & ~real[:, :-1]).any():
        order = real.logical_not().argsort(dim=1, stable=True)
    counted_alone = _counted_alone(told, real)

    numbered = given[MASK].dtype != torch.bool if MASK in given else False
    pairs = _Pairs(order, real)
    jumps = _jumps(told, numbered, pairs, batch, length)
    documents, by_row = _borders(jumps, pairs.both)
    _check_lengths(told, jumps, pairs.both)
    interrupted = order is not None and bool((pairs.both & ~jumps & (pairs.gap > 1)).any())
    found = Rows(
        None if order is None else order.to(device),
        documents,
        by_row,
        interrupted=interrupted,
        apart=_apart(real),
        told=not {*BORDERS, NUMBERS}.isdisjoint(given) or (numbered and bool((told[MASK] > 1).any())),
    )
    return found if counted_alone is None else replace(found, blind=found.arranged(counted_alone.to(device)))


def _apart(real: Tensor) -> tuple[Borders, ...] | None:
    length, counts = real.shape[1], real.sum(1).tolist()
    return None if min(counts, default=length) == length else tuple(tuple(sorted({0, n, length})) for n in counts)


class _Pairs:
    """Neighbours among the tokens of each row, padding left out, which may have stood between them.

    Attributes:
        both: ``[B, L - 1]``: whether the two are tokens.
        gap: how far apart they were given, ``[]`` or ``[B, L - 1]``.
    """

    def __init__(self, order: Tensor | None, real: Tensor) -> None:
        self._order = order
        self.both = (real if order is None else _taken(real, order))[:, 1:]
        self.gap = torch.ones((), dtype=torch.int64) if order is None else order.diff(dim=1)

    def steps(self, x: Tensor) -> Tensor:
        """By how much ``x``, ``[1 or B, L]`` as given, grows from one to the next: ``[1 or B, L - 1]``."""
        return (x if self._order is None else _taken(x.expand_as(self._order), self._order)).diff(dim=1)


def check_shape(name: str, x: Tensor, batches: tuple[int, ...], length: int) -> None:
    """Refuse what is no ``[B, L]``.

    Args:
        batches: the numbers of rows that it may have.

    Raises:
        SequenceParallelConfigError: it is none.
    """
    if x.dim() != 2 or x.shape[0] not in batches or x.shape[1] != length:
        raise SequenceParallelConfigError(
            setting=name,
            value=tuple(x.shape),
            why=f"expected [{batches[-1]}, {length}], as the tokens have",
            remedy="pass whole sequences: they are sharded on their way into the model",
        )


def _taken(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.reshape(*order.shape, *(1,) * (x.dim() - 2)).expand(x.shape))


def _known(name: str, value: Any) -> bool:
    """True; or an error, for a mask that nobody can cut."""
    if name == MASK and (not isinstance(value, Tensor) or value.dim() != 2):
        raise UnsupportedError(
            setting="attention_mask with sequence_parallel",
            value=tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__,
            why="a dense mask is over whole sequences, of which a rank holds a part",
            remedy="pass none, or [batch, length] with 0 for padding and 1, or the number of its document, for a token",
        )
    return True


def _plain(given: Mapping[str, Tensor]) -> bool:
    """Whether there is nothing but a mask of ones and positions that go on, as in most batches: one flag is copied."""
    if set(given) - {MASK, POSITIONS}:
        return False
    flags = [given[MASK] == 1] if MASK in given else []
    flags += [given[POSITIONS].diff(dim=1) == 1] if POSITIONS in given else []
    return bool(torch.stack([flag.all() for flag in flags]).all())


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of them as int64, in one copy."""
    device = next((value.device for value in tensors.values() if value.device.type != "cpu"), torch.device("cpu"))
    flat = torch.cat([value.reshape(-1).to(device, torch.int64, non_blocking=True) for value in tensors.values()]).cpu()
    parts = flat.split([value.numel() for value in tensors.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(tensors.items(), parts, strict=True)}


def _counted_alone(told: Mapping[str, Tensor], real: Tensor) -> Tensor | None:
    """bool ``[B, L]``: padding in front of a row's tokens at which the loss counts; None if there is none.

    It attends to nothing, wherever it lies. What other padding sees changes as it is moved.
    """
    if "counted" not in told or real.all():
        return None
    counted, seen = told["counted"].bool() & ~real, real.cumsum(1) > 0
    if (counted & seen).any():
        batch, length = real.shape
        raise SequenceParallelConfigError(
            setting="attention_mask",
            value=f"{int((~real).sum())} of {batch} * {length} are padding",
            why="the loss counts what is predicted at padding behind a token, which would attend to other tokens than "
            "unsharded",
            remedy="give labels of -100 to padding, and to the first token behind padding in the midst of a row",
        )
    return counted if counted.any() else None


def _jumps(told: Mapping[str, Tensor], numbered: bool, pairs: _Pairs, batch: int, length: int) -> Tensor:
    """``[B, L - 1]``: whether the second of two neighbouring tokens starts a document.

    A mask of ones says nothing of documents, and positions that go on say nothing against them: positions do so as
    always in Transformers' flash attention, and in its eager and sdpa attention where they are told to keep no cache
    and get no mask.
    """
    found: dict[str, Tensor] = {}
    if borders := [name for name in BORDERS if name in told]:
        found[borders[0]] = (pairs.steps(_numbers(told, borders, batch, length)) != 0) & pairs.both
    if NUMBERS in told:
        found[NUMBERS] = (pairs.steps(told[NUMBERS]) != 0) & pairs.both
    if numbered:
        steps = pairs.steps(told[MASK])
        if ((steps < 0) & pairs.both).any():
            raise SequenceParallelConfigError(
                setting="attention_mask",
                value=tuple(told[MASK].shape),
                why="the numbers of documents in it go down, so one document would lie in several parts",
                remedy="number the documents of a row in their order, as in 1 1 1 2 2, with 0 for padding",
            )
        if (by_mask := (steps != 0) & pairs.both).any():
            found[MASK] = by_mask
    by_positions = torch.zeros_like(pairs.both)
    if POSITIONS in told:
        steps = pairs.steps(told[POSITIONS])
        # They may count padding or not.
        by_positions = (steps != 1) & (steps != pairs.gap) & pairs.both
    for name, jumps in found.items():
        first = next(iter(found))
        if (jumps != found[first]).any():
            _contradict(f"{first} and {name}", "documents start at other places by one than by the other")
        if (by_positions & ~jumps).any():
            _contradict(f"position_ids and {name}", f"positions start again in the middle of a document of {name}")
    return next(iter(found.values()), by_positions)


def _contradict(setting: str, why: str) -> None:
    raise SequenceParallelConfigError(
        setting=setting, why=why, remedy="pass one of them, or let all start documents at the same tokens"
    )


def _numbers(told: Mapping[str, Tensor], given: list[str], batch: int, length: int) -> Tensor:
    """The document of each token, ``[B, L]``, by the borders of all rows laid end to end."""
    first, last = told[given[0]], told[given[-1]]
    if not torch.equal(first, last):
        _contradict(" and ".join(BORDERS), "queries and keys of a sequence are the same tokens, and these differ")
    total = batch * length
    ordered = first.dim() == 1 and first.numel() > 1 and bool((first.diff() >= 0).all())
    if not ordered or first[0] != 0 or first[-1] != total:
        raise SequenceParallelConfigError(
            setting=given[0],
            value=first.flatten()[:16].tolist(),
            why=f"document borders start at 0, never decrease, and end at {total}, the tokens of {batch} * {length}",
            remedy="pass (0, end of document 1, ..., all tokens), in positions of the whole batch laid end to end",
        )
    numbers = torch.searchsorted(first[1:].contiguous(), torch.arange(total), right=True).view(batch, length)
    crossed = numbers[1:, 0] == numbers[:-1, -1]
    if crossed.any():
        raise SequenceParallelConfigError(
            setting=given[0],
            value=first[:16].tolist(),
            why=f"a document goes on from row {int(crossed.nonzero()[0, 0])} of the batch to the next",
            remedy=f"let a document start with every row, at multiples of {length}",
        )
    return numbers


def _borders(jumps: Tensor, both: Tensor) -> tuple[Borders | None, tuple[Borders, ...] | None]:
    """Those that all rows share, or those of each row; a row may have further ones in its padding."""
    if not jumps.any():
        return None, None
    length, shared = jumps.shape[1] + 1, jumps.any(0)
    if ((jumps == shared) | ~both).all():
        return (0, *(shared.nonzero().flatten() + 1).tolist(), length), None
    return None, tuple((0, *(row.nonzero().flatten() + 1).tolist(), length) for row in jumps)


def _check_lengths(told: Mapping[str, Tensor], jumps: Tensor, both: Tensor) -> None:
    given = {name: int(told[name].max()) for name in LENGTHS if name in told}
    if len(set(given.values())) > 1:
        _contradict(" and ".join(LENGTHS), f"queries and keys of a sequence are the same tokens, and these are {given}")
    if not given:
        return
    places = torch.arange(jumps.shape[1] + 1)
    starts = torch.where(jumps, places[1:], 0).cummax(1).values
    longest = 1 + int(torch.where(both, places[1:] - starts, 0).max()) if jumps.numel() else 1
    if longest > min(given.values()):
        _contradict(next(iter(given)), f"it is {min(given.values())}, and a document has {longest} tokens")
