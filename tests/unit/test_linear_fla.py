"""Linear attention in the form that fla's kernels serve, with its naive operators in their place; and who is served.

The Triton kernels themselves run in tests/gpu/test_linear_gpu.py.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_plugin import UnsupportedError
from dsp_plugin.kernels import calls, linear_fla
from dsp_plugin.kernels.linear import DECAYS, linear_attention
from dsp_plugin.kernels.linear_fla import FlaForm, LongChunks, Operators, unusable
from dsp_plugin.kernels.linear_reference import token_recurrence

FLA = importlib.util.find_spec("fla")
pytestmark = pytest.mark.timeout(60)

BATCH, LENGTH, HEADS, QUERY_HEADS, KEY_DIM, VALUE_DIM = 2, 37, 4, 2, 6, 5
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@cache
def naive(folder: str) -> ModuleType:
    """``fla/ops/<folder>/naive.py``, by its path: the package around it imports Triton."""
    if FLA is None:
        pytest.skip("fla-core is not installed")
    (root,) = FLA.submodule_search_locations or ()
    spec = importlib.util.spec_from_file_location(f"naive_{folder}", Path(root, "ops", folder, "naive.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, **states: Any) -> Any:
    g = torch.zeros(v.shape[:3]) if g is None else g
    return naive("simple_gla").naive_recurrent_simple_gla(q, k, v, g, **states)


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, **states: Any) -> Any:
    return naive("gla").naive_recurrent_gla(q * scale * q.shape[-1] ** 0.5, k, v, g, **states)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, scale: float, **states: Any) -> Any:
    by_head = (x.transpose(1, 2) for x in (q * scale * q.shape[-1] ** 0.5, k, v, beta))
    out, state = naive("delta_rule").delta_rule_recurrence(*by_head, **states)
    return out.transpose(1, 2), state


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **states: Any) -> Any:
    return naive("gated_delta_rule").naive_recurrent_gated_delta_rule(q, k, v, beta, g, **states)


def kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **states: Any) -> Any:
    return naive("kda").naive_recurrent_kda(q, k, v, g, beta, **states)


NAIVE = Operators(simple_gla, gla, delta_rule, gated_delta_rule, kda)


@pytest.fixture
def naive_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla is usable here, and is its naive operators."""
    monkeypatch.setattr(linear_fla, "unusable", lambda *args: None)
    monkeypatch.setattr(linear_fla, "operators", lambda: NAIVE)


def example(decay: str, length: int = LENGTH) -> dict[str, Tensor | None]:
    """Random inputs by name."""
    tokens = (BATCH, length)
    gates = {"head": (HEADS,), "scalar": (*tokens, HEADS), "gated-delta": (*tokens, HEADS)}
    gates |= dict.fromkeys(("vector", "kda"), (*tokens, HEADS, KEY_DIM))
    delta = decay in ("delta", "gated-delta", "kda")
    k = torch.randn(*tokens, QUERY_HEADS, KEY_DIM)
    inputs = {
        "q": torch.randn(*tokens, QUERY_HEADS, KEY_DIM),
        "k": F.normalize(k, dim=-1) if delta else k,
        "v": torch.randn(*tokens, HEADS, VALUE_DIM),
        "g": -torch.rand(gates[decay]) / 2 if decay in gates else None,
        "beta": torch.rand(*tokens, HEADS) if delta else None,
        "initial_state": torch.randn(BATCH, HEADS, KEY_DIM, VALUE_DIM),
    }
    return {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}


def differentiated(outputs: Any, inputs: dict[str, Tensor | None]) -> list[Tensor]:
    """Outputs, and their gradients under fixed random directions."""
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    wanted = [x for x in inputs.values() if x is not None]
    gradients = torch.autograd.grad(outputs, wanted, directions, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if d is None else d for x, d in zip(wanted, gradients, strict=True))]


@pytest.mark.usefixtures("naive_operators")
@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 20, LENGTH)], ids=["one document", "packed"])
@pytest.mark.parametrize("decay", DECAYS)
def test_equals_the_oracle_with_naive_operators(decay: str, cu_seqlens: tuple[int, ...] | None) -> None:
    torch.manual_seed(len(decay))
    inputs = example(decay)
    with calls() as made:
        outputs = linear_attention(**inputs, scale=0.3, cu_seqlens=cu_seqlens, output_final_state=True, kernel="fla")
        found = differentiated(outputs, inputs)
    assert made.counts == {("fla", "forward"): 1, ("fla", "backward"): 1}
    expected = differentiated(token_recurrence(**inputs, scale=0.3, cu_seqlens=cu_seqlens), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("naive_operators")
@pytest.mark.parametrize("length", [1, 64, 65])
def test_any_length_with_naive_operators(length: int) -> None:
    torch.manual_seed(length)
    inputs = example("gated-delta", length)
    found = differentiated(linear_attention(**inputs, output_final_state=True), inputs)
    for ours, theirs in zip(found, differentiated(token_recurrence(**inputs), inputs), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-4)


GATES = {
    "simple_gla": ["g"],
    "gla": ["g"],
    "delta_rule": ["beta"],
    "gated_delta_rule": ["g", "beta"],
    "kda": ["g", "beta"],
}


@pytest.mark.parametrize("name", Operators._fields)
def test_installed_operators_have_the_names_and_arguments_that_are_used(name: str) -> None:
    """Read from their source: it needs Triton to be imported."""
    (root,) = FLA.submodule_search_locations if FLA else pytest.skip("fla-core is not installed")
    assert f"chunk_{name}" in Path(root, "ops", name, "__init__.py").read_text()
    tree = ast.parse(Path(root, "ops", name, "chunk.py").read_text())
    (function,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == f"chunk_{name}")
    arguments = [argument.arg for argument in function.args.args]
    assert arguments[:3] == ["q", "k", "v"]
    assert {*GATES[name], "scale", "initial_state", "output_final_state"} <= set(arguments)


def test_operators_are_taken_from_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    linear_fla.operators.cache_clear()
    modules = {f"fla.ops.{name}": SimpleNamespace(**{f"chunk_{name}": name}) for name in Operators._fields}
    monkeypatch.setattr(linear_fla.importlib, "import_module", modules.__getitem__)
    found = linear_fla.operators()
    linear_fla.operators.cache_clear()
    assert found == Operators._fields


@pytest.mark.parametrize("decay", ["none", "vector", "kda"])
def test_operators_get_half_precision_and_fp32_gates_and_states(decay: str) -> None:
    seen: dict[str, torch.dtype] = {}

    def spying(q: Tensor, k: Tensor, v: Tensor, *, scale: float, output_final_state: bool, **rest: Any) -> Any:
        named = {"q": q, "k": k, "v": v, **rest}
        seen.update({name: x.dtype for name, x in named.items() if isinstance(x, Tensor)})
        shape = v.shape[0], v.shape[2], q.shape[-1], v.shape[-1]
        return torch.zeros_like(v), torch.zeros(shape) if output_final_state else None

    inputs = example(decay)
    halves = {name: None if x is None else x.detach().bfloat16() for name, x in inputs.items()}
    del halves["initial_state"]
    form = FlaForm(LongChunks(LENGTH), 1.0, Operators(*[spying] * len(Operators._fields)))
    x = form.cut(linear_fla.Inputs(**halves))
    written = form.write(x)
    read = form.read(x, written.carry)
    assert {seen[name] for name in "qkv"} == {torch.bfloat16}
    assert {dtype for name, dtype in seen.items() if name not in "qkv"} <= {torch.float32}
    assert {x.dtype for x in (*written[:2], *read) if x is not None} == {torch.float32}


@pytest.mark.parametrize(
    ("length", "starts", "size", "count"),
    [
        (5000, (), 5000, 1),
        (0, (), 1, 1),
        (4096, (3072,), 1024, 4),
        (1500, (500, 1000), 512, 3),
        # Chunks of 1024, 512 and 256 would waste more than a quarter.
        (1000, (600,), 128, 9),
        # However much is wasted, they get no shorter than those of the form in plain torch.
        (400, (100, 110, 120), 64, 9),
        (12, (4, 8), 4, 3),
    ],
)
def test_chunks_are_as_long_as_documents_fill_them(length: int, starts: tuple[int, ...], size: int, count: int) -> None:
    chunks = LongChunks(length, starts)
    assert (chunks.size, chunks.count) == (size, count)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hopper GPU, with fla and a Triton that works there."""
    linear_fla._version.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(linear_fla, "operators", lambda: NAIVE)
    monkeypatch.setattr(linear_fla.importlib.metadata, "version", lambda name: "3.7.1")
    yield
    linear_fla._version.cache_clear()


@pytest.mark.usefixtures("naive_operators")
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_auto_does_without_where_dtypes_differ(name: str) -> None:
    inputs = example("delta")
    one = inputs[name]
    assert one is not None
    with calls() as made:
        linear_attention(**{**inputs, name: one.bfloat16()})
    assert made.counts == {("chunked", "forward"): 1}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((CPU, torch.bfloat16), "fla runs on cuda, the tensors are on cpu"),
        ((CUDA, torch.float32), "fla computes in bfloat16 or float16, the tensors are torch.float32"),
        ((CUDA, torch.bfloat16, 272, 64), "key dim 272 exceeds 256"),
        ((CUDA, torch.bfloat16, 64, 33), "fla needs even head dims, these are 64 and 33"),
        ((CUDA, torch.bfloat16, 128, 512), None),
        ((CUDA, torch.float16), None),
    ],
)
def test_tensors_that_fla_does_not_serve(arguments: tuple[Any, ...], reason: str | None) -> None:
    assert unusable(*arguments) == reason


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [
        ((7, 5), "3.7.1", r"needs compute capability \(8, 0\), the device has \(7, 5\)"),
        ((9, 0), "3.6.0", r"triton 3\.6\.0 computes wrong gradients on Hopper.*install triton>=3\.7\.1"),
        ((8, 0), "3.6.0", None),
        ((9, 0), "3.3.1", None),
    ],
)
def test_machines_that_fla_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: str, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(linear_fla.importlib.metadata, "version", lambda name: triton)
    found = unusable(CUDA, torch.bfloat16)
    assert (found is None) if reason is None else re.search(reason, found or "")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'fla'", name="fla"), "package fla-core is not installed"),
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "importing fla.ops failed: No module named"),
        (RuntimeError("0 active drivers"), "importing fla.ops failed: 0 active drivers"),
    ],
)
def test_why_fla_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def failing(name: str) -> ModuleType:
        raise error

    linear_fla.operators.cache_clear()
    monkeypatch.setattr(linear_fla.importlib, "import_module", failing)
    found = linear_fla.operators()
    linear_fla.operators.cache_clear()
    assert isinstance(found, str)
    assert found.startswith(reason)


def test_a_forced_kernel_that_is_not_usable_is_refused_and_auto_does_without() -> None:
    inputs = example("scalar")
    with pytest.raises(UnsupportedError, match=r"kernel='fla': fla runs on cuda, the tensors are on cpu\. Use 'auto'"):
        linear_attention(**inputs, kernel="fla")
    with calls() as made:
        linear_attention(**inputs)
    assert made.counts == {("chunked", "forward"): 1}


def test_importing_the_package_and_calling_on_cpu_does_not_import_fla() -> None:
    script = (
        "import sys, torch; from dsp_plugin.kernels.linear import linear_attention;"
        "x = torch.randn(1, 3, 1, 4); linear_attention(x, x, x); print([m for m in sys.modules if m.startswith('fla')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.stdout.strip() == "[]", done.stderr
