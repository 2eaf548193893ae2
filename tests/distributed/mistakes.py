"""What a user does wrong on ranks that are set up, and what the error must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups, UnsupportedError

Groups = SequenceParallelGroups
BATCH, LENGTH, HEADS, HEAD_DIM = 2, 8, 4, 8
WIDTH = HEADS * HEAD_DIM


def config(**settings: Any) -> SequenceParallelConfig:
    return SequenceParallelConfig(**{"method": "ulysses", "size": dist.get_world_size(), **settings})


@dataclass(frozen=True)
class Mistake:
    """What a user does wrong, and what the error must be.

    Attributes:
        late: it shows only in what the model returns, when its attention has run, alike on every rank.
    """

    make: Callable[[Groups], None]
    error: type[Exception]
    parts: tuple[str, ...]
    late: bool = False


def wrong(make: Callable[..., None], *parts: str, late: bool = False, **how: Any) -> Mistake:
    return Mistake(partial(make, **how), SequenceParallelConfigError, parts, late)


def unsupported(make: Callable[..., None], *parts: str, **how: Any) -> Mistake:
    return Mistake(partial(make, **how), UnsupportedError, parts)
