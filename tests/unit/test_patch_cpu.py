"""CPU mode: asked for in three ways, refused where CUDA is present; torch then answers as Megatron-core expects."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches import cpu

ANSWERS = """
import torch, torch.distributed as dist
from dsp_plugin.patches import cpu
cpu.install()
cpu.install()
assert torch.cuda.is_available() and torch.cuda.current_device() == 0
for device in ("cuda", "cuda:3", 0, torch.device("cuda", 1), torch.cuda.current_device()):
    assert torch.ones(2, device=device).device.type == "cpu", device
    assert torch.ones(2).to(device).device.type == "cpu", device
x = torch.randn(3, pin_memory=True).cuda().pin_memory()
assert x.type() == "torch.cuda.FloatTensor" and x.type(torch.float64).dtype == torch.float64
assert torch.nn.Linear(2, 2).cuda(0)(torch.ones(2, device="cuda")).device.type == "cpu"
class AllocatesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2
    @staticmethod
    def backward(ctx, grad):
        return grad * torch.full((), 2.0, device=torch.cuda.current_device())
leaf = torch.ones(2, requires_grad=True)
AllocatesInBackward.apply(leaf).sum().backward()
assert leaf.grad.tolist() == [2.0, 2.0]
torch.cuda.manual_seed(7)
state = torch.cuda.get_rng_state()
first = torch.rand(2, device="cuda")
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(2, device="cuda"))
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
start.record(); end.record()
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
assert start.elapsed_time(end) >= 0
dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
assert dist.get_backend() == "gloo"
assert dist.get_backend(dist.new_group([0], backend="nccl")) == "gloo"
dist.destroy_process_group()
print("all answered")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU mode is refused where CUDA is present")
def test_torch_answers_from_the_cpu() -> None:
    done = subprocess.run([sys.executable, "-c", ANSWERS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all answered"


def test_refused_where_cuda_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UnsupportedError, match=r"4 CUDA device.*--cpu=force"):
        cpu.install()
    assert not cpu.torch_patches().applied


@pytest.mark.parametrize(
    ("flag", "environment", "expected"),
    [
        (None, None, None),
        (None, "0", None),
        (None, "1", "1"),
        (None, "force", "force"),
        ("1", None, "1"),
        ("force", "0", "force"),
        ("0", "1", None),
    ],
)
def test_who_asks(
    flag: str | None, environment: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is None:
        monkeypatch.delenv(cpu.CPU_MODE, raising=False)
    else:
        monkeypatch.setenv(cpu.CPU_MODE, environment)
    assert cpu.requested(flag) == expected


@pytest.mark.parametrize(("flag", "environment", "named"), [("yes", "0", "--cpu"), (None, "true", "DSP_PLUGIN_CPU")])
def test_unknown_request_is_refused(
    flag: str | None, environment: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.CPU_MODE, environment)
    with pytest.raises(UnsupportedError, match=named):
        cpu.requested(flag)


def test_torch_is_restored_by_revert() -> None:
    names = [patch.target.partition(":")[2] for patch in cpu.torch_patches() if patch.target.startswith("torch.cuda:")]
    before = {name: operator(name) for name in names}
    with cpu.torch_patches():
        assert torch.cuda.is_available()
    assert {name: operator(name) for name in names} == before
    assert "DSP_PLUGIN_CPU" not in os.environ


def operator(path: str) -> object:
    found: object = torch.cuda
    for name in path.split("."):
        found = getattr(found, name)
    return found
