"""Debug mode: ranks compare what they are about to do before they do it, so that a mismatch is an error, not a hang.

The comparison goes through the rendezvous store, not through a collective: it also finds a rank that never arrives, or
that waits in another collective, and names it.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from dsp_plugin.comm.axis import Axis, timeout_of
from dsp_plugin.errors import CollectiveMismatchError, SequenceParallelConfigError

Shapes = Sequence[Sequence[int]]

_TIMEOUT = "DSP_PLUGIN_DEBUG_TIMEOUT"
LONGEST_TIMEOUT = 30 * 86400.0
"""Seconds: of what users set. Clocks and stores take no timeouts without end."""
_DEFAULT_TIMEOUT = timedelta(seconds=60)
_entered: Counter[str] = Counter()
_HINT = (
    "If ranks may have taken different paths, or hold tensors that do not fit together, run again with "
    "DSP_PLUGIN_DEBUG=1: it names the collective and the ranks that differ."
)


def hint() -> str:
    """How to learn more about a collective that failed; empty where debug mode is on and would have said."""
    return "" if _entered else _HINT


@contextmanager
def explained() -> Iterator[None]:
    """Adds the hint to what a backend raises in a collective: its own words are about sockets and buffers."""
    try:
        yield
    except RuntimeError as error:
        if hint() and not isinstance(error, CollectiveMismatchError):
            error.add_note(f"dsp_plugin: a collective between ranks has failed. {hint()}")
        raise


def agree(
    op: str, dtype: torch.dtype, whole_shapes: Shapes, sends: Sequence[int], receives: Sequence[int], axis: Axis
) -> None:
    """Raise on every rank of ``axis`` unless all are about to run the same ``op`` with shapes that fit.

    Args:
        op: the collective, the method it is for and the phase.
        dtype: of what is sent.
        whole_shapes: of the tensors before sharding, where the operation has such.
        sends: elements that this rank sends to each rank of the axis.
        receives: elements that it expects from each.

    Raises:
        SequenceParallelConfigError: ``DSP_PLUGIN_DEBUG_TIMEOUT`` is no number of seconds.
        CollectiveMismatchError: ranks differ, or one did not arrive within ``DSP_PLUGIN_DEBUG_TIMEOUT`` seconds
            (default 60, or the axis' own timeout where that is shorter).
    """
    store = dist.distributed_c10d._get_default_store()
    # Axes that share a process group (sp and ulysses, say) must share the count too: order is a matter of the group.
    scope = "dsp_plugin/" + "-".join(map(str, axis.ranks))
    step = _entered[scope]
    _entered[scope] += 1
    claim = {
        "op": op,
        "dtype": str(dtype),
        "shapes": str([tuple(shape) for shape in whole_shapes]),
        "sends": list(sends),
        "receives": list(receives),
    }
    try:
        store.set(f"{scope}/{step}/{axis.rank}", json.dumps(claim))
        if step >= 2:
            # Everybody who wrote step-1 has read step-2, so nobody will look for it again.
            store.delete_key(f"{scope}/{step - 2}/{axis.rank}")
        _compare(_read(store, f"{scope}/{step}", op, step, axis), store, f"{scope}/{step}", step, axis)
    except CollectiveMismatchError:
        raise
    except RuntimeError as error:
        raise CollectiveMismatchError(
            f"rank {axis.ranks[axis.rank]} is about to run {op} (its collective {step} on axis {axis.name} of ranks "
            f"{list(axis.ranks)}), but the rendezvous store is gone: {error}. The rank that hosts it, mostly rank 0, "
            f"has failed: look at its error."
        ) from error


def _timeout(axis: Axis) -> timedelta:
    text = os.environ.get(_TIMEOUT)
    if text is None:
        # Who comes later than the collective itself would wait is too late, too.
        limit = None if axis.group is None else timeout_of(axis.group)
        return _DEFAULT_TIMEOUT if limit is None else min(limit, _DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise SequenceParallelConfigError(
            setting=f"environment variable {_TIMEOUT}",
            value=text,
            why=f"it is not a number of seconds above 0, up to {LONGEST_TIMEOUT:.0f} (30 days)",
            remedy="give the seconds to wait for a rank in debug mode, such as 60",
        )
    return timedelta(seconds=seconds)


def _read(store: dist.Store, prefix: str, op: str, step: int, axis: Axis) -> list[dict]:
    """The claims of all ranks of the axis, once all are there."""
    keys = [f"{prefix}/{peer}" for peer in range(axis.size)]
    # A TCP store raises DistStoreError when it has waited long enough, a file store RuntimeError.
    with suppress(RuntimeError):
        store.wait(keys, _timeout(axis))
    missing = [rank for rank, key in zip(axis.ranks, keys, strict=True) if not store.check([key])]
    claims = [] if missing else [json.loads(store.get(key)) for key in keys]
    gone = [rank for rank, claim in zip(axis.ranks, claims, strict=False) if "gave_up" in claim]
    if not missing and not gone:
        return claims
    # Whoever arrives later must learn that nobody waits for it any more.
    store.set(keys[axis.rank], json.dumps({"gave_up": True}))
    found = f"came so late that ranks {gone} had left"
    if missing:
        found = f"ranks {missing} did not arrive within {_timeout(axis).total_seconds():g} s"
    raise CollectiveMismatchError(
        f"rank {axis.ranks[axis.rank]} is about to run {op} (its collective {step} on axis {axis.name} of ranks "
        f"{list(axis.ranks)}), but {found}. The ranks took different paths: look for a branch that depends on the rank "
        f"or on its data. If a rank is merely slow, raise DSP_PLUGIN_DEBUG_TIMEOUT."
    )


def _compare(claims: list[dict], store: dist.Store, prefix: str, step: int, axis: Axis) -> None:
    found = _difference(claims, step, axis)
    if found is None:
        return
    # The rank that hosts the store must not leave, and take it down, before the others have read it too.
    store.set(f"{prefix}/seen/{axis.rank}", "")
    with suppress(RuntimeError):
        store.wait([f"{prefix}/seen/{peer}" for peer in range(axis.size)], min(_timeout(axis), timedelta(seconds=5)))
    raise CollectiveMismatchError(found)


def _difference(claims: list[dict], step: int, axis: Axis) -> str | None:
    where = f"collective {step} on axis {axis.name}"
    for aspect in ("op", "dtype", "shapes"):
        by_value: dict[str, list[int]] = {}
        for rank, claim in zip(axis.ranks, claims, strict=True):
            by_value.setdefault(claim[aspect], []).append(rank)
        if len(by_value) > 1:
            said = "; ".join(f"ranks {ranks}: {value}" for value, ranks in by_value.items())
            return (
                f"{where}: ranks disagree on the {aspect}{' before sharding' if aspect == 'shapes' else ''}. {said}. "
                f"Every rank must run the same methods on the same layers in the same order and precision."
            )
    for source, claim in enumerate(claims):
        for target, count in enumerate(claim["sends"]):
            expected = claims[target]["receives"][source]
            if count != expected:
                return (
                    f"{where}, {claim['op']}: rank {axis.ranks[source]} sends {count} elements to rank "
                    f"{axis.ranks[target]}, which expects {expected}. The ranks hold tensors of different shapes: "
                    f"check batch size, sequence length and heads on both."
                )
    return None
