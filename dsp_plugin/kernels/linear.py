"""Linear attention, `linear_attention`, and its one autograd function, which shards run with an exchange of states.

    S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale * q_t S_t

with ``beta`` for delta rules only (else ``S_t = diag(exp g_t) S_{t-1} + k_t v_t^T``), and ``g`` where states decay.
This covers lightning attention and RetNet (a decay per head), Mamba-2's SSD form and simple GLA (a decay per token),
GLA (per token and key dim), DeltaNet, Gated DeltaNet and KDA.

A rank's tokens are one stretch of the sequence. Its summary (see `linear_state`) goes to the other ranks while the work
inside chunks runs; the state that comes back is kept, so the backward pass exchanges gradients of states and nothing
else. All other intermediates are computed again there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dsp_plugin.derivatives import once_differentiable
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.kernels import counter, linear_fla
from dsp_plugin.kernels.linear_bidirectional import bidirectional
from dsp_plugin.kernels.linear_chunks import Chunked, ChunkedForm, Chunks, Inputs, Read, Written
from dsp_plugin.kernels.linear_state import scan, transition_gradient, transposed
from dsp_plugin.mask import document_starts

DECAYS = ("none", "head", "scalar", "vector", "delta", "gated-delta", "kda")
LINEAR_KERNELS = ("auto", "fla", "chunked")


class Form(Protocol):
    """The work inside chunks: see `linear_chunks.ChunkedForm`."""

    name: str
    chunks: Chunks

    def cut(self, inputs: Inputs) -> Chunked: ...

    def write(self, x: Chunked) -> Written: ...

    def read(self, x: Chunked, carry: tuple[Tensor, ...]) -> Read: ...


class Arriving(Protocol):
    """A state on its way."""

    def wait(self) -> Tensor | None:
        """What enters this rank's stretch ``[B, H, K, V]``; None where nothing does."""

    @property
    def kept(self) -> Tensor | None:
        """After `wait`: what the exchange wants to have back for the backward pass."""


class StateExchange(Protocol):
    """How the ranks that share a sequence tell each other what enters their stretches."""

    @property
    def first(self) -> bool:
        """Whether this rank's stretch is the first of the sequence."""

    def forward(self, transition: Tensor | None, state: Tensor) -> Arriving:
        """Post this rank's summary, to the ranks after it."""

    def backward(self, transition: Tensor | None, gradient: Tensor, kept: Tensor | None) -> Arriving:
        """Post the summary of its gradients, to the ranks before it. ``transition`` is transposed already."""


class _Nothing:
    kept: Tensor | None = None

    def wait(self) -> None:
        return None


class Alone:
    """The exchange of one rank that holds the whole sequence."""

    first = True

    def forward(self, transition: Tensor | None, state: Tensor) -> Arriving:
        return _Nothing()

    def backward(self, transition: Tensor | None, gradient: Tensor, kept: Tensor | None) -> Arriving:
        return _Nothing()


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    cu_seqlens: Iterable[int] | Tensor | None = None,
    output_final_state: bool = False,
    kernel: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention over a whole sequence; in a module that `parallelize` has sharded, over a sharded one.

    Args:
        q: ``[B, n, Hk, K]``.
        k: ``[B, n, Hk, K]``. Delta rules want unit length.
        v: ``[B, n, H, V]``, Hk a divisor of H.
        g: log decays, not above 0: ``[H]``, ``[B, n, H]`` or ``[B, n, H, K]``; None for no decay.
        beta: ``[B, n, H]``, how much of a value the delta rule replaces; None for no delta rule.
        initial_state: ``[B, H, K, V]``, before the first token. Sharded, every rank passes the same.
        scale: of the output; ``K ** -0.5`` when None.
        causal: False lets every token see all of its document; for no decay and no delta rule.
        cu_seqlens: borders of packed documents, ``(0, ..., L)``, in global positions; states do not pass them.
        output_final_state: also return the state after the last token (sharded, after this rank's last).
        kernel: ``fla`` for flash-linear-attention's Triton kernels on CUDA, ``chunked`` for plain torch, or ``auto``.

    Returns:
        ``[B, n, H, V]`` in the dtype of ``v``; with ``output_final_state`` also ``[B, H, K, V]`` in fp32.

    Raises:
        SequenceParallelConfigError: shapes do not fit each other.
        UnsupportedError: not causal with a decay, a delta rule or states; or the kernel cannot run here.
    """
    tensors = (q, k, v)
    if has_torch_function(tensors):
        result: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            linear_attention,
            tensors,
            q,
            k,
            v,
            g,
            beta,
            initial_state,
            scale=scale,
            causal=causal,
            cu_seqlens=cu_seqlens,
            output_final_state=output_final_state,
            kernel=kernel,
        )
        return result
    inputs = Inputs(q, k, v, g, beta)
    check(inputs, initial_state, causal=causal, output_final_state=output_final_state, kernel=kernel)
    borders = document_starts(cu_seqlens, q.shape[1])
    if not causal:
        return bidirectional(q, k, v, _scale(q, scale), (0, *borders, q.shape[1]))
    out, state = attend(inputs, initial_state, Alone(), scale=scale, starts=borders, kernel=kernel)
    return (out, state) if output_final_state else out


def attend(
    inputs: Inputs,
    initial_state: Tensor | None,
    exchange: StateExchange,
    *,
    scale: float | None,
    starts: tuple[int, ...],
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """One rank's part of causal linear attention.

    Args:
        inputs: of this rank's tokens, checked.
        starts: local offsets at which documents start, see `Chunks`.

    Returns:
        The output ``[B, n, H, V]``, and the state after this rank's last token.
    """
    call = _Call(Chunks(inputs.q.shape[1], starts), _scale(inputs.q, scale), exchange, kernel)
    # States are fp32 whatever the layers around them compute in.
    with torch.autocast(inputs.q.device.type, enabled=False):
        out, state = _LinearAttention.apply(call, initial_state, *inputs)
    return out, state


def decay_of(g: Tensor | None, beta: Tensor | None) -> str:
    """Which of `DECAYS` these gates are."""
    gate = "none" if g is None else {1: "head", 3: "scalar", 4: "vector"}[g.dim()]
    if beta is None:
        return gate
    return {"none": "delta", "vector": "kda"}.get(gate, "gated-delta")


def check(inputs: Inputs, initial_state: Tensor | None, *, causal: bool, output_final_state: bool, kernel: str) -> None:
    """Refuse what does not fit, alike on every rank.

    Raises:
        SequenceParallelConfigError: shapes.
        UnsupportedError: what is not defined, or a kernel that cannot run.
    """
    q, k, v, g, beta = inputs
    named = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state}
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items() if x is not None)
    fits = q.dim() == v.dim() == 4 and q.shape == k.shape and q.shape[:2] == v.shape[:2] and _divides(q, v)
    if fits:
        batch, n, heads, v_dim = v.shape
        k_dim = q.shape[-1]
        gates = ((heads,), (batch, n, heads), (batch, n, heads, k_dim))
        fits = (g is None or tuple(g.shape) in gates) and (beta is None or beta.shape == (batch, n, heads))
        fits = fits and (initial_state is None or initial_state.shape == (batch, heads, k_dim, v_dim))
    if not fits:
        raise SequenceParallelConfigError(
            setting="linear attention inputs",
            value=shapes,
            why="expected q and k [B, n, Hk, K], v [B, n, H, V] with Hk a divisor of H, g [H], [B, n, H] or "
            "[B, n, H, K], beta [B, n, H], initial_state [B, H, K, V]",
            remedy="bring the tensors into these shapes; sharded, every one but g [H] and initial_state holds the "
            "rank's tokens",
        )
    if not causal and (g is not None or beta is not None or initial_state is not None or output_final_state):
        raise UnsupportedError(
            setting="causal",
            value=False,
            why=f"with decay {decay_of(g, beta)!r} or states the order of tokens matters, so only causal attention is "
            "defined",
            remedy="drop g, beta, initial_state and output_final_state, or set causal=True",
        )
    if kernel not in LINEAR_KERNELS:
        raise SequenceParallelConfigError(
            setting="kernel",
            value=kernel,
            why=f"kernels of linear attention are {', '.join(LINEAR_KERNELS)}",
            remedy="use 'auto'",
        )
    unusable = linear_fla.unusable(q.device, q.dtype, q.shape[-1], v.shape[-1])
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        unusable = unusable or f"it takes one dtype, and q is {q.dtype}, k {k.dtype} and v {v.dtype}"
    if kernel == "fla" and unusable is not None:
        raise UnsupportedError(setting="kernel", value="fla", why=unusable, remedy="use 'auto' or 'chunked'")


def _divides(q: Tensor, v: Tensor) -> bool:
    return q.shape[2] > 0 and v.shape[2] % q.shape[2] == 0


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


@dataclass(frozen=True)
class _Call:
    """What a call is told beyond its tensors."""

    chunks: Chunks
    scale: float
    exchange: StateExchange
    kernel: str

    def form(self, inputs: Inputs) -> Form:
        fla = linear_fla.form(self.chunks, self.scale, inputs) if self.kernel != "chunked" else None
        return ChunkedForm(self.chunks, self.scale) if fla is None else fla


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, initial_state: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        form = call.form(inputs)
        counter.record(form.name, "forward")
        x = form.cut(inputs)
        written = form.write(x)
        local = scan(written.transition, written.state, form.chunks.first)
        start = None if initial_state is None or not call.exchange.first else initial_state.to(local.state.dtype)
        arriving = call.exchange.forward(local.transition, local.left_by(start))
        read = form.read(x, written.carry)
        arrived = arriving.wait()
        entering = start if call.exchange.first else arrived
        out = read.intra + read.reads @ local.entered_by(entering)
        ctx.call, ctx.started = call, initial_state is not None
        ctx.device_type = inputs.v.device.type
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(entering, arriving.kept, *tensors)
        return form.chunks.join(out).to(inputs.v.dtype).contiguous(), local.left_by(entering)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dleaving: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(ctx.device_type, enabled=False):
            return _gradients(ctx, dout, dleaving)


def _gradients(ctx: Any, dout: Tensor | None, dleaving: Tensor | None) -> tuple[Tensor | None, ...]:
    call: _Call = ctx.call
    entering, kept, *saved = ctx.saved_tensors
    leaves = [None if x is None else x.detach().requires_grad_() for x in saved]
    inputs = Inputs(*leaves)  # type: ignore[arg-type]
    form = call.form(inputs)
    counter.record(form.name, "backward")
    with torch.enable_grad():
        x = form.cut(inputs)
        written = form.write(x)
        carry = tuple(part.detach().requires_grad_() for part in written.carry)
        read = form.read(x, carry)
    transition, starts = written.transition, form.chunks.first
    wide = written.state.dtype
    dout = torch.zeros_like(inputs.v) if dout is None else dout
    dchunks = form.chunks.split(dout).to(read.intra.dtype)

    with torch.no_grad():
        gradients = scan(transposed(transition), read.reads.mT @ dchunks, starts, reverse=True)
        dleaving = None if dleaving is None else dleaving.to(wide)
        arriving = call.exchange.backward(gradients.transition, gradients.left_by(dleaving), kept)
        # While they travel: the part of the graph that no gradient of a later rank reaches.
        states = scan(transition, written.state, starts).entered_by(entering)
        dreads = dchunks @ states.mT
    middle = [x.q, x.k, x.v, *((x.sums,) if x.sums is not None else ()), *carry]
    passed = torch.autograd.grad((read.intra, read.reads), middle, (dchunks, dreads), allow_unused=True)
    arrived = arriving.wait()
    with torch.no_grad():
        if arrived is not None:
            dleaving = arrived if dleaving is None else dleaving + arrived
        dstates = gradients.entered_by(dleaving)
        outer: list[tuple[Tensor, Tensor | None]] = [(written.state, dstates)]
        if transition is not None:
            outer.append((transition, transition_gradient(transition, dstates, states)))
    outer += zip(middle[: len(middle) - len(carry)], passed, strict=False)
    outer += zip(written.carry, passed[len(middle) - len(carry) :], strict=True)
    reached = [(tensor, grad) for tensor, grad in outer if grad is not None and tensor.requires_grad]
    wanted = [leaf for leaf in leaves if leaf is not None]
    tensors, given = zip(*reached, strict=True)
    grads = iter(torch.autograd.grad(tensors, wanted, given, allow_unused=True))
    dinitial = None
    if ctx.started:
        dinitial = gradients.left_by(dleaving) if call.exchange.first else torch.zeros_like(gradients.state)
    return None, dinitial, *(None if leaf is None else next(grads) for leaf in leaves)
