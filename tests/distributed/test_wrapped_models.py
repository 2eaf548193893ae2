"""Models in DDP or compiled, before they are sharded or after: as exact as the model alone; other wrappers refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from attending import Layer
from torch import Tensor, nn

import dsp_plugin
from dsp_plugin import (
    Plan,
    SequenceParallelConfig,
    SequenceParallelConfigError,
    SequenceParallelGroups,
    Stage,
    UnsupportedError,
    parallelize,
)
from dsp_plugin.spawn import spawn

WIDTH, HEADS, WORDS = 8, 2, 11


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(Layer(WIDTH, HEADS, causal=True) for _ in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def made() -> Model:
    torch.manual_seed(0)
    return Model().double()


def data() -> tuple[Tensor, Tensor]:
    ids = torch.randint(WORDS, (2, 8), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def sharded(module: nn.Module, attention: str) -> None:
    config = SequenceParallelConfig(
        method="ulysses",
        size=dist.get_world_size(),
        attention=[attention],
        batch={"input_ids": 1, "labels": 1},
        loss={},
        positions=None,
        quiet=True,
    )
    parallelize(module, config=config, groups=SequenceParallelGroups.build(config))


compiled = partial(torch.compile, backend="eager")


def wrapped(how: str, model: nn.Module) -> nn.Module:
    """The model, sharded and wrapped in some order, and called before where that could have left something behind."""
    ddp = nn.parallel.DistributedDataParallel
    match how:
        case "ddp first":
            model = ddp(model)
            sharded(model, "module.layers.*.attn")
        case "ddp first, names of the model":
            model = ddp(model)
            sharded(model, "layers.*.attn")
        case "ddp after":
            sharded(model, "layers.*.attn")
            model = ddp(model)
        case "compiled and run first":
            model = compiled(model)
            model(*data())
            sharded(model, "_orig_mod.layers.*.attn")
        case "compiled after":
            sharded(model, "layers.*.attn")
            model = compiled(model)
        case "layers compiled and run first":
            for layer in model.layers:
                layer.compile(backend="eager")
            model(*data())
            sharded(model, "layers.*.attn")
        case "attention wrapped by the compiler first":
            for layer in model.layers:
                layer.attn = compiled(layer.attn)
            model(*data())
            sharded(model, "layers.*.attn")
        case "ddp of a compiled model":
            model = ddp(compiled(model))
            sharded(model, "**.layers.*.attn")
    return model


HOWS = ["ddp first", "compiled and run first", "attention wrapped by the compiler first"]
OTHERS = [
    *("ddp first, names of the model", "ddp after", "compiled after", "layers compiled and run first"),
    "ddp of a compiled model",
]


def errors(hows: list[str]) -> dict[str, float]:
    whole = made()
    wanted_loss = whole(*data())
    wanted_loss.backward()
    found = {}
    for how in hows:
        torch.compiler.reset()
        model = made()
        loss = wrapped(how, model)(*data())
        loss.backward()
        worst = abs(loss.item() - wanted_loss.item())
        for parameter, wanted in zip(model.parameters(), whole.parameters(), strict=True):
            # DDP has taken the mean already, which is the same on all ranks.
            dist.all_reduce(parameter.grad)
            error = parameter.grad / dist.get_world_size() - wanted.grad
            worst = max(worst, (error.abs().max() / wanted.grad.abs().max()).item())
        found[how] = worst
    found["by its plan"] = of_a_plan()
    return found


@pytest.mark.parametrize("hows", [HOWS, pytest.param(OTHERS, marks=pytest.mark.matrix)], ids=["some", "others"])
def test_wrapped_models_are_as_exact_as_others(hows: list[str]) -> None:
    for found in spawn(errors, 2, hows, timeout=240):
        assert list(found) == [*hows, "by its plan"]
        assert max(found.values()) < 1e-10, found


class Mix(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.linear = dim, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).mean(self.dim, keepdim=True)


def of_a_plan() -> float:
    torch.manual_seed(0)
    model = nn.Sequential(Mix(1), Mix(2)).double()
    x = torch.randn(1, 4, 6, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    wanted = model(x)
    run = compiled(model)
    run(x)
    config = SequenceParallelConfig(method="dsp", size=2, quiet=True)
    plan = Plan("b t s c", (Stage("0", ("t",)), Stage("1", ("s",))))
    handle = parallelize(run, plan, config=config, groups=SequenceParallelGroups.build(config))
    error = (run(x) - wanted).abs().max().item()
    assert handle.stage_plan is not None
    assert [row.sharded for row in handle.stage_plan.rows] == ["s", "t"]
    return error


@pytest.mark.parametrize("kind", ["FullyShardedDataParallel", "DataParallel", "DeepSpeedEngine"])
def test_wrappers_that_have_to_come_after_are_refused(kind: str) -> None:
    wrapper: Any = type(kind, (nn.Module,), {})()
    wrapper.module = made()
    config = SequenceParallelConfig(method="dsp", size=1)
    with pytest.raises(UnsupportedError, match=rf"module='{kind}'.*Call parallelize on the model itself, before"):
        parallelize(wrapper, config=config, groups=SequenceParallelGroups.single())


def test_our_hooks_are_never_compiled_however_many_there_are() -> None:
    from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

    torch.compiler.reset()
    clear_compilation_metrics()
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Mix(1 + index % 2) for index in range(12))), torch.randn(1, 4, 6, WIDTH)
    wanted = model(x)
    plan = Plan("b t s c", tuple(Stage(str(index), ("ts"[index % 2],)) for index in range(12)))
    config = SequenceParallelConfig(method="dsp", size=1, quiet=True)
    parallelize(model, plan, config=config, groups=SequenceParallelGroups.single())
    for layer in model:
        layer.compile(backend="eager")
    run = compiled(model)
    for _ in range(2):
        assert torch.allclose(run(x), wanted, rtol=1e-5)
    found = [(frame.co_name, frame.co_filename or "") for frame in get_compilation_metrics()]
    assert ("forward", __file__) in found
    assert [frame for frame in found if Path(frame[1]).is_relative_to(Path(dsp_plugin.__file__).parent)] == []


class Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = made()

    def forward(self, *inputs: Tensor, **further: Tensor) -> Tensor:
        return self.inner(*inputs, **further)


def test_arguments_that_a_wrapper_takes_without_names_are_asked_for_by_name() -> None:
    wrapper, (ids, labels) = Passing(), data()
    wanted = wrapper(ids, labels)
    config = SequenceParallelConfig(
        method="ulysses", size=1, attention=["**.attn"], batch={"input_ids": 1, "labels": 1}, loss={}, positions=None
    )
    parallelize(wrapper, config=config, groups=SequenceParallelGroups.single())
    with pytest.raises(SequenceParallelConfigError, match=r"\*inputs and was given 2 .*input_ids or labels.*by name"):
        wrapper(ids, labels)
    assert torch.allclose(wrapper(input_ids=ids, labels=labels), wanted, rtol=1e-12)
