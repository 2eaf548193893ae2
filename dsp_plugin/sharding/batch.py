"""Sharding what goes into a model: whole sequences in, this rank's tokens out, positions kept global."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dsp_plugin.comm import meter
from dsp_plugin.comm.axis import Axis
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.derivatives import refuse_transforms
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.layout import Layout


class BatchSharder:
    """Cuts the forward arguments named in ``config.batch`` to this rank's tokens.

    Args:
        module: whose forward takes them.

    Raises:
        SequenceParallelConfigError: its forward has no such argument, or none for positions.
    """

    def __init__(self, module: nn.Module, config: SequenceParallelConfig, axis: Axis) -> None:
        self._config, self._axis = config, axis
        self._signature = inspect.signature(module.forward)
        self._check_names(type(module).__name__)

    def shard(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], Layout, Tensor | None]:
        """The arguments with every sequence cut, the layout used, and how many labels count on this rank.

        The last is None where no loss is taken: the config promises none, or the call has no labels and the config says
        what to gather instead.

        Raises:
            SequenceParallelConfigError: a named argument is missing or no tensor, or lengths differ.
            UnsupportedError: an argument carries a tangent, or a batch dim of `torch.func`.
        """
        refuse_transforms("a sharded model", *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
        bound = self._signature.bind(*args, **kwargs)
        further = next((p.name for p in self._signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        values = dict(bound.arguments)
        values.update(values.pop(further, {}) if further is not None else {})
        self._refuse_nameless(values)
        dims = self._dims(values)
        layout = self._layout(values, dims)
        if torch.is_grad_enabled():
            meter.count(tokens=_tokens_of(values, dims))
        positions = self._config.positions
        if positions is not None and positions not in dims:
            if values.get(positions) is None:
                example = values[next(iter(dims))]
                values[positions] = layout.position_ids(self._axis.rank, example.device).unsqueeze(0)
            else:
                dims[positions] = -1
                _check_sequence(values, positions, -1, "positions")
        for name, dim in dims.items():
            values[name] = layout.shard(values[name], dim, self._axis.rank)
        count = self._count_labels(values)
        named = {name: value for name, value in values.items() if name in self._signature.parameters}
        bound.arguments = named
        if further is not None:
            named[further] = {name: value for name, value in values.items() if name not in named}
        return bound.args, bound.kwargs, layout, count

    def _refuse_nameless(self, values: Mapping[str, Any]) -> None:
        """Refuse arguments without names where one of those to cut is missing: it may be any of them."""
        parameters = self._signature.parameters.values()
        nameless = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        missing = [name for name in self._config.batch if values.get(name) is None]
        given = () if nameless is None else values.get(nameless, ())
        if given and missing:
            raise SequenceParallelConfigError(
                setting="batch",
                value=dict(self._config.batch),
                why=f"forward takes *{nameless} and was given {len(given)} arguments by position, any of which may be "
                f"{' or '.join(missing)}",
                remedy="pass them by name; or, where the module only wraps the model, call parallelize on the model "
                "itself, before it is wrapped",
            )

    def _dims(self, values: Mapping[str, Any]) -> dict[str, int]:
        """The arguments to cut in this call, by the dim of the sequence."""
        dims, loss = dict(self._config.batch), self._config.loss
        if loss is not None and values.get(loss.labels) is None:
            if self._config.gather_output is None:
                raise SequenceParallelConfigError(
                    setting="loss.labels",
                    value=loss.labels,
                    why=f"forward was called without {loss.labels}, so it returns no loss, and nothing says which dim "
                    "of its output to gather",
                    remedy='pass labels, or set "gather_output" beside "loss" for calls without',
                )
            del dims[loss.labels]
        return dims

    def _layout(self, values: Mapping[str, Any], dims: Mapping[str, int]) -> Layout:
        lengths: dict[str, int] = {}
        for name, dim in dims.items():
            lengths[name] = _check_sequence(values, name, dim, f"batch.{name}").shape[dim]
        if len(set(lengths.values())) > 1:
            raise SequenceParallelConfigError(
                setting="batch",
                value=dict(dims),
                why=f"the sequences have different lengths: {lengths}",
                remedy="name the sequence dim of each argument, and pass whole sequences",
            )
        return Layout(self._config.layout_for(), next(iter(lengths.values())), self._axis.size)

    def _count_labels(self, values: dict[str, Any]) -> Tensor | None:
        if self._config.loss is None or values.get(self._config.loss.labels) is None:
            return None
        name, ignore_index = self._config.loss.labels, self._config.loss.ignore_index
        counted = values[name] != ignore_index
        count = counted.sum()
        if counted.numel():
            # A mean over no labels is 0/0, and its gradient NaN. One label stands in, and is weighed with the count, 0.
            stand_in = values[name].clone(memory_format=torch.contiguous_format)
            stand_in.view(-1)[:1] = 1 if ignore_index == 0 else 0
            values[name] = torch.where(count == 0, stand_in, values[name])
        return count

    def _check_names(self, model: str) -> None:
        parameters = self._signature.parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        for name in self._config.batch:
            if name not in parameters:
                raise SequenceParallelConfigError(
                    setting="batch",
                    value=dict(self._config.batch),
                    why=f"{model}.forward has no argument {name!r}; it takes {', '.join(parameters)}",
                    remedy="name its arguments",
                )
        positions = self._config.positions
        if positions is not None and positions not in parameters:
            raise SequenceParallelConfigError(
                setting="positions",
                value=positions,
                why=f"{model}.forward takes no such argument, only {', '.join(parameters)}, so it would number the "
                f"tokens of every shard from 0",
                remedy="name the argument that takes global positions; null if the model uses none",
            )


def _tokens_of(values: Mapping[str, Any], dims: Mapping[str, int]) -> int:
    """Tokens of whole sequences in a call."""
    name, dim = next(iter(dims.items()))
    return prod(values[name].shape[: dim % values[name].dim() + 1])


def _check_sequence(values: Mapping[str, Any], name: str, dim: int, setting: str) -> Tensor:
    value = values.get(name)
    if not isinstance(value, Tensor) or not -value.dim() <= dim < value.dim():
        got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise SequenceParallelConfigError(
            setting=setting,
            value=dim,
            why=f"expected {name} to be a tensor with the sequence along dim {dim}, but forward was called with {got}",
            remedy="pass it in every step, or take it out of batch",
        )
    return value
