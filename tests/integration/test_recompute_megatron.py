"""``--sp-recompute keep_attention`` under ``--recompute-granularity`` full and selective in real Megatron-core."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dsp_plugin import ledger
from dsp_plugin.kernels import calls
from dsp_plugin.spawn import spawn

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.timeout(280),
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"),
]

CP2, TP2, PP2 = (f"--{axis}-parallel-size 2" for axis in ("context", "tensor-model", "pipeline-model"))
MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 32 --train-iters 2"


@dataclass(frozen=True)
class Case:
    """One training run on the ranks that share a world.

    Attributes:
        parallel: sizes, as in a command line.
        granularity: what `TransformerConfig` is told of recomputation; None for nothing.
        dropout: of attention and of activations.
        memory: what a step trades for memory.
    """

    method: str | None
    parallel: str = ""
    granularity: str | None = None
    recompute: str = "full"
    distribute: bool = False
    dropout: float = 0.0
    memory: str | None = None

    def overrides(self) -> dict[str, Any]:
        """Fields of `TransformerConfig`."""
        dropout = {"attention_dropout": self.dropout, "hidden_dropout": self.dropout}
        if self.granularity in (None, "selective"):
            return {"recompute_granularity": self.granularity, **dropout}
        return {
            **dropout,
            "recompute_granularity": "full",
            "recompute_method": self.granularity,
            "recompute_num_layers": 1,
            "distribute_saved_activations": self.distribute,
        }


PLAIN = {(method, parallel): Case(method, parallel) for method in ("ulysses", "ring") for parallel in (PP2, TP2)}
KEEPING = [
    replace(PLAIN[method, parallel], granularity=granularity, recompute="keep_attention", distribute=distribute)
    for method, parallel, granularity, distribute in (
        ("ulysses", PP2, "uniform", False),
        ("ulysses", PP2, "block", False),
        ("ulysses", PP2, "selective", False),
        ("ulysses", TP2, "uniform", True),
        ("ring", PP2, "uniform", False),
        ("ring", TP2, "selective", False),
    )
]
ORDINARY = [
    replace(PLAIN[method, parallel], granularity=granularity)
    for method, parallel, granularity in (("ulysses", PP2, "uniform"), ("ring", TP2, "selective"))
]
DROPPED = replace(PLAIN["ulysses", PP2], dropout=0.3)
DROPPED_KEEPING = [
    replace(DROPPED, granularity=granularity, recompute="keep_attention") for granularity in ("uniform", "selective")
]


@contextmanager
def arguments(case: Case) -> Iterator[Any]:
    """The training script and its arguments for a case."""
    from dsp_plugin.launch.examples import pretrain_gpt_core as script

    context = CP2 if case.method else ""
    before, sys.argv = sys.argv, ["script", *MODEL.split(), *case.parallel.split(), *context.split()]
    try:
        yield script.parse_args()
    finally:
        sys.argv = before


def train(case: Case) -> dict[str, Any]:
    """Two steps of four microbatches. Losses and gradients, and what attention computed and sent in all."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from dsp_plugin.launch.examples import core_training
    from dsp_plugin.launch.examples import pretrain_gpt_core as script
    from dsp_plugin.patches import megatron

    if case.method is not None:
        megatron.install(case.method, recompute=case.recompute, memory=case.memory)
    with arguments(case) as args:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
        )
        try:
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            config = replace(script.model_config(args), **case.overrides())
            config.finalize_model_grads_func = finalize_model_grads
            chunks = script.build_model(args, config)
            optimizer = get_megatron_optimizer(
                OptimizerConfig(optimizer="sgd", lr=0.1, params_dtype=torch.float32), chunks
            )
            text = script.standard_library(args.seq_length, args.global_batch_size * args.train_iters)
            losses, gradients = [], {}
            with ledger() as sent, calls() as made:
                for step in range(args.train_iters):
                    optimizer.zero_grad()
                    losses.append(script.train_step(args, chunks, text, step))
                    if step == 0:
                        gradients = whole_gradients(script, chunks)
                    optimizer.step()
            return {
                "losses": losses if core_training.is_reporter() else None,
                "gradients": gradients,
                # The token counts of a mean loss are sent behind what is recomputed.
                "forward": (made.forward, sent.bytes(phase="forward") - sent.bytes(method="loss")),
                "backward": made.backward,
            }
        finally:
            parallel_state.destroy_model_parallel()
            megatron.uninstall()


def whole_gradients(script: Any, chunks: list[Any]) -> dict[str, Tensor]:
    """Gradients of this rank's parameters that tensor parallelism did not cut."""
    return {
        name: parameter.main_grad.clone()
        for name, parameter in script.global_parameters(chunks[0].module)
        if not getattr(parameter, "tensor_model_parallel", False)
    }


def run(cases: list[Case]) -> dict[Case, dict[str, Any]]:
    from dsp_plugin.patches import cpu

    cpu.install()
    return {case: train(case) for case in cases}


@cache
def results() -> list[dict[Case, dict[str, Any]]]:
    return spawn(run, 4, [*PLAIN.values(), *KEEPING, *ORDINARY, DROPPED, *DROPPED_KEEPING], timeout=240)


@cache
def unsharded() -> dict[str, Any]:
    """Stock Megatron on one rank, nothing recomputed."""
    return spawn(run, 1, [Case(None)], timeout=100)[0][Case(None)]


def name(case: Case) -> str:
    distributed = ", distributed" if case.distribute else ""
    return f"{case.method} cp2 {case.parallel.split('-')[2]} 2, {case.granularity}{distributed}, {case.recompute}"


@pytest.mark.parametrize("case", KEEPING, ids=name)
def test_attention_is_not_recomputed(case: Case) -> None:
    """Over all steps, attention is computed and sent as often as without recomputation."""
    for rank in results():
        found, plain = rank[case], rank[PLAIN[case.method, case.parallel]]
        assert min(found["forward"]) > 0
        assert found["forward"] == plain["forward"]
        assert found["backward"] == plain["backward"]


@pytest.mark.parametrize("case", ORDINARY, ids=name)
def test_the_ordinary_policy_recomputes_all_of_it(case: Case) -> None:
    for rank in results():
        plain = rank[PLAIN[case.method, case.parallel]]
        assert rank[case]["forward"] == tuple(2 * value for value in plain["forward"])


@pytest.mark.parametrize("case", [*KEEPING, *ORDINARY], ids=name)
def test_trains_like_one_process_of_stock_megatron(case: Case) -> None:
    expected, reporters = unsharded(), 0
    assert expected["losses"][1] < expected["losses"][0]
    for rank in results():
        found = rank[case]
        if found["losses"] is not None:
            reporters += 1
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        for parameter, gradient in found["gradients"].items():
            error = (gradient - expected["gradients"][parameter]).norm() / expected["gradients"][parameter].norm()
            assert error < 1e-5, parameter
    assert reporters == 1


@pytest.mark.parametrize("case", DROPPED_KEEPING, ids=name)
def test_the_same_is_dropped_as_without_recomputation(case: Case) -> None:
    for rank in results():
        found, plain = rank[case], rank[DROPPED]
        assert found["losses"] == plain["losses"]
        assert found["forward"] == plain["forward"]
        for parameter, gradient in plain["gradients"].items():
            torch.testing.assert_close(found["gradients"][parameter], gradient, rtol=1e-5, atol=1e-7)
    without = [rank[PLAIN["ulysses", PP2]]["losses"] for rank in results()]
    assert without != [rank[DROPPED]["losses"] for rank in results()]
