"""One attention of one rank on fake CUDA tensors, ours and those of peers, counted alike; run in a `CudaProcess`.

flash-attn, which cannot be here, is one operator that is not looked into, for peers as for us.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import METHODS, Where, dsp
from dsp_plugin.rehearsal.cuda.device import rank_of
from dsp_plugin.rehearsal.cuda.recorder import Counts, Recorder, recording

Contender = Literal["ours", "yunchang", "deepspeed"]
# Of c10d's operators those that move something.
_MOVES = ("send", "recv_", "alltoall_base_", "alltoall_", "_allgather_base_", "allgather_", "allreduce_")
DIM = 64


@dataclass(frozen=True)
class Call:
    """A causal attention over ``tokens`` tokens in bf16 on ``size`` ranks, or a switch of `dsp`.

    Documents are of random lengths.
    """

    method: Literal["ulysses", "ring", "usp", "dsp"]
    size: int
    order: Literal["contiguous", "zigzag"] = "contiguous"
    tokens: int = 4096
    heads: int = 32
    kv_heads: int = 8
    documents: int = 1

    def shape(self, rank: int, heads: int) -> tuple[int, ...]:
        """[1, n, H, D] of a rank."""
        return 1, self.layout.sizes[rank], heads, DIM

    @property
    def borders(self) -> tuple[int, ...] | None:
        """Of the documents; None of one."""
        if self.documents == 1:
            return None
        return 0, *sorted(Random(0).sample(range(1, self.tokens), self.documents - 1)), self.tokens

    @property
    def layout(self) -> Layout:
        """As batches of Transformers are dealt."""
        return Layout.of_documents(self.order, self.tokens, self.size, self.borders)


@dataclass(frozen=True)
class Cost:
    """Forward and backward; traffic in shards of queries."""

    launches: tuple[int, int]
    attention: tuple[int, int]
    traffic: tuple[float, float]
    moves: tuple[int, int]


def cost(contender: Contender, call: Call) -> Cost | str:
    """Of a second pass of a rank in the middle; why there is none where it is refused or not asked for."""
    rank = call.size // 2 - 1
    with rank_of(rank, call.size):
        try:
            attend = _BUILT[contender](call, rank)
            with recording() as recorder:
                return _second(attend, call, rank, recorder)
        except NotImplementedError as error:
            return f"not counted: {error}"
        except Exception as error:
            return f"refuses: {type(error).__name__}: {' '.join(str(error).split())[:100]}"


def _second(attend: Callable[..., Tensor], call: Call, rank: int, recorder: Recorder) -> Cost:
    if call.method == "dsp":
        inputs = [_made((1, call.tokens // 64 // call.size, 64, call.heads * DIM))]
    else:
        inputs = [_made(call.shape(rank, heads)) for heads in (call.heads, call.kv_heads, call.kv_heads)]
    for _ in range(2):
        moves = Moves()
        with moves:
            recorder.take()
            out = attend(*inputs)
            forward, sent = recorder.take(), moves.count
            torch.autograd.grad(out, inputs, torch.empty_like(out))
            recorder.finish()
            backward = recorder.take()
    shard = inputs[0].nbytes

    def traffic(counts: Counts) -> float:
        return round(counts.traffic / shard, 1)

    return Cost(
        (forward.launches, backward.launches),
        (forward.attention, backward.attention),
        (traffic(forward), traffic(backward)),
        (sent, moves.count - sent),
    )


class Moves(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts collectives, and sends and receives each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d" and func.overloadpacket.__name__ in _MOVES
        return func(*args, **(kwargs or {}))


def _made(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)


def _ours(call: Call, rank: int) -> Callable[..., Tensor]:
    sizes = {"ulysses_size": 2, "ring_size": call.size // 2} if call.method == "usp" else {}
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method=call.method, size=call.size, **sizes))
    if call.method == "dsp":
        return lambda x: dsp.switch(x, 1, 2, length=call.tokens // 64, groups=groups)
    what = AttentionSpec(MaskSpec(causal=True, cu_seqlens=call.borders))
    where = Where(groups, call.layout)
    attention = METHODS[call.method].attention
    assert attention is not None
    return lambda q, k, v: attention(q, k, v, what=what, where=where)


def _yunchang(call: Call, rank: int) -> Callable[..., Tensor]:
    _flash_attn()
    import yunchang
    from yunchang.ulysses import UlyssesAttention

    if call.method == "dsp" or call.documents > 1 or call.tokens % call.size:
        raise NotImplementedError(
            "no switch of dims"
            if call.method == "dsp"
            else "its packed ring reads borders on the host"
            if call.documents > 1
            else "lengths must divide"
        )
    if call.method == "ulysses" and call.order != "contiguous":
        raise NotImplementedError("contiguous order only")
    if call.method == "ulysses":
        return _causal(UlyssesAttention(dist.group.WORLD))
    inner = 2 if call.method == "usp" else 1
    yunchang.set_seq_parallel_pg(inner, call.size // inner, rank, call.size)
    if call.method == "usp":
        return _causal(yunchang.LongContextAttention(ring_impl_type="zigzag"))
    return lambda q, k, v: yunchang.zigzag_ring_flash_attn_func(q, k, v, causal=True, group=dist.group.WORLD)


def _causal(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: attention(q, k, v, causal=True)


def _deepspeed(call: Call, rank: int) -> Callable[..., Tensor]:
    from deepspeed.sequence import layer

    if call.method != "ulysses" or call.order != "contiguous" or call.documents > 1 or call.tokens % call.size:
        raise NotImplementedError("Ulysses of one document in contiguous order, of a length that divides")
    # Its own wrapper of the same functions wants a launcher's environment.
    layer.dist = dist
    layer.groups._get_sequence_parallel_rank = lambda: rank
    attention = layer.DistributedAttention(Flash.apply, dist.group.WORLD, 2, 1)
    return lambda q, k, v: attention(q, k, v, 0)


_BUILT = {"ours": _ours, "yunchang": _yunchang, "deepspeed": _deepspeed}


@torch.library.custom_op("dsp_plugin_peers::_flash_attention_forward", mutates_args=())
def flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """flash-attn's: [B, n, H, D], and [B, H, n] in fp32."""
    raise NotImplementedError


@flash_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, n, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, n), dtype=torch.float32)


@torch.library.custom_op("dsp_plugin_peers::_flash_attention_backward", mutates_args=("dq", "dk", "dv"))
def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """flash-attn's, which writes where it is told to."""
    raise NotImplementedError


@flash_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    return None


class Flash(torch.autograd.Function):
    """flash-attn's function of whole sequences."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flash_forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        made = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        flash_backward(gradients[0], q, k, v, out, lse, *made)
        return made


def _flash_attn() -> None:
    """A package of that name, for a peer that imports it."""
    if "flash_attn" in sys.modules:
        return
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")

    def forward(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor, None, None]:
        return *flash_forward(q, k, v), None, None

    def backward(*arguments: Any) -> None:
        flash_backward(*arguments[:9])

    names: dict[str, Any] = {
        "_flash_attn_forward": forward,
        "_flash_attn_backward": backward,
        "_flash_attn_varlen_forward": forward,
        "_flash_attn_varlen_backward": backward,
    }
    vars(interface).update(names)
    vars(package).update(
        __version__="2.7.4",
        __path__=[],
        flash_attn_func=lambda q, k, v, **_: Flash.apply(q, k, v),
        flash_attn_interface=interface,
    )
    sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": interface}
    # What it scripts is counted by the operator, too; on a GPU TorchScript may fuse some.
    vars(torch.jit)["script"] = lambda function: function
    vars(torch.cuda)["get_device_name"] = lambda device=None: "NVIDIA H100"
