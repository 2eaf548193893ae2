"""The ``--sp-*`` flags: one table for the launcher, which takes them off the command line, and for Megatron's parser.

The launcher serves every script, also those with a parser of their own. Scripts that use `megatron.training` show the
flags in ``--help`` as well and find their values in Megatron's args.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from dsp_plugin.config.automatic import AUTO
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.config.settings import KERNEL_CHOICES
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.integers import integer_of
from dsp_plugin.methods.state_exchange import EXCHANGES
from dsp_plugin.patches.megatron.state import NATIVE_LAYOUT, servable
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch
from dsp_plugin.planner.auto import method_for
from dsp_plugin.planner.model_files import from_megatron


def add_flags(parser: argparse.ArgumentParser, defaults: argparse.Namespace | None = None) -> argparse.ArgumentParser:
    """Adds the flags as a group.

    Args:
        parser: gets the group.
        defaults: values to use as defaults: what the launcher took off the command line.

    Returns:
        The parser.
    """
    group = parser.add_argument_group(
        "sequence parallelism (dsp_plugin)", "The sequence-parallel size is --context-parallel-size."
    )
    group.add_argument("--sp-method", help=f"how context-parallel ranks share attention: {', '.join(servable())}, auto")
    group.add_argument(
        "--sp-ulysses-size", type=int, help="ranks that exchange heads; by default what the method implies"
    )
    group.add_argument("--sp-ring-size", type=int, help="ranks that pass keys and values round; likewise")
    group.add_argument("--sp-ulysses-order", help="which ranks exchange heads: adjacent ones, or strided")
    group.add_argument("--sp-ring-gradient-dtype", help="how gradients travel on the ring: in fp32, or as the input")
    group.add_argument("--sp-exchange", help=f"how lasp passes states: auto, {', '.join(EXCHANGES)}")
    group.add_argument(
        "--sp-softmax-method", help="with lasp, the method of the model's softmax layers; lightseq by default"
    )
    group.add_argument("--sp-layout", help="order of the tokens: auto, zigzag (Megatron's), or contiguous")
    group.add_argument("--sp-kernel", help=f"local attention kernel: {', '.join(KERNEL_CHOICES)}")
    group.add_argument("--sp-debug", action="store_true", help="compare ranks before each collective")
    group.add_argument("--sp-quiet", action="store_true", help="no line about the plugin at the start")
    group.add_argument("--sp-recompute", help="what recomputation does with attention: full, or keep_attention")
    group.add_argument("--sp-log-every", type=int, help="steps between lines of the step log")
    group.add_argument("--sp-log-tensorboard", help="folder for TensorBoard to get them, too")
    group.add_argument("--sp-log-wandb", help="project of Weights & Biases, likewise")
    group.add_argument("--sp-peak-tflops", type=float, help="of a device, for model FLOP utilization in the step log")
    group.add_argument("--sp-memory", help="what a step trades for memory: auto, or a section in JSON")
    if defaults is not None:
        parser.set_defaults(**vars(defaults))
    return parser


def heads_per_rank(argv: Sequence[str]) -> int | None:
    """Query heads on one tensor-parallel rank, from a script's arguments in Megatron's names; None where unclear."""
    heads, ranks = _number(argv, "--num-attention-heads"), _number(argv, "--tensor-model-parallel-size", 1)
    if heads is None or ranks is None or not 0 < ranks <= heads:
        return None
    return heads // ranks


def settle_method(flags: argparse.Namespace, argv: Sequence[str]) -> None:
    """Puts the method and the sizes that ``--sp-method auto`` comes to into the flags.

    Args:
        argv: the script's arguments in Megatron's names, which tell the shapes of the model.

    Raises:
        SequenceParallelConfigError: they do not tell them, or no method serves the model.
        UnsupportedError: they ask for layers that the planner does not know.
    """
    if flags.sp_method != AUTO:
        return
    size = _number(argv, "--context-parallel-size", 1)
    tensor = _number(argv, "--tensor-model-parallel-size", 1)
    given = {name.removeprefix("sp_"): value for name, value in vars(flags).items() if value is not None}
    config = SequenceParallelConfig.from_megatron(argparse.Namespace(**vars(flags), context_parallel_size=size))
    assert config is not None
    section = {**config.given(), **({"layout": given["layout"]} if "layout" in given else {})}
    chosen = method_for(
        from_megatron(argv, "Megatron's arguments"),
        section,
        world_size=integer_of("WORLD_SIZE", config.size * (tensor or 1)),
        tensor=tensor or 1,
        framework="megatron",
    )
    flags.sp_method = chosen["method"]
    flags.sp_ulysses_size, flags.sp_ring_size = chosen.get("ulysses_size"), chosen.get("ring_size")


def check_sequence_length(argv: Sequence[str], layout: str) -> None:
    """Refuses a sequence that Megatron cannot cut, from a script's arguments in Megatron's names.

    Args:
        argv: the script's arguments.
        layout: order of the tokens, ``"zigzag"`` or ``"contiguous"``.

    Raises:
        SequenceParallelConfigError: `--seq-length` is not a multiple of what the ranks hold.
    """
    length, ranks = _number(argv, "--seq-length"), _number(argv, "--context-parallel-size", 1)
    if length is None or ranks is None or ranks < 2:
        return
    pieces = 2 * ranks if layout == NATIVE_LAYOUT else ranks
    if length % pieces:
        rule = f"2 * --context-parallel-size = {pieces}" if layout == NATIVE_LAYOUT else f"the {pieces} ranks"
        below, above = length - length % pieces, length + -length % pieces
        raise SequenceParallelConfigError(
            setting="--seq-length",
            value=length,
            why=f"in {layout} order Megatron's ranks hold equal parts of it, so it must be a multiple of {rule}",
            remedy=f"set --seq-length to {f'{below} or ' if below else ''}{above}, and pad or pack the data to it",
        )


def _number(argv: Sequence[str], flag: str, default: int | None = None) -> int | None:
    """The last value of a flag, the default where it is not given; None where it is no whole number."""
    found = None
    for argument, following in zip_longest(argv, argv[1:], fillvalue=""):
        name, _, value = argument.partition("=")
        if name == flag:
            found = value or following
    if found is None:
        return default
    return int(found) if found.isdecimal() else None


def _mend_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Escapes help texts that argparse cannot format: 0.19.2 has one with a bare percent sign, so its --help fails."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help is None or action.help is argparse.SUPPRESS:
            continue
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")
    return parser


def patches(flags: argparse.Namespace) -> tuple[Patch, ...]:
    """Adds the flags to Megatron's parser, which the wheel ships from 0.17 on; `flags` are their values."""

    def add_ours(upstream: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(upstream)
        def add_megatron_arguments(parser: argparse.ArgumentParser) -> Any:
            return _mend_help(add_flags(upstream(parser), flags))

        return add_megatron_arguments

    return (
        Patch(
            "megatron arguments",
            "megatron.training.arguments:add_megatron_arguments",
            DISTRIBUTION,
            SUPPORTED,
            add_ours,
            ("parser",),
        ),
    )
