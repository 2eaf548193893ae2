"""The decomposition of a mask into blocks covers exactly the pairs that the dense mask shows, each once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsp_plugin.kernels import torch_flash
from dsp_plugin.kernels.blocks import Block, blocks, tiles, trim
from dsp_plugin.kernels.reference import dense_mask
from dsp_plugin.kernels.windowed import Window, expressible, window_of
from dsp_plugin.layout import LAYOUTS, Layout
from dsp_plugin.mask import MaskSpec

pytestmark = pytest.mark.timeout(60)

side = st.none() | st.integers(0, 12)
window = st.none() | st.tuples(side, side)


@st.composite
def masks(draw: st.DrawFn, length: int) -> MaskSpec:
    borders = st.lists(st.integers(0, length), max_size=4).map(lambda inner: (0, *sorted(inner), length))
    return MaskSpec(draw(st.booleans()), draw(window), draw(st.none() | borders))


def painted(parts: list[Block] | tuple[Block, ...], rows: int, cols: int) -> Tensor:
    """How many parts show each (query, key) pair."""
    count = torch.zeros(rows, cols, dtype=torch.int64)
    for part in parts:
        count[part.q, part.k] += part.visible("cpu")
    return count


def assert_trimmed(part: Block) -> None:
    seen = part.visible("cpu")
    assert seen.any(0).all(), part
    assert seen.any(1).all(), part
    assert part.is_full == bool(seen.all()), part


@given(data=st.data(), length=st.integers(1, 24), size=st.integers(1, 4), kind=st.sampled_from(LAYOUTS))
@settings(max_examples=300, deadline=None)
def test_blocks_of_all_layouts_equal_the_dense_mask(data: st.DataObject, length: int, size: int, kind: str) -> None:
    mask = data.draw(masks(length))
    layout = Layout(kind, length, size)
    everyone = torch.arange(length)
    want = dense_mask(mask, everyone, everyone)
    for q_rank in range(size):
        for k_rank in range(size):
            for q_run in layout.spans(q_rank):
                for k_run in layout.spans(k_rank):
                    found = blocks(mask, q_run, k_run)
                    got = painted(found, len(q_run), len(k_run))
                    assert torch.equal(got, want[q_run, :][:, k_run].long())
                    for block in found:
                        assert_trimmed(block)
                    assert sum(block.rows for block in found) <= len(q_run)
                    assert sum(block.cols for block in found) <= len(k_run)


sizes = st.integers(1, 24)
offset = st.none() | st.integers(-30, 30)


@given(rows=sizes, cols=sizes, left=offset, right=offset, height=st.integers(1, 9), width=st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_tiles_partition_a_block(
    rows: int, cols: int, left: int | None, right: int | None, height: int, width: int
) -> None:
    block = trim(rows, cols, (left, right))
    want = Block(slice(0, rows), slice(0, cols), left, right).visible("cpu")
    if block is None:
        assert not want.any()
        return
    assert_trimmed(block)
    parts = list(tiles(block, height, width))
    assert torch.equal(painted(parts, rows, cols), want.long())
    for part in parts:
        assert_trimmed(part)
        assert part.rows <= height
        assert part.cols <= width


@given(rows=sizes, cols=sizes, left=offset, right=offset)
@settings(max_examples=300, deadline=None)
def test_the_cpu_operator_gets_only_what_it_knows(rows: int, cols: int, left: int | None, right: int | None) -> None:
    block = trim(rows, cols, (left, right))
    if block is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flash, "_STRIP_ROWS", 4)
        patch.setattr(torch_flash, "_MIN_STRIP_ROWS", 2)
        patch.setattr(torch_flash, "_BIAS_ELEMENTS", 48)
        parts = list(torch_flash.native_blocks(block))
    assert torch.equal(painted(parts, rows, cols), painted([block], rows, cols))
    for part in parts:
        assert_trimmed(part)
        assert part.is_full or part.is_causal or part.rows * part.cols <= 48


def flash_attention_2_sees(window: Window, rows: int, cols: int, most: tuple[int, int] | None = None) -> Tensor:
    """bool ``[rows, cols]``: FlashAttention-2's own rule, with its normalization of large windows.

    Source: csrc/flash_attn/flash_api.cpp (mha_fwd, mha_varlen_fwd, set_params_fprop) and mask.h of
    Dao-AILab/flash-attention 2.7.

    Args:
        most: queries and keys of the longest of the segments that are computed together.
    """
    _, longest = most or (rows, cols)
    left = -1 if window.left >= longest else window.left
    right = -1 if window.right >= longest else window.right
    if left < 0 and right < 0:
        return torch.ones(rows, cols, dtype=torch.bool)
    left = longest if left < 0 else left
    right = longest if right < 0 else right
    i = torch.arange(rows)[:, None] + cols - rows
    j = torch.arange(cols)[None, :]
    return (j >= i - left) & (j <= i + right)


def flash_attention_3_sees(window: Window, rows: int, cols: int, most: tuple[int, int] | None = None) -> Tensor:
    """The same for FlashAttention-3 (hopper/flash_api.cpp), whose limits are one token tighter."""
    most_rows, most_cols = most or (rows, cols)
    left = -1 if window.left >= most_cols - 1 else window.left
    right = -1 if window.right >= most_rows - 1 else window.right
    left = most_cols - 1 if left < 0 else left
    right = most_rows - 1 if right < 0 else right
    i = torch.arange(rows)[:, None] + cols - rows
    j = torch.arange(cols)[None, :]
    return (j >= i - left) & (j <= i + right)


@pytest.mark.parametrize("rule", [flash_attention_2_sees, flash_attention_3_sees])
@given(rows=sizes, cols=sizes, left=offset, right=offset)
@settings(max_examples=300, deadline=None)
def test_windows_mean_the_block_to_the_cuda_kernels(
    rule, rows: int, cols: int, left: int | None, right: int | None
) -> None:
    block = trim(rows, cols, (left, right))
    if block is None:
        return
    parts = expressible(block)
    count = torch.zeros(rows, cols, dtype=torch.int64)
    for part in parts:
        window = window_of(part)
        assert min(window.left, window.right) >= -1
        count[part.q, part.k] += rule(window, part.rows, part.cols)
    assert torch.equal(count, painted([block], rows, cols))
    stops = [part.q.stop for part in parts]
    assert [part.q.start for part in parts] == [block.q.start, *stops[:-1]], "rows are cut, never reordered"
    assert stops[-1] == block.q.stop
