"""Dropout is a pure function of global coordinates: the same however the work is sharded, and statistically fair."""

from __future__ import annotations

import pytest
import torch
from test_kernels_parity import MASKS, Shape, assert_close, fast, make, oracle, run
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.kernels import AttentionSpec, attention
from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.mask import MaskSpec

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("kernel", ["math", "reference", "auto"])
@pytest.mark.parametrize("mask_name", ["full", "causal", "packed-window"])
def test_dropout_equals_the_oracle(kernel: str, mask_name: str) -> None:
    q, k, v, dout = make(Shape(v_dim=24))
    arguments = {"mask": MASKS[mask_name], "dropout_p": 0.25, "dropout_seed": 11, "head_offset": 3}
    assert_close(run(fast, q, k, v, dout, kernel=kernel, **arguments), oracle(q, k, v, dout, **arguments), 1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_it_drops_the_asked_share_everywhere(p: float) -> None:
    keep = Dropout(p, 1234, range(300), range(300)).keep(2, 4, "cpu").double()
    for dim in range(4):
        others = [d for d in range(4) if d != dim]
        means = keep.mean(others)
        sigma = (p * (1 - p) / (keep.numel() / keep.shape[dim])) ** 0.5
        assert (means - (1 - p)).abs().max() < 5 * sigma, f"uneven along dim {dim}"
    centred = keep - keep.mean()
    noise = 5 * p * (1 - p) / keep.numel() ** 0.5
    for dim in range(4):
        neighbours = centred.narrow(dim, 1, keep.shape[dim] - 1) * centred.narrow(dim, 0, keep.shape[dim] - 1)
        assert neighbours.mean().abs() < 2 * noise, f"neighbours along dim {dim} are correlated"


def test_no_distance_between_keys_or_queries_is_correlated() -> None:
    """Also those at which hashes of two multiplications fail, by powers of two."""
    keep = Dropout(0.5, 12345, range(64), range(2**15)).keep(1, 1, "cpu")[0, 0].double() - 0.5
    for distance in (1, 2, 3, 7, 64, 255, 1024, 2048, 4096, 8192, 16384):
        product = keep[:, distance:] * keep[:, :-distance]
        assert product.sum().abs() / product.numel() ** 0.5 < 5 * 0.25, f"keys {distance} apart"
    for distance in (1, 2, 32):
        product = keep[distance:] * keep[:-distance]
        assert product.sum().abs() / product.numel() ** 0.5 < 5 * 0.25, f"queries {distance} apart"


def test_coordinates_beyond_32_bits_do_not_alias() -> None:
    """Weights at coordinates that share their lower 32 bits, or that are each other's, agree by chance only."""

    def rows(q: int = 3, k: int = 5, batch: int = 1, head: int = 2, seed: int = 9) -> Tensor:
        return Dropout(0.5, seed, range(q, q + 64), range(k, k + 64), head, batch).keep(1, 1, "cpu")

    first = rows()
    others = [
        *(rows(k=5 + 2**31), rows(k=5 + 2**32), rows(k=5 + 2**40), rows(q=3 + 2**31), rows(q=3 + 2**32)),
        *(rows(batch=1 + 2**32), rows(head=2 + 2**32), rows(batch=2, head=1), rows(q=5, k=3), rows(seed=9 + 2**32)),
    ]
    for other in others:
        assert abs((first == other).double().mean() - 0.5) < 5 * 0.5 / 64


def test_seeds_give_unrelated_masks() -> None:
    first, second = (Dropout(0.5, seed, range(200), range(200)).keep(1, 4, "cpu") for seed in (7, 8))
    assert abs((first == second).double().mean().item() - 0.5) < 0.01


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 3, 2**200])
def test_any_integer_is_a_seed(seed: int) -> None:
    keep = Dropout(0.5, seed, range(64), range(64)).keep(1, 2, "cpu")
    assert 0.4 < keep.double().mean() < 0.6


def test_shards_see_their_part_of_the_global_mask() -> None:
    whole = Dropout(0.3, 99, range(40), range(50)).keep(3, 6, "cpu")
    striped = Dropout(0.3, 99, range(1, 40, 3), range(2, 50, 3), head_offset=2, batch_offset=1).keep(2, 3, "cpu")
    assert torch.equal(striped, whole[1:3, 2:5, 1:40:3, 2:50:3])
    narrowed = Dropout(0.3, 99, range(40), range(50)).narrow(slice(5, 9), slice(30, 44)).keep(3, 6, "cpu")
    assert torch.equal(narrowed, whole[:, :, 5:9, 30:44])


def test_sharding_heads_or_batch_changes_nothing() -> None:
    q, k, v, _ = make(Shape(heads=6, kv_heads=3))
    arguments = {"mask": MaskSpec(causal=True), "dropout_p": 0.4, "dropout_seed": 3}
    whole = attention(q, k, v, AttentionSpec(**arguments))
    upper = attention(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], AttentionSpec(head_offset=2, **arguments))
    torch.testing.assert_close(upper, whole[:, :, 2:])
    second = attention(q[1:], k[1:], v[1:], AttentionSpec(batch_offset=1, **arguments))
    torch.testing.assert_close(second, whole[1:])
    assert not torch.allclose(attention(q[1:], k[1:], v[1:], AttentionSpec(**arguments)), whole[1:])


def test_the_expected_output_is_that_without_dropout() -> None:
    q, k, v, _ = make(Shape(batch=1, q_len=8, k_len=64))
    dropped = [attention(q, k, v, AttentionSpec(MaskSpec(), dropout_p=0.5, dropout_seed=seed)) for seed in range(100)]
    plain = attention(q, k, v, AttentionSpec(MaskSpec()))
    spread = torch.stack(dropped).std(0) / len(dropped) ** 0.5
    assert ((torch.stack(dropped).mean(0) - plain).abs() / spread).max() < 6


def test_settings_are_checked() -> None:
    q, k, v, _ = make(Shape())
    with pytest.raises(SequenceParallelConfigError, match=r"dropout_p=1\.0: .* is a number in \[0, 1\)"):
        attention(q, k, v, AttentionSpec(MaskSpec(), dropout_p=1.0, dropout_seed=1))
    with pytest.raises(SequenceParallelConfigError, match=r"dropout_seed: it is None with dropout_p=0\.1"):
        attention(q, k, v, AttentionSpec(MaskSpec(), dropout_p=0.1))
    with pytest.raises(UnsupportedError, match=r"cpu_flash cannot serve this: the operator refuses dropout"):
        attention(q, k, v, AttentionSpec(MaskSpec(), dropout_p=0.1, dropout_seed=1, kernel="cpu_flash"))
