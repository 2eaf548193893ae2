"""FlashAttention-2 (package ``flash_attn``) and FlashAttention-3 (``flash_attn_interface``), found at run time."""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from dsp_plugin.kernels.kernel import BlockSpec, laid_alike
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.kernels.windowed import Packing, Window, WindowedFlash

_FA2_MINIMUM = Version("2.7.0")
# Wider ones have no deterministic instance (hopper/flash_bwd_launch_template.h).
_FA3_DETERMINISTIC = 192


@lru_cache(maxsize=8)
def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why it cannot be imported; wheels built for another torch fail in several ways."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            return None, f"package {name.split('.')[0]} is not installed"
        return None, f"importing {name} failed: {error}"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return None, f"importing {name} failed: {error}"


# Asked at every call; the metadata of packages is read from files.
@lru_cache(maxsize=4)
def _distribution_version(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


class FlashAttention2(WindowedFlash):
    """The ``flash_attn`` package, from 2.7 on (whose private forward and backward take left and right windows)."""

    name = "fa2"

    def version(self) -> str | None:
        return _distribution_version("flash-attn", "flash_attn")

    def available(self) -> tuple[bool, str]:
        if not torch.cuda.is_available():
            return False, "no cuda device"
        module, why = _import("flash_attn.flash_attn_interface")
        if module is None:
            return False, why
        version = self.version()
        if version is None or Version(version) < _FA2_MINIMUM:
            return False, f"flash_attn {version} is older than {_FA2_MINIMUM}"
        return True, "flash_attn is installed"

    def window_forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, block: BlockSpec, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        module = _flash_attn_2()
        forward = module._flash_attn_forward if packing is None else module._flash_attn_varlen_forward
        out, lse, _, _ = forward(
            q,
            k,
            v,
            **_packing_arguments(packing),
            dropout_p=0.0,
            softmax_scale=block.scale,
            causal=window.causal,
            window_size_left=window.left,
            window_size_right=window.right,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        return out, lse

    def window_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        window: Window,
        block: BlockSpec,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = laid_alike(q, k, v)
        module = _flash_attn_2()
        backward = module._flash_attn_backward if packing is None else module._flash_attn_varlen_backward
        backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            **_packing_arguments(packing),
            dropout_p=0.0,
            softmax_scale=block.scale,
            causal=window.causal,
            window_size_left=window.left,
            window_size_right=window.right,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=None,
        )
        return dq, dk, dv


def _flash_attn_2() -> Any:
    module, why = _import("flash_attn.flash_attn_interface")
    assert module is not None, why
    return module


class FlashAttention3(WindowedFlash):
    """FlashAttention-3 on Hopper, through the torch operators its extension registers.

    Its Python wrappers changed names and order between betas; the operators' schemas did not, so arguments are passed
    by name and the schema fills in the optional ones.
    """

    name = "fa3"
    min_capability = (9, 0)

    def version(self) -> str | None:
        return _distribution_version("flash-attn-3", "flash_attn_3")

    def available(self) -> tuple[bool, str]:
        if not torch.cuda.is_available():
            return False, "no cuda device"
        module, why = _import("flash_attn_interface")
        if module is None:
            return False, why
        if not all(hasattr(torch.ops.flash_attn_3, op) for op in ("fwd", "bwd")):
            return False, "this flash_attn_interface registers no flash_attn_3 operators; it is an early beta"
        return True, "flash_attn_interface is installed"

    def supports(
        self, dtype: torch.dtype, device: torch.device, head_dim: int, v_head_dim: int, spec: AttentionSpec
    ) -> str | None:
        widest = max(head_dim, v_head_dim)
        if torch.are_deterministic_algorithms_enabled() and widest > _FA3_DETERMINISTIC:
            return f"its deterministic backward takes head dims up to {_FA3_DETERMINISTIC}, not {widest}"
        return super().supports(dtype, device, head_dim, v_head_dim, spec)

    def refuses_capability(self, capability: tuple[int, int], head_dim: int) -> str | None:
        if capability[0] != 9:
            return f"it is built for Hopper (compute capability 9.x), the device has {capability}"
        return None

    def window_forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, block: BlockSpec, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.flash_attn_3.fwd.default
        out, lse, *_ = op(**_filled(op, q=q, k=k, v=v, num_splits=1, **_arguments(window, block, packing)))
        return out, lse

    def window_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        window: Window,
        block: BlockSpec,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        op = torch.ops.flash_attn_3.bwd.default
        dq, dk, dv = laid_alike(q, k, v)
        tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv}
        deterministic = torch.are_deterministic_algorithms_enabled()
        op(**_filled(op, **tensors, deterministic=deterministic, **_arguments(window, block, packing)))
        return dq, dk, dv


def _packing_arguments(packing: Packing | None) -> dict[str, object]:
    """The names are the same in both packages; a call without a packing has none of them."""
    return {} if packing is None else vars(packing)


def _arguments(window: Window, block: BlockSpec, packing: Packing | None) -> dict[str, object]:
    return {
        **_packing_arguments(packing),
        "softmax_scale": block.scale,
        "is_causal": window.causal,
        "window_size_left": window.left,
        "window_size_right": window.right,
    }


def _filled(op: Any, **given: object) -> dict[str, object]:
    """The given arguments, plus None for every argument of the operator that has no default."""
    required = {argument.name: None for argument in op._schema.arguments if not argument.has_default_value()}
    return {**required, **given}
