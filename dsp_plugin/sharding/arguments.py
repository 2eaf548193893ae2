"""The arguments of a module's call, by the positions or the names that a plan uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dsp_plugin.errors import SequenceParallelConfigError


class Arguments:
    """A call's arguments.

    Args:
        name: of the module, for errors.
    """

    def __init__(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self._parameters = inspect.signature(module.forward).parameters
        kinds = [parameter.kind for parameter in self._parameters.values()]
        self._takes_any_name = inspect.Parameter.VAR_KEYWORD in kinds
        self._names = list(self._parameters)
        # Some were given to *args, which tells no names.
        self._has_nameless = inspect.Parameter.VAR_POSITIONAL in kinds[: len(args)]
        self._name = name

    def tokens(self, argument: int | str) -> Tensor:
        """The tokens.

        Raises:
            SequenceParallelConfigError: there is no tensor.
        """
        x = self.get(argument)
        if not isinstance(x, Tensor):
            raise SequenceParallelConfigError(
                setting=f"plan tokens of {self._name}",
                value=argument,
                why=f"its forward was given {type(x).__name__} there, not a tensor",
                remedy=f"name the argument with the tokens, one of {', '.join(self._names)}",
            )
        return x

    def get(self, argument: int | str) -> Any:
        """The value given, or None."""
        place = self._place(argument)
        if isinstance(place, int):
            return self.args[place]
        return self.kwargs.get(place)

    def get_or_default(self, argument: int | str) -> Any:
        """The value given, or the default of the parameter."""
        place = self._place(argument)
        if isinstance(place, str) and place not in self.kwargs:
            default = self._parameters[place].default if place in self._parameters else None
            return None if default is inspect.Parameter.empty else default
        return self.get(argument)

    def hold(self, condition: str | Callable[[Mapping[str, Any]], bool] | None) -> bool:
        """Whether the condition of a stage is true of this call."""
        if condition is None:
            return True
        if callable(condition):
            return bool(condition({name: self.get_or_default(name) for name in self._names}))
        return bool(self.get_or_default(condition))

    def set(self, argument: int | str, value: Any) -> None:
        """Put another value in its place."""
        place = self._place(argument)
        if isinstance(place, int):
            self.args = (*self.args[:place], value, *self.args[place + 1 :])
        else:
            self.kwargs = {**self.kwargs, place: value}

    def _place(self, argument: int | str) -> int | str:
        if isinstance(argument, str) and argument not in self._names and self._takes_any_name:
            if self._has_nameless and argument not in self.kwargs:
                raise SequenceParallelConfigError(
                    setting=f"plan of {self._name}",
                    value=argument,
                    why=f"its forward takes {', '.join(map(str, self._parameters.values()))} and was given "
                    f"{len(self.args)} arguments by position, any of which this may be",
                    remedy="wrap forward with functools.wraps, or pass the argument by name",
                )
            return argument
        known = argument < len(self._names) if isinstance(argument, int) else argument in self._names
        if not known:
            raise SequenceParallelConfigError(
                setting=f"plan of {self._name}",
                value=argument,
                why=f"its forward has no such argument; it takes {', '.join(self._names)}",
                remedy="name its arguments in tokens and follows",
            )
        position = argument if isinstance(argument, int) else self._names.index(argument)
        return position if position < len(self.args) else self._names[position]
