"""Linear attention inside chunks by flash-linear-attention's Triton kernels (package ``fla-core``), found at run time.

A shard is one chunk, however long: fla cuts it further by itself. Packed documents get chunks of their own here as in
`linear_chunks`, and not by fla's ``cu_seqlens``, which knows one sequence only, not a batch.

Without the delta rule, what a chunk writes to the state and how its tokens read it are two products that torch does;
fla computes what tokens get from their own chunk, while states travel. With it, fla computes everything in one call
that also takes the columns of the identity for a state: what becomes of them are the reads and the transition.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from dsp_plugin.kernels.linear_chunks import CHUNK, Chunked, Chunks, Inputs, Read, Written
from dsp_plugin.kernels.merge import accumulation_dtype

DTYPES = (torch.bfloat16, torch.float16)
MAX_KEY_DIM = 256
_MIN_CAPABILITY = (8, 0)
_LONGEST = 1024
_WASTE = 0.25

Operator = Callable[..., tuple[Tensor, Tensor | None]]


class Operators(NamedTuple):
    """fla's ``chunk_...`` functions: of q, k and v ``[B, n, H, D]`` and gates, giving the output and the last state."""

    simple_gla: Operator
    gla: Operator
    delta_rule: Operator
    gated_delta_rule: Operator
    kda: Operator


@lru_cache(maxsize=1)
def operators() -> Operators | str:
    """The functions, or why they cannot be had. Imports Triton: only for where there is a CUDA device."""
    try:
        modules = {name: importlib.import_module(f"fla.ops.{name}") for name in Operators._fields}
        return Operators(**{name: getattr(module, f"chunk_{name}") for name, module in modules.items()})
    except ModuleNotFoundError as error:
        if error.name == "fla":
            return "package fla-core is not installed"
        return f"importing fla.ops failed: {error}"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"importing fla.ops failed: {error}"


def version() -> str | None:
    """Version of flash-linear-attention; None if it is not installed."""
    return _version("fla-core", "flash-linear-attention")


# Asked at every call; the metadata of packages is read from files.
@lru_cache(maxsize=4)
def _version(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def unusable(device: torch.device, dtype: torch.dtype, key_dim: int = 0, value_dim: int = 0) -> str | None:
    """Why fla cannot serve such tensors in this process; None if it can."""
    if device.type != "cuda":
        return f"fla runs on cuda, the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "no cuda device"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"fla needs compute capability {_MIN_CAPABILITY}, the device has {capability}"
    if dtype not in DTYPES:
        return f"fla computes in bfloat16 or float16, the tensors are {dtype}"
    if key_dim > MAX_KEY_DIM:
        return f"key dim {key_dim} exceeds {MAX_KEY_DIM}"
    if key_dim % 2 or value_dim % 2:
        return f"fla needs even head dims, these are {key_dim} and {value_dim}"
    found = operators()
    if isinstance(found, str):
        return found
    triton = _version("triton")
    if capability[0] == 9 and triton is not None and Version("3.4.0") <= Version(triton) < Version("3.7.1"):
        return f"triton {triton} computes wrong gradients on Hopper (fla issue 640): install triton>=3.7.1"
    return None


def form(chunks: Chunks, scale: float, inputs: Inputs) -> FlaForm | None:
    """The form for the inputs; None where fla is `unusable` for them, or q, k and v differ in dtype."""
    if len({x.dtype for x in (inputs.q, inputs.k, inputs.v)}) > 1:
        return None
    if unusable(inputs.q.device, inputs.q.dtype, inputs.k.shape[-1], inputs.v.shape[-1]) is not None:
        return None
    found = operators()
    assert not isinstance(found, str), found
    return FlaForm(chunks, scale, found)


@dataclass(frozen=True)
class LongChunks(Chunks):
    """All local tokens in one chunk; with packed documents in chunks as long as their padding allows."""

    @cached_property
    def size(self) -> int:
        """C."""
        if not self.starts:
            return max(self.length, 1)
        documents = [stop - start for start, stop in pairwise(sorted({0, *self.starts, self.length}))]
        size = min(_LONGEST, 1 << (max(documents) - 1).bit_length())
        while size > CHUNK and sum(-length % size for length in documents) > _WASTE * self.length:
            size //= 2
        return size


class FlaForm:
    """The work inside chunks by fla.

    q, k and v stay in the dtype they come in, q is not scaled, and the ``sums`` of `Chunked` are the log decays
    themselves: fla scales and adds up. Summaries, ``intra`` and ``reads`` are fp32.
    """

    name = "fla"

    def __init__(self, chunks: Chunks, scale: float, operators: Operators) -> None:
        self.chunks: Chunks = LongChunks(chunks.length, chunks.starts)
        self._scale, self._operators = scale, operators

    def cut(self, inputs: Inputs) -> Chunked:
        """The inputs in chunks."""
        q, k, v, g, beta = inputs
        sharers = v.shape[2] // q.shape[2]
        q, k = (self.chunks.split(x).to(x.dtype).repeat_interleave(sharers, 1) for x in (q, k))
        v_chunks = self.chunks.split(v)
        wide = v_chunks.dtype
        decays = None
        if g is not None and g.dim() == 1:
            # Where there is no token, nothing decays either.
            decays = g.to(wide).view(1, -1, 1, 1, 1) * self.chunks.filled(v_chunks)
            decays = decays.expand(v.shape[0], -1, -1, -1, -1)
        elif g is not None:
            decays = self.chunks.split(g if g.dim() == 4 else g.unsqueeze(-1)).to(wide)
        weights = None if beta is None else self.chunks.split(beta.unsqueeze(-1)).to(wide)
        return Chunked(q, k, v_chunks.to(v.dtype), decays, weights)

    def write(self, x: Chunked) -> Written:
        """What each chunk does to the state; for delta rules also what `read` returns."""
        wide = accumulation_dtype(x.v.dtype)
        if x.beta is None:
            k_end, whole = x.k.to(wide), None
            if x.sums is not None:
                # Summed up from the end, where the small ones are: differences of sums from the start would cancel.
                k_end = k_end * (x.sums.flip(-2).cumsum(-2).flip(-2) - x.sums).exp()
                whole = x.sums.sum(-2, keepdim=True).mT.exp()
            return Written(whole, k_end.mT @ x.v.to(wide), ())
        k_dim, v_dim = x.k.shape[-1], x.v.shape[-1]
        nothing = torch.zeros(k_dim, v_dim, dtype=wide, device=x.v.device)
        identity = torch.eye(k_dim, dtype=wide, device=x.v.device)
        columns = torch.cat([x.v, torch.zeros_like(x.k)], -1)
        out, state = self._run(x, columns, torch.cat([nothing, identity], -1))
        assert state is not None, "one entered"
        intra, reads = out.split([v_dim, k_dim], -1)
        own, transition = state.split([v_dim, k_dim], -1)
        return Written(transition, own, (intra, reads))

    def read(self, x: Chunked, carry: tuple[Tensor, ...]) -> Read:
        """What each token gets from its own chunk, and how it reads the state."""
        if carry:
            return Read(*carry)
        intra, _ = self._run(x, x.v, None)
        reads = x.q.to(intra.dtype) * self._scale
        return Read(intra, reads if x.sums is None else reads * x.sums.cumsum(-2).exp())

    def _run(self, x: Chunked, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One fla call, chunks taken for sequences.

        Args:
            v: ``[B, H, N, C, V]``.
            state: ``[K, V]``, which enters every chunk.

        Returns:
            The output ``[B, H, N, C, V]``, and, if a state entered, the ``[B, H, N, K, V]`` that leave.
        """
        batch, heads, count = v.shape[:3]
        gates = {}
        if x.sums is not None:
            by_key_dim = x.sums.shape[-1] > 1
            gates["g"] = _sequences(x.sums if by_key_dim else x.sums.squeeze(-1))
        if x.beta is not None:
            gates["beta"] = _sequences(x.beta.squeeze(-1))
        entering = None if state is None else state.expand(batch * count, heads, -1, -1).contiguous()
        out, leaving = self._operator(x)(
            *(_sequences(part) for part in (x.q, x.k, v)),
            **gates,
            scale=self._scale,
            initial_state=entering,
            output_final_state=state is not None,
        )
        out = out.unflatten(0, (batch, count)).permute(0, 3, 1, 2, 4).to(accumulation_dtype(v.dtype))
        if leaving is not None:
            leaving = leaving.unflatten(0, (batch, count)).transpose(1, 2)
        return out, leaving

    def _operator(self, x: Chunked) -> Operator:
        by_key_dim = x.sums is not None and x.sums.shape[-1] > 1
        if x.beta is None:
            return self._operators.gla if by_key_dim else self._operators.simple_gla
        if x.sums is None:
            return self._operators.delta_rule
        return self._operators.kda if by_key_dim else self._operators.gated_delta_rule


def _sequences(x: Tensor) -> Tensor:
    """``[B, H, N, C, ...]`` to ``[B N, C, H, ...]``."""
    return x.movedim(1, 3).flatten(0, 1)
