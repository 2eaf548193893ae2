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
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Literal

from torch import nn

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.plans.checks import check_plan
from dsp_plugin.plans.pattern import Pattern, parse, unambiguous
from dsp_plugin.plans.stage import Region, Stage


@dataclass(frozen=True)
class Plan:
    """The stages of a model, and the layout of the tokens they hand on.

    Tokens are whole on every rank up to the first stage and after the last; between stages a model may only do what
    treats every token alike, on the dims that are sharded there.

    Attributes:
        tokens: pattern of the activation, one name per dim, features last, as in ``b t s c``.
        stages: by kind.
        batch_dim: the name in ``tokens`` that data parallelism shards; None makes the batch one more dim to shard.
        order: in which stages run: ``modules``, that in which the model registers them; or ``layers``, by the numbers
            that ``*`` stands for, and for the same numbers as listed in ``stages``. Stages without numbers run
            before or behind those with numbers, as they are listed.
        inputs: forward arguments of the plan's root, with patterns that tell sizes; ``_`` for what is of no interest.
        sizes: sizes that no shape tells.
        buffers: attributes used between stages, by their paths from the root, with patterns; while tokens are sharded
            they are cut to this rank's part.
        overrides: attributes, by their paths from the root, that have another value while tokens are sharded.
        between: the dim that has to be sharded outside of stages; they switch to another one and back.
        region: where tokens are sharded; from the first stage to the last when None.
    """

    tokens: str
    stages: tuple[Stage, ...]
    batch_dim: str | None = "b"
    order: Literal["modules", "layers"] = "modules"
    inputs: Mapping[int | str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    buffers: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    between: str | None = None
    region: Region | None = None

    @property
    def dims(self) -> tuple[str, ...]:
        """The token dims, without the features."""
        return tuple(self.tokens.split()[:-1])

    @property
    def features(self) -> str:
        """The name of the features."""
        return self.tokens.split()[-1]

    def layout_of(self, stage: Stage) -> Pattern:
        """How a stage takes and returns the tokens that stages hand on."""
        return parse(stage.layout or self.tokens)

    def layout_taken(self, stage: Stage) -> Pattern:
        """How a stage takes tokens."""
        return parse(stage.takes) if stage.takes is not None else self.layout_of(stage)

    def layout_given(self, stage: Stage) -> Pattern:
        """How a stage returns tokens."""
        return parse(stage.gives) if stage.gives is not None else self.layout_of(stage)

    def __post_init__(self) -> None:
        self._write_out()
        check_plan(
            tokens=self.tokens,
            stages=self.stages,
            batch_dim=self.batch_dim,
            order=self.order,
            inputs=self.inputs,
            buffers=self.buffers,
            between=self.between,
            region=self.region,
        )

    def _write_out(self) -> None:
        """Patterns of two names say by the names of the tokens which of them are further ones."""
        names = self.tokens.split()

        def plain(text: str | None) -> str | None:
            return None if text is None else unambiguous(text, names)

        def all_plain(texts: Mapping[Any, str]) -> dict[Any, str]:
            return {argument: unambiguous(text, names) for argument, text in texts.items()}

        stages = tuple(
            replace(
                stage,
                layout=plain(stage.layout),
                takes=plain(stage.takes),
                gives=plain(stage.gives),
                follows=all_plain(stage.follows),
            )
            for stage in self.stages or ()
        )
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "inputs", all_plain(self.inputs))
        object.__setattr__(self, "buffers", all_plain(self.buffers))
        if self.region is not None:
            region = replace(self.region, layout=plain(self.region.layout), leaves=plain(self.region.leaves))
            object.__setattr__(self, "region", region)


PlanSource = Plan | Callable[[nn.Module], Plan]

# Model classes, by qualified name so that nothing is imported before the user does, and where their plans are.
KNOWN_PLANS: dict[str, str] = {
    "dsp_plugin.models.video_dit.VideoDiT": "dsp_plugin.models.video_dit_plan:plan",
    "dsp_plugin.models.vit.VisionTransformer": "dsp_plugin.models.vit_plan:plan",
    "diffusers.models.transformers.latte_transformer_3d.LatteTransformer3DModel": (
        "dsp_plugin.patches.diffusers.latte:plan"
    ),
    "diffusers.models.transformers.transformer_wan.WanTransformer3DModel": "dsp_plugin.patches.diffusers.wan:plan",
    "diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXTransformer3DModel": (
        "dsp_plugin.patches.diffusers.cogvideox:plan"
    ),
    "transformers.models.timesformer.modeling_timesformer.TimesformerModel": (
        "dsp_plugin.patches.transformers.timesformer:plan"
    ),
}


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
    found = known_plan(module)
    if found is not None:
        part, known = found
        return part, _load(part, known)
    raise SequenceParallelConfigError(
        setting="plan",
        why=f"no plan is known for {type(module).__module__}.{type(module).__qualname__}; known are "
        f"{', '.join(KNOWN_PLANS)}",
        remedy='write a Plan for the model and name it, as in "plan": "my_project.plans:my_model"',
    )


def known_plan(module: nn.Module) -> tuple[nn.Module, str] | None:
    """The module, or the first part of it, that we know a plan for, and where the plan is."""
    for part in module.modules():
        for kind in type(part).__mro__:
            known = KNOWN_PLANS.get(f"{kind.__module__}.{kind.__qualname__}")
            if known is not None:
                return part, known
    return None


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
    except (Exception, SystemExit) as error:
        raise SequenceParallelConfigError(
            setting="plan",
            value=reference,
            why=f"importing {module_name} failed with {_in_words(error)}",
            remedy="correct that module, which python -c 'import ...' must be able to import",
        ) from error
    try:
        plan = found(module) if callable(found) else found
    except (SequenceParallelConfigError, UnsupportedError):
        # The plan itself is wrong, or the model none that it can be for, and the error says how.
        raise
    except (Exception, SystemExit) as error:
        raise SequenceParallelConfigError(
            setting="plan",
            value=reference,
            why=f"called with the model ({type(module).__name__}) it failed with {_in_words(error)}",
            remedy="name a Plan, or a function that takes the model and returns one",
        ) from error
    if not isinstance(plan, Plan):
        raise SequenceParallelConfigError(
            setting="plan",
            value=reference,
            why=f"is a {type(plan).__name__}, not a dsp_plugin.Plan",
            remedy="name a Plan, or a function that takes the model and returns one",
        )
    return plan


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


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
