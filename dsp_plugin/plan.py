"""How a model's forward pass divides into stages: what a user declares so that an unmodified model can be sharded.

Plan(
    tokens="b t s c",
    stages=(
        Stage("blocks.*.space", computes_along=("s",), follows={"rope": "s d"}, attention="attn", heads=16),
        Stage("blocks.*.time", computes_along=("t",), follows={"rope": "t d"}, attention="attn", heads=16),
    ),
)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module

from torch import nn

from dsp_plugin.errors import SequenceParallelConfigError


@dataclass(frozen=True)
class Stage:
    """Modules that compute along the same dims.

    Attributes:
        modules: glob over module names; ``*`` stands for one name, ``**`` for any number of them.
        computes_along: the token dims it mixes tokens along; it treats every other dim as batch.
        tokens: the forward argument that carries the tokens, and comes back as the (first) output.
        follows: further forward arguments that run along token dims, with their patterns; each is cut to this rank's
            part of the dim that is sharded while the stage runs. Arguments not named here are used whole.
        attention: glob, relative to the stage's module, of the modules whose `scaled_dot_product_attention` runs along
            ``computes_along``. With it Ulysses can serve the stage when a dim it computes along is sharded.
        heads: query heads of that attention, for the planner.
        kv_heads: key/value heads; ``heads`` when None.
    """

    modules: str
    computes_along: tuple[str, ...]
    tokens: int | str = 0
    follows: Mapping[int | str, str] = field(default_factory=dict)
    attention: str | None = None
    heads: int | None = None
    kv_heads: int | None = None


@dataclass(frozen=True)
class Plan:
    """The stages of a model, and the layout of the tokens they hand on.

    Tokens are whole on every rank up to the first stage and after the last; between stages a model may only do what
    treats every token alike.

    Attributes:
        tokens: pattern of the activation, one name per dim, features last, as in ``b t s c``.
        stages: by kind; they run in the order of the model's modules.
        batch_dim: the name in ``tokens`` that data parallelism shards.
    """

    tokens: str
    stages: tuple[Stage, ...]
    batch_dim: str = "b"

    def __post_init__(self) -> None:
        names = self.tokens.split()
        if len(names) != len(set(names)) or len(names) < 3:
            raise SequenceParallelConfigError(
                setting="plan.tokens",
                value=self.tokens,
                why="expected a distinct name for each dim, features last",
                remedy='write "b t s c"',
            )
        for stage in self.stages:
            unknown = [dim for dim in stage.computes_along if dim not in names[:-1]]
            if unknown:
                raise SequenceParallelConfigError(
                    setting=f"plan stage {stage.modules!r} computes_along",
                    value=stage.computes_along,
                    why=f"{unknown} not among the token dims {names[:-1]} of {self.tokens!r}",
                    remedy="use the names of plan.tokens",
                )
            if stage.attention is not None and stage.heads is None:
                raise SequenceParallelConfigError(
                    setting=f"plan stage {stage.modules!r} heads",
                    why=f"attention={stage.attention!r} is given without its number of heads",
                    remedy="add heads=..., so that the planner can price Ulysses inside the stage",
                )
            for argument, pattern in stage.follows.items():
                if not set(pattern.split()) & set(names[:-1]):
                    raise SequenceParallelConfigError(
                        setting=f"plan stage {stage.modules!r} follows",
                        value={argument: pattern},
                        why=f"the pattern names none of the token dims {names[:-1]}, so it would never be cut",
                        remedy="name every dim of the argument, the token dims as in plan.tokens",
                    )
        if not self.stages:
            raise SequenceParallelConfigError(
                setting="plan.stages",
                value=self.stages,
                why="a plan needs at least one stage",
                remedy="name the modules that mix tokens",
            )


PlanSource = Plan | Callable[[nn.Module], Plan]

# Model classes, by qualified name so that nothing is imported before the user does, and where their plans are.
KNOWN_PLANS: dict[str, str] = {"dsp_plugin.models.video_dit.VideoDiT": "dsp_plugin.models.video_dit_plan:plan"}


def resolve_plan(module: nn.Module, reference: str | None) -> tuple[nn.Module, Plan]:
    """The plan for ``module`` or for the part of it that we know, and the module its names are relative to.

    Args:
        reference: ``package.module:name`` of a `Plan`, or of a function from the module to one; None to look among the
            models that we know.

    Raises:
        SequenceParallelConfigError: the reference leads nowhere, or no part of the module is known.
    """
    if reference is not None:
        return module, _load(module, reference)
    for part in module.modules():
        name = f"{type(part).__module__}.{type(part).__qualname__}"
        if name in KNOWN_PLANS:
            return part, _load(part, KNOWN_PLANS[name])
    raise SequenceParallelConfigError(
        setting="plan",
        why=f"no plan is known for {type(module).__module__}.{type(module).__qualname__}; known are "
        f"{', '.join(KNOWN_PLANS)}",
        remedy='write a Plan for the model and name it, as in "plan": "my_project.plans:my_model"',
    )


def _load(module: nn.Module, reference: str) -> Plan:
    module_name, _, attribute = reference.partition(":")
    try:
        found: object = import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise SequenceParallelConfigError(
            setting="plan",
            value=reference,
            why=f"cannot be imported: {error}",
            remedy="write it as package.module:name, importable where training runs",
        ) from error
    plan = found(module) if callable(found) else found
    if not isinstance(plan, Plan):
        raise SequenceParallelConfigError(
            setting="plan",
            value=reference,
            why=f"is a {type(plan).__name__}, not a dsp_plugin.Plan",
            remedy="name a Plan, or a function that takes the model and returns one",
        )
    return plan


def matching_modules(root: nn.Module, pattern: str, setting: str) -> dict[str, nn.Module]:
    """The modules below ``root`` whose names match the glob, in model order.

    Raises:
        SequenceParallelConfigError: none does.
    """
    parts = [".*" if part == "**" else re.escape(part).replace(r"\*", "[^.]*") for part in pattern.split(".")]
    expression = re.compile(r"\.".join(parts))
    found = {name: module for name, module in root.named_modules() if name and expression.fullmatch(name)}
    if not found:
        names = [name for name, _ in root.named_modules() if name]
        raise SequenceParallelConfigError(
            setting=setting,
            value=pattern,
            why=f"matches no module of {type(root).__name__}, which has {', '.join(names[:12])}"
            + (", ..." if len(names) > 12 else ""),
            remedy="write names as named_modules() gives them, with * for one name",
        )
    return found


def outermost(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of ``modules`` that are not inside another of them."""
    return {
        name: module for name, module in modules.items() if not any(name.startswith(f"{other}.") for other in modules)
    }
