"""Everything that a user can set, with its type and default."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictBool,
    StrictInt,
)

from dsp_plugin.layout import LayoutKind
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.state_exchange import ExchangeName

LayoutName = Literal["auto", LayoutKind]
KernelName = Literal["auto", "fa3", "fa2", "cuda_flash", "cpu_flash", "math", "reference"]


class LossConfig(BaseModel):
    """How to weigh a loss that the model takes as the mean over the labels it is given.

    Attributes:
        labels: the forward argument with the labels, already shifted by the data pipeline.
        ignore_index: the label that counts for nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: str = "labels"
    ignore_index: StrictInt = -100


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
    log_every: NonNegativeInt = 0
    log_tensorboard: str | None = None
    log_wandb: str | None = None
    peak_tflops: PositiveFloat | None = None
    unverified_model: StrictBool = False
    plan: str | None = Field(default=None, pattern=r"^[\w.]+:[\w.]+$")
    attention: tuple[str, ...] = ()
    batch: dict[str, StrictInt] = Field(default_factory=dict)
    positions: str | None = "position_ids"
    loss: LossConfig | None = None
    gather_output: StrictInt | None = None

    @property
    def kind(self) -> Literal["softmax", "linear", "switch"]:
        """What ``method`` does: serve softmax attention or linear attention, or switch the sharded dim."""
        return METHODS[self.method].kind

    @property
    def for_softmax(self) -> str:
        """The method that serves softmax attention: ``method``, or under a linear one ``softmax_method``."""
        return self.softmax_method if self.kind == "linear" else self.method


LAYOUT_CHOICES: tuple[str, ...] = get_args(LayoutName)
KERNEL_CHOICES: tuple[str, ...] = get_args(KernelName)
EXCHANGE_CHOICES: tuple[str, ...] = get_args(ExchangeName)
