"""One tile: its logits, what its losses are made of, and what comes back from these.

Everything is in place where it can be, in fp32 (fp64 for fp64): a tile is ``[t, V]``, once; twice where a soft cap or
an entropy needs the logits beside their exponentials. The product with the head's weight is in the weight's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from dsp_plugin.tiles.spec import HeadSpec, Vocabulary


@dataclass(frozen=True)
class Head:
    """What all tiles share.

    Attributes:
        weight: ``[V, E]``, of this rank's classes, in the dtype to multiply in.
        bias: ``[V]`` or None, likewise.
        what: from hidden states to losses.
        class_weights: ``[V]`` in the wide dtype, or None.
        vocabulary: None where the rank has all of it.
        with_entropy: whether tokens' entropies are asked for, too.
    """

    weight: Tensor
    bias: Tensor | None
    what: HeadSpec
    class_weights: Tensor | None
    vocabulary: Vocabulary | None
    with_entropy: bool = False

    @property
    def wide(self) -> torch.dtype:
        """Of logits, sums and accumulators."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def classes(self) -> int:
        """V, of all ranks."""
        return self.weight.shape[0] if self.vocabulary is None else self.vocabulary.size


@dataclass(frozen=True)
class Tile:
    """A tile's numbers; tensors are ``[t]`` where nothing else is said.

    Attributes:
        loss: 0 where the label is ignored.
        entropy: in nats; None where it was not asked for.
        lse: the log-sum-exp of the token's logits.
    """

    head: Head
    loss: Tensor
    entropy: Tensor | None
    _counted: Tensor
    # Of the label within the rank's classes, [t, 1]; any class where it is another's.
    _index: Tensor
    _mine: Tensor
    _weight_of_label: Tensor | None
    # [t, V]: exp(logits - most), and the logits where they are needed again.
    _exponentials: Tensor
    _logits: Tensor | None
    _most: Tensor
    lse: Tensor

    @classmethod
    def of(cls, head: Head, hidden_tE: Tensor, labels_t: Tensor) -> Self:
        """Computes it; of a shared vocabulary with one collective."""
        what, share = head.what, head.vocabulary
        logits, counted, index, mine = _begun(head, hidden_tE, labels_t)
        most = logits.amax(1)
        of_label = logits.gather(1, index).squeeze(1)
        keep = _needs_logits(head)
        smooth = _summed(logits, head.class_weights) if what.label_smoothing else None
        exponentials = (logits - most.unsqueeze(1)) if keep else logits.sub_(most.unsqueeze(1))
        total = exponentials.exp_().sum(1)
        expected = torch.linalg.vecdot(exponentials, logits) if head.with_entropy else None
        weight_of_label = _weight_of_label(head, index)
        lse = most + total.log()
        if share is not None:
            lse, expected, of_label, smooth = _merge(share, most, total, expected, of_label * mine, smooth)
        elif expected is not None:
            expected = expected / total
        certain = 1.0 - what.label_smoothing
        loss = certain * (lse - of_label)
        if weight_of_label is not None:
            loss = loss * weight_of_label
        if smooth is not None:
            loss = loss + what.label_smoothing / head.classes * (_weight_of_all(head) * lse - smooth)
        if what.z_loss:
            loss = loss + what.z_loss * lse.square()
        return cls(
            head,
            loss.masked_fill(~counted, 0.0),
            None if expected is None else lse - expected,
            counted,
            index,
            mine,
            weight_of_label,
            exponentials,
            logits if keep else None,
            most,
            lse,
        )

    @classmethod
    def again(cls, head: Head, hidden_tE: Tensor, labels_t: Tensor, lse_t: Tensor, entropy_t: Tensor | None) -> Self:
        """Computes it for its gradient alone, from what is known of it; without a collective."""
        logits, counted, index, mine = _begun(head, hidden_tE, labels_t)
        keep, shift = _needs_logits(head), lse_t.unsqueeze(1)
        probabilities = ((logits - shift) if keep else logits.sub_(shift)).exp_()
        return cls(
            head,
            torch.empty_like(lse_t),
            entropy_t,
            counted,
            index,
            mine,
            _weight_of_label(head, index),
            probabilities,
            logits if keep else None,
            lse_t,
            lse_t,
        )

    def gradient(self, of_loss: Tensor, of_entropy: Tensor | None = None) -> Tensor:
        """The gradient of what the head's product gave, ``[t, V]``; spends the tile.

        Args:
            of_loss: ``[t]``. of_entropy: likewise.
        """
        what, head = self.head.what, self.head
        of_loss = of_loss.to(head.wide).masked_fill(~self._counted, 0.0) * what.scale
        certain = (1.0 - what.label_smoothing) * of_loss
        if self._weight_of_label is not None:
            certain = certain * self._weight_of_label
        of_lse = certain
        if what.label_smoothing:
            smoothing = what.label_smoothing / head.classes * of_loss
            of_lse = of_lse + smoothing * _weight_of_all(head)
        if what.z_loss:
            of_lse = of_lse + 2.0 * what.z_loss * self.lse * of_loss
        grad, logits = self._exponentials, self._logits
        to_probability = (self._most - self.lse).exp_()
        capped = None
        if what.softcap is not None:
            assert logits is not None
            capped = (logits / what.softcap).square_().neg_().add_(1.0) if of_entropy is not None else None
        if of_entropy is None:
            grad.mul_((of_lse * to_probability).unsqueeze(1))
        else:
            assert logits is not None
            assert self.entropy is not None
            entropic = of_entropy.to(head.wide) * what.scale
            factor = logits.sub_((self.lse - self.entropy).unsqueeze(1)).mul_(-entropic.unsqueeze(1))
            grad.mul_(factor.add_(of_lse.unsqueeze(1))).mul_(to_probability.unsqueeze(1))
        if what.label_smoothing:
            if head.class_weights is None:
                grad.sub_(smoothing.unsqueeze(1))
            else:
                grad.addr_(smoothing, head.class_weights, alpha=-1.0)
        # Not scatter_add_, which CUDA has no deterministic kernel for.
        at_label = grad.gather(1, self._index).sub_((certain * self._mine).unsqueeze(1))
        grad.scatter_(1, self._index, at_label)
        if what.softcap is not None:
            if capped is None:
                assert logits is not None
                capped = logits.div_(what.softcap).square_().neg_().add_(1.0)
            grad.mul_(capped)
        return grad


def _begun(head: Head, hidden_tE: Tensor, labels_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logits, which tokens count, and of their labels the index and whether it is of this rank's classes."""
    what, share = head.what, head.vocabulary
    logits = F.linear(hidden_tE, head.weight, head.bias).to(head.wide)
    if what.scale != 1.0:
        logits.mul_(what.scale)
    if what.softcap is not None:
        logits.div_(what.softcap).tanh_().mul_(what.softcap)
    counted = labels_t != what.ignore_index
    index, mine = labels_t.masked_fill(~counted, 0 if share is None else share.start), counted
    if share is not None:
        index = index - share.start
        mine = counted & (index >= 0) & (index < logits.shape[1])
        index = index.clamp(0, logits.shape[1] - 1)
    return logits, counted, index.unsqueeze(1), mine


def _needs_logits(head: Head) -> bool:
    """Whether gradients need them beside their exponentials."""
    return head.with_entropy or head.what.softcap is not None


def _weight_of_label(head: Head, index_t1: Tensor) -> Tensor | None:
    return None if head.class_weights is None else head.class_weights[index_t1.squeeze(1)]


def _summed(logits: Tensor, class_weights: Tensor | None) -> Tensor:
    return logits.sum(1) if class_weights is None else logits @ class_weights


def _weight_of_all(head: Head) -> Tensor | float:
    """The sum of the classes' weights."""
    if head.class_weights is None:
        return float(head.classes)
    return head.class_weights.sum()


def _merge(
    share: Vocabulary, most: Tensor, total: Tensor, expected: Tensor | None, of_label: Tensor, smooth: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Statistics of the whole vocabulary from those of the ranks' parts, in one collective.

    Args:
        most: the largest logit. total: of exp(logits - most). expected: of that times logits.
        of_label: the label's logit, 0 where it is another's. smooth: the sum of logits.

    Returns:
        The log-sum-exp, and of all ranks the expected logit, the label's, and the sum of logits.
    """
    numbers = [x for x in (most, total, of_label, expected, smooth) if x is not None]
    peaks, totals, labels, *rest = share.merge(torch.stack(numbers)).unbind(1)
    peak = peaks.amax(0)
    rescale = (peaks - peak).exp_()
    whole = (totals * rescale).sum(0)
    if expected is not None:
        expected = (rest.pop(0) * rescale).sum(0) / whole
    return peak + whole.log(), expected, labels.sum(0), rest.pop(0).sum(0) if smooth is not None else None
