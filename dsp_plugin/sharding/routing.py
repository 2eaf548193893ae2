"""Routing of attention calls to a method, inside chosen modules only: softmax attention, linear attention, convolution.

The calls that are seen are torch's `scaled_dot_product_attention` and the library's own: `softmax_attention`, which
takes windows and packed documents, and `linear_attention` and `short_convolution`, by which models with linear
attention are written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dsp_plugin.comm.consent import Refusal, go_on
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels.convolution import short_convolution
from dsp_plugin.kernels.linear import linear_attention
from dsp_plugin.kernels.softmax import attention as softmax_attention
from dsp_plugin.kernels.softmax import autocast
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import Where, halo
from dsp_plugin.methods.inputs import check_length, check_shards
from dsp_plugin.sharding.compiling import uncompiled
from dsp_plugin.training.extents import extent, in_first_run
from dsp_plugin.training.randomness import RegionSeed

LayoutNow = Callable[[], Layout | None]


class AttentionRoute:
    """Sends attention calls of one module to the method, as long as its sequence is sharded.

    Args:
        name: of the module, for errors.
        attention: softmax attention, from `dsp_plugin.config.attention.attention_of`.
        layout_now: the placement of the sequence in the running forward pass; None while it is whole, and outside of
            passes.
        seed_now: the seeds of that pass; None outside training.
        linear: linear attention, likewise; None where the method serves none.
    """

    def __init__(
        self,
        name: str,
        attention: Callable[..., Tensor],
        groups: SequenceParallelGroups,
        layout_now: LayoutNow,
        seed_now: Callable[[], RegionSeed | None],
        linear: Callable[..., Tensor | tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self._name, self._attention, self._linear, self._groups = name, attention, linear, groups
        self._layout_now, self._seed_now = layout_now, seed_now
        self._served: dict[Callable[..., Any], Callable[..., Any]] = {
            F.scaled_dot_product_attention: self._softmax,
            softmax_attention: self._softmax_described,
            linear_attention: self._linear_attention,
            short_convolution: self._convolution,
        }
        # Calls that ranks once went on with: the same call of another pass is of the same kind.
        self._agreed: set[int] = set()

    def install(self, module: nn.Module) -> Callable[[], None]:
        """Route the calls made inside ``module.forward``; returns what undoes it."""
        of_instance = module.__dict__.get("forward")
        module.forward = _RoutedForward(module.forward, self)

        def undo() -> None:
            if of_instance is None:
                del module.forward
            else:
                module.forward = of_instance

        return undo

    def run(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call ``forward`` with its attention routed, if the sequence is sharded now.

        Raises:
            UnsupportedError: it made no call that could be routed, so it would have attended within the shard.
        """
        layout = self._layout_now()
        if layout is None:
            return forward(*args, **kwargs)
        with extent(partial(_Intercept, self, layout, torch.is_grad_enabled())) as intercept:
            output = forward(*args, **kwargs)
        if not intercept.routed:
            raise UnsupportedError(
                setting=f"attention of {self._name}",
                why="its forward never called torch.nn.functional.scaled_dot_product_attention, "
                "dsp_plugin.softmax_attention or dsp_plugin.linear_attention, so it would attend within the shard only "
                "(nn.MultiheadAttention makes the call out of our sight)",
                remedy="name the modules that make the call, and set the model's attention implementation to sdpa",
            )
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def serves(self, call: Callable[..., Any]) -> bool:
        """Whether ``call`` is attention, or what goes with it."""
        return call in self._served

    def serve(self, number: int, call: Callable[..., Any], layout: Layout, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What ``call`` is to return of this rank's tokens. Collective.

        Where ranks hold unequally many tokens, a check may fail on one rank alone; so the first time a call is made
        with such tokens, ranks agree that all go on with it.

        Args:
            number: of the call within its module's run, from 1.

        Raises:
            UnsupportedError, SequenceParallelConfigError: the method cannot serve it; on every rank.
        """
        refusal: Refusal | None = None
        try:
            ready = self._served[call](layout, *args, **kwargs)
        except (UnsupportedError, SequenceParallelConfigError) as error:
            refusal = error
        if number not in self._agreed and len(set(layout.sizes)) > 1:
            go_on(f"{call.__name__} of {self._name}", refusal, self._groups.sp)
            self._agreed.add(number)
        elif refusal is not None:
            raise refusal
        return ready()

    def _softmax(
        self,
        layout: Layout,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Callable[[], Tensor]:
        """`scaled_dot_product_attention` on sharded ``[B, H, n, D]`` tensors, with its arguments, checked."""
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        if attn_mask is not None:
            raise UnsupportedError(
                setting=f"attn_mask of {self._name}",
                value=tuple(attn_mask.shape),
                why="a dense mask is over whole sequences, of which a rank holds a part",
                remedy="use is_causal=True or no mask; for windows and packed documents call "
                "dsp_plugin.softmax_attention with AttentionSpec(MaskSpec(causal=True, cu_seqlens=...)), or "
                "cu_seqlens_by_row where rows differ",
            )
        if is_causal:
            self._check_order(layout, f"is_causal of {self._name}=True", "drop the mask")
        if not query.dim() == key.dim() == value.dim() == 4 or query.shape[2] != key.shape[2]:
            raise UnsupportedError(
                setting=f"attention of {self._name}",
                value=shapes,
                why="expected self-attention on [B, H, n, D], with as many keys as queries",
                remedy="leave cross-attention modules out of the attention globs",
            )
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise UnsupportedError(
                setting=f"attention of {self._name}",
                value=shapes,
                why="heads of query and key differ and enable_gqa is not set",
                remedy="pass enable_gqa=True, as torch itself demands",
            )
        q, k, v = (autocast(x).transpose(1, 2) for x in (query, key, value))
        check_shards(q, k, v, layout, self._groups.sp)
        what = AttentionSpec(MaskSpec(causal=is_causal), scale, dropout_p, self._dropout_seed() if dropout_p else None)
        where = Where(self._groups, layout)
        return lambda: self._attention(q, k, v, what=what, where=where).transpose(1, 2)

    def _softmax_described(
        self,
        layout: Layout,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec | None = None,
        *,
        return_lse: bool = False,
    ) -> Callable[[], Tensor]:
        """`dsp_plugin.softmax_attention` on sharded ``[B, n, H, D]`` tensors, with its arguments, checked."""
        what = AttentionSpec() if spec is None else spec
        if return_lse:
            raise UnsupportedError(
                setting=f"return_lse of {self._name}",
                why="methods keep the log-sum-exp for their backward passes and return none",
                remedy="leave it out",
            )
        if what.mask != MaskSpec() or what.cu_seqlens_by_row is not None:
            self._check_order(layout, f"mask of {self._name}", "drop the mask")
        q, k, v = (autocast(x) for x in (q, k, v))
        check_shards(q, k, v, layout, self._groups.sp)
        for _, part in what.by_rows(q.shape[0]):
            part.mask.documents(layout.length)
        where = Where(self._groups, layout)
        return lambda: self._attention(q, k, v, what=what, where=where)

    def _linear_attention(
        self, layout: Layout, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor | None, **settings: Any
    ) -> Callable[[], Tensor | tuple[Tensor, Tensor]]:
        """`dsp_plugin.kernels.linear.linear_attention` on sharded ``[B, n, H, D]`` tensors, checked.

        Under autocast q, k and v are taken in its dtype. Decays add up, so gates stay in theirs.
        """
        linear = self._linear
        if linear is None:
            raise UnsupportedError(
                setting=f"linear_attention of {self._name}",
                why="the method in use serves softmax attention, and every shard would start from a state of zeros",
                remedy='set "method" to "lasp", and "softmax_method" to what is to serve the softmax layers, if any',
            )
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_length(x, f"{name} {tuple(x.shape)}", layout, self._groups.sp)
        inputs, where = [autocast(x) for x in (q, k, v)], Where(self._groups, layout)
        return lambda: linear(*inputs, *gates, where=where, **settings)

    def _convolution(
        self, layout: Layout, x: Tensor, weight: Tensor, bias: Tensor | None = None, **settings: Any
    ) -> Callable[[], Tensor]:
        """`dsp_plugin.kernels.convolution.short_convolution` on a sharded ``[B, n, C]`` tensor, checked."""
        self._check_order(layout, f"short_convolution of {self._name}", "leave it out")
        check_length(x, f"x {tuple(x.shape)}", layout, self._groups.sp)
        return lambda: halo.convolve(x, weight, bias, groups=self._groups, layout=layout, **settings)

    def _check_order(self, layout: Layout, setting: str, otherwise: str) -> None:
        if layout.explicit_sizes is not None:
            raise UnsupportedError(
                setting=setting,
                why="the stage computes along several dims of which one is sharded: its tokens are not in global order",
                remedy=f"shard a dim that the stage does not compute along, or {otherwise}",
            )

    def refuse_unrecorded(self, call: Callable[..., Any]) -> None:
        """Where autograd records the module but not a call in it, it is run again later, where nobody would route it.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            setting=f"{call.__name__} of {self._name}",
            why="it was called with gradients off inside a forward with gradients on, as by a checkpoint of a kind we "
            "do not know: what that runs again in the backward pass would attend within the shard only",
            remedy="checkpoint with torch.utils.checkpoint or deepspeed.checkpointing, or the whole module from "
            "outside; put torch.no_grad() around the whole module",
        )

    def _dropout_seed(self) -> int:
        seed = self._seed_now()
        if seed is None:
            raise UnsupportedError(
                setting=f"dropout_p of {self._name}",
                why="its attention drops weights outside of training",
                remedy="pass dropout_p=0.0 unless self.training",
            )
        return seed.of_attention(self._name)


class _RoutedForward:
    """A module's forward. An object, not a closure, so that in a deep copy of the module it calls the copy's."""

    def __init__(self, original: Callable[..., Any], route: AttentionRoute) -> None:
        self._original, self._route = original, route
        update_wrapper(self, original)

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._route.run(self._original, args, kwargs)


class _Intercept(TorchFunctionMode):
    """Sees the calls of one run of a module's forward, or of a part of it that a checkpoint runs again.

    Args:
        grad: whether autograd recorded that run when it started.
    """

    def __init__(self, route: AttentionRoute, layout: Layout, grad: bool) -> None:
        super().__init__()
        self._route, self._layout, self._grad, self.routed = route, layout, grad, False
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._route.serves(func):
            return func(*args, **kwargs)
        if self._grad and not torch.is_grad_enabled() and not in_first_run():
            self._route.refuse_unrecorded(func)
        # A convolution is not what makes a module mix tokens: one that does nothing else we see attends out of our
        # sight.
        self.routed = self.routed or func is not short_convolution
        self._calls += 1
        return self._route.serve(self._calls, func, self._layout, args, kwargs)
