"""Batches whose rows are padded and packed unlike, at random, and what Transformers itself makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from hf_models import VOCABULARY, build_model
from torch import Tensor

IGNORED = -100
ROWS, LENGTHS = 3, (13, 18, 23)


@dataclass(frozen=True)
class Batch:
    """Whole rows.

    Attributes:
        tokens: ``[B, L]``.
        told: what forward is told of documents and padding.
        documents: by row, the places of the tokens of each document; padding is in none.
        positions: ``[B, L]``.
        window: whether windows of a model mean the same in it.
        own: whether Transformers' sdpa attention takes the batch as it is.
    """

    tokens: Tensor
    told: dict[str, Any]
    documents: list[list[Tensor]]
    positions: Tensor
    window: bool = True
    own: bool = False

    @property
    def real(self) -> Tensor:
        """bool ``[B, L]``: not padding."""
        found = torch.zeros(self.tokens.shape, dtype=torch.bool)
        for row, documents in enumerate(self.documents):
            found[row, torch.cat(documents)] = True
        return found

    def labels(self, *, first: bool) -> Tensor:
        """Of all tokens but a prompt and padding.

        Args:
            first: also of tokens behind padding, which predicts them.
        """
        labels = torch.where(self.real, self.tokens, IGNORED)
        labels[0, :4] = IGNORED
        if not first:
            labels[:, 1:][self.real[:, 1:] & ~self.real[:, :-1]] = IGNORED
        return labels


def cut(length: int, generator: torch.Generator) -> list[int]:
    """Lengths of one to four documents, ones of a single token among them."""
    count = int(torch.randint(1, 5, (), generator=generator))
    borders = sorted({0, length, *torch.randint(1, length, (count - 1,), generator=generator).tolist()})
    return [stop - start for start, stop in pairwise(borders)]


def _rows(length: int, generator: torch.Generator) -> list[list[int]]:
    return [cut(length, generator) for _ in range(ROWS)]


def _places(row: list[int]) -> list[Tensor]:
    return [torch.arange(start, stop) for start, stop in pairwise([0, *accumulate(row)])]


def _restarting(rows: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def _going_on(length: int) -> Tensor:
    return torch.arange(length).expand(ROWS, -1)


def _numbers(documents: list[list[Tensor]], length: int) -> Tensor:
    found = torch.zeros(len(documents), length, dtype=torch.int64)
    for row, places in enumerate(documents):
        for number, place in enumerate(places, 1):
            found[row, place] = number
    return found


def batch(kind: str, seed: int) -> Batch:
    """One batch.

    Args:
        kind: "left", "right" and "sides" (padding there, of other lengths in each row); "middle" (also within
            documents); "packed" (by positions); "alike" (the same documents in all rows); "numbered" (by a mask, with
            padding between documents, too); "flat" (borders alone, of one row); "ends" (borders alone, of rows laid end
            to end); "indexed" (`seq_idx` alone); "restated" (all of it).
    """
    generator = torch.Generator().manual_seed(seed)
    length = LENGTHS[seed % 3]
    rows = _rows(length, generator)
    if kind == "alike":
        rows = [rows[0]] * ROWS
    documents, positions = [_places(row) for row in rows], _going_on(length)
    told: dict[str, Any] = {}
    window, own = True, False
    if kind in ("left", "right", "sides", "middle"):
        documents = [[_unpadded(kind, length, generator)] for _ in range(ROWS)]
        told, window, own = {"attention_mask": _numbers(documents, length)}, kind != "middle", True
    elif kind in ("packed", "alike"):
        positions, own = _restarting(rows), True
        told = {"position_ids": positions}
    elif kind == "numbered":
        documents = [[places[places % 7 != row] for places in found] for row, found in enumerate(documents)]
        documents = [[places for places in found if len(places)] for found in documents]
        told, window = {"attention_mask": _numbers(documents, length)}, False
    elif kind == "flat":
        documents, positions = documents[:1], positions[:1]
        told = _borders(rows[:1])
    elif kind == "ends":
        told = _borders(rows)
    elif kind == "indexed":
        told = {"seq_idx": _numbers(documents, length).int() - 1}
    elif kind == "restated":
        positions = _restarting(rows)
        numbers = _numbers(documents, length)
        told = {"position_ids": positions, "seq_idx": numbers.int(), "attention_mask": numbers} | _borders(rows)
    tokens = torch.randint(VOCABULARY, (len(documents), length), generator=generator)
    return Batch(tokens, told, documents, positions, window, own)


def _borders(rows: list[list[int]]) -> dict[str, Any]:
    lengths = [n for row in rows for n in row]
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": torch.tensor(longest),
    }


def _unpadded(kind: str, length: int, generator: torch.Generator) -> Tensor:
    before, behind = torch.randint(0, length // 3, (2,), generator=generator).tolist()
    places = torch.arange(0 if kind == "right" else before, length if kind == "left" else length - behind)
    if kind == "middle":
        kept = torch.rand(len(places), generator=generator) > 0.3
        kept[0] = True
        places = places[kept]
    return places


def built(family: str, seed: int = 0) -> Any:
    """A model in fp64; with Transformers' sdpa attention."""
    torch.manual_seed(seed)
    return build_model(family, attn_implementation="sdpa").double()


def logits_of(model: Any, given: Batch) -> Tensor:
    """``[B, L, V]`` by Transformers: of the batch as it is, or each document by itself. Of padding, anything."""
    if given.own:
        return model(input_ids=given.tokens, use_cache=False, **given.told).logits
    rows = []
    for row, documents in enumerate(given.documents):
        whole = torch.zeros(given.tokens.shape[1], VOCABULARY, dtype=torch.float64)
        for places in documents:
            alone = model(
                input_ids=given.tokens[row, places][None],
                position_ids=given.positions[row, places][None],
                attention_mask=torch.ones(1, len(places), dtype=torch.int64),
                use_cache=False,
            )
            whole = whole.index_put((places,), alone.logits[0])
        rows.append(whole)
    return torch.stack(rows)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Transformers' loss, in the dtype of the logits."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
