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
from dsp_plugin.patches.transformers.fused_head import FusedHead
from dsp_plugin.patches.transformers.positions import own_positions
from dsp_plugin.patches.transformers.rows import TAKEN, Rows, check_shape, take_rows
from dsp_plugin.sharding.compiling import uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
SEQUENCE_DIM = 1
# Tensors that forward may be given; of any other nobody would know along which dim its sequence runs.
KNOWN = ("input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids", *TAKEN, "num_items_in_batch")
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
    "output_router_logits": (
        "its balancing loss is no sum over tokens, so shards do not add up",
        "set it to false (in TRL, router_aux_loss_coef to 0)",
    ),
}


@dataclass(frozen=True)
class Placement:
    """How the tokens of one forward pass lie on the ranks.

    Attributes:
        rows: documents and padding of the rows.
        blind: bool ``[B, n]``, `Rows.blind` of this rank's tokens.
        labelled: the model takes a loss.
        fused: what takes the loss in place of the model's loss function, if something does.
    """

    layout: Layout
    rows: Rows
    blind: Tensor | None
    labelled: bool
    fused: FusedHead | None

    @property
    def takes_loss(self) -> bool:
        """Whether the model's loss function takes it."""
        return self.labelled and self.fused is None


class InputSharder:
    """Cuts the arguments of a model's forward to this rank's tokens.

    Args:
        sp: the sequence axis.
    """

    def __init__(self, config: SequenceParallelConfig, sp: Axis) -> None:
        self._config, self._sp = config, sp

    @uncompiled
    def shard(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Placement]:
        """All arguments by name, with every sequence cut, and where the tokens are.

        Labels come as Transformers has them, each at its own token, and leave as what follows each token.

        Raises:
            UnsupportedError: something is asked for that needs whole sequences.
            SequenceParallelConfigError: tensors that do not fit each other, a loss at padding, see `take_rows`, or too
                few tokens for the ranks.
        """
        signature = inspect.signature(model.forward)
        values = _by_name(signature, args, kwargs)
        _refuse_requests(model, signature, values)
        batch, length = _tokens(values)
        if torch.is_grad_enabled():
            meter.count(tokens=batch * length)
        fused = FusedHead.asked_for(values)
        labels = _following(values, batch, length)
        positions, mask = values.get("position_ids"), values.get("attention_mask")
        counted = None if labels is None else labels != values.get("ignore_index", IGNORED)
        rows = take_rows(values, counted, batch, length)
        if positions is None:
            positions = own_positions(model, values, mask)
        kind = self._config.layout_for()
        # Documents in zigzag by themselves, short ones whole: ranks have alike much to attend to.
        layout = Layout.of_documents(kind, length, self._sp.size, rows.documents)
        _refuse_idle_ranks(layout)

        if positions is None and rows.order is not None:
            positions = torch.arange(length, device=_device(values)).unsqueeze(0)
        values["position_ids"] = (
            layout.position_ids(self._sp.rank, _device(values)).unsqueeze(0)
            if positions is None
            else self._cut(rows.arranged(positions), layout)
        )
        for name in ("input_ids", "inputs_embeds", TYPES):
            if values.get(name) is not None:
                values[name] = self._cut(rows.arranged(values[name]), layout)
        if labels is not None:
            values["labels" if fused is None else "shift_labels"] = self._cut(rows.arranged(labels), layout)
        if "attention_mask" in signature.parameters:
            # Where there is none, Transformers takes the gaps between a shard's positions for borders of documents.
            values["attention_mask"] = _whole_shard(values)
        if "position_ids" not in signature.parameters:
            # States need no numbers of tokens.
            del values["position_ids"]
        values["use_cache"] = False
        blind = None if rows.blind is None else self._cut(rows.blind, layout)
        return values, Placement(layout, rows, blind, labels is not None, fused)

    def _cut(self, x: Tensor, layout: Layout) -> Tensor:
        if x.requires_grad:
            return split(x, SEQUENCE_DIM, layout, axis=self._sp, method=self._config.method)
        return layout.shard(x, SEQUENCE_DIM, self._sp.rank).contiguous()


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    values = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            values.update(values.pop(parameter.name, {}))
    return values


def _refuse_requests(model: PreTrainedModel, signature: inspect.Signature, values: Mapping[str, Any]) -> None:
    for name, (why, remedy) in REFUSED.items():
        value = values.get(name)
        if value is None and name.startswith("output_"):
            value = getattr(model.config, name, None)
        if isinstance(value, Tensor) or value:
            raise UnsupportedError(f"{name} with sequence_parallel: {why}. To go on, {remedy}.")
    for name, value in values.items():
        if isinstance(value, Tensor) and name not in KNOWN and (name != TYPES or name not in signature.parameters):
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


def _refuse_idle_ranks(layout: Layout) -> None:
    """Models cannot compute on no tokens, and the other ranks would wait for the one that cannot."""
    if min(layout.sizes) == 0:
        raise SequenceParallelConfigError(
            setting="batch",
            value=f"{sum(layout.sizes)} tokens",
            why=f"of {len(layout.sizes)} ranks some would hold none of so short a sequence",
            remedy="pad it behind its tokens with labels of -100 (pad_to_multiple_of in TRL's and most collators)",
        )


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
            check_shape(name, given, (batch,), length)
    if shifted is not None or labels is None:
        return shifted
    return F.pad(labels, (0, 1), value=values.get("ignore_index", IGNORED))[:, 1:]
