"""A head that gives what each token's loss is made of and no logits, as TRL adds one to the models that it trains.

`trl.trainer.utils.add_fused_lm_head` replaces a model's forward by one that, called with ``fused_lm_head=True``, runs
the backbone and projects in tiles: log-probability, entropy and so on of every token, whatever a trainer makes of them.
Each is a number per token, so a rank computes those of its own and all are gathered, where whole logits would be as
many times as large as there are words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from torch import Tensor

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches.patch import Patch

REQUEST = "fused_lm_head"
_LOSS, _LOG_PROBS, _COUNTED = "loss", "log_probs", "label_mask"


def _as_it_is(upstream: Any) -> Any:
    return upstream


# Nothing is replaced: this is where a model gets the head. Tried with 1.15.0 and 1.16.0.
SEAM = Patch(
    name="gather what a fused head computes",
    target="trl.trainer.utils:add_fused_lm_head",
    distribution="trl",
    supported=">=1.15,<2",
    tested="1.16",
    make=_as_it_is,
    parameters=("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
)


@cache
def _fits() -> None:
    SEAM.verify()


@dataclass(frozen=True)
class FusedHead:
    """What a forward pass asked the fused head for.

    Attributes:
        items: divides the loss in place of the number of labels, as upstream.
        shifted: labels came shifted, so that the last token has its numbers, too.
    """

    items: Tensor | int | None
    shifted: bool

    @classmethod
    def asked_for(cls, values: Mapping[str, Any]) -> Self | None:
        """None where the arguments of a forward pass do not ask for the fused head.

        Raises:
            PatchError: TRL is not one that the patches fit.
        """
        if not values.get(REQUEST):
            return None
        _fits()
        return cls(values.get("num_items_in_batch"), values.get("shift_labels") is not None)

    def gather(self, output: Any, gather: Callable[[Tensor], Tensor]) -> Any:
        """What the head returns of whole sequences, from what it returned of this rank's tokens.

        Args:
            output: a ``FusedCausalLMOutput``, whose tensors are ``[B, n]``, but the loss.
            gather: from ``[B, n]`` to ``[B, L]``.

        Raises:
            UnsupportedError: the head returned something else than numbers per token.
        """
        shape = output[_LOG_PROBS].shape
        for name, value in output.items():
            if name == _LOSS or not isinstance(value, Tensor):
                continue
            if value.shape != shape:
                raise UnsupportedError(
                    setting=f"{name} of the fused head with sequence_parallel",
                    value=tuple(value.shape),
                    why=f"it is not a number per token, {tuple(shape)}, as those that can be gathered are",
                    remedy="leave it out",
                )
            whole = gather(value)
            output[name] = whole if self.shifted else whole[:, :-1]
        counted = output[_COUNTED].sum().clamp(min=1) if self.items is None else self.items
        output[_LOSS] = -output[_LOG_PROBS].sum() / counted
        return output
