"""Seeds of attention dropout are drawn on the host, again when a generator is set back, and anew otherwise."""

from __future__ import annotations

import pytest
import torch

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.training.randomness import draw_seed

CUDA = torch.device("cuda", 0)


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A CUDA generator as torch tells its state: seed and offset, int64 each, on the host. Anything else is refused."""
    kept = {"state": torch.tensor([1234, 8], dtype=torch.int64).view(torch.uint8)}

    def put(state: torch.Tensor, device: torch.device) -> None:
        kept["state"] = state.clone()

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: kept["state"].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", put)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return kept


def test_a_draw_on_cuda_asks_no_device(generator: dict[str, torch.Tensor]) -> None:
    before = generator["state"]
    seeds = [draw_seed(CUDA) for _ in range(50)]
    assert len(set(seeds)) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert generator["state"].view(torch.int64).tolist() == [1234, 8 + 4 * 50]
    generator["state"] = before
    assert [draw_seed(CUDA) for _ in range(50)] == seeds
    generator["state"] = torch.tensor([1235, 8], dtype=torch.int64).view(torch.uint8)
    assert draw_seed(CUDA) not in seeds


def test_a_draw_in_a_cuda_graph_is_refused(generator: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match="every replay would drop the same weights"):
        draw_seed(CUDA)


def test_draws_on_the_cpu_follow_its_generator() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (draw_seed(torch.device("cpu")) for _ in range(2))
    assert first != second
    torch.set_rng_state(state)
    assert draw_seed(torch.device("cpu")) == first
