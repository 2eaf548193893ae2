"""The parts of a plan: stages, and the region that they are in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """Modules that compute along the same dims.

    Attributes:
        modules: glob over module names; ``*`` stands for one name, ``**`` for any number of them.
        computes_along: the token dims it mixes tokens along; it treats every other dim as batch.
        tokens: the forward argument that carries the tokens, and comes back as the (first) output.
        layout: pattern of the tokens as its forward takes and returns them, see `plans.pattern`; ``Plan.tokens`` when
            None.
        follows: further forward arguments that run along token dims, with their patterns; each is cut to this rank's
            part of the dim that is sharded while the stage runs. Patterns separated by ``|`` are told apart by their
            number of dims; a tuple or list is cut tensor by tensor. Arguments not named here are used whole.
        attention: glob, relative to the stage's module, of the modules whose `scaled_dot_product_attention` runs along
            ``computes_along``. With it Ulysses, a ring or both can serve the stage when a dim it computes along is
            sharded.
        heads: query heads of that attention, for the planner.
        kv_heads: key/value heads; ``heads`` when None.
        takes: pattern of the tokens that its forward takes, where they have other features than stages hand on, such as
            pixels; of the first stage only.
        gives: likewise of those that it returns; of the last stage only.
        when: an argument of the plan's root, or a function of all its arguments by name (what the call leaves out has
            its default); the stage is left out of forward passes in which it is false: its modules are not called
            then, or where tokens are whole.
    """

    modules: str
    computes_along: tuple[str, ...]
    tokens: int | str = 0
    layout: str | None = None
    follows: Mapping[int | str, str] = field(default_factory=dict)
    attention: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    takes: str | None = None
    gives: str | None = None
    when: str | Callable[[Mapping[str, Any]], bool] | None = None


@dataclass(frozen=True)
class Region:
    """The module inside which tokens are sharded, where that is not just from the first stage to the last.

    Attributes:
        module: its name.
        tokens: the forward argument that is split; the (first) output is gathered.
        layout: pattern of that argument; ``Plan.tokens`` when None. Its features may differ from those of the stages.
        leaves: pattern of the output; ``layout`` when None. It may lack dims that the module reduces.
    """

    module: str
    tokens: int | str = 0
    layout: str | None = None
    leaves: str | None = None
