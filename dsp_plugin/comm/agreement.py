"""Debug mode: ranks compare what they are about to do before they do it, so that a mismatch is an error, not a hang.

The comparison goes through the rendezvous store, not through a collective: it also finds a rank that never arrives, or
that waits in another collective, and names it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from dsp_plugin.errors import CollectiveMismatchError
from dsp_plugin.groups import Axis

_entered: Counter[str] = Counter()


def agree(op: str, dtype: torch.dtype, sends: Sequence[int], receives: Sequence[int], axis: Axis) -> None:
    """Raise on every rank of ``axis`` unless all are about to run the same ``op`` with sizes that fit.

    Args:
        op: the collective, the method it is for and the phase.
        dtype: of what is sent.
        sends: elements that this rank sends to each rank of the axis.
        receives: elements that it expects from each.

    Raises:
        CollectiveMismatchError: ranks differ, or one did not arrive within ``DSP_PLUGIN_DEBUG_TIMEOUT`` seconds
            (default 60).
    """
    store = dist.distributed_c10d._get_default_store()
    # Axes that share a process group (sp and ulysses, say) must share the count too: order is a matter of the group.
    scope = "dsp_plugin/" + "-".join(map(str, axis.ranks))
    step = _entered[scope]
    _entered[scope] += 1
    claim = {"op": op, "dtype": str(dtype), "sends": list(sends), "receives": list(receives)}
    store.set(f"{scope}/{step}/{axis.rank}", json.dumps(claim))
    if step >= 2:
        # Everybody who wrote step-1 has read step-2, so nobody will look for it again.
        store.delete_key(f"{scope}/{step - 2}/{axis.rank}")
    claims, missing = _read(store, f"{scope}/{step}", axis)
    if missing:
        raise CollectiveMismatchError(
            f"rank {axis.ranks[axis.rank]} is about to run {op} (its collective {step} on axis {axis.name} of ranks "
            f"{list(axis.ranks)}), but ranks {missing} did not arrive within {_timeout().total_seconds():g} s. They "
            f"took another path: look for a branch that depends on the rank or on its data."
        )
    _compare(claims, step, axis)


def _timeout() -> timedelta:
    return timedelta(seconds=float(os.environ.get("DSP_PLUGIN_DEBUG_TIMEOUT", "60")))


def _read(store: dist.Store, prefix: str, axis: Axis) -> tuple[list[dict], list[int]]:
    keys = [f"{prefix}/{peer}" for peer in range(axis.size)]
    try:
        store.wait(keys, _timeout())
    except dist.DistStoreError:
        return [], [axis.ranks[peer] for peer, key in enumerate(keys) if not store.check([key])]
    return [json.loads(store.get(key)) for key in keys], []


def _compare(claims: list[dict], step: int, axis: Axis) -> None:
    for aspect in ("op", "dtype"):
        by_value: dict[str, list[int]] = {}
        for rank, claim in zip(axis.ranks, claims, strict=True):
            by_value.setdefault(claim[aspect], []).append(rank)
        if len(by_value) > 1:
            said = "; ".join(f"ranks {ranks}: {value}" for value, ranks in by_value.items())
            raise CollectiveMismatchError(
                f"collective {step} on axis {axis.name}: ranks disagree on the {aspect}. {said}. Every rank must run "
                f"the same methods on the same layers in the same order and precision."
            )
    for source, claim in enumerate(claims):
        for target, count in enumerate(claim["sends"]):
            expected = claims[target]["receives"][source]
            if count != expected:
                raise CollectiveMismatchError(
                    f"collective {step} on axis {axis.name}, {claim['op']}: rank {axis.ranks[source]} sends {count} "
                    f"elements to rank {axis.ranks[target]}, which expects {expected}. The ranks hold tensors of "
                    f"different shapes: check batch size, sequence length and heads on both."
                )
