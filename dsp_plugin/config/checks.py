"""Which settings go together: what `SequenceParallelConfig` refuses although each value is legal by itself."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from dsp_plugin.config.settings import Settings
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.layout import MOST_RANKS
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.head_partition import head_partition
from dsp_plugin.methods.head_rounds import RoundBudget, check

# Methods that a plan's stages can use.
PLANNED = ("dsp", "ulysses", "ring", "usp")


def check_combination(config: Settings) -> None:
    """Check settings against each other.

    Raises:
        SequenceParallelConfigError: the first two that contradict.
    """
    _check_linear(config)
    _check_layout(config)
    _check_plan(config)
    _check_batch(config)
    _check_log(config)
    _check_memory(config)


def check_count(setting: str, value: Any) -> None:
    """Check that a count, if it is given, is one, and no more than `MOST_RANKS`.

    Raises:
        SequenceParallelConfigError: it is not.
    """
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SequenceParallelConfigError(
            setting=setting,
            value=value,
            why=f"a count is an integer of 1 or more, not {type(value).__name__} {value!r}",
            remedy="write a number such as 2",
        )
    if value > MOST_RANKS:
        raise SequenceParallelConfigError(
            setting=setting, value=value, why=f"it is more than {MOST_RANKS:,}", remedy="write a number such as 2"
        )


def check_method(method: Any) -> None:
    """Check that there is such a method.

    Raises:
        SequenceParallelConfigError: there is none; the message names the nearest.
    """
    if not isinstance(method, str) or method not in METHODS:
        _refuse_name("method", method, list(METHODS))


def check_softmax_method(name: Any) -> None:
    """Check that ``name`` is a method that can serve softmax layers.

    Raises:
        SequenceParallelConfigError: it is none, or of another kind; the message names the nearest.
    """
    softmax = [method.name for method in METHODS.values() if method.kind == "softmax"]
    if isinstance(name, str) and name in METHODS and name not in softmax:
        raise SequenceParallelConfigError(
            setting="softmax_method",
            value=name,
            why=f"{name} is a {METHODS[name].kind} method and serves no softmax attention",
            remedy=f"set it to one of {', '.join(softmax)}",
        )
    if not isinstance(name, str) or name not in softmax:
        _refuse_name("softmax_method", name, softmax)


def _check_log(config: Settings) -> None:
    for setting in ("log_tensorboard", "log_wandb", "peak_tflops"):
        if getattr(config, setting) is not None and not config.log_every:
            raise SequenceParallelConfigError(
                setting=setting,
                value=getattr(config, setting),
                why="log_every is 0, so there is no step log to write",
                remedy="set log_every to 10, say, or drop it",
            )


def _check_memory(config: Settings) -> None:
    memory = config.memory
    if memory == "auto":
        return
    axes = METHODS[config.for_softmax].axes if config.kind != "switch" else ()
    if memory.attention_rounds != 1 and "ulysses" not in axes:
        able = [name for name, method in METHODS.items() if method.kind == "softmax" and "ulysses" in method.axes]
        raise SequenceParallelConfigError(
            setting="memory.attention_rounds",
            value=memory.attention_rounds,
            why=f"rounds of heads are for attention that gathers tokens, and method {config.for_softmax} gathers none",
            remedy=f"drop it, or set method to one of {', '.join(able)}",
        )
    described = "batch" if config.batch else "a plan" if config.plan is not None or config.kind == "switch" else None
    for name, off in (("tile_tokens", None), ("mlp_tiles", 1)):
        if getattr(memory, name) != off and described is not None:
            raise SequenceParallelConfigError(
                setting=f"memory.{name}",
                value=getattr(memory, name),
                why=f"the model is described by {described}, which does not say where its head and its MLPs are",
                remedy="drop it, and use dsp_plugin.token_log_probs in the model's own loss",
            )


def check_rounds(config: Settings, heads: int, kv_heads: int) -> None:
    """Check that every rank has a head for each round; what a round may gather says only later how many there are.

    Args:
        heads, kv_heads: on one tensor-parallel rank.

    Raises:
        SequenceParallelConfigError: some has not.
    """
    method, rounds = METHODS[config.for_softmax], config.attention_rounds
    if "attention_rounds" in method.settings and not isinstance(rounds, RoundBudget):
        check(rounds, head_partition(heads, kv_heads, config.ulysses_size), whole_groups="ring" in method.axes)


def _refuse_name(setting: str, name: Any, known: list[str]) -> None:
    nearest = get_close_matches(str(name), known, n=1)
    unknown = "no such method" + (f", the nearest is {nearest[0]!r}" if nearest else "")
    raise SequenceParallelConfigError(
        setting=setting,
        value=name,
        why="missing" if name is None else unknown,
        remedy=f"set it to one of {', '.join(known)}",
    )


def _check_linear(config: Settings) -> None:
    method = METHODS[config.method]
    linear = [other.name for other in METHODS.values() if other.kind == "linear"]
    if method.kind != "linear" and "softmax_method" in config.model_fields_set:
        raise SequenceParallelConfigError(
            setting="softmax_method",
            value=config.softmax_method,
            why=f"it is for the softmax layers of a model that method {', '.join(linear)} shards, and method is "
            f"{config.method}",
            remedy=f"drop softmax_method, or set method to {linear[0]}",
        )
    if config.exchange != "auto" and "exchange" not in method.settings:
        raise SequenceParallelConfigError(
            setting="exchange",
            value=config.exchange,
            why=f"method {config.method} exchanges no states; it is for {', '.join(linear)}",
            remedy=f"drop exchange, or set method to {linear[0]}",
        )


def _check_layout(config: Settings) -> None:
    if config.layout != "auto" and config.layout not in METHODS[config.method].layouts:
        raise SequenceParallelConfigError(
            setting="layout",
            value=config.layout,
            why=f"method {config.method} takes {', '.join(METHODS[config.method].layouts)}",
            remedy='set layout to one of these, or to "auto"',
        )
    softmax = METHODS[config.for_softmax]
    if config.layout != "auto" and config.layout not in softmax.layouts:
        able = [other.name for other in METHODS.values() if other.kind == "softmax" and config.layout in other.layouts]
        raise SequenceParallelConfigError(
            setting="softmax_method",
            value=softmax.name,
            why=f"it takes {', '.join(softmax.layouts)}, and layout is {config.layout!r}",
            remedy=f"set it to one of {', '.join(able)}, or drop layout",
        )


def _check_plan(config: Settings) -> None:
    if config.plan is not None and config.layout not in ("auto", "contiguous"):
        raise SequenceParallelConfigError(
            setting="layout",
            value=config.layout,
            why=f"plan={config.plan!r} shards dims of the activation, each of them in contiguous runs",
            remedy="drop layout",
        )
    if config.plan is not None and config.method not in PLANNED:
        raise SequenceParallelConfigError(
            setting="plan",
            value=config.plan,
            why=f"inside a plan's stages runs one of {', '.join(PLANNED)}, not {config.method}",
            remedy="use one of these, or shard the batch",
        )


def _check_batch(config: Settings) -> None:
    if config.batch and config.method == "dsp":
        raise SequenceParallelConfigError(
            setting="batch",
            value=config.batch,
            why="DSP shards the activation inside the model, by the plan, not the batch",
            remedy="drop batch, or use method ulysses",
        )
    if config.batch and config.plan is not None:
        raise SequenceParallelConfigError(
            setting="batch",
            value=config.batch,
            why=f"plan={config.plan!r} already shards inside the model; both would shard twice",
            remedy="keep one of plan and batch",
        )
    if config.batch and not config.attention:
        raise SequenceParallelConfigError(
            setting="attention",
            value=list(config.attention),
            why=f"batch shards {list(config.batch)}, so attention must span the shards, but no module is named",
            remedy='name the attention modules, as in "attention": ["layers.*.attn"]',
        )
    if config.attention and not config.batch:
        raise SequenceParallelConfigError(
            setting="attention",
            value=list(config.attention),
            why="attention modules are named but no forward argument is sharded",
            remedy='name the sharded arguments, as in "batch": {"input_ids": 1, "position_ids": 1, "labels": 1}',
        )
    if config.batch and config.loss is None and config.gather_output is None:
        raise SequenceParallelConfigError(
            setting="loss",
            why="neither of loss and gather_output is set; the model returns either a loss over its shard or outputs "
            "to gather",
            remedy='set "loss": {"labels": "labels"} if forward returns the mean loss over labels as it gets them, and '
            'shifts none, "gather_output": 1 if the script computes it, or both if forward returns a loss only where '
            "it is given labels",
        )
    if not config.batch and (config.loss is not None or config.gather_output is not None):
        raise SequenceParallelConfigError(
            setting="loss" if config.loss is not None else "gather_output",
            value=config.loss.model_dump() if config.loss is not None else config.gather_output,
            why="nothing to contract or gather: no forward argument is sharded",
            remedy='name the sharded arguments in "batch", or drop this setting',
        )
    if not config.batch and "positions" in config.model_fields_set and config.positions is not None:
        raise SequenceParallelConfigError(
            setting="positions",
            value=config.positions,
            why="no forward argument is sharded, so positions are whole already",
            remedy='name the sharded arguments in "batch", or drop this setting',
        )
    if config.loss is not None and config.loss.labels not in config.batch:
        raise SequenceParallelConfigError(
            setting="loss.labels",
            value=config.loss.labels,
            why=f"the labels must be sharded like the tokens, but batch names only {list(config.batch)}",
            remedy=f'add "{config.loss.labels}" to batch',
        )
