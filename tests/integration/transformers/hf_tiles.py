"""A head in tiles under DeepSpeed, in a world of 2 that shares one sequence: what a script reads, what ranks make."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hf_features import start
from hf_models import build_model, micro_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsp_plugin import UnsupportedError, ledger

TILE = 3
MEMORY = {"tile_tokens": TILE}
# Of the run whose tensors are looked at: logits of a rank's tokens would be larger than anything else.
CLASSES, LONG = 509, 90


class Largest(TorchDispatchMode):
    """Looks at every tensor that an operator of torch returns, in forward and backward passes.

    Attributes:
        of_classes: the most elements of one with a dim of all classes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_classes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As it is."""
        found = function(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor) and CLASSES in value.shape:
                self.of_classes = max(self.of_classes, value.numel())
        return found


def reading(zero: int, **section: Any) -> dict[str, Any]:
    """Logits of an engine whose head is tiled: in training, in evaluation by every way to call, and without labels."""
    torch.manual_seed(0)
    engine = start(build_model("qwen3"), zero=zero, memory=MEMORY, **section)
    batch = micro_batch("tokens", 0, 0, 0)
    output = engine(**batch)
    refused = []
    for read in (lambda: output.logits, lambda: output[1], lambda: output.to_tuple(), lambda: output.logits.sum()):
        try:
            read()
        except UnsupportedError as error:
            refused.append(str(error))
    as_tuple = engine(**batch, return_dict=False)
    engine.backward(output.loss + as_tuple[0])
    engine.eval()
    with torch.no_grad():
        evaluated = engine(**batch)
        evaluated_tuple = engine(**batch, return_dict=False)
        found = {
            "read": evaluated.logits.tolist(),
            "tuple": evaluated_tuple[1].tolist(),
            "unlabelled": engine(input_ids=batch["input_ids"]).logits.tolist(),
        }
    losses = [output.loss.item(), as_tuple[0].item(), evaluated.loss.item(), evaluated_tuple[0].item()]
    return {**found, "refused": refused, "losses": losses, "kind": type(as_tuple[1]).__name__}


def made(memory: dict[str, Any]) -> dict[str, Any]:
    """The largest tensor with a dim of classes, and the bytes that a step sent."""
    torch.manual_seed(0)
    model = build_model(
        "llama", vocab_size=CLASSES, hidden_size=8, num_attention_heads=2, max_position_embeddings=2 * LONG
    )
    engine = start(model, zero=1, memory=memory)
    tokens = torch.randint(CLASSES, (1, LONG), generator=torch.Generator().manual_seed(0))
    with ledger() as log, Largest() as largest:
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
    return {"largest": largest.of_classes, "sent": log.bytes(), "loss": loss.item()}


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All of them by name."""
    return {
        **{f"tiles_read_zero{zero}": partial(reading, zero) for zero in (1, 3)},
        "tiles_read_local": partial(reading, 2, logits="local"),
        "tiles_made": partial(made, MEMORY),
        "tiles_made_auto": partial(made, "auto"),
        "tiles_none_made": partial(made, {}),
    }
