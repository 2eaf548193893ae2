"""Tensors of any dtypes in one flat buffer of bytes, so that what goes to one peer goes in one transfer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """What a tensor looks like to the rank that unpacks it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes on the wire."""
        return prod(self.shape) * self.dtype.itemsize


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of the tensors one after the other: uint8, 1-D."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def unpack(buffer: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """The tensors that were packed, as views of the buffer where alignment allows it."""
    parts = buffer.split([form.nbytes for form in forms])
    return [_typed(part, form) for part, form in zip(parts, forms, strict=True)]


def _typed(part: Tensor, form: Form) -> Tensor:
    if part.storage_offset() % form.dtype.itemsize:
        part = part.clone()
    return part.view(form.dtype).view(form.shape)
