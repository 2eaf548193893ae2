"""What kernels of other packages may be called with, as their sources say at these commits.

Of Python functions the parameters are recorded, of torch's operators the schemas.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple


class Recorded(NamedTuple):
    """Signatures by name, and where they were read.

    Attributes:
        version: of the package; of a commit that is no release, what is known of it.
        path: of the file, or with a star of one for each signature.
    """

    package: str
    version: str
    repository: str
    commit: str
    path: str
    signatures: dict[str, str]

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    def python(self, name: str) -> inspect.Signature:
        """That of a Python function."""
        return inspect.signature(eval(f"lambda {self.signatures[name]}: None"))


FLASH_ATTENTION_2 = (
    Recorded(
        "flash-attn",
        "2.7.0",
        "Dao-AILab/flash-attention",
        "c555642172e281cae6da8a6cff4dfd9ff678ae85",
        "flash_attn/flash_attn_interface.py",
        {
            "_flash_attn_forward": (
                "q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, "
                "alibi_slopes, return_softmax"
            ),
            "_flash_attn_backward": (
                "dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, "
                "window_size_right, softcap, alibi_slopes, deterministic, rng_state=None"
            ),
            "_flash_attn_varlen_forward": (
                "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, "
                "window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
                "block_table=None, leftpad_k=None, seqused_k=None"
            ),
            "_flash_attn_varlen_backward": (
                "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
                "max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, "
                "alibi_slopes, deterministic, rng_state=None"
            ),
        },
    ),
    Recorded(
        "flash-attn",
        "2.8.3",
        "Dao-AILab/flash-attention",
        "060c9188beec3a8b62b33a3bfa6d5d2d44975fab",
        "flash_attn/flash_attn_interface.py",
        {
            "_flash_attn_forward": (
                "q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, "
                "alibi_slopes, return_softmax"
            ),
            "_flash_attn_backward": (
                "dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, "
                "window_size_right, softcap, alibi_slopes, deterministic, rng_state=None"
            ),
            "_flash_attn_varlen_forward": (
                "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, "
                "window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
                "block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False"
            ),
            "_flash_attn_varlen_backward": (
                "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
                "max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, "
                "alibi_slopes, deterministic, rng_state=None, zero_tensors=False"
            ),
        },
    ),
    Recorded(
        "flash-attn",
        "main of 2026-08-15",
        "Dao-AILab/flash-attention",
        "0251105a2fb19d2957484b7f023cd8c115286ced",
        "flash_attn/flash_attn_interface.py",
        {
            "_flash_attn_forward": (
                "q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, "
                "alibi_slopes, return_softmax"
            ),
            "_flash_attn_backward": (
                "dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, "
                "window_size_right, softcap, alibi_slopes, deterministic, rng_state=None"
            ),
            "_flash_attn_varlen_forward": (
                "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, "
                "window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
                "block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0"
            ),
            "_flash_attn_varlen_backward": (
                "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
                "max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, "
                "alibi_slopes, deterministic, rng_state=None, zero_tensors=False"
            ),
        },
    ),
)

FLASH_ATTENTION_3 = (
    Recorded(
        "flash_attn_3",
        "the first operators, 2025-05-21",
        "Dao-AILab/flash-attention",
        "db4baba2cae7be5a9155304636ba50a571c680a6",
        "hopper/flash_api.cpp",
        {
            "fwd": (
                "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new, Tensor(v_new!)? v_new, Tensor? q_v, "
                "Tensor(out!)? out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? "
                "seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? "
                "kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, "
                "Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float softmax_scale, bool is_causal, int "
                "window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool "
                "is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, bool? "
                "pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
            ),
            "bwd": (
                "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq, "
                "Tensor(dk!)? dk, Tensor(dv!)? dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, "
                "Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, float softmax_scale, bool is_causal, int "
                "window_size_left=-1, int window_size_right=-1, float softcap=0.0, bool deterministic=False, int "
                "sm_margin=0) -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
            ),
        },
    ),
    Recorded(
        "flash_attn_3",
        "beside flash-attn 2.8.3",
        "Dao-AILab/flash-attention",
        "060c9188beec3a8b62b33a3bfa6d5d2d44975fab",
        "hopper/flash_api.cpp",
        {
            "fwd": (
                "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? "
                "q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? "
                "cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, "
                "int? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? "
                "leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
                "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, "
                "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, "
                "float softcap=0.0, bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int "
                "num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
            ),
            "bwd": (
                "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? "
                "dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? "
                "cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? "
                "max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int "
                "window_size_right=-1, float softcap=0.0, bool deterministic=False, int sm_margin=0) -> "
                "(Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
            ),
        },
    ),
    Recorded(
        "flash_attn_3",
        "main of 2026-08-15",
        "Dao-AILab/flash-attention",
        "0251105a2fb19d2957484b7f023cd8c115286ced",
        "hopper/flash_api.cpp",
        {
            "fwd": (
                "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? "
                "q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? "
                "cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, "
                "int? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? "
                "leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
                "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, "
                "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, "
                "float softcap=0.0, bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int "
                "num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
            ),
            "bwd": (
                "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? "
                "dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? "
                "cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? "
                "max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int "
                "window_size_right=-1, float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, "
                "Tensor, Tensor, Tensor, Tensor)"
            ),
        },
    ),
)

FLA = (
    Recorded(
        "fla-core",
        "0.5.2",
        "fla-org/flash-linear-attention",
        "9c8e42e762fce087c27b673af4922795d9edb85e",
        "fla/ops/*/chunk.py",
        {
            "simple_gla": (
                "q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, "
                "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs"
            ),
            "gla": (
                "q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, "
                "cu_seqlens=None, cu_seqlens_cpu=None"
            ),
            "delta_rule": (
                "q, k, v, beta, scale=None, initial_state=None, output_final_state=False, "
                "use_qk_l2norm_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs"
            ),
            "gated_delta_rule": (
                "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
                "use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, "
                "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, cp_context=None, **kwargs"
            ),
            "kda": (
                "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
                "use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, "
                "allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False, "
                "return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, "
                "cp_context=None, **kwargs"
            ),
        },
    ),
    Recorded(
        "fla-core",
        "main of 2026-08-22",
        "fla-org/flash-linear-attention",
        "bc3b101dcb713ddc5bd8924b66754eb68b5ccf89",
        "fla/ops/*/chunk.py",
        {
            "simple_gla": (
                "q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, "
                "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs"
            ),
            "gla": (
                "q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, "
                "cu_seqlens=None, cu_seqlens_cpu=None"
            ),
            "delta_rule": (
                "q, k, v, beta, scale=None, initial_state=None, output_final_state=False, "
                "use_qk_l2norm_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs"
            ),
            "gated_delta_rule": (
                "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
                "use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, "
                "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, "
                "**kwargs"
            ),
            "kda": (
                "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
                "use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, "
                "allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False, "
                "return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, "
                "cp_context=None, **kwargs"
            ),
        },
    ),
)
