"""A training forward draws from a seed that sequence peers share, and leaves the outer stream alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsp_plugin.patches.deepspeed.random_state import ForwardSeed

pytest.importorskip("deepspeed")


class Engine:
    """What is asked of an engine."""

    def __init__(self, micro_steps: int) -> None:
        self.micro_steps = micro_steps


class Draws(nn.Module):
    """Draws as often as it has tokens, as dropout does."""

    def forward(self, tokens: int, fail: bool = False) -> Tensor:
        drawn = torch.rand(tokens)
        if fail:
            raise ArithmeticError
        return drawn


def peer(outer_seed: int, replica: int = 0, micro_steps: int = 0) -> tuple[Draws, Engine]:
    """A hooked module and its engine, in a process whose generator is at `outer_seed`."""
    torch.manual_seed(outer_seed)
    engine = Engine(micro_steps)
    module = Draws()
    ForwardSeed(seed=7, replica=replica, engine=engine).attach(module)
    return module, engine


def test_peers_draw_alike_whatever_their_generators_and_token_counts() -> None:
    """Seven tokens here, six there."""
    module, engine = peer(1)
    here = module(7)
    module, engine = peer(2)
    assert torch.equal(module(6), here[:6])
    assert engine.micro_steps == 0


def test_every_forward_draws_anew() -> None:
    """Over calls in a micro step, micro steps, and replicas."""
    module, engine = peer(1)
    draws = [module(5), module(5)]
    engine.micro_steps = 1
    draws.append(module(5))
    module, engine = peer(1, replica=1)
    draws.append(module(5))
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_a_resumed_run_continues_the_seeds() -> None:
    """Micro step 3 draws the same in the run that went there and in one that starts there."""
    module, engine = peer(1)
    module(5)
    engine.micro_steps = 3
    went = module(5)
    module, engine = peer(9, micro_steps=3)
    assert torch.equal(module(5), went)


@pytest.mark.parametrize("fail", [False, True])
def test_the_outer_stream_is_left_alone(fail: bool) -> None:
    """So unequal token counts do not make peers drift apart, even when a forward fails."""
    module, _engine = peer(4)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(4))
    if fail:
        with pytest.raises(ArithmeticError):
            module(5, fail=True)
    else:
        module(5)
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_draws_from_the_outer_stream() -> None:
    """Nothing is dropped in evaluation, and a sampler's noise is the script's."""
    module, _engine = peer(4)
    module.eval()
    assert torch.equal(module(3), torch.rand(3, generator=torch.Generator().manual_seed(4)))
