"""What a `VisionTransformer` is trained on: the squared error of its fields, each row by the area that it covers.

Shape suffixes are those of vit.py: B batch, V variables that came in, W wanted ones, Z Y X the grid, in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def latitude_weights(latitude_Y: Tensor) -> Tensor:
    """Weights [Y] of rows at these latitudes, in radians: their cosines, which areas go by, over the mean of these."""
    cosine = latitude_Y.cos()
    return cosine / cosine.mean()


def weighted_mse(predicted: Tensor, target: Tensor, weight_Y: Tensor | None = None) -> Tensor:
    """Mean over all entries of the squared error times the weight of the row.

    Args:
        predicted: [B, W, ..., Y, X].
        target: the same.
        weight_Y: of mean 1, as `latitude_weights` gives them; None to weigh all alike.

    Returns:
        A scalar, in fp32 at least.
    """
    wide = torch.promote_types(predicted.dtype, torch.float32)
    error = (predicted.to(wide) - target.to(wide)).square()
    return error.mean() if weight_Y is None else (error * weight_Y.to(error)[:, None]).mean()


class VitObjective(nn.Module):
    """The model and its loss as one module, for engines that wrap a module whose forward returns the loss.

    Args:
        model: a `VisionTransformer`.
        latitude_Y: of the rows of pixels, in radians; None for a flat grid.
    """

    def __init__(self, model: nn.Module, latitude_Y: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        # Not a buffer: engines that train in bf16 would round it.
        self.weight_Y = None if latitude_Y is None else latitude_weights(latitude_Y.double())

    def forward(
        self,
        fields: Tensor,
        variables: Tensor,
        wanted: Tensor,
        target: Tensor,
        lead_time: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar in fp32 at least.

        Args:
            fields, variables, wanted, lead_time: as `VisionTransformer` takes them.
            target: [B, W, ..., Y, X], what to predict.
            label: class ids, int64 [B], for a model with classes: their cross-entropy is added.
        """
        out = self.model(fields, variables, wanted, lead_time)
        if label is None:
            predicted = out[0] if isinstance(out, tuple) else out
            return weighted_mse(predicted, target, self.weight_Y)
        predicted, logits = out
        return weighted_mse(predicted, target, self.weight_Y) + F.cross_entropy(logits, label)
