"""One attention of one rank on fake CUDA tensors: the cases of the hot path's tests, run in a `cuda_worker`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import METHODS, Where, dsp
from dsp_plugin.rehearsal.cuda import device
from dsp_plugin.rehearsal.cuda.recorder import Counts, recording
from dsp_plugin.training.recompute import keep_attention


@dataclass(frozen=True)
class Case:
    """What to run.

    Attributes:
        method: one of `METHODS`.
        mask: ``full``, ``causal``, ``window``, or ``packed`` into ``documents`` documents.
        order: of tokens; ``documents`` is zigzag, every document by itself.
        recompute: ``full`` checkpoints the attention, ``keep_attention`` answers it from a tape.
        tokens: of the whole sequence.
        kind: of linear attention, one of `DECAYS`; ``exchange`` is how its states travel.
        ulysses: ranks on the inner axis of USP.
        value_dim: of each head, where it is not ``head_dim``.
        rounds: of heads.
    """

    method: str
    size: int
    rank: int = 0
    mask: Literal["full", "causal", "window", "packed"] = "causal"
    order: Literal["contiguous", "zigzag", "striped", "documents"] = "contiguous"
    recompute: Literal["none", "full", "keep_attention"] = "none"
    dtype: str = "bfloat16"
    tokens: int = 4096
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    documents: int = 2
    dropout: float = 0.0
    ulysses: int = 2
    decay: str = "scalar"
    exchange: str = "allgather"
    value_dim: int | None = None
    rounds: int = 1

    def __str__(self) -> str:
        words = [self.method, self.mask, self.order, f"P{self.size}", f"rank{self.rank}"]
        if self.method == "lasp":
            words += [self.decay, self.exchange]
        words += [] if self.recompute == "none" else [self.recompute]
        words += [] if self.dtype == "bfloat16" else [self.dtype]
        return "-".join(words)


class Pass(NamedTuple):
    """What one forward pass and its backward pass would cost."""

    forward: Counts
    backward: Counts

    def all(self, name: str) -> list[str]:
        """Of one kind of fault, those of both."""
        return [*getattr(self.forward, name), *getattr(self.backward, name)]


class Run(NamedTuple):
    """A first pass, which may build what is kept, and a second one.

    Attributes:
        shard: bytes of this rank's queries, in which traffic is told.
    """

    first: Pass
    second: Pass
    shard: int


def run(case: Case) -> Run:
    """Run it twice."""
    passes = _passes(case, 2)
    shard = case.batch * case.tokens // case.size * case.heads * case.head_dim * getattr(torch, case.dtype).itemsize
    return Run(*passes, shard)


def world(case: Case) -> list[Pass]:
    """The first pass of every rank of the world, one rank after the other."""
    return [pass_ for rank in range(case.size) for pass_ in _passes(replace(case, rank=rank), 1)]


def _passes(case: Case, count: int) -> list[Pass]:
    with device.rank_of(case.rank, case.size):
        groups = SequenceParallelGroups.build(_config(case))
        with recording() as recorder:
            return [_passed(case, groups, recorder) for _ in range(count)]


def _config(case: Case) -> SequenceParallelConfig:
    sizes = {"usp": {"ulysses_size": case.ulysses, "ring_size": case.size // case.ulysses}}
    return SequenceParallelConfig(method=case.method, size=case.size, **sizes.get(case.method, {}))


def borders(case: Case) -> tuple[int, ...]:
    """Of documents of unlike lengths."""
    weights = [1 + index * 7 % 5 for index in range(case.documents)]
    ends = [sum(weights[: index + 1]) * case.tokens // sum(weights) for index in range(case.documents)]
    return (0, *ends)


def _passed(case: Case, groups: SequenceParallelGroups, recorder: Any) -> Pass:
    inputs = _inputs(case)
    attend = _attention(case, groups)
    recorder.take()
    if case.recompute == "none":
        out = attend(*inputs)
    else:
        keeping = {"context_fn": keep_attention} if case.recompute == "keep_attention" else {}
        # The states of CUDA's generators, which are on the host, are not the library's.
        out = checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False, **keeping)
    forward = recorder.take()
    dout = torch.empty_like(out)
    wanted = [x for x in inputs if x is not None]
    torch.autograd.grad(out, wanted, dout)
    recorder.finish()
    return Pass(forward, recorder.take())


def _inputs(case: Case) -> list[Tensor | None]:
    dtype, layout = getattr(torch, case.dtype), _layout(case)
    n = layout.sizes[case.rank]

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=True)

    if case.method == "dsp":
        frames = case.tokens // 64 // case.size
        return [tensor(case.batch, frames, 64, case.heads * case.head_dim)]
    keys = (case.batch, n, case.kv_heads, case.head_dim)
    queries = (case.batch, n, case.heads, case.head_dim)
    if case.method != "lasp":
        return [tensor(*queries), tensor(*keys), tensor(*keys[:3], case.value_dim or case.head_dim)]
    gates = {
        "none": (None, None),
        "head": ((case.heads,), None),
        "scalar": ((case.batch, n, case.heads), None),
        "vector": (queries, None),
        "delta": (None, queries[:3]),
        "gated-delta": (queries[:3], queries[:3]),
        "kda": (queries, queries[:3]),
    }[case.decay]
    return [
        *(tensor(*keys), tensor(*keys), tensor(*queries)),
        *(None if shape is None else tensor(*shape, dtype=torch.float32) for shape in gates),
    ]


def _layout(case: Case) -> Layout:
    if case.order == "documents":
        return Layout("zigzag", case.tokens, case.size, documents=borders(case))
    return Layout(case.order, case.tokens, case.size)


def _attention(case: Case, groups: SequenceParallelGroups) -> Any:
    where = Where(groups, _layout(case))
    packed = borders(case) if case.mask == "packed" else None
    causal = case.mask != "full"
    attention = METHODS[case.method].attention
    if case.method == "dsp":
        return lambda x: dsp.switch(x, 1, 2, length=case.tokens // 64, groups=groups)
    assert attention is not None
    if case.method == "lasp":
        # By torch's operators: fla's, where it is installed, are Triton kernels that ask for a driver.
        told = {"kernel": "chunked", "exchange": case.exchange}
        return lambda *x: attention(*x, where=where, causal=causal, cu_seqlens=packed, **told)
    window = (case.tokens // 3, 0) if case.mask == "window" else None
    what = AttentionSpec(
        MaskSpec(causal=causal, window=window, cu_seqlens=packed),
        dropout_p=case.dropout,
        dropout_seed=1 if case.dropout else None,
    )
    in_rounds = {} if case.rounds == 1 else {"attention_rounds": case.rounds}
    return lambda q, k, v: attention(q, k, v, what=what, where=where, **in_rounds)
