"""A causal language model's batch: whole on every rank as it comes in, this rank's tokens as the model gets it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_plugin.comm import meter
from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.collectives import split
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.layout import Layout
from dsp_plugin.patches.transformers.positions import own_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
SEQUENCE_DIM = 1
# Tensors that forward may be given; of any other nobody would know along which dim its sequence runs.
KNOWN = ("input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids", "attention_mask", "num_items_in_batch")
GENERATE = "set it to false; to generate, call the model's generate, which computes whole sequences on every rank"
# Known to models whose forward names it: of a kind for each token, which is embedded with it.
TYPES = "token_type_ids"
# What forward may be asked for that needs, or would return, whole sequences: why, and the remedy.
REFUSED = {
    "past_key_values": ("a cache holds whole sequences of keys", GENERATE),
    # Its name since Transformers 5.24.
    "cache": ("a cache holds whole sequences of keys", GENERATE),
    "use_cache": ("a cache holds whole sequences of keys", GENERATE),
    "logits_to_keep": ("it counts tokens from the end of the sequence, of which a rank holds a part", "leave it out"),
    "output_attentions": ("no rank ever has the weights of whole rows", "set it to false"),
    "output_hidden_states": ("they would be those of this rank's tokens only", "set it to false"),
    "output_router_logits": ("its balancing loss is no sum over tokens, so shards do not add up", "set it to false"),
}


@dataclass(frozen=True)
class Placement:
    """How the tokens of one forward pass lie on the ranks.

    Attributes:
        documents: the borders of documents packed into the sequence, as `MaskSpec.cu_seqlens`; None for one document.
        labelled: the model takes a loss.
    """

    layout: Layout
    documents: tuple[int, ...] | None
    labelled: bool


class InputSharder:
    """Cuts the arguments of a model's forward to this rank's tokens.

    Args:
        sp: the sequence axis.
    """

    def __init__(self, config: SequenceParallelConfig, sp: Axis) -> None:
        self._config, self._sp = config, sp

    def shard(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Placement]:
        """All arguments by name, with every sequence cut, and where the tokens are.

        Labels come as Transformers has them, each at its own token, and leave as what follows each token.

        Raises:
            UnsupportedError: something is asked for that needs whole sequences.
            SequenceParallelConfigError: tensors whose shapes do not fit each other, or padding before a token.
        """
        values = _by_name(model, args, kwargs)
        _refuse_requests(model, values)
        batch, length = _tokens(values)
        if torch.is_grad_enabled():
            meter.count(tokens=batch * length)
        labels = _following(values, batch, length)
        positions = values.get("position_ids")
        if positions is not None:
            _check_shape("position_ids", positions, (1, batch), length)
        mask = values.pop("attention_mask", None)
        _check_padding(mask, labels, batch, length)
        documents = _documents(positions, mask)
        kind = self._config.layout_for()
        # Zigzag inside each document, so that ranks have alike much to attend to in every one.
        layout = Layout(kind, length, self._sp.size, documents=documents if kind == "zigzag" else None)

        if positions is None:
            positions = own_positions(model, values)
        values["position_ids"] = (
            layout.position_ids(self._sp.rank, _device(values)).unsqueeze(0)
            if positions is None
            else self._cut(positions, layout)
        )
        for name in ("input_ids", "inputs_embeds", TYPES):
            if values.get(name) is not None:
                values[name] = self._cut(values[name], layout)
        if labels is not None:
            values["labels"] = self._cut(labels, layout)
        if "attention_mask" in inspect.signature(model.forward).parameters:
            # Where there is none, Transformers takes the gaps between a shard's positions for borders of documents.
            values["attention_mask"] = _whole_shard(values)
        values["use_cache"] = False
        return values, Placement(layout, documents, labels is not None)

    def _cut(self, x: Tensor, layout: Layout) -> Tensor:
        if x.requires_grad:
            return split(x, SEQUENCE_DIM, layout, axis=self._sp, method=self._config.method)
        return layout.shard(x, SEQUENCE_DIM, self._sp.rank).contiguous()


def _by_name(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(model.forward)
    values = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            values.update(values.pop(parameter.name, {}))
    return values


def _refuse_requests(model: PreTrainedModel, values: Mapping[str, Any]) -> None:
    named = inspect.signature(model.forward).parameters
    for name, (why, remedy) in REFUSED.items():
        value = values.get(name)
        if value is None and name.startswith("output_"):
            value = getattr(model.config, name, None)
        if isinstance(value, Tensor) or value:
            raise UnsupportedError(f"{name} with sequence_parallel: {why}. To go on, {remedy}.")
    for name, value in values.items():
        if isinstance(value, Tensor) and name not in KNOWN and (name != TYPES or name not in named):
            raise UnsupportedError(
                setting=f"argument {name} with sequence_parallel",
                value=tuple(value.shape),
                why=f"the tensors known to run along the sequence are {', '.join(KNOWN[:-1])}",
                remedy="leave it out",
            )


def _tokens(values: Mapping[str, Any]) -> tuple[int, int]:
    """Batch and length."""
    given = [name for name in ("input_ids", "inputs_embeds") if values.get(name) is not None]
    if len(given) != 1 or values[given[0]].dim() != (2 if given[0] == "input_ids" else 3):
        found = {name: tuple(values[name].shape) for name in given}
        raise SequenceParallelConfigError(
            setting="batch",
            value=found,
            why="expected either input_ids [batch, length] or inputs_embeds [batch, length, features]",
            remedy="pass one of them, whole, in every step",
        )
    batch, length = values[given[0]].shape[:2]
    return batch, length


def _device(values: Mapping[str, Any]) -> torch.device:
    return next(values[name].device for name in ("input_ids", "inputs_embeds") if values.get(name) is not None)


def _whole_shard(values: Mapping[str, Any]) -> Tensor:
    """A mask that masks no token of this rank, ``[B, n]``."""
    tokens = next(values[name] for name in ("input_ids", "inputs_embeds") if values.get(name) is not None)
    return torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)


def _following(values: dict[str, Any], batch: int, length: int) -> Tensor | None:
    """Takes the labels out of ``values``: what follows each token, ``[B, L]``; None where there are none."""
    labels, shifted = values.pop("labels", None), values.pop("shift_labels", None)
    for name, given in (("labels", labels), ("shift_labels", shifted)):
        if given is not None:
            _check_shape(name, given, (batch,), length)
    if shifted is not None or labels is None:
        return shifted
    return F.pad(labels, (0, 1), value=values.get("ignore_index", IGNORED))[:, 1:]


def _check_shape(name: str, x: Tensor, batches: tuple[int, ...], length: int) -> None:
    if x.dim() != 2 or x.shape[0] not in batches or x.shape[1] != length:
        raise SequenceParallelConfigError(
            setting=name,
            value=tuple(x.shape),
            why=f"expected [{batches[-1]}, {length}], as the tokens have",
            remedy="pass whole sequences: they are sharded on their way into the model",
        )


def _check_padding(mask: Tensor | None, labels: Tensor | None, batch: int, length: int) -> None:
    """Causal attention needs no mask for what comes after the last token, as long as nothing is learned from it."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            setting="attention_mask with sequence_parallel",
            value=shape,
            why="a dense mask is over whole sequences, of which a rank holds a part",
            remedy="pass none, or [batch, length] with ones for tokens and zeros for padding after them",
        )
    _check_shape("attention_mask", mask, (batch,), length)
    padding = mask == 0
    if not padding.any():
        return
    before_a_token = (padding[:, :-1] & ~padding[:, 1:]).any()
    if before_a_token or labels is None or (labels[padding] != IGNORED).any():
        where = "before a token" if before_a_token else "that counts" if labels is not None else "in whole logits"
        raise SequenceParallelConfigError(
            setting="attention_mask",
            value=f"{int(padding.sum())} of {batch} * {length} are padding",
            why=f"padding {where} would be attended to, for no rank holds a mask over the whole sequence",
            remedy='pad after the tokens (tokenizer.padding_side="right") with labels of -100 there, or pack sequences '
            "without padding (position_ids that start again with each)",
        )


def _documents(positions: Tensor | None, mask: Tensor | None) -> tuple[int, ...] | None:
    """The borders between documents: where positions do not go on by one, or where the number in the mask changes.

    Positions do so as always in Transformers' flash attention, and in its eager and sdpa attention where they are told
    to keep no cache and get no mask. Collators for packed rows write either, or both; a mask of ones says nothing of
    documents, and positions that go on say nothing against them.

    Args:
        positions: ``[1 or B, L]``.
        mask: ``[B, L]``, 0 for padding behind the last token, else 1, or the number of the token's document.

    Raises:
        SequenceParallelConfigError: the two contradict each other, rows differ, or a document comes in parts.
    """
    real = None if mask is None else (mask[:, 1:] != 0)
    by_positions = None if positions is None else _within(positions[:, 1:] != positions[:, :-1] + 1, real)
    by_mask = None
    if mask is not None and mask.dtype != torch.bool:
        by_mask = _within(mask[:, 1:] != mask[:, :-1], real)
        if ((mask[:, 1:] < mask[:, :-1]) & by_mask).any():
            raise SequenceParallelConfigError(
                setting="attention_mask",
                value=tuple(mask.shape),
                why="the numbers of documents in it go down, so one document would lie in several parts",
                remedy="number the documents of a row in their order, as in 1 1 1 2 2, with 0 for padding behind them",
            )
        if by_positions is not None and by_mask.any() and (by_positions & ~by_mask).any():
            raise SequenceParallelConfigError(
                setting="position_ids and attention_mask",
                value=(tuple(by_positions.shape), tuple(mask.shape)),
                why="positions start again in the middle of what the mask numbers as one document",
                remedy="pass one of them, or let positions start again where the mask's number changes",
            )
    jumps = by_mask if by_mask is not None and by_mask.any() else by_positions
    if jumps is None or not jumps.any():
        return None
    first = jumps.any(0)
    agree = jumps == first if real is None else (jumps == first) | ~real
    if not agree.all():
        raise SequenceParallelConfigError(
            setting="position_ids" if jumps is by_positions else "attention_mask",
            value=(jumps.shape[0], jumps.shape[1] + 1),
            why="documents start at other places in one row of the batch than in another, but here the rows of a "
            "batch share their document borders",
            remedy="pack into one row (batch size 1), or give all rows the same borders",
        )
    borders = (first.nonzero().flatten() + 1).tolist()
    return (0, *borders, jumps.shape[1] + 1)


def _within(jumps: Tensor, real: Tensor | None) -> Tensor:
    """Without those to padding, which nothing is learned from."""
    return jumps if real is None else jumps & real
