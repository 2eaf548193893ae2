"""The fp64 oracle of linear attention: the recurrence of its definition, one token after the other.

Nothing here knows of chunks, summaries or shards, so that it can judge what does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsp_plugin.mask import MaskSpec


def token_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention over a whole sequence in fp64; autograd differentiates it.

    Token by token ``S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T``, without beta
    ``S_t = diag(exp g_t) S_{t-1} + k_t v_t^T``, and then ``o_t = scale q_t S_t``. Bidirectional attention is
    ``o_t = scale sum_s (q_t . k_s) v_s``.

    Args:
        q: ``[B, n, Hk, K]``; k: ``[B, n, Hk, K]``; v: ``[B, n, H, V]``. Query and key head j serve the value heads
            ``j H / Hk`` up to ``(j + 1) H / Hk``.
        g: log decay ``[H]``, ``[B, n, H]`` or ``[B, n, H, K]``; no decay if None.
        beta: ``[B, n, H]``: how much of the value stored under a key is replaced; None adds to it.
        initial_state: ``[B, H, K, V]`` before the first token; zero if None.
        scale: factor on the output, ``K ** -0.5`` if None.
        causal: whether a token sees only itself and those before it; else it sees all of its document.
        cu_seqlens: document borders ``(0, ..., n)``; the state is zero again at the start of each but the first.

    Returns:
        o ``[B, n, H, V]`` and the state after the last token ``[B, H, K, V]``, both fp64. Bidirectional attention has
        no state: None.

    Raises:
        SequenceParallelConfigError: the document borders are malformed.
    """
    q, k = (x.double().repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    v = v.double()
    batch, length, heads, key_dim = k.shape
    scale = key_dim**-0.5 if scale is None else scale
    documents = MaskSpec(cu_seqlens=None if cu_seqlens is None else tuple(cu_seqlens)).documents(length)
    if not causal:
        assert g is None, "bidirectional attention has no decay"
        assert beta is None, "bidirectional attention has no delta rule"
        assert initial_state is None, "bidirectional attention has no state"
        return _bidirectional(q, k, v, documents) * scale, None

    zero = v.new_zeros(batch, heads, key_dim, v.shape[-1])
    state = zero if initial_state is None else initial_state.double()
    identity = torch.eye(key_dim, dtype=torch.float64, device=q.device)
    starts = {document.start for document in documents} - {0}
    outputs = []
    for t in range(length):
        if t in starts:
            state = zero
        if g is not None:
            state = _decay(g, t).double().exp() * state
        key, value = k[:, t, :, :, None], v[:, t, :, None, :]
        if beta is None:
            state = state + key * value
        else:
            rate = beta[:, t, :, None, None].double()
            state = (identity - rate * key * key.transpose(-1, -2)) @ state + rate * key * value
        outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


def _decay(g: Tensor, t: int) -> Tensor:
    """The log decay of token ``t``, to be multiplied onto ``[B, H, K, V]``."""
    if g.dim() == 1:
        return g[:, None, None]
    return g[:, t, :, None, None] if g.dim() == 3 else g[:, t, :, :, None]


def _bidirectional(q: Tensor, k: Tensor, v: Tensor, documents: Sequence[range]) -> Tensor:
    """Every token with every token of its document, ``[B, n, H, V]``."""
    parts = [v[:, :0]]
    for document in documents:
        q_d, k_d, v_d = (x[:, document.start : document.stop] for x in (q, k, v))
        parts.append(torch.einsum("bihk,bjhk,bjhv->bihv", q_d, k_d, v_d))
    return torch.cat(parts, 1)
