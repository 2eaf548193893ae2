"""What is planned or dry-run: a module and the arguments of its forward pass, by name and by settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.models.rectified_flow import RectifiedFlowObjective
from dsp_plugin.models.video_dit import VideoDiT
from dsp_plugin.models.vit import VisionTransformer
from dsp_plugin.models.vit_objective import VitObjective

Setting = int | float | str


class Library(NamedTuple):
    """What a library that shards its models itself says of one: Megatron.

    Attributes:
        close: takes down what building the model put up.
        replicas: ranks with the same share of the weights.
        partitioned: whether the optimizer is partitioned over them.
        wide_gradients: whether gradients are kept in fp32.
        in_flight: microbatches whose forward pass is done before the first backward pass begins.
    """

    close: Callable[[], None]
    replicas: int
    partitioned: bool
    wide_gradients: bool
    in_flight: int


class Subject(NamedTuple):
    """A model and one batch for it.

    Attributes:
        module: whose forward pass is meant.
        kwargs: of that forward pass; whole tensors, as every rank would pass them, or of a model that is sharded
            already, those of this rank.
        library: which has sharded the model; None where that is still to be done.
    """

    module: nn.Module
    kwargs: dict[str, Any]
    library: Library | None = None


def video_dit(
    frames: int = 16,
    height: int = 32,
    width: int = 32,
    patch: int = 4,
    channels: int = 4,
    hidden: int = 64,
    heads: int = 4,
    depth: int = 2,
    batch: int = 1,
    caption: int = 8,
    vocabulary: int = 1000,
) -> Subject:
    """`VideoDiT` under its rectified-flow loss.

    Args:
        frames: T. height, width: of a frame, in pixels. patch: side of a patch, in pixels.
        channels: image channels. hidden: model width. heads: of attention. depth: space-time layers.
        batch: videos. caption: token ids to a caption. vocabulary: how many ids there are.
    """
    _check_patches(height, width, patch)
    model = VideoDiT(channels, patch, hidden, heads, depth, vocabulary)
    shape = (batch, frames, channels, height, width)
    return Subject(
        RectifiedFlowObjective(model),
        {
            # Data stays in fp32 whatever the weights are in; the model casts it.
            "video": torch.randn(shape, dtype=torch.float32),
            "labels": torch.randint(vocabulary, (batch, caption)),
            "t": torch.rand(batch, dtype=torch.float32),
            "noise": torch.randn(shape, dtype=torch.float32),
        },
    )


def vit(
    height: int = 32,
    width: int = 32,
    patch: int = 2,
    variables: int = 4,
    hidden: int = 64,
    heads: int = 4,
    depth: int = 2,
    batch: int = 1,
    attention: str = "axial",
    registers: int = 0,
) -> Subject:
    """`VisionTransformer` under its weighted loss: a forecast of all variables that come in.

    Args:
        height, width: of the grid, in pixels. patch: side of a patch, in pixels. variables: on the grid.
        hidden: model width. heads: of attention. depth: layers. batch: grids.
        attention: ``axial`` or ``full``. registers: tokens in front of the patches, for full attention.
    """
    _check_patches(height, width, patch)
    model = VisionTransformer(
        variables, (patch, patch), hidden, heads, depth, attention=_attention(attention), registers=registers
    )
    shape = (batch, variables, height, width)
    return Subject(
        VitObjective(model),
        {
            "fields": torch.randn(shape, dtype=torch.float32),
            "variables": torch.arange(variables),
            "target": torch.randn(shape, dtype=torch.float32),
            "wanted": torch.arange(variables),
        },
    )


def _check_patches(height: int, width: int, patch: int) -> None:
    if height % patch or width % patch:
        raise ValueError(f"{height} x {width} pixels do not divide into patches of side {patch}")


def _attention(name: str) -> Literal["full", "axial"]:
    match name:
        case "full" | "axial":
            return name
    raise ValueError(f"attention={name!r}: choose 'full' or 'axial'")


# Short names of what we ship.
KNOWN_SUBJECTS: dict[str, str] = {
    "video-dit": "dsp_plugin.rehearsal.subject:video_dit",
    "vit": "dsp_plugin.rehearsal.subject:vit",
    "latte": "dsp_plugin.patches.diffusers.latte:subject",
    "wan": "dsp_plugin.patches.diffusers.wan:subject",
}

# Before a colon: whose models. What comes behind it is an argument of the function.
LIBRARIES: dict[str, tuple[str, str]] = {
    "hf": ("dsp_plugin.patches.transformers.subject:subject", "config"),
    "megatron": ("dsp_plugin.patches.megatron.subject:subject", "arguments"),
}
# Of a library whose arguments say how the sequence is sharded: the function that reads that.
_SECTIONS = {"megatron": "dsp_plugin.patches.megatron.argument_file:section"}
_SHARDED_BY = "sharded_by"


def parse_settings(items: Sequence[str]) -> dict[str, Setting]:
    """``name=value`` items as a command line gives them; values that read as numbers become numbers.

    Raises:
        SequenceParallelConfigError: an item of another form, or a name given twice.
    """
    settings: dict[str, Setting] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier() or name in settings:
            raise SequenceParallelConfigError(
                setting="--set",
                value=item,
                why=f"{name} is set twice" if name in settings else "expected name=value",
                remedy="write --set frames=16 --set depth=2",
            )
        settings[name] = _number(value)
    return settings


def _number(text: str) -> Setting:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def section_of(reference: str) -> dict[str, Any]:
    """What the reference itself says of sequence parallelism, as in a section, if it says something.

    Beside that ``model_ranks``, on how many ranks the model is spread beside the sequence, and ``stages``, how many of
    them hold layers after each other.

    Raises:
        SequenceParallelConfigError, UnsupportedError: it cannot be read.
    """
    library, _, named = reference.partition(":")
    return _load(_SECTIONS[library])(named) if library in _SECTIONS and named else {}


def subject(reference: str, settings: Mapping[str, Setting], config: SequenceParallelConfig | None = None) -> Subject:
    """Build the subject that ``reference`` names.

    Args:
        reference: a name in `KNOWN_SUBJECTS`, ``hf:`` with a config of Transformers, ``megatron:`` with a file of
            arguments, or ``package.module:function``, where ``function(**settings)`` returns the module and a dict of
            its forward arguments.
        settings: arguments of the function.
        config: how the sequence is sharded, for a library that does it as it builds the model. The world must be up.

    Raises:
        SequenceParallelConfigError: the reference leads nowhere, or the function does not take such settings.
    """
    library, _, named = reference.partition(":")
    if library in LIBRARIES and named:
        function, argument = LIBRARIES[library]
        build, settings = _load(function), {argument: named, **settings}
    else:
        build = _load(KNOWN_SUBJECTS.get(reference, reference))
    _check_settings(reference, build, settings)
    sharded = {_SHARDED_BY: config} if _SHARDED_BY in inspect.signature(build).parameters else {}
    try:
        built = build(**settings, **sharded)
    except SequenceParallelConfigError:
        raise
    except ValueError as error:
        raise SequenceParallelConfigError(
            setting=f"settings of {reference}", value=dict(settings), why=str(error), remedy="correct it with --set"
        ) from error
    if not isinstance(built, tuple) or len(built) not in (2, 3) or not isinstance(built[0], nn.Module):
        raise _no_subject(reference, f"returned {type(built).__name__}, not a module and its arguments")
    module, kwargs = built[:2]
    if not isinstance(kwargs, Mapping) or not any(isinstance(value, Tensor) for value in kwargs.values()):
        raise _no_subject(reference, "returned no tensors by the names of forward's arguments beside the module")
    said = built[2] if len(built) > 2 else None
    return Subject(module, dict(kwargs), None if said is None else Library(**said))


def _load(reference: str) -> Callable[..., Any]:
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise _no_subject(reference, "is no known model")
    try:
        found = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise _no_subject(reference, f"cannot be imported: {error}") from error
    if not callable(found):
        raise _no_subject(reference, f"is a {type(found).__name__}, not a function")
    return found


def _check_settings(reference: str, build: Callable[..., Any], settings: Mapping[str, Setting]) -> None:
    parameters = dict(inspect.signature(build, eval_str=True).parameters)
    parameters.pop(_SHARDED_BY, None)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    known = ", ".join(
        f"{name}={parameter.default}" if parameter.default is not inspect.Parameter.empty else name
        for name, parameter in parameters.items()
    )
    for name, value in settings.items():
        if name not in parameters and not takes_any:
            raise SequenceParallelConfigError(
                setting=f"--set {name}",
                value=value,
                why=f"{reference} has no such setting",
                remedy=f"set any of {known}",
            )
        wanted = parameters[name].annotation if name in parameters else None
        if wanted in (int, float, str) and not isinstance(value, (int, float) if wanted is float else wanted):
            raise SequenceParallelConfigError(
                setting=f"--set {name}",
                value=value,
                why=f"{reference} takes {wanted.__name__} there",
                remedy=f"correct the value; settings are {known}",
            )
    missing = [
        name
        for name, parameter in parameters.items()
        if name not in settings
        and parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    if missing:
        raise SequenceParallelConfigError(
            setting=f"settings of {reference}",
            value=dict(settings),
            why=f"{', '.join(missing)} must be set",
            remedy=f"add --set {missing[0]}=...",
        )


def _no_subject(reference: str, why: str) -> SequenceParallelConfigError:
    return SequenceParallelConfigError(
        setting="--model",
        value=reference,
        why=why,
        remedy=f"name one of {', '.join(KNOWN_SUBJECTS)}, hf:llama-8b, hf:config.json, megatron:file.args, or "
        "package.module:function with a function that returns (module, forward's arguments as a dict of tensors)",
    )
