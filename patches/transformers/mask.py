"""What one model's own mask code says of who sees whom: a causal mask or none, with a window or without.

Families keep their windows in different places: in arguments of attention, in the config by layer, or nowhere but in
the masks that their code asks Transformers for. The masks decide what the unsharded model computes, so they are asked:
under our attention implementation Transformers hands us the function of positions that it would else make a mask of.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches.transformers.passes import ModelPass
from dsp_plugin.training.extents import Running

MaskFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class SequenceMask:
    """Goes through a model in place of a mask over the sequence, from its mask code to its attention layers.

    Attributes:
        window: W: a query sees itself and the W - 1 keys before it; None for all keys before it. Where it is not
            causal, the W keys on either side; None for all keys.
        causal: a query sees no key after it.
    """

    window: int | None
    causal: bool = True

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise _computed_with(getattr(function, "__name__", str(function)))

    def __getattr__(self, name: str) -> NoReturn:
        # Who copies or inspects an object asks it for these.
        if name.startswith("__"):
            raise AttributeError(name)
        raise _computed_with(name)

    def __getitem__(self, index: object) -> NoReturn:
        raise _computed_with("slicing")


class MaskReader:
    """What Transformers calls for a mask of one model.

    Args:
        passes: the model's.
    """

    def __init__(self, passes: Running[ModelPass]) -> None:
        self._passes = passes

    def __call__(
        self,
        *args: Any,
        mask_function: MaskFunction,
        allow_is_causal_skip: bool = True,
        local_size: int | None = None,
        **kwargs: Any,
    ) -> SequenceMask:
        """The mask, in words.

        Args:
            mask_function: of batch, head, query and key indices: whether the query sees the key.
            allow_is_causal_skip: false where the model adds something of its own to a causal mask.
            kwargs: `allow_is_bidirectional_skip` says the same of a mask that is not causal, and comes with no other.
            local_size: the size of a window, or of a chunk.

        Raises:
            UnsupportedError: it is neither a causal mask nor one of all keys, in full or in a window, it does not keep
                documents apart although the batch has several in a row, a window would count padding that is moved, all
                keys would count padding, or no forward pass of the model runs.
        """
        running = self._passes.now
        if running is None:
            raise UnsupportedError(
                setting="mask of the model with sequence_parallel",
                why="it was asked for outside of the model's forward, where nothing says which tokens this rank holds",
                remedy="call the model itself, not a part of it: without labels it returns whole logits",
            )
        length, rows = running.placement.layout.length, running.placement.rows
        alone = kwargs.get("allow_is_bidirectional_skip")
        causal = alone is None
        if not (allow_is_causal_skip if causal else alone) or not _agrees(mask_function, local_size, length, causal):
            raise UnsupportedError(
                setting="mask of the model with sequence_parallel",
                value=f"a window or chunk of {local_size}" if local_size else "not causal",
                why="its mask code asks for something else than all keys, the keys before a token, or a sliding window "
                "of them, which is what the methods know of",
                remedy="use a model with attention in full or in sliding windows, or remove the section",
            )
        if local_size is not None and rows.interrupted:
            raise UnsupportedError(
                setting="attention_mask with sequence_parallel",
                value=f"padding in the midst of a document, and a window of {local_size}",
                why="the window counts that padding, which is moved behind the tokens",
                remedy="pad before or behind the tokens of a row",
            )
        documents = rows.documents or rows.documents_by_row
        if not causal and rows.apart is not None and documents is not None:
            raise UnsupportedError(
                setting="attention_mask with sequence_parallel",
                value="padding of packed rows",
                why="attention that is not causal would see it",
                remedy="give every document a row of its own, or pack rows to the full",
            )
        if documents is not None and _caller().get("position_ids") is None:
            raise UnsupportedError(
                setting="position_ids with sequence_parallel",
                value=f"documents at {documents}",
                why="the masks of this model are made without a look at positions: unsharded, the tokens of a document "
                "attend to the documents before it, here they would not",
                remedy="give every document a row of its own, padded behind its tokens with labels of -100",
            )
        return SequenceMask(local_size, causal)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _caller() -> dict[str, Any]:
    """The arguments of Transformers' function that makes the mask: positions are not among those that it hands on."""
    return sys._getframe(2).f_locals


def _agrees(mask_function: MaskFunction, window: int | None, length: int, causal: bool) -> bool:
    """Whether the function is that of such a mask with the window: at its edges, and at those of chunks."""
    band = window if window is not None else length
    queries = torch.tensor(
        sorted({q for q in (0, 1, band - 1, band, band + 1, 2 * band, length - 1) if 0 <= q < length})
    )
    offsets = (-length, -band - 1, -band, -band + 1, -1, 0, 1, band, length)
    keys = torch.tensor(sorted({min(max(q + o, 0), length - 1) for q in queries.tolist() for o in offsets}))
    q, k, none = queries[:, None], keys[None, :], torch.zeros((), dtype=torch.int64)
    try:
        found = torch.as_tensor(mask_function(none, none, q, k)).expand(len(queries), len(keys))
    except (IndexError, RuntimeError):
        # It looks something up by token, where there are those of a shard.
        return False
    wanted = (k <= q) & (k > q - band) if causal else (k - q).abs() <= band
    return torch.equal(found.bool(), wanted)


def _computed_with(what: str) -> UnsupportedError:
    return UnsupportedError(
        setting="mask of the model with sequence_parallel",
        value=what,
        why="the model's code computes with the mask itself, which spans whole sequences, of which a rank holds a part",
        remedy="use a model that leaves its mask to Transformers' attention interface, or remove the section",
    )
