"""Multi-token prediction under context parallelism: its loss counts the tokens of all ranks, as one process does.

Upstream divides by the tokens that are left on a rank when labels and loss mask have been shifted, and ranks have
unequally many (`megatron.core.transformer.multi_token_prediction.process_mtp_loss`, before core 0.17
`GPTModel._postprocess`). The count is made of all ranks here, where the mask is shifted; what upstream makes of it
stays its own.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.collectives import summed
from dsp_plugin.comm.wire import Sender
from dsp_plugin.patches.megatron.state import MegatronState
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch

_MODULE = "megatron.core.transformer.multi_token_prediction"
_GPT = "megatron.core.models.gpt.gpt_model"
_HYBRID = "megatron.core.models.hybrid.hybrid_model"
_PROCESS = "process_mtp_loss"
_ROLL = "roll_tensor"
# One rank's part of the loss, for the log; renamed in 0.19.
_SAVES = ("save_metrics_to_tracker", "save_loss_to_tracker")


def patches(state: MegatronState) -> tuple[Patch, ...]:
    """None for a core without multi-token prediction. To be applied after those that replace the shift."""
    try:
        upstream = importlib.import_module(_MODULE)
    except ImportError:
        # Then no model can have it.
        return ()
    if not hasattr(upstream, _PROCESS):
        counted = functools.partial(_counted_before_017, state)
        parameters = ("labels", "loss_mask", "mtp_in_postprocess")
        return (_patch(_GPT, "GPTModel._postprocess", counted, parameters), _roll(_GPT))
    found = [_roll(_MODULE)]
    name = next(name for name in _SAVES if hasattr(upstream.MTPLossLoggingHelper, name))
    found.append(_patch(_MODULE, f"MTPLossLoggingHelper.{name}", _logged, ("loss",)))
    for module in (_MODULE, _GPT, _HYBRID):
        if hasattr(_imported(module), _PROCESS):
            relied_on = ("labels", "loss_mask", "config", "cp_group")
            found.append(_patch(module, _PROCESS, functools.partial(_counted, state), relied_on))
    return tuple(found)


def _imported(module: str) -> object:
    try:
        return importlib.import_module(module)
    except ImportError:
        # Hybrid models need Triton on some versions: where they cannot be imported, nobody has one.
        return None


def _patch(module: str, name: str, make: Callable[[Any], object], parameters: tuple[str, ...]) -> Patch:
    return Patch(f"multi-token loss: {module}:{name}", f"{module}:{name}", DISTRIBUTION, SUPPORTED, make, parameters)


def _roll(module: str) -> Patch:
    return _patch(module, _ROLL, _rolled, ("tensor", "cp_group"))


class _Counting:
    """The count of one pass of the loss.

    Attributes:
        mask: the loss mask as last shifted; known by its identity.
        axis: the ranks that share the sequence.
        part: of the count, what stands for a rank; 1 where ranks' parts of the loss are added up.
        counts: int or float scalars, of all ranks: after each shift.
    """

    def __init__(self, mask: Tensor, axis: Axis, part: float) -> None:
        self.mask, self.axis, self.part = mask, axis, part
        self._sender = Sender(axis, "mtp", "forward")
        self.counts: list[Tensor] = []

    def of_all(self, count: Tensor) -> Tensor:
        """The sum over ranks of a scalar, in fp64: of no dim, it makes nothing else wider."""
        return summed(count.detach().double().view(1), self._sender).view(())

    def shifted(self, mask: Tensor, count: Tensor) -> Tensor:
        """What to divide by after this shift of the mask."""
        self.mask = mask
        self.counts.append(self.of_all(count))
        return self.counts[-1] * self.part if self.part != 1 else self.counts[-1]


_counting: ContextVar[_Counting | None] = ContextVar("multi-token counting", default=None)


@contextmanager
def _count(counting: _Counting) -> Iterator[None]:
    token = _counting.set(counting)
    try:
        yield
    finally:
        _counting.reset(token)


def _rolled(upstream: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    @functools.wraps(upstream)
    def roll_tensor(tensor: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        rolled, count = upstream(tensor, *args, **kwargs)
        counting = _counting.get()
        if counting is not None and tensor is counting.mask:
            count = counting.shifted(rolled, count)
        return rolled, count

    return roll_tensor


def _axis(state: MegatronState) -> Axis | None:
    return None if state.groups is None or state.groups.sp.size == 1 else state.groups.sp


def _counted_before_017(state: MegatronState, upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Each rank's loss over its mean count: data parallelism takes the mean over ranks, and so does the log."""
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def _postprocess(self: Any, *args: Any, **kwargs: Any) -> Any:
        axis = _axis(state)
        if axis is None or not self.config.mtp_num_layers or not self.post_process:
            return upstream(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        labels, mask = given.arguments["labels"], given.arguments.get("loss_mask")
        if labels is None:
            return upstream(self, *args, **kwargs)
        given.arguments["loss_mask"] = mask = torch.ones_like(labels) if mask is None else mask
        with _count(_Counting(mask, axis, 1 / axis.size)):
            return upstream(*given.args, **given.kwargs)

    return _postprocess


class _Weighted:
    """A configuration whose loss of further tokens has another weight.

    Upstream's weight per token is that of a rank's own count; here losses are always over the count that the shift
    gives, and the weight makes of that what it should be.
    """

    def __init__(self, config: Any, weight: Callable[[], Any]) -> None:
        self._config, self._weight = config, weight

    calculate_per_token_loss = False

    @property
    def mtp_loss_scaling_factor(self) -> Any:
        return self._config.mtp_loss_scaling_factor * self._weight()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _counted(state: MegatronState, upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Each rank's loss over the count of all, times the ranks where data parallelism takes the mean over them.

    Per token the weight is the count of all before the shift: `finalize_model_grads` divides by it.
    """
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def process_mtp_loss(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs)
        axis = _axis(state)
        labels = given.arguments.get("labels")
        # Without labels, upstream begins by shifting inputs and mask, and what is left then is what there was.
        derived = labels is None
        like = given.arguments.get("input_ids") if derived else labels
        if axis is None or like is None:
            return upstream(*args, **kwargs)
        mask, config = given.arguments.get("loss_mask"), given.arguments["config"]
        given.arguments["loss_mask"] = mask = torch.ones_like(like) if mask is None else mask
        counting = _Counting(mask, axis, 1.0)
        weight: Any = axis.size
        if config.calculate_per_token_loss and not derived:
            weight = counting.of_all(mask.sum())

        def weigh() -> Any:
            return counting.counts[0] if config.calculate_per_token_loss and derived else weight

        given.arguments["config"] = _Weighted(config, weigh)
        with _count(counting):
            return upstream(*given.args, **given.kwargs)

    return process_mtp_loss


def _logged(upstream: staticmethod[..., None]) -> staticmethod[..., None]:
    """The log takes the mean over ranks, each of which has its part of the loss."""
    save = upstream.__func__

    @functools.wraps(save)
    def save_to_tracker(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        counting = _counting.get()
        save(loss if counting is None else loss * counting.axis.size, *args, **kwargs)

    return staticmethod(save_to_tracker)
