"""The loss function of a model whose tokens are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches.transformers.passes import ModelPass
from dsp_plugin.patches.transformers.pending import SETTING, UNTILED, PendingLogits
from dsp_plugin.sharding.loss import contract
from dsp_plugin.training.extents import Running


class SequenceLoss:
    """Stands in for Transformers' `ForCausalLMLoss` on one model: this rank's tokens in, the loss of the sequence out.

    Attributes:
        calls: how often the model took a loss in the running forward pass.

    Args:
        sp: the sequence axis.
        passes: the model's; outside of them a script takes a loss of whole logits, as upstream has it.
        tiled: whether the model's head is tiled, and logits are pending.
    """

    def __init__(self, sp: Axis, passes: Running[ModelPass], tiled: bool = False) -> None:
        from transformers.loss.loss_utils import ForCausalLMLoss

        self._upstream: Callable[..., Tensor] = ForCausalLMLoss
        self._sp, self._passes, self._tiled = sp, passes, tiled
        self.calls = 0

    def __call__(
        self,
        logits: Tensor | PendingLogits,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss as upstream defines it, over the whole sequence; see `dsp_plugin.sharding.loss` for its gradient.

        Args:
            logits: ``[B, n, V]`` of this rank's tokens, or what stands for them.
            labels: int64 ``[B, n]``, what follows each of them in the whole sequence.
            num_items_in_batch: divides the sum in place of the number of labels, as it does upstream.
            shift_labels: not used; `labels` are shifted already.

        Returns:
            Scalar, fp32.

        Raises:
            UnsupportedError: the head is tiled, and the model made logits without it.
        """
        if self._passes.now is None:
            kwargs |= {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return self._upstream(logits, labels, vocab_size, shift_labels=shift_labels, **kwargs)
        self.calls += 1
        if isinstance(logits, PendingLogits):
            local_sum = logits.loss(labels, vocab_size, ignore_index)
        elif self._tiled:
            raise UnsupportedError(
                setting=SETTING,
                why="the model's code made logits without a call of its head, so all of them exist already",
                remedy=f"write {UNTILED}",
            )
        else:
            # Divided by one item, a sum: unlike a mean it is defined where a rank has no label that counts.
            kwargs |= {"num_items_in_batch": 1, "ignore_index": ignore_index, "shift_labels": labels}
            local_sum = self._upstream(logits, labels, vocab_size, **kwargs)
        if num_items_in_batch is None:
            return contract(local_sum, (labels != ignore_index).sum(), self._sp)
        items = torch.as_tensor(num_items_in_batch, device=local_sum.device)
        # The mean over P ranks of P times what each has is the sum.
        return contract(local_sum * self._sp.size / items, 1, self._sp)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Tensor]:
        """A copy of the model takes its loss as the model did."""
        return self._upstream
