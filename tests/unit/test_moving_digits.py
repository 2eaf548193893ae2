"""The demo's data: every video is a function of its seed and index, and shows what its caption says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).resolve().parents[2] / "launch" / "examples"))

from moving_digits import NULL_TOKEN, VOCABULARY, MovingDigits, bounce, encode

pytestmark = pytest.mark.timeout(60)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_an_item_depends_on_seed_and_index_alone():
    data, again = MovingDigits(50, seed=3), MovingDigits(1000, seed=3)
    torch.manual_seed(1)
    forward = [data[i] for i in range(8)]
    torch.manual_seed(2)
    backward = [again[i] for i in reversed(range(8))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))


def test_items_differ_between_indices_and_between_seeds():
    data, other = MovingDigits(50, seed=3), MovingDigits(50, seed=4)
    for key in ("video", "t", "noise"):
        assert not torch.equal(data[0][key], data[1][key])
        assert not torch.equal(data[0][key], other[0][key])


@pytest.mark.parametrize("digits", [1, 2])
def test_shapes_dtypes_and_ranges(digits: int):
    batch = next(iter(DataLoader(MovingDigits(8, frames=5, canvas=22, digits=digits), batch_size=8)))
    assert batch["video"].shape == batch["noise"].shape == (8, 5, 1, 22, 22)
    assert batch["labels"].shape == (8, 3 * digits)
    assert batch["t"].shape == (8,)
    assert batch["labels"].dtype == torch.int64
    assert {batch[key].dtype for key in ("video", "noise", "t")} == {torch.float32}
    assert batch["video"].min() == -1.0
    assert 0.5 < batch["video"].max() <= 1.0
    assert 0.0 <= batch["t"].min() < batch["t"].max() < 1.0


def test_noise_is_standard_normal_and_time_uniform():
    data = MovingDigits(400, frames=2)
    noise = torch.stack([data[i]["noise"] for i in range(50)])
    t = torch.stack([data[i]["t"] for i in range(400)])
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1.0) < 0.02
    # The mean of 400 uniform draws has a standard deviation of 0.0144; five of them.
    assert abs(t.mean() - 0.5) < 0.075
    assert abs(t.std() - 12**-0.5) < 0.03


@pytest.mark.parametrize("speed", [1, 2, 3])
def test_the_first_step_goes_where_the_caption_says(speed: int):
    data = MovingDigits(40, frames=2, canvas=24, speed=speed, uncaptioned=0.0)
    for i in range(len(data)):
        before, after = data[i]["video"][:, 0]
        digit, across, along = (VOCABULARY[token] for token in data[i]["labels"])
        assert digit in VOCABULARY[:10]
        step = (speed if along == "down" else -speed, speed if across == "right" else -speed)
        assert torch.equal(torch.roll(before, step, dims=(0, 1)), after)


def test_a_share_of_videos_has_no_caption():
    labels = torch.stack([MovingDigits(300, frames=1, uncaptioned=0.3)[i]["labels"] for i in range(300)])
    absent = labels == NULL_TOKEN
    assert torch.equal(absent.all(dim=1), absent.any(dim=1))
    assert 0.2 < absent.all(dim=1).float().mean() < 0.4


def test_bounce_reflects_at_both_ends():
    assert bounce(2, 1, 8, room=3).tolist() == [2, 3, 2, 1, 0, 1, 2, 3]
    assert bounce(1, -2, 5, room=4).tolist() == [1, 1, 3, 3, 1]


def test_encode_knows_the_vocabulary():
    assert encode("seven left up").tolist() == [7, 10, 12]


def test_no_room_to_move_is_an_error():
    with pytest.raises(ValueError, match=r"canvas=16 - digit_size=16 = 0 pixels"):
        MovingDigits(1, canvas=16, digit_size=16)


def test_iteration_ends():
    assert len(list(MovingDigits(3))) == 3
    with pytest.raises(IndexError, match="index 3 in a data set of 3"):
        MovingDigits(3)[3]
