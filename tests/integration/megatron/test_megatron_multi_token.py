"""Multi-token prediction of a sharded sequence: gradients and log are those of one process, whoever has which."""

from __future__ import annotations

import multi_token_workers as workers
import pytest

from dsp_plugin.spawn import spawn


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "method"),
    [
        (3, "lightseq"),
        (2, "ring"),
        pytest.param(2, "lightseq", marks=pytest.mark.matrix),
        pytest.param(3, "ring", marks=pytest.mark.matrix),
        pytest.param(4, "ulysses", marks=pytest.mark.matrix),
    ],
)
def test_further_tokens_are_counted_over_all_ranks(ranks: int, method: str) -> None:
    for found in spawn(workers.errors, ranks, method, timeout=200):
        # The log is kept in fp32, and so is upstream's ratio of two counts that are integers.
        rounded = {name for name in found if name.endswith("log") or name.startswith("not given, per token: True")}
        assert max(found[name] for name in found.keys() - rounded) < 1e-10, found
        assert max(found.values()) < 1e-6, found
