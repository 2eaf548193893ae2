"""What there is to verify: one attention call or stack of stages per case, and the cases that a method must pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import product
from math import isqrt, prod
from typing import Any, Literal

import torch

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout, LayoutKind, shard_sizes
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import METHODS, Workload
from dsp_plugin.methods.state_exchange import EXCHANGES
from dsp_plugin.verification.masks import packed_length, parse_mask

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

_DEFAULT_HEADS = ((6, 2), (8, 1), (7, 7))
_DEFAULT_MASKS = ("causal", "full", "window", "packed", "causal+packed+window")
_DIMS = {"length", "batch", "heads", "kv_heads", "head_dim", "value_dim"}
_LINEAR_HEADS = ((4, 2), (3, 3), (3, 1))


@dataclass(frozen=True)
class Case:
    """One thing to verify.

    Attributes:
        method: a name in `METHODS`.
        size: P.
        batch: B.
        heads: H; of values, for linear methods.
        kv_heads: K; of queries and keys, for linear methods.
        length: L, of the whole sequence; the product of ``grid`` where that is given.
        head_dim: D, of queries and keys.
        value_dim: of values; ``head_dim`` when None.
        dtype: of the run. The oracle takes the same rounded inputs.
        mask: in global positions; for DSP, along the first dim of ``grid`` (time).
        layout: token order.
        kernel: local attention kernel.
        grid: for DSP, the sizes of the token dims that it switches between, time first.
        dropout: probability that an attention weight is dropped.
        seed: of inputs, weights and dropout.
        ulysses_size: for methods that factor P, U of P = U * R.
        by_document: whether a zigzag layout cuts every document of ``mask`` by itself.
        whole_below: with ``by_document``, of how many tokens a document is cut at least; see `Layout`.
        ring_gradient_dtype: in which gradients of keys and values travel, for methods that have the choice.
        attention_rounds: of heads, for methods that gather tokens.
        sizes: of contiguous shards, where they are not even.
        decay: for linear methods, how the state decays; one of `DECAYS`.
        exchange: for linear methods, how states travel; one of `EXCHANGES`, or ``auto``.
        gates: for linear methods with a decay, whether a token keeps about half of the state, next to nothing of it, or
            nearly all.
        states: for linear methods, whether an initial state is given, and a gradient of every rank's final state.
    """

    method: str
    size: int
    batch: int = 2
    heads: int = 6
    kv_heads: int = 2
    length: int = 37
    head_dim: int = 16
    value_dim: int | None = None
    dtype: torch.dtype = torch.float32
    mask: MaskSpec = field(default_factory=MaskSpec)
    layout: LayoutKind = "contiguous"
    kernel: str = "auto"
    grid: tuple[int, ...] | None = None
    dropout: float = 0.0
    seed: int = 0
    ulysses_size: int | None = None
    by_document: bool = False
    whole_below: int = 0
    ring_gradient_dtype: Literal["fp32", "input"] = "fp32"
    attention_rounds: int = 1
    sizes: tuple[int, ...] | None = None
    decay: str = "none"
    exchange: str = "auto"
    gates: Literal["moderate", "strong", "weak"] = "moderate"
    states: bool = False

    @property
    def v_dim(self) -> int:
        """Head dim of the values."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def masked_length(self) -> int:
        """The number of positions that ``mask`` runs over."""
        return self.length if self.grid is None else self.grid[0]

    def attention(self) -> AttentionSpec:
        """What the case computes, for softmax methods."""
        return AttentionSpec(self.mask, dropout_p=self.dropout, dropout_seed=self.seed, kernel=self.kernel)

    def workload(self) -> Workload:
        """As a method's formulas and legality take it."""
        return Workload(
            size=self.size,
            heads=self.heads,
            kv_heads=self.kv_heads,
            length=self.length,
            batch=self.batch,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            element_size=self.dtype.itemsize,
            layout=self.layout,
            mask=self.mask,
            grid=(self.grid[0], self.grid[1]) if self.grid is not None and len(self.grid) == 2 else None,
            ulysses_size=self.ulysses_size,
            documents=self.mask.cu_seqlens if self.by_document else None,
            whole_below=self.whole_below if self.by_document else 0,
            ring_gradient_dtype=self.ring_gradient_dtype,
            decay=self.decay,
            exchange=self.exchange,
            gate_size=max(self.dtype.itemsize, 4),
        )

    def tokens(self) -> Layout:
        """The placement of the sequence on the ranks."""
        return self.workload().tokens() if self.sizes is None else Layout.of_sizes(self.sizes)

    def describe(self) -> str:
        """A name for tables, without method and size."""
        layout = f"{self.layout} by document" if self.by_document else self.layout
        layout += f", whole below {self.whole_below}" if self.by_document and self.whole_below else ""
        where = f"L={self.length} {layout}" if self.grid is None else f"grid={'x'.join(map(str, self.grid))}"
        dims = f"{self.head_dim}" if self.value_dim is None else f"{self.head_dim}/{self.value_dim}"
        parts = [self.mask.describe(), where, f"H={self.heads} K={self.kv_heads} B={self.batch} D={dims}"]
        parts.append(str(self.dtype).removeprefix("torch."))
        if self.kernel != "auto":
            parts.append(self.kernel)
        if self.ulysses_size is not None:
            parts.append(f"U={self.ulysses_size}")
        if self.ring_gradient_dtype != "fp32":
            parts.append(f"gradients travel as {self.ring_gradient_dtype}")
        if self.attention_rounds != 1:
            parts.append(f"rounds={self.attention_rounds}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if METHODS[self.method].kind == "linear":
            parts.append(self._describe_linear())
        return " ".join(parts)

    def _describe_linear(self) -> str:
        gates = "" if self.gates == "moderate" else f" ({self.gates})"
        parts = [f"decay={self.decay}{gates} exchange={self.exchange}"]
        if self.sizes is not None:
            parts.append(f"shards={','.join(map(str, self.sizes))}")
        if self.states:
            parts.append("with states")
        return " ".join(parts)


def default_cases(method: str, size: int, overrides: Mapping[str, Any] | None = None) -> list[Case]:
    """The cases that ``method`` must pass at ``size``: every mask, head sharing and layout, on sizes P does not divide.

    Args:
        method: a name in `METHODS`.
        size: P.
        overrides: fields of `Case` to fix; what is not fixed varies. ``mask`` may be text for `parse_mask`.

    Returns:
        Cases, of which some may be illegal (see `refusal`): fewer heads than ranks, say.

    Raises:
        SequenceParallelConfigError: overrides contradict each other.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    if METHODS[method].kind == "linear":
        return list(dict.fromkeys(_linear_cases(method, size, given)))
    _refuse_linear_settings(method, given)
    heads = _head_counts(size, given.pop("heads", None), given.pop("kv_heads", None))
    layouts = [given.pop("layout")] if "layout" in given else list(METHODS[method].layouts)
    mask = given.pop("mask", None)
    masks = [mask] if mask is not None else list(_DEFAULT_MASKS)
    places = _grids(size, given, mask) if METHODS[method].kind == "switch" else _sequences(method, size, given, mask)
    by_document = given.pop("by_document", None)
    cases = []
    for place, factors, layout, mask, (h, k) in product(places, _factors(method, size, given), layouts, masks, heads):
        if len(place.get("grid", ())) > 2 and mask != masks[0]:
            continue  # The mask runs along time alone; the smaller grid has seen them all.
        case = Case(method, size, heads=h, kv_heads=k, layout=layout, **{**given, **factors, **place})
        spec = mask if isinstance(mask, MaskSpec) else parse_mask(mask, case.masked_length)
        both = layout == "zigzag" and spec.cu_seqlens is not None
        ways = [by_document] if by_document is not None else [False, True] if both else [False]
        cases += [replace(case, mask=spec, by_document=way) for way in ways]
    return cases


def _factors(method: str, size: int, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every U of P = U * R, for the method that has the choice."""
    if method != "usp" or "ulysses_size" in given:
        return [{}]
    return [{"ulysses_size": inner} for inner in range(1, size + 1) if size % inner == 0]


def _head_counts(size: int, heads: int | None, kv_heads: int | None) -> list[tuple[int, int]]:
    if heads is None and kv_heads is None:
        return list(_DEFAULT_HEADS)
    if heads is None:
        assert kv_heads is not None
        group = -(-size // kv_heads)
        return [(group * kv_heads, kv_heads), ((group + 1) * kv_heads, kv_heads)]
    if kv_heads is None:
        shared = max((k for k in range(1, heads) if heads % k == 0), default=1)
        return [(heads, k) for k in sorted({1, shared, heads})]
    return [(heads, kv_heads)]


def _sequences(method: str, size: int, given: dict[str, Any], mask: Any) -> list[dict[str, Any]]:
    _refuse_grid(method, given)
    # Odd, and of more tokens than any layout makes runs.
    return [{"length": given.get("length") or packed_length(mask) or max(37, 4 * size + 1)}]


def _refuse_grid(method: str, given: Mapping[str, Any]) -> None:
    if "grid" in given:
        raise SequenceParallelConfigError(
            setting="grid",
            value=given["grid"],
            why=f"method {method} shards one sequence dim",
            remedy="give the sequence length instead, or use method dsp",
        )


def _grids(size: int, given: dict[str, Any], mask: Any) -> list[dict[str, Any]]:
    length, grid = given.get("length"), given.get("grid")
    if grid is not None:
        if length not in (None, prod(grid)):
            raise SequenceParallelConfigError(
                setting="grid",
                value=grid,
                why=f"has {' * '.join(map(str, grid))} = {prod(grid)} tokens, but the sequence length is {length}",
                remedy="drop one of the two",
            )
        grids = [grid]
    elif length is not None:
        rows = next(rows for rows in range(isqrt(length), 0, -1) if length % rows == 0)
        grids = [(rows, length // rows)]
    else:
        time = packed_length(mask) or (size + 1 if size > 1 else 3)
        # In the second, ranks beyond the third hold nothing of the middle dim.
        grids = [(time, 2 * size + 1), (time, 3, size + 1)]
    return [{"grid": tuple(grid), "length": prod(grid)} for grid in grids]


def _refuse_linear_settings(method: str, given: Mapping[str, Any]) -> None:
    for setting in ("decay", "exchange"):
        if setting in given:
            linear = [name for name, other in METHODS.items() if other.kind == "linear"]
            raise SequenceParallelConfigError(
                setting=setting,
                value=given[setting],
                why=f"method {method} has no state that could decay or be exchanged, only linear attention has",
                remedy=f"leave it out, or use method {' or '.join(linear)}",
            )


def _linear_cases(method: str, size: int, given: dict[str, Any]) -> Iterator[Case]:
    """Every decay in every situation; exchanges and head counts take turns, as do the dims of values."""
    _refuse_grid(method, given)
    mask = given.pop("mask", None)
    length = given.get("length") or packed_length(mask)
    decays = [known("decay", given.pop("decay"), DECAYS)] if "decay" in given else list(DECAYS)
    exchanges = list(EXCHANGES)
    if "exchange" in given:
        exchanges = [known("exchange", given.pop("exchange"), ("auto", *EXCHANGES))]
    if "scan" in exchanges and not given.keys() & _DIMS and mask in (None, "causal"):
        yield from _large_states(method, size, given, decays)
    heads, kv_heads = given.pop("heads", None), given.pop("kv_heads", None)
    counts = list(_LINEAR_HEADS) if heads is kv_heads is None else _head_counts(size, heads, kv_heads)
    for (late, decay), (turn, situation) in product(enumerate(decays), enumerate(_situations(size, length))):
        fields = {**situation, **given, "decay": decay, "exchange": exchanges[(turn + late) % len(exchanges)]}
        fields["heads"], fields["kv_heads"] = counts[turn % len(counts)]
        fields.setdefault("value_dim", (None, 8, 20)[turn // 2 % 3])
        spec = mask if mask is not None else fields["mask"]
        fields["mask"] = spec if isinstance(spec, MaskSpec) else parse_mask(spec, fields["length"])
        unwanted = decay != "none" and mask is None and not fields["mask"].causal
        ungated = decay in ("none", "delta") and "gates" in situation
        unplaced = "sizes" in situation and fields.get("layout", "contiguous") != "contiguous"
        if unwanted or ungated or unplaced:
            continue
        fields["states"] = fields.get("states", False) and fields["mask"].causal
        cut = fields.get("layout") == "zigzag" and fields["mask"].cu_seqlens is not None
        fields["by_document"] = fields.get("by_document", False) and cut
        yield Case(method, size, **fields)


def _large_states(method: str, size: int, given: Mapping[str, Any], decays: Sequence[str]) -> Iterator[Case]:
    """States of 1 MiB, which the scan cuts into blocks from three ranks on; it sends smaller ones whole."""
    shape = {"length": 2 * size + 1, "batch": 2, "heads": 8, "kv_heads": 2, "head_dim": 128}
    for decay in decays:
        if decay in ("none", "vector", "kda"):
            yield Case(method, size, **{**shape, **given}, mask=MaskSpec(True), decay=decay, exchange="scan")


def _situations(size: int, length: int | None) -> list[dict[str, Any]]:
    """What linear attention must get right, as fields of `Case`; ``length``, if given, is that of all."""
    odd = length or max(37, 4 * size + 1)
    few = length or max(size - 1, 1)
    # Several chunks of 64 in every shard; at larger P the oracle, which every rank runs, would take minutes.
    long = length or 66 * min(size, 4) + 5
    # Borders inside shards, several in one, and documents over several shards.
    several = f"packed:{odd // 3},1,2,3,{odd - odd // 3 - 6}" if odd > 9 else "packed"
    skewed = list(shard_sizes(odd // 3, size))
    if size > 2:
        skewed[1] = 0
    skewed[-1] += odd - sum(skewed)
    zigzag = {"layout": "zigzag"}
    return [
        {"mask": "causal", "length": odd},
        {"mask": f"causal+{several}", "length": odd, "states": True},
        {"mask": "causal", "length": odd, "states": True, **zigzag},
        {"mask": f"causal+{several}", "length": odd, "by_document": True, **zigzag},
        {"mask": "causal", "length": odd, "sizes": tuple(skewed), "states": True},
        {"mask": "causal", "length": few, "states": True},
        {"mask": "causal", "length": odd, "gates": "strong", "states": True},
        {"mask": "causal", "length": long, "gates": "weak"},
        {"mask": "full", "length": odd},
        {"mask": several, "length": odd, **zigzag},
    ]


def known(setting: str, value: str, names: Sequence[str]) -> str:
    """``value``, one of ``names``; another one is refused with the nearest."""
    if value in names:
        return value
    nearest = get_close_matches(value, names, n=1)
    raise SequenceParallelConfigError(
        setting=setting,
        value=value,
        why="unknown" + (f", the nearest is {nearest[0]!r}" if nearest else ""),
        remedy=f"use one of {', '.join(names)}",
    )
