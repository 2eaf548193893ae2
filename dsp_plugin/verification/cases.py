"""What there is to verify: one attention call or stack of stages per case, and the cases that a method must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from math import isqrt, prod
from typing import Any, Literal

import torch

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.kernels.table import choose
from dsp_plugin.layout import LayoutKind
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import METHODS, Workload

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


@dataclass(frozen=True)
class Case:
    """One thing to verify.

    Attributes:
        method: a name in `METHODS`.
        size: P.
        batch: B.
        heads: H.
        kv_heads: K.
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
        ring_gradient_dtype: in which gradients of keys and values travel, for methods that have the choice.
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
    ring_gradient_dtype: Literal["fp32", "input"] = "fp32"

    @property
    def v_dim(self) -> int:
        """Head dim of the values."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def masked_length(self) -> int:
        """The number of positions that ``mask`` runs over."""
        return self.length if self.grid is None else self.grid[0]

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
            ring_gradient_dtype=self.ring_gradient_dtype,
        )

    def describe(self) -> str:
        """A name for tables, without method and size."""
        layout = f"{self.layout} by document" if self.by_document else self.layout
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
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        return " ".join(parts)


def refusal(case: Case, device: torch.device | str = "cpu") -> str | None:
    """Why the case is illegal, or cannot run on ``device``; None if it can. The same on every rank, nothing is sent."""
    method = METHODS[case.method]
    reasons = []
    if case.layout not in method.layouts:
        reasons.append(f"layout={case.layout!r}: method {case.method} takes {', '.join(method.layouts)}.")
    if case.by_document and (case.layout != "zigzag" or case.mask.cu_seqlens is None):
        reasons.append(
            f"by_document cuts the documents of a packed mask in a zigzag layout; the mask is {case.mask.describe()} "
            f"and the layout {case.layout}."
        )
    elif case.heads % case.kv_heads:
        reasons.append(f"heads={case.heads} is not a multiple of kv_heads={case.kv_heads}: fix the head counts.")
    else:
        reasons += method.illegal(case.workload())
    if case.dropout and method.kind == "switch":
        reasons.append(f"dropout={case.dropout}: {case.method} never looks inside attention; verify it without.")
    if reasons:
        return " ".join(reasons)
    try:
        case.mask.documents(case.masked_length)
        choose(case.kernel, device, case.dtype, case.head_dim, case.v_dim, case.dropout)
    except (SequenceParallelConfigError, UnsupportedError) as error:
        return str(error)
    return None


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
    if "grid" in given:
        raise SequenceParallelConfigError(
            setting="grid",
            value=given["grid"],
            why=f"method {method} shards one sequence dim",
            remedy="give the sequence length instead, or use method dsp",
        )
    # Odd, and of more tokens than any layout makes runs.
    return [{"length": given.get("length") or _packed_length(mask) or max(37, 4 * size + 1)}]


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
        time = _packed_length(mask) or (size + 1 if size > 1 else 3)
        # In the second, ranks beyond the third hold nothing of the middle dim.
        grids = [(time, 2 * size + 1), (time, 3, size + 1)]
    return [{"grid": tuple(grid), "length": prod(grid)} for grid in grids]


def _packed_length(mask: Any) -> int | None:
    """The length that a mask with explicit documents implies."""
    if isinstance(mask, MaskSpec):
        return mask.cu_seqlens[-1] if mask.cu_seqlens is not None else None
    for term in str(mask or "").split("+"):
        name, _, numbers = term.partition(":")
        if name == "packed" and numbers:
            return sum(_counts(term, numbers))
    return None


def parse_mask(text: str, length: int) -> MaskSpec:
    """Read a mask as the command line takes it.

    ``causal``, ``full``, ``window:LEFT[,RIGHT]`` (RIGHT is 0 when left out), ``packed:L1,L2,...`` (document lengths),
    or several of them joined by ``+``. ``window`` and ``packed`` alone take sizes that suit ``length``.

    Raises:
        SequenceParallelConfigError: it does not parse, or the documents do not add up to ``length``.
    """
    causal, window, borders = False, None, None
    seen: set[str] = set()
    for term in text.split("+"):
        name, _, numbers = term.partition(":")
        if name not in _TERMS or (numbers and name in ("causal", "full")):
            raise _bad_mask(text, f"{term!r} is not one of causal, full, window:LEFT[,RIGHT], packed:L1,L2,...")
        if name in seen or {"causal", "full"} <= seen | {name}:
            raise _bad_mask(text, f"{term!r} repeats or contradicts what is before it")
        seen.add(name)
        counts = _counts(text, numbers) if numbers else _TERMS[name](length)
        if name == "causal":
            causal = True
        elif name == "window":
            if len(counts) > 2:
                raise _bad_mask(text, f"a window has a left and a right side, not {len(counts)} numbers")
            window = (counts[0], counts[1] if len(counts) == 2 else 0)
        elif name == "packed":
            if sum(counts) != length:
                total = " + ".join(map(str, counts))
                raise _bad_mask(text, f"documents of {total} = {sum(counts)} tokens do not fill the {length} there are")
            borders = (0, *accumulate(counts))
    return MaskSpec(causal=causal, window=window, cu_seqlens=borders)


_TERMS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "causal": lambda length: (),
    "full": lambda length: (),
    "window": lambda length: (max(length // 4, 1), length // 8),
    "packed": lambda length: (
        (length // 3, length - length // 3) if length < 4 else (length // 3, 1, length - length // 3 - 1)
    ),
}


def _counts(text: str, numbers: str) -> tuple[int, ...]:
    parts = numbers.split(",")
    if not all(part.isdecimal() for part in parts):
        raise _bad_mask(text, f"{numbers!r} is not a list of counts")
    return tuple(map(int, parts))


def _bad_mask(text: str, why: str) -> SequenceParallelConfigError:
    return SequenceParallelConfigError(
        setting="mask", value=text, why=why, remedy="write for example causal+window:127 or causal+packed:100,28"
    )
