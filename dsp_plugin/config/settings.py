"""Everything that a user can set, with its type and default."""

from __future__ import annotations

import keyword
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    StrictBool,
    StrictInt,
    StrictStr,
)

from dsp_plugin.config.memory import AUTO_ATTENTION_BYTES, Bytes, MemoryConfig
from dsp_plugin.integers import MOST
from dsp_plugin.layout import LayoutKind
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.head_rounds import RoundBudget
from dsp_plugin.methods.state_exchange import ExchangeName

LayoutName = Literal["auto", LayoutKind]
KernelName = Literal["auto", "fa3", "fa2", "cuda_flash", "triton", "cpu_flash", "math", "reference"]


def _printable(text: str) -> str:
    if not text or text != text.strip() or not text.isprintable():
        raise ValueError("expected text that can be printed, without spaces around it")
    return text


def _argument(text: str) -> str:
    name, *places = text.split(".")
    if not name.isidentifier() or keyword.iskeyword(name) or not all(re.fullmatch("[0-9]+", place) for place in places):
        raise ValueError('expected the name of an argument, or of an entry of it, as in "inputs.1"')
    return text


def _reference(text: str) -> str:
    module, _, name = text.partition(":")
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in (*module.split("."), *name.split("."))):
        raise ValueError("expected names joined by dots on either side of one colon")
    return text


def _listed(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list or tuple, not {type(value).__name__}")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, not {type(value).__name__}")
    return value


Text = Annotated[StrictStr, AfterValidator(_printable)]
Argument = Annotated[StrictStr, AfterValidator(_argument)]
Reference = Annotated[StrictStr, AfterValidator(_reference)]
# torch's tensors have no more dims.
Dim = Annotated[StrictInt, Field(ge=-64, le=63)]


class LossConfig(BaseModel):
    """How to weigh a loss that the model takes as the mean over the labels it is given.

    Attributes:
        labels: the forward argument with the labels, already shifted by the data pipeline.
        ignore_index: the label that counts for nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: Argument = "labels"
    ignore_index: Annotated[StrictInt, Field(ge=-MOST, le=MOST)] = -100


class Settings(BaseModel):
    """Everything a user can set, value by value; `SequenceParallelConfig` checks what goes together.

    Attributes:
        method: a name in `METHODS`.
        size: P, ranks that share one sequence. Given by ``ulysses_size`` * ``ring_size`` when left out.
        ulysses_size: U; defaults to what ``method`` and ``size`` imply; for usp, to the most that heads and node allow.
        ring_size: R; likewise.
        layout: token order; ``auto`` takes the framework's own where it has one, zigzag on Megatron-core, else what the
            method does best.
        kernel: local attention kernel; ``auto`` takes the fastest that serves the tensors.
        recompute: what activation checkpointing does with attention: ``full`` runs it again, ``keep_attention`` keeps
            what its backward pass needs.
        ulysses_order: on a U x R group, ``adjacent`` puts Ulysses ranks side by side, so that the all-to-all stays in
            a node and the ring crosses nodes; ``strided`` the other way round.
        ring_gradient_dtype: in which gradients of keys and values travel: ``fp32``, or that of the inputs.
        heads: query heads on one tensor-parallel rank, for usp to choose ulysses_size by; frameworks that know fill it
            in.
        exchange: how linear attention passes states on: ``ring`` (LASP), ``allgather`` (LASP-2), ``scan`` (ZeCO);
            ``auto`` takes the one that should cost least.
        softmax_method: under a linear method, the method that serves a hybrid model's softmax layers. It takes the same
            layout, and ``ulysses_size`` and ``ring_size`` are its.
        log_every: optimizer steps between lines of the step log; 0 for none.
        log_tensorboard: folder for TensorBoard to get them, too.
        log_wandb: project of Weights & Biases, likewise.
        peak_tflops: of a device, which the log takes model FLOP utilization of; None where its name says enough.
        debug: ranks compare op, shapes and dtypes before each collective; also ``DSP_PLUGIN_DEBUG=1``.
        quiet: no line at the start of a run, see `start_line`.
        unverified_model: take a causal language model of Transformers although no page of families calls it exact.
        logits: of a causal language model of Transformers that is given labels, whether the logits that a script reads
            are those of whole sequences (``gather``, which is done where they are read) or of this rank's tokens
            (``local``).
        memory: what a step trades for memory, see `MemoryConfig`; ``auto`` takes of it what the model and the length
            need.
        plan: ``package.module:name`` of a `Plan` for the model; needed where the model is not one we know.
        attention: globs over module names: the modules whose `scaled_dot_product_attention` or `linear_attention`
            spans the sequence.
        batch: forward arguments that hold whole sequences, and the dim along which to shard each.
        positions: with ``batch``, the forward argument that takes global positions, filled in where the script does not
            pass it; None for a model that uses none.
        loss: set when the model returns the mean loss over the labels of its shard.
        gather_output: the sequence dim of the model's output, set when the script takes the loss itself. Set beside
            ``loss``, it is for calls without labels, which return outputs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    size: PositiveInt
    ulysses_size: PositiveInt
    ring_size: PositiveInt
    layout: LayoutName = "auto"
    kernel: KernelName = "auto"
    debug: StrictBool = False
    quiet: StrictBool = False
    recompute: Literal["full", "keep_attention"] = "full"
    ulysses_order: Literal["adjacent", "strided"] = "adjacent"
    ring_gradient_dtype: Literal["fp32", "input"] = "fp32"
    heads: PositiveInt | None = None
    exchange: ExchangeName = "auto"
    softmax_method: str = "lightseq"
    log_every: Annotated[StrictInt, Field(ge=0, le=MOST)] = 0
    log_tensorboard: Text | None = None
    log_wandb: Text | None = None
    peak_tflops: Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)] | None = None
    unverified_model: StrictBool = False
    logits: Literal["gather", "local"] = "gather"
    memory: MemoryConfig | Literal["auto"] = Field(default_factory=MemoryConfig)
    plan: Reference | None = None
    attention: Annotated[tuple[Text, ...], BeforeValidator(_listed)] = ()
    batch: dict[Argument, Dim] = Field(default_factory=dict)
    positions: Argument | None = "position_ids"
    loss: LossConfig | None = None
    gather_output: Dim | None = None

    @property
    def kind(self) -> Literal["softmax", "linear", "switch"]:
        """What ``method`` does: serve softmax attention or linear attention, or switch the sharded dim."""
        return METHODS[self.method].kind

    @property
    def tile_tokens(self) -> int | Literal["auto"] | None:
        """Tokens of which the head's logits are alive at once; None for all of them."""
        return "auto" if self.memory == "auto" else self.memory.tile_tokens

    @property
    def attention_rounds(self) -> int | RoundBudget:
        """In how many rounds of heads Ulysses works, or what a round may gather."""
        if self.memory == "auto":
            return RoundBudget(AUTO_ATTENTION_BYTES, binding=False)
        given: int = self.memory.attention_rounds
        return RoundBudget(given) if isinstance(given, Bytes) else given

    @property
    def offload(self) -> bool | Bytes | Literal["auto"]:
        """Whether checkpoints wait in host memory, or how much of it they may take."""
        return "auto" if self.memory == "auto" else self.memory.offload

    @property
    def for_softmax(self) -> str:
        """The method that serves softmax attention: ``method``, or under a linear one ``softmax_method``."""
        return self.softmax_method if self.kind == "linear" else self.method


LAYOUT_CHOICES: tuple[str, ...] = get_args(LayoutName)
KERNEL_CHOICES: tuple[str, ...] = get_args(KernelName)
EXCHANGE_CHOICES: tuple[str, ...] = get_args(ExchangeName)
