"""What a batch says of its rows: where documents start, and which tokens are padding.

Collators say it in several ways, often in more than one at a time: positions that start again, a mask of ones and zeros
or of the numbers of documents, and what Transformers' flash attention takes, `cu_seq_lens_q` and its like. The device
works out where neighbours jump, a byte a token, and the host waits for it once a batch, for one copy; rows with padding
are read once more, whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError

Borders = tuple[int, ...]
MASK, POSITIONS, NUMBERS = "attention_mask", "position_ids", "seq_idx"
BORDERS, LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
FALLS, PADDED = "attention_mask goes down", "attention_mask has zeros"
_SIGNED = (torch.int16, torch.int32, torch.int64)
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
    if not given:
        return Rows()
    large = {name: given.pop(name) for name in (MASK, POSITIONS, NUMBERS) if name in given}
    told = _on_host(given | _said(large, _Pairs()) | ({PADDED: (large[MASK] == 0).any()} if MASK in large else {}))
    small = {name: told[name].long() for name in given}
    if told.get(PADDED):
        return _padded(large, small, counted, batch, length)
    said = told | small
    jumps = _jumps(said, _Pairs(), batch, length)
    documents, by_row = _borders(jumps)
    _check_lengths(small, max(int(np.diff(row).max()) for row in by_row or (documents or (0, length),)))
    return Rows(documents=documents, documents_by_row=by_row, told=_beyond_positions(said))


def _padded(
    large: Mapping[str, Tensor], small: dict[str, Tensor], counted: Tensor | None, batch: int, length: int
) -> Rows:
    """Of a mask that says that some tokens are padding.

    Args:
        large: what there is for every token.
        small: on the host, what else there is.
    """
    device = large[MASK].device
    told = _on_host(large if counted is None else {**large, "counted": counted})
    real = told[MASK] != 0
    order = None
    if (real[:, 1:] & ~real[:, :-1]).any():
        order = real.logical_not().argsort(dim=1, stable=True)
    counted_alone = _counted_alone(told, real)

    pairs = _Pairs(order, real)
    said = small | _said(told, pairs)
    jumps = _jumps(said, pairs, batch, length)
    assert pairs.both is not None
    documents, by_row = _borders(jumps, pairs.both)
    _check_lengths(small, _longest(jumps, pairs.both))
    interrupted = pairs.gap is not None and bool((pairs.both & ~jumps & (pairs.gap > 1)).any())
    found = Rows(
        None if order is None else order.to(device),
        documents,
        by_row,
        interrupted=interrupted,
        apart=_apart(real),
        told=_beyond_positions(said),
    )
    return found if counted_alone is None else replace(found, blind=found.arranged(counted_alone.to(device)))


def _apart(real: Tensor) -> tuple[Borders, ...] | None:
    length, counts = real.shape[1], real.sum(1).tolist()
    return None if min(counts, default=length) == length else tuple(tuple(sorted({0, n, length})) for n in counts)


class _Pairs:
    """Neighbours among the tokens of each row, padding left out, which may have stood between them.

    Attributes:
        both: ``[B, L - 1]``: whether the two are tokens; None where all are.
        gap: how far apart they were given, ``[B, L - 1]``; None where all are neighbours.
    """

    def __init__(self, order: Tensor | None = None, real: Tensor | None = None) -> None:
        self._order = order
        self.both = None if real is None else (real if order is None else _taken(real, order))[:, 1:]
        self.gap = None if order is None else order.diff(dim=1)

    def among_tokens(self, jumps: Tensor) -> Tensor:
        """``jumps``, ``[1 or B, L - 1]``, where both are tokens."""
        return jumps if self.both is None else jumps & self.both

    def steps(self, x: Tensor) -> Tensor:
        """By how much ``x``, ``[1 or B, L]`` as given, grows from one to the next: ``[1 or B, L - 1]``."""
        if x.dtype not in _SIGNED:
            x = x.long()
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


def _said(values: Mapping[str, Tensor], pairs: _Pairs) -> dict[str, Tensor]:
    """By name, where one of two neighbours says otherwise than the other: bool ``[1 or B, L - 1]``, on their device.

    A mask of truth values says nothing of documents; of another, whether it goes down, too.
    """
    said: dict[str, Tensor] = {}
    if NUMBERS in values:
        said[NUMBERS] = pairs.among_tokens(pairs.steps(values[NUMBERS]) != 0)
    if MASK in values and values[MASK].dtype != torch.bool:
        steps = pairs.steps(values[MASK])
        said[MASK], said[FALLS] = pairs.among_tokens(steps != 0), pairs.among_tokens(steps < 0).any()
    if POSITIONS in values:
        steps = pairs.steps(values[POSITIONS])
        # They may count padding or not.
        jumps = steps != 1 if pairs.gap is None else (steps != 1) & (steps != pairs.gap)
        said[POSITIONS] = pairs.among_tokens(jumps)
    return said


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of them, those on a device in one copy."""
    away = {name: value for name, value in tensors.items() if value.device.type != "cpu"}
    found = {name: value for name, value in tensors.items() if name not in away}
    if not away:
        return found
    # Wide ones first: their bytes are to lie where such numbers can.
    ordered = sorted(away.items(), key=lambda item: -item[1].element_size())
    parts = [value.contiguous().view(-1).view(torch.uint8) for _, value in ordered]
    flat = torch.cat(parts).cpu()
    for (name, value), part in zip(ordered, flat.split([part.numel() for part in parts]), strict=True):
        found[name] = part.view(value.dtype).view(value.shape)
    return found


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


def _jumps(said: Mapping[str, Tensor], pairs: _Pairs, batch: int, length: int) -> Tensor:
    """``[1 or B, L - 1]``: whether the second of two neighbouring tokens starts a document.

    A mask of ones says nothing of documents, and positions that go on say nothing against them: positions do so as
    always in Transformers' flash attention, and in its eager and sdpa attention where they are told to keep no cache
    and get no mask.

    Args:
        said: on the host.
    """
    found: dict[str, Tensor] = {}
    if borders := [name for name in BORDERS if name in said]:
        starts = _starts(said, borders, batch, length)
        jumps = starts[:, 1:] if pairs.gap is None else pairs.steps(starts.cumsum(1)) != 0
        found[borders[0]] = pairs.among_tokens(jumps)
    if NUMBERS in said:
        found[NUMBERS] = said[NUMBERS]
    if MASK in said:
        if said[FALLS]:
            raise SequenceParallelConfigError(
                setting="attention_mask",
                value=(batch, length),
                why="the numbers of documents in it go down, so one document would lie in several parts",
                remedy="number the documents of a row in their order, as in 1 1 1 2 2, with 0 for padding",
            )
        if said[MASK].any():
            found[MASK] = said[MASK]
    by_positions = said.get(POSITIONS)
    for name, jumps in found.items():
        first = next(iter(found))
        if (jumps != found[first]).any():
            _contradict(f"{first} and {name}", "documents start at other places by one than by the other")
        if by_positions is not None and (by_positions & ~jumps).any():
            _contradict(f"position_ids and {name}", f"positions start again in the middle of a document of {name}")
    nothing = torch.zeros(1, max(length - 1, 0), dtype=torch.bool) if by_positions is None else by_positions
    return next(iter(found.values()), nothing)


def _beyond_positions(said: Mapping[str, Tensor]) -> bool:
    return not {*BORDERS, NUMBERS}.isdisjoint(said) or (MASK in said and bool(said[MASK].any()))


def _contradict(setting: str, why: str) -> None:
    raise SequenceParallelConfigError(
        setting=setting, why=why, remedy="pass one of them, or let all start documents at the same tokens"
    )


def _starts(said: Mapping[str, Tensor], given: list[str], batch: int, length: int) -> Tensor:
    """Whether a token is the first of its document, bool ``[B, L]``, by the borders of all rows laid end to end."""
    first, last = said[given[0]], said[given[-1]]
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
    starts = torch.zeros(total, dtype=torch.bool)
    starts[first[first < total].long()] = True
    starts = starts.view(batch, length)
    if not starts[:, :1].all():
        raise SequenceParallelConfigError(
            setting=given[0],
            value=first[:16].tolist(),
            why=f"a document goes on from row {int((~starts[1:, 0]).nonzero()[0, 0])} of the batch to the next",
            remedy=f"let a document start with every row, at multiples of {length}",
        )
    return starts


def _borders(jumps: Tensor, both: Tensor | None = None) -> tuple[Borders | None, tuple[Borders, ...] | None]:
    """Those that all rows share, or those of each row; a row may have further ones in its padding."""
    if len(jumps) == 1:
        borders = _borders_of(jumps[0])
        return (borders if len(borders) > 2 else None), None
    if not jumps.any():
        return None, None
    shared = jumps.any(0)
    alike = jumps == shared
    if (alike if both is None else alike | ~both).all():
        return _borders_of(shared), None
    return None, tuple(map(_borders_of, jumps))


def _borders_of(jumps: Tensor) -> Borders:
    return (0, *(np.flatnonzero(jumps.numpy()) + 1).tolist(), len(jumps) + 1)


def _longest(jumps: Tensor, both: Tensor) -> int:
    """Of the documents, without padding."""
    if not jumps.numel():
        return 1
    places = torch.arange(jumps.shape[1] + 1)
    starts = torch.where(jumps, places[1:], 0).cummax(1).values
    return 1 + int(torch.where(both, places[1:] - starts, 0).max())


def _check_lengths(said: Mapping[str, Tensor], longest: int) -> None:
    """Refuse lengths that contradict each other, or that the longest document exceeds."""
    given = {name: int(said[name].max()) for name in LENGTHS if name in said}
    if len(set(given.values())) > 1:
        _contradict(" and ".join(LENGTHS), f"queries and keys of a sequence are the same tokens, and these are {given}")
    if given and longest > min(given.values()):
        _contradict(next(iter(given)), f"it is {min(given.values())}, and a document has {longest} tokens")
