"""One schema for the DeepSpeed section, the Megatron flags and Python, validated once and before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Self, get_args

from pydantic import BaseModel, PrivateAttr, ValidationError, model_validator

from dsp_plugin.config.automatic import AUTO, stand_in
from dsp_plugin.config.checks import check_combination, check_count, check_method, check_rounds, check_softmax_method
from dsp_plugin.config.memory import MemoryConfig
from dsp_plugin.config.section_names import DEEPSPEED_SECTION, misnamed
from dsp_plugin.config.settings import LossConfig, Settings
from dsp_plugin.config.sizes import complete_sizes
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.integers import integer
from dsp_plugin.layout import MOST_RANKS, LayoutKind
from dsp_plugin.methods import METHODS, Workload

_MEGATRON_FLAGS = {
    "method": "sp_method",
    "ulysses_size": "sp_ulysses_size",
    "ring_size": "sp_ring_size",
    "layout": "sp_layout",
    "kernel": "sp_kernel",
    "debug": "sp_debug",
    "quiet": "sp_quiet",
    "recompute": "sp_recompute",
    "ulysses_order": "sp_ulysses_order",
    "ring_gradient_dtype": "sp_ring_gradient_dtype",
    "heads": "sp_heads",
    "exchange": "sp_exchange",
    "softmax_method": "sp_softmax_method",
    "log_every": "sp_log_every",
    "log_tensorboard": "sp_log_tensorboard",
    "log_wandb": "sp_log_wandb",
    "peak_tflops": "sp_peak_tflops",
    "memory": "sp_memory",
}

# What to write where a value has the wrong type, by setting.
_EXAMPLES = {
    "debug": "write true or false",
    "quiet": "write true or false",
    "unverified_model": "write true or false",
    "plan": 'name a Plan as "package.module:name"',
    "attention": 'write a list of module-name globs, such as ["layers.*.attn"]',
    "batch": 'map forward arguments to their sequence dims, as in {"input_ids": 1, "labels": 1}',
    "positions": 'name a forward argument, such as "position_ids"; null if the model uses none',
    "loss": 'write {"labels": "labels", "ignore_index": -100}',
    "gather_output": "write the sequence dim of the model's output, such as 1",
    "log_every": "write a number of optimizer steps, such as 10; 0 for no log",
    "log_tensorboard": "write the path of a folder",
    "log_wandb": "write the name of a project",
    "peak_tflops": "write a number, such as 989",
    "memory": 'write "auto", or {"tile_tokens": 4096, "mlp_tiles": 8, "offload": true, "attention_rounds": 4}',
}

_SECTIONS: dict[str, type[BaseModel]] = {"loss": LossConfig, "memory": MemoryConfig}


class SequenceParallelConfig(Settings):
    """Settings that go together, from whichever framework's configuration.

    `Settings` lists them. Where ``method`` was given as ``"auto"``, another one stands in until `given` has been
    completed by who knows the model's shapes.
    """

    _automatic: bool = PrivateAttr(default=False)

    def __init__(self, **settings: Any) -> None:
        """Validate ``settings``.

        Raises:
            SequenceParallelConfigError: an unknown key, a value of the wrong type, or an illegal combination.
        """
        _refuse_unknown(settings, type(self).model_fields)
        for key, section in _SECTIONS.items():
            if isinstance(settings.get(key), Mapping):
                _refuse_unknown(settings[key], section.model_fields, f"{key}.")
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise _first_problem(error) from None
        self._automatic = settings.get("method") == AUTO

    @property
    def automatic(self) -> bool:
        """Whether the method is still to be chosen."""
        return self._automatic

    def given(self) -> dict[str, Any]:
        """The settings that were given, with ``method`` and sizes as they were."""
        given = self.model_dump(exclude_unset=True)
        if self._automatic:
            given = {key: value for key, value in given.items() if key not in ("ulysses_size", "ring_size")}
            given["method"] = AUTO
        return given

    def refuse_automatic(self, what: str) -> None:
        """Refuse a method that is still to be chosen, where nobody can.

        Raises:
            SequenceParallelConfigError: it is.
        """
        if self._automatic:
            raise SequenceParallelConfigError(
                setting="method",
                value=AUTO,
                why=f"it is chosen by a model's numbers of heads, layers and widths, and of {what} they are not known",
                remedy=f"set it to one of {', '.join(METHODS)}",
            )

    @classmethod
    def parse(cls, settings: Any, source: str) -> Self:
        """Validate a section read from ``source``, which errors name.

        Raises:
            SequenceParallelConfigError: it is not a section, or not a legal one.
        """
        if not isinstance(settings, Mapping):
            raise SequenceParallelConfigError(
                setting=source,
                value=settings,
                why=f"expected a section with keys such as method and size, got {type(settings).__name__}",
                remedy='write {"method": "ulysses", "size": 4}',
            )
        try:
            _refuse_unknown(settings, cls.model_fields)
            return cls(**settings)
        except SequenceParallelConfigError as error:
            raise SequenceParallelConfigError(f"{source}: {error}") from None

    @classmethod
    def from_deepspeed(cls, ds_config: Mapping[str, Any]) -> Self | None:
        """The ``"sequence_parallel"`` section of a DeepSpeed config; None where there is none."""
        section = ds_config.get(DEEPSPEED_SECTION)
        ours = misnamed(ds_config)
        if ours is not None:
            name, value = ours
            raise SequenceParallelConfigError(
                setting=f"DeepSpeed config {name!r}",
                value=value,
                why="nobody reads a section of this name, so the run would train unsharded",
                remedy=f'call it "{DEEPSPEED_SECTION}", at the top level of the config',
            )
        return None if section is None else cls.parse(section, source=f'DeepSpeed config "{DEEPSPEED_SECTION}"')

    @classmethod
    def from_megatron(cls, args: Any) -> Self | None:
        """The ``--sp-*`` flags with Megatron's ``--context-parallel-size`` as size; None without ``--sp-method``.

        Args:
            args: Megatron's parsed arguments, or any object with the same attributes.
        """
        settings = {key: getattr(args, flag, None) for key, flag in _MEGATRON_FLAGS.items()}
        if settings["method"] is None:
            stray = [
                _flag(flag)
                for key, flag in _MEGATRON_FLAGS.items()
                if settings[key] is not None and settings[key] is not False
            ]
            if stray:
                raise SequenceParallelConfigError(
                    setting=", ".join(stray),
                    why="set without --sp-method, so nothing would use it",
                    remedy=f"add --sp-method, one of {', '.join(METHODS)}",
                )
            return None
        settings["size"] = getattr(args, "context_parallel_size", 1)
        settings["memory"] = _section_or_word(settings["memory"])
        given = {key: value for key, value in settings.items() if value is not None}
        return cls.parse(given, source="Megatron flags (--sp-KEY; size is --context-parallel-size)")

    @model_validator(mode="before")
    @classmethod
    def _complete_sizes(cls, settings: Any) -> Any:
        """Fill in the sizes that follow from the others, refusing those that contradict."""
        if not isinstance(settings, dict):
            return settings
        if settings.get("method") == AUTO:
            settings = stand_in(settings)
        check_method(settings.get("method"))
        if "softmax_method" in settings:
            check_softmax_method(settings["softmax_method"])
        size, ulysses, ring = (settings.get(key) for key in ("size", "ulysses_size", "ring_size"))
        for key in ("size", "ulysses_size", "ring_size", "heads"):
            check_count(key, settings.get(key))
        method, setting = METHODS[settings["method"]], "method"
        if method.kind == "linear":
            softmax_method = settings.get("softmax_method", cls.model_fields["softmax_method"].default)
            method, setting = METHODS[softmax_method], "softmax_method"
        sizes = complete_sizes(method, size, ulysses, ring, settings.get("heads"), setting)
        check_count("size", sizes.size)
        return {**settings, "size": sizes.size, "ulysses_size": sizes.ulysses, "ring_size": sizes.ring}

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        check_combination(self)
        return self

    def check_world(self, world_size: int, **other_sizes: int) -> int:
        """Check that the sizes fit the world.

        Args:
            world_size: ranks in the world.
            other_sizes: further parallel sizes by name, such as ``tensor_parallel_size``.

        Returns:
            The data-parallel size that is left.

        Raises:
            SequenceParallelConfigError: the product of the sizes does not divide the world.
        """
        sizes = {"size": self.size, **other_sizes}
        product = 1
        for value in sizes.values():
            product *= value
        if world_size % product:
            names, values = " * ".join(sizes), " * ".join(map(str, sizes.values()))
            raise SequenceParallelConfigError(
                setting="size",
                value=self.size,
                why=f"{names} = {values} = {product} does not divide the {world_size} ranks of the world",
                remedy=f"choose sizes whose product divides {world_size}, or start a multiple of {product} ranks",
            )
        return world_size // product

    def check_model(
        self, *, heads: int, kv_heads: int | None = None, length: int | None = None, tensor_parallel_size: int = 1
    ) -> None:
        """Check that the method can serve a model of these shapes, all of them before tensor parallelism.

        Raises:
            SequenceParallelConfigError: it cannot; the message has every reason.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        tp = tensor_parallel_size
        shapes = f"heads={heads}, kv_heads={kv_heads}, tensor_parallel_size={tp}"
        if not all(map(_is_count, (heads, kv_heads, tp))):
            raise SequenceParallelConfigError(
                f"{shapes}: each must be an integer of 1 or more, and no more than {MOST_RANKS:,}. Correct the model."
            )
        if length is not None:
            length = integer(length, "length", remedy="pass the number of tokens of a sequence, or None")
        if heads % tp or (kv_heads % tp and tp % kv_heads):
            which, count = ("query", heads) if heads % tp else ("key/value", kv_heads)
            raise SequenceParallelConfigError(
                setting="tensor_parallel_size",
                value=tp,
                why=f"{count} {which} heads do not split over {tp} tensor-parallel ranks: {count} / {tp} leaves "
                f"{count % tp}",
                remedy="choose a divisor of the head counts",
            )
        # Megatron-core repeats key/value heads where there are fewer of them than tensor-parallel ranks.
        workload = Workload(
            self.size, heads // tp, max(kv_heads // tp, 1), length=length or 1, ulysses_size=self.ulysses_size
        )
        serving = dict.fromkeys((self.method, self.for_softmax))
        reasons = list(dict.fromkeys(reason for name in serving for reason in METHODS[name].illegal(workload)))
        if reasons:
            raise SequenceParallelConfigError(
                f"method={self.method!r} with size={self.size}, {shapes}: " + " ".join(reasons)
            )
        check_rounds(self, workload.heads, workload.kv_heads)

    def layout_for(self, native: LayoutKind | None = None) -> LayoutKind:
        """The token order to use where the framework's own, if it has one, is ``native``.

        Under a linear method it is one that its ``softmax_method`` takes, too.
        """
        if self.layout != "auto":
            return self.layout
        softmax = METHODS[self.for_softmax].layouts
        legal = [layout for layout in METHODS[self.method].layouts if layout in softmax]
        return native if native in legal else legal[0]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_RANKS


def _section_or_word(text: Any) -> Any:
    """What a flag holds that takes a section in JSON or a word."""
    try:
        return json.loads(text) if isinstance(text, str) and text.lstrip().startswith("{") else text
    except ValueError as error:
        raise SequenceParallelConfigError(
            setting="--sp-memory", value=text, why=f"it is not JSON: {error}", remedy=_EXAMPLES["memory"]
        ) from None


def _flag(attribute: str) -> str:
    return "--" + attribute.replace("_", "-")


def _refuse_unknown(settings: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> None:
    known = list(known)
    for key in settings:
        if key not in known:
            nearest = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise SequenceParallelConfigError(
                f"unknown key {prefix + str(key)!r}. Did you mean {prefix + nearest!r}? Known keys: {', '.join(known)}."
            )


def _first_problem(error: ValidationError) -> SequenceParallelConfigError:
    problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, SequenceParallelConfigError):
        return cause
    setting, value = str(problem["loc"][0]), problem["input"]
    if problem["type"] == "literal_error":
        choices = get_args(SequenceParallelConfig.model_fields[setting].annotation)
        nearest = get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
        why, remedy = f"known are {', '.join(choices)}", f"did you mean {nearest!r}?"
    else:
        said = problem["msg"] if cause is None else str(cause)
        if problem["type"] == "model_type":
            said = f"expected a section, a dictionary that is, not {type(value).__name__}"
        why, remedy = said[0].lower() + said[1:], _EXAMPLES.get(setting, "correct the value")
    # Where a setting is a section or a word, pydantic names the section's class, too.
    place = ".".join(str(part) for part in problem["loc"] if part != MemoryConfig.__name__)
    return SequenceParallelConfigError(setting=place, value=value, why=why, remedy=remedy)
